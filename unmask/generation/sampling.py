"""From logits to a token and how sure the model is of it, as pure functions over the last axis.

Shapes: M positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessorList

from unmask.diffusion.rng import STREAM_SAMPLE, keyed_double
from unmask.errors import UnmaskError


class Sampled(NamedTuple):
    """A token for each position, and the model's own view of it: before temperature and filters."""

    token: Int[Tensor, "M"]
    confidence: Float[Tensor, "M"]
    """Probability of the token, in [0, 1]."""
    margin: Float[Tensor, "M"]
    """Probability of the most likely token over that of the second, in [0, 1]."""
    entropy: Float[Tensor, "M"]
    """Nats."""


def suppress(logits: Float[Tensor, "*rows V"], ids: Int[Tensor, "K"]) -> Float[Tensor, "*rows V"]:
    """Give the listed ids probability 0."""
    return logits.index_fill(-1, ids, -torch.inf)


def keep_top_k(logits: Float[Tensor, "M V"], k: int) -> Float[Tensor, "M V"]:
    """Give all but the k most likely tokens probability 0; ties with the k-th stay."""
    if k >= logits.shape[-1]:
        return logits
    least = logits.topk(k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits: Float[Tensor, "M V"], p: float) -> Float[Tensor, "M V"]:
    """Keep the fewest most likely tokens that have probability p together (Holtzman et al., 1904.09751)."""
    ordered, index = logits.sort(dim=-1, descending=True, stable=True)
    probability = torch.softmax(ordered, dim=-1)
    before = probability.cumsum(dim=-1) - probability
    keep = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, index, before < p)
    return logits.masked_fill(~keep, -torch.inf)


def as_processor(given: Any) -> Callable[[Int[Tensor, "M L"], Float[Tensor, "M V"]], Tensor] | None:
    """Make one function of logits processors: (ids of each position's row, logits) -> changed logits.

    Args:
        given: None, a processor or a list of them: transformers' `LogitsProcessor`, or functions of (ids,
            logits).

    Raises:
        UnmaskError: something that cannot be called; the function itself, what is no logits of the same shape
            with a possible token everywhere.
    """
    several = given if isinstance(given, list | tuple) else [] if given is None else [given]
    for one in several:
        if not callable(one):
            raise UnmaskError(
                f"logits_processor must be functions of (ids, logits); got {type(one).__name__}."
            )
    if not several:
        return None
    process: Any = LogitsProcessorList(several)

    def processed(ids: Tensor, logits: Tensor) -> Tensor:
        changed = process(ids, logits)
        shape = tuple(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
        if shape != logits.shape:
            raise UnmaskError(
                f"logits_processor must return logits of shape {tuple(logits.shape)}; got {shape}."
            )
        if not changed.amax(dim=-1).isfinite().all():
            raise UnmaskError(
                "the logits after logits_processor are not numbers (NaN or infinite), or leave no token"
                " possible."
            )
        return changed

    return processed


def uniforms(
    seed: Int[Tensor, "M"], position: Int[Tensor, "M"], step: Int[Tensor, "M"] | int
) -> Float[Tensor, "M"]:
    """Draw the one uniform in [0, 1) that a token takes, as a function of (seed, position, step)."""
    return keyed_double(seed, STREAM_SAMPLE, position, step)


def sample(
    logits: Float[Tensor, "M V"],
    uniform: Float[Tensor, "M"] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    raw: Float[Tensor, "M V"] | None = None,
) -> Sampled:
    """Choose a token for each position and say how sure the model is.

    With uniforms the choice is a sample from softmax(logits / temperature) among the tokens that the filters
    keep, by inverting its distribution function; without them it is the most likely token.

    Args:
        raw: the model's own logits where `logits` are changed ones; they decide what it is sure of.
    """
    log_p = _log_softmax(logits if raw is None else raw)
    if uniform is None:
        token = (log_p if raw is None else logits).argmax(dim=-1)
    else:
        logits = logits.to(log_p.dtype) / temperature
        if top_k is not None:
            logits = keep_top_k(logits, top_k)
        if top_p is not None:
            logits = keep_top_p(logits, top_p)
        reached = torch.softmax(logits, dim=-1).double().cumsum(dim=-1)
        token = torch.searchsorted(reached, uniform[:, None] * reached[:, -1:], right=True)[:, 0]
    best = log_p.topk(2, dim=-1).values.exp()
    p = log_p.exp()
    return Sampled(
        token,
        p.gather(-1, token[:, None])[:, 0],
        best[:, 0] - best[:, 1],
        -torch.where(p > 0, p * log_p, 0.0).sum(dim=-1),
    )


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)

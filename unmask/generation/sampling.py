"""From logits to a token and the model's confidence in it: pure functions over the last axis.

Shapes: M positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmask.diffusion.rng import STREAM_SAMPLE, keyed_double
from unmask.errors import UnmaskError


class Sampled(NamedTuple):
    """A token for each position, with the model's own figures: before temperature and filters."""

    token: Int[Tensor, "M"]
    confidence: Float[Tensor, "M"]  # probability of the token
    margin: Float[Tensor, "M"]  # probability of the most likely token minus that of the second
    entropy: Float[Tensor, "M"]  # nats


def sample(
    logits: Float[Tensor, "M V"],
    uniform: Float[Tensor, "M"] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    raw: Float[Tensor, "M V"] | None = None,
) -> Sampled:
    """Choose a token for each position.

    With uniforms the token is a sample from softmax(logits / temperature) among the tokens that the filters
    keep, by inverting its distribution function; without them it is the most likely one.

    Args:
        raw: the model's own logits if `logits` are changed ones; the source of all but the token.
    """
    raw = logits if raw is None else raw
    log_p = torch.log_softmax(raw.to(torch.promote_types(raw.dtype, torch.float32)), dim=-1)
    if uniform is None:
        token = (log_p if raw is logits else logits).argmax(dim=-1)
    else:
        logits = logits.to(log_p.dtype) / temperature
        if top_k is not None:
            logits = keep_top_k(logits, top_k)
        if top_p is not None:
            logits = keep_top_p(logits, top_p)
        cumulative = torch.softmax(logits, dim=-1).double().cumsum(dim=-1)
        token = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
    best = log_p.topk(2, dim=-1).values.exp()
    p = log_p.exp()
    return Sampled(
        token,
        p.gather(-1, token[:, None])[:, 0],
        best[:, 0] - best[:, 1],
        -torch.where(p > 0, p * log_p, 0.0).sum(dim=-1),
    )


def uniforms(
    seed: Int[Tensor, "M"], position: Int[Tensor, "M"], step: Int[Tensor, "M"] | int
) -> Float[Tensor, "M"]:
    """Draw one uniform in [0, 1) for each token, a function of (seed, position, step)."""
    return keyed_double(seed, STREAM_SAMPLE, position, step)


def suppress(logits: Float[Tensor, "*rows V"], ids: Int[Tensor, "K"]) -> Float[Tensor, "*rows V"]:
    """Give the listed ids probability 0; those beyond the vocabulary are ignored."""
    return logits.index_fill(-1, ids[ids < logits.shape[-1]], -torch.inf)


def keep_top_k(logits: Float[Tensor, "M V"], k: int) -> Float[Tensor, "M V"]:
    """Give all but the k most likely tokens probability 0; ties with the k-th stay."""
    if k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k, dim=-1).values[:, -1:], -torch.inf)


def keep_top_p(logits: Float[Tensor, "M V"], p: float) -> Float[Tensor, "M V"]:
    """Keep the fewest most likely tokens whose probabilities reach p (Holtzman et al., arXiv:1904.09751)."""
    ordered, index = logits.sort(dim=-1, descending=True, stable=True)
    probability = torch.softmax(ordered, dim=-1)
    before = probability.cumsum(dim=-1) - probability
    keep = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, index, before < p)
    return logits.masked_fill(~keep, -torch.inf)


def as_functions(setting: str, functions: Any) -> list[Any]:
    """Return logits processors or stopping criteria as a list; they may be one, a list or None.

    Raises:
        UnmaskError: names the setting; something that cannot be called.
    """
    listed = [] if functions is None else functions if isinstance(functions, list | tuple) else [functions]
    for function in listed:
        if not callable(function):
            raise UnmaskError(f"{setting} must be functions; got {type(function).__name__}.")
    return list(listed)

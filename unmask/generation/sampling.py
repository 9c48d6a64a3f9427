"""From logits to a token and the model's confidence in it: pure functions over the last axis.

Shapes: M positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from unmask.diffusion.rng import STREAM_SAMPLE, keyed_double
from unmask.errors import UnmaskError

_CACHED = 2**19  # logits that are worked on together: 2 MiB
_GROUP = 64  # ids
_LEAST = -1e30  # in the place of minus infinity, times 0


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
    *,
    with_margin: bool = True,
) -> Sampled:
    """Choose a token for each position.

    With uniforms the token is a sample from softmax(logits / temperature) among the tokens that the filters
    keep, by inverting its distribution function; without them it is the most likely one.

    Args:
        raw: the model's own logits if `logits` are changed ones; the source of all but the token.
        with_margin: whether the margin is asked for, which takes another pass over the logits; 0 otherwise.

    Raises:
        UnmaskError: logits that are NaN or infinite, or allow no token.
    """
    changed = raw is not None
    own = logits if raw is None else raw
    own = own.to(torch.promote_types(own.dtype, torch.float32))
    best, token = own.max(dim=-1)
    likeliest, allowed = token, best
    if uniform is not None:
        logits = logits.to(own.dtype) / temperature
        if top_k is not None:
            logits = keep_top_k(logits, top_k)
        if top_p is not None:
            logits = keep_top_p(logits, top_p)
        allowed = logits.amax(dim=-1)
        token = invert((logits - allowed[:, None]).exp_(), uniform)
    elif changed:
        allowed, token = logits.max(dim=-1)
    if not (allowed.isfinite() & best.isfinite()).all():
        raise UnmaskError(
            "the model's logits, or those that logits_processor returned, are NaN or infinite, or allow no token;"
            " check the weights and their dtype."
        )
    # In rows that stay in a core's cache, so that memory is read once and not by each operation.
    rows = len(own) if own.is_cuda else max(1, _CACHED // own.shape[-1])
    figures = []
    parts = (each.split(max(1, rows)) for each in (own, best, likeliest))
    for part, top, first in zip(*parts, strict=True):
        below = (part - top[:, None]).clamp_(min=_LEAST)  # of ids that are not allowed too: p = 0
        p = below.exp()
        total = p.sum(dim=-1)
        margin = torch.zeros_like(total)
        if with_margin:
            margin = (1.0 - p.scatter(1, first[:, None], 0.0).amax(dim=-1)) / total
        figures.append((total, margin, total.log() - p.mul_(below).sum(dim=-1) / total))
    total, margin, entropy = (torch.cat(figure) for figure in zip(*figures, strict=True))
    confidence = (own.gather(-1, token[:, None])[:, 0] - best).exp() / total
    return Sampled(token, confidence, margin, entropy)


def invert(weight: Float[Tensor, "M V"], uniform: Float[Tensor, "M"]) -> Int[Tensor, "M"]:
    """Draw an id in proportion to its weight, by inverting the distribution function in float64.

    First a group of ids, by the sums of groups, then an id of the group.
    """
    groups = F.pad(weight, (0, -weight.shape[-1] % _GROUP)).unflatten(-1, (-1, _GROUP))
    sums = groups.sum(dim=-1).double()
    until = sums.cumsum(dim=-1)
    target = uniform[:, None] * until[:, -1:]
    group = _first_above(until, target, sums)
    inside = groups.gather(1, group[..., None].expand(-1, -1, _GROUP))[:, 0].double()
    target = target - (until - sums).gather(1, group)
    return (group * _GROUP + _first_above(inside.cumsum(dim=-1), target, inside))[:, 0]


def _first_above(until: Tensor, target: Float[Tensor, "M 1"], weight: Tensor) -> Int[Tensor, "M 1"]:
    """The first place where the sum is above the target, or the last with a weight if rounding leaves none."""
    places = torch.arange(weight.shape[-1], device=weight.device)
    last = torch.where(weight > 0, places, 0).amax(dim=-1, keepdim=True)
    return torch.searchsorted(until, target, right=True).minimum(last)


def uniforms(
    seed: Int[Tensor, "M"], position: Int[Tensor, "M"], step: Int[Tensor, "M"] | int
) -> Float[Tensor, "M"]:
    """Draw one uniform in [0, 1) for each token, a function of (seed, position, step)."""
    return keyed_double(seed, STREAM_SAMPLE, position, step)


def suppress_(logits: Float[Tensor, "*rows V"], ids: Int[Tensor, "K"]) -> Float[Tensor, "*rows V"]:
    """Give the listed ids probability 0, in place; those beyond the vocabulary are ignored."""
    return logits.index_fill_(-1, ids[ids < logits.shape[-1]], -torch.inf)


def keep_top_k(logits: Float[Tensor, "M V"], k: int) -> Float[Tensor, "M V"]:
    """Give all but the k most likely tokens probability 0; ties with the k-th stay."""
    if k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k, dim=-1).values[:, -1:], -torch.inf)


def keep_top_p(logits: Float[Tensor, "M V"], p: float) -> Float[Tensor, "M V"]:
    """Keep the fewest most likely tokens whose probabilities reach p (Holtzman et al., arXiv:1904.09751)."""
    size, normaliser = 512, logits.logsumexp(dim=-1, keepdim=True)
    while True:  # the most likely tokens alone are sorted, as many as are needed
        size = min(2 * size, logits.shape[-1])
        top = logits.topk(size, dim=-1).values
        probability = (top - normaliser).exp()
        before = probability.cumsum(dim=-1) - probability
        if size == logits.shape[-1] or (before[:, -1] >= p).all():
            break
    count = (before < p).sum(dim=-1, keepdim=True)
    least = top.gather(-1, count - 1)
    keep = logits >= least
    if (keep.count_nonzero(dim=-1)[:, None] > count).any():  # of equal logits those of the lower ids
        above = logits > least
        room = count - above.count_nonzero(dim=-1)[:, None]
        equal = keep & ~above
        keep = above | (equal & (equal.cumsum(dim=-1) <= room))
    return torch.where(keep, logits, -torch.inf)


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

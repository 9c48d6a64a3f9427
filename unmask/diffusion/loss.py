"""The training objective: cross-entropy on masked tokens, weighted, over one divisor.

For absorbing-state diffusion the negative evidence lower bound is

    -log p(x_0) <= E_{t ~ U(0,1)} E_{x_t} [ 1/t * sum_{i masked} -log p(x_0[i] | x_t) ]

(Sahoo et al., arXiv:2406.07524, eq. 10; Nie et al., arXiv:2502.09992, eq. 3). The default preset "elbo" is
a one-sample estimate of the right-hand side, divided by the number of supervised (maskable) tokens of the
optimizer step, masked in this draw or not: **nats per supervised token**. The other presets are published
conventions: the weight of each masked token, and what the weighted sum is divided by. `docs/math.md` has the
table of what each one estimates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmask.diffusion.attention import Layout, count_by_document, per_position
from unmask.diffusion.corrupt import Noised
from unmask.diffusion.objective import Objective, Schedule

CART_P = 0.1  # of the geometric distribution, as Dream was trained


class Preset(NamedTuple):
    """One published convention of the loss."""

    weight: Callable[[Noised, Schedule], Float[Tensor, "B L"]]
    """Weight of the nll of each masked token; anything elsewhere."""
    divisor: Callable[[Noised], Tensor]
    """What the weighted sum is divided by: this batch's share of it, a 0-dim tensor."""
    is_bound: bool
    """Whether its expectation is an upper bound of a negative log-likelihood."""
    estimates: str
    """What its expectation is, in words."""


def token_nll(logits: Float[Tensor, "*rows V"], targets: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """Compute -log softmax(logits)[target] of each row in nats, in float32 or wider."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    flat = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none")
    return flat.reshape(targets.shape)


def time_weight(t: Float[Tensor, "..."], schedule: Schedule = "linear") -> Float[Tensor, "..."]:
    """Compute the ELBO's weight of a masked token, `(dt/ds) / t` for t(s) with uniform s.

    linear: 1/t. cosine: pi/2 sqrt(1 - t^2) / t. The bound is the same under every schedule (MD4,
    arXiv:2406.04329, prop. 1); only the variance of its estimate differs.
    """
    return 1 / t if schedule == "linear" else math.pi / 2 * torch.sqrt(1 - t * t) / t


def context_weight(is_masked: Bool[Tensor, "B L"], layout: Layout, p: float = CART_P) -> Float[Tensor, "B L"]:
    """Compute Dream's CART weight: how much unmasked context is near each token.

    w[n] = 1/2 sum_{i != n, unmasked} p (1 - p)^(|n - i| - 1), distances in tokens of one document (Ye et
    al., Dream 7B, arXiv:2508.15487, sec. 3.3). Weights do not depend on t.
    """
    reach = max(1, math.ceil(math.log(1e-8) / math.log(1 - p)))  # beyond it the terms are below rounding
    packed = layout.is_token.long().argsort(dim=1, descending=True, stable=True)  # tokens first, in order
    seen = (layout.is_token & ~is_masked).float().gather(1, packed)
    document = layout.document.masked_fill(~layout.is_token, -1).gather(1, packed)
    weight = torch.zeros_like(seen)
    for distance in range(1, min(reach, seen.shape[1] - 1) + 1):
        same = document[:, distance:] == document[:, :-distance]
        term = 0.5 * p * (1 - p) ** (distance - 1) * same
        weight[:, distance:] += term * seen[:, :-distance]
        weight[:, :-distance] += term * seen[:, distance:]
    return torch.zeros_like(weight).scatter(1, packed, weight)


def _by_time(noised: Noised, schedule: Schedule) -> Tensor:
    return time_weight(noised.t, schedule)


def _by_time_per_document(noised: Noised, schedule: Schedule) -> Tensor:
    count = per_position(noised.layout, count_by_document(noised.layout, noised.maskable))
    return time_weight(noised.t, schedule) / count.clamp(min=1)


def _supervised(noised: Noised) -> Tensor:
    return noised.maskable.sum()


PRESETS: dict[str, Preset] = {
    "elbo": Preset(_by_time, _supervised, True, "the negative ELBO per supervised token"),
    "llada": Preset(
        _by_time_per_document,
        lambda noised: (count_by_document(noised.layout, noised.maskable) > 0).sum(),
        True,
        "the mean over samples of the negative ELBO per token: short responses count as much as long ones",
    ),
    "coda": Preset(
        _by_time,
        lambda noised: noised.layout.is_token.sum(),
        False,
        "the negative ELBO over the number of all tokens, prompts too: too small by the prompts' share",
    ),
    "diffullama": Preset(
        _by_time,
        lambda noised: noised.is_masked.sum(),
        False,
        "1/t-weighted cross-entropy over the number of masked tokens: too large, about twice",
    ),
    "uniform": Preset(
        lambda noised, _: torch.ones_like(noised.t),
        _supervised,
        False,
        "cross-entropy of masked tokens without the weight 1/t: high masking rates count most",
    ),
    "cart": Preset(
        lambda noised, _: context_weight(noised.is_masked, noised.layout),
        _supervised,
        False,
        "cross-entropy weighted by the unmasked context near each masked token",
    ),
}


def loss_divisor(noised: Noised, objective: Objective) -> Tensor:
    """Compute what a batch adds to the divisor of the optimizer step under the objective's preset."""
    return PRESETS[objective.loss].divisor(noised)


def masked_weights(
    noised: Noised, objective: Objective, dtype: torch.dtype, divisor: Tensor | float | None = None
) -> Float[Tensor, "M"]:
    """Compute weight / divisor of each masked token, in row-major order; by default the batch's own."""
    divisor = loss_divisor(noised, objective) if divisor is None else divisor
    divisor = torch.as_tensor(divisor, device=noised.x_t.device).clamp(min=1)
    weight = PRESETS[objective.loss].weight(noised._replace(t=noised.t.to(dtype)), objective.schedule)
    return weight[noised.is_masked].to(dtype) / divisor

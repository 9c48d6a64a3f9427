"""The training objective: cross-entropy on masked tokens, weighted by 1/t, with one normaliser.

For absorbing-state diffusion with the linear schedule, the negative evidence lower bound is

    -log p(x_0) <= E_{t ~ U(0,1)} E_{x_t} [ 1/t * sum_{i masked} -log p(x_0[i] | x_t) ]

(Sahoo et al., arXiv:2406.07524, eq. 10; Nie et al., arXiv:2502.09992, eq. 3). The loss here is a
one-sample estimate of the right-hand side, divided by the number of supervised tokens: **nats per
supervised token**. Supervised means maskable: whether a token happened to be masked in this draw does
not change the divisor. Dividing by the number of masked tokens while weighting by 1/t, which is common,
estimates no bound and is 0/0 when nothing is masked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def token_nll(logits: Float[Tensor, "*rows V"], targets: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """Compute -log softmax(logits)[target] of each row in nats, in float32 or wider."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    flat = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none")
    return flat.reshape(targets.shape)


def diffusion_loss(
    nll: Float[Tensor, "M"], t: Float[Tensor, "M"], num_supervised: Int[Tensor, ""] | float
) -> Float[Tensor, ""]:
    """Sum nll / t over the masked tokens and divide by the number of supervised tokens.

    Args:
        nll: -log p(x_0[i] | x_t) of each of the M masked tokens, in nats.
        t: masking probability that was in force at each of them, in (0, 1].
        num_supervised: number of maskable tokens the sum stands for: of this batch, or of the whole
            optimizer step when several batches are accumulated.

    Returns:
        Nats per supervised token; 0 (never NaN) when nothing is supervised or nothing was masked.
    """
    divisor = torch.as_tensor(num_supervised, device=nll.device).clamp(min=1)
    return (nll / t.to(nll.dtype)).sum() / divisor

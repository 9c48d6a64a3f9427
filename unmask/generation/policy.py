"""Which of the masked positions to commit at a step."""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmask.errors import UnmaskError


def tokens_at_step(step: int, steps: int, canvas: int) -> int:
    """Spread `canvas` tokens evenly over `steps`: how many are committed at `step` (from 0)."""
    return (step + 1) * canvas // steps - step * canvas // steps


def share_steps(steps: int, canvas: int, block_length: int) -> list[int]:
    """Share `steps` out over the blocks of a canvas, in proportion to their tokens, at least one each.

    Raises:
        UnmaskError: fewer steps than blocks.
    """
    blocks = -(-canvas // block_length)
    if steps < blocks:
        raise UnmaskError(
            f"steps must be at least {blocks}, one for each block of {block_length} tokens in a canvas of"
            f" {canvas}; got {steps}."
        )
    # A full block has at least canvas / blocks tokens and the last one is rounded up: no share is 0.
    ends = [steps * min(number * block_length, canvas) // canvas for number in range(blocks + 1)]
    return [end - start for start, end in pairwise(ends)]


def most_confident(
    confidence: Float[Tensor, "B C"], candidates: Bool[Tensor, "B C"], count: Int[Tensor, "B"] | int
) -> Bool[Tensor, "B C"]:
    """Select the `count` most confident candidates of each row (fewer where there are fewer).

    Ties go to the leftmost position (MaskGIT, arXiv:2202.04200, section 3.2, without its annealing).
    """
    ranked = torch.where(candidates, confidence, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(ranked).scatter_(
        1, ranked, torch.arange(ranked.shape[1], device=ranked.device).expand_as(ranked)
    )
    limit = torch.as_tensor(count, device=rank.device).reshape(-1, 1)
    return (rank < limit) & candidates

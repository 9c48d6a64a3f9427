"""What one optimizer step minimises: how samples are corrupted and how the loss weighs what was masked.

`unmask.diffusion.curriculum` makes one for each step; `forward` takes it as `objective`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from unmask.errors import UnmaskError

Schedule = Literal["linear", "cosine"]
LossPreset = Literal["elbo", "llada", "coda", "diffullama", "uniform", "cart"]


@dataclass(frozen=True)
class Objective:
    """The settings of the forward process and of the loss; the defaults are the plain negative ELBO.

    "Document" is a row of the batch, or each of the documents packed into it.

    Attributes:
        eps: smallest masking rate t that is drawn, in (0, 1).
        schedule: how t follows from a uniform s: "linear", t = s, or "cosine", t = sin(pi s / 2).
        source_share: leading share of a document's source tokens that is context; the rest of them may be
            masked and is learnt. 1 conditions on the whole instruction.
        prefix_probability: S1. Share of the documents in which a random number of the first maskable
            tokens, at least one and not all, becomes context.
        truncate_probability: S2. Share of the documents that are cut after a random number of maskable
            tokens, at least one and not all; what is cut off becomes padding. Never both S1 and S2.
        block_masking_probability: S3. Share of the documents that are masked in cells of several tokens.
        mask_block_sizes: sizes of these cells, in tokens; each such document draws one of them.
        complementary: every sample is denoised twice, the second time with the other tokens masked.
        loss: preset, see `unmask.diffusion.loss.PRESETS`.
        future_share: share of the later tokens that each token attends to: 1 = bidirectional, 0 = causal.

    Raises:
        UnmaskError: a value out of its range, or two that contradict each other.
    """

    eps: float = 1e-3
    schedule: Schedule = "linear"
    source_share: float = 1.0
    prefix_probability: float = 0.0
    truncate_probability: float = 0.0
    block_masking_probability: float = 0.0
    mask_block_sizes: tuple[int, ...] = ()
    complementary: bool = False
    loss: LossPreset = "elbo"
    future_share: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith(("_probability", "_share")) and not 0 <= value <= 1:
                raise UnmaskError(f"{field.name} must be in [0, 1]; got {value}.")
        if not 0 < self.eps < 1:
            raise UnmaskError(
                f"eps must be above 0 and below 1: the loss divides by rates t down to it; got {self.eps}."
            )
        for name, kind in (("schedule", Schedule), ("loss", LossPreset)):
            if getattr(self, name) not in get_args(kind):
                raise UnmaskError(
                    f"{name} must be one of {', '.join(get_args(kind))}; got {getattr(self, name)!r}."
                )
        if self.prefix_probability + self.truncate_probability > 1:
            raise UnmaskError(
                "prefix_probability + truncate_probability must be at most 1, for a sample takes one;"
                f" got {self.prefix_probability} + {self.truncate_probability}."
            )
        if self.block_masking_probability and not self.mask_block_sizes:
            raise UnmaskError("block_masking_probability needs mask_block_sizes, such as (2, 4, 8).")
        if any(size < 2 for size in self.mask_block_sizes):
            raise UnmaskError(f"mask_block_sizes must be 2 or more; got {self.mask_block_sizes}.")
        if self.complementary and self.schedule != "linear":
            raise UnmaskError(
                "complementary masks need schedule 'linear': the complement of rate t has rate 1 - t,"
                f" which {self.schedule!r} does not draw alike."
            )
        if self.complementary and self.eps >= 0.5:
            raise UnmaskError(
                f"complementary masks draw t from [eps, 1 - eps]: eps must be below 0.5; got {self.eps}."
            )
        if self.complementary and self.loss == "diffullama":
            raise UnmaskError(
                "complementary masks contradict loss 'diffullama', which divides by the number of masked"
                " tokens: the two masks together take every token."
            )

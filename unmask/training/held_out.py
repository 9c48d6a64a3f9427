"""The held-out loss: the bound on -log p with noise that never changes and a low variance.

Of the n maskable tokens of a sample (of each block, in a block-causal model) exactly k are masked, k uniform
on 1..n, and n/k times the sum of their nll estimates the bound without bias (Nie et al., LLaDA,
arXiv:2502.09992, eq. 6), better than independent masks do: how many are masked is no chance. Over the samples
the shares k/n are spread evenly: they are made of a low-discrepancy sequence in the sample's number. Both are
functions of (seed, sample id) alone, so the loss depends neither on batches, packing and processes nor on
what is trained.

Shapes: B batch, L sequence, D documents of a row, N maskable tokens of the batch, M masked ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmask.training.dataset import SOURCE_BIT, SOURCES
from unmask.diffusion.keyed import STREAM_MASK, STREAM_STRATA, keyed_hash
from unmask.diffusion.noise import Drawn
from unmask.training.callbacks import BY_T

BINS = 10  # of the noise level, for the picture

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio: its multiples are spread evenly
_SILVER = 0x6A09E667F3BCC909  # 2^64 (sqrt(2) - 1), for the blocks of a sample
_BITS = 40  # of the uniforms that k is made of


class Masks(NamedTuple):
    """What is masked for one evaluation of a batch."""

    is_masked: Bool[Tensor, "B L"]
    size: Int[Tensor, "B L"]
    """n: maskable tokens of the sample, or of the token's block; 0 where nothing can be masked."""
    k: Int[Tensor, "B L"]
    """How many of them are masked."""


def exact_masks(drawn: Drawn, sample_ids: Int[Tensor, "..."], seed: int) -> Masks:
    """Mask k of the n maskable tokens of each sample, or of each block of it.

    Args:
        drawn: says what is maskable, and has each document's noise seed, from which the tokens are chosen.
        sample_ids: of rows (B,) or of their documents (B, D).
        seed: of the run: where in its cycle the sequence of shares starts.
    """
    maskable, document = drawn.maskable, drawn.layout.document
    row, column = maskable.nonzero(as_tuple=True)
    length = maskable.shape[1]
    block = torch.zeros_like(document) if drawn.block is None else drawn.block
    group = (row * length + document[row, column]) * length + block[row, column]
    _, group, sizes = group.unique(return_inverse=True, return_counts=True)
    # Rank the tokens of each group by a hash.
    number = keyed_hash(drawn.seed[row, column], STREAM_MASK, drawn.layout.position[row, column])
    order = number.argsort()
    order = order[group[order].argsort(stable=True)]
    starts = sizes.cumsum(dim=0) - sizes
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - starts[group[order]]
    # k = 1 + floor(n u), in integers: u runs through the golden ratio's multiples, sample after sample.
    ids = sample_ids[:, None].expand(maskable.shape) if sample_ids.dim() == 1 else sample_ids
    ids = ids[row, column] if sample_ids.dim() == 1 else ids[row, document[row, column]]
    start = keyed_hash(torch.tensor(seed, device=ids.device), STREAM_STRATA)
    u = ids * _GOLDEN + block[row, column] * _SILVER + start
    bits = (u >> (64 - _BITS)) & ((1 << _BITS) - 1)
    size = sizes[group]
    k = 1 + (size * bits >> _BITS)
    is_masked = torch.zeros_like(maskable)
    is_masked[row, column] = rank < k
    table = torch.zeros((2, *maskable.shape), dtype=torch.long, device=maskable.device)
    table[:, row, column] = torch.stack([size, k])
    return Masks(is_masked, table[0], table[1])


class HeldOutSums:
    """Adds up batches of an evaluation, by source and by noise level.

    Args:
        sources: names of the sources, in the order of their numbers in the sample ids.
    """

    def __init__(self, sources: Sequence[str], device: torch.device):
        self.sources = list(sources) or [""]
        # Of each source: sums over its samples of their bound, their tokens, squares and products, and 1.
        self.samples = torch.zeros(len(self.sources), 6, dtype=torch.float64, device=device)
        # Of each level: nll of the masked tokens, and their number.
        self.levels = torch.zeros(BINS, 2, dtype=torch.float64, device=device)

    def add(
        self, masks: Masks, nll: Float[Tensor, "M"], drawn: Drawn, sample_ids: Int[Tensor, "..."]
    ) -> None:
        """Add a batch.

        Args:
            nll: -log p of each masked token, in row-major order, in nats.
        """
        is_masked, document = masks.is_masked, drawn.layout.document
        nll = nll.double()
        size, k = masks.size[is_masked], masks.k[is_masked]
        bound = torch.zeros(is_masked.shape, dtype=torch.float64, device=nll.device)
        bound[is_masked] = nll * size / k
        # One column a document, as many as a row has columns.
        per_sample = torch.zeros_like(bound).scatter_add_(1, document, bound)
        tokens = torch.zeros_like(bound).scatter_add_(1, document, drawn.maskable.double())
        row, place = tokens.nonzero(as_tuple=True)
        n, b = tokens[row, place], per_sample[row, place]
        ids = sample_ids[row] if sample_ids.dim() == 1 else sample_ids[row, place]
        source = (ids >> SOURCE_BIT) & (SOURCES - 1)
        source = source.clamp(max=len(self.sources) - 1)
        self.samples.index_add_(0, source, torch.stack([b, n, b * b, b * n, n * n, n / n], dim=1))
        # Shares in ((i, i + 1] / BINS), in integers.
        level = (k * BINS + size - 1) // size - 1
        self.levels.index_add_(0, level, torch.stack([nll, torch.ones_like(nll)], dim=1))

    def metrics(self, accelerator: Any, prefix: str) -> tuple[dict[str, float], int]:
        """Return the losses over all processes, and the number of samples they are of.

        Metrics: `loss`, nats per token; `loss_stderr`, its standard error, mostly that of the choice of
        samples; `loss_SOURCE` where there are several; `by_t/0.05` and so on, mean nll of masked tokens.
        """
        both = torch.cat([self.samples.flatten(), self.levels.flatten()])
        both = accelerator.reduce(both).cpu()
        samples = both[: self.samples.numel()].view(self.samples.shape)
        levels = both[self.samples.numel() :].view(self.levels.shape)
        loss, stderr = _ratio(samples.sum(dim=0).tolist())
        metrics = {f"{prefix}_loss": loss, f"{prefix}_loss_stderr": stderr}
        if len(self.sources) > 1:
            for name, sums in zip(self.sources, samples.tolist(), strict=True):
                if sums[1]:
                    metrics[f"{prefix}_loss_{name}"] = _ratio(sums)[0]
        for level, (nll, count) in enumerate(levels.tolist()):
            if count:
                metrics[f"{prefix}_{BY_T}{(level + 0.5) / BINS:.2f}"] = nll / count
        return metrics, round(samples[:, 5].sum().item())


def _ratio(sums: list[float]) -> tuple[float, float]:
    """Nats per token, and the standard error of a ratio of sums; 0 of one sample."""
    bound, tokens, bb, bn, nn, samples = sums
    ratio = bound / max(tokens, 1)
    squares = bb - 2 * ratio * bn + ratio * ratio * nn
    few = samples < 2 or tokens == 0
    return ratio, 0.0 if few else math.sqrt(max(0.0, squares) * samples / (samples - 1)) / tokens

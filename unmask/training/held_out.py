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
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmask.data.encode import SOURCE_BIT, SOURCES
from unmask.diffusion.corrupt import Noised
from unmask.diffusion.likelihood import Masks
from unmask.training.callbacks import BY_T

BINS = 10  # of the noise level, for the picture


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
        self, masks: Masks, nll: Float[Tensor, "M"], noised: Noised, sample_ids: Int[Tensor, "..."]
    ) -> None:
        """Add a batch.

        Args:
            nll: -log p of each masked token, in row-major order, in nats.
        """
        is_masked, document = masks.is_masked, noised.layout.document
        nll = nll.double()
        size, k = masks.size[is_masked], masks.k[is_masked]
        bound = torch.zeros(is_masked.shape, dtype=torch.float64, device=nll.device)
        bound[is_masked] = nll * size / k
        # One column a document, as many as a row has columns.
        per_sample = torch.zeros_like(bound).scatter_add_(1, document, bound)
        tokens = torch.zeros_like(bound).scatter_add_(1, document, noised.maskable.double())
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

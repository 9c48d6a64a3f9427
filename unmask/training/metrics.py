"""How much of a run is useful work: tokens a second, positions without padding, FLOPs against the peak.

Shapes: B batch, L sequence.
"""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unmask.diffusion.attention import count_by_document
from unmask.diffusion.corrupt import Noised
from unmask.training.parallel import Processes

PARTS: tuple[str, ...] = ("data", "forward", "backward", "optimizer", "evaluation", "save", "other")
# Tokens that could have been masked; positions that held a token; positions that went through the network,
# padding too; floating-point operations that the model needs for the tokens, see `model_flops`.
COUNTS = ("supervised", "useful", "computed", "flops")
GIB = 2**30


class Usage(NamedTuple):
    """What all processes did in a stretch of a run."""

    counts: Float[Tensor, "4"] = torch.zeros(len(COUNTS), dtype=torch.float64)
    """Sums over the processes, see `COUNTS`."""
    seconds: Float[Tensor, "7"] = torch.zeros(len(PARTS), dtype=torch.float64)
    """Of each of `PARTS`, a mean over the processes."""
    peak_flops: float = 0.0
    """Operations a second that the devices can do, as measured."""
    peak_memory: float = 0.0
    """Bytes, of the process with the most; 0 where it is not known."""

    def plus(self, other: Usage) -> Usage:
        """Join this stretch and the next one."""
        return other._replace(counts=self.counts + other.counts, seconds=self.seconds + other.seconds)

    def logs(self) -> dict[str, float]:
        """What is logged; rates are of the time without evaluation and saving."""
        supervised, useful, computed, flops = self.counts.tolist()
        spent = dict(zip(PARTS, self.seconds.tolist(), strict=True))
        total = sum(spent.values())
        training = total - spent["evaluation"] - spent["save"]
        memory = {"peak_memory_gib": self.peak_memory / GIB} if self.peak_memory else {}
        return {
            "supervised_tokens_per_second": _ratio(supervised, training),
            "useful_positions": _ratio(useful, computed),
            "model_flops_utilisation": _ratio(flops, training * self.peak_flops),
            **{f"time/{part}": _ratio(seconds, total) for part, seconds in spent.items()},
            **memory,
        }

    def lines(self) -> list[str]:
        """What a person is told at the end."""
        if not self.counts.any():
            return []
        logs = self.logs()
        memory = f", peak memory {self.peak_memory / GIB:.2f} GiB" if self.peak_memory else ""
        shares = ", ".join(f"{part} {logs[f'time/{part}']:.0%}" for part in PARTS)
        return [
            f"work: {logs['supervised_tokens_per_second']:,.0f} supervised tokens/s,"
            f" {logs['useful_positions']:.1%} of computed positions useful,"
            f" {logs['model_flops_utilisation']:.1%} of the measured peak"
            f" ({self.peak_flops / 1e9:,.0f} GFLOP/s){memory}",
            f"time: {shares}",
        ]


class Accounting:
    """Counts the work of training steps, and the time it takes, by parts of a step.

    Time is taken without waiting for the device: on a GPU a mark is an event in its stream, and the marks are
    read where losses are logged.

    Args:
        model: the denoiser, before it is sharded.
        dtype: compute dtype.
    """

    def __init__(self, model: Any, dtype: torch.dtype, group: Processes):
        self.group = group
        self.per_token, self.per_pair, self.per_row = model_flops(model)
        self.peak = measured_peak(group.device.type, dtype)
        self.counts = torch.zeros(len(COUNTS), dtype=torch.float64, device=group.device)
        self.session = Usage()
        self.start()

    def start(self) -> None:
        """Start the clock."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.events: list[tuple[str, Any]] = []  # of a GPU, not yet read
        self.last: Any = self._now()

    def mark(self, part: str) -> None:
        """The time since the last mark was spent on `part`, one of `PARTS`."""
        now = self._now()
        if self.group.device.type == "cuda":
            self.events.append((part, now))
        else:
            self.seconds[part] += now - self.last
            self.last = now

    def count(self, noised: Noised, complementary: bool, ragged: bool) -> None:
        """Count a micro-batch that is trained on; `ragged`: padding is left out before the network."""
        is_token, maskable = noised.layout.is_token, noised.maskable
        draws = 2 if complementary else 1
        useful = is_token.sum()
        # The masks of a draw and of its complement together take every token that may be masked.
        masked = maskable.sum() if complementary else noised.is_masked.sum()
        pairs = count_by_document(noised.layout, is_token).double().square().sum()
        computed = useful if ragged else torch.tensor(is_token.numel(), device=is_token.device)
        if noised.block is not None:  # a noised copy of the columns that may be masked goes along
            useful = useful + maskable.sum()
            computed = computed + len(is_token) * maskable.any(dim=0).sum()
        flops = (useful * self.per_token + pairs * self.per_pair) * draws + masked * self.per_row
        counts = (maskable.sum(), useful * draws, computed * draws, flops)
        self.counts += torch.stack([value.double() for value in counts])

    def report(self) -> Usage:
        """Return what was done since the last report, over all processes, which must all call it."""
        self.mark("other")
        if self.events:
            self.events[-1][1].synchronize()
        for part, event in self.events:
            self.seconds[part] += self.last.elapsed_time(event) / 1000
            self.last = event
        mine = [*self.counts.tolist(), *self.seconds.values(), self.peak, peak_memory(self.group.device)]
        table = torch.tensor(self.group.gather(mine), dtype=torch.float64)
        counts, seconds, peaks, memory = table.split([len(COUNTS), len(PARTS), 1, 1], dim=1)
        usage = Usage(counts.sum(dim=0), seconds.mean(dim=0), peaks.sum().item(), memory.max().item())
        self.counts.zero_()
        self.seconds, self.events = dict.fromkeys(PARTS, 0.0), []
        self.session = self.session.plus(usage)
        return usage

    def _now(self) -> Any:
        if self.group.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def model_flops(model: Any) -> tuple[float, float, float]:
    """Count the floating-point operations of a training step, forward and backward, that the model needs.

    Two for each weight of a matrix and token in the forward pass and four in the backward pass, two of them
    for the weight's gradient, which a frozen weight does not have. Embeddings are looked up. Padding, attention
    across documents, recomputed activations and logits of unmasked rows are not needed.

    Returns:
        Operations a token, a pair of tokens of one document, and a masked token (the head).
    """
    config, embedding = model.config, model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight

    def flops(weight: Any) -> float:
        return (6.0 if weight.requires_grad else 4.0) * weight.numel()

    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    per_token = sum(flops(w) for w in matrices if w is not embedding and w is not head)
    inner = config.num_attention_heads * model.model.layers[0].self_attn.head_dim
    per_pair = 12.0 * inner * config.num_hidden_layers  # scores and their weighted sum
    return per_token, per_pair, flops(head)


@cache
def measured_peak(device_type: str, dtype: torch.dtype) -> float:
    """Measure the operations a second of a matrix product here, the best of 0.3 s; once a process."""
    side, together = (1024, 1) if device_type == "cpu" else (8192, 4)
    generator = torch.Generator(device_type).manual_seed(0)  # the run's own is not touched
    a = torch.randn(side, side, device=device_type, generator=generator).to(dtype)
    product = torch.mm(a, a)

    def wait() -> float:
        if device_type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    best, stop = 0.0, wait() + 0.3
    while not best or time.perf_counter() < stop:
        start = wait()
        for _ in range(together):
            torch.mm(a, a, out=product)
        best = max(best, together * 2 * side**3 / (wait() - start))
    return best


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held so far: allocated on a GPU, else resident in this process (Linux; else 0)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0

"""How much of a run is useful work: tokens a second, positions without padding, FLOPs against the peak.

Shapes: B batch, L sequence.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from unmask.diffusion.attention import count_by_document
from unmask.diffusion.corrupt import Noised
from unmask.training.parallel import Processes

PARTS: tuple[str, ...] = ("data", "forward", "backward", "optimizer", "evaluation", "save", "other")
APART = ("evaluation", "save")  # what rates are not divided by
COUNTS = ("supervised", "useful", "computed", "flops")
GIB = 2**30


@dataclass(frozen=True)
class Usage:
    """What all processes did in a stretch of a run; sums over them where nothing else is said."""

    supervised: float = 0.0
    """Tokens that could have been masked."""
    useful: float = 0.0
    """Positions that held a token."""
    computed: float = 0.0
    """Positions that went through the network, padding too."""
    flops: float = 0.0
    """Floating-point operations that the model needs for the tokens, see `model_flops`."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    """Of each part; a mean over the processes."""
    peak_flops: float = 0.0
    """Operations a second that the devices can do, as measured."""
    peak_memory: int | None = None
    """Bytes, of the process with the most; None where it is not known."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            **{name: getattr(self, name) + getattr(other, name) for name in COUNTS},
            seconds={part: self.seconds[part] + other.seconds[part] for part in PARTS},
            peak_flops=other.peak_flops,
            peak_memory=other.peak_memory,
        )

    @property
    def training_seconds(self) -> float:
        """Seconds without evaluation and saving."""
        return sum(seconds for part, seconds in self.seconds.items() if part not in APART)

    @property
    def tokens_per_second(self) -> float:
        """Supervised tokens a second of training."""
        return _ratio(self.supervised, self.training_seconds)

    @property
    def useful_share(self) -> float:
        """Useful positions per computed position."""
        return _ratio(self.useful, self.computed)

    @property
    def utilisation(self) -> float:
        """Model FLOP utilisation: share of the measured peak while training."""
        return _ratio(self.flops, self.training_seconds * self.peak_flops)

    def time_shares(self) -> dict[str, float]:
        """The share of each part in the time."""
        total = sum(self.seconds.values())
        return {part: _ratio(seconds, total) for part, seconds in self.seconds.items()}

    def logs(self) -> dict[str, float]:
        """What is logged."""
        memory = {} if self.peak_memory is None else {"peak_memory_gib": self.peak_memory / GIB}
        return {
            "supervised_tokens_per_second": self.tokens_per_second,
            "useful_positions": self.useful_share,
            "model_flops_utilisation": self.utilisation,
            **{f"time/{part}": share for part, share in self.time_shares().items()},
            **memory,
        }

    def lines(self) -> list[str]:
        """What a person is told at the end."""
        if not self.computed:
            return []
        memory = "" if self.peak_memory is None else f", peak memory {self.peak_memory / GIB:.2f} GiB"
        shares = ", ".join(f"{part} {share:.0%}" for part, share in self.time_shares().items())
        return [
            f"work: {self.tokens_per_second:,.0f} supervised tokens/s, {self.useful_share:.1%} of computed"
            f" positions useful, {self.utilisation:.1%} of the measured peak"
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

    def count(self, noised: Noised, complementary: bool, packed: bool) -> None:
        """Count a micro-batch that is trained on; `packed`: padding is left out before the network."""
        is_token, maskable = noised.layout.is_token, noised.maskable
        draws = 2 if complementary else 1
        useful = is_token.sum()
        # The masks of a draw and of its complement together take every token that may be masked.
        masked = maskable.sum() if complementary else noised.is_masked.sum()
        pairs = count_by_document(noised.layout, is_token).double().square().sum()
        computed = useful if packed else torch.tensor(is_token.numel(), device=is_token.device)
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
        memory = peak_memory(self.group.device)
        mine = [*self.counts.tolist(), *self.seconds.values(), self.peak, -1 if memory is None else memory]
        table = torch.tensor(self.group.gather(mine), dtype=torch.float64)
        sums, means, most = table.sum(dim=0).tolist(), table.mean(dim=0).tolist(), table.amax(dim=0).tolist()
        usage = Usage(
            **dict(zip(COUNTS, sums, strict=False)),
            seconds=dict(zip(PARTS, means[len(COUNTS) :], strict=False)),
            peak_flops=sums[-2],
            peak_memory=int(most[-1]) if most[-1] >= 0 else None,
        )
        self.counts.zero_()
        self.seconds, self.events = dict.fromkeys(PARTS, 0.0), []
        self.session += usage
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
    config = model.config
    embedding = model.get_input_embeddings().weight
    head = getattr(model.get_output_embeddings(), "weight", None)
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    per_token = sum(_flops(w) for w in matrices if w is not embedding and w is not head)
    inner = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    per_pair = 12.0 * inner * config.num_hidden_layers  # scores and their weighted sum
    return per_token, per_pair, 0.0 if head is None else _flops(head)


def _flops(weight: Any) -> float:
    return (6.0 if weight.requires_grad else 4.0) * weight.numel()


@cache
def measured_peak(device_type: str, dtype: torch.dtype) -> float:
    """Measure the operations a second of a matrix product here, the best of 0.3 s; once a process."""
    side, together = (1024, 1) if device_type == "cpu" else (8192, 4)
    generator = torch.Generator(device_type).manual_seed(0)  # the run's own is not touched
    a = torch.randn(side, side, device=device_type, generator=generator).to(dtype)
    product = torch.mm(a, a)
    best, stop = 0.0, time.perf_counter() + 0.3
    while not best or time.perf_counter() < stop:
        _wait(device_type)
        start = time.perf_counter()
        for _ in range(together):
            torch.mm(a, a, out=product)
        _wait(device_type)
        best = max(best, together * 2 * side**3 / (time.perf_counter() - start))
    return best


def _wait(device_type: str) -> None:
    if device_type != "cpu":
        torch.accelerator.synchronize()


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes held so far: allocated on a GPU, else resident in this process (Linux alone)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(found[0].split()[1]) * 1024 if found else None


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0

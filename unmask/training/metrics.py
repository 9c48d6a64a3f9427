"""How much of a run is useful work: tokens a second, positions without padding, FLOPs against the peak.

Shapes: B batch, L sequence.
"""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.diffusion.attention import count_by_document
from unmask.diffusion.corrupt import Noised
from unmask.diffusion.objective import Objective
from unmask.training.parallel import Processes

PARTS: tuple[str, ...] = ("data", "forward", "backward", "optimizer", "evaluation", "save", "other")
# Tokens that could have been masked; positions that held a token; positions that went through the network,
# padding too; floating-point operations that the model needs for the tokens, see `model_flops`.
COUNTS = ("supervised", "useful", "computed", "flops")
GIB, TIME = 2**30, "time/"


class Accounting:
    """Counts the work of training steps, and the time it takes, by parts of a step.

    Time is taken without waiting for the device: on a GPU a mark is an event in its stream, and the marks are
    read where losses are logged.

    Args:
        model: the denoiser, before it is sharded.
        dtype: compute dtype.
    """

    def __init__(self, model: Any, dtype: torch.dtype, group: Processes):
        self.group, self.dtype = group, dtype
        self.per_token, self.per_pair, self.per_row = model_flops(model)
        self.peak = sum(group.gather(measured_peak(group.device.type, dtype)))
        self.counts = torch.zeros(len(COUNTS), dtype=torch.float64, device=group.device)
        self.session = torch.zeros(len(COUNTS) + len(PARTS), dtype=torch.float64)  # sums over the processes
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

    def count(self, noised: Noised, objective: Objective) -> None:
        """Count a micro-batch that is trained on."""
        is_token, maskable = noised.layout.is_token, noised.maskable
        draws = 2 if objective.complementary else 1
        # The masks of a draw and of its complement together take every token that may be masked.
        masked = maskable.sum() if objective.complementary else noised.is_masked.sum()
        pairs = count_by_document(noised.layout, is_token).double().square().sum()
        useful, columns = is_token.sum(), is_token.shape[1]
        if noised.block is not None:  # a noised copy of what may be masked goes along
            useful, columns = useful + maskable.sum(), columns + maskable.any(dim=0).sum()
        # A mask of positions, or float32 on a GPU, keeps the padding: see `run_backbone`.
        masks = noised.block is not None or objective.future_share < 1 or self.dtype.itemsize > 2
        kept = masks and is_token.is_cuda
        computed = torch.as_tensor(len(is_token) * columns, device=is_token.device) if kept else useful
        flops = (useful * self.per_token + pairs * self.per_pair) * draws + masked * self.per_row
        counts = (maskable.sum(), useful * draws, computed * draws, flops)
        self.counts += torch.stack([value.double() for value in counts])

    def report(self) -> dict[str, float]:
        """Return what is logged of the work since the last report; called on every process."""
        self.mark("other")
        if self.events:
            self.events[-1][1].synchronize()
        for part, event in self.events:
            self.seconds[part] += self.last.elapsed_time(event) / 1000
            self.last = event
        mine = [*self.counts.tolist(), *self.seconds.values()]
        work = torch.tensor(self.group.gather(mine), dtype=torch.float64).sum(dim=0)
        self.session += work
        self.counts.zero_()
        self.seconds, self.events = dict.fromkeys(PARTS, 0.0), []
        self.memory = max(self.group.gather(peak_memory(self.group.device))) / GIB
        return {**self._rates(work), **({"peak_memory_gib": self.memory} if self.memory else {})}

    def _rates(self, work: Tensor) -> dict[str, float]:
        """Rates are of the time without evaluation and saving."""
        supervised, useful, computed, flops, *seconds = work.tolist()
        shares = {TIME + part: _ratio(s, sum(seconds)) for part, s in zip(PARTS, seconds, strict=True)}
        training = sum(seconds) * (1 - shares[TIME + "evaluation"] - shares[TIME + "save"]) / self.group.ranks
        return {
            "supervised_tokens_per_second": _ratio(supervised, training),
            "useful_positions": _ratio(useful, computed),
            "model_flops_utilisation": _ratio(flops, training * self.peak),
            **shares,
        }

    def summary(self) -> dict[str, str]:
        """What a person is told of the whole session; {} if nothing was trained."""
        rates, seconds = self._rates(self.session), self.session[len(COUNTS) :].sum() / self.group.ranks
        figures = {
            "supervised tokens/s": f"{rates['supervised_tokens_per_second']:,.0f}",
            "useful positions": f"{rates['useful_positions']:.1%} of those computed",
            "model FLOP utilisation": f"{rates['model_flops_utilisation']:.1%} of the measured peak"
            f" ({self.peak / 1e9:,.0f} GFLOP/s)",
            "peak memory of a process": f"{self.memory:.2f} GiB" if self.memory else "not known",
            "time": f"{seconds:.0f} s: {', '.join(f'{part} {rates[TIME + part]:.0%}' for part in PARTS)}",
        }
        return figures if self.session.any() else {}

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

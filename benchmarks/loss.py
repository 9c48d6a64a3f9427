"""What does the lean head save, and how far is a step from what the machine can do?

Loss and gradient at Qwen3's vocabulary in bfloat16, 4 rows of 256 tokens, half of each row a prompt. The
reference is the plain way: logits of all positions in float32, a cross-entropy over all of them, and all
but the masked ones thrown away. Both take turns on the same batch with the same noise, so that what else
the machine is doing meets both.

    python benchmarks/loss.py [--threads 2] [--rounds 3] [--size small] [--attention eager]

A single round of the large size takes a quarter of a minute on two cores. With THP_MEM_ALLOC_ENABLE=1 in the
environment torch asks Linux for huge pages, and fresh tensors of this size cost much less to touch.

Seconds are medians over the rounds. Memory is that of one step in a separate process: the highest
resident set of the process, less that before the step (model loaded, no gradients yet), so gradients count.
It grows with what the allocator keeps, which a user pays as well. Floor: the useful operations (two for
each weight of a matrix and token in the forward pass, four in the backward pass, the head on masked tokens
alone) over the speed of a 2048 x 2048 x 2048 product measured between the rounds, or, where larger, reading
each parameter twice and writing its gradient once over the speed of a copy.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask import Objective, Qwen3DiffusionConfig, Qwen3ForCausalLM, corrupt

VOCABULARY, BATCH, LENGTH, PROMPT, MASK = 151936, 4, 256, 128, 151669
SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    "large": {  # layers of Qwen3-1.7B
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}
GIB = 2**30


class Task:
    """A model and a batch, and the two ways to its loss."""

    def __init__(self, size: str, attention: str):
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)  # the model never exists in float32
        shape: dict[str, Any] = {**SIZES[size], "attn_implementation": attention}
        config = Qwen3DiffusionConfig(
            **shape, vocab_size=VOCABULARY, tie_word_embeddings=True, mask_token_id=MASK
        )
        self.model: Any = Qwen3ForCausalLM(config).train()
        torch.set_default_dtype(torch.float32)
        self.ids = torch.randint(0, 151000, (BATCH, LENGTH))
        self.source = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
        self.source[:, :PROMPT] = True
        # Rates of 1/8, 3/8, 5/8 and 7/8: as many masks as a step has on average.
        strata = (torch.arange(BATCH) + 0.5) / BATCH
        self.inputs = self.model.prepare(self.ids, src_mask=self.source, training_mode="sft")
        self.noised = corrupt(self.inputs, Objective(), torch.arange(BATCH), strata)

    def lean(self) -> Tensor:
        return self.model.diffusion_loss(self.inputs, self.noised, Objective())

    def plain(self) -> Tensor:
        x_t, is_masked, t, *_ = self.noised
        hidden = self.model.model(input_ids=x_t, use_cache=False).last_hidden_state
        logits = self.model.lm_head(hidden).float()
        nll = F.cross_entropy(logits.flatten(0, 1), self.ids.flatten(), reduction="none").view_as(self.ids)
        return (nll * is_masked / t).sum() / (~self.source).sum()

    def step(self, loss: Callable[[], Tensor]) -> float:
        """Loss and gradient; the gradients are thrown away, as an optimizer step does."""
        value = loss()
        value.backward()
        self.model.zero_grad()
        return value.item()

    def operations(self) -> int:
        """Useful operations of a step: multiplications and additions, forward and backward."""
        config = self.model.config
        in_body = sum(p.numel() for p in self.model.model.layers.parameters() if p.dim() == 2)
        inner = config.num_attention_heads * config.head_dim
        attention = 2 * LENGTH * inner * config.num_hidden_layers  # each token: scores and weighted sum
        head = int(self.noised.is_masked.sum()) * config.hidden_size * VOCABULARY
        return 6 * (BATCH * LENGTH * (in_body + attention) + head)


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure_memory(size: str, attention: str, way: str) -> None:
    """Print the bytes that one step adds to the resident set at its highest; runs in its own process."""
    task = Task(size, attention)
    before = resident("VmRSS")
    task.step(getattr(task, way))
    print(resident("VmHWM") - before)


def resident(field: str) -> int:
    """Bytes of a field of Linux's /proc/self/status; `getrusage` would count the parent process as well."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024


def memory(size: str, attention: str, way: str, threads: int) -> float:
    command = [sys.executable, __file__, "--memory", way, "--size", size, "--attention", attention]
    command += ["--threads", str(threads)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / GIB


def measure(size: str, attention: str, rounds: int, threads: int) -> None:
    """Print the times, the memory, their ratios and the floor of one size."""
    task = Task(size, attention)
    square = torch.randn(2048, 2048).bfloat16()
    product, source = torch.empty_like(square), torch.randn(2**26)
    target = torch.empty_like(source)
    parts: dict[str, Callable[[], Any]] = {
        "plain": lambda: task.step(task.plain),
        "lean": lambda: task.step(task.lean),
        "product": lambda: torch.mm(square, square, out=product),
        "copy": lambda: target.copy_(source),
    }
    a, b = task.step(task.plain), task.step(task.lean)  # warm up
    assert abs(a - b) < 0.01 * abs(a), (a, b)
    rows = [{name: seconds(work) for name, work in parts.items()} for _ in range(rounds)]
    median = {name: statistics.median(row[name] for row in rows) for name in parts}

    peak = 2 * 2048**3 / median["product"]
    bandwidth = 2 * source.nbytes / median["copy"]
    operations = task.operations()
    moved = 3 * sum(p.nbytes for p in task.model.parameters())
    floor = max(operations / peak, moved / bandwidth)
    lean, plain = (memory(size, attention, way, threads) for way in ("lean", "plain"))
    print(f"{size}: hidden {SIZES[size]['hidden_size']}, {SIZES[size]['num_hidden_layers']} layers")
    print(f"  time    plain {median['plain']:6.2f} s    lean {median['lean']:6.2f} s  ", end="")
    print(f"{median['plain'] / median['lean']:.1f} times faster")
    print(f"  memory  plain {plain:6.2f} GiB  lean {lean:6.2f} GiB  {lean / plain:.0%}")
    print(f"  peak    {peak / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.0f} GB/s")
    print(f"  floor   {operations / peak:.2f} s for {operations / 1e12:.2f} TFLOP, ", end="")
    print(
        f"{moved / bandwidth:.2f} s for {moved / 1e9:.1f} GB: lean takes {median['lean'] / floor:.2f} times"
    )
    print(f"          the floor, {operations / peak / median['lean']:.0%} of peak", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of loss and gradient.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", choices=list(SIZES), action="append", help="both by default")
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    parser.add_argument("--memory", choices=["lean", "plain"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = options.size or list(SIZES)
    if options.memory:
        return measure_memory(sizes[0], options.attention, options.memory)
    load = os.getloadavg()[0]
    pages = os.environ.get("THP_MEM_ALLOC_ENABLE", "0")
    print(f"torch {torch.__version__}, {options.threads} threads, {options.attention}, ", end="")
    print(f"{options.rounds} rounds, load {load:.1f}, huge pages {pages}", flush=True)
    for size in sizes:
        measure(size, options.attention, options.rounds, options.threads)


if __name__ == "__main__":
    main()

"""What does a training step waste? the loop's step on packed rows against a plain reference.

The reference is written here, the way it is often done: every sample padded to the block size in
micro-batches of 4, an attention mask of (4, 1, block, block) in memory, logits of all positions in float32, a
cross-entropy over all of them, and all but the masked ones multiplied by 0. Both train the same weights with
the same AdamW on the same records in turns, 16 samples a step, so that what else the machine is doing meets
both. With the noise of the same samples both find the same loss, which is checked first.

    python benchmarks/train_step.py gsm8k_train.jsonl --tokenizer FOLDER
    python benchmarks/train_step.py gsm8k_train.jsonl --tokenizer FOLDER --large   # share of the bf16 peak
    python benchmarks/train_step.py gsm8k_train.jsonl --tokenizer FOLDER --flat    # cost against size of data

"small" is hidden 256 with 4 layers, "large" the layers of Qwen3-1.7B, 8 of them; both have the tokenizer's
vocabulary, rounded up to Qwen3's 151,936 rows where it fits. Time is that of the processor on a CPU, which
another program on it does not add to. Memory is the highest resident set of a process that takes two steps
of one way, from its start to its end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask import Qwen3DiffusionConfig, Qwen3ForCausalLM, load_tokenizer
from unmask.data.collate import Row, collate, pack
from unmask.data.encode import Encoder, Example, encode_records
from unmask.data.files import read_records
from unmask.data.records import CustomFields
from unmask.data.tokenizer import add_mask_token
from unmask.diffusion.corrupt import corrupt, example_seeds
from unmask.diffusion.loss import loss_divisor
from unmask.diffusion.objective import Objective
from unmask.training.metrics import COUNTS, Accounting, measured_peak, peak_memory
from unmask.training.parallel import Processes

BLOCK, VOCABULARY = 1024, 151936
SAMPLES, MICRO = 16, 4  # of an optimizer step; those of them padded together
GIB = 2**30
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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


def make_model(size: str, tokenizer: Any) -> Any:
    torch.manual_seed(0)
    if size == "large":
        torch.set_default_dtype(torch.bfloat16)  # the model never exists in float32
    shape: dict[str, Any] = {**SIZES[size], "attn_implementation": "sdpa"}
    config = Qwen3DiffusionConfig(
        **shape,
        vocab_size=max(VOCABULARY, len(tokenizer)),
        max_position_embeddings=BLOCK * 2,
        tie_word_embeddings=True,
        mask_token_id=tokenizer.mask_token_id,
        logit_shift=False,
    )
    model: Any = Qwen3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.train()


class Ours:
    """A step of `unmask train` on packed rows."""

    def __init__(self, model: Any, rows: Sequence[Example | Row], batch: int):
        self.model, self.batch = model.to(DEVICE), batch
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
        self.rows = cycle(rows)
        self.accounting = Accounting(model, torch.bfloat16, Processes(0, 1, DEVICE))
        self.supervised, self.seconds = 0, 0.0
        self.updating = 0.0  # seconds of the optimizer alone

    def step(self, timed: bool = True) -> None:
        start = clock()
        batch = collate(list(islice(self.rows, self.batch)), pad_token_id=0)
        batch = {name: values.to(DEVICE) for name, values in batch.items()}
        batch.pop("instruction_lengths", None)
        seeds = example_seeds(0, batch.pop("sample_ids"), 0)
        inputs, objective = self.model.prepare(**batch, training_mode="sft"), Objective()
        noised = corrupt(inputs, objective, seeds)
        divisor = loss_divisor(noised, objective)
        self.accounting.count(noised, objective)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = self.model.diffusion_loss(inputs, noised, objective, divisor)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        middle = clock()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if timed:
            end = clock()
            self.supervised += int(divisor)
            self.seconds += end - start
            self.updating += end - middle


class Plain:
    """A reference that wastes what is commonly wasted."""

    def __init__(self, model: Any, examples: Sequence[Example], batch: int):
        self.model, self.batch = model, batch
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
        self.examples = cycle(examples)
        self.supervised, self.seconds = 0, 0.0

    def step(self, timed: bool = True) -> None:
        start = clock()
        samples = list(islice(self.examples, self.batch))
        supervised = sum(sample.supervised for sample in samples)
        for first in range(0, self.batch, MICRO):
            micro = samples[first : first + MICRO]
            batch = collate(micro, pad_token_id=0, pad_to_multiple_of=BLOCK)
            (self.loss(batch) / supervised).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if timed:
            self.supervised += supervised
            self.seconds += clock() - start

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Nats, summed over the supervised tokens."""
        ids, source = batch["input_ids"], batch["src_mask"]
        inputs = self.model.prepare(
            ids, attention_mask=batch["attention_mask"], src_mask=source, training_mode="sft"
        )
        x_t, is_masked, t, *_ = corrupt(inputs, Objective(), example_seeds(0, batch["sample_ids"], 0))
        mask = torch.zeros(len(ids), 1, BLOCK, BLOCK)
        mask.masked_fill_(~batch["attention_mask"].bool()[:, None, None, :], torch.finfo(torch.float32).min)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.model.model(input_ids=x_t, attention_mask=mask.bfloat16()).last_hidden_state
            logits = self.model.lm_head(hidden)
        nll = F.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="none")
        return (nll.view_as(ids) * is_masked / t).sum()


def clock() -> float:
    """Seconds of computing: of the processor's, which another program on it does not add to."""
    if not torch.accelerator.is_available():
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def load(file: Path, tokenizer: Any, block: int = BLOCK) -> list[Example]:
    first = next(iter(read_records(str(file), limit=1)))[0]
    custom = CustomFields("question", None, "answer") if "question" in first else None
    encoder = Encoder(tokenizer, block_size=block)
    format = "custom" if custom else "auto"
    return encode_records(read_records(str(file)), encoder, format, custom)[0]


def ways(size: str, examples: list[Example], tokenizer: Any, batch: int) -> dict[str, Callable[[], Any]]:
    """How to make each way, with as many samples in a step of one as of the other on average."""
    rows = list(pack(examples, BLOCK))
    per_step = max(1, round(batch * len(rows) / len(examples)))
    return {
        "ours": lambda: Ours(make_model(size, tokenizer), rows, per_step),
        "plain": lambda: Plain(make_model(size, tokenizer), examples, batch),
    }


def check_same_loss(examples: list[Example], tokenizer: Any) -> None:
    """The two ways on the same samples with the same noise."""
    few = examples[:4]
    model = make_model("small", tokenizer)
    with torch.no_grad():
        plain = Plain(model, few, 4).loss(collate(few, pad_token_id=0, pad_to_multiple_of=BLOCK))
        plain = plain / sum(one.supervised for one in few)
        batch = collate(list(pack(few, BLOCK)), pad_token_id=0)
        seeds = example_seeds(0, batch.pop("sample_ids"), 0)
        batch.pop("instruction_lengths", None)
        with torch.autocast("cpu", torch.bfloat16):
            inputs = model.prepare(**batch, training_mode="sft")
            ours = model.diffusion_loss(inputs, corrupt(inputs, Objective(), seeds), Objective())
    assert abs(ours - plain) < 0.01 * abs(plain), (ours, plain)
    print(f"  the same loss: {float(ours):.4f} and {float(plain):.4f} nats per supervised token")


def compare(file: Path, tokenizer: Any, options: argparse.Namespace) -> None:
    """Print supervised tokens a second and the peak memory of both, and their ratios."""
    examples = load(file, tokenizer)
    print(f"{file.name}: {len(examples):,} examples, block size {BLOCK}, {options.batch} samples a step")
    check_same_loss(examples, tokenizer)
    made = {name: make() for name, make in ways("small", examples, tokenizer, options.batch).items()}
    for round in range(options.rounds + 1):
        for way in made.values():
            way.step(timed=round > 0)
    speed = {name: way.supervised / way.seconds for name, way in made.items()}
    memory = {name: memory_of(name, file, options) for name in made}
    print("  model small: hidden 256, 4 layers, bf16, tied embeddings of 151,936 rows")
    print(
        f"  supervised tokens/s: plain {speed['plain']:,.1f}, ours {speed['ours']:,.1f},"
        f" {speed['ours'] / speed['plain']:.1f} times"
    )
    print(
        f"  peak memory: plain {memory['plain'] / GIB:.2f} GiB, ours {memory['ours'] / GIB:.2f} GiB,"
        f" {memory['ours'] / memory['plain']:.0%}",
        flush=True,
    )


def memory_of(name: str, file: Path, options: argparse.Namespace) -> int:
    """The highest resident set of a separate process that takes two steps of one way."""
    command = [sys.executable, __file__, str(file), "--tokenizer", options.tokenizer]
    command += ["--threads", str(options.threads), "--batch", str(options.batch), "--memory", name]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory(name: str, file: Path, tokenizer: Any, batch: int) -> None:
    way = ways("small", load(file, tokenizer), tokenizer, batch)[name]()
    way.step()
    way.step()
    print(peak_memory(DEVICE))


def large(file: Path, tokenizer: Any, options: argparse.Namespace) -> None:
    """Print which share of the bf16 peak a step of the large model reaches, and where the rest goes."""
    rows = list(pack(load(file, tokenizer)[:512], BLOCK))
    way = Ours(make_model("large", tokenizer), rows, options.batch)
    device, counts = DEVICE, way.accounting.counts
    way.step(timed=False)
    counts.zero_()
    peaks = []
    for _ in range(options.rounds):
        measured_peak.cache_clear()
        peaks.append(measured_peak(device.type, torch.bfloat16))
        way.step()
    flops, peak = float(counts[COUNTS.index("flops")]), max(peaks)
    threads = options.threads if device.type == "cpu" else 1  # processor time is that of all threads
    rate = flops / way.seconds * threads
    print(f"large: hidden 2048, 8 layers, {options.batch} packed rows a step, {options.rounds} steps")
    print(f"  peak {peak / 1e9:,.0f} GFLOP/s; {flops / options.rounds / 1e12:.2f} TFLOP a step")
    print(f"  {rate / 1e9:,.0f} GFLOP/s of model operations: {rate / peak:.0%} of the measured peak")
    without = flops / (way.seconds - way.updating) * threads
    print(f"  the optimizer takes {way.updating / way.seconds:.0%} of the time; without it", end="")
    print(f" {without / peak:.0%} of the peak", flush=True)


def flat(file: Path, tokenizer: Any, options: argparse.Namespace) -> None:
    """Print the cost of a supervised token against the number of records and the block size."""
    examples = load(file, tokenizer, 2048)
    print(f"{file.name}, repeated: processor microseconds for a supervised token, small model")
    settings = [(count, 1024) for count in (1_000, 10_000, 100_000)]
    settings += [(7_000, block) for block in (256, 512, 1024, 2048)]
    made = []
    for count, block in settings:
        fitting = [one for one in examples if len(one.input_ids) <= block]
        many = [fitting[number % len(fitting)] for number in range(count)]
        rows = list(pack(many, block))
        made.append(Ours(make_model("small", tokenizer), rows, max(1, 4096 // block)))
    for round in range(options.rounds + 1):
        for way in made:
            way.step(timed=round > 0)
    costs = [way.seconds / way.supervised * 1e6 for way in made]
    for (count, block), cost in zip(settings, costs, strict=True):
        print(f"  {count:7,} records, rows of {block:4}: {cost:7.1f}")
    by_count, by_block = costs[:3], costs[3:]
    print(f"  dearest over cheapest: by records {max(by_count) / min(by_count):.2f},", end="")
    print(f" by block size {max(by_block) / min(by_block):.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="What does a training step waste?")
    parser.add_argument("file", nargs="?", type=Path, help="instruction file")
    parser.add_argument("--tokenizer", default="bytes", help="folder, hub name or bytes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, help="samples a step, of --large rows; 16 and 4 by default")
    parser.add_argument("--large", action="store_true", help="the share of the peak instead")
    parser.add_argument("--flat", action="store_true", help="the cost against the size of the data instead")
    parser.add_argument("--memory", choices=["ours", "plain"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.file is None or not options.file.exists():
        print("skipped: name the file to measure on, such as gsm8k_train.jsonl")
        return
    options.batch = options.batch or (4 if options.large else SAMPLES)
    tokenizer = load_tokenizer(options.tokenizer)
    add_mask_token(tokenizer)
    if options.memory:
        return measure_memory(options.memory, options.file, tokenizer, options.batch)
    print(f"torch {torch.__version__}, {options.threads} threads, load {os.getloadavg()[0]:.1f}", flush=True)
    if options.large:
        large(options.file, tokenizer, options)
    elif options.flat:
        flat(options.file, tokenizer, options)
    else:
        compare(options.file, tokenizer, options)


if __name__ == "__main__":
    main()

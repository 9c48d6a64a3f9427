"""What does packing save? Useful positions and supervised tokens a second, as ratios.

The same examples train the same small model in three ways: (a) every sequence padded
to the block size, (b) padded to the longest of its batch, and packed. Its vocabulary is small, so that the
head is as small a part of the work as it is in a large model.

    python benchmarks/data.py gsm8k_train.jsonl alpaca_en_demo.json --tokenizer FOLDER
    python benchmarks/data.py alpaca_en_demo.json --tokenizer FOLDER --rows   # does the row length matter?
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle, product
from pathlib import Path
from typing import Any

import torch

from unmask import Qwen3DiffusionConfig, Qwen3ForCausalLM, load_tokenizer
from unmask.data.collate import Row, collate, pack
from unmask.data.encode import Encoder, Example, encode_records
from unmask.data.files import read_records
from unmask.data.records import CustomFields
from unmask.data.tokenizer import add_mask_token
from unmask.diffusion.corrupt import corrupt, example_seeds
from unmask.diffusion.objective import Objective

BLOCK, BATCH, VOCABULARY = 1024, 16, 4096
LENGTHS = (256, 512, 1024)  # of rows, with --rows
ROUNDS = 2  # timed ones, after one to warm up
SMALL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
LARGER: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
}


class Way:
    """One way of filling batches: rows, and a small model that is trained on them."""

    def __init__(
        self,
        rows: Sequence[Example | Row],
        sizes: dict[str, Any],
        *,
        multiple: int = 1,
        bf16: bool = True,
        batch: int = BATCH,
    ) -> None:
        torch.manual_seed(0)
        config = Qwen3DiffusionConfig(
            vocab_size=VOCABULARY,
            head_dim=64,
            num_key_value_heads=sizes["num_attention_heads"],
            tie_word_embeddings=True,
            mask_token_id=VOCABULARY - 1,
            **sizes,
        )
        self.model: Any = Qwen3ForCausalLM(config).train()
        self.rows, self.batch, self.multiple, self.bf16 = rows, batch, multiple, bf16
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-5, fused=True)
        self.batches = cycle(self.loaded())
        self.positions, self.seconds = 0, 0.0  # computed in training, and the time it took

    def loaded(self) -> Iterator[dict[str, Any]]:
        """An epoch of batches."""
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(0)).tolist()
        for start in range(0, len(order), self.batch):
            rows = [self.rows[index] for index in order[start : start + self.batch]]
            yield collate(rows, pad_token_id=0, pad_to_multiple_of=self.multiple)

    def epoch(self) -> tuple[float, float, float]:
        """Load an epoch: the shares of the positions that hold a token and a supervised one, and supervised
        tokens a second."""
        useful = computed = supervised = 0
        start = time.perf_counter()
        for batch in self.loaded():
            useful += int(batch["attention_mask"].sum())
            computed += batch["input_ids"].numel()
            supervised += int((~batch["src_mask"]).sum())
        return useful / computed, supervised / computed, supervised / (time.perf_counter() - start)

    def step(self, timed: bool = True) -> None:
        """Load a batch and train on it."""
        start = clock()
        batch = dict(next(self.batches))
        positions = batch["input_ids"].numel()
        seeds, objective = example_seeds(0, batch.pop("sample_ids"), 0), Objective()
        inputs = self.model.prepare(**batch, training_mode="sft")
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = self.model.diffusion_loss(inputs, corrupt(inputs, objective, seeds), objective)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if timed:
            self.positions += positions
            self.seconds += clock() - start


def clock() -> float:
    """Seconds of computing: of the processor's, which another program on it does not add to."""
    if not torch.accelerator.is_available():
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def race(ways: Sequence[Way]) -> None:
    """Let the ways take steps in turn, so that what slows the machine slows all of them."""
    for round in range(ROUNDS + 1):
        for way in ways:
            way.step(timed=round > 0)


def load(file: Path, tokenizer: Any) -> list[Example]:
    """Encode a file, with its ids folded into the small vocabulary."""
    first = next(iter(read_records(str(file), limit=1)))[0]
    custom = CustomFields("question", None, "answer") if "question" in first else None
    encoder = Encoder(tokenizer, block_size=BLOCK)
    format = "custom" if custom else "auto"
    examples, _ = encode_records(read_records(str(file)), encoder, format, custom)
    return [replace(one, input_ids=[i % (VOCABULARY - 1) for i in one.input_ids]) for one in examples]


def compare(file: Path, tokenizer: Any) -> None:
    """Print the three ways and their ratios."""
    examples = load(file, tokenizer)
    rows = list(pack(examples, BLOCK))
    print(f"{file.name}: {len(examples):,} examples, batch {BATCH}, block size {BLOCK}")
    tokens = sum(len(example.input_ids) for example in examples)
    print(f"  packed rows are {tokens / (len(rows) * BLOCK):.1%} filled")
    ways = {
        "(a) padded to the block": Way(examples, SMALL, multiple=BLOCK),
        "(b) padded to the longest": Way(examples, SMALL),
        "packed": Way(rows, SMALL),
    }
    race(list(ways.values()))
    shares = {name: way.epoch() for name, way in ways.items()}
    # The positions of a few steps, with the supervised tokens that an epoch has on as many.
    speeds = {name: shares[name][1] * way.positions / way.seconds for name, way in ways.items()}
    for name, (useful, _, loaded) in shares.items():
        print(
            f"  {name:26} useful {useful:6.1%} (packed {shares['packed'][0] / useful:.2f} times), trained"
            f" {speeds[name]:6,.0f} supervised tokens/s (packed {speeds['packed'] / speeds[name]:.2f} times),"
            f" loader alone {loaded:10,.0f}/s"
        )


def compare_rows(file: Path, tokenizer: Any) -> None:
    """Print what rows of several lengths come to for examples that fit the shortest."""
    examples = [one for one in load(file, tokenizer) if len(one.input_ids) <= LENGTHS[0]]
    print(f"{file.name}: the {len(examples):,} examples of at most {LENGTHS[0]} tokens")
    for sizes, bf16 in product((SMALL, LARGER), (False, True)):
        padded = Way(examples, sizes, bf16=bf16)
        packed = [
            Way(list(pack(examples, length)), sizes, bf16=bf16, batch=BATCH * LENGTHS[0] // length)
            for length in LENGTHS
        ]
        race([padded, *packed])
        speeds = [way.epoch()[1] * way.positions / way.seconds for way in (padded, *packed)]
        print(
            f"  hidden {sizes['hidden_size']}, {'bf16' if bf16 else 'fp32'}: padded to the longest"
            f" {speeds[0]:,.0f} supervised tokens/s; packed into rows of "
            + ", ".join(
                f"{n} {speed / speeds[0]:.2f} times" for n, speed in zip(LENGTHS, speeds[1:], strict=True)
            ),
            flush=True,
        )


def main() -> None:
    """Compare on each file that is there."""
    parser = argparse.ArgumentParser(description="What does packing save?")
    parser.add_argument("files", nargs="*", type=Path, help="instruction files")
    parser.add_argument("--tokenizer", default="bytes", help="folder, hub name or bytes")
    parser.add_argument("--rows", action="store_true", help="compare row lengths instead")
    args = parser.parse_args()
    if not args.files:
        print("skipped: name the files to measure on, such as gsm8k_train.jsonl and alpaca_en_demo.json")
    tokenizer = load_tokenizer(args.tokenizer)
    add_mask_token(tokenizer)
    for file in args.files:
        if not file.exists():
            print(f"{file}: skipped, no such file")
        elif args.rows:
            compare_rows(file, tokenizer)
        else:
            compare(file, tokenizer)


if __name__ == "__main__":
    main()

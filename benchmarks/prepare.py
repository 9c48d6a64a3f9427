"""What does `unmask prepare` reach of the speed of the tokenizer alone? Records a second, as a ratio.

The reference is the tokenizer called on large batches of the same texts, rendered beforehand, with its own
threads on every core: no reading, no chat template, no source mask, nothing written. Both start with loading
the tokenizer, and take turns. The processor time of both, over all threads and processes, is printed, too:
on a machine that others use as well it is the fairer figure.

    python benchmarks/prepare.py gsm8k_train.jsonl TOKENIZER_FOLDER
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from unmask.config import recipe_from_dict
from unmask.data.dataset import custom_fields, load_data, make_encoder, prepare, run_tokenizer
from unmask.data.encode import encode_records
from unmask.data.files import read_records
from unmask.data.tokenizer import load_tokenizer

RECORDS = 60_000
BATCH = 1000  # texts of one call
ROUNDS = 3
FIELDS = {"instruction_field": "question", "response_field": "answer"}


def main() -> None:
    """Print records a second of both, and their ratio."""
    if len(sys.argv) != 3 or not Path(sys.argv[1]).exists():
        print(
            "skipped: give a file of question/answer records and a tokenizer folder, as in gsm8k_train.jsonl"
        )
        return
    lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines(keepends=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        repeated = lines * -(-RECORDS // len(lines))
        (folder / "data.jsonl").write_text("".join(repeated[:RECORDS]), encoding="utf-8")
        recipe = recipe_from_dict(
            {
                "training_mode": "sft",
                "model": {"config": {}, "tokenizer": sys.argv[2]},
                "data": {
                    "dataset_name": str(folder / "data.jsonl"),
                    "block_size": 4096,  # nothing is cut: both tokenize the same
                    "sft": {"format": "custom", "custom_format": FIELDS},
                },
            }
        )
        tokenizer = run_tokenizer(recipe)
        encoder = make_encoder(recipe, tokenizer)
        first = read_records(folder / "data.jsonl", limit=len(lines))
        examples, _ = encode_records(first, encoder, "custom", custom_fields(recipe))
        texts = [str(tokenizer.decode(example.input_ids)) for example in examples]
        texts = (texts * -(-RECORDS // len(texts)))[:RECORDS]

        def alone() -> None:
            loaded = load_tokenizer(sys.argv[2])
            os.environ["TOKENIZERS_PARALLELISM"] = "true"
            for start in range(0, len(texts), BATCH):
                loaded(texts[start : start + BATCH], add_special_tokens=False, return_attention_mask=False)
            del os.environ["TOKENIZERS_PARALLELISM"]

        def prepared(number: int) -> None:
            prepare(recipe, folder / f"out{number}")

        ratios = []
        for number in range(ROUNDS):
            (plain, plain_cpu), (ours, ours_cpu) = speed(alone), speed(partial(prepared, number))
            ratios.append((ours / plain, ours_cpu / plain_cpu))
            print(
                f"tokenizer alone {plain:,.0f} records/s, prepare {ours:,.0f}: {ours / plain:.0%};"
                f" a processor second {plain_cpu:,.0f} and {ours_cpu:,.0f}: {ours_cpu / plain_cpu:.0%}"
            )
        tree = recipe.model_dump()
        tree["data"]["dataset_name"] = str(folder / "out0")
        rows = load_data(recipe_from_dict(tree), tokenizer).train
        assert len(rows) == RECORDS
        assert [rows[i].input_ids for i in range(0, 5000, 7)] == [
            examples[i].input_ids for i in range(0, 5000, 7)
        ]
    wall, processor = (statistics.median(pair[k] for pair in ratios) for k in (0, 1))
    print(
        f"prepare reaches {wall:.0%} of the tokenizer alone, on {os.cpu_count()} cores; by processor time"
        f" {processor:.0%}"
    )


def speed(work: Callable[[], None]) -> tuple[float, float]:
    """Records a second of wall-clock time, and of processor time with that of finished processes."""
    wall, before = time.perf_counter(), os.times()
    work()
    wall, after = time.perf_counter() - wall, os.times()
    return RECORDS / wall, RECORDS / (sum(after[:4]) - sum(before[:4]))


if __name__ == "__main__":
    main()

"""What the loop that is being replaced still needs of the data stage; goes with it."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from unmask.data import dataset
from unmask.data.collate import Row
from unmask.data.dataset import RunData, custom_fields, make_encoder, run_tokenizer, source_names
from unmask.data.encode import Example
from unmask.errors import UnmaskError
from unmask.recipe import Recipe

__all__ = [
    "ExampleDataset",
    "RecordStream",
    "RunData",
    "StreamLoader",
    "custom_fields",
    "load_data",
    "make_encoder",
    "run_tokenizer",
    "source_names",
]

CHUNK, SOURCE_BIT, SOURCES = 1024, 40, 256
RecordStream: Any = type("RecordStream", (), {})
StreamLoader: Any = type("StreamLoader", (), {})


class ExampleDataset(Dataset[Example | Row]):
    """Examples, or rows of packed ones, as torch's DataLoader wants them."""

    def __init__(self, examples: Sequence[Example | Row]):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example | Row:
        return self.examples[index]


def load_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> RunData:
    """Load the data of a run, but no mixture or stream, which this loop would take for one source."""
    if recipe.data.sources is not None or recipe.data.streaming:
        raise UnmaskError("data.sources and data.streaming need the new training loop.")
    return dataset.load_data(recipe, tokenizer)


def count_sources(rows: Any, sources: int) -> list[list[int]]:
    """Count the examples and tokens of each source."""
    counts = [[0, 0] for _ in range(sources)]
    for row in rows:
        dataset.count_row(counts[0], row)
    return counts


def ignore_stop_signals(worker: int) -> None:
    """Leave SIGTERM and SIGINT, which may reach every process of a run, to the one that trains."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)

"""The recipe's data section -> the examples a run trains on and is evaluated on."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import overload

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from unmask.data.encode import Encoder, EncodeReport, Example
from unmask.data.pack import PackedRows, Row, pack
from unmask.data.prepared import PreparedExamples
from unmask.data.stream import RecordStream
from unmask.data.tokenizer import add_mask_token, check_tokenizer, load_tokenizer
from unmask.errors import UnmaskError
from unmask.model.checkpoint import read_config
from unmask.config import Recipe
from unmask.training.feed import (
    Feed,
    Group,
    custom_fields,
    eval_names,
    memory_stream,
    open_stream,
    short_names,
    source_names,
)

__all__ = [
    "ExampleDataset",
    "RunData",
    "custom_fields",
    "load_data",
    "make_encoder",
    "run_tokenizer",
    "source_names",
]


class ExampleDataset(Dataset[Example | Row]):
    """Examples, or rows of packed ones, in memory, as torch's DataLoader wants them."""

    def __init__(self, examples: Sequence[Example | Row]):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example | Row:
        return self.examples[index]


class Joined(Sequence[Example]):
    """The examples of several sources, one source after the other; each stays where it is."""

    def __init__(self, parts: Sequence[Sequence[Example]]):
        self.parts = parts
        self.ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1]

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        part = bisect_right(self.ends, number)
        return self.parts[part][number - self.ends[part]]


@dataclass
class RunData:
    """What a run sees; `encoder` is None in pre-training.

    With a `stream` batches come from it. `train` is then all data of a mixture in memory, and of a stream
    from files the beginning of each source, for a look and a check.
    """

    train: Sequence[Example]
    held_out: Sequence[Example]
    encoder: Encoder | None = None
    report: EncodeReport | None = None
    row_length: int | None = None
    """Most tokens of a packed row; None = every example has a row to itself."""
    stream: RecordStream | None = None
    """What batches come from, unless it is `rows`."""
    held_out_report: EncodeReport | None = None
    """What became of the records of `data.eval_dataset_name`."""
    files: Sequence[Sequence[str]] = ()
    """Names of the files of each source, where an example comes from one of them."""
    held_out_sources: Sequence[str] = ()
    """Names of the sources of `held_out`, if there are several."""

    def left_out(self, trained: list[str] | None = None) -> list[str]:
        """Say which records were dropped or skipped, and why; `trained` replaces what `report` says."""
        if trained is None:
            trained = self.report.left_out() if self.report is not None else []
        held_out = self.held_out_report.left_out() if self.held_out_report is not None else []
        return trained + [f"of the evaluation data {line}" for line in held_out]

    def totals(self) -> tuple[int, int]:
        """Count the tokens of `train`, and those of them that may be masked."""
        counts = [_totals(part) for part in _parts(self.train)]
        return sum(tokens for tokens, _ in counts), sum(supervised for _, supervised in counts)

    @cached_property
    def rows(self) -> Sequence[Example | Row]:
        """What batches of training are made of."""
        return self.train if self.row_length is None else _packed(self.train, self.row_length)

    @cached_property
    def held_out_rows(self) -> Sequence[Example | Row]:
        """What batches of the evaluation are made of."""
        return self.held_out if self.row_length is None else _packed(self.held_out, self.row_length)


def run_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load the recipe's tokenizer, with a mask token added where it has none.

    Raises:
        UnmaskError: there is none, it has no end or padding token, or the model's folder is no checkpoint.
    """
    if recipe.model.name_or_path is not None:
        read_config(recipe.model.name_or_path)  # no checkpoint is another mistake than no tokenizer
    name = recipe.model.tokenizer or recipe.model.name_or_path
    assert name is not None
    tokenizer = load_tokenizer(name)
    add_mask_token(tokenizer)
    check_tokenizer(tokenizer, name=name)
    return tokenizer


def make_encoder(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """Build the encoder that the recipe's SFT section describes."""
    sft = recipe.data.sft
    return Encoder(
        tokenizer,
        layout=sft.layout,
        separator=sft.instruction_response_separator,
        train_on=sft.train_on,
        include_system_prompt=sft.include_system_prompt,
        end_fill=sft.end_fill,
        block_size=recipe.data.block_size,
        too_long=sft.too_long,
    )


def load_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> RunData:
    """Read and encode all data of a run, and hold out the evaluation part; of a stream only its beginning.

    Raises:
        UnmaskError: a source, a record or a setting cannot be used, or nothing is left to train on.
    """
    data = recipe.data
    encoder = make_encoder(recipe, tokenizer) if recipe.training_mode == "sft" else None
    feed = Feed(recipe, tokenizer, encoder)
    report = EncodeReport()
    held_out: Sequence[Example] = []
    held_out_report = EncodeReport()
    evaluated = eval_names(recipe)
    if evaluated:
        place = (data.split, data.dataset_config, data.text_field, data.sft.format, custom_fields(recipe))
        own = [Group([name], *place) for name in evaluated]
        found = [_some(feed.whole, one, number, held_out_report) for number, one in enumerate(own)]
        held_out = found[0] if len(found) == 1 else Joined(found)
    if data.streaming:
        stream, train, first = open_stream(recipe, feed, report, held_out_report)
        of_run = (train, held_out or first, encoder, report, feed.row_length, stream, held_out_report)
        return RunData(*of_run, feed.labels(), short_names(evaluated))
    parts = [
        _some(feed.whole, group, number, report, data.max_records) for number, group in enumerate(feed.groups)
    ]
    train = parts[0] if len(parts) == 1 else Joined(parts)
    if data.eval_size:
        if data.eval_size >= len(train):
            raise UnmaskError(
                f"data.eval_size: {data.eval_size} are to be held out, but there are only {len(train)}"
                " examples; use less or more data."
            )
        train, held_out = train[: -data.eval_size], train[-data.eval_size :]
    feed.row_length = data.block_size if data.packing else None
    mixed = None if data.sources is None else memory_stream(recipe, feed, parts)
    of_run = (train, held_out, encoder, report, feed.row_length, mixed, held_out_report)
    return RunData(*of_run, feed.labels(), short_names(evaluated))


def _some(
    read: Callable[..., Sequence[Example]],
    group: Group,
    number: int,
    report: EncodeReport | None = None,
    limit: int | None = None,
) -> Sequence[Example]:
    """The examples of a group, of which there must be some."""
    one = EncodeReport()
    examples = read(group, number, one, limit)
    if not examples:
        why = "; ".join(one.left_out())
        raise UnmaskError(f"{', '.join(group.names)}: no record can be used{f': {why}' if why else ''}.")
    if report is not None:
        report.merge(one)
    return examples


def _parts(examples: Sequence[Example]) -> Sequence[Sequence[Example]]:
    return examples.parts if isinstance(examples, Joined) else [examples]


def _totals(part: Sequence[Example]) -> tuple[int, int]:
    if isinstance(part, PreparedExamples):
        return part.totals()
    return sum(len(example.input_ids) for example in part), sum(example.supervised for example in part)


def _lengths(examples: Sequence[Example]) -> list[int]:
    return [
        length
        for part in _parts(examples)
        for length in (
            part.lengths()
            if isinstance(part, PreparedExamples)
            else [len(example.input_ids) for example in part]
        )
    ]


def _packed(examples: Sequence[Example], length: int) -> Sequence[Row]:
    if any(isinstance(part, PreparedExamples) for part in _parts(examples)):
        return PackedRows(examples, _lengths(examples), length)  # which stay on disk
    return list(pack(examples, length))

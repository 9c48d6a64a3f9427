"""The recipe's data section -> the examples a run trains on and is evaluated on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from unmask.data.encode import Encoder, EncodeReport, Example
from unmask.data.pack import PackedRows, Row, pack, row_length
from unmask.data.prepare import PreparedExamples, merge_reports
from unmask.data.stream import RecordStream
from unmask.data.tokenizer import add_mask_token, check_tokenizer, load_tokenizer
from unmask.errors import UnmaskError
from unmask.model.checkpoint import read_config
from unmask.recipe import Recipe
from unmask.training.feed import (
    Feed,
    Group,
    custom_fields,
    memory_stream,
    open_stream,
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

    def left_out(self, trained: list[str] | None = None) -> list[str]:
        """Say which records were dropped or skipped, and why; `trained` replaces what `report` says."""
        if trained is None:
            trained = self.report.left_out() if self.report is not None else []
        held_out = self.held_out_report.left_out() if self.held_out_report is not None else []
        return trained + [f"of the evaluation data {line}" for line in held_out]

    def totals(self) -> tuple[int, int]:
        """Count the tokens of `train`, and those of them that may be masked."""
        if isinstance(self.train, PreparedExamples):
            return self.train.totals()
        tokens = sum(len(example.input_ids) for example in self.train)
        return tokens, sum(example.supervised for example in self.train)

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
    if data.eval_dataset_name is not None:
        own = Group(
            [data.eval_dataset_name],
            data.split,
            data.dataset_config,
            data.text_field,
            data.sft.format,
            custom_fields(recipe),
        )
        held_out = _some(feed.whole, own, 0, held_out_report)
    if data.streaming:
        stream, train, first = open_stream(recipe, feed, report, held_out_report)
        return RunData(train, held_out or first, encoder, report, feed.row_length, stream, held_out_report)
    parts = [
        _some(feed.whole, group, number, report, data.max_records) for number, group in enumerate(feed.groups)
    ]
    train = parts[0] if len(parts) == 1 else list(chain.from_iterable(parts))
    if data.eval_size:
        if data.eval_size >= len(train):
            raise UnmaskError(
                f"data.eval_size: {data.eval_size} are to be held out, but there are only {len(train)}"
                " examples; use less or more data."
            )
        train, held_out = train[: -data.eval_size], train[-data.eval_size :]
    feed.row_length = _row_length(recipe, train, held_out)
    mixed = None if data.sources is None else memory_stream(recipe, feed, parts)
    return RunData(train, held_out, encoder, report, feed.row_length, mixed, held_out_report)


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
        merge_reports(report, one)
    return examples


def _lengths(examples: Sequence[Example]) -> list[int]:
    if isinstance(examples, PreparedExamples):
        return examples.lengths()
    return [len(example.input_ids) for example in examples]


def _packed(examples: Sequence[Example], length: int) -> Sequence[Row]:
    if isinstance(examples, PreparedExamples):
        return PackedRows(examples, examples.lengths(), length)  # which stay on disk
    return list(pack(examples, length))


def _row_length(recipe: Recipe, *parts: Sequence[Example]) -> int | None:
    """The most tokens of a packed row; None without packing."""
    data = recipe.data
    if not data.packing:
        return None
    sizes = [size for examples in parts for size in _lengths(examples)]
    if data.row_length is None:
        # A kernel that passes over what lies between documents has no use for short rows.
        passes = recipe.model.attn_implementation == "flex_attention"
        return data.block_size if passes else row_length(sizes, data.block_size)
    if max(sizes) > data.row_length:
        raise UnmaskError(
            f"data.row_length: {data.row_length} tokens, but the longest sequence has {max(sizes)}; make rows"
            " longer, or data.block_size smaller."
        )
    return data.row_length

"""The recipe's data section -> the examples of a run, and the batch of every optimizer step.

Data that fit the disk are encoded once (`data/prepare.py`) and read by index: the batch of a step is then a
pure function of (seed, step). Nothing has to be saved for a resume, and the number of processes may change.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from torch.utils.data import ConcatDataset
from transformers import PreTrainedTokenizerBase

from unmask.data.collate import PackedRows, Row
from unmask.data.encode import Encoder, Example
from unmask.data.encode_report import EncodeReport
from unmask.data.mixture import Draws, permutation
from unmask.data.prepare import (
    SHARD,
    DataSource,
    EncodedExamples,
    Manifest,
    encode_folder,
    is_prepared,
    open_examples,
)
from unmask.data.records import CustomFields
from unmask.data.tokenizer import add_mask_token, check_tokenizer, has_tokenizer, load_tokenizer
from unmask.errors import UnmaskError
from unmask.shipped import find_shipped

if TYPE_CHECKING:
    from unmask.config import DataRecipe, Recipe, SourceRecipe
    from unmask.data.stream import Stream


class Unit(NamedTuple):
    """One row of an optimizer step: the pass over its source, and its index among the rows of the step."""

    row: Example | Row
    epoch: int
    place: int


@dataclass
class RunData:
    """What a run sees. Of a stream `train` is the beginning of each source, for a look and a check."""

    recipe: Recipe
    encoder: Encoder | None  # None in pre-training
    sources: list[DataSource]
    parts: list[Sequence[Example]] = field(default_factory=list)  # of each source
    held_out_parts: list[Sequence[Example]] = field(
        default_factory=list
    )  # of each name of the evaluation data
    held_out_sources: Sequence[str] = ()  # these names
    report: EncodeReport = field(default_factory=EncodeReport)  # of the records of the training data
    held_out_report: EncodeReport = field(default_factory=EncodeReport)
    files: Sequence[Sequence[str]] = ()  # names of each source's, where an example comes from one of them
    stream: Stream | None = None

    @property
    def train(self) -> Sequence[Example]:
        """All examples, one source after the other."""
        return _joined(self.parts)

    @property
    def held_out(self) -> Sequence[Example]:
        """All examples of the evaluation."""
        return _joined(self.held_out_parts)

    @property
    def row_length(self) -> int | None:
        """Most tokens of a packed row; None = every example has a row to itself."""
        return self.recipe.data.block_size if self.recipe.data.packing else None

    @cached_property
    def row_parts(self) -> list[Sequence[Example | Row]]:
        """The rows of each source; a packed row is of one source."""
        return [self._rows(part) for part in self.parts]

    @property
    def rows(self) -> Sequence[Example | Row]:
        """What batches of training are made of."""
        return _joined(self.row_parts)

    @cached_property
    def held_out_rows(self) -> Sequence[Example | Row]:
        """What batches of the evaluation are made of."""
        return _joined([self._rows(part) for part in self.held_out_parts if len(part)])

    @property
    def step_rows(self) -> int:
        """Rows of an optimizer step: `global_batch_size`, or all there are of a single source with fewer."""
        size, several = self.recipe.global_batch_size, self.recipe.data.sources is not None
        return size if self.stream is not None or several else min(size, len(self.rows))

    def _rows(self, part: Sequence[Example]) -> Sequence[Example | Row]:
        return part if self.row_length is None else PackedRows(part, sizes_of(part)[0], self.row_length)

    def left_out(self, trained: list[str] | None = None) -> list[str]:
        """Say which records were dropped or skipped, and why; `trained` replaces what `report` says."""
        lines = self.report.left_out() if trained is None else trained
        return lines + [f"of the evaluation data {line}" for line in self.held_out_report.left_out()]

    def totals(self) -> tuple[int, int]:
        """Count the tokens of `train`, and those of them that may be masked."""
        sizes = [sizes_of(part) for part in self.parts]
        return sum(sum(tokens) for tokens, _ in sizes), sum(sum(supervised) for _, supervised in sizes)

    def steps(self, rank: int = 0, ranks: int = 1) -> Steps:
        """Deal out the rows of the run to `ranks` processes."""
        if self.stream is None:
            return Steps(self, rank, ranks)
        from unmask.data.stream import StreamSteps

        return StreamSteps(self, rank, ranks)


def _joined(parts: Sequence[Sequence[Any]]) -> Any:
    return parts[0] if len(parts) == 1 else ConcatDataset(cast(Any, parts)) if parts else []


def sizes_of(part: Sequence[Example]) -> tuple[list[int], list[int]]:
    """Count the tokens of each example, and those of them that may be masked."""
    if isinstance(part, EncodedExamples):
        return part.column("tokens"), part.column("supervised")
    return [len(example.input_ids) for example in part], [example.supervised for example in part]


def examples_of(row: Example | Row) -> list[Example]:
    """The examples of a packed row, or the one that a row is."""
    return [row] if isinstance(row, Example) else row


class Steps:
    """One process's share of every optimizer step: a pure function of (seed, step)."""

    def __init__(self, data: RunData, rank: int = 0, ranks: int = 1) -> None:
        self.recipe, self.rank, self.ranks = data.recipe, rank, ranks
        self._counts = [[0, 0] for _ in data.sources]
        self.step_rows = data.step_rows
        if self.step_rows < self.recipe.global_batch_size and self.step_rows % ranks:
            raise UnmaskError(
                f"global_batch_size: {self.step_rows} sequences, all there are, cannot be shared by {ranks}"
                f" processes; use more data, or set it to {max(1, self.step_rows // ranks) * ranks}."
            )
        if data.stream is None:
            self.parts = data.row_parts
            # Weights are those of records: a row of a source with short records has more of them.
            weights = [
                source.weight * len(rows) / len(part)
                for source, rows, part in zip(data.sources, self.parts, data.parts, strict=True)
            ]
            epochs = [source.epochs for source in data.sources]
            stop = data.recipe.data.on_source_end == "stop"
            self.draws = Draws(list(map(len, self.parts)), weights, epochs, seed=self.recipe.seed, stop=stop)

    def at(self, step: int) -> list[Unit] | None:
        """Return the rows of a step with place % ranks == rank, in order of place; None = data ended."""
        first = step * self.step_rows
        if self.draws.locate(first + self.step_rows - 1) is None:
            return None
        units = []
        for place in range(self.rank, self.step_rows, self.ranks):
            source, count = cast(tuple[int, int], self.draws.locate(first + place))
            rows = self.parts[source]
            epoch, index = divmod(count, len(rows))
            order = permutation(self.recipe.seed, source, epoch, len(rows))
            units.append(self._count(Unit(rows[int(order[index])], epoch, place)))
        return units

    def _count(self, unit: Unit) -> Unit:
        for example in examples_of(unit.row):
            self._counts[example.source][0] += 1
            self._counts[example.source][1] += len(example.input_ids)
        return unit

    def counts(self) -> list[list[int]]:
        """Examples and tokens of each source that this process has been given."""
        return [list(pair) for pair in self._counts]

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs: nothing, where a batch is a function of (seed, step)."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state_dict`'s result."""


def run_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load the recipe's tokenizer, with a mask token added where it has none.

    Raises:
        UnmaskError: There is none, it has no end or padding token, or it is not that of the model to start from.
    """
    model = recipe.model.name_or_path
    name = cast(str, recipe.model.tokenizer or model)
    tokenizer = load_tokenizer(name)
    if model not in (None, name) and has_tokenizer(Path(model).expanduser()):
        own, ids = load_tokenizer(model).get_vocab(), tokenizer.get_vocab()
        if moved := [token for token in own if ids.get(token) != own[token]]:
            raise UnmaskError(
                f"model.tokenizer: {name} is not the tokenizer of {model}: {len(moved):,} of its {len(own):,} tokens"
                f" have other ids, such as {moved[0]!r}; leave model.tokenizer out."
            )
    add_mask_token(tokenizer)
    check_tokenizer(tokenizer, name=name)
    return tokenizer


def make_encoder(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """Build the encoder that the recipe's SFT section describes; the tokenizer will know of `thinking`."""
    sft = recipe.data.sft
    alike = sft.model_dump(exclude={"format", "custom_format", "instruction_response_separator"})
    separator = sft.instruction_response_separator
    encoder = Encoder(tokenizer, **alike, separator=separator, block_size=recipe.data.block_size)
    tokenizer.init_kwargs["thinking"] = encoder.thinking  # saved in tokenizer_config.json
    return encoder


def custom_fields(recipe: Recipe) -> CustomFields | None:
    """Build the field names of `data.sft.format: custom`; None for every other format."""
    sft = recipe.data.sft
    return CustomFields(**sft.custom_format.model_dump()) if sft.format == "custom" else None


def _source(
    run: RunData, tokenizer: PreTrainedTokenizerBase, names: list[str], keys: DataRecipe | SourceRecipe
) -> DataSource:
    """What is read and encoded alike; `keys` name its columns, those of the recipe are the default."""
    sft = run.recipe.data.sft
    format = getattr(keys, "format", None) or sft.format
    own = getattr(keys, "custom_format", None)
    custom = own if own and own != type(own)() else sft.custom_format
    return DataSource(
        run.recipe,
        tokenizer,
        run.encoder,
        names,
        split=keys.split,
        config_name=keys.dataset_config,
        text_field=keys.text_field,
        format=format,
        custom_format=CustomFields(**custom.model_dump()) if format == "custom" else None,
        weight=getattr(keys, "weight", 1.0),
        epochs=getattr(keys, "epochs", None),
    )


def _opened(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> RunData:
    """The sources of a recipe, each with its own format and columns; no data yet."""
    run = RunData(recipe, make_encoder(recipe, tokenizer) if recipe.training_mode == "sft" else None, [])
    if recipe.data.sources is None:
        run.sources = [_source(run, tokenizer, listed(recipe.data.dataset_name), recipe.data)]
    else:
        run.sources = [_source(run, tokenizer, [one.dataset_name], one) for one in recipe.data.sources]
    return run


def listed(names: str | Sequence[str] | None) -> list[str]:
    """The names that a key of the recipe has."""
    return [names] if isinstance(names, str) else list(names or ())


def source_names(recipe: Recipe) -> list[str]:
    """The names of the recipe's sources in order, of files without their folders where that is plain."""
    if recipe.data.sources is not None:
        return short_names([source.dataset_name for source in recipe.data.sources])
    return [", ".join(map(_short, listed(recipe.data.dataset_name)))]


def short_names(names: list[str]) -> list[str]:
    """Names of sources as people are told them, each another one."""
    short = list(map(_short, names))
    if len(set(short)) == len(names):
        return short
    twice = len(set(names)) < len(names)
    return [f"{name} ({number})" if twice else name for number, name in enumerate(names, 1)]


def _short(name: str) -> str:
    return Path(name).name if Path(find_shipped(name)).exists() else name


def load_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> RunData:
    """Read and encode all data of a run, or find them encoded in the cache, and hold out the evaluation
    part; of a stream only its beginning.

    Raises:
        UnmaskError: A source, a record or a setting cannot be used, or nothing is left to train on.
    """
    data, run = recipe.data, _opened(recipe, tokenizer)
    processes = data.num_workers or cores()
    evaluated = listed(data.eval_dataset_name)
    run.held_out_sources = short_names(evaluated)
    for number, name in enumerate(evaluated):
        part = open_examples(_source(run, tokenizer, [name], data), None, processes, number)
        run.held_out_parts.append(part)
        run.held_out_report.merge(part.manifest.report)
    if data.streaming:
        from unmask.data.stream import open_stream

        open_stream(run)
        return run
    parts = [open_examples(one, data.max_records, processes, n) for n, one in enumerate(run.sources)]
    run.parts = list(parts)
    for part in parts:
        run.report.merge(part.manifest.report)
    if run.encoder is not None or data.packing:  # else an example is not of one record
        run.files = [part.manifest.identity["files"] for part in parts]
    if data.eval_size:
        [examples] = parts
        if data.eval_size >= len(examples):
            raise UnmaskError(
                f"data.eval_size: {data.eval_size} are to be held out, but there are only {len(examples)}"
                " examples; use less or more data."
            )
        split = len(examples) - data.eval_size
        run.parts, run.held_out_parts = [examples.part(0, split)], [examples.part(split, len(examples))]
    return run


def first_rows(data: RunData, count: int) -> list[Example | Row]:
    """The rows that a run begins with, at most about `count` of them."""
    steps, rows = data.steps(), list[Example | Row]()
    while len(rows) < count and (units := steps.at(len(rows) // data.step_rows)):
        rows += [unit.row for unit in units]
    return rows


def first_shares(data: RunData) -> str:
    """Say which share each source of a mixture has of the first rows of the run."""
    steps, names = data.steps(), source_names(data.recipe)
    rows = sum(len(steps.at(step) or ()) for step in range(-(-1000 // data.step_rows)))
    examples, tokens = (max(1, sum(column)) for column in zip(*steps.counts(), strict=True))
    said = [
        f"{name} {count / examples:.1%} of the examples, {size / tokens:.1%} of the tokens"
        for name, (count, size) in zip(names, steps.counts(), strict=True)
    ]
    return f"the run's first {rows:,} rows: {'; '.join(said)}"


def prepare(
    recipe: Recipe, out: str | Path, *, workers: int | None = None, shard_records: int = SHARD
) -> Manifest:
    """Encode the training data of a recipe into the folder `out`, in parallel; returns its manifest.

    Interrupted at any moment, the same call resumes. A run whose `data.dataset_name` is the folder has the
    examples, in the order and with the sample ids, that it would have encoded itself.

    Args:
        workers: processes that encode; by default those of `data.num_workers`.
        shard_records: records, or documents, of a shard.

    Raises:
        UnmaskError: As for `encode_folder`, or the recipe names a mixture or a stream.
    """
    if recipe.data.sources is not None:
        raise UnmaskError(
            "data.sources: a mixture is not prepared as a whole; prepare each source with data.dataset_name,"
            " and name the folders in data.sources."
        )
    if recipe.data.streaming:
        raise UnmaskError("data.streaming has no effect on a preparation; set it to false.")
    for name in filter(is_prepared, listed(recipe.data.dataset_name)):
        raise UnmaskError(f"data.dataset_name: {name} is prepared data already.")
    [source] = _opened(recipe, run_tokenizer(recipe)).sources
    limit, processes = recipe.data.max_records, workers or recipe.data.num_workers or cores()
    folder = Path(out).expanduser()
    return encode_folder(folder, source, limit=limit, processes=processes, shard_records=shard_records)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

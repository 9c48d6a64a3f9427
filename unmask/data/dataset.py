"""The recipe's data section -> the examples of a run, and the batch of every optimizer step.

Data that fit the disk are encoded once (`data/prepare.py`) and read by index: the batch of a step is then a
pure function of (seed, step). Nothing has to be saved for a resume, and the number of processes may change.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import accumulate
from math import ceil, lcm
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, overload

import numpy as np
from transformers import PreTrainedTokenizerBase

from unmask.data.collate import PackedRows, Row
from unmask.data.encode import Encoder, EncodeReport, Example
from unmask.data.prepare import (
    DataSource,
    EncodedExamples,
    Encoding,
    Manifest,
    cached,
    encode_folder,
    identity_of,
    is_prepared,
    load_prepared,
)
from unmask.data.records import CustomFields
from unmask.data.tokenizer import add_mask_token, check_tokenizer, load_tokenizer
from unmask.errors import UnmaskError

if TYPE_CHECKING:
    from unmask.config import Recipe
    from unmask.data.stream import StreamedData

ORDER, DRAW = range(2)  # what a keyed hash is for
ROUND = 1000  # draws that a mixture's shares are exact in, unless fewer do
ROUNDS = 1 << 20  # of the rarest source


class Unit(NamedTuple):
    """One row of an optimizer step.

    `epoch` is the pass over its source, `place` its index among the `global_batch_size` rows of the step.
    """

    row: Example | Row
    epoch: int
    place: int


class StepSource(Protocol):
    """One process's share of every optimizer step."""

    def at(self, step: int) -> list[Unit] | None:
        """Return the rows of a step with place % ranks == rank, in order of place; None = data ended."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs: {} where a batch is a function of (seed, step)."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state_dict`'s result."""
        ...

    def counts(self) -> list[list[int]]:
        """Count examples and tokens of each source that this process has been given."""
        ...


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

    With a `stream` batches come from it, and `train` is the beginning of each source, for a look and a
    check.
    """

    train: Sequence[Example]
    held_out: Sequence[Example]
    encoder: Encoder | None = None
    report: EncodeReport | None = None
    row_length: int | None = None
    """Most tokens of a packed row; None = every example has a row to itself."""
    held_out_report: EncodeReport | None = None
    """What became of the records of `data.eval_dataset_name`."""
    files: Sequence[Sequence[str]] = ()
    """Names of the files of each source, where an example comes from one of them."""
    held_out_sources: Sequence[str] = ()
    """Names of the sources of `held_out`, if there are several."""
    sources: Sequence[DataSource] = ()
    """One, or those of a mixture; `train` is their examples, one source after the other."""
    seed: int = 0
    global_batch_size: int = 1
    on_source_end: Literal["repeat", "stop"] = "repeat"
    stream: StreamedData | None = None

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
    def row_parts(self) -> list[Sequence[Example | Row]]:
        """The rows of each source; a packed row is of one source."""
        parts = _parts(self.train)
        if self.row_length is None:
            return list(parts)
        return [PackedRows(part, _lengths(part), self.row_length) for part in parts]

    @cached_property
    def rows(self) -> Sequence[Example | Row]:
        """What batches of training are made of."""
        return self.row_parts[0] if len(self.row_parts) == 1 else Joined(self.row_parts)  # pyright: ignore

    @cached_property
    def held_out_rows(self) -> Sequence[Example | Row]:
        """What batches of the evaluation are made of."""
        if self.row_length is None:
            return self.held_out
        sizes = [size for part in _parts(self.held_out) for size in _lengths(part)]
        return PackedRows(self.held_out, sizes, self.row_length) if sizes else []

    def steps(self, rank: int = 0, ranks: int = 1, workers: int = 0) -> StepSource:
        """Deal out the rows of the run to `ranks` processes; `workers` has no effect: rows are on disk."""
        if self.stream is not None:
            return self.stream.steps(rank, ranks)
        # Weights are those of records: a row of a source with short records has more of them.
        sources = self.sources or [DataSource(["data"], "train", None, "text", "auto", None)]
        parts = self.row_parts
        examples = list(map(len, _parts(self.train)))
        shares = [
            source.weight * len(rows) / count
            for source, rows, count in zip(sources, parts, examples, strict=True)
        ]
        draws = Draws(
            list(map(len, parts)),
            shares,
            [source.epochs for source in sources],
            seed=self.seed,
            stop=self.on_source_end == "stop" and len(parts) > 1,
        )
        return MapSteps(parts, draws, self.seed, self.global_batch_size, rank, ranks)


class MapSteps:
    """Rows on disk, dealt out as a pure function of (seed, step); a `StepSource`."""

    def __init__(
        self,
        parts: Sequence[Sequence[Example | Row]],
        draws: Draws,
        seed: int,
        global_batch_size: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.parts, self.draws, self.seed = parts, draws, seed
        self.global_batch_size, self.rank, self.ranks = global_batch_size, rank, ranks
        self._counts = [[0, 0] for _ in parts]

    def at(self, step: int) -> list[Unit] | None:
        """Return this process's rows of a step; None after the last whole batch of data that end."""
        first = step * self.global_batch_size
        if self.draws.locate(first + self.global_batch_size - 1) is None:
            return None
        units = []
        for place in range(self.rank, self.global_batch_size, self.ranks):
            located = self.draws.locate(first + place)
            assert located is not None
            source, count = located
            epoch, index = divmod(count, len(self.parts[source]))
            row = self.parts[source][
                int(permutation(self.seed, source, epoch, len(self.parts[source]))[index])
            ]
            units.append(Unit(row, epoch, place))
            count_row(self._counts[source], row)
        return units

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def counts(self) -> list[list[int]]:
        return [list(pair) for pair in self._counts]


class Draws:
    """Which source draw n of a run is from, and how many it has had before: a pure function of n.

    Draws come in rounds, in each of which every source has the same quota, by largest remainder, in an
    order that is shuffled for each round. Where a source leaves, or all begin anew, a new phase of rounds
    begins.

    Args:
        sizes: rows of each source.
        weights: in proportion to which sources are drawn.
        epochs: passes over each, after which it leaves; None = no limit.
        stop: where a source without limit is through, all of them begin anew; else that one goes on.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        epochs: Sequence[int | None] | None = None,
        *,
        seed: int = 0,
        stop: bool = False,
    ) -> None:
        self.sizes, self.seed, self.stop = sizes, seed, stop
        self.epochs = list(epochs or [None] * len(sizes))
        self.weights = [Fraction(weight).limit_denominator(10**6) for weight in weights]
        self._phases = [self._phase(0, [0] * len(sizes))]

    def locate(self, n: int) -> tuple[int, int] | None:
        """Return the source of draw n, and its draws before; None after the last one."""
        while (end := self._phases[-1].end) is not None and n >= end:
            if not self._phases[-1].quotas:
                return None
            self._phases.append(self._next_phase())
        phase = self._phases[bisect_right(self._phases, n, key=lambda phase: phase.start) - 1]
        if not phase.quotas:
            return None
        number, at = divmod(n - phase.start, sum(phase.quotas.values()))
        order, before = self._round(phase.start, number)
        source = int(order[at])
        return source, phase.counts[source] + number * phase.quotas[source] + int(before[at])

    def _phase(self, start: int, counts: list[int]) -> _Phase:
        limits = [None if e is None else e * size for e, size in zip(self.epochs, self.sizes, strict=True)]
        left = [s for s, limit in enumerate(limits) if limit is None or counts[s] < limit]
        phase = _Phase(start, counts, draw_quotas({s: self.weights[s] for s in left}))
        ends = []
        for source in left:
            limit = limits[source]
            if limit is None and self.stop:
                limit = (counts[source] // self.sizes[source] + 1) * self.sizes[source]
            if limit is not None:
                number, at = divmod(limit - counts[source] - 1, phase.quotas[source])
                order, before = self._round(start, number, phase.quotas)
                place = np.flatnonzero((order == source) & (before == at))[0]
                ends.append(start + number * len(order) + int(place) + 1)
        phase.end = min(ends, default=None if left else start)
        return phase

    def _next_phase(self) -> _Phase:
        """What comes where the last phase ends."""
        phase = self._phases[-1]
        assert phase.end is not None
        number, at = divmod(phase.end - phase.start, sum(phase.quotas.values()))
        order, _ = self._round(phase.start, number, phase.quotas)
        had = np.bincount(order[:at], minlength=len(self.sizes))
        counts = [c + number * phase.quotas.get(s, 0) + int(had[s]) for s, c in enumerate(phase.counts)]
        free = [s for s, epochs in enumerate(self.epochs) if epochs is None]
        if self.stop and any(counts[s] % self.sizes[s] == 0 and counts[s] > phase.counts[s] for s in free):
            for s in free:
                counts[s] = -(-counts[s] // self.sizes[s]) * self.sizes[s]
        return self._phase(phase.end, counts)

    def _round(
        self, start: int, number: int, quotas: dict[int, int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The sources of a round's draws, and the draws of the same source before each in the round."""
        if quotas is None:
            phase = self._phases[bisect_right(self._phases, start, key=lambda phase: phase.start) - 1]
            quotas = phase.quotas
        return shuffled_round(self.seed, start, number, tuple(quotas.items()))


@dataclass
class _Phase:
    """Rounds with the same quotas, by source. `counts`: draws before; `end` None = there is none."""

    start: int
    counts: list[int]
    quotas: dict[int, int]
    end: int | None = field(default=None)


def draw_quotas(weights: dict[int, Fraction]) -> dict[int, int]:
    """Draws of each source in a round: exact where a round of `ROUND` allows it."""
    if not weights:
        return {}
    total = sum(weights.values())
    shares = {source: weight / total for source, weight in weights.items()}
    size = lcm(*(share.denominator for share in shares.values()))
    if size > ROUND:
        size = max(ROUND, ceil(1 / min(shares.values())))
        if size > ROUNDS:
            raise UnmaskError(
                f"data.sources: a weight is less than a {ROUNDS:,}th of all; remove the source."
            )
    quotas = {source: int(share * size) for source, share in shares.items()}
    rest = sorted(quotas, key=lambda source: (quotas[source] - shares[source] * size, source))
    for source in rest[: size - sum(quotas.values())]:
        quotas[source] += 1
    return quotas


@lru_cache(maxsize=64)
def shuffled_round(
    seed: int, start: int, number: int, quotas: tuple[tuple[int, int], ...]
) -> tuple[np.ndarray, np.ndarray]:
    """The sources of a round's draws in a shuffled order, and the draws of the same source before each."""
    sources = np.repeat([source for source, _ in quotas], [quota for _, quota in quotas])
    before = np.concatenate([np.arange(quota) for _, quota in quotas])
    order = np.argsort(keyed(seed, DRAW, start, number, np.arange(len(sources))), kind="stable")
    shuffled = sources[order]
    for source, quota in quotas:
        before[shuffled == source] = np.arange(quota)
    return shuffled, before


@lru_cache(maxsize=16)
def permutation(seed: int, source: int, epoch: int, size: int) -> np.ndarray:
    """Shuffle range(size) for one pass over a source: a function of the arguments on every machine."""
    return np.argsort(keyed(seed, ORDER, source, epoch, np.arange(size)), kind="stable")


def keyed(seed: int, *keys: int | np.ndarray) -> np.ndarray:
    """Hash a seed and further integers, broadcast together, to 64 random bits each (SplitMix64, folded)."""
    golden = np.uint64(0x9E3779B97F4A7C15)

    def mix(x: np.ndarray) -> np.ndarray:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    state = mix(np.asarray([seed % 2**64], dtype=np.uint64) + golden)
    for key in keys:
        state = mix((state ^ np.asarray(key, dtype=np.uint64)) + golden)
    return state


def run_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load the recipe's tokenizer, with a mask token added where it has none.

    Raises:
        UnmaskError: There is none, or it has no end or padding token.
    """
    name = recipe.model.tokenizer or recipe.model.name_or_path
    assert name is not None
    tokenizer = load_tokenizer(name)
    add_mask_token(tokenizer)
    check_tokenizer(tokenizer, name=name)
    return tokenizer


def make_encoder(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """Build the encoder that the recipe's SFT section describes; the tokenizer will know of `thinking`."""
    sft = recipe.data.sft
    encoder = Encoder(
        tokenizer,
        layout=sft.layout,
        separator=sft.instruction_response_separator,
        train_on=sft.train_on,
        include_system_prompt=sft.include_system_prompt,
        end_fill=sft.end_fill,
        block_size=recipe.data.block_size,
        too_long=sft.too_long,
        thinking=sft.thinking,
    )
    tokenizer.init_kwargs["thinking"] = encoder.thinking  # saved in tokenizer_config.json
    return encoder


def data_sources(recipe: Recipe) -> list[DataSource]:
    """Return the recipe's sources, each with its own format and columns."""
    data = recipe.data
    own = custom_fields(recipe)
    if data.sources is None:
        names = [data.dataset_name] if isinstance(data.dataset_name, str) else list(data.dataset_name or ())
        return [DataSource(names, data.split, data.dataset_config, data.text_field, data.sft.format, own)]
    sources = []
    for source in data.sources:
        format = source.format or data.sft.format
        given = CustomFields(**source.custom_format.model_dump())
        if format != "custom" or (given == CustomFields() and own is not None):
            given = own if format == "custom" else None
        place = ([source.dataset_name], source.split, source.dataset_config, source.text_field)
        sources.append(DataSource(*place, format, given, source.weight, source.epochs))
    return sources


def custom_fields(recipe: Recipe) -> CustomFields | None:
    """Build the field names of `data.sft.format: custom`; None for every other format."""
    sft = recipe.data.sft
    return CustomFields(**sft.custom_format.model_dump()) if sft.format == "custom" else None


def eval_names(recipe: Recipe) -> list[str]:
    """The names in `data.eval_dataset_name`."""
    given = recipe.data.eval_dataset_name
    return [given] if isinstance(given, str) else list(given or ())


def source_names(recipe: Recipe) -> list[str]:
    """The names of the recipe's sources in order, of files without their folders where that is plain."""
    if recipe.data.sources is None:
        given = recipe.data.dataset_name
        names = [given] if isinstance(given, str) else [", ".join(map(_short, given or ()))]
    else:
        names = [source.dataset_name for source in recipe.data.sources]
    return short_names(names)


def short_names(names: list[str]) -> list[str]:
    """Names of sources as people are told them, each another one."""
    short = [_short(name) for name in names]
    if len(set(short)) == len(names):
        return short
    if len(set(names)) == len(names):
        return names
    return [f"{name} ({number})" for number, name in enumerate(names, 1)]


def _short(name: str) -> str:
    return Path(name).name if Path(name).exists() else name


def load_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> RunData:
    """Read and encode all data of a run, or find them encoded in the cache, and hold out the evaluation
    part; of a stream only its beginning.

    Raises:
        UnmaskError: A source, a record or a setting cannot be used, or nothing is left to train on.
    """
    data = recipe.data
    encoder = make_encoder(recipe, tokenizer) if recipe.training_mode == "sft" else None
    sources, evaluated = data_sources(recipe), eval_names(recipe)
    run = RunData([], [], encoder, EncodeReport(), held_out_report=EncodeReport())
    run.sources, run.seed, run.on_source_end = sources, recipe.seed, data.on_source_end
    run.global_batch_size = recipe.global_batch_size
    run.row_length = data.block_size if data.packing else None
    run.held_out_sources = short_names(evaluated)
    fields = (data.split, data.dataset_config, data.text_field, data.sft.format, custom_fields(recipe))
    reader = _Reader(recipe, tokenizer, encoder)
    if evaluated:
        own = [DataSource([name], *fields) for name in evaluated]
        run.held_out = _joined([reader.read(one, n, run.held_out_report)[0] for n, one in enumerate(own)])
    if data.streaming:
        from unmask.data.stream import open_stream

        open_stream(run, recipe, tokenizer)
        return run
    found = [reader.read(source, n, run.report, data.max_records) for n, source in enumerate(sources)]
    run.train = _joined([examples for examples, _ in found])
    joined_text = encoder is None and not data.packing  # an example is then not of one record
    run.files = [] if joined_text else [labels for _, labels in found]
    if data.eval_size:
        if data.eval_size >= len(run.train):
            raise UnmaskError(
                f"data.eval_size: {data.eval_size} are to be held out, but there are only {len(run.train)}"
                " examples; use less or more data."
            )
        run.held_out = run.train[-data.eval_size :]
        run.train = run.train[: -data.eval_size]
    return run


@dataclass(frozen=True)
class _Reader:
    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder | None

    def read(
        self, source: DataSource, number: int, report: EncodeReport | None, limit: int | None = None
    ) -> tuple[EncodedExamples, list[str]]:
        """The examples of a source, of which there must be some, and the names of its files."""
        if any(map(is_prepared, source.names)):
            found = load_prepared(source, number, limit, self.recipe, self.tokenizer, self.encoder)
            labels = found.manifest.identity["origin"]["files"]
        else:
            files = source.files(text=self.encoder is None)
            labels = [file.label for file in files]
            identity = identity_of(self.recipe, source, self.tokenizer, self.encoder, limit)
            encoding = Encoding(source, self.tokenizer, self.encoder, self.recipe.data)
            try:
                found = cached(identity, encoding, files, limit=limit, processes=cores(), source=number)
            except UnmaskError as error:
                if str(error).startswith("no record can be used"):
                    raise UnmaskError(f"{', '.join(source.names)}: {error}") from error
                raise
        if report is not None:
            report.merge(found.manifest.report)
        return found, labels


def first_rows(data: RunData, count: int) -> list[Example | Row]:
    """The rows that a run begins with, at most about `count` of them."""
    steps, rows = data.steps(), list[Example | Row]()
    while len(rows) < count and (units := steps.at(len(rows) // data.global_batch_size)):
        rows += [unit.row for unit in units]
    return rows


def first_shares(data: RunData, names: Sequence[str]) -> str:
    """Say which share each source of a mixture has of the first rows of the run."""
    counts = [[0, 0] for _ in names]
    rows = first_rows(data, 1000)
    for row in rows:
        for example in [row] if isinstance(row, Example) else row:
            count_row(counts[example.source], example)
    return f"the run's first {len(rows):,} rows: {shares(counts, names)}"


def prepare(
    recipe: Recipe, out: str | Path, *, workers: int | None = None, shard_records: int | None = None
) -> Manifest:
    """Encode the training data of a recipe into the folder `out`, in parallel; returns its manifest.

    Interrupted at any moment, the same call resumes. A run whose `data.dataset_name` is the folder has the
    examples, in the order and with the sample ids, that it would have encoded itself.

    Args:
        workers: processes that encode; one for each core by default.
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
        raise UnmaskError(
            "data.streaming has no effect on a preparation, which never holds all data; set it to false."
        )
    [source] = data_sources(recipe)
    for name in source.names:
        if is_prepared(name):
            raise UnmaskError(f"data.dataset_name: {name} is prepared data already.")
    tokenizer = run_tokenizer(recipe)
    encoder = make_encoder(recipe, tokenizer) if recipe.training_mode == "sft" else None
    files = source.files(text=encoder is None)
    limit = recipe.data.max_records
    identity = identity_of(recipe, source, tokenizer, encoder, limit)
    identity["origin"]["files"] = [file.label for file in files]
    identity["inputs"] = {stamp[0]: stamp[1:] for stamp in (file.stamp() for file in files)}
    encoding = Encoding(source, tokenizer, encoder, recipe.data)
    of_shards: dict[str, Any] = {} if shard_records is None else {"shard_records": shard_records}
    return encode_folder(
        Path(out).expanduser(),
        identity,
        encoding,
        files,
        limit=limit,
        processes=workers or cores(),
        **of_shards,
    )


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_row(counts: list[int], row: Example | Row) -> None:
    """Add the examples and the tokens of a row to the two counts."""
    examples = [row] if isinstance(row, Example) else row
    counts[0] += len(examples)
    counts[1] += sum(len(example.input_ids) for example in examples)


def shares(counts: Sequence[Sequence[int]], labels: Sequence[str]) -> str:
    """Say what share each source has, of (examples, tokens) counted for each.

    >>> shares([(3, 60), (1, 40)], ["a", "b"])
    'a 75.0% of the examples, 60.0% of the tokens; b 25.0%, 40.0%'
    """
    totals = [max(1, sum(column)) for column in zip(*counts, strict=True)]
    said = []
    for number, (label, (examples, tokens)) in enumerate(zip(labels, counts, strict=True)):
        of = ("", "") if number else (" of the examples", " of the tokens")
        said.append(f"{label} {examples / totals[0]:.1%}{of[0]}, {tokens / totals[1]:.1%}{of[1]}")
    return "; ".join(said)


def _joined(parts: Sequence[Sequence[Example]]) -> Sequence[Example]:
    return parts[0] if len(parts) == 1 else Joined(parts)


def _parts(examples: Sequence[Example]) -> Sequence[Sequence[Example]]:
    return examples.parts if isinstance(examples, Joined) else [examples]


def _totals(part: Sequence[Example]) -> tuple[int, int]:
    if isinstance(part, EncodedExamples):
        return part.totals()
    return sum(len(example.input_ids) for example in part), sum(example.supervised for example in part)


def _lengths(part: Sequence[Example]) -> list[int]:
    return part.lengths() if isinstance(part, EncodedExamples) else [len(e.input_ids) for e in part]

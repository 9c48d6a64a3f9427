"""Data larger than the disk: read, shuffled and encoded as training goes, with `datasets`.

Each process reads its part of every source (`split_dataset_by_node`). Records come in windows of
`data.shuffle_buffer`, each shuffled by itself; which source a record is from is drawn as in a mixture on disk.
A resume starts reading at the window's begin, where the state of `datasets` was taken, and needs the same
number of processes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from unmask.data.collate import Row, pack
from unmask.data.dataset import (
    DRAW,
    ORDER,
    RunData,
    Unit,
    count_row,
    draw_quotas,
    keyed,
    shuffled_round,
)
from unmask.data.encode import EncodeReport, Example, of_source, sample_id
from unmask.data.files import Record, RecordFile, Source, Table
from unmask.data.prepare import DataSource, Encoding, digest, is_prepared
from unmask.errors import UnmaskError

if TYPE_CHECKING:
    from unmask.config import Recipe

CHUNK = 1024  # records encoded, and packed, together
WINDOW = 3  # what a keyed hash is for


class Taken(NamedTuple):
    """A record of a stream: its source, the pass over it, the number of its file, and the record."""

    source: int
    epoch: int
    file: int
    record: Record


@dataclass
class StreamedSource:
    """One source of a stream; of file i the first `held_out[i]` records are left out."""

    data: DataSource
    encoding: Encoding
    files: Sequence[Source]
    held_out: dict[int, int] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return ", ".join(self.data.names)

    def dataset(self, seed: int, number: int, epoch: int) -> Any:
        """Make the IterableDataset of one pass, with the files in an order of its own."""
        from datasets import IterableDataset

        if len(self.files) == 1 and isinstance(self.files[0], Table):
            return self.files[0].open(streaming=True).skip(self.held_out.get(0, 0))
        order = np.argsort(keyed(seed, ORDER, number, epoch, np.arange(len(self.files))), kind="stable")
        files = [(int(i), self.files[int(i)], self.held_out.get(int(i), 0)) for i in order]
        return IterableDataset.from_generator(_read, gen_kwargs={"files": files})


def _read(files: Sequence[tuple[int, Source, int]]) -> Iterator[dict[str, Any]]:
    for number, file, held_out in files:
        for record in islice(file.read(), held_out, None):
            yield {"file": number, "record": record}


@dataclass
class StreamedData:
    """The sources of a stream and how their records are mixed."""

    sources: Sequence[StreamedSource]
    seed: int
    window: int
    on_source_end: Literal["repeat", "stop"]
    global_batch_size: int
    row_length: int | None

    def steps(self, rank: int = 0, ranks: int = 1) -> StreamSteps:
        """Read one process's share."""
        return StreamSteps(self, rank, ranks)

    def encode(self, records: Sequence[Taken], report: EncodeReport) -> list[tuple[Example, int]]:
        """Encode records to examples with their epochs, in the records' order.

        Raises:
            UnmaskError: A record cannot be used.
        """
        groups: dict[tuple[int, int], list[tuple[int, Taken]]] = {}
        for place, taken in enumerate(records):
            groups.setdefault((taken.source, taken.epoch), []).append((place, taken))
        found: list[tuple[int, Example, int]] = []
        for (source, epoch), group in groups.items():
            first = group[0][1]
            shard = sample_id(first.file, first.record.index) >> 1  # names the joined text of this chunk
            places = {(taken.file, taken.record.index): place for place, taken in group}
            pairs = ((taken.file, taken.record) for _, taken in group)
            for example in self.sources[source].encoding.examples(pairs, report, shard):
                place = places.get((example.file, example.record), group[0][0])
                example.source = source
                example.sample_id = of_source(example.sample_id, source)
                found.append((place, example, epoch))
        return [(example, epoch) for _, example, epoch in sorted(found, key=lambda item: item[0])]


class StreamSteps:
    """One process's share of a stream; a `StepSource`, whose steps are asked for in order.

    Attributes:
        report: what became of the records so far.
    """

    def __init__(self, stream: StreamedData, rank: int = 0, ranks: int = 1) -> None:
        self.stream, self.rank, self.ranks = stream, rank, ranks
        self.report = EncodeReport()
        self._counts = [[0, 0] for _ in stream.sources]
        start: Any = {"epoch": 0, "read": None}
        self._window: dict[str, Any] = {"number": 0, "sources": [dict(start) for _ in stream.sources]}
        self._chunk = self._done = 0
        self._step = 0
        self._rows: Iterator[tuple[Example | Row, int]] | None = None

    def at(self, step: int) -> list[Unit] | None:
        """Return this process's rows of a step, which follows the one before; None = this part has ended."""
        if step != self._step:
            raise UnmaskError(f"a stream cannot jump to step {step:,}; it is at step {self._step:,}.")
        self._rows = self._rows or self._read_on()
        units: list[Unit] = []
        for place in range(self.rank, self.stream.global_batch_size, self.ranks):
            if (item := next(self._rows, None)) is None:
                return None
            units.append(Unit(*item, place))
        for row, _, _ in units:
            source = (row if isinstance(row, Example) else row[0]).source
            count_row(self._counts[source], row)
        self._step += 1
        return units

    def counts(self) -> list[list[int]]:
        return [list(pair) for pair in self._counts]

    def state_dict(self) -> dict[str, Any]:
        return {
            "ranks": self.ranks,
            "step": self._step,
            "window": deepcopy(self._window),
            "chunk": self._chunk,
            "rows": self._done,
            "counts": self.counts(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume where `state` was taken.

        Raises:
            UnmaskError: By another number of processes, or with other sources.
        """
        if state["ranks"] != self.ranks or len(state["counts"]) != len(self._counts):
            raise UnmaskError(
                f"resume_from_checkpoint: the position in the stream (data.streaming) is that of a run with"
                f" {state['ranks']} processes and {len(state['counts'])} sources; this one has {self.ranks} and"
                f" {len(self._counts)}: set them as they were, or start a new run from the weights."
            )
        self._window, self._counts = deepcopy(state["window"]), [list(pair) for pair in state["counts"]]
        self._chunk, self._done, self._step = state["chunk"], state["rows"], state["step"]
        self._rows = None

    def _read_on(self) -> Iterator[tuple[Example | Row, int]]:
        """Rows with their epochs, from the position on; the position follows them."""
        chunk, done = self._chunk, self._done
        for begun, records in self._windows():
            self._window = begun
            for number in range(chunk, -(-len(records) // CHUNK)):
                report = EncodeReport()
                examples = self.stream.encode(records[number * CHUNK : (number + 1) * CHUNK], report)
                if not done:  # else it was counted before
                    self.report.merge(report)
                rows: list[tuple[Example | Row, int]] = list(examples)
                if self.stream.row_length is not None:
                    rows = _packed(examples, self.stream.row_length)
                for index in range(done, len(rows)):
                    self._chunk, self._done = number, index + 1
                    yield rows[index]
                done = 0
            chunk = 0

    def _windows(self) -> Iterator[tuple[dict[str, Any], list[Taken]]]:
        """Each window's state at its begin, and its records in their order."""
        stream = self.stream
        readers = [
            _Reader(source, number, stream.seed, self.rank, self.ranks, state)
            for number, (source, state) in enumerate(
                zip(stream.sources, self._window["sources"], strict=True)
            )
        ]
        number = self._window["number"]
        while True:
            begun = {"number": number, "sources": [reader.state() for reader in readers]}
            records = self._draw(readers, number)
            if not records:
                return
            order = keyed(stream.seed, WINDOW, self.rank, number, np.arange(len(records)))
            yield begun, [records[place] for place in np.argsort(order, kind="stable")]
            number += 1

    def _draw(self, readers: list[_Reader], number: int) -> list[Taken]:
        """Read the records of a window: sources by quota, until all of them have ended."""
        records: list[Taken] = []
        rounds = 0
        while len(records) < self.stream.window:
            left = [reader for reader in readers if not reader.ended]
            weights = {r.number: Fraction(r.source.data.weight).limit_denominator(10**6) for r in left}
            if not left:
                break
            quotas = tuple(draw_quotas(weights).items())
            order, _ = shuffled_round(self.stream.seed, DRAW + 8 * self.rank, (number << 24) + rounds, quotas)
            rounds += 1
            for source in order.tolist()[: self.stream.window - len(records)]:
                record = readers[source].next()
                if record is None:
                    self._end(readers, readers[source])
                    break
                records.append(record)
        return records

    def _end(self, readers: list[_Reader], ended: _Reader) -> None:
        """A pass over a source is through: it begins anew, and under "stop" the others too."""
        everything = self.stream.on_source_end == "stop" and ended.source.data.epochs is None
        for reader in readers if everything else [ended]:
            if reader is ended or reader.source.data.epochs is None:
                reader.restart()


class _Reader:
    """Reads one source pass after pass."""

    def __init__(
        self, source: StreamedSource, number: int, seed: int, rank: int, ranks: int, state: dict[str, Any]
    ) -> None:
        self.source, self.number, self.seed, self.rank, self.ranks = source, number, seed, rank, ranks
        self.epoch: int = state["epoch"]
        self.read = 0  # in this pass
        self._open(state["read"])

    def _open(self, state: Any) -> None:
        from datasets.distributed import split_dataset_by_node

        whole = self.source.dataset(self.seed, self.number, self.epoch)
        self.dataset = split_dataset_by_node(whole, self.rank, self.ranks)
        if state is not None:
            self.dataset.load_state_dict(state)
            self.read = 1
        self.items = iter(self.dataset)

    @property
    def ended(self) -> bool:
        return self.source.data.epochs is not None and self.epoch >= self.source.data.epochs

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "read": deepcopy(self.dataset.state_dict()) if self.read else None}

    def next(self) -> Taken | None:
        """The next record of the pass; None at its end."""
        item = next(self.items, None)
        if item is None:
            if not self.read:
                raise UnmaskError(
                    f"{self.source.label}: there is no record to train on for process {self.rank}."
                )
            return None
        self.read += 1
        if isinstance(item.get("record"), Record):
            return Taken(self.number, self.epoch, item["file"], item["record"])
        # A row of a hub data set, whose number is not known: its contents stand for it.
        known = int(digest(json.dumps(item, default=str))[:15], 16)
        return Taken(self.number, self.epoch, 0, Record(item, _same, self.source.label, known))

    def restart(self) -> None:
        self.epoch, self.read = self.epoch + 1, 0
        if not self.ended:
            self._open(None)


def _same(record: Any) -> Any:
    return record


def _packed(examples: Sequence[tuple[Example, int]], length: int) -> list[tuple[Example | Row, int]]:
    """Pack examples with epochs: rows have examples of one source and pass alone."""
    groups: dict[tuple[int, int], list[Example]] = {}
    for example, epoch in examples:
        groups.setdefault((example.source, epoch), []).append(example)
    rows: list[tuple[Example | Row, int]] = [
        (row, epoch)
        for (_, epoch), group in groups.items()
        for row in pack(group, length, window=max(1, len(group)))
    ]
    order = {id(example): place for place, (example, _) in enumerate(examples)}
    return sorted(rows, key=lambda item: order[id(item[0][0])])  # pyright: ignore[reportIndexIssue]


def open_stream(run: RunData, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let `run` stream its sources; its `train` is the examples of their beginning, its `held_out` those of
    `data.eval_size` records from the start of the first.

    Raises:
        UnmaskError: A source is missing, cannot be read, or has no record that can be used.
    """
    data = recipe.data
    sources = []
    for source in run.sources:
        for name in filter(is_prepared, source.names):
            raise UnmaskError(
                f"data.streaming: {name} is prepared data, which is read row by row anyway; set it to false."
            )
        files = source.files(text=run.encoder is None)
        for file in files:
            if isinstance(file, RecordFile) and file.is_array():
                raise UnmaskError(
                    f"{file.label}: a JSON array cannot be streamed (data.streaming), since it ends where the"
                    " file ends; write one record a line (.jsonl), or set data.streaming=false."
                )
        sources.append(StreamedSource(source, Encoding(source, tokenizer, run.encoder, data), files))
    run.stream = StreamedData(
        sources, run.seed, data.shuffle_buffer, data.on_source_end, run.global_batch_size, run.row_length
    )
    run.files = [[file.label for file in source.files] for source in sources]
    if data.eval_size:
        records = list(islice(_beginning(sources[0], 0), data.eval_size))
        if len(records) < data.eval_size:
            raise UnmaskError(
                f"data.eval_size: {data.eval_size} are to be held out, but there are only {len(records)}"
                " records; use less or more data."
            )
        report = run.held_out_report or EncodeReport()
        run.held_out = [example for example, _ in run.stream.encode(records, report)]
        for taken in records:
            sources[0].held_out[taken.file] = sources[0].held_out.get(taken.file, 0) + 1
    beginning: list[Example] = []
    for number, source in enumerate(sources):
        beginning += _usable(run.stream, source, number, run.report)
    run.train = beginning


def _usable(
    stream: StreamedData, source: StreamedSource, number: int, report: EncodeReport | None
) -> list[Example]:
    """The examples of a source's first records: as many as it takes for one that can be used."""
    records = _beginning(source, number)
    own = EncodeReport()
    examples: list[Example] = []
    while not examples and (chunk := list(islice(records, CHUNK))):
        examples = [example for example, _ in stream.encode(chunk, own)]
    if not examples:
        why = "; ".join(own.left_out())
        what = "no record can be used" if own.records else "there is no record to train on"
        raise UnmaskError(f"{source.label}: {what}{f': {why}' if why else ''}.")
    if report is not None:
        report.merge(own)
    return examples


def _beginning(source: StreamedSource, number: int) -> Iterable[Taken]:
    """The records of a source in the order of its files, but those held out."""
    for file, opened in enumerate(source.files):
        for record in islice(opened.read(), source.held_out.get(file, 0), None):
            yield Taken(number, 0, file, record)

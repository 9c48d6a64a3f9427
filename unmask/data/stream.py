"""Data larger than the disk: read, shuffled and encoded as training goes, with `datasets`.

Every process reads the same records, in windows of `data.shuffle_buffer` that are shuffled each by itself, and
encodes every `ranks`-th of them. So a step has the same records on any number of processes, as long as none is
left out and rows are not packed. A resume reads from the begin of the window, where the state of `datasets`
was taken, and needs the same number of processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any, NamedTuple, cast

import numpy as np

from unmask.data.collate import Row, pack
from unmask.data.dataset import RunData, Steps, Unit
from unmask.data.encode import Example, of_source, sample_id
from unmask.data.encode_report import EncodeReport
from unmask.data.files import Record, RecordFile, Source, Table
from unmask.data.mixture import WINDOW, draw_quotas, keyed, permutation, shuffled_round
from unmask.data.prepare import DataSource, is_prepared
from unmask.errors import UnmaskError

CHUNK = 1024  # records encoded, and packed, together


class Taken(NamedTuple):
    """A record of a stream: its source, the pass over it, the number of its file, and the record."""

    source: int
    epoch: int
    file: int
    record: Record


class Stream(NamedTuple):
    """The sources of a stream; of file f of the first source the first `held_out[f]` records are left out."""

    sources: list[DataSource]
    held_out: dict[int, int]

    def beginning(self, source: int) -> Iterator[Taken]:
        """Read a source in the order of its files."""
        for number, file in enumerate(self.sources[source].files):
            for record in islice(file.read(), self.left_out(source, number), None):
                yield Taken(source, 0, number, record)

    def dataset(self, source: int, epoch: int, seed: int) -> Any:
        """Make the IterableDataset of a pass over a source, with the files in its own order."""
        from datasets import IterableDataset

        files = self.sources[source].files
        if len(files) == 1 and isinstance(files[0], Table):
            return files[0].open(streaming=True).skip(self.left_out(source, 0))
        order = permutation(seed, source, epoch, len(files)).tolist()
        parts = [(number, files[number], self.left_out(source, number)) for number in order]
        return IterableDataset.from_generator(_read, gen_kwargs={"files": parts})

    def left_out(self, source: int, file: int) -> int:
        """Records of a file that are held out."""
        return self.held_out.get(file, 0) if source == 0 else 0

    def encode(
        self, records: Sequence[Taken], report: EncodeReport, row_length: int | None = None
    ) -> list[tuple[Example | Row, int]]:
        """Encode records to rows with their epochs, in the records' order."""
        groups: dict[tuple[int, int], dict[tuple[int, int], tuple[int, Record]]] = {}
        for place, (source, epoch, file, record) in enumerate(records):
            groups.setdefault((source, epoch), {})[file, record.index] = place, record
        found: list[tuple[int, Example | Row, int]] = []
        for (source, epoch), group in groups.items():
            first = next(iter(group))
            pairs = ((file, record) for (file, _), (_, record) in group.items())
            shard = sample_id(*first) >> 1  # names the joined text of this chunk
            examples = list(self.sources[source].examples(pairs, report, shard))
            for example in examples:
                example.source, example.sample_id = source, of_source(example.sample_id, source)
            for row in examples if row_length is None else pack(examples, row_length, len(records)):
                example = row if isinstance(row, Example) else row[0]
                place, _ = group.get((example.file, example.record), group[first])
                found.append((place, row, epoch))
        return [(row, epoch) for _, row, epoch in sorted(found, key=lambda item: item[0])]

    def examples(self, records: Sequence[Taken], report: EncodeReport) -> list[Example]:
        """Encode records to examples in their order."""
        return [cast(Example, row) for row, _ in self.encode(records, report)]


def _read(files: Sequence[tuple[int, Source, int]]) -> Iterator[dict[str, Any]]:
    for number, file, left_out in files:
        for record in islice(file.read(), left_out, None):
            yield {"file": number, "record": record}


class Reader:
    """Reads one source pass after pass; `state` is where it is."""

    def __init__(self, stream: Stream, number: int, seed: int, state: dict[str, Any]) -> None:
        self.stream, self.number, self.seed = stream, number, seed
        self.source = stream.sources[number]
        self._open(**state)

    def _open(self, epoch: int = 0, read: int = 0, dataset: Any = None) -> None:
        self.epoch, self.read = epoch, read
        self.ended = self.source.epochs is not None and epoch >= self.source.epochs
        self.dataset = self.stream.dataset(self.number, epoch, self.seed)
        if dataset is not None:
            self.dataset.load_state_dict(dataset)
        self.items = iter(self.dataset)

    def state(self) -> dict[str, Any]:
        """What `Reader` takes to read on from here."""
        dataset = self.dataset.state_dict() if self.read else None
        return {"epoch": self.epoch, "read": self.read, "dataset": dataset}

    def next(self) -> Taken | None:
        """The next record of the pass; None at its end."""
        item = next(self.items, None)
        if item is None:
            if not self.read:
                raise UnmaskError(f"{', '.join(self.source.names)}: there is no record to train on.")
            return None
        self.read += 1
        if not isinstance(item.get("record"), Record):  # a row of a hub data set
            index = self.stream.left_out(self.number, 0) + self.read - 1
            item = {"file": 0, "record": Record(item, dict, self.source.files[0].label, index)}
        return Taken(self.number, self.epoch, item["file"], item["record"])

    def restart(self) -> None:
        """Begin the next pass."""
        self._open(self.epoch + 1)


class StreamSteps(Steps):
    """One process's share of a stream, whose steps are asked for in order."""

    def __init__(self, data: RunData, rank: int = 0, ranks: int = 1) -> None:
        super().__init__(data, rank, ranks)
        assert data.stream is not None
        self.stream, self.row_length = data.stream, data.row_length
        self.report = data.report = EncodeReport()  # of the records that this process encodes
        # The window that is being read: its number, records before it, where its sources were, rows given.
        self._state = {"window": 0, "before": 0, "sources": [{} for _ in data.sources], "rows": 0}
        self._step = 0
        self._rows: Iterator[tuple[Example | Row, int]] | None = None

    def at(self, step: int) -> list[Unit] | None:
        """Return this process's rows of a step, which follows the one before; None = the data have ended."""
        assert step == self._step, "a stream cannot jump"
        self._rows = self._rows or self._read_on()
        places = range(self.rank, self.step_rows, self.ranks)
        units = [Unit(*item, place) for place, item in zip(places, self._rows, strict=False)]
        if len(units) < len(places):
            return None
        self._step += 1
        return list(map(self._count, units))

    def state_dict(self) -> dict[str, Any]:
        return {**self._state, "step": self._step, "counts": self.counts()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume where `state` was taken, on as many processes."""
        self._state = {name: state[name] for name in self._state}
        self._step, self._counts, self._rows = state["step"], state["counts"], None

    def _read_on(self) -> Iterator[tuple[Example | Row, int]]:
        """Rows with their epochs, from the position on, which follows them."""
        given, seed = self._state["rows"], self.recipe.seed
        readers = [
            Reader(self.stream, number, seed, state) for number, state in enumerate(self._state["sources"])
        ]
        number, before = self._state["window"], self._state["before"]
        while True:
            states = [reader.state() for reader in readers]
            records = self._draw(readers, number)
            if not records:
                return
            self._state = {"window": number, "before": before, "sources": states, "rows": given}
            order = np.argsort(keyed(seed, WINDOW, number, np.arange(len(records))), kind="stable")
            mine = order[(self.rank - before) % self.ranks :: self.ranks].tolist()
            rows = (
                row
                for start in range(0, len(mine), CHUNK)
                for row in self.stream.encode(
                    [records[place] for place in mine[start : start + CHUNK]], self.report, self.row_length
                )
            )
            for row in islice(rows, given, None):
                self._state["rows"] += 1
                yield row
            number, before, given = number + 1, before + len(records), 0

    def _draw(self, readers: list[Reader], number: int) -> list[Taken]:
        """Read the records of a window: sources by quota, until all of them have ended."""
        records: list[Taken] = []
        for start in count():
            left = [reader for reader in readers if not reader.ended]
            missing = self.recipe.data.shuffle_buffer - len(records)
            if not left or not missing:
                break
            quotas = tuple(draw_quotas({reader.number: reader.source.weight for reader in left}).items())
            for source in shuffled_round(self.recipe.seed, start, number, quotas)[:missing].tolist():
                record = readers[source].next()
                if record is None:
                    endless = [reader for reader in left if reader.source.epochs is None]
                    together = self.recipe.data.on_source_end == "stop" and readers[source] in endless
                    for reader in endless if together else [readers[source]]:
                        reader.restart()
                    break
                records.append(record)
        return records


def open_stream(run: RunData) -> None:
    """Let `run` stream its sources; its examples are those of their beginning, and held out are those of the
    first `data.eval_size` records of the first source."""
    for name in filter(is_prepared, (name for source in run.sources for name in source.names)):
        raise UnmaskError(
            f"data.streaming: {name} is prepared data, which is read row by row anyway; set it to false."
        )
    run.stream = stream = Stream(run.sources, {})
    for file in (file for source in run.sources for file in source.files):
        if isinstance(file, RecordFile) and file.is_array():
            raise UnmaskError(
                f"{file.label}: a JSON array cannot be streamed (data.streaming), since it ends where the"
                " file ends; write one record a line (.jsonl), or set data.streaming=false."
            )
    run.files = [[file.label for file in source.files] for source in run.sources]
    if wanted := run.recipe.data.eval_size:
        records = list(islice(stream.beginning(0), wanted))
        if len(records) < wanted:
            raise UnmaskError(
                f"data.eval_size: {wanted} are to be held out, but there are only {len(records)} records; use"
                " less or more data."
            )
        run.held_out_parts = [stream.examples(records, run.held_out_report)]
        stream.held_out.update(Counter(taken.file for taken in records))
    for number, source in enumerate(run.sources):
        records, report, examples = stream.beginning(number), EncodeReport(), []
        while not examples and (chunk := list(islice(records, CHUNK))):
            examples = stream.examples(chunk, report)
        if not examples:
            why = report.why_none(run.recipe.data.block_size)
            raise UnmaskError(f"{', '.join(source.names)}: no record can be used: {why}.")
        run.parts.append(examples)
        run.report.merge(report)

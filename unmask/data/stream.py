"""A mixture of records -> batches, with nothing whole in memory and a position to go on from.

Every process and worker reads all of the stream, and decodes and encodes its own records alone: record k of
the run is that of process k modulo their number, and a process's records go to its workers a batch at a time.
As long as no record is left out, each optimizer step therefore has the same sequences on any number of
processes, and the batches of a process come in the same order from any number of workers.

Where files come over a network, and each source has one for everybody, they are dealt out instead: each
worker or process reads its own alone, in a mixture and an order of its own.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from unmask.data.encode import EncodeReport, Example
from unmask.data.mixture import Mixture, Taken
from unmask.data.pack import Row
from unmask.errors import UnmaskError

CHUNK = 1024  # records encoded, and packed, together: what is encoded again where a stream goes on

Encode = Callable[[Sequence[Taken]], tuple[Sequence[Example | Row], EncodeReport]]
Position = dict[str, Any]
"""{"window": state of the mixture at the window's start, "chunk": chunks of it that are done, "rows": rows
delivered of the next one}."""


class Share(NamedTuple):
    """Which part of a stream is one worker's: `worker` of `workers` of process `rank` of `ranks`."""

    rank: int = 0
    ranks: int = 1
    worker: int = 0
    workers: int = 1


WHOLE = Share()


class Delivered(NamedTuple):
    """A batch, and what its coming means."""

    batch: dict[str, torch.Tensor]
    worker: int
    position: Position  # after it
    counts: list[list[int]]  # examples and tokens of each source in it
    left_out: list[tuple[str, str, int, str]]  # (dropped or skipped, reason, records, first place)


@dataclass(frozen=True)
class RecordStream:
    """The rows of a mixture, encoded window by window.

    Args:
        encode: records -> examples, or rows of packed ones.
        settings: what a position in it depends on; a run that goes on must have the same.
    """

    mixture: Mixture
    encode: Encode
    settings: Mapping[str, Any] = field(default_factory=dict)

    def start(self) -> Position:
        """Return the position before the first row."""
        return {"window": self.mixture.start(), "chunk": 0, "rows": 0}

    def rows(
        self,
        position: Position | None = None,
        share: Share = WHOLE,
        batch_size: int = 1,
    ) -> Iterator[tuple[Example | Row, Position, list[EncodeReport]]]:
        """Yield from `position` on each row of one worker's share, with the position after it.

        The report of a chunk comes with the next row. `batch_size` is that of the batches dealt to workers.

        Raises:
            UnmaskError: A file or a record cannot be read or used.
        """
        position = position or self.start()
        chunk, done = position["chunk"], position["rows"]
        reports: list[EncodeReport] = []
        part, parts, share = self._split(share)
        for state, records in self.mixture.windows(position["window"], part, parts):
            own = [
                record
                for k, record in enumerate(records, state["counter"])
                if k % share.ranks == share.rank
                and k // share.ranks // batch_size % share.workers == share.worker
            ]
            records.clear()  # most of them are others'
            for number in range(chunk, -(-len(own) // CHUNK)):
                rows, report = self.encode(own[number * CHUNK : (number + 1) * CHUNK])
                if done == 0:  # else it was told before
                    reports.append(report)
                for index in range(done, len(rows)):
                    yield rows[index], {"window": state, "chunk": number, "rows": index + 1}, reports
                    reports = []
                done = 0
            chunk = 0

    def _split(self, share: Share) -> tuple[int, int, Share]:
        """Which part of the files a worker reads, of how many, and which share of their records it takes."""
        if self.mixture.may_split(share.ranks * share.workers):
            return share.rank * share.workers + share.worker, share.ranks * share.workers, WHOLE
        if self.mixture.may_split(share.ranks):
            return share.rank, share.ranks, share._replace(rank=0, ranks=1)
        return 0, 1, share

    def batches(
        self,
        batch_size: int,
        position: Position | None = None,
        share: Share = WHOLE,
    ) -> Iterator[tuple[list[Example | Row], Position, list[EncodeReport]]]:
        """Yield whole batches of `rows`; where the stream ends, an incomplete one is left out."""
        rows: list[Example | Row] = []
        reports: list[EncodeReport] = []
        for row, after, told in self.rows(position, share, batch_size):
            rows.append(row)
            reports += told
            if len(rows) == batch_size:
                yield rows, after, reports
                rows, reports = [], []


class StreamDataset(IterableDataset):
    """The batches of one process, ready for training: each worker makes whole batches of its own share."""

    def __init__(
        self,
        stream: RecordStream,
        collate: Callable[[list[Example | Row]], dict[str, torch.Tensor]],
        batch_size: int,
        share: Share,
        positions: Sequence[Position | None],
        first: int,
    ):
        super().__init__()
        self.stream, self.collate, self.batch_size = stream, collate, batch_size
        self.share, self.positions, self.first = share, positions, first

    def __iter__(self) -> Iterator[Delivered | str]:
        info = get_worker_info()
        worker = 0 if info is None else (info.id + self.first) % self.share.workers
        share = self.share._replace(worker=worker)
        try:
            for rows, after, reports in self.stream.batches(self.batch_size, self.positions[worker], share):
                counts = count_sources(rows, len(self.stream.mixture.sources))
                yield Delivered(self.collate(rows), worker, after, counts, _left_out(reports))
        except UnmaskError as error:
            yield str(error)  # raised in a worker, it would come wrapped into a traceback


class StreamLoader:
    """A process's own loader of a stream, which knows the position after the newest batch it gave.

    It has no length, and nothing else may deal its batches out over processes.

    Args:
        workers: processes that load data; 0 = this one.
    """

    def __init__(
        self,
        stream: RecordStream,
        collate: Callable[[list[Example | Row]], dict[str, torch.Tensor]],
        *,
        batch_size: int,
        workers: int = 0,
        rank: int = 0,
        ranks: int = 1,
        device: torch.device | str = "cpu",
    ):
        self.stream, self.collate, self.batch_size = stream, collate, batch_size
        self.processes, self.device = workers, device
        self.share = Share(rank, ranks, 0, max(1, workers))
        self.settings = {
            **stream.settings,
            "processes": ranks,
            "data.num_workers": self.share.workers,
            "sequences a process and forward": batch_size,
        }
        self.positions: list[Position | None] = [None] * self.share.workers
        self.next_worker = 0
        self.counts = [[0, 0] for _ in stream.mixture.sources]
        self.left_out: dict[tuple[str, str], tuple[int, str]] = {}

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        dataset = StreamDataset(
            self.stream, self.collate, self.batch_size, self.share, list(self.positions), self.next_worker
        )
        loader = DataLoader(
            dataset,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self.processes,
            worker_init_fn=ignore_stop_signals if self.processes else None,
            pin_memory=torch.cuda.is_available(),
        )
        with _no_threads_of_tokenizers(self.processes > 0):
            batches = iter(loader)
        for item in batches:
            if isinstance(item, str):
                raise UnmaskError(item)
            self.positions[item.worker] = item.position
            self.next_worker = (item.worker + 1) % self.share.workers
            for total, new in zip(self.counts, item.counts, strict=True):
                total[:] = [a + b for a, b in zip(total, new, strict=True)]
            for kind, reason, count, where in item.left_out:
                before, first = self.left_out.get((kind, reason), (0, where))
                self.left_out[kind, reason] = (before + count, first)
            yield {name: tensor.to(self.device, non_blocking=True) for name, tensor in item.batch.items()}

    def state(self) -> dict[str, Any]:
        """Return where this process stands, as JSON has it."""
        return {
            "settings": self.settings,
            "next_worker": self.next_worker,
            "positions": list(self.positions),
            "counts": [list(pair) for pair in self.counts],
            "left_out": [[*key, *value] for key, value in self.left_out.items()],
        }

    def load(self, state: Mapping[str, Any], where: str) -> None:
        """Go on from `state`; `where` names it in messages.

        Raises:
            UnmaskError: It is that of another stream, or of other numbers of processes or workers.
        """
        for name, value in self.settings.items():
            before = state["settings"].get(name)
            if before != value:
                raise UnmaskError(
                    f"resume_from_checkpoint: {where}: the position in the stream is that of a run with"
                    f" {name} = {before}; this one has {value}: set it as it was, or start a new run from the"
                    " weights (model.name_or_path)."
                )
        self.positions = list(state["positions"])
        self.next_worker = state["next_worker"]
        self.counts = [list(pair) for pair in state["counts"]]
        self.left_out = {(kind, reason): (n, first) for kind, reason, n, first in state["left_out"]}


def ignore_stop_signals(worker: int) -> None:
    """Leave SIGTERM and SIGINT, which may reach every process of a run, to the one that trains."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(item: Any) -> Any:
    return item


def count_sources(rows: Iterable[Example | Row], sources: int) -> list[list[int]]:
    """Count the examples and tokens of each source."""
    counts = [[0, 0] for _ in range(sources)]
    for row in rows:
        for example in [row] if isinstance(row, Example) else row:
            counts[example.source][0] += 1
            counts[example.source][1] += len(example.input_ids)
    return counts


def _left_out(reports: Sequence[EncodeReport]) -> list[tuple[str, str, int, str]]:
    return [
        (kind, reason, count, where)
        for report in reports
        for kind, found in (("dropped", report.dropped), ("skipped", report.skipped))
        for reason, (count, where) in found.items()
    ]


@contextmanager
def _no_threads_of_tokenizers(wanted: bool) -> Iterator[None]:
    """Keep `tokenizers` from warning of its own threads in each worker, which is a process already."""
    name = "TOKENIZERS_PARALLELISM"
    if not wanted or name in os.environ:
        yield
        return
    os.environ[name] = "false"
    try:
        yield
    finally:
        del os.environ[name]

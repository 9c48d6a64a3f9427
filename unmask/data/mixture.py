"""Several sources by weight -> one endless order of records, the same on every number of processes.

Which source record k of the run comes from is a keyed draw by weight; the files of a source are read in an
order that is drawn anew for each pass over it. Records come in windows, and stand in a window in the order of
a keyed hash. All this is a function of the seed and of where reading stands (a `State`, a few integers a
source), so a stream that goes on from a state is the uninterrupted one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import numpy as np

from unmask.data.encode import SOURCE_BIT, Example
from unmask.data.files import START, HubShard, Place, Raw, RecordFile, record_id
from unmask.errors import UnmaskError

FILES, DRAW, ORDER = range(3)  # what a keyed hash is for
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

State = dict[str, Any]
"""{"counter": records before, "cursors": [{"epoch", "file", "place"} of each source]}, as JSON has it."""


def keyed(seed: int, *keys: int | np.ndarray) -> np.ndarray:
    """Hash a seed and further integers, broadcast together, to 64 random bits each (SplitMix64, folded)."""
    state = _mix(np.asarray([seed % 2**64], dtype=np.uint64) + _GOLDEN)
    for key in keys:
        state = _mix((state ^ np.asarray(key, dtype=np.uint64)) + _GOLDEN)
    return state


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Encoded(NamedTuple):
    """A record that is encoded already, in the place where it is."""

    examples: Sequence[Example]
    number: int


@dataclass(frozen=True)
class ExampleFile:
    """Encoded examples, in memory or prepared, read like a file."""

    examples: Sequence[Example]
    label: str
    remote = False

    def read(self, start: Place = START) -> Iterator[tuple[Raw, Place]]:
        """Yield the examples from `start` on, each with the place after it."""
        for number in range(start.number, len(self.examples)):
            yield Raw(Encoded(self.examples, number), _example, self.label, number + 1), Place(number + 1)


def _example(place: Encoded) -> Example:
    return place.examples[place.number]


@dataclass(frozen=True)
class Source:
    """One source of a mixture.

    `epochs` is the number of passes over it, None = no limit; of file i the first `held_out[i]` records are
    left out.
    """

    label: str
    files: Sequence[RecordFile | HubShard | ExampleFile]
    weight: float = 1.0
    epochs: int | None = None
    held_out: dict[int, int] = field(default_factory=dict)


class Taken(NamedTuple):
    """A record in its place: its source, the pass over it, and its sample id."""

    source: int
    epoch: int
    sample_id: int
    raw: Raw


class _Reader:
    """Reads one source pass after pass, from a cursor on."""

    def __init__(self, source: Source, index: int, seed: int, cursor: dict[str, Any], part: int, parts: int):
        self.source, self.index, self.seed = source, index, seed
        self.part, self.parts = part, parts
        self.epoch: int = cursor["epoch"]
        self.file: int = cursor["file"]  # in the order of this pass
        self.place = Place(*cursor["place"])
        self.empty: set[int] = set()  # files without a record since the last one
        self.opened: Iterator[tuple[Raw, Place]] | None = None
        self._order()

    def _order(self) -> None:
        files = np.arange(len(self.source.files))
        order = np.argsort(keyed(self.seed, FILES, self.index, self.epoch, files), kind="stable")
        self.order = order.tolist()[self.part :: self.parts]

    @property
    def cursor(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "file": self.file, "place": list(self.place)}

    @property
    def spent(self) -> bool:
        return self.source.epochs is not None and self.epoch >= self.source.epochs

    def next(self) -> Taken | None:
        """The next record of the pass, or None at its end.

        Raises:
            UnmaskError: A file cannot be read, or none of the source has a record.
        """
        while self.file < len(self.order):
            file = self.order[self.file]
            opened = self.opened or self.source.files[file].read(self.place)
            self.opened = opened
            for raw, place in opened:
                self.place = place
                if place.number <= self.source.held_out.get(file, 0):
                    continue
                self.empty.clear()
                number = record_id(file, place.number - 1, self.source.files)
                return Taken(self.index, self.epoch, self.index << SOURCE_BIT | number, raw)
            if self.place.number <= self.source.held_out.get(file, 0):
                self.empty.add(file)
            self.file, self.place, self.opened = self.file + 1, Place(), None
        if len(self.empty) == len(self.source.files):
            what = (
                "every record is held out; use less of it or more data" if self.source.held_out else "empty"
            )
            raise UnmaskError(f"{self.source.label}: there is no record to train on: {what}.")
        return None

    def restart(self) -> None:
        """Begin the next pass."""
        self.close()
        self.epoch, self.file, self.place = self.epoch + 1, 0, Place()
        self._order()

    def close(self) -> None:
        if self.opened is not None:
            self.opened.close()  # pyright: ignore[reportAttributeAccessIssue]
        self.opened = None


@dataclass(frozen=True)
class Mixture:
    """Sources by weight, in windows of `window` records.

    A source with `epochs` is read that often and then leaves the mixture. One without that runs out starts
    again ("repeat"), or ends the epoch of the mixture ("stop"): all sources without `epochs` then start
    again. Where an epoch ends, that of a lone source included, so does the window.
    """

    sources: Sequence[Source]
    seed: int = 0
    window: int = 10_000
    on_source_end: Literal["stop", "repeat"] = "repeat"

    @property
    def endless(self) -> bool:
        """Whether some source has no limit of passes."""
        return any(source.epochs is None for source in self.sources)

    def start(self) -> State:
        """Return the state before the first record."""
        cursor = {"epoch": 0, "file": 0, "place": [0, 0, 0]}
        return {"counter": 0, "cursors": [cursor for _ in self.sources]}

    def may_split(self, parts: int) -> bool:
        """Whether the files are worth dealing out to `parts` readers, and enough for it.

        A mixture that ends is not dealt out: readers whose files are short would be done before others.
        """
        return self.endless and all(
            len(source.files) >= parts and all(file.remote for file in source.files)
            for source in self.sources
        )

    def windows(self, state: State, part: int = 0, parts: int = 1) -> Iterator[tuple[State, list[Taken]]]:
        """Yield from `state` on each window's records in their order, with the state at its start.

        With `parts` > 1 they are those of one of several readers, each of which has files of its own, dealt
        out anew in every pass, in a mixture and an order of its own.

        Raises:
            UnmaskError: A file cannot be read, is gone or changed, or a source has no record.
        """
        readers = [
            _Reader(source, index, self.seed, cursor, part, parts)
            for index, (source, cursor) in enumerate(zip(self.sources, state["cursors"], strict=True))
        ]
        counter = state["counter"]
        with closing(_All(readers)):
            while True:
                begun = {"counter": counter, "cursors": [reader.cursor for reader in readers]}
                records = self._window(readers, counter, part, parts)
                if not records:
                    return
                counter += len(records)
                ids = np.asarray([(r.source, r.epoch, r.sample_id) for r in records]).T
                order = np.argsort(keyed(self.seed, ORDER, *ids), kind="stable")
                records[:] = [records[place] for place in order]
                yield begun, records

    def _window(self, readers: list[_Reader], counter: int, part: int, parts: int) -> list[Taken]:
        records: list[Taken] = []
        left, bounds = _left(readers)
        uniforms = keyed(self.seed, DRAW, (counter + np.arange(self.window)) * parts + part) / 2.0**64
        while left and len(records) < self.window:
            at = uniforms[len(records)] * bounds[-1]
            reader = left[min(bisect_right(bounds, at), len(left) - 1)]
            if (record := reader.next()) is not None:
                records.append(record)
                continue
            ends = reader.source.epochs is None and self.on_source_end == "stop"
            for other in readers if ends else [reader]:
                if other is reader or other.source.epochs is None:
                    other.restart()
            left, bounds = _left(readers)
            if records and (ends or len(readers) == 1):
                break
        return records


def _left(readers: list[_Reader]) -> tuple[list[_Reader], list[float]]:
    """The sources that still take part, and where the share of each in [0, sum of weights) ends."""
    left = [reader for reader in readers if not reader.spent]
    return left, list(accumulate(reader.source.weight for reader in left))


@dataclass
class _All:
    readers: list[_Reader]

    def close(self) -> None:
        for reader in self.readers:
            reader.close()


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

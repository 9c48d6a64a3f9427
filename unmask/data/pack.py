"""Examples -> rows that several of them share: packing, so that little of a batch is padding.

The rows are a function of the examples and of their length alone: no seed, no device, no number of
processes. A window of examples is packed by itself, so a stream can be packed as it comes.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import overload

from unmask.data.encode import Example
from unmask.errors import UnmaskError

WINDOW = 2048  # examples packed together

Row = list[Example]
"""Examples that share a row, in their order in it."""


def pack(examples: Iterable[Example], length: int, window: int = WINDOW) -> Iterator[Row]:
    """Put examples into rows of at most `length` tokens: longest first, each into the fullest row it fits.

    Nothing is carried from one window of examples to the next. Rows come in the order of their first
    example, and examples stand in a row in the order they came in.

    Args:
        length: most tokens of a row.
        window: examples looked at together; more of them fill the rows better.

    Raises:
        UnmaskError: a window below 1, or an example longer than a row.

    >>> examples = [Example([7] * size, [False] * size) for size in (3, 5, 2, 4)]
    >>> [[len(example.input_ids) for example in row] for row in pack(examples, 7)]
    [[3, 4], [5, 2]]
    """
    if window < 1:
        raise UnmaskError(f"the window of packing must hold at least 1 example; got {window}.")
    source = iter(examples)
    while taken := list(islice(source, window)):
        sizes = [len(example.input_ids) for example in taken]
        if max(sizes) > length:
            raise UnmaskError(f"an example of {max(sizes)} tokens does not fit a row of {length}.")
        for row in _rows(sizes, length):
            yield [taken[index] for index in row]


class PackedRows(Sequence[Row]):
    """The rows of `pack`, whose examples are read when a row is asked for.

    Args:
        examples: may be on disk.
        sizes: tokens of each.
        length: most tokens of a row.
    """

    def __init__(self, examples: Sequence[Example], sizes: Sequence[int], length: int) -> None:
        self.examples = examples
        self.indices = [
            [start + index for index in row]
            for start in range(0, len(sizes), WINDOW)
            for row in _rows(sizes[start : start + WINDOW], length)
        ]

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return [self.examples[number] for number in self.indices[index]]


def filled(rows: Sequence[Row], length: int) -> float:
    """Compute the share of the positions of rows of `length` that hold a token."""
    return sum(len(example.input_ids) for row in rows for example in row) / (len(rows) * length)


def _rows(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Best-fit decreasing: the indices that share each row, in order."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), fullest row first
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        place = bisect_left(room, (sizes[index], -1))
        if place < len(room):
            free, row = room.pop(place)
        else:
            free, row = length, len(rows)
            rows.append([])
        rows[row].append(index)
        insort(room, (free - sizes[index], row))
    return sorted(map(sorted, rows))

"""Packing: nothing lost, rows full, and the same rows whatever way the examples come."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.data.collate import PackedRows, pack, pack_sizes
from unmask.data.encode import Example
from unmask.errors import UnmaskError


def spread(count: int, least: int = 28, most: int = 665) -> list[int]:
    """Lengths like those of instructions: many short ones, few long ones, in no order."""
    return [least + (most - least) * ((number * 7919) % count) ** 3 // count**3 for number in range(count)]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(20, 50), st.integers(1, 30))
def test_every_example_is_in_one_row_and_no_row_is_too_long(
    sizes: list[int], length: int, window: int
) -> None:
    rows = pack_sizes(sizes, length, window)
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    assert all(sum(sizes[index] for index in row) <= length for row in rows)
    # In order: of the examples in a row, of the rows by their first example; no row is of two windows.
    assert all(row == sorted(row) for row in rows) and [row[0] for row in rows] == sorted(
        row[0] for row in rows
    )
    assert all(len({index // window for index in row}) == 1 for row in rows)
    # A stream that is entered at a window has the same rows.
    for start in range(0, len(sizes), window):
        after = [[start + index for index in row] for row in pack_sizes(sizes[start:], length, window)]
        assert pack_sizes(sizes[:start], length, window) + after == rows
    examples = [Example([number] * size, [False] * size) for number, size in enumerate(sizes)]
    assert pack(examples, length, window) == [[examples[index] for index in row] for row in rows]
    assert list(PackedRows(examples, sizes, length)) == pack(examples, length)


def test_the_longest_come_first_and_each_goes_where_least_room_is_left() -> None:
    # 6 and 5 open rows with 4 and 5 to spare: 4 takes the tighter one, 3 what is left, 2 joins it.
    assert pack_sizes([2, 6, 3, 5, 4], 10) == [[0, 2, 3], [1, 4]]
    assert pack_sizes([4, 8, 4], 8) == [[0, 2], [1]]
    with pytest.raises(UnmaskError, match="9 tokens"):
        pack_sizes([4, 9], 8)


@pytest.mark.parametrize("sizes", [spread(1000), spread(5000, 78, 550), spread(999, 1, 1024)])
def test_rows_are_full(sizes: list[int]) -> None:
    rows = pack_sizes(sizes, 1024)
    assert sum(sizes) / (len(rows) * 1024) >= 0.97
    # No packing has fewer rows than the tokens take.
    assert len(rows) <= -(-sum(sizes) // 1024) * 1.03 + 1

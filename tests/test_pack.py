"""Packing: nothing lost, rows full, and the same rows whatever way the examples come."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.data.collate import Row, pack
from unmask.data.encode import Example
from unmask.errors import UnmaskError


def examples_of(sizes: list[int]) -> list[Example]:
    return [Example([number] * size, [False] * size, number) for number, size in enumerate(sizes)]


def sizes_of(rows: list[Row]) -> list[list[int]]:
    return [[len(example.input_ids) for example in row] for row in rows]


def spread(count: int, least: int = 28, most: int = 665) -> list[int]:
    """Lengths like those of instructions: many short ones, few long ones, in no order."""
    return [least + (most - least) * ((number * 7919) % count) ** 3 // count**3 for number in range(count)]


lengths = st.lists(st.integers(1, 20), min_size=1, max_size=60)


@given(lengths, st.integers(20, 50), st.integers(1, 30))
def test_every_example_is_in_one_row_and_no_row_is_too_long(
    sizes: list[int], length: int, window: int
) -> None:
    examples = examples_of(sizes)
    rows = pack(examples, length, window)
    ids = [example.sample_id for row in rows for example in row]
    assert sorted(ids) == list(range(len(sizes)))
    assert all(example is examples[example.sample_id] for row in rows for example in row)
    assert all(sum(row) <= length for row in sizes_of(rows))
    # In order: of the examples in a row, of the rows by their first example, of the windows.
    assert all(row == sorted(row, key=lambda example: example.sample_id) for row in rows)
    windows = [{example.sample_id // window for example in row} for row in rows]
    assert all(len(one) == 1 for one in windows)
    first = [row[0].sample_id for row in rows]
    assert first == sorted(first)


@given(lengths, st.integers(20, 50), st.integers(1, 30), st.integers(0, 3))
def test_a_window_is_packed_by_itself(sizes: list[int], length: int, window: int, start: int) -> None:
    """A position in a stream is (window, row): a stream entered at a window goes on with the same rows."""
    examples = examples_of(sizes)
    rows = pack(examples, length, window)
    before = pack(examples[: start * window], length, window)
    after = pack(examples[start * window :], length, window)
    assert before + after == rows


def test_the_longest_come_first_and_each_goes_where_least_room_is_left() -> None:
    # 6 and 5 open rows with 4 and 5 to spare: 4 takes the tighter one, 3 what is left, 2 joins it.
    [first, second] = pack(examples_of([2, 6, 3, 5, 4]), 10)
    assert sizes_of([first, second]) == [[2, 3, 5], [6, 4]]


def test_rows_are_full() -> None:
    for sizes in (spread(1000), spread(5000, 78, 550), spread(999, 1, 1024)):
        rows = pack(examples_of(sizes), 1024)
        assert sum(sizes) / (len(rows) * 1024) >= 0.97
        # No packing has fewer rows than the tokens take.
        assert len(rows) <= -(-sum(sizes) // 1024) * 1.03 + 1


def test_an_example_as_long_as_a_row_fills_it_and_a_longer_one_is_refused() -> None:
    assert sizes_of(pack(examples_of([4, 8, 4]), 8)) == [[4, 4], [8]]
    with pytest.raises(UnmaskError, match=r"an example of 9 tokens does not fit a row of 8\."):
        pack(examples_of([4, 9]), 8)

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from unmask.diffusion.attention import previous_token, token_positions

ROWS = st.lists(st.booleans(), min_size=1, max_size=12)


@given(row=ROWS)
def test_positions_count_tokens_and_pass_over_padding(row: list[bool]) -> None:
    positions = token_positions(torch.tensor([row]))[0].tolist()
    tokens = [position for position, is_token in zip(positions, row, strict=True) if is_token]
    assert tokens == list(range(sum(row)))
    for column, is_token in enumerate(row):
        if not is_token:
            assert positions[column] == (positions[column - 1] if column else 0)


@given(row=ROWS)
def test_previous_token_is_the_nearest_on_the_left(row: list[bool]) -> None:
    previous = previous_token(torch.tensor([row]))[0].tolist()
    for column, found in enumerate(previous):
        before = [i for i in range(column) if row[i]]
        assert found == (before[-1] if before else column)


@given(first=ROWS, second=ROWS)
def test_rows_do_not_touch_one_another(first: list[bool], second: list[bool]) -> None:
    length = min(len(first), len(second))
    both = torch.tensor([first[:length], second[:length]])
    for function in (token_positions, previous_token):
        assert torch.equal(function(both), torch.cat([function(both[:1]), function(both[1:])]))


def test_padding_on_both_sides_and_in_the_middle() -> None:
    row = torch.tensor([[0, 0, 1, 1, 0, 1, 0]]).bool()
    assert token_positions(row).tolist() == [[0, 0, 0, 1, 1, 2, 2]]
    assert previous_token(row).tolist() == [[0, 1, 2, 2, 3, 3, 5]]

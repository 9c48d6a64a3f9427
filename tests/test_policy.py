from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.errors import UnmaskError
from unmask.generation.policy import most_confident, share_steps


@given(canvas=st.integers(1, 200), data=st.data())
@settings(max_examples=300, deadline=None)
def test_steps_are_shared_out_over_the_blocks(canvas: int, data: st.DataObject) -> None:
    block_length = data.draw(st.integers(1, canvas))
    sizes = [min(block_length, canvas - start) for start in range(0, canvas, block_length)]
    steps = data.draw(st.integers(len(sizes), canvas))
    shares = share_steps(steps, sizes)
    assert len(shares) == len(sizes) and sum(shares) == steps
    for share, size in zip(shares, sizes, strict=True):
        assert 1 <= share <= size  # every step of a block has a token to commit
    for share, size in zip(shares, sizes, strict=True):
        assert abs(share - steps * size / canvas) < 1  # in proportion


def test_shares_of_steps() -> None:
    assert share_steps(12, [4, 4, 4]) == [4, 4, 4]
    assert share_steps(6, [4, 4, 4]) == [2, 2, 2]
    assert share_steps(5, [10]) == [5]
    assert share_steps(3, [4, 4, 1]) == [1, 1, 1]
    assert share_steps(4, [1, 4, 3]) == [1, 1, 2]  # the rest of a prompt's block, then whole ones
    with pytest.raises(UnmaskError, match="steps must be at least 3, one for each block; got 2"):
        share_steps(2, [4, 4, 1])


@given(
    rows=st.lists(
        st.lists(
            st.tuples(st.sampled_from([0.0, 0.1, 0.5, 0.5, 0.9, 1.0]), st.booleans()), min_size=4, max_size=4
        ),
        min_size=1,
        max_size=4,
    ),
    count=st.integers(0, 6),
)
@settings(max_examples=200, deadline=None)
def test_most_confident_equals_sorting(rows: list[list[tuple[float, bool]]], count: int) -> None:
    confidence = torch.tensor([[value for value, _ in row] for row in rows])
    candidates = torch.tensor([[open_ for _, open_ in row] for row in rows])
    chosen = most_confident(confidence, candidates, count)
    for row, picked in zip(rows, chosen.tolist(), strict=True):
        ranked = sorted((-value, place) for place, (value, open_) in enumerate(row) if open_)
        assert [place for place, is_in in enumerate(picked) if is_in] == sorted(p for _, p in ranked[:count])


def test_ties_go_to_the_leftmost() -> None:
    chosen = most_confident(torch.full((1, 5), 0.25), torch.tensor([[False, True, True, True, True]]), 2)
    assert chosen.tolist() == [[False, True, True, False, False]]
    wide = torch.arange(5000)[None] % 3 / 3  # long enough for a sort that does not keep order to show
    chosen = most_confident(wide, torch.ones(1, 5000, dtype=torch.bool), 700)
    assert chosen[0].nonzero()[:, 0].tolist() == list(range(2, 2100, 3))


def test_the_count_may_differ_from_row_to_row() -> None:
    confidence = torch.tensor([[0.1, 0.2, 0.3]] * 3)
    chosen = most_confident(confidence, torch.ones(3, 3, dtype=torch.bool), torch.tensor([0, 1, 5]))
    assert chosen.tolist() == [[False] * 3, [False, False, True], [True] * 3]


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_candidate_without_confidence_is_still_taken(value: float) -> None:
    chosen = most_confident(torch.full((1, 2), value), torch.tensor([[False, True]]), 2)
    assert chosen.tolist() == [[False, True]]

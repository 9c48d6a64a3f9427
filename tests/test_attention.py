from __future__ import annotations

from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from unmask.diffusion.attention import (
    attend_within_documents,
    kernel_mask,
    previous_token,
    row_layout,
    token_positions,
)
from unmask.errors import UnmaskError

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


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_kernels_attend_alike() -> None:
    """Flex attention forward alone: it has no backward on a CPU. Its blocks do not divide 200 columns."""
    is_token = torch.ones(2, 200, dtype=torch.bool)
    is_token[1, 150:] = False
    segments = torch.arange(200).expand(2, -1) // 70
    attend = attend_within_documents(row_layout(is_token, segments))
    query, key, value = torch.randn(3, 2, 2, 200, 16)
    expected = scaled_dot_product_attention(query, key, value, kernel_mask(attend, "sdpa", query.dtype))
    added = kernel_mask(attend, "eager", query.dtype)
    eager = (query @ key.transpose(2, 3) / 4 + added).softmax(dim=-1) @ value
    assert torch.allclose(eager, expected, atol=1e-6)
    blocks = kernel_mask(attend, "flex_attention", query.dtype)
    assert blocks.shape == (2, 1, 200, 200)
    flex = flex_attention(query, key, value, block_mask=blocks)
    assert torch.allclose(cast(torch.Tensor, flex), expected, atol=1e-6)
    # Documents far from one another: blocks that a kernel passes over.
    far = attend_within_documents(row_layout(torch.ones(1, 512).bool(), torch.arange(512)[None] // 128))
    assert kernel_mask(far, "flex_attention", query.dtype).sparsity() == 75
    with pytest.raises(UnmaskError, match=r"'flash_attention_2' cannot do packed rows, .* use sdpa"):
        kernel_mask(attend, "flash_attention_2", query.dtype)


def test_padding_on_both_sides_and_in_the_middle() -> None:
    row = torch.tensor([[0, 0, 1, 1, 0, 1, 0]]).bool()
    assert token_positions(row).tolist() == [[0, 0, 0, 1, 1, 2, 2]]
    assert previous_token(row).tolist() == [[0, 1, 2, 2, 3, 3, 5]]

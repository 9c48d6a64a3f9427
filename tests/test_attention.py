from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import assert_rate, random_ids, tiny_model, tiny_stock_model
from torch import Tensor
from training_step import logits_of, loss_of, noise_of

from unmask.diffusion.attention import (
    attend_annealed,
    attend_block_causal,
    attend_two_copies,
    attend_within_documents,
    block_index,
    predicting_column,
    previous_token,
    row_layout,
    token_positions,
)
from unmask.diffusion.objective import Objective
from unmask.errors import UnmaskError

# A row is drawn column by column: is it a token, does it open a document, may it be masked?
Column = tuple[bool, bool, bool]
ROWS = st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=14)


def plain_row(columns: list[Column], block_length: int) -> tuple[list[int], list[int]]:
    """(document, block) of each column of a row, -1 for padding, told token by token."""
    documents, blocks = [], []
    document, block, size = -1, 0, 0
    last: bool | None = None
    opens = False
    for is_token, new, maskable in columns:
        opens = opens or new  # padding may open the document that the next token is in
        if not is_token:
            documents.append(-1)
            blocks.append(-1)
            continue
        if opens or document < 0:
            document, block, size = document + 1, 0, 1
        elif maskable != last or size == block_length:
            block, size = block + 1, 1
        else:
            size += 1
        opens, last = False, maskable
        documents.append(document)
        blocks.append(block)
    return documents, blocks


def as_tensors(columns: list[Column]) -> tuple[Tensor, Tensor, Tensor]:
    is_token, new, maskable = torch.tensor([columns]).unbind(dim=2)
    return is_token, new.long().cumsum(dim=1) * 5 % 17, maskable & is_token  # ids in no order


@given(columns=ROWS)
def test_layout_counts_documents_and_the_tokens_in_them(columns: list[Column]) -> None:
    is_token, segment_ids, _ = as_tensors(columns)
    layout, whole = row_layout(is_token, segment_ids), row_layout(is_token)
    documents, _ = plain_row(columns, 1)
    predicting, previous = predicting_column(layout)[0].tolist(), previous_token(is_token)[0].tolist()
    assert torch.equal(layout.is_token, is_token)
    for column, document in enumerate(documents):
        before = [i for i in range(column) if columns[i][0]]
        inside = [i for i in before if documents[i] == document]
        # Padding has the position of its predecessor.
        assert token_positions(is_token)[0, column] == max(0, len(before) - (not columns[column][0]))
        assert previous[column] == (before[-1] if before else column)
        if columns[column][0]:
            assert layout.document[0, column] == document
            assert layout.position[0, column] == len(inside)
            # The shift stops at the first token of a document.
            assert predicting[column] == (inside[-1] if inside else column)
            # By default a row is one document.
            assert (whole.document[0, column], whole.position[0, column]) == (0, len(before))


@given(columns=ROWS, block_length=st.integers(1, 5), noised=st.sets(st.integers(0, 13)))
def test_blocks_and_attention_told_pair_by_pair(
    columns: list[Column], block_length: int, noised: set[int]
) -> None:
    is_token, segment_ids, maskable = as_tensors(columns)
    layout = row_layout(is_token, segment_ids)
    block = block_index(layout, maskable, block_length)
    documents, blocks = plain_row(columns, block_length)
    assert torch.equal(block[is_token], torch.tensor(blocks)[None][is_token])
    length = len(columns)
    copied = sorted(column for column in noised if column < length)

    def same(query: int, key: int) -> bool:
        """In one document; padding is a document by itself."""
        tokens = columns[query][0] and columns[key][0]
        return documents[query] == documents[key] if tokens else query == key

    seeds = torch.zeros_like(segment_ids)
    within = attend_within_documents(layout)[0]
    nobody = attend_annealed(layout, 0.0, seeds)[0]
    both = attend_two_copies(layout, block, torch.tensor(copied, dtype=torch.long))[0]
    assert both.shape == (length + len(copied), length + len(copied))
    places = [(column, False) for column in range(length)] + [(column, True) for column in copied]
    for row, (query, query_is_noised) in enumerate(places):
        for place, (key, key_is_noised) in enumerate(places):
            if query_is_noised:
                sees = blocks[key] == blocks[query] if key_is_noised else blocks[key] < blocks[query]
            else:
                sees = not key_is_noised and blocks[key] <= blocks[query]
            assert both[row, place] == (sees and same(query, key))
            if not query_is_noised and not key_is_noised:
                assert within[query, key] == same(query, key)
                assert nobody[query, key] == (same(query, key) and key <= query)
    assert torch.equal(attend_annealed(layout, 1.0, seeds)[0], within)
    assert torch.equal(attend_block_causal(layout, block)[0], both[:length, :length])
    assert both.any(dim=1).all()  # no softmax over nothing


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_each_later_token_is_seen_with_the_share_and_on_its_own(share: float) -> None:
    rows, length = 20_000, 5
    layout = row_layout(torch.ones(rows, length, dtype=torch.bool))
    seeds = torch.arange(rows)[:, None].expand(rows, length)
    attend = attend_annealed(layout, share, seeds)
    query, key = torch.triu_indices(length, length, offset=1)
    assert attend[:, key, query].all()
    assert attend[:, range(length), range(length)].all()
    seen = attend[:, query, key]
    assert_rate(seen, share)
    first, second = torch.combinations(torch.arange(len(query)), 2).T
    assert_rate(seen[:, first] & seen[:, second], share**2)
    # A larger share only adds to what is seen.
    for less, more in pairwise(attend_annealed(layout, each, seeds) for each in (0.0, share, 0.9, 1.0)):
        assert not (less & ~more).any()
        assert more.sum() > less.sum()


def twins(shift: bool, attention: str) -> tuple[Any, Any]:
    """A diffusion model and the autoregressive one of transformers with the same weights."""
    stock, model = tiny_stock_model(), tiny_model(logit_shift=shift)
    model.load_state_dict(stock.state_dict())
    model.set_attn_implementation(attention)
    return stock, model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shift", [True, False], ids=["shifted", "unshifted"])
def test_share_zero_is_the_autoregressive_model(shift: bool, attention: str) -> None:
    stock, model = twins(shift, attention)
    lengths, rows = (6, 4, 5), torch.arange(3)
    texts = [random_ids(1, length, seed=length) for length in lengths]
    causal = Objective(future_share=0.0, eps=0.3)
    padded, is_token = torch.zeros(3, 8, dtype=torch.int64), torch.zeros(3, 8, dtype=torch.bool)
    packed, ids = torch.cat(texts, dim=1), torch.tensor([[1] * 6 + [0] * 4 + [2] * 5])
    for row, text in enumerate(texts):
        padded[row, 2 : 2 + lengths[row]] = text[0]
        is_token[row, 2 : 2 + lengths[row]] = True
    in_batch = logits_of(model, padded, attention_mask=is_token, noise_seed=rows, objective=causal)
    in_pack = logits_of(model, packed, noise_seed=rows[None], objective=causal, segment_ids=ids)
    end = 0
    for row, text in enumerate(texts):
        given = {"noise_seed": rows[row : row + 1], "objective": causal}
        x_t = noise_of(model, text, **given).x_t
        assert (x_t == 31).any()
        raw = stock(x_t).logits[0]
        expected = torch.cat([raw[:1], raw[:-1]]) if shift else raw
        start, end = end, end + lengths[row]
        where = slice(2, 2 + lengths[row])
        for found in (logits_of(model, text, **given)[0], in_batch[row, where], in_pack[0, start:end]):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_share_one_is_bidirectional_and_half_lies_between(attention: str) -> None:
    stock, model = twins(True, attention)
    text, seeds = random_ids(3, 7), torch.arange(3)
    given = {share: {"noise_seed": seeds, "objective": Objective(future_share=share)} for share in (0.5, 1)}
    logits = {share: logits_of(model, text, **settings) for share, settings in given.items()}
    torch.testing.assert_close(logits[1], logits_of(model, text, noise_seed=seeds), rtol=0, atol=1e-10)
    plain = loss_of(model, text, noise_seed=seeds)
    torch.testing.assert_close(loss_of(model, text, **given[1]), plain, rtol=0, atol=1e-10)
    # Between: the logits of stock code under the mask that attend_annealed says.
    layout = row_layout(torch.ones_like(text, dtype=torch.bool))
    attend = attend_annealed(layout, 0.5, seeds[:, None].expand(3, 7))
    x_t = noise_of(model, text, noise_seed=seeds).x_t
    stock.config.is_causal = False
    raw = stock(input_ids=x_t, attention_mask=attend[:, None]).logits
    expected = torch.cat([raw[:, :1], raw[:, :-1]], dim=1)
    torch.testing.assert_close(logits[0.5], expected, rtol=0, atol=1e-10)
    assert not torch.allclose(logits[0.5], logits[1], atol=1e-3)


def test_annealing_and_blocks_are_refused() -> None:
    model = tiny_model(attention="block_causal", block_length=2)
    with pytest.raises(UnmaskError, match="future_share"):
        loss_of(model, random_ids(1, 4), objective=Objective(future_share=0.5))

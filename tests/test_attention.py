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


def test_padding_on_both_sides_and_in_the_middle() -> None:
    row = torch.tensor([[0, 0, 1, 1, 0, 1, 0]]).bool()
    assert token_positions(row).tolist() == [[0, 0, 0, 1, 1, 2, 2]]
    assert previous_token(row).tolist() == [[0, 1, 2, 2, 3, 3, 5]]


# Blocks. A column is (is it a token, does it open a document, may it be masked).

COLUMNS = st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=14)


def plain_row(columns: list[tuple[bool, bool, bool]], block_length: int) -> tuple[list[int], list[int]]:
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


def as_tensors(columns: list[tuple[bool, bool, bool]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    is_token, new, maskable = torch.tensor([columns]).unbind(dim=2)
    return is_token, new.long().cumsum(dim=1) * 5 % 17, maskable & is_token  # ids in no order


@given(columns=COLUMNS, block_length=st.integers(1, 5))
def test_blocks_start_at_every_run_and_after_so_many_tokens(
    columns: list[tuple[bool, bool, bool]], block_length: int
) -> None:
    is_token, segment_ids, maskable = as_tensors(columns)
    found = block_index(row_layout(is_token, segment_ids), maskable, block_length)[0].tolist()
    documents, blocks = plain_row(columns, block_length)
    for (here, _, _), block, expected in zip(columns, found, blocks, strict=True):
        assert not here or block == expected
    # Each response starts a block, whatever stands before it.
    for i, (token, _, may) in enumerate(columns):
        before = [j for j in range(i) if columns[j][0] and documents[j] == documents[i]]
        if token and may and before and not columns[before[-1]][2]:
            assert found[i] != found[before[-1]]


@given(columns=COLUMNS, block_length=st.integers(1, 5), noised=st.sets(st.integers(0, 13)))
def test_block_attention_told_pair_by_pair(
    columns: list[tuple[bool, bool, bool]], block_length: int, noised: set[int]
) -> None:
    is_token, segment_ids, maskable = as_tensors(columns)
    layout = row_layout(is_token, segment_ids)
    block = block_index(layout, maskable, block_length)
    documents, blocks = plain_row(columns, block_length)
    length = len(columns)
    copied = sorted(column for column in noised if column < length)

    def same(query: int, key: int) -> bool:
        """In one document; padding is a document by itself."""
        tokens = columns[query][0] and columns[key][0]
        return documents[query] == documents[key] if tokens else query == key

    causal = attend_block_causal(layout, block)[0]
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
    assert torch.equal(causal, both[:length, :length])
    assert both.any(dim=1).all()  # no softmax over nothing


# Documents. A row is drawn as a list of runs: padding (None) or the next document, with its length.

RUNS = st.lists(st.tuples(st.booleans(), st.integers(1, 4)), min_size=1, max_size=6)


def row_of(runs: list[tuple[bool, int]]) -> tuple[list[int | None], Tensor, Tensor]:
    """The document of each column (None = padding), and the two tensors that say so."""
    documents: list[int | None] = []
    number = 0
    for is_document, length in runs:
        parts: list[int | None] = [number] * length if is_document else [None] * length
        if is_document and length > 2:
            parts.insert(1, None)  # padding inside a document too
        documents += parts
        number += is_document
    is_token = torch.tensor([[d is not None for d in documents]])
    # Any numbers that differ from one document to the next will do; padding may carry any.
    ids = torch.tensor([[9 if d is None else 7 - 3 * d for d in documents]])
    return documents, is_token, ids


@given(runs=RUNS)
def test_layout_counts_documents_and_the_tokens_in_them(runs: list[tuple[bool, int]]) -> None:
    documents, is_token, ids = row_of(runs)
    layout = row_layout(is_token, ids)
    predicting = predicting_column(layout)[0].tolist()
    last: dict[int, int] = {}  # column of the latest token of each document
    count: dict[int, int] = {}
    for column, document in enumerate(documents):
        if document is None:
            continue
        assert layout.document[0, column] == document
        assert layout.position[0, column] == count.get(document, 0)
        # The shift stops at the first token of a document.
        assert predicting[column] == last.get(document, column)
        last[document] = column
        count[document] = count.get(document, 0) + 1
    assert torch.equal(layout.is_token, is_token)


@given(runs=RUNS)
def test_documents_do_not_see_one_another_and_padding_sees_itself(runs: list[tuple[bool, int]]) -> None:
    documents, is_token, ids = row_of(runs)
    layout = row_layout(is_token, ids)
    seeds = torch.zeros_like(ids)
    everyone, nobody = attend_annealed(layout, 1.0, seeds), attend_annealed(layout, 0.0, seeds)
    within = attend_within_documents(layout)
    for query, key in [(q, k) for q in range(len(documents)) for k in range(len(documents))]:
        expected = query == key if documents[query] is None else documents[query] == documents[key]
        assert within[0, query, key] == expected
        assert everyone[0, query, key] == expected
        assert nobody[0, query, key] == (expected and key <= query)


@given(row=ROWS)
def test_one_document_a_row_by_default(row: list[bool]) -> None:
    is_token = torch.tensor([row])
    default, explicit = row_layout(is_token), row_layout(is_token, torch.full((1, len(row)), 4))
    tokens = is_token[0]
    assert torch.equal(default.position[0, tokens], explicit.position[0, tokens])
    assert torch.equal(default.document[0, tokens], explicit.document[0, tokens])


# Annealed attention


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


def test_a_larger_share_only_adds_to_what_is_seen() -> None:
    layout = row_layout(torch.ones(50, 8, dtype=torch.bool))
    seeds = torch.arange(50)[:, None].expand(50, 8)
    shares = (0.0, 0.2, 0.5, 0.9, 1.0)
    seen = [attend_annealed(layout, share, seeds) for share in shares]
    for less, more in pairwise(seen):
        assert not (less & ~more).any()
        assert more.sum() > less.sum()


def test_what_is_seen_does_not_depend_on_padding_or_packing() -> None:
    seeds = torch.tensor([[5, 6]])
    layout = row_layout(torch.ones(1, 4, dtype=torch.bool))
    alone = [attend_annealed(layout, 0.5, seeds[:, [n]].expand(1, 4))[0] for n in range(2)]
    assert not torch.equal(*alone)
    columns = [[1, 2, 4, 5], [8, 9, 10, 11]]
    is_token = torch.zeros(1, 13, dtype=torch.bool)
    is_token[0, columns[0] + columns[1]] = True
    ids = torch.tensor([[3] * 7 + [1] * 6])
    packed = row_layout(is_token, ids)
    attend = attend_annealed(packed, 0.5, seeds.gather(1, packed.document))[0]
    for number, where in enumerate(columns):
        assert torch.equal(attend[where][:, where], alone[number])
    assert not attend[columns[0]][:, columns[1]].any()
    assert not attend[columns[1]][:, columns[0]].any()


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
    given = {
        share: {"noise_seed": seeds, "objective": Objective(future_share=share)} for share in (0, 0.5, 1)
    }
    logits = {share: logits_of(model, text, **settings) for share, settings in given.items()}
    torch.testing.assert_close(logits[1], logits_of(model, text, noise_seed=seeds), rtol=0, atol=1e-10)
    plain = loss_of(model, text, noise_seed=seeds)
    torch.testing.assert_close(loss_of(model, text, **given[1]), plain, rtol=0, atol=1e-10)
    for one, other in ((0, 0.5), (0.5, 1), (0, 1)):
        assert not torch.allclose(logits[one], logits[other], atol=1e-3)
    # Between: the logits of stock code under the mask that attend_annealed says.
    layout = row_layout(torch.ones_like(text, dtype=torch.bool))
    attend = attend_annealed(layout, 0.5, seeds[:, None].expand(3, 7))
    x_t = noise_of(model, text, noise_seed=seeds).x_t
    stock.config.is_causal = False
    raw = stock(input_ids=x_t, attention_mask=attend[:, None]).logits
    expected = torch.cat([raw[:, :1], raw[:, :-1]], dim=1)
    torch.testing.assert_close(logits[0.5], expected, rtol=0, atol=1e-10)


def test_annealing_and_blocks_are_refused() -> None:
    model = tiny_model(attention="block_causal", block_length=2)
    with pytest.raises(UnmaskError, match=r"block-causal attention cannot be annealed: use future_share = 1"):
        loss_of(model, random_ids(1, 4), objective=Objective(future_share=0.5))

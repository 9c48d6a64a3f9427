"""Attention kernels: a mask and documents one after another say the same to each of them.

Flash attention needs a GPU. Here its function is a plain loop over documents that checks what it is given, so
these tests show what reaches it, and not what it makes of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import FAMILIES, random_ids, tiny_model, tiny_stock_model
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import modeling_flash_attention_utils as flash

from unmask.diffusion.attention import attend_within_documents, row_layout
from unmask.diffusion.objective import Objective
from unmask.errors import UnmaskError
from unmask.model import kernels
from unmask.model.kernels import SDPA, flatten, kernel_mask, takes_documents

# Segment of each column, 0 = padding. Padding stands between documents, inside them and at both ends.
SEGMENTS = torch.tensor(
    [[1, 1, 1, 2, 2, 0, 2, 2, 2, 3, 0, 0], [0, 0, 4, 4, 4, 4, 4, 0, 0, 5, 5, 5], [6] * 12]
)
SIZES = [3, 5, 1, 5, 3, 12]


def packed_batch() -> dict[str, Any]:
    return {
        "input_ids": random_ids(3, 12),
        "attention_mask": SEGMENTS > 0,
        "segment_ids": SEGMENTS,
        "noise_seed": torch.arange(9).view(3, 3),
    }


def run(model: Any, **given: Any) -> list[Tensor]:
    """Logits at tokens, loss and gradients on packed rows; none at tokens that a truncation cut off."""
    drawn = model.draw_noise(**packed_batch(), **given)
    logits, loss = model(**packed_batch(), **given)
    return [logits[drawn.layout.is_token], loss, *torch.autograd.grad(loss, list(model.parameters()))]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Any]]:
    """(Tokens, mask) of each call of transformers' sdpa."""
    seen: list[tuple[int, Any]] = []
    stock = kernels.sdpa_attention_forward

    def spy(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **settings: Any) -> Any:
        seen.append((query.shape[2], mask))
        return stock(module, query, key, value, mask, **settings)

    monkeypatch.setattr(kernels, "sdpa_attention_forward", spy)
    return seen


# Documents one after another


@given(rows=st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4))
def test_flat_rows_hold_every_token_once_document_by_document(rows: list[list[int]]) -> None:
    rows = [sorted(row) for row in rows]  # 0 is padding here, and the tokens of a document stand together
    segments = torch.tensor(rows)
    flat = flatten(row_layout(segments > 0, segments))
    documents = [(row, one) for row in range(len(rows)) for one in (1, 2, 3) if one in rows[row]]
    if not documents:
        assert flat.place.tolist() == [0]
        assert flat.ends.tolist() == [0, 1]
        return
    place = torch.arange(segments.numel()).view(segments.shape)
    assert flat.take(place)[0].tolist() == place[segments > 0].tolist()
    assert flat.ends.dtype == torch.int32
    sizes = [rows[row].count(one) for row, one in documents]
    assert flat.ends.tolist() == [0, *torch.tensor(sizes).cumsum(0).tolist()]
    hidden = flat.take(place)[..., None] + 0.5
    back = flat.put_back(hidden, segments.shape)
    assert torch.equal(back[..., 0], torch.where(segments > 0, place + 0.5, 0.0))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shift", [False, True], ids=["unshifted", "shifted"])
def test_documents_and_masks_give_the_same_loss_and_gradient(
    family: str, shift: bool, calls: list[tuple[int, Any]]
) -> None:
    # Truncation turns more tokens into padding in each step.
    model = tiny_model(family, logit_shift=shift)
    for objective in (None, Objective(eps=0.2, truncate_probability=0.5)):
        found = run(model, objective=objective)
        assert found[1] > 0.1
        assert {mask for _, mask in calls} == {None}
        assert objective or [size for size, _ in calls] == SIZES * 2  # in both layers
        calls.clear()
        model.config._attn_implementation = "sdpa"  # transformers' own, which takes a mask
        assert_same(found, run(model, objective=objective), 1e-12)
        model.set_attn_implementation("eager")  # whose softmax is in float32
        assert_same(found, run(model, objective=objective), 1e-5)
        assert not calls
        model.set_attn_implementation("sdpa")


def test_packed_rows_without_padding_and_a_batch_without_a_token(calls: list[tuple[int, Any]]) -> None:
    model, ids = tiny_model().eval(), random_ids(2, 6)
    segments = torch.tensor([[1, 1, 1, 1, 2, 2]]).expand(2, -1)
    logits = model(ids, segment_ids=segments).logits
    assert [size for size, _ in calls] == [4, 2, 4, 2] * 2
    for where in (slice(0, 4), slice(4, 6)):
        assert_same([logits[:, where]], [model(ids[:, where]).logits], 1e-12)
    loss = model.train()(ids, attention_mask=torch.zeros(2, 6), segment_ids=segments).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_documents(reentrant: bool, calls: list[tuple[int, Any]]) -> None:
    model = tiny_model()
    expected = run(model)
    calls.clear()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    loss = model(**packed_batch()).loss
    loss.backward()
    assert [size for size, _ in calls] == SIZES * 4  # two layers, each twice
    assert_same([loss, *(p.grad for p in model.parameters())], expected[1:], 1e-12)


def test_dropout_is_drawn_for_each_document(calls: list[tuple[int, Any]]) -> None:
    model = tiny_model(attention_dropout=0.5)
    torch.manual_seed(0)
    first, second = run(model), run(model)
    assert not torch.equal(first[0], second[0])
    assert [size for size, _ in calls] == SIZES * 4


def test_a_compiler_sees_a_mask(monkeypatch: pytest.MonkeyPatch, calls: list[tuple[int, Any]]) -> None:
    model = tiny_model().eval()
    expected = model(**packed_batch()).logits[SEGMENTS > 0]
    calls.clear()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found = model(**packed_batch()).logits[SEGMENTS > 0]
    assert [size for size, _ in calls] == [12, 12]
    assert_same([found], [expected], 1e-12)


def test_sliding_windows_are_refused() -> None:
    model = tiny_model(layer_types=["full_attention", "sliding_attention"], sliding_window=4)
    with pytest.raises(UnmaskError, match="sliding window cannot do packed rows"):
        model(**packed_batch())


def test_our_sdpa_is_a_name_in_memory_alone(tmp_path: Path) -> None:
    model = tiny_model()
    assert model.config._attn_implementation == model.model.config._attn_implementation == SDPA
    assert tiny_stock_model().config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path)
    assert SDPA not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    for name, expected in (("sdpa", SDPA), ("eager", "eager"), (None, SDPA)):
        loaded = type(model).from_pretrained(tmp_path, attn_implementation=name)
        assert loaded.config._attn_implementation == expected


# Flash attention, with a function of its signature


@pytest.fixture
def flash_calls(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Put a loop in the place of flash attention; gives the ends of the documents of each call."""
    seen: list[list[int]] = []

    def varlen(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float = 1.0,
        causal: bool = False,
    ) -> Tensor:
        assert not causal
        assert cu_seqlens_q.dtype == torch.int32
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        ends = cu_seqlens_q.tolist()
        assert len(q) == len(k) == len(v) == ends[-1]
        assert max_seqlen_q == max_seqlen_k == max(end - start for start, end in pairwise(ends))
        seen.append(ends)
        heads = q.shape[1] // k.shape[1]
        k, v = (states.repeat_interleave(heads, dim=1) for states in (k, v))
        out = torch.empty_like(q)
        for start, end in pairwise(ends):
            scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * softmax_scale
            out[start:end] = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v[start:end])
        return out

    def refused(*args: Any, **settings: Any) -> Tensor:
        raise AssertionError("packed rows without their documents")

    def imports(*args: Any, **settings: Any) -> tuple[Callable[..., Any] | None, ...]:
        return refused, varlen, None, flash._pad_input, flash._unpad_input

    monkeypatch.setattr(flash, "_lazy_imports", imports)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_flash_attention_is_given_the_documents_in_one_row(family: str, flash_calls: list[list[int]]) -> None:
    model = tiny_model(family, logit_shift=True)
    expected = run(model)
    assert not flash_calls
    model.config._attn_implementation = "flash_attention_2"  # which would refuse to be chosen without a GPU
    assert_same(run(model), expected, 1e-12)
    ends = [0, *torch.tensor(SIZES).cumsum(0).tolist()]
    assert flash_calls == [ends, ends]
    flash_calls.clear()
    objective = Objective(eps=0.2, truncate_probability=0.5)
    found = run(model, objective=objective)
    assert flash_calls[0] != ends
    model.config._attn_implementation = SDPA
    assert_same(found, run(model, objective=objective), 1e-12)


def test_kernels_that_take_documents() -> None:
    names = ("sdpa", "eager", "flex_attention", SDPA, "flash_attention_2", "kernels-community/flash-attn2")
    assert [takes_documents(name) for name in names] == [False, False, False, True, True, True]


# Masks


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
    assert torch.allclose(cast(Tensor, flex), expected, atol=1e-6)
    # Documents far from one another: blocks that a kernel passes over.
    far = attend_within_documents(row_layout(torch.ones(1, 512).bool(), torch.arange(512)[None] // 128))
    assert kernel_mask(far, "flex_attention", query.dtype).sparsity() == 75


def test_kernels_masks_say_the_same() -> None:
    attend = torch.rand(2, 3, 5) < 0.5
    for name in ("sdpa", SDPA):
        assert torch.equal(kernel_mask(attend, name, torch.float64)[:, 0], attend)
    added = kernel_mask(attend, "eager", torch.float64)
    assert added.dtype == torch.float64
    assert (added[:, 0][attend] == 0).all()
    assert (added[:, 0][~attend].exp() == 0).all()
    assert (added[:, 0][~attend] > -torch.inf).all()
    with pytest.raises(UnmaskError, match=r"'flash_attention_2' cannot do block-causal .* use sdpa"):
        kernel_mask(attend, "flash_attention_2", torch.float64)

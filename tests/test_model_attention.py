"""Our attention function in stock models: against their own, by kernel, by document, with a cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    FAMILIES,
    OTHER_FAMILIES,
    STOCK,
    ragged,
    random_ids,
    recompute_activations,
    tiny_model,
    tiny_stock_config,
    tiny_stock_model,
)
from torch import Tensor
from training_step import logits_of, loss_of

from unmask.diffusion.attention import attend_within_documents, row_layout
from unmask.errors import UnmaskError
from unmask.model.attention import KERNELS, run_backbone

# Segment of each column, 0 = padding. Padding stands between documents, inside them and at both ends.
SEGMENTS = torch.tensor(
    [[1, 1, 1, 2, 2, 0, 2, 2, 2, 3, 0, 0], [0, 0, 4, 4, 4, 4, 4, 0, 0, 5, 5, 5], [6] * 12]
)
WINDOW: dict[str, Any] = {  # the second layer's; of Qwen2 and Qwen3
    "layer_types": ["full_attention", "sliding_attention"],
    "use_sliding_window": True,
    "sliding_window": 2,
}


def packed_batch() -> dict[str, Any]:
    return {
        "input_ids": random_ids(3, 12),
        "attention_mask": SEGMENTS > 0,
        "segment_ids": SEGMENTS,
        "noise_seed": torch.arange(9).view(3, 3),
    }


def run(model: Any) -> list[Tensor]:
    """Loss and gradients on packed rows."""
    loss = loss_of(model, **packed_batch())
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


# Against the stock models' own attention


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "eager"])
@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_FAMILIES])
def test_the_output_is_that_of_the_stock_model(family: str, kernel: str) -> None:
    """Should a library rename what we pass to attention, this fails."""
    ids = random_ids(3, 9)
    padded = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] * 7 + [0] * 2])
    windows = {"qwen2": WINDOW, "qwen3": WINDOW, "mistral": {"sliding_window": 4}}
    for fields in ({}, windows.get(family, {})):
        model = tiny_model(family, dtype=torch.float32, **fields).eval()
        model.set_attn_implementation(kernel)
        stock = STOCK[family][1](tiny_stock_config(family, is_causal=False, **fields)).eval()
        stock.load_state_dict(model.state_dict())
        # float32 sums of up to 24 products, in another order
        assert_same([model(ids).logits], [stock(input_ids=ids).logits], 2e-5)
        ours = model(ids, attention_mask=padded).logits
        theirs = stock(input_ids=ids, attention_mask=padded).logits
        assert_same([ours[padded == 1]], [theirs[padded == 1]], 2e-5)
        assert not torch.allclose(ours[1, :4], model(ids).logits[1, :4], atol=1e-2)


def test_a_library_that_drops_our_arguments_is_found_out() -> None:
    stock = tiny_stock_model()  # with its own attention function, which does not take them
    layout = row_layout(torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(UnmaskError, match=r"passed the attention inputs to 0 of 2 layers.*constraints.txt"):
        run_backbone(stock.model, random_ids(1, 5), layout)


def test_the_backbone_may_be_called_directly() -> None:
    model = tiny_model().eval()
    ids, mask = random_ids(2, 6), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    whole = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    logits = model(ids, attention_mask=mask).logits
    assert_same([model.lm_head(whole)[mask == 1]], [logits[mask == 1]])
    model.config.is_causal = True
    with pytest.raises(UnmaskError, match=r"set config\.is_causal = False"):
        model.model(input_ids=ids)


# Kernels


def test_names_stay_in_memory(tmp_path: Path) -> None:
    model = tiny_model().eval()
    model.save_pretrained(tmp_path)
    assert "unmask_auto" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    for name in (None, *KERNELS[:3]):
        loaded = type(model).from_pretrained(tmp_path, attn_implementation=name)
        assert_same([loaded(random_ids(1, 4)).logits], [model(random_ids(1, 4)).logits])
    with pytest.raises(UnmaskError, match=r"one of auto, sdpa, eager, .*; got 'flash_attention_2'"):
        type(model).from_pretrained(tmp_path, attn_implementation="flash_attention_2")
    with pytest.raises(UnmaskError, match="got 'flash_attention_3'"):
        model.set_attn_implementation("flash_attention_3")


@pytest.mark.parametrize(("dtype", "like"), [(torch.float32, "sdpa"), (torch.bfloat16, "eager")])
def test_auto_is_the_faster_kernel_of_a_cpu(dtype: torch.dtype, like: str) -> None:
    model, ids = tiny_model(dtype=dtype).eval(), random_ids(3, 40)
    outputs = {}
    for kernel in ("auto", "sdpa", "eager"):
        model.set_attn_implementation(kernel)
        outputs[kernel] = model(ids).logits
    assert torch.equal(outputs["auto"], outputs[like])
    assert not torch.equal(outputs["sdpa"], outputs["eager"])
    torch.testing.assert_close(outputs["sdpa"], outputs["eager"], rtol=0.1, atol=0.3)


@pytest.mark.parametrize("fields", [{}, WINDOW], ids=["full", "window"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gives_the_same(fields: dict[str, Any]) -> None:
    """Its forward pass alone: it has no backward pass on a CPU."""
    model = tiny_model(head_dim=16, dtype=torch.float32, **fields).eval()
    blocks = tiny_model(head_dim=16, dtype=torch.float32, attention="block_causal", block_length=3).eval()
    batch, ids = packed_batch(), random_ids(3, 12)
    found: dict[str, list[Tensor]] = {}
    for kernel in ("sdpa", "flex_attention"):
        for one in (model, blocks):
            one.set_attn_implementation(kernel)
        with torch.no_grad():
            found[kernel] = [
                logits_of(model, **batch)[SEGMENTS > 0],
                model(ids).logits,
                logits_of(blocks, **batch)[SEGMENTS > 0],
            ]
    assert_same(found["flex_attention"], found["sdpa"], 1e-4)


# Documents one after another


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("fields", [{}, WINDOW], ids=["full", "window"])
def test_documents_and_whole_rows_with_a_mask_give_the_same(fields: dict[str, Any], kernel: str) -> None:
    """Whole rows are what CUDA computes where it has no kernel for documents."""
    model, ids, weights = tiny_model(**fields), random_ids(3, 12), torch.rand(3, 12, 16)[SEGMENTS > 0]
    model.set_attn_implementation(kernel)
    layout = row_layout(SEGMENTS > 0, SEGMENTS)
    found = []
    mask = attend_within_documents(layout)
    for attend, in_documents in ((None, True), (mask, True), (mask, False)):
        hidden = run_backbone(model.model, ids, layout, attend, ragged=in_documents)[SEGMENTS > 0]
        loss = (hidden * weights).sum()
        found.append([hidden, *torch.autograd.grad(loss, list(model.model.parameters()))])
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


@pytest.mark.parametrize("fields", [{}, WINDOW], ids=["full", "window"])
def test_each_document_is_as_if_alone(fields: dict[str, Any]) -> None:
    model, ids = tiny_model(**fields).eval(), random_ids(3, 12)
    inputs = model.prepare(ids, attention_mask=SEGMENTS > 0, segment_ids=SEGMENTS)
    logits = model.lm_head(model.shifted_hidden(inputs, ids))
    for row, segment in ((0, 1), (0, 2), (0, 3), (1, 4), (1, 5), (2, 6)):
        own = SEGMENTS[row] == segment
        assert_same([logits[row, own]], [model(ids[row, own][None]).logits[0]])


def test_a_batch_without_a_token() -> None:
    model, ids = tiny_model(), random_ids(2, 6)
    segments = torch.tensor([[1, 1, 1, 1, 2, 2]]).expand(2, -1)
    loss = loss_of(model, ids, attention_mask=torch.zeros(2, 6), segment_ids=segments)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_documents(reentrant: bool) -> None:
    model = tiny_model()
    expected = run(model)
    recompute_activations(model, reentrant)
    loss = loss_of(model, **packed_batch())
    loss.backward()
    assert_same([loss, *(p.grad for p in model.parameters())], expected)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_dropout_drops(kernel: str) -> None:
    model = tiny_model(attention_dropout=0.5)
    model.set_attn_implementation(kernel)
    first, second = run(model), run(model)
    assert not torch.equal(first[0], second[0])
    ids = random_ids(1, 6)
    assert torch.equal(model.eval()(ids).logits, model(ids).logits)


# Sliding windows


def test_a_window_counts_positions_and_not_columns() -> None:
    model, ids = tiny_model(**WINDOW).eval(), random_ids(1, 6)
    columns = [0, 3, 4, 7, 8, 11]
    spread, mask = torch.zeros(1, 12, dtype=torch.long), torch.zeros(1, 12)
    spread[0, columns], mask[0, columns] = ids[0], 1
    assert_same([model(spread, attention_mask=mask).logits[0, columns]], [model(ids).logits[0]])


# The same to the bit in any batch, in the precision people use


@pytest.mark.parametrize(
    ("lengths", "side"),
    [*(([70, 1, 33, 17], side) for side in ("left", "right", "middle")), ([17] * 3, "left")],
    ids=["left", "right", "middle", "equal"],
)
@pytest.mark.parametrize(
    "blocks", [{}, {"attention": "block_causal", "block_length": 3}], ids=["whole", "blocks"]
)
def test_in_bfloat16_an_answer_is_the_same_alone_and_in_a_batch(
    blocks: dict[str, Any], lengths: list[int], side: str
) -> None:
    """Sums over keys depend on where they start and end: padding among them changed 15% of all answers."""
    model = tiny_model(
        hidden_size=64,
        head_dim=16,
        num_attention_heads=4,
        logit_shift=True,
        max_position_embeddings=128,
        dtype=torch.bfloat16,
        **blocks,
    ).eval()
    ids, mask = ragged(lengths, side, extra=0 if len(set(lengths)) == 1 else 2)
    ids = (ids + torch.arange(len(lengths))[:, None]) % 31  # no two rows are alike
    source = torch.arange(ids.shape[1]).expand_as(ids) % 5 == 0
    is_masked = (mask == 1) & ~source & (random_ids(*ids.shape) % 2 == 0)
    nll = model.masked_nll(ids, is_masked, mask, source).split(is_masked.sum(dim=1).tolist())
    logits = model(ids, attention_mask=mask, src_mask=source, training_mode="sft").logits
    settings = {"max_new_tokens": 9, "temperature": 1.0, "steps": 6, "return_trace": True}
    batch = model.generate(ids, mask, **settings)
    whole = model.generate(ids, mask, use_cache=False, **settings)
    for row in range(len(lengths)):
        columns = mask[row] == 1
        own, own_source = ids[row : row + 1, columns], source[row : row + 1, columns]
        own_masked = is_masked[row : row + 1, columns]
        alone = model(own, src_mask=own_source, training_mode="sft").logits
        assert torch.equal(logits[row, columns], alone[0])
        assert torch.equal(nll[row], model.masked_nll(own, own_masked, None, own_source))
        for cached, found in ((True, batch), (False, whole)):
            expected = model.generate(own, use_cache=cached, **settings)
            assert torch.equal(found.sequences[row, -9:], expected.sequences[0, -9:])
            assert torch.equal(found.confidence[row], expected.confidence[0])

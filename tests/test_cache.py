"""Fast paths of generation against the slow ones: cached keys and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import random_ids, tiny_model
from torch import Tensor

from unmask.errors import UnmaskError

PAD, END, MASK = 0, 1, 31
TRACE = ("sequences", "commit_step", "num_forwards")


def block_model(block_length: int = 4, **fields: Any) -> Any:
    return tiny_model(attention="block_causal", block_length=block_length, **fields).eval()


def ragged(lengths: list[int], side: str) -> tuple[Tensor, Tensor]:
    width = max(lengths)
    ids = torch.full((len(lengths), width), 9)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        where = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, where] = random_ids(1, length, seed=length)[0]
        mask[row, where] = 1
    return ids, mask


def same(one: Any, two: Any) -> None:
    for name in TRACE:
        assert torch.equal(one[name], two[name]), name
    torch.testing.assert_close(one.confidence, two.confidence, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.entropy, two.entropy, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shift", [False, True], ids=["unshifted", "shifted"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"steps": 5},
        {"temperature": 1.0, "steps": 6},
        {"threshold": 0.2},
        {"guidance_scale": 0.7, "steps": 6},
        {"policy": "remdm_cap", "eta": 0.3, "temperature": 1.0},
        {"policy": "origin", "temperature": 1.0},
    ],
    ids=str,
)
def test_cached_decoding_equals_the_whole_forward(shift: bool, side: str, settings: dict[str, Any]) -> None:
    model = block_model(4, logit_shift=shift, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    ids, mask = ragged([5, 0, 8, 3, 1], side)
    arguments = {
        "max_new_tokens": 11,
        "eos_token_id": list(range(1, 30, 3)),
        "return_trace": True,
        **settings,
    }
    cached, whole = (model.generate(ids, mask, use_cache=flag, **arguments) for flag in (True, False))
    same(cached, whole)
    assert settings or len(set(cached.num_forwards.tolist())) > 1, "no row finishes before the others"


@pytest.mark.parametrize("shift", [False, True], ids=["unshifted", "shifted"])
def test_blocks_that_begin_in_the_prompt(shift: bool) -> None:
    """A text that is continued: its blocks are counted from its start, and the canvas fills the last of them
    first."""
    model = block_model(4, logit_shift=shift)
    ids, mask = ragged([5, 8, 3], "left")
    arguments = {"max_new_tokens": 9, "eos_token_id": [], "return_trace": True}
    text = torch.zeros_like(ids, dtype=torch.bool)
    cached, whole = (
        model.generate(ids, mask, src_mask=text, use_cache=flag, **arguments) for flag in (True, False)
    )
    same(cached, whole)
    steps = cached.commit_step
    # Row 0 has one token in its second block: three of the canvas belong to it, and are written first.
    assert steps[0, :3].max() < steps[0, 3:].min()
    assert steps[1, :4].max() < steps[1, 4:].min()
    assert steps[2, :1].max() < steps[2, 1:].min()
    # Each step's logits are those of the model itself on the text so far.
    row = cached.sequences[0]
    first = int(steps[0].argmin())
    so_far = torch.cat([ids[0, 3:], torch.full((3,), MASK)])[None]
    logits, _ = model(so_far, src_mask=torch.zeros_like(so_far, dtype=torch.bool), training_mode="sft")
    logits[..., MASK] = -torch.inf
    assert row[8 + first] == logits[0, 5 + first].argmax()


@pytest.mark.parametrize("shift", [False, True], ids=["unshifted", "shifted"])
def test_only_the_current_block_is_computed(shift: bool) -> None:
    model = block_model(4, logit_shift=shift)
    shown: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, __, given: shown.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    heads: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda _, given: heads.append(len(given[0])))
    model.generate(random_ids(1, 10), max_new_tokens=8, eos_token_id=[], policy="left_to_right")
    first = 4 + shift  # with the token that predicts a block's first one
    assert shown == [10, first, 4, 4, 4, 4, first, 4, 4, 4]
    assert heads == [4, 3, 2, 1] * 2


@pytest.mark.parametrize("shift", [False, True], ids=["unshifted", "shifted"])
@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_an_approximate_cache_refreshed_each_step_is_exact(kind: str, shift: bool) -> None:
    model = tiny_model(logit_shift=shift).eval()
    ids, mask = ragged([5, 2, 7], "left")
    arguments = {"max_new_tokens": 9, "block_length": 3, "eos_token_id": [], "return_trace": True}
    exact = model.generate(ids, mask, **arguments)
    same(model.generate(ids, mask, approximate_cache=kind, refresh_interval=1, **arguments), exact)


@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_an_approximate_cache_computes_less_and_reports_how_it_differs(kind: str) -> None:
    model = tiny_model(num_hidden_layers=3, layer_types=["full_attention"] * 3).eval()
    ids = random_ids(6, 5)
    shown: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda _, __, given: shown.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    arguments = {"max_new_tokens": 12, "block_length": 4, "eos_token_id": [], "temperature": 1.0}
    model.generate(ids, approximate_cache=kind, **arguments)
    hook.remove()
    first, second, third = (17, 12, 12, 12), (17, 8, 8, 8), (17, 4, 4, 4)
    assert shown == ([*first, *second, *third] if kind == "prefix" else [17, 4, 4, 4] * 3)
    out = model.generate(ids, approximate_cache=kind, check_cache=True, **arguments)
    assert out.disagreement.shape == (6,) and 0 < out.disagreement.mean() < 1
    again = model.generate(ids, approximate_cache=kind, check_cache=True, refresh_interval=1, **arguments)
    assert again.disagreement.tolist() == [0.0] * 6


def test_what_a_cache_cannot_do_is_refused() -> None:
    with pytest.raises(UnmaskError, match="approximate_cache has no effect on a block-causal model"):
        block_model().generate(random_ids(1, 3), max_new_tokens=4, approximate_cache="dual")
    with pytest.raises(UnmaskError, match="refresh_interval has no effect without approximate_cache"):
        tiny_model().eval().generate(random_ids(1, 3), max_new_tokens=4, refresh_interval=2)
    with pytest.warns(UserWarning, match="trained on blocks of 4 tokens; generating in blocks of 2"):
        block_model().generate(random_ids(1, 3), max_new_tokens=4, block_length=2)

"""Generation with cached keys and values against generation without."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from tiny import OTHER_FAMILIES, ragged, random_ids, tiny_model
from torch import Tensor

from unmask.diffusion.attention import BlockAnchor
from unmask.errors import UnmaskError
from unmask.generation.sampling import Logits
from unmask.generation.table import DenoiserInput

MASK = 31
WINDOW: dict[str, Any] = {
    "layer_types": ["full_attention", "sliding_attention"],
    "use_sliding_window": True,
    "sliding_window": 2,
}
ANCHORS = pytest.mark.parametrize("anchor", get_args(BlockAnchor))
SHIFTS = pytest.mark.parametrize("shift", [False, True], ids=["unshifted", "shifted"])


def block_model(block_length: int = 4, **fields: Any) -> Any:
    return tiny_model(attention="block_causal", block_length=block_length, **fields).eval()


def assert_same(one: Any, two: Any) -> None:
    for name in ("sequences", "commit_step", "num_forwards"):
        assert torch.equal(one[name], two[name]), name
    for name in ("confidence", "entropy"):
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6)


def tokens_computed(model: Any) -> list[int]:
    """Filled with the number of tokens of every forward pass of the backbone."""
    counts: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, __, kwargs: counts.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return counts


@SHIFTS
@pytest.mark.parametrize(("side", "kernel", "layers"), [("left", "sdpa", {}), ("right", "eager", WINDOW)])
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
@ANCHORS
def test_cached_decoding_equals_the_whole_forward_pass(
    anchor: Any, shift: bool, side: str, kernel: str, layers: dict[str, Any], settings: dict[str, Any]
) -> None:
    model = block_model(4, logit_shift=shift, block_anchor=anchor, **layers)
    model.set_attn_implementation(kernel)
    ids, mask = ragged([5, 0, 8, 3, 1], side)
    settings = {"max_new_tokens": 11, "eos_token_id": list(range(1, 30, 3)), **settings}
    cached, whole = (
        model.generate(ids, mask, use_cache=flag, return_trace=True, **settings) for flag in (True, False)
    )
    assert_same(cached, whole)
    assert len(settings) > 2 or len(set(cached.num_forwards.tolist())) > 1, "no row finishes before others"


@SHIFTS
def test_blocks_that_begin_in_the_prompt(shift: bool) -> None:
    """A text that is continued: its blocks are counted from its start, and the canvas fills the last of them
    first."""
    model = block_model(4, logit_shift=shift)
    ids, mask = ragged([5, 8, 3])
    settings = {"max_new_tokens": 9, "eos_token_id": [], "return_trace": True}
    text = torch.zeros_like(ids, dtype=torch.bool)
    cached, whole = (
        model.generate(ids, mask, src_mask=text, use_cache=flag, **settings) for flag in (True, False)
    )
    assert_same(cached, whole)
    steps = cached.commit_step
    # Row 0 has one token in its second block: three of the canvas belong to it, and are committed first.
    for row, count in ((0, 3), (1, 4), (2, 1)):
        assert steps[row, :count].max() < steps[row, count:].min()
    # The logits of each step are those of the model itself on the text so far.
    first = int(steps[0].argmin())
    so_far = torch.cat([ids[0, 3:], torch.full((3,), MASK)])[None]
    logits, _ = model(so_far, src_mask=torch.zeros_like(so_far, dtype=torch.bool), training_mode="sft")
    logits[..., MASK] = -torch.inf
    assert cached.sequences[0, 8 + first] == logits[0, 5 + first].argmax()


@ANCHORS
@pytest.mark.parametrize("history", [False, True])
def test_each_forward_pass_sees_the_block_as_training_does(anchor: Any, history: bool) -> None:
    """The logits of the current block are those of the whole canvas, whose later blocks it cannot see.

    With an earlier response in the prompt, of which a chat says that it is one.
    """
    model = block_model(3, logit_shift=True, block_anchor=anchor)
    prompt, mask = ragged([4, 4])
    source = torch.tensor([[1, not history, not history, 1, *[0] * 8]]).bool().expand(2, -1)
    engine = model.make_engine(max_rows=2, cache_tokens=0)
    watched = engine.denoiser = Watched(engine.denoiser)
    for ids, is_token, is_source in zip(prompt, mask.bool(), source[:, :4], strict=True):
        settings = {"max_new_tokens": 8, "steps": 5, "eos_token_id": [], "use_cache": False}
        engine.add(ids[is_token].tolist(), is_source[is_token].tolist(), **settings)
    assert not [event.error for events in engine.steps() for event in events if event.error]
    if anchor == "response":
        assert [ids.shape[1] - 4 for ids, _, _ in watched.seen] == [3, 6, 6, 8, 8]
    for ids, needed, logits in watched.seen:
        whole = torch.cat([ids, torch.full((2, 12 - ids.shape[1]), MASK)], dim=1)
        full, _ = model(whole, src_mask=source, training_mode="sft")
        masked = (ids == MASK) & (torch.arange(ids.shape[1]) >= 4)
        assert torch.equal(needed, masked)
        torch.testing.assert_close(logits, full[:, : ids.shape[1]][masked], rtol=0, atol=1e-10)


class Watched:
    """A denoiser whose inputs and logits are kept."""

    def __init__(self, denoiser: Any) -> None:
        self.denoiser = denoiser
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, inputs: DenoiserInput) -> Logits:
        logits = self.denoiser(inputs)
        table = logits.take(torch.arange(logits.shape[0]))(0, logits.shape[1]).clone()
        self.seen.append((inputs.ids, inputs.needs_logits, table))
        return logits


@SHIFTS
def test_only_the_current_block_is_computed(shift: bool) -> None:
    model = block_model(4, logit_shift=shift)
    computed = tokens_computed(model)
    engine = model.make_engine(max_rows=1, cache_tokens=18)
    watched = engine.denoiser = Watched(engine.denoiser)
    engine.add(random_ids(1, 10)[0].tolist(), max_new_tokens=8, eos_token_id=[], policy="left_to_right")
    for _ in engine.steps():
        pass
    # The prompt with the first block, then the block alone, then the complete block with the next one.
    assert computed == [16, 4, 4, 4, 8, 4, 4, 4]  # fewer than 16 are made a multiple of 4
    assert [int(needed.sum()) for _, needed, _ in watched.seen] == [4, 3, 2, 1] * 2


@pytest.mark.parametrize(
    "fields", [{}, {"logit_shift": True}, WINDOW], ids=["unshifted", "shifted", "window"]
)
@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_an_approximate_cache_refreshed_each_step_is_exact(kind: str, fields: dict[str, Any]) -> None:
    model = tiny_model(**fields).eval()
    ids, mask = ragged([5, 2, 7])
    settings = {"max_new_tokens": 9, "block_length": 3, "eos_token_id": [], "return_trace": True}
    exact = model.generate(ids, mask, **settings)
    assert_same(model.generate(ids, mask, approximate_cache=kind, refresh_interval=1, **settings), exact)


@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_an_approximate_cache_computes_less(kind: str) -> None:
    model = tiny_model(num_hidden_layers=3, layer_types=["full_attention"] * 3).eval()
    ids, computed = random_ids(6, 5), tokens_computed(model)
    settings = {"max_new_tokens": 12, "block_length": 4, "eos_token_id": [], "temperature": 1.0}
    model.generate(ids, approximate_cache=kind, **settings)
    prefix = [17, 12, 12, 12, 17, 8, 8, 8, 17, 4, 4, 4]
    expected = prefix if kind == "prefix" else [17, 4, 4, 4] * 3
    assert computed == [6 * count for count in expected]


def test_a_refresh_due_at_a_step_without_masks_comes_with_the_next_forward_pass() -> None:
    model = tiny_model().eval()
    settings = {
        "policy": "remdm_cap",
        "eta": 0.5,
        "max_new_tokens": 4,
        "eos_token_id": [],
        "temperature": 1.0,
    }
    prompt, computed, late = random_ids(1, 16)[0].tolist(), tokens_computed(model), 0
    for seed in range(40):
        engine = model.make_engine(max_rows=1)
        engine.add(prompt, seed=seed, approximate_cache="dual", refresh_interval=2, **settings)
        refreshed = 0
        for step, _ in enumerate(engine.steps()):
            for count in computed:  # one, or none where nothing is masked
                if count == 20:
                    late += step - refreshed > 2
                    refreshed = step
                assert step - refreshed < 2
            computed.clear()
    assert late > 0


def test_settings_that_do_not_fit_the_attention() -> None:
    with pytest.raises(UnmaskError, match="approximate_cache"):
        block_model().generate(random_ids(1, 3), max_new_tokens=4, approximate_cache="dual")
    with pytest.raises(UnmaskError, match="steps"):  # fewer than blocks
        block_model().generate(random_ids(1, 3), max_new_tokens=10, steps=2)
    with pytest.raises(UnmaskError, match=r"canvas.*block_length"):
        tiny_model().eval().generate(random_ids(1, 2), max_new_tokens=2, canvas="growing")
    with pytest.warns(UserWarning, match="blocks of 4 tokens"):
        block_model().generate(random_ids(1, 3), max_new_tokens=4, block_length=2)


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_other_families(family: str) -> None:
    model = block_model(4, family=family, logit_shift=True, dtype=torch.float32)
    ids, mask = ragged([5, 8, 3])
    settings = {"max_new_tokens": 9, "eos_token_id": [], "return_trace": True}
    assert_same(*(model.generate(ids, mask, use_cache=flag, **settings) for flag in (True, False)))

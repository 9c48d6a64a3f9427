"""The recipe's curriculum, held against data and checkpoints."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from unmask.data.encode import Example
from unmask.diffusion.loss import PRESETS
from unmask.diffusion.objective import Curriculum, Objective
from unmask.errors import UnmaskError
from unmask.config import Recipe, recipe_from_dict
from unmask.training.schedule import (
    check_attention,
    check_block_sizes,
    make_curriculum,
    schedule_notes,
    steps_per_epoch,
)


def recipe(mode: str = "sft", **model: Any) -> Recipe:
    return recipe_from_dict(
        {
            "training_mode": mode,
            "model": {"name_or_path": "base", **model},
            "data": {"dataset_name": "a.txt", "block_size": 64},
            "global_batch_size": 4,
            "max_steps": 30,
        }
    )


def example(*sources: bool) -> Example:
    return Example([5] * len(sources), list(sources), 0)


def test_the_default_recipe_trains_the_plain_bound() -> None:
    curriculum = make_curriculum(recipe())
    steps = [curriculum.at(step, step // 3) for step in range(30)]
    assert set(steps) == {Objective(mask_block_sizes=(2, 4, 8))}  # sizes that no sequence draws


def test_every_key_reaches_the_curriculum() -> None:
    found = make_curriculum(
        recipe(
            loss="llada",
            noise_schedule="cosine",
            noise_eps=[0.1, 0.01],
            prefix_probability=0.1,
            truncate_probability=0.2,
            block_masking_probability=0.3,
            mask_block_sizes=[[2], [2, 4]],
            attention_annealing_steps=7,
            masking_scheduler={"schedule_type": "linear", "max_schedule_steps": 20, "source_steps": 5},
        )
    )
    assert found == Curriculum(
        objective=Objective(schedule="cosine", loss="llada"),
        noise_eps=(0.1, 0.01),
        prefix_probability=(0.1,),
        truncate_probability=(0.2,),
        block_masking_probability=(0.3,),
        mask_block_sizes=((2,), (2, 4)),
        schedule_type="linear",
        schedule_steps=20,
        source_steps=5,
        attention_annealing_steps=7,
    )
    assert make_curriculum(recipe(complementary_masks=True)).objective.complementary
    tables = make_curriculum(recipe(prefix_probability=[0.1, 0.2], mask_block_sizes=[2, 4, 8]))
    assert tables.prefix_probability == (0.1, 0.2) and tables.mask_block_sizes == ((2, 4, 8),)
    assert tables.schedule_steps == 30  # max_steps


@pytest.mark.parametrize(("examples", "steps"), [(1, 1), (4, 1), (5, 2), (8, 2)])
def test_an_epoch_ends_with_the_steps_that_its_rest_needs(examples: int, steps: int) -> None:
    assert steps_per_epoch(recipe(), [example(False)] * examples) == steps


def test_a_block_must_fit_into_some_response() -> None:
    # Two responses of one conversation are two runs, and what counts is the longest of all.
    examples = [example(True, False, False, True, False, False, False), example(True, True, False)]
    sizes: dict[str, Any] = {"block_masking_probability": [0, 0.1]}
    check_block_sizes(recipe(**sizes, mask_block_sizes=[[2], [2, 3]]), examples)
    check_block_sizes(recipe(), examples)  # no sequence is masked in blocks
    message = r"^model.mask_block_sizes: blocks of 4 tokens are longer than any response .* has 3; use"
    with pytest.raises(UnmaskError, match=message):
        check_block_sizes(recipe(**sizes, mask_block_sizes=[[2], [2, 4]]), examples)
    check_block_sizes(recipe("pretrain", **sizes), [example(*[False] * 8)])
    with pytest.raises(
        UnmaskError, match="blocks of 8 tokens are longer than any row, the longest of which has 7;"
    ):
        check_block_sizes(recipe("pretrain", **sizes), [example(*[False] * 7)])


@pytest.mark.parametrize("loss", PRESETS)
def test_a_preset_that_is_no_bound_is_named_once(loss: str) -> None:
    notes = schedule_notes(recipe(loss=loss), [example(False)] * 8)
    assert len(notes) == (0 if loss in ("elbo", "llada") else 1)
    assert all(note.startswith(f"loss {loss} is no bound") and "\n" not in note for note in notes)


def test_values_of_epochs_that_the_run_does_not_reach_are_named() -> None:
    """30 steps are 3.75 epochs of 8 steps."""
    examples = [example(False)] * 32
    assert schedule_notes(recipe(prefix_probability=[0.1] * 4), examples) == []
    [note] = schedule_notes(recipe(prefix_probability=[0.1] * 6, noise_eps=[0.1] * 4), examples)
    assert note.startswith("model.prefix_probability: the run ends in epoch 4, ")
    assert note.endswith("of 6 values, one an epoch, the last 2 are not reached")


@pytest.mark.parametrize(
    ("mode", "model", "attention", "block_length", "message"),
    [
        ("sft", {"block_length": 4}, "bidirectional", 4, "model.block_length has no effect: base has"),
        (
            "sft",
            {"attention": "block_causal"},
            "block_causal",
            None,
            "model.block_length: missing; base says",
        ),
        (
            "sft",
            {"attention_annealing_steps": 3},
            "block_causal",
            4,
            "model.attention_annealing_steps contradicts the block-causal attention of base",
        ),
        ("sft", {"loss": "cart"}, "block_causal", 4, "model.loss: cart contradicts the block-causal"),
        (
            "sft",
            {},
            "block_causal",
            65,
            "data.block_size: 64 tokens do not fit the block-causal .* 65 tokens",
        ),
        (
            "pretrain",
            {},
            "block_causal",
            24,
            "data.block_size: 64 tokens do not fit .* blocks have 24 tokens",
        ),
        ("sft", {}, "block_causal", 24, None),
        ("pretrain", {}, "block_causal", 16, None),
        ("sft", {"loss": "cart", "attention_annealing_steps": 0}, "bidirectional", None, None),
    ],
)
def test_what_a_checkpoint_says_of_attention_must_fit(
    mode: str, model: Any, attention: str, block_length: int | None, message: str | None
) -> None:
    config = SimpleNamespace(attention=attention, block_length=block_length)
    if message is None:
        check_attention(recipe(mode, **model), config)
        return
    with pytest.raises(UnmaskError, match=f"^{message}") as caught:
        check_attention(recipe(mode, **model), config)
    assert "\n" not in str(caught.value)


def test_attention_that_this_machine_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(attention="bidirectional", block_length=None)
    tree = recipe().model_dump()
    tree["model"]["attn_implementation"] = "flex_attention"
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(UnmaskError, match="flex_attention cannot train on a CPU; use auto"):
        check_attention(recipe_from_dict(tree), config)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    check_attention(recipe_from_dict(tree), config)


@pytest.mark.parametrize(("end_fill", "said"), [(1, 1), (6, 1), (4, 0), (8, 0)])
def test_responses_that_end_within_a_block_are_named(end_fill: int, said: int) -> None:
    settings = recipe_from_dict(
        {
            "training_mode": "sft",
            "model": {"name_or_path": "base", "attention": "block_causal", "block_length": 4},
            "data": {"dataset_name": "a.jsonl", "sft": {"end_fill": end_fill}},
        }
    )
    notes = schedule_notes(settings, [example(False)] * 8, block_length=4)
    assert len(notes) == said
    assert all("data.sft.end_fill" in note for note in notes)

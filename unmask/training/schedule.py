"""The recipe's model section -> the curriculum a run follows, held against the data it trains on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, cast

import torch

from unmask.data.encode import Example
from unmask.data.collate import Row
from unmask.diffusion.curriculum import PROBABILITIES, Curriculum
from unmask.diffusion.loss import PRESETS
from unmask.diffusion.objective import Objective
from unmask.errors import UnmaskError
from unmask.recipe import Recipe


def make_curriculum(recipe: Recipe) -> Curriculum:
    """Build the curriculum that the recipe's model section describes."""
    model, scheduler = recipe.model, recipe.model.masking_scheduler
    phases = [sizes for sizes in model.mask_block_sizes if isinstance(sizes, list)]
    return Curriculum(
        objective=Objective(
            schedule=model.noise_schedule, complementary=model.complementary_masks, loss=model.loss
        ),
        noise_eps=_table(model.noise_eps),
        **{name: _table(getattr(model, name)) for name in PROBABILITIES},
        mask_block_sizes=tuple(map(tuple, phases or [cast(list[int], model.mask_block_sizes)])),
        schedule_type=scheduler.schedule_type,
        schedule_steps=scheduler.max_schedule_steps or recipe.max_steps,
        source_steps=scheduler.source_steps,
        attention_annealing_steps=model.attention_annealing_steps,
    )


def _table(value: float | list[float]) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, list) else (value,)


def steps_per_epoch(recipe: Recipe, rows: Sequence[Example | Row]) -> int:
    """Count the optimizer steps of an epoch over these rows of batches; the last one may have fewer."""
    return -(-len(rows) // recipe.global_batch_size)


def check_block_sizes(recipe: Recipe, examples: Sequence[Example]) -> None:
    """Refuse cells of masks that are longer than any response.

    Raises:
        UnmaskError: one of `model.mask_block_sizes` is.
    """
    curriculum = make_curriculum(recipe)
    if not any(curriculum.block_masking_probability):
        return
    largest = max(size for phase in curriculum.mask_block_sizes for size in phase)
    longest = max((_longest_run(example) for example in examples), default=0)
    if largest > longest:
        what = "response of the data" if recipe.training_mode == "sft" else "row"
        if recipe.training_mode == "pretrain" and recipe.data.packing:
            what = "document"
        raise UnmaskError(
            f"model.mask_block_sizes: blocks of {largest} tokens are longer than any {what}, the longest of"
            f" which has {longest}; use smaller sizes, or set model.block_masking_probability to 0."
        )


def _longest_run(example: Example) -> int:
    """Length of the longest run of tokens that may be masked."""
    runs = groupby(example.src_mask)
    return max((sum(1 for _ in run) for is_source, run in runs if not is_source), default=0)


def check_attention(recipe: Recipe, config: Any) -> None:
    """Hold the recipe against the attention that a model has, which it may leave open.

    Args:
        config: of the model to train, with the recipe's own settings in it.

    Raises:
        UnmaskError: settings that block-causal attention or this machine contradicts, or blocks without
            block-causal attention.
    """
    model, length = recipe.model, config.block_length
    if model.attn_implementation == "flex_attention" and not torch.accelerator.is_available():
        raise UnmaskError("model.attn_implementation: flex_attention cannot train on a CPU; use auto.")
    if config.attention == "bidirectional":
        if length is not None:
            raise UnmaskError(
                f"model.block_length has no effect: {model.name_or_path} has bidirectional attention; set"
                " model.attention: block_causal to change it."
            )
        return
    if length is None:
        raise UnmaskError(
            f"model.block_length: missing; {model.name_or_path} says none, and model.attention: block_causal"
            " needs it."
        )
    whole = f"the block-causal attention of {model.name_or_path}"
    if model.attention_annealing_steps:
        raise UnmaskError(
            f"model.attention_annealing_steps contradicts {whole}, which never becomes bidirectional; remove"
            " it or set model.attention: bidirectional."
        )
    if model.loss == "cart":
        raise UnmaskError(f"model.loss: cart contradicts {whole}, which hides half of its context; use elbo.")
    size = recipe.data.block_size
    if length > size or (recipe.training_mode == "pretrain" and size % length):
        raise UnmaskError(
            f"data.block_size: {size} tokens do not fit {whole}: its blocks have {length} tokens; use a"
            " multiple of that."
        )


def loss_unit(recipe: Recipe) -> str:
    """What the training loss is measured in."""
    preset = recipe.model.loss
    return "nats per token" if PRESETS[preset].is_bound else f"by preset {preset}"


def schedule_notes(
    recipe: Recipe, rows: Sequence[Example | Row], block_length: int | None = None
) -> list[str]:
    """Say what a user may not expect of the recipe's loss and curriculum, a line each.

    Args:
        rows: examples, or rows of packed ones.
        block_length: that of the model, where it is block-causal.
    """
    notes = []
    if recipe.training_mode == "sft" and block_length and recipe.data.sft.end_fill % block_length:
        notes.append(
            f"data.sft.end_fill: {recipe.data.sft.end_fill} is no multiple of the {block_length} tokens of a"
            " block: responses end within a block, while generation fills whole ones; a multiple is better"
        )
    preset = PRESETS[recipe.model.loss]
    if not preset.is_bound:
        notes.append(
            f"loss {recipe.model.loss} is no bound on the likelihood; it is {preset.estimates};"
            " the held-out loss is that of elbo"
        )
    epochs = -(-recipe.max_steps // steps_per_epoch(recipe, rows))
    for name, table in make_curriculum(recipe).tables.items():
        if len(table) > epochs:
            notes.append(
                f"model.{name}: the run ends in epoch {epochs}, so that of {len(table)} values, one an epoch,"
                f" the last {len(table) - epochs} are not reached"
            )
    return notes

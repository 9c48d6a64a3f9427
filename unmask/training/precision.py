"""What a recipe's `precision: auto` comes to: decided once a run, before anything depends on it."""

from __future__ import annotations

import warnings

import torch

from unmask.config import Recipe
from unmask.errors import UnmaskWarning
from unmask.model.bf16 import gains_by_bf16, slowdown


def with_precision(
    recipe: Recipe, device: torch.device, checkpoint: Recipe | None = None
) -> tuple[Recipe, list[str]]:
    """Return the recipe with `precision` fp32 or bf16, and a line on what `auto` came to and why.

    Args:
        device: of the run.
        checkpoint: the recipe of the checkpoint that is resumed: `auto` is what that run computed in.

    Warns:
        UnmaskWarning: the run computes in bf16 on a CPU that is slower in it than in float32.
    """
    precision, bf16_weights, why = recipe.precision, recipe.model.dtype == "bfloat16", ""
    if precision == "auto" and checkpoint is not None:
        precision, why = checkpoint.precision, "that of the checkpoint"
    elif precision == "auto" and bf16_weights:
        precision, why = "bf16", "that of the weights, model.dtype"
    elif precision == "auto":
        precision = "bf16" if gains_by_bf16(device) else "fp32"
        why = f"{device.type} has {'' if precision == 'bf16' else 'no '}bf16"
        if device.type == "cpu":
            times = slowdown(torch.bfloat16)
            why = f"a matrix product in bf16 takes {times:.2g} times as long as in float32"
    computes_bf16 = device.type == "cpu" and (precision == "bf16" or bf16_weights)
    if computes_bf16 and (times := slowdown(torch.bfloat16)) > 1:
        key, remedy = "precision: bf16", "precision=fp32"
        if bf16_weights:
            key, remedy = "model.dtype: bfloat16", "model.dtype=float32"
        warnings.warn(
            f"{key}: this CPU does not compute in bf16 natively: a matrix product takes {times:.2g} times"
            f" as long as in float32; set {remedy}.",
            UnmaskWarning,
            stacklevel=2,
        )
    notes = [f"precision: {precision} (auto: {why})"] if why else []
    return recipe.model_copy(update={"precision": precision}), notes

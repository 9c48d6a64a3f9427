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
    precision, why = recipe.precision, ""
    if precision == "auto":
        if checkpoint is not None and checkpoint.precision != "auto":
            precision, why = checkpoint.precision, "that of the checkpoint"
        elif recipe.model.dtype == "bfloat16":
            precision, why = "bf16", "that of the weights, model.dtype"
        else:
            precision, why = _fastest(device)
    in_bf16 = recipe.model.dtype == "bfloat16" or precision == "bf16"
    if in_bf16 and device.type == "cpu" and (times := slowdown(torch.bfloat16)) > 1:
        keys = ("precision: bf16", "precision=fp32")
        if recipe.model.dtype == "bfloat16":
            keys = ("model.dtype: bfloat16", "model.dtype=float32")
        warnings.warn(
            f"{keys[0]}: this CPU does not compute in bf16 natively: a matrix product takes {times:.2g} times"
            f" as long as in float32; set {keys[1]}.",
            UnmaskWarning,
            stacklevel=2,
        )
    notes = [f"precision: {precision} (auto: {why})"] if why else []
    return recipe.model_copy(update={"precision": precision}), notes


def _fastest(device: torch.device) -> tuple[str, str]:
    """The precision that a device is fastest in, and what says so."""
    precision = "bf16" if gains_by_bf16(device) else "fp32"
    if device.type == "cpu":
        times = slowdown(torch.bfloat16)
        return precision, f"a matrix product in bf16 takes {times:.2g} times as long as in float32"
    return precision, f"{device.type} has {'' if precision == 'bf16' else 'no '}bf16"

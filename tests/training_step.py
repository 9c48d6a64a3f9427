"""A training step in parts, as tests ask for them: `from training_step import loss_of`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from unmask.diffusion.corrupt import ForwardInputs, Noised, corrupt
from unmask.diffusion.objective import Objective


def prepared(
    model: Any,
    input_ids: Tensor,
    *,
    noise_seed: Tensor | None = None,
    strata: Tensor | None = None,
    objective: Objective | None = None,
    **batch: Any,
) -> tuple[ForwardInputs, Noised, Objective]:
    """Check a batch and corrupt it; by default for the plain bound with the config's eps."""
    objective = objective or Objective(eps=model.config.noise_eps)
    inputs = model.prepare(input_ids, **batch)
    return inputs, corrupt(inputs, objective, noise_seed, strata), objective


def noise_of(model: Any, input_ids: Tensor, **batch: Any) -> Noised:
    """What is masked in a step."""
    return prepared(model, input_ids, **batch)[1]


def loss_of(model: Any, input_ids: Tensor, *, divisor: Any = None, **batch: Any) -> Tensor:
    """The loss of a step."""
    return model.diffusion_loss(*prepared(model, input_ids, **batch), divisor)


def logits_of(model: Any, input_ids: Tensor, **batch: Any) -> Tensor:
    """Logits (B, L, V) of the corrupted ids of a step, aligned."""
    return model.lm_head(model.denoise(*prepared(model, input_ids, **batch)))

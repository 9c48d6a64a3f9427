"""Optimizers by name, the learning-rate schedule as a function of the step, and the average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from unmask.config import Recipe
from unmask.errors import UnmaskError


def learning_rate(recipe: Recipe, step: int) -> float:
    """Learning rate of an optimizer step (0 is the first one).

    It rises from 0 over `warmup_steps`, then is constant, or falls to 0 at `max_steps` along a line or half a
    cosine.
    """
    warmup, kind, peak = warmup_steps(recipe), recipe.lr_scheduler.type, recipe.optimizer.learning_rate
    if step < warmup and kind != "constant":
        return peak * step / warmup
    done = min(1.0, (step - warmup) / max(1, recipe.max_steps - warmup))
    shares = {"linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return peak * shares.get(kind, 1.0)


def warmup_steps(recipe: Recipe) -> int:
    """The recipe's warmup; in a run too short for it, half of the run."""
    wanted, most = recipe.lr_scheduler.warmup_steps, recipe.max_steps // 2
    return wanted if wanted <= recipe.max_steps else most


def make_optimizers(recipe: Recipe, model: Any, parameters: Mapping[str, nn.Parameter]) -> list[Optimizer]:
    """Make the recipe's optimizer, for muon two: Muon for the matrices of the hidden layers, AdamW for the rest.

    Weight decay is for matrices alone, not for norms and biases. Muon's update of a matrix is its momentum made
    orthogonal, times 0.2 sqrt(max(rows, columns)): its root mean square is about that of an AdamW update, so that
    both have one learning rate (Liu et al., arXiv:2502.16982, section 2.2).

    Args:
        parameters: those to train, by name.
    """
    settings, rate = recipe.optimizer, recipe.optimizer.learning_rate
    adam: dict[str, Any] = {
        "lr": rate,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.epsilon,
    }

    def groups(some: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
        parts: dict[float, list[nn.Parameter]] = {}
        for parameter in some:
            parts.setdefault(settings.weight_decay if parameter.dim() > 1 else 0.0, []).append(parameter)
        return [{"params": part, "weight_decay": decay} for decay, part in parts.items()]

    everything = groups(parameters.values())
    if settings.type == "muon":
        head = model.get_output_embeddings()
        hidden = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m is not head}
        matrices = groups(p for p in parameters.values() if id(p) in hidden)
        rest = groups(p for p in parameters.values() if id(p) not in hidden)
        return [
            Muon(matrices, lr=rate, adjust_lr_fn="match_rms_adamw"),
            AdamW(rest, **adam, fused=True),
        ]
    if settings.type == "adafactor":
        from transformers.optimization import Adafactor

        return [Adafactor(everything, lr=rate, scale_parameter=False, relative_step=False)]
    if settings.type == "adamw_8bit":
        if find_spec("bitsandbytes") is None:
            raise UnmaskError(
                "optimizer.type: adamw_8bit needs bitsandbytes; pip install bitsandbytes, or use adamw."
            )
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

        return [AdamW8bit(everything, **adam)]
    return [AdamW(everything, **adam, fused=True)]  # on a CPU core a third of the time of the other two


class WeightAverage:
    """The exponential moving average of the trainable weights, evaluated and saved in their place.

    It starts as the weights before the first step; each optimizer step makes it
    `decay * average + (1 - decay) * weights`, in float32 at least. It looks back over about
    `1 / (1 - decay)` steps. Each process averages its own shards.

    Args:
        parameters: the trainable ones by name.
        decay: share of the average that a step keeps, in (0, 1).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float):
        self.parameters, self.decay = parameters, decay
        self.average: dict[str, Tensor] = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in parameters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights; called after each optimizer step."""
        for name, average in self.average.items():
            average.lerp_(self.parameters[name].to(average.dtype), 1 - self.decay)

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor] | None = None) -> None:
        """Leave the average, or other values, in the place of the weights."""
        for name, value in (values or self.average).items():
            self.parameters[name].copy_(value)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average in the place of the weights for an evaluation, and the weights back."""
        weights = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.put()
        try:
            yield
        finally:
            self.put(weights)

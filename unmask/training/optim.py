"""Optimizers by name, the learning-rate schedule as a function of the step, and the average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Muon, Optimizer

from unmask.config import Recipe
from unmask.errors import UnmaskError


def learning_rate(recipe: Recipe, step: int) -> float:
    """Learning rate of an optimizer step (0 is the first one).

    It rises from 0 over `warmup_steps`, then is constant, or falls to 0 at `max_steps` along a line or half a
    cosine.
    """
    warmup, kind = warmup_steps(recipe), recipe.lr_scheduler.type
    peak = recipe.optimizer.learning_rate
    if kind == "constant":
        return peak
    if step < warmup:
        return peak * step / max(1, warmup)
    done = min(1.0, (step - warmup) / max(1, recipe.max_steps - warmup))
    return (
        peak
        * {
            "constant_with_warmup": 1.0,
            "linear": 1.0 - done,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
        }[kind]
    )


def warmup_steps(recipe: Recipe) -> int:
    """The recipe's warmup; in a run too short for it, half of the run."""
    wanted, most = recipe.lr_scheduler.warmup_steps, recipe.max_steps // 2
    return wanted if wanted <= recipe.max_steps else most


def make_optimizer(recipe: Recipe, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Optimizer:
    """Make the recipe's optimizer; weight decay is for matrices alone, not for norms and biases.

    Args:
        parameters: those to train, by name.
    """
    settings = recipe.optimizer
    head = getattr(model, "get_output_embeddings", lambda: None)()
    hidden = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m is not head}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in parameters.values():
        muon = settings.type == "muon" and id(parameter) in hidden
        groups.setdefault((muon, parameter.dim() > 1), []).append(parameter)
    listed = [
        {"params": some, "muon": muon, "weight_decay": settings.weight_decay if decay else 0.0}
        for (muon, decay), some in sorted(groups.items(), reverse=True)
    ]
    adam = {"lr": settings.learning_rate, "betas": (settings.beta1, settings.beta2), "eps": settings.epsilon}
    if settings.type == "muon":
        return MuonWithAdamW(listed, **adam)
    if settings.type == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(listed, lr=settings.learning_rate, scale_parameter=False, relative_step=False)
    if settings.type == "adamw_8bit":
        if find_spec("bitsandbytes") is None:
            raise UnmaskError(
                "optimizer.type: adamw_8bit needs bitsandbytes; pip install bitsandbytes, or use adamw."
            )
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

        return AdamW8bit(listed, **adam)
    return AdamW(listed, **adam, fused=True)  # on a CPU core a third of the time of the other two


class MuonWithAdamW(Optimizer):
    """Muon for the matrices of the hidden layers, AdamW for all else, under one learning rate.

    The update of a matrix is its momentum made orthogonal by five Newton-Schulz steps in bfloat16, times
    0.2 sqrt(max(rows, columns)), so that its root mean square is about that of an AdamW update (Liu et al.,
    arXiv:2502.16982, section 2.2). To schedules and checkpoints the two are one optimizer: they share its
    groups and its state.

    Args:
        groups: of parameters; those with `muon: True` have matrices alone.
        lr: learning rate of both.
        betas, eps: of AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float):
        makers: list[tuple[Callable[..., Optimizer], bool, dict[str, Any]]] = [
            (Muon, True, {"adjust_lr_fn": "match_rms_adamw"}),
            (AdamW, False, {"betas": betas, "eps": eps, "fused": True}),
        ]
        parts = []
        for make, muon, settings in makers:
            if some := [group for group in groups if group["muon"] is muon]:
                parts.append(make(some, lr=lr, **settings))
        self._parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {"lr": lr})
        self._share()

    def _share(self) -> None:
        for part in self._parts:
            muon = isinstance(part, Muon)
            part.param_groups = [group for group in self.param_groups if group["muon"] is muon]
            part.state = self.state

    def load_state_dict(self, state_dict: Any) -> None:
        """Load the state of both."""
        super().load_state_dict(state_dict)
        self._share()  # with the new groups and the new state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for part in self._parts:
            part.step()


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
        for average, weights in zip(self.average.values(), self.parameters.values(), strict=True):
            _local(average).lerp_(_local(weights).to(average.dtype), 1 - self.decay)

    @torch.no_grad()
    def put(self) -> None:
        """Leave the average in the place of the weights."""
        for average, weights in zip(self.average.values(), self.parameters.values(), strict=True):
            _local(weights).copy_(_local(average))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average in the place of the weights for an evaluation, and the weights back."""
        weights = {name: _local(p).detach().clone() for name, p in self.parameters.items()}
        self.put()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in weights.items():
                    _local(self.parameters[name]).copy_(value)


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

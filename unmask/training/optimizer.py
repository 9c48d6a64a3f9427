"""The recipe's optimizer: transformers' own ones by name, and Muon beside AdamW."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from unmask.errors import UnmaskError
from unmask.recipe import Recipe

# On one CPU core fused AdamW takes a third of the time of the other two implementations.
_NAMES = {"adamw": "adamw_torch_fused", "adafactor": "adafactor", "muon": "adamw_torch_fused"}
_EIGHT_BIT = {"bitsandbytes": "adamw_bnb_8bit", "torchao": "adamw_torch_8bit"}


def optimizer_name(recipe: Recipe) -> str:
    """The name transformers has for the recipe's optimizer; for Muon that of the AdamW beside it.

    Raises:
        UnmaskError: `adamw_8bit` without a library that has it.
    """
    if recipe.optimizer.type != "adamw_8bit":
        return _NAMES[recipe.optimizer.type]
    for library, name in _EIGHT_BIT.items():
        if find_spec(library) is not None:
            return name
    raise UnmaskError(
        "optimizer.type: adamw_8bit needs bitsandbytes or torchao; pip install bitsandbytes, or use adamw."
    )


class MuonWithAdamW(Optimizer):
    """Muon for the matrices of the hidden layers, AdamW for all else, under one learning rate.

    The update of a matrix is its momentum made orthogonal by five Newton-Schulz steps in bfloat16, times
    0.2 sqrt(max(rows, columns)), so that its root mean square is about that of an AdamW update (Liu et al.,
    arXiv:2502.16982, section 2.2). To schedules, checkpoints and engines the two are one optimizer: they
    share its groups and its state.

    Args:
        params: groups; those with `muon: True` hold matrices alone.
        lr: learning rate of both.
        betas, eps: of AdamW.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        groups = [group for group in params if group["params"]]
        muon = [group for group in groups if group["muon"]]
        others = [group for group in groups if not group["muon"]]
        makers: list[tuple[Callable[..., Optimizer], list[dict[str, Any]], dict[str, Any]]] = [
            (Muon, muon, {"adjust_lr_fn": "match_rms_adamw"}),
            (AdamW, others, {"betas": betas, "eps": eps, "fused": True}),
        ]
        self._parts = [make(some, lr=lr, **settings) for make, some, settings in makers if some]
        super().__init__([group for part in self._parts for group in part.param_groups], {"lr": lr})
        self._share()

    def _share(self) -> None:
        for part in self._parts:
            is_muon = isinstance(part, Muon)
            part.param_groups = [group for group in self.param_groups if group["muon"] == is_muon]
            part.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # what `load_state_dict` ends with: new groups, new state
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss


def muon_groups(model: nn.Module, decayed: Collection[str], weight_decay: float) -> list[dict[str, Any]]:
    """Divide a model's trainable parameters: the hidden layers' matrices go to Muon, the rest to AdamW.

    Embeddings, the output head, norms and biases are the rest; the head is no hidden layer, whether tied to
    the embeddings or not.

    Args:
        model: the model, or what an engine has wrapped it in.
        decayed: names of the parameters with weight decay.
        weight_decay: of those.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    divided: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = (id(parameter) in linear, name in decayed)
            divided.setdefault(kind, []).append(parameter)
    return [
        {"params": some, "muon": muon, "weight_decay": weight_decay if decay else 0.0}
        for (muon, decay), some in sorted(divided.items(), reverse=True)
    ]

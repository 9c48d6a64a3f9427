"""The recipe's optimizers: which weights go where, and what a step of Muon is by a route of its own."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import make_trainer
from tiny import tiny_model
from torch import Tensor

from unmask.errors import UnmaskError
from unmask.config import recipe_from_dict
from unmask.training import optimizer as optimizer_module
from unmask.training.optimizer import MuonWithAdamW, muon_groups, optimizer_name

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> Iterator[None]:
    """Trainer collects garbage as it starts, which takes 0.4 s for all that the libraries hold."""
    gc.freeze()
    yield
    gc.unfreeze()


def recipe(kind: str) -> Any:
    return recipe_from_dict(
        {
            "model": {"config": {}, "tokenizer": "bytes"},
            "data": {"dataset_name": "x"},
            "optimizer": {"type": kind},
        }
    )


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])  # qwen2 has biases
@pytest.mark.parametrize("tied", [True, False])
def test_muon_gets_the_hidden_matrices_alone(family: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    trainer = make_trainer(tmp_path, model=model, weight_decay=0.1)
    groups = muon_groups(model, trainer.get_decay_parameter_names(model), 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(parameter)]: (group["muon"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    assert len(found) == len(names) == sum(len(group["params"]) for group in groups)
    for name, kind in found.items():
        if name.endswith(tuple(f"{layer}.weight" for layer in LINEAR)):
            assert kind == (True, 0.1), name
        elif "embed_tokens" in name or "lm_head" in name:
            assert kind == (False, 0.1), name  # as Trainer does it
        else:
            assert "norm" in name or name.endswith("bias")
            assert kind == (False, 0.0), name
    assert any("lm_head" in name for name in found) != tied


def test_what_is_frozen_is_in_no_group() -> None:
    model = tiny_model()
    model.get_input_embeddings().requires_grad_(False)
    groups = muon_groups(model, [], 0.0)
    assert all(parameter.requires_grad for group in groups for parameter in group["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters())) - 1


def orthogonal(matrix: Tensor) -> Tensor:
    """Five Newton-Schulz steps in float64, on the singular values alone."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ s.diag() @ v


def test_two_steps_of_muon_by_singular_values() -> None:
    torch.manual_seed(0)
    matrix, vector = torch.randn(12, 20), torch.randn(7)
    muon, other = (torch.nn.Parameter(x.clone()) for x in (matrix, vector))
    alone = torch.nn.Parameter(vector.clone())
    groups: list[dict[str, Any]] = [
        {"params": [muon], "muon": True, "weight_decay": 0.1},
        {"params": [other], "muon": False, "weight_decay": 0.0},
    ]
    optimizer = MuonWithAdamW(groups, lr=0.01, betas=(0.8, 0.9), eps=1e-6)
    adamw = torch.optim.AdamW([alone], lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.0)
    expected, momentum = matrix.double(), torch.zeros(12, 20, dtype=torch.float64)
    for rate in (0.01, 0.003):  # as a schedule sets it
        gradient = torch.randn(12, 20)
        muon.grad, other.grad, alone.grad = gradient, vector * rate, vector * rate
        for group in (*optimizer.param_groups, *adamw.param_groups):
            group["lr"] = rate
        optimizer.step()
        adamw.step()
        momentum = 0.95 * momentum + gradient
        update = orthogonal(gradient + 0.95 * momentum) * 0.2 * 20**0.5
        assert update.square().mean().sqrt().item() == pytest.approx(0.15, abs=0.05)  # AdamW's is about 0.2
        expected = expected * (1 - 0.1 * rate) - rate * update
        moved = (muon.double() - matrix.double()).norm()
        assert ((muon.double() - expected).norm() / moved).item() < 0.02  # theirs is in bfloat16
    assert torch.equal(other, alone)


def test_muon_goes_on_from_its_state() -> None:
    def make() -> tuple[Any, MuonWithAdamW]:
        model = tiny_model(dtype=torch.float32)
        return model, MuonWithAdamW(muon_groups(model, [], 0.0), lr=0.01)

    def step(model: Any, optimizer: MuonWithAdamW, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    first, optimizer = make()
    step(first, optimizer, 1)
    second, again = make()
    second.load_state_dict(first.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert len(again.state) == len(list(second.parameters()))
    for model, one in ((first, optimizer), (second, again)):
        step(model, one, 2)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_adafactor_takes_the_learning_rate_as_it_is(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, optim="adafactor", learning_rate=0.02)
    [*groups] = trainer.create_optimizer().param_groups
    assert all(not group["relative_step"] and not group["scale_parameter"] for group in groups)
    assert all(group["lr"] == 0.02 for group in groups)


def test_names_of_the_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert optimizer_name(recipe("adamw")) == optimizer_name(recipe("muon")) == "adamw_torch_fused"
    assert optimizer_name(recipe("adafactor")) == "adafactor"
    for there, name in (({"bitsandbytes", "torchao"}, "adamw_bnb_8bit"), ({"torchao"}, "adamw_torch_8bit")):
        monkeypatch.setattr(optimizer_module, "find_spec", lambda name, there=there: name in there or None)
        assert optimizer_name(recipe("adamw_8bit")) == name


@pytest.mark.skipif(
    any(find_spec(name) is not None for name in ("bitsandbytes", "torchao")), reason="a library has it"
)
def test_eight_bits_without_a_library() -> None:
    with pytest.raises(UnmaskError, match=r"^optimizer.type: adamw_8bit needs bitsandbytes or torchao; pip"):
        optimizer_name(recipe("adamw_8bit"))

"""`precision: auto` is decided once, says what it came to, and stays what it was in a resumed run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from unmask.config import Recipe, recipe_from_dict
from unmask.errors import UnmaskWarning
from unmask.training.precision import with_precision


def settings(**changes: Any) -> dict[str, Any]:
    """A recipe as a tree, with some of its keys replaced."""
    model: dict[str, Any] = {"config": {}, "tokenizer": "bytes"}
    tree = {"model": model, "data": {"dataset_name": "data.jsonl"}, "precision": "fp32"}
    model.update({key.partition("__")[2]: value for key, value in changes.items() if "__" in key})
    return {**tree, **{key: value for key, value in changes.items() if "__" not in key}}


CPU, GPU = torch.device("cpu"), torch.device("cuda")
AUTO: dict[str, Any] = {"precision": "auto", "max_steps": 2, "save_steps": 1, "data__eval_size": 0}


def recipe(**changes: Any) -> Recipe:
    return recipe_from_dict(settings(**changes))


def test_it_is_the_default() -> None:
    tree = settings()
    del tree["precision"]
    assert recipe_from_dict(tree).precision == "auto"


@pytest.mark.parametrize(("times", "expected"), [(0.5, "bf16"), (0.9, "fp32"), (30.0, "fp32")])
def test_on_a_cpu_it_is_what_is_faster(
    times: float, expected: str, bf16_takes: Callable[[float], None]
) -> None:
    bf16_takes(times)
    resolved, notes = with_precision(recipe(precision="auto"), CPU)
    assert resolved == recipe(precision=expected)
    why = f"a matrix product in bf16 takes {times:.2g} times as long as in float32"
    assert notes == [f"precision: {expected} (auto: {why})"]


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_on_an_accelerator_it_is_bf16_where_there_is_any(
    native: bool, expected: str, monkeypatch: pytest.MonkeyPatch, bf16_takes: Callable[[float], None]
) -> None:
    bf16_takes(30.0)  # no matter
    monkeypatch.setattr("unmask.training.precision.gains_by_bf16", lambda device: native)
    resolved, notes = with_precision(recipe(precision="auto"), GPU)
    assert resolved.precision == expected
    assert notes == [f"precision: {expected} (auto: cuda has {'' if native else 'no '}bf16)"]


def test_fp32_is_obeyed_without_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unmask.training.precision.slowdown", None)
    assert with_precision(recipe(precision="fp32"), CPU) == (recipe(precision="fp32"), [])


def test_bf16_is_obeyed_and_a_slow_cpu_warned_of(bf16_takes: Callable[[float], None]) -> None:
    asked = recipe(precision="bf16")
    assert with_precision(asked, CPU) == (asked, [])
    bf16_takes(31.4)
    said = (
        r"^precision: bf16: this CPU does not .* takes 31 times as long as in float32; set precision=fp32\.$"
    )
    with pytest.warns(UnmaskWarning, match=said):
        assert with_precision(asked, CPU) == (asked, [])
    assert with_precision(asked, GPU) == (asked, [])


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16"])
def test_weights_in_bf16_are_computed_in_bf16(precision: str, bf16_takes: Callable[[float], None]) -> None:
    asked = recipe(precision=precision, model__dtype="bfloat16")
    expected = "bf16" if precision == "auto" else precision
    assert with_precision(asked, CPU)[0].precision == expected
    bf16_takes(31.4)
    with pytest.warns(UnmaskWarning, match=r"^model\.dtype: bfloat16: .* set model\.dtype=float32\.$"):
        assert with_precision(asked, CPU)[0].precision == expected


# In a run.

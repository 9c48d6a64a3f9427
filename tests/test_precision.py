"""`precision: auto` is decided once, and says what it came to."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from unmask.config import Recipe, recipe_from_dict
from unmask.errors import UnmaskWarning
from unmask.training.precision import with_precision

CPU = torch.device("cpu")


def recipe(dtype: str = "float32", **changes: Any) -> Recipe:
    model: dict[str, Any] = {"config": {}, "tokenizer": "bytes", "dtype": dtype}
    return recipe_from_dict({"model": model, "data": {"dataset_name": "data.jsonl"}, **changes})


@pytest.mark.parametrize(
    ("precision", "dtype", "times", "expected", "said"),
    [
        ("auto", "float32", 0.5, "bf16", "in bf16 takes 0.5 times as long"),
        ("auto", "float32", 0.9, "fp32", "in bf16 takes 0.9 times as long"),
        ("auto", "float32", 30.0, "fp32", "in bf16 takes 30 times as long"),
        ("auto", "bfloat16", 0.5, "bf16", "model.dtype"),
        ("fp32", "float32", 0.5, "fp32", ""),
        ("fp32", "bfloat16", 0.5, "fp32", ""),
        ("bf16", "float32", 0.5, "bf16", ""),
    ],
)
def test_what_a_cpu_computes_in(
    precision: str,
    dtype: str,
    times: float,
    expected: str,
    said: str,
    bf16_takes: Callable[[float], None],
) -> None:
    assert recipe().precision == "auto"
    bf16_takes(times)
    resolved, notes = with_precision(recipe(dtype, precision=precision), CPU)
    assert resolved == recipe(dtype, precision=expected)
    assert [said in note for note in notes] == ([True] if said else [])


def test_a_resumed_run_computes_in_what_its_checkpoint_says(bf16_takes: Callable[[float], None]) -> None:
    bf16_takes(0.5)
    resolved, _ = with_precision(recipe(), CPU, recipe(precision="fp32"))
    assert resolved.precision == "fp32"


@pytest.mark.parametrize(
    ("dtype", "precision", "key"),
    [
        ("float32", "bf16", "precision"),
        ("bfloat16", "auto", r"model\.dtype"),
        ("bfloat16", "fp32", r"model\.dtype"),
    ],
)
def test_bf16_is_obeyed_and_a_slow_cpu_warned_of(
    dtype: str, precision: str, key: str, bf16_takes: Callable[[float], None]
) -> None:
    bf16_takes(31.4)
    asked = recipe(dtype, precision=precision)
    with pytest.warns(UnmaskWarning, match=rf"^{key}: .* takes 31 times as long as in float32; set {key}="):
        resolved, _ = with_precision(asked, CPU)
    assert resolved.precision == ("fp32" if precision == "fp32" else "bf16")
    with warnings.catch_warnings(action="error"):
        with_precision(asked, torch.device("cuda"))

"""`precision: auto` is decided once, says what it came to, and stays what it was in a resumed run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import history
from test_run import place as place  # fixtures
from test_run import settings, train
from test_run import trainers as trainers

from unmask import load_recipe
from unmask.config import Recipe, recipe_from_dict
from unmask.errors import UnmaskError, UnmaskWarning
from unmask.training import run
from unmask.training.precision import with_precision
from unmask.training.resume import Resumed

CPU, GPU = torch.device("cpu"), torch.device("cuda")
AUTO: dict[str, Any] = {"precision": "auto", "max_steps": 2, "save_steps": 1, "data__eval_size": 0}
train_auto = partial(train, **AUTO)


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


@pytest.mark.parametrize(("times", "expected"), [(0.5, "bf16"), (30.0, "fp32")])
def test_a_run_says_it_and_everything_it_leaves_has_it(
    times: float,
    expected: str,
    bf16_takes: Callable[[float], None],
    place: Path,
    trainers: Any,
) -> None:
    bf16_takes(times)
    _, said = train_auto()
    assert said.splitlines()[0].startswith(f"precision: {expected} (auto: ")
    assert f"cpu, {expected}\n" in said
    assert trainers[0].args.bf16 is (expected == "bf16")
    written = recipe(**{**AUTO, "precision": expected})
    for folder in ("out", "out/checkpoint-1", "out/checkpoint-2", "out/final"):
        assert load_recipe(place / folder / "recipe.yaml") == written
    for folder in ("out/checkpoint-1", "out/final"):
        facts = json.loads((place / folder / "provenance.json").read_text())
        assert facts["recipe"]["precision"] == expected
    assert f"| precision | {expected} |" in (place / "out/final/README.md").read_text()
    train("plain", **{**AUTO, "precision": expected})
    assert history(place / "plain/checkpoint-2") == history(place / "out/checkpoint-2")


def test_a_resumed_run_keeps_the_precision_of_its_checkpoint(
    bf16_takes: Callable[[float], None],
    place: Path,
) -> None:
    train_auto("whole")
    shutil.copytree("whole", "cut", ignore=shutil.ignore_patterns("final", "checkpoint-2"))
    bf16_takes(30.0)  # the run moves to another machine
    with pytest.warns(UnmaskWarning, match=r"precision: bf16: .* 30 times as long"):
        _, said = train_auto("cut", resume_from_checkpoint="auto")
    assert "precision: bf16 (auto: that of the checkpoint)\n" in said
    assert "differs from that of the checkpoint in checkpoint_save_dir\n" in said
    assert history(place / "cut/checkpoint-2") == history(place / "whole/checkpoint-2")
    assert load_recipe(place / "cut/checkpoint-2/recipe.yaml").precision == "bf16"


def test_another_precision_has_to_be_allowed(
    bf16_takes: Callable[[float], None],
    trainers: Any,
    place: Path,
) -> None:
    bf16_takes(30.0)
    train("out", **{**AUTO, "max_steps": 1})
    again = {**AUTO, "resume_from_checkpoint": "auto", "max_steps": 2}
    refused = (
        r'precision was "fp32" and is now "bf16"; set it back, or allow it with resume\.allow=\[precision\]'
    )
    with pytest.warns(UnmaskWarning), pytest.raises(UnmaskError, match=refused):
        train("out", **{**again, "precision": "bf16"})
    with pytest.warns(UnmaskWarning):
        _, said = train("out", **{**again, "precision": "bf16", "resume__allow": ["precision"]})
    assert "differs from that of the checkpoint in max_steps, precision\n" in said
    assert trainers[-1].args.bf16
    bf16_takes(0.5)
    _, said = train("out", **{**again, "max_steps": 3})
    assert "precision: bf16 (auto: that of the checkpoint)\n" in said


def test_every_process_takes_what_the_first_one_decided(
    monkeypatch: pytest.MonkeyPatch,
    trainers: Any,
    place: Path,
    bf16_takes: Callable[[float], None],
) -> None:
    bf16_takes(30.0)  # measured by itself, this process would have come to fp32
    decided = recipe(**{**AUTO, "precision": "bf16"})
    monkeypatch.setattr(run, "on_main", lambda *_: Resumed(None, decided, []))
    train_auto()
    assert trainers[0].args.bf16
    assert load_recipe(place / "out/checkpoint-1/recipe.yaml").precision == "bf16"

"""A loss that is no number: the step is not taken, and the samples are named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import history
from test_run import assert_close, saved, settings, train, write_data

from unmask.errors import UnmaskError
from unmask.config import recipe_from_dict
from unmask.training import guard
from unmask.training.trainer import DiffusionTrainer

EACH: dict[str, Any] = {
    "save_steps": 1,
    "save_total_limit": None,
    "micro_batch_size": 2,
    "data__eval_size": 0,
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    return tmp_path


def spoil(monkeypatch: pytest.MonkeyPatch, step: int, value: float) -> list[int]:
    """Multiply the loss of a step's second batch by `value`; its sample ids come into the list."""
    real, seen, number = DiffusionTrainer.compute_loss, [], [0]

    def compute(self: DiffusionTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = real(self, model, inputs, *args, **kwargs)
        if self.state.global_step + 1 < step:
            return loss
        number[0] += 1
        if number[0] == 2:
            seen[:] = inputs["sample_ids"].tolist()
            return loss * value
        return loss

    monkeypatch.setattr(DiffusionTrainer, "compute_loss", compute)
    return seen


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_step_and_the_samples_are_named(
    place: Path, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = spoil(monkeypatch, 3, value)
    with pytest.raises(UnmaskError) as caught:
        train(**EACH)
    assert str(caught.value) == (
        f"step 3: the loss is {value}, of the samples {ids[0]}, {ids[1]} (see out/non_finite.jsonl); no"
        " weight was changed by it, and the newest checkpoint is out/checkpoint-2. Lower"
        " optimizer.learning_rate, take the samples out, or leave such steps out with on_non_finite=skip."
    )
    [line] = (place / "out/non_finite.jsonl").read_text().splitlines()
    [batch] = json.loads(line)["micro_batches"]
    assert batch == {"process": 0, "micro_batch": 1, "loss": str(value), "sample_ids": ids}
    monkeypatch.undo()
    monkeypatch.chdir(place)
    _, said = train(**EACH, resume_from_checkpoint="auto", max_steps=3)
    assert "step 3/3" in said and "step 2/3" not in said


def test_a_gradient_that_is_no_number_counts_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = DiffusionTrainer.training_step

    def step(self: DiffusionTrainer, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = real(self, model, *args, **kwargs)
        if self.state.global_step == 1:
            next(model.parameters()).grad[0] = float("inf")
        return loss

    monkeypatch.setattr(DiffusionTrainer, "training_step", step)
    with pytest.raises(UnmaskError, match=r"^step 2: the gradient's norm is inf, of the samples (\d+, ){7}"):
        train(**EACH)
    [line] = (place / "out/non_finite.jsonl").read_text().splitlines()
    assert len(json.loads(line)["micro_batches"]) == 4  # any of them


def test_a_step_left_out_changes_nothing_but_the_count(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, 3, float("nan"))
    result, said = train(**EACH, on_non_finite="skip", log_steps=4, optimizer__weight_decay=0.1)
    assert "step 3: the loss is nan" in said and "the step is left out" in said
    out = place / "out"
    assert_close(saved(out / "checkpoint-3"), saved(out / "checkpoint-2"), atol=0)
    states = [torch.load(out / f"checkpoint-{n}/optimizer.pt", weights_only=True)["state"] for n in (2, 3)]
    for name, before in states[0].items():
        for key, value in before.items():
            assert torch.equal(value, states[1][name][key])
    assert not torch.equal(*(saved(out / f"checkpoint-{n}")["model.norm.weight"] for n in (3, 4)))
    log = json.loads((out / "checkpoint-5/trainer_state.json").read_text())["log_history"]
    assert [entry.get("skipped_steps") for entry in log if "loss" in entry] == [None, 1]

    # The loss logged at step 4 is the mean of the two other steps since the first.
    monkeypatch.undo()
    monkeypatch.chdir(place)
    spoil(monkeypatch, 3, float("nan"))
    train("each", **EACH, on_non_finite="skip", log_steps=1, optimizer__weight_decay=0.1)
    single = history(place / "each/checkpoint-5")
    assert len(single) == 4  # nothing is logged for the step left out
    assert history(out / "checkpoint-5")[1] == pytest.approx((single[1] + single[2]) / 2, rel=1e-6)
    assert result.train_loss > 0

    # The count goes on after a resume.
    monkeypatch.undo()
    monkeypatch.chdir(place)
    train(**EACH, on_non_finite="skip", log_steps=4, optimizer__weight_decay=0.1, max_steps=8,
          resume_from_checkpoint="auto")  # fmt: skip
    log = json.loads((out / "checkpoint-8/trainer_state.json").read_text())["log_history"]
    assert [entry["skipped_steps"] for entry in log if "loss" in entry and entry["step"] > 4] == [1]


def test_a_run_whose_every_step_is_bad_ends(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "IN_A_ROW", 3)
    real = DiffusionTrainer.compute_loss
    monkeypatch.setattr(
        DiffusionTrainer,
        "compute_loss",
        lambda self, *a, **k: real(self, *a, **k) * (float("nan") if self.state.global_step > 1 else 1),
    )
    with pytest.raises(UnmaskError, match=r"^step 5: .*3 steps in a row .*newest checkpoint is .*-4: go on"):
        train(**EACH, on_non_finite="skip", max_steps=20)


DRIVER = """
import sys
import torch
import unmask
from unmask.training.trainer import DiffusionTrainer

real = DiffusionTrainer.compute_loss

def compute(self, *args, **kwargs):
    loss = real(self, *args, **kwargs)
    bad = self.state.global_step == 2 and self.args.process_index == 1
    return loss * float("nan") if bad else loss

DiffusionTrainer.compute_loss = compute
unmask.train(unmask.load_recipe(sys.argv[1]))
"""


def test_two_processes_leave_a_step_out_together(place: Path) -> None:
    """The loss is no number on the second process alone."""
    tree = settings(**{**EACH, "on_non_finite": "skip", "data__eval_size": 5, "max_steps": 4})
    (place / "recipe.yaml").write_text(recipe_from_dict(tree).to_yaml(), encoding="utf-8")
    (place / "driver.py").write_text(DRIVER)
    launch = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2".split()
    done = subprocess.run(
        [*launch, "driver.py", "recipe.yaml"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 3: the loss is nan") == 1
    out = place / "out"
    assert_close(saved(out / "checkpoint-3"), saved(out / "checkpoint-2"), atol=0)
    [line] = (out / "non_finite.jsonl").read_text().splitlines()
    assert {batch["process"] for batch in json.loads(line)["micro_batches"]} == {1}

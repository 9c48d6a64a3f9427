"""A run watches itself: evaluations by source, early stopping, samples, and what it is made of."""

from __future__ import annotations

import gc
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_run import settings, write_data

import unmask
from unmask.errors import UnmaskError
from unmask.config import recipe_from_dict
from unmask.training import run
from unmask.training.trainer import DiffusionTrainer


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> Iterator[None]:
    """Trainer collects garbage as it starts, which takes 0.4 s for all that the libraries hold."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("unmask.training.accounting.measured_peak", lambda *_: 1e9)
    write_data(tmp_path)
    return tmp_path


def train(**changes: Any) -> tuple[Any, str]:
    console = Console(file=io.StringIO(), width=200, highlight=False)
    result = unmask.train(recipe_from_dict(settings(**changes)), console)
    return result, console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "trainer_state.json").read_text("utf-8"))


def split(place: Path) -> None:
    lines = (place / "data.jsonl").read_text("utf-8").splitlines(keepends=True)
    for name, part in (("train", lines[:15]), ("a", lines[15:20]), ("b", lines[20:])):
        (place / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")


def test_several_evaluation_files_are_told_apart(place: Path) -> None:
    split(place)
    changes: dict[str, Any] = {"data__dataset_name": "train.jsonl", "data__eval_size": 0, "save_steps": 5}
    names = ["a.jsonl", "b.jsonl"]
    _, said = train(out="both", data__eval_dataset_name=names, **changes)
    both = state(place / "both/checkpoint-5")["log_history"][0]
    alone = []
    for name in names:
        train(out=name[0], data__eval_dataset_name=name, **changes)
        alone.append(state(place / name[0] / "checkpoint-5")["log_history"][0]["eval_loss"])
        assert not any("eval_loss_a" in log for log in state(place / name[0] / "checkpoint-5")["log_history"])
    assert both["eval_loss_a.jsonl"] == pytest.approx(alone[0], rel=1e-5)
    assert min(alone) < both["eval_loss"] < max(alone)
    assert f"by source: a.jsonl {alone[0]:.4f}, b.jsonl " in said


@pytest.fixture
def worse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out losses as if: the lowest is that of step 2, until step 5."""
    losses = iter([9.0, 5.0, 4.0, 4.5, 4.1, 3.0, 2.0])  # before training, then at each step

    def evaluate(self: DiffusionTrainer, *_: Any, **__: Any) -> dict[str, float]:
        metrics = {"eval_loss": next(losses)}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    monkeypatch.setattr(DiffusionTrainer, "evaluate", evaluate)


@pytest.mark.usefixtures("worse")
def test_a_run_that_gets_worse_stops_and_leaves_its_best_weights(place: Path) -> None:
    changes = {"max_steps": 6, "eval_steps": 1, "save_steps": 1, "save_total_limit": 1}
    result, said = train(early_stopping_patience=2, **changes)
    assert "stopped early after step 4 of 6: 2 evaluations in a row without a lower held-out loss" in said
    assert "the result has the weights of step 2, of the lowest held-out loss: 4.0000 nats per token" in said
    assert result.held_out_loss == 4.0
    found = state(place / "out/checkpoint-4")
    assert (found["best_metric"], found["best_global_step"]) == (4.0, 2)
    best, last, final = (
        load_file(place / "out" / name / "model.safetensors")
        for name in ("checkpoint-2", "checkpoint-4", "final")
    )
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(final[name], best[name]) and not torch.equal(best[name], last[name])
    card = (place / "out/final/README.md").read_text("utf-8")
    assert "| held-out loss (nats per token) | 4.0000 |" in card
    assert "| lowest held-out loss | 4.0000 at step 2 |" in card


@pytest.mark.usefixtures("worse")
def test_without_early_stopping_the_last_weights_are_the_result(place: Path) -> None:
    _, said = train(eval_steps=1, save_steps=1, save_total_limit=1, max_steps=3)
    assert state(place / "out/checkpoint-3")["best_global_step"] == 2
    last, final = (
        load_file(place / "out" / name / "model.safetensors") for name in ("checkpoint-3", "final")
    )
    assert all(torch.equal(final[name], value) for name, value in last.items())
    assert "early" not in said and "the result has" not in said


@pytest.mark.parametrize("changes", [{"eval_steps": None}, {"save_steps": 2}, {"save_steps": None}], ids=str)
def test_early_stopping_needs_a_checkpoint_of_each_evaluation(changes: dict[str, Any]) -> None:
    given = {"eval_steps": 1, "save_steps": 1, **changes}
    with pytest.raises(UnmaskError, match="early_stopping_patience needs evaluations and a checkpoint"):
        recipe_from_dict(settings(early_stopping_patience=1, **given))


def test_samples_and_the_state_of_the_curriculum_are_logged(place: Path) -> None:
    lines = (place / "data.jsonl").read_text("utf-8").splitlines(keepends=True)
    (place / "held.jsonl").write_text("".join(lines[:4]), encoding="utf-8")
    train(
        evaluation__prompts="held.jsonl",
        evaluation__max_new_tokens=4,
        evaluation__show=2,
        eval_steps=2,
        save_steps=4,
        max_steps=4,
        model__prefix_probability=0.4,
        model__masking_scheduler={"schedule_type": "linear", "max_schedule_steps": 4},
        model__attention_annealing_steps=4,
    )
    written = [json.loads(line) for line in (place / "out/samples.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in written] == [0, 0, 2, 2, 4, 4]
    assert [line["prompt"] for line in written[:2]] == ["Say bee", "Say dog"]
    logs = [log for log in state(place / "out/checkpoint-4")["log_history"] if "loss" in log]
    assert [log["curriculum/future_share"] for log in logs] == [0, 0.25, 0.5, 0.75]
    expected = [0, 0.1, 0.2, 0.3]
    assert [log["curriculum/prefix_probability"] for log in logs] == pytest.approx(expected)
    assert not any("curriculum/truncate_probability" in log for log in logs)


def test_each_checkpoint_says_where_it_comes_from(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[DiffusionTrainer] = []
    real = DiffusionTrainer.__init__
    monkeypatch.setattr(
        run.DiffusionTrainer, "__init__", lambda self, **given: made.append(self) or real(self, **given)
    )
    train(save_steps=3)
    texts = [
        (place / "out" / folder / "provenance.json").read_text("utf-8")
        for folder in ("checkpoint-3", "final")
    ]
    assert texts[0] == texts[1]
    assert list(json.loads(texts[0])["data"]["data.jsonl"]["files"]) == ["data.jsonl"]
    card = (place / "out/final/README.md").read_text("utf-8")
    assert "| made with | unmask " in card and "| seed | 5 |" in card
    [trainer] = made
    assert f"{trainer.accounting.session.tokens_per_second:,.0f}" in card

from __future__ import annotations

import io
import math
import re
from pathlib import Path

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from unmask.training.callbacks import RATE, ConsoleProgress, LossCurve, NoiseCurve, draw_loss, draw_loss_by_t

PNG = b"\x89PNG\r\n\x1a\n"


def speak(main: bool = True, terminal: bool = False) -> tuple[ConsoleProgress, str]:
    """Take a progress through a short run; returns it and what it printed."""
    console = Console(file=io.StringIO(), width=100, highlight=False, force_terminal=terminal)
    progress = ConsoleProgress(console)
    args, control = TrainingArguments(report_to="none", use_cpu=True), TrainerControl()
    state = TrainerState(max_steps=200, is_world_process_zero=main)
    progress.on_train_begin(args, state, control)
    progress.on_log(args, state, control, {"eval_loss": 5.5})
    state.global_step = 7
    progress.on_step_end(args, state, control)
    logs = {"loss": 4.25, "learning_rate": 1e-3, "grad_norm": 1.0, RATE: 12345.6}
    progress.on_log(args, state, control, logs)
    progress.on_log(args, state, control, {"train_runtime": 3.0})  # the summary at the end: no line
    progress.on_log(args, state, control, None)
    progress.on_train_end(args, state, control)
    by_source = {"eval_loss_stderr": 0.5, "eval_loss_a.jsonl": 3.0, "eval_loss_b.jsonl": 5.0}
    progress.on_log(args, state, control, {"eval_loss": 4.0, **by_source})  # the evaluation after training
    return progress, console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("terminal", [False, True])
def test_losses_are_said_with_step_and_unit(terminal: bool) -> None:
    progress, said = speak(terminal=terminal)
    assert progress.progress is None  # the terminal is left in order
    lines = [re.sub(r"\x1b\[\w*?[A-Z]", "", line) for line in said.splitlines() if "nats" in line]
    assert [" ".join(line.split()[:-2]) for line in lines] == [
        "step 0/200 held-out loss 5.5000 nats per token",
        "step 7/200 loss 4.2500 nats per token learning rate 1.00e-03 12,346 tokens/s",
        "step 7/200 held-out loss 4.0000 nats per token",
    ]
    assert "  by source: a.jsonl 3.0000, b.jsonl 5.0000\n" in said.replace("\x1b[K", "")
    if not terminal:
        assert len(said.splitlines()) == 4 and "\x1b" not in said


def test_other_processes_are_silent() -> None:
    _, said = speak(main=False)
    assert said == ""


def test_closing_twice_or_before_the_start_is_harmless() -> None:
    progress = ConsoleProgress(Console(file=io.StringIO()))
    progress.close()
    progress.close()


@pytest.mark.parametrize(
    "history",
    [
        [],
        [{"step": 1, "loss": 5.0}],
        [{"step": 0, "eval_loss": 5.0}, {"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.0}],
        [{"step": 1, "loss": math.nan}, {"step": 2, "loss": math.inf}, {"step": 3, "loss": 1.0}],
    ],
)
def test_the_loss_curve_is_a_picture(tmp_path: Path, history: list[dict[str, float]]) -> None:
    draw_loss(history, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)


def test_the_curve_holds_what_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.axes

    drawn: dict[str, tuple[list[float], list[float]]] = {}
    plot = matplotlib.axes.Axes.plot

    def recorded(self: object, x: list[float], y: list[float], *args: object, **kwargs: object) -> object:
        drawn[str(kwargs["label"])] = (list(x), list(y))
        return plot(self, x, y, *args, **kwargs)  # pyright: ignore

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", recorded)
    history = [
        {"step": 0, "eval_loss": 6.0},
        {"step": 1, "loss": 5.0},
        {"step": 2, "loss": 4.0},
        {"step": 2, "eval_loss": 4.5},
        {"step": 2, "train_loss": 4.5},
    ]
    draw_loss(history, tmp_path / "loss.png")
    assert drawn == {
        "training, nats per token": ([1, 2], [5.0, 4.0]),
        "held out, nats per token": ([0, 2], [6.0, 4.5]),
    }
    drawn.clear()
    draw_loss(history, tmp_path / "loss.png", "by preset coda")  # only the held-out loss stays in nats
    assert list(drawn) == ["training, by preset coda", "held out, nats per token"]


def test_the_curve_is_drawn_by_the_main_process_alone(tmp_path: Path) -> None:
    args, control = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True), TrainerControl()
    LossCurve().on_train_end(args, TrainerState(is_world_process_zero=False), control)
    assert not (tmp_path / "loss.png").exists()
    LossCurve().on_evaluate(args, TrainerState(is_world_process_zero=True), control)
    assert (tmp_path / "loss.png").exists()


def test_the_loss_by_noise_level_shows_the_first_and_the_last_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib.axes

    drawn: dict[str, tuple[list[float], list[float]]] = {}
    plot = matplotlib.axes.Axes.plot

    def recorded(self: object, x: list[float], y: list[float], *args: object, **kwargs: object) -> object:
        drawn[str(kwargs["label"])] = (list(x), list(y))
        return plot(self, x, y, *args, **kwargs)  # pyright: ignore

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", recorded)
    history = [
        {"step": 0, "eval_loss": 6.0, "eval_by_t/0.95": 5.9, "eval_by_t/0.05": 5.0},
        {"step": 500, "loss": 4.0},
        {"step": 500, "eval_loss": 4.0, "eval_by_t/0.05": 3.0, "eval_by_t/0.95": 4.9},
        {"step": 1000, "eval_loss": 3.0, "eval_by_t/0.05": 1.0, "eval_by_t/0.95": 4.5},
    ]
    draw_loss_by_t(history, tmp_path / "loss_by_t.png")
    assert (tmp_path / "loss_by_t.png").read_bytes().startswith(PNG)
    assert drawn == {"step 0": ([0.05, 0.95], [5.0, 5.9]), "step 1,000": ([0.05, 0.95], [1.0, 4.5])}
    drawn.clear()
    draw_loss_by_t(history[:2], tmp_path / "one.png")
    assert list(drawn) == ["step 0"]
    args, control = TrainingArguments(str(tmp_path / "run"), report_to="none", use_cpu=True), TrainerControl()
    (tmp_path / "run").mkdir()
    NoiseCurve().on_evaluate(args, TrainerState(is_world_process_zero=False, log_history=history), control)
    assert not (tmp_path / "run" / "loss_by_t.png").exists()
    NoiseCurve().on_evaluate(args, TrainerState(is_world_process_zero=True, log_history=history), control)
    assert (tmp_path / "run" / "loss_by_t.png").exists()

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from unmask.training.callbacks import RATE, ConsoleProgress, LossCurve, NoiseCurve


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


def test_the_curves_are_drawn_by_the_main_process_alone(tmp_path: Path) -> None:
    args, control = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True), TrainerControl()
    history = [{"step": 0, "eval_loss": 6.0, "eval_by_t/0.95": 5.9}]
    for main in (False, True):
        state = TrainerState(is_world_process_zero=main, log_history=history)
        LossCurve().on_evaluate(args, state, control)
        NoiseCurve().on_evaluate(args, state, control)
        assert {file.name for file in tmp_path.iterdir()} == (
            {"loss.png", "loss_by_t.png"} if main else set()
        )

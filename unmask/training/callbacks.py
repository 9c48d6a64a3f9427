"""What a person sees of a run: a progress line with the loss, and the loss curve as a picture."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from unmask.plots import draw_losses, draw_noise_levels

SHARE = "share/"  # before the name of a source whose share of the tokens is logged
RATE = "supervised_tokens_per_second"
STDERR = "eval_loss_stderr"
BY_T = "by_t/"  # after "eval_", before the middle of a range of t: a loss by noise level


class ConsoleProgress(TrainerCallback):
    """A progress bar, and above it one line for each logged loss.

    Args:
        unit: of the training loss; the held-out loss is always in nats per token.
    """

    def __init__(self, console: Console, unit: str = "nats per token"):
        self.console = console
        self.unit = unit
        self.progress: Progress | None = None
        self.started = time.monotonic()
        self.leading = False  # whether this process is the one that speaks

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self.started = time.monotonic()
        self.leading = True
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task("training", total=state.max_steps, completed=state.global_step)
        self.progress.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not self.leading or not logs:
            return
        step = f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
        seconds = f"{time.monotonic() - self.started:6.0f} s"
        if "eval_loss" in logs:
            self.console.print(f"{step}  held-out loss {logs['eval_loss']:.4f} nats per token  {seconds}")
            by_source = [(name, logs[name]) for name in logs if name.startswith("eval_loss_")]
            sources = [(name.removeprefix("eval_loss_"), x) for name, x in by_source if name != STDERR]
            if sources:
                said = ", ".join(f"{name} {loss:.4f}" for name, loss in sources)
                self.console.print(f"  by source: {said}", highlight=False, markup=False)
        elif "loss" in logs:
            self.console.print(
                f"{step}  loss {float(logs['loss']):.4f} {self.unit}"
                f"  learning rate {float(logs['learning_rate']):.2e}{_rate(logs)}{seconds}",
                highlight=False,
            )
            shares = [(name.removeprefix(SHARE), logs[name]) for name in logs if name.startswith(SHARE)]
            if shares:
                said = ", ".join(f"{name} {share:.1%}" for name, share in shares)
                self.console.print(f"  tokens so far: {said}", highlight=False, markup=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal in order, also after a failure."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


class AtStart(TrainerCallback):
    """Do something once the model is on its devices, before the first step, and keep what comes of it."""

    def __init__(self, act: Callable[[], Any]):
        self.act = act
        self.result: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.result = self.act()


def _rate(logs: dict[str, float]) -> str:
    return f"{logs[RATE]:8,.0f} tokens/s" if RATE in logs else ""


class LossCurve(TrainerCallback):
    """Draw `loss.png` into the run's folder at every evaluation and at the end.

    Args:
        unit: of the training loss; the held-out loss is always in nats per token.
    """

    def __init__(self, unit: str = "nats per token"):
        self.unit = unit

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.on_train_end(args, state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero and args.output_dir is not None:
            draw_losses(state.log_history, Path(args.output_dir) / "loss.png", self.unit)


class NoiseCurve(TrainerCallback):
    """Draw `loss_by_t.png` into the run's folder at every evaluation: the first one and the newest."""

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero and args.output_dir is not None:
            draw_noise_levels(state.log_history, Path(args.output_dir) / "loss_by_t.png")

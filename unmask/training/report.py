"""What a run prints, draws and sends to trackers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from unmask.config import Recipe
from unmask.errors import UnmaskError
from unmask.io import reason
from unmask.model.checkpoint import is_diffusion, read_config
from unmask.plots import draw_losses, draw_noise_levels
from unmask.training.parallel import Processes, batch_plan

TRACKERS = ("tensorboard", "wandb", "mlflow", "comet_ml")
SHARE = "share/"  # before the name of a source whose share of the tokens is logged
RATE = "supervised_tokens_per_second"
STDERR = "eval_loss_stderr"


class Report:
    """A progress bar, a line for each logged loss, pictures, and trackers; silent on all but one process.

    Args:
        unit: of the training loss; the held-out loss is always in nats per token.
    """

    def __init__(self, console: Console, recipe: Recipe, unit: str, out: Path, group: Processes):
        self.console, self.recipe, self.unit, self.out, self.main = console, recipe, unit, out, group.main
        self.started = time.monotonic()
        self.trackers = make_trackers(recipe, out) if group.main else []
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (group.main and console.is_terminal),
        )

    def begin(self, step: int) -> None:
        """Start the clock and the progress bar."""
        self.started = time.monotonic()
        self.task = self.progress.add_task("training", total=self.recipe.max_steps, completed=step)
        self.progress.start()

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        self.progress.update(self.task, completed=step)

    def log(self, logs: dict[str, float]) -> None:
        """Show one entry of the history."""
        if not self.main:
            return
        step, last = int(logs["step"]), self.recipe.max_steps
        start = f"step {step:>{len(str(last))}}/{last}"
        seconds = f"{time.monotonic() - self.started:6.0f} s"
        if "eval_loss" in logs:
            self._say(f"{start}  held-out loss {logs['eval_loss']:.4f} nats per token  {seconds}")
            names = [name for name in logs if name.startswith("eval_loss_") and name != STDERR]
            if names:
                losses = (f"{name.removeprefix('eval_loss_')} {logs[name]:.4f}" for name in names)
                self._say(f"  by source: {', '.join(losses)}")
        else:
            rate = f"{logs[RATE]:8,.0f} tokens/s" if RATE in logs else ""
            self._say(
                f"{start}  loss {logs['loss']:.4f} {self.unit}"
                f"  learning rate {logs['learning_rate']:.2e}{rate}{seconds}"
            )
            names = [name for name in logs if name.startswith(SHARE)]
            if names:
                shares = (f"{name.removeprefix(SHARE)} {logs[name]:.1%}" for name in names)
                self._say(f"  tokens so far: {', '.join(shares)}")
        for tracker in self.trackers:
            tracker.log({name: value for name, value in logs.items() if name != "step"}, step=step)

    def draw(self, history: list[dict[str, float]]) -> None:
        """Draw `loss.png` and `loss_by_t.png`."""
        if self.main:
            draw_losses(history, self.out / "loss.png", self.unit)
            if any("eval_loss" in log for log in history):
                draw_noise_levels(history, self.out / "loss_by_t.png")

    def samples(self, texts: list[tuple[str, str]], step: int) -> None:
        """Show sampled answers in TensorBoard."""
        for tracker in self.trackers:
            if tracker.name == "tensorboard":
                for number, pair in enumerate(texts, 1):
                    text = "\n\n".join(_as_code(part) for part in pair)
                    tracker.writer.add_text(f"samples/{number}", text, step)

    def close(self) -> None:
        """Leave the terminal in order, also after a failure."""
        self.progress.stop()
        for tracker in self.trackers:
            tracker.finish()
        self.trackers = []

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)


def make_trackers(recipe: Recipe, out: Path) -> list[Any]:
    """Make the trackers of `report_to`, which accelerate drives.

    Raises:
        UnmaskError: an unknown one, or one that is not installed.
    """
    if not recipe.report_to:
        return []
    from accelerate import tracking

    classes: dict[str, Any] = {
        "tensorboard": tracking.TensorBoardTracker,
        "wandb": tracking.WandBTracker,
        "mlflow": tracking.MLflowTracker,
        "comet_ml": tracking.CometMLTracker,
    }
    made = []
    for name in recipe.report_to:
        if name not in classes:
            raise UnmaskError(f"report_to: {name!r} is not known; choose from {', '.join(classes)}.")
        try:
            where = {"logging_dir": str(out)} if name == "tensorboard" else {}
            tracker = classes[name]("tensorboard" if where else out.name, **where)
            if hasattr(tracker, "start"):
                tracker.start()
            made.append(tracker)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            raise UnmaskError(
                f"report_to: {name}: {reason(error)}; install it, or take it out of the list."
            ) from error
    return made


def _as_code(text: str) -> str:
    """Text as Markdown that shows it as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])


def describe_run(recipe: Recipe, model: Any, data: Any, group: Processes) -> list[str]:
    """Say what is going to run, a line each."""
    tokens, supervised = data.totals()
    name = recipe.model.name_or_path
    lines = [
        f"{model_name(model)} from {name or 'random weights'}: {model.num_parameters():,} parameters, logit"
        f" shift {'on' if model.config.logit_shift else 'off'}, {attention_name(model.config)} attention,"
        f" {group.device}, {recipe.precision}"
    ]
    if (summary := trainable_summary(model, recipe)) is not None:
        lines.append(f"trainable: {summary}")
    if recipe.model.freeze_embeddings and (name is None or not is_diffusion(read_config(name))):
        lines.append("note: these weights have never seen the mask token, and its embedding is frozen too")
    what = "stream, the beginning of each source" if recipe.data.streaming else "data"
    lines.append(
        f"{what}: {len(data.train):,} examples, {tokens:,} tokens, {supervised / max(1, tokens):.0%}"
        f" supervised, {len(data.held_out):,} held out"
    )
    if data.row_length is not None:
        filled = tokens / (data.row_length * max(1, len(data.rows)))
        lines.append(
            f"packing: {len(data.rows):,} rows of at most {data.row_length:,} tokens, {filled:.1%} of their"
            f" positions filled, {len(data.train) / max(1, len(data.rows)):.3g} sequences a row"
        )
    if data.report is not None:
        formats = ", ".join(f"{kind} ({count:,})" for kind, count in data.report.formats.items())
        lines.append(f"format: {formats or 'text'}; truncated {data.report.truncated:,}")
    lines += data.left_out()
    micro, accumulation = batch_plan(recipe, group.ranks)
    epochs = f", {recipe.max_steps * recipe.global_batch_size / max(1, len(data.rows)):.3g} epochs"
    if recipe.data.streaming or recipe.data.sources is not None:
        count = len(recipe.data.sources or [1])
        epochs = f", {count} sources by weight" if count > 1 else ""
    lines.append(
        f"{recipe.max_steps:,} steps of {recipe.global_batch_size}"
        f" {'sequences' if data.row_length is None else 'rows'} ({micro} x {accumulation} x {group.ranks}){epochs}"
    )
    return lines


def attention_name(config: Any) -> str:
    """Name a model's attention."""
    if config.attention == "block_causal":
        return f"block-causal (blocks of {config.block_length} tokens)"
    return "bidirectional"


def model_name(model: Any) -> str:
    """The class of a model, also of one inside peft's."""
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__


def trainable_summary(model: Any, recipe: Recipe) -> str | None:
    """Say which part of the model is trained; None where all of it is."""
    if recipe.lora.r is not None:
        what = f"{'DoRA' if recipe.lora.use_dora else 'LoRA'} adapters of rank {recipe.lora.r}"
    elif recipe.model.freeze_embeddings:
        what = "all but the embeddings"
    else:
        return None
    trained = sum(weights.numel() for weights in model.parameters() if weights.requires_grad)
    return f"{what}, {trained:,} parameters"

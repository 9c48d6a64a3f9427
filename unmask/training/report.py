"""What a run prints, draws and sends to trackers."""

from __future__ import annotations

import time
from pathlib import Path
from textwrap import indent
from typing import Any

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from rich.console import Console

from unmask.config import Recipe
from unmask.errors import UnmaskError
from unmask.io import reason
from unmask.model.checkpoint import is_diffusion, read_config
from unmask.model.config import describe_attention
from unmask.plots import draw_losses, draw_noise_levels
from unmask.progress import Bar
from unmask.training.build import loss_unit
from unmask.training.parallel import Processes, batch_plan

SHARE = "share/"  # before the name of a source whose share of the tokens is logged


class Report:
    """A progress bar, a line for each logged loss, pictures, and trackers; silent on all but one process."""

    def __init__(self, console: Console, recipe: Recipe, out: Path, group: Processes):
        self.console, self.recipe, self.out, self.main = console, recipe, out, group.main
        self.unit = loss_unit(recipe)
        self.trackers: list[Any] = []
        self.started = time.monotonic()
        self.bar: Bar | None = None

    def open(self) -> None:
        """Start the trackers."""
        self.trackers += [_tracker(name, self.out) for name in self.recipe.report_to] if self.main else []

    def begin(self, step: int) -> None:
        """Start the progress bar."""
        self.bar = Bar(
            "training", self.recipe.max_steps, "steps", completed=step, console=self.console
        ).start()

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        if self.bar is not None:
            self.bar.update(step)

    def end(self) -> None:
        """Remove the progress bar."""
        if self.bar is not None:
            self.bar.stop()
        self.bar = None

    def say(self, line: str) -> None:
        """Print a line."""
        self.console.print(line, highlight=False, markup=False)

    def log(self, logs: dict[str, float]) -> None:
        """Show one entry of the history: losses in nats per token, or in the unit of the recipe's preset."""
        step, last = int(logs["step"]), self.recipe.max_steps
        start, seconds = f"step {step:>{len(str(last))}}/{last}", f"{time.monotonic() - self.started:6.0f} s"
        if "eval_loss" in logs:
            self.say(f"{start}  held-out loss {logs['eval_loss']:.4f} nats per token  {seconds}")
            named = {name: f"{loss:.4f}" for name, loss in _after("eval_loss_", logs) if name != "stderr"}
        else:
            rate = f"{logs['supervised_tokens_per_second']:8,.0f} tokens/s"
            self.say(
                f"{start}  loss {logs['loss']:.4f} {self.unit}"
                f"  learning rate {logs['learning_rate']:.2e}{rate}{seconds}"
            )
            named = {name: f"{share:.1%}" for name, share in _after(SHARE, logs)}
        if named:
            what = "by source" if "eval_loss" in logs else "tokens so far"
            self.say(f"  {what}: {', '.join(f'{name} {value}' for name, value in named.items())}")
        for tracker in self.trackers:
            tracker.log({name: value for name, value in logs.items() if name != "step"}, step=step)

    def draw(self, history: list[dict[str, float]]) -> None:
        """Draw `loss.png` and `loss_by_t.png`."""
        if self.main:
            draw_losses(history, self.out / "loss.png", self.unit)
            if any("eval_loss" in log for log in history):
                draw_noise_levels(history, self.out / "loss_by_t.png")

    def samples(self, texts: list[tuple[str, str]], step: int) -> None:
        """Show sampled prompts and answers in TensorBoard, as Markdown that shows them as they are."""
        for tracker in self.trackers:
            if tracker.name == "tensorboard":
                for number, pair in enumerate(texts, 1):
                    tracker.log(
                        {f"samples/{number}": "\n\n".join(indent(t, "    ") for t in pair)}, step=step
                    )

    def close(self) -> None:
        """Leave the terminal in order, also after a failure."""
        self.end()
        for tracker in self.trackers:
            tracker.finish()
        self.trackers = []


def _tracker(name: str, out: Path) -> Any:
    """Start one of accelerate's trackers."""
    if name not in LOGGER_TYPE_TO_CLASS:
        raise UnmaskError(f"report_to: {name!r} is not known; choose from {', '.join(LOGGER_TYPE_TO_CLASS)}.")
    tracker_class: Any = LOGGER_TYPE_TO_CLASS[name]
    folder = {"logging_dir": str(out)} if tracker_class.requires_logging_directory else {}
    try:
        tracker = tracker_class("tensorboard" if name == "tensorboard" else out.name, **folder)
        tracker.start()
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise UnmaskError(
            f"report_to: {name}: {reason(error)}; install it, or remove it from the list."
        ) from error
    return tracker


def _after(prefix: str, logs: dict[str, float]) -> list[tuple[str, float]]:
    """The entries whose name begins with a prefix, without it."""
    return [(name.removeprefix(prefix), v) for name, v in logs.items() if name.startswith(prefix)]


def _threads(group: Processes) -> str:
    """How many threads torch computes with on a CPU: too many for its free cores make a run slow."""
    threads = torch.get_num_threads()
    return f", {threads} thread{'s' * (threads > 1)}" if group.device.type == "cpu" else ""


def run_facts(recipe: Recipe, model: Any, data: Any, group: Processes) -> dict[str, str]:
    """Say what is going to run, by name: printed at the start, and in the model card."""
    config, name, (tokens, supervised) = model.config, recipe.model.name_or_path, data.totals()
    network = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    is_base = name is not None and not is_diffusion(read_config(name))
    converted = " (an autoregressive checkpoint, converted)" if is_base else ""
    facts = {
        "model": f"{network} from {name or 'random weights'}{converted}: {model.num_parameters():,} parameters,"
        f" {describe_attention(config)}",
        "computed on": f"{group.ranks} x {group.device}, {recipe.precision}{_threads(group)}",
    }
    part = "all but the embeddings" if recipe.model.freeze_embeddings else ""
    if recipe.lora.r is not None:
        part = f"{'DoRA' if recipe.lora.use_dora else 'LoRA'} adapters of rank {recipe.lora.r}"
    if part:
        trained = sum(weights.numel() for weights in model.parameters() if weights.requires_grad)
        facts["trained"] = f"{part}, {trained:,} parameters"
    if recipe.model.freeze_embeddings and (name is None or is_base):
        facts["note"] = "these weights have never seen the mask token, and its embedding is frozen too"
    rows, what = max(1, len(data.rows)), "stream, its beginning" if recipe.data.streaming else "data"
    facts[what] = (
        f"{len(data.train):,} examples, {tokens:,} tokens, {supervised / max(1, tokens):.0%} supervised,"
        f" {len(data.held_out):,} held out"
    )
    if data.row_length is not None:
        facts["packing"] = (
            f"{rows:,} rows of at most {data.row_length:,} tokens, {tokens / (data.row_length * rows):.1%} of"
            f" their positions filled, {len(data.train) / rows:.3g} sequences a row"
        )
    if data.report is not None:
        formats = ", ".join(f"{kind} ({count:,})" for kind, count in data.report.formats.items())
        facts["format"] = f"{formats or 'text'}; truncated {data.report.truncated:,}"
    if left_out := data.left_out():
        facts["left out"] = "; ".join(left_out)
    micro, accumulation = batch_plan(recipe, group.ranks)
    shared = f"{micro} x {accumulation} x {group.ranks}"
    if data.step_rows < recipe.global_batch_size:
        shared = f"all there are, fewer than global_batch_size = {recipe.global_batch_size}"
    epochs = "" if recipe.data.streaming else f", {recipe.max_steps * data.step_rows / rows:.3g} epochs"
    if recipe.data.sources:
        epochs = f", {len(recipe.data.sources)} sources by weight"
    unit = "sequences" if data.row_length is None else "rows"
    facts["steps"] = f"{recipe.max_steps:,} of {data.step_rows} {unit} ({shared}){epochs}"
    return facts

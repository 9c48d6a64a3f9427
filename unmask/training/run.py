"""One recipe -> one trained checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from transformers import TrainerState
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback

from unmask.data.collate import collate
from unmask.data.encode import Encoder
from unmask.data.hub import first_line
from unmask.data.sources import read_records
from unmask.errors import UnmaskError
from unmask.evaluation.exact_match import Prompt, exact_share, make_prompts
from unmask.model.checkpoint import save_checkpoint, written_aside
from unmask.recipe import Recipe
from unmask.training.arguments import training_arguments
from unmask.training.build import build_model
from unmask.training.callbacks import ConsoleProgress, LossCurve
from unmask.training.card import write_card
from unmask.training.dataset import ExampleDataset, custom_fields, load_data, run_tokenizer
from unmask.training.report import answer_prompts, say_what_runs, show_answers, stream_lines
from unmask.training.resume import FINAL, resume_point, say_what_changed, steps_done
from unmask.training.schedule import (
    check_block_sizes,
    loss_unit,
    make_curriculum,
    schedule_notes,
)
from unmask.training.trainer import DiffusionTrainer

_TENSORBOARD = "TENSORBOARD_LOGGING_DIR"


@dataclass
class TrainResult:
    """What a run came to: losses in nats per supervised token, exact match (before, after) as shares."""

    checkpoint: Path
    train_loss: float
    held_out_loss: float | None
    exact_match: tuple[float, float] | None


def train(recipe: Recipe, console: Console | None = None) -> TrainResult:
    """Run a recipe: encode the data, train, evaluate, and leave a checkpoint.

    Everything that can be wrong with the input is found before the first step. The folder
    `checkpoint_save_dir` then holds `final/` (the model, its tokenizer, a model card), `loss.png`,
    `recipe.yaml`, and the intermediate checkpoints.

    Args:
        recipe: see `unmask.load_recipe`.
        console: where progress is shown; the terminal by default.

    Raises:
        UnmaskError: the recipe, the data or the model cannot be used, or a checkpoint cannot be written.
    """
    out = Path(recipe.checkpoint_save_dir)
    resume = resume_point(recipe, out)
    args = training_arguments(recipe, eval_on_start=resume is None)
    _check_trackers(args.report_to or [])
    console = console or Console(highlight=False, soft_wrap=True)
    if args.process_index != 0:
        console = Console(quiet=True)

    tokenizer = run_tokenizer(recipe)
    data = load_data(recipe, tokenizer)
    check_block_sizes(recipe, data.train)
    prompts = _exact_match_prompts(recipe, data.encoder)
    torch.manual_seed(recipe.seed)
    model = build_model(recipe, tokenizer, data.encoder)
    if prompts:  # the canvas a model is measured on is the one it is used with, unless told otherwise
        cast(Any, model.generation_config).set(max_new_tokens=recipe.evaluation.max_new_tokens)
    say_what_runs(console, recipe, model, data, args)
    for note in schedule_notes(recipe, data.rows, model.config.block_length):
        console.print(note)

    progress = ConsoleProgress(console, loss_unit(recipe))
    with _tensorboard_folder(out / "tensorboard"):
        trainer = DiffusionTrainer(
            model=model,
            args=args,
            training_mode=recipe.training_mode,
            curriculum=make_curriculum(recipe),
            time_sampling=recipe.model.time_sampling,
            train_dataset=cast(Any, data.stream or ExampleDataset(data.rows)),
            eval_dataset=ExampleDataset(data.held_out_rows) if data.held_out else None,
            data_collator=partial(collate, pad_token_id=cast(int, tokenizer.pad_token_id)),
            processing_class=tokenizer,
            callbacks=[progress, LossCurve(loss_unit(recipe))],
        )
    trainer.remove_callback(PrinterCallback)
    main = trainer.is_world_process_zero()
    answer = partial(answer_prompts, model, tokenizer, recipe, prompts, console)
    before = answer("before training") if main and prompts else None
    if main:
        if resume is not None:
            say_what_changed(console, recipe, out / "recipe.yaml")
        _write(out / "recipe.yaml", recipe.to_yaml())
    trainer.accelerator.wait_for_everyone()
    try:
        metrics = _train_or_load(trainer, resume)
    finally:
        progress.close()
    left_out = trainer.left_out()
    for line in stream_lines(trainer.source_counts(), left_out, data, trainer.state):
        console.print(line, markup=False)
    held_out = _held_out_loss(trainer) if data.held_out else None
    # Of a resumed run Trainer's own mean covers the steps of this session alone.
    train_loss = metrics["train_loss"] if resume is None else _mean_loss(trainer.state.log_history)

    shares = None
    if main:
        after = answer("after training") if prompts else None
        if before is not None and after is not None:
            shares = exact_share(before, prompts), exact_share(after, prompts)
        with written_aside(out / FINAL) as aside:
            save_checkpoint(model, tokenizer, aside)
            write_card(
                aside,
                out / FINAL,
                recipe,
                model,
                trainer.state,
                {**metrics, "train_loss": train_loss},
                data,
                held_out,
                shares,
                data.left_out(left_out if recipe.data.streaming else None),
            )
        if after is not None:
            show_answers(console, tokenizer, prompts, after, recipe.evaluation.show)
        console.print(f"checkpoint: {out / FINAL}   loss curve: {out / 'loss.png'}")
        if shares is not None:
            before_after = f"before {shares[0]:.1%}, after {shares[1]:.1%}"
            console.print(f"exact match: {before_after} on {len(prompts)} held-out prompts")
    trainer.accelerator.wait_for_everyone()
    return TrainResult(out / FINAL, train_loss, held_out, shares)


@contextmanager
def _tensorboard_folder(folder: Path) -> Iterator[None]:
    """Tell Trainer where to log to TensorBoard, unless the user has: it listens to the environment alone."""
    if _TENSORBOARD in os.environ:
        yield
        return
    os.environ[_TENSORBOARD] = str(folder)
    try:
        yield
    finally:
        del os.environ[_TENSORBOARD]  # or the next run of this process would log into this folder too


def _check_trackers(names: str | list[str]) -> None:
    """Find out before the data is read whether each tracker is known and installed."""
    try:
        for tracker in get_reporting_integration_callbacks(names):
            tracker()
    except (ValueError, RuntimeError, ImportError) as error:
        raise UnmaskError(f"report_to: {first_line(error, 250)}.") from error


def _exact_match_prompts(recipe: Recipe, encoder: Encoder | None) -> list[Prompt]:
    if recipe.evaluation.prompts is None:
        return []
    assert encoder is not None  # the recipe allows prompts in sft alone
    records = read_records(recipe.evaluation.prompts, limit=recipe.evaluation.limit)
    return make_prompts(records, encoder, recipe.data.sft.format, custom_fields(recipe))


def _train_or_load(trainer: DiffusionTrainer, resume: str | None) -> dict[str, float]:
    """Train to the end, and return Trainer's metrics; a checkpoint that is there already is only loaded,
    since Trainer would take one more step."""
    if resume is None or steps_done(resume) < trainer.args.max_steps:
        return trainer.train(resume_from_checkpoint=resume).metrics
    trainer._load_from_checkpoint(resume)
    trainer.state = TrainerState.load_from_json(str(Path(resume) / "trainer_state.json"))
    return {}


def _held_out_loss(trainer: DiffusionTrainer) -> float:
    """The held-out loss of the final weights, evaluated once."""
    losses = [log for log in trainer.state.log_history if "eval_loss" in log]
    if losses and losses[-1]["step"] == trainer.state.global_step:
        return losses[-1]["eval_loss"]
    return trainer.evaluate()["eval_loss"]


def _mean_loss(log_history: list[dict[str, float]]) -> float:
    """The mean over the logged steps; each entry is the mean since the one before."""
    total, last = 0.0, 0.0
    for log in log_history:
        if "loss" in log:
            total += log["loss"] * (log["step"] - last)
            last = log["step"]
    return total / last if last else float("nan")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UnmaskError(f"{path}: could not be written: {error.strerror}.") from error

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
from transformers import TrainingArguments
from transformers.integrations.integration_utils import (
    TensorBoardCallback,
    get_reporting_integration_callbacks,
)
from transformers.trainer_callback import EarlyStoppingCallback, PrinterCallback

from unmask.data.collate import collate
from unmask.data.encode import Encoder
from unmask.data.hub import first_line
from unmask.io import directory_lock as alone
from unmask.data.files import read_records
from unmask.errors import UnmaskError
from unmask.evaluation.exact_match import Prompt, exact_share, make_prompts
from unmask.model.checkpoint import save_checkpoint, written_aside
from unmask.recipe import Recipe
from unmask.training.arguments import training_arguments
from unmask.training.build import build_model
from unmask.training.callbacks import AtStart, ConsoleProgress, LossCurve, NoiseCurve
from unmask.training.card import write_card
from unmask.training.checkpoints import remove_partial
from unmask.training.dataset import ExampleDataset, custom_fields, load_data, run_tokenizer
from unmask.training.failure import said_plainly
from unmask.training.guard import StepGuard
from unmask.training.memory import memory_lines
from unmask.training.parallel import check_enough, divide, whole_weights
from unmask.training.provenance import Provenance
from unmask.training.report import (
    answer_prompts,
    best_lines,
    say_what_runs,
    show_answers,
    shown,
    stream_lines,
    write,
)
from unmask.training.resume import FINAL, RecipeFile, check_fits, on_main, resume_point, steps_done
from unmask.training.samples import Samples
from unmask.training.schedule import (
    check_block_sizes,
    loss_unit,
    make_curriculum,
    schedule_notes,
)
from unmask.training.stop import StopSignals, leave
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
    with StopSignals() as signals:
        return _train(recipe, console or Console(highlight=False, soft_wrap=True), signals)


def _train(recipe: Recipe, console: Console, signals: StopSignals) -> TrainResult:
    out = Path(recipe.checkpoint_save_dir)
    args = training_arguments(recipe)
    if args.process_index != 0:
        return _train_in(out, recipe, args, Console(quiet=True), signals)
    with alone(out, "training"):
        return _train_in(out, recipe, args, console, signals)


def _train_in(
    out: Path, recipe: Recipe, args: TrainingArguments, console: Console, signals: StopSignals
) -> TrainResult:
    resume, notes = on_main(partial(resume_point, recipe, out), args.process_index == 0, args.world_size)
    args.eval_on_start = args.eval_on_start and resume is None
    _check_trackers(args.report_to or [])
    for note in notes:
        console.print(note, markup=False)

    tokenizer = run_tokenizer(recipe)
    data = load_data(recipe, tokenizer)
    check_block_sizes(recipe, data.train)
    if data.stream is None:
        check_enough(len(data.rows), args.world_size)
    prompts = _exact_match_prompts(recipe, data.encoder)
    torch.manual_seed(recipe.seed)
    model = build_model(recipe, tokenizer, data.encoder)
    if prompts:  # the canvas a model is measured on is the one it is used with, unless told otherwise
        cast(Any, model.generation_config).set(max_new_tokens=recipe.evaluation.max_new_tokens)
    say_what_runs(console, recipe, model, data, args)
    row_length = data.row_length or recipe.data.block_size
    for line in memory_lines(recipe, model, args.device, args.world_size, row_length):
        console.print(line)
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
            eval_sources=data.held_out_sources,
            train_dataset=cast(Any, data.stream or ExampleDataset(data.rows)),
            eval_dataset=ExampleDataset(data.held_out_rows) if data.held_out else None,
            data_collator=partial(collate, pad_token_id=cast(int, tokenizer.pad_token_id)),
            processing_class=tokenizer,
            muon=recipe.optimizer.type == "muon",
            ema_decay=recipe.ema.decay,
            callbacks=[progress, LossCurve(loss_unit(recipe)), NoiseCurve()],
        )
    trainer.remove_callback(PrinterCallback)
    main = trainer.is_world_process_zero()
    answer = partial(answer_prompts, model, tokenizer, recipe, prompts, console)
    # Of a divided model every process has to answer, and none can before training has divided it.
    divided = trainer.is_fsdp_enabled
    before = answer("before training") if main and prompts and not divided else None
    at_start = AtStart(lambda: answer("before training"))
    if prompts and divided and resume is None:
        trainer.add_callback(at_start)
    if few := shown(prompts, recipe.evaluation.show):
        written = [cb for cb in trainer.callback_handler.callbacks if isinstance(cb, TensorBoardCallback)]
        generate = partial(write, model, tokenizer, recipe)
        trainer.add_callback(Samples(few, generate, divided, written[0] if written else None))
    if recipe.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(recipe.early_stopping_patience))
    provenance = Provenance(recipe, tokenizer, str(args.device), args.world_size, main)
    if resume is not None:
        check_fits(resume, model, tokenizer)
    if main:
        remove_partial(out)
        _write(out / "recipe.yaml", recipe.to_yaml())
    trainer.accelerator.wait_for_everyone()
    guard = StepGuard(trainer, signals, console, recipe.on_non_finite)
    trainer.add_callback(guard)
    trainer.also_saved += [guard, RecipeFile(recipe, main), provenance]
    try:
        with said_plainly(out):
            metrics = _train_or_load(trainer, resume)
    finally:
        progress.close()
    if guard.stopped:
        console.print(
            f"stopped after step {trainer.state.global_step}; go on with resume_from_checkpoint=auto",
            markup=False,
        )
        leave(guard.stopped)
    if trainer.average is not None:
        trainer.average.settle()  # from here on the weights are the average
    # The rest is short work on what is trained; without a checkpoint of it, it would be lost.
    signals.at_once = recipe.save_steps is not None
    left_out = trainer.left_out()
    for line in stream_lines(trainer.source_counts(), left_out, data, trainer.state, trainer.data_ended):
        console.print(line, markup=False)
    for line in best_lines(trainer.state, recipe.early_stopping_patience):
        console.print(line, markup=False)
    held_out = _held_out_loss(trainer) if data.held_out else None
    trainer.accounting.report()
    for line in trainer.accounting.session.lines():
        console.print(line, markup=False)
    # Of a resumed run Trainer's own mean covers the steps of this session alone.
    train_loss = metrics["train_loss"] if resume is None else _mean_loss(trainer.state.log_history)

    shares = None
    before = before or at_start.result
    after = answer("after training") if prompts and (main or divided) else None
    weights = whole_weights(trainer)
    if main:
        if before is not None and after is not None:
            shares = exact_share(before, prompts), exact_share(after, prompts)
        with written_aside(out / FINAL) as aside:
            save_checkpoint(model, tokenizer, aside, weights)
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
                usage=trainer.accounting.session,
                origin=provenance.rows(),
            )
            provenance.save(aside)
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
    if trainer.is_fsdp_enabled:
        divide(trainer)
    trainer.load(resume)
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
        trainer._load_best_model()
    return {}


def _held_out_loss(trainer: DiffusionTrainer) -> float:
    """The held-out loss of the final weights, evaluated once."""
    state = trainer.state
    best = trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None
    step = state.best_global_step if best else state.global_step
    losses = [log["eval_loss"] for log in state.log_history if "eval_loss" in log and log["step"] == step]
    return losses[-1] if losses else trainer.evaluate()["eval_loss"]


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

"""One recipe -> one trained checkpoint."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback

from unmask.data.collate import collate
from unmask.data.encode import Encoder
from unmask.data.hub import first_line
from unmask.data.sources import read_records
from unmask.errors import UnmaskError
from unmask.evaluation.exact_match import Prompt, exact_share, make_prompts
from unmask.model.checkpoint import fit_to_tokenizer, load_model, save_checkpoint, written_aside
from unmask.model.config import PREFIX
from unmask.model.families import MODEL_CLASSES
from unmask.recipe import Recipe, load_recipe, recipe_fields
from unmask.training.callbacks import ConsoleProgress, LossCurve
from unmask.training.card import write_card
from unmask.training.dataset import ExampleDataset, custom_fields, load_data, run_tokenizer
from unmask.training.report import answer_prompts, say_what_runs, show_answers, stream_lines
from unmask.training.schedule import (
    check_attention,
    check_block_sizes,
    loss_unit,
    make_curriculum,
    schedule_notes,
)
from unmask.training.trainer import DiffusionTrainer

_TENSORBOARD = "TENSORBOARD_LOGGING_DIR"
FINAL = "final"  # the checkpoint a finished run leaves, inside checkpoint_save_dir


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
    resume = _resume_point(recipe, out)
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
            _say_what_changed(console, recipe, out / "recipe.yaml")
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


def build_model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, encoder: Encoder | None = None
) -> PreTrainedModel:
    """Make the model to train: from random weights, an autoregressive base or a diffusion checkpoint.

    Raises:
        UnmaskError: an unknown field of `model.config`, a checkpoint that cannot be loaded, or settings
            that contradict what the checkpoint says.
    """
    settings = recipe.model
    dtype = getattr(torch, settings.dtype)
    eps = settings.noise_eps
    overrides: dict[str, Any] = {"noise_eps": eps[-1] if isinstance(eps, list) else eps}
    for name in ("logit_shift", "attention", "block_length"):
        if (value := getattr(settings, name)) is not None:
            overrides[name] = value
    if settings.attention == "bidirectional":
        overrides["block_length"] = None  # that of a block-causal checkpoint
    if settings.name_or_path is not None:
        model = load_model(
            settings.name_or_path,
            dtype=dtype,
            attn_implementation=settings.attn_implementation,
            convert_base=True,
            **overrides,
        )
    else:
        model = _from_scratch(dict(settings.config or {}), tokenizer, overrides)
        model = model.to(dtype)
        try:
            model.set_attn_implementation(settings.attn_implementation)
        except (ImportError, ValueError) as error:
            raise UnmaskError(f"model.attn_implementation: {first_line(error)}; use sdpa.") from error
    check_attention(recipe, model.config)
    fit_to_tokenizer(model, tokenizer)
    if encoder is not None:
        tokenizer.chat_template = encoder.chat_template  # generation lays prompts out as training did
        assert model.generation_config is not None
        ends = dict.fromkeys([encoder.end_token_id, tokenizer.eos_token_id])
        model.generation_config.eos_token_id = list(ends) if len(ends) > 1 else encoder.end_token_id
    if recipe.data.block_size > model.config.max_position_embeddings:
        raise UnmaskError(
            f"data.block_size: {recipe.data.block_size} tokens exceed the model's"
            f" {model.config.max_position_embeddings} positions (max_position_embeddings)."
        )
    return model


def _from_scratch(
    fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase, overrides: dict[str, Any]
) -> PreTrainedModel:
    model_class = MODEL_CLASSES[PREFIX + fields.pop("model_type")]
    config_class = model_class.config_class
    known = set(config_class().to_dict())
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else "."
            raise UnmaskError(f"model.config.{name}: {config_class.__name__} has no such field{hint}")
    ids = max(tokenizer.get_vocab().values()) + 1
    fields = {"vocab_size": ids, **fields}
    if "num_attention_heads" in fields:
        fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    try:
        if fields["vocab_size"] < ids:
            raise ValueError(f"vocab_size {fields['vocab_size']} is below the {ids} ids of the tokenizer")
        if "head_dim" in known and {"hidden_size", "num_attention_heads"} <= set(fields):
            fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
        model = model_class(config_class(**fields, **overrides))
        model.eval()(torch.zeros(1, 2, dtype=torch.long))  # sizes that do not fit one another show here
    except Exception as error:  # whatever the stock code makes of values that it does not check
        raise UnmaskError(f"model.config: no model can be built: {first_line(error)}.") from error
    return model


def training_arguments(recipe: Recipe, eval_on_start: bool = True) -> TrainingArguments:
    """Translate a recipe into transformers' own settings.

    Raises:
        UnmaskError: the global batch cannot be divided over the processes, or the folder is not writable.
    """
    out = Path(recipe.checkpoint_save_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnmaskError(f"checkpoint_save_dir: {out} cannot be made: {error.strerror}.") from error
    if not os.access(out, os.W_OK):
        raise UnmaskError(f"checkpoint_save_dir: {out} cannot be written to.")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    micro = recipe.micro_batch_size or max(1, recipe.global_batch_size // processes)
    if recipe.global_batch_size % (micro * processes):
        raise UnmaskError(
            f"global_batch_size: {recipe.global_batch_size} is no multiple of micro_batch_size {micro} times"
            f" {processes} processes."
        )
    optimizer = recipe.optimizer
    return TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=recipe.global_batch_size // (micro * processes),
        max_steps=recipe.max_steps,
        optim={"adamw": "adamw_torch", "adafactor": "adafactor"}[optimizer.type],
        learning_rate=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_epsilon=optimizer.epsilon,
        max_grad_norm=optimizer.max_grad_norm,
        lr_scheduler_type=recipe.lr_scheduler.type,
        warmup_steps=recipe.lr_scheduler.warmup_steps,
        bf16=recipe.precision == "bf16",
        use_cpu=not torch.accelerator.is_available(),
        **_recompute(recipe.gradient_checkpointing),
        logging_steps=recipe.log_steps,
        logging_first_step=True,
        eval_strategy="steps" if recipe.eval_steps else "no",
        eval_steps=recipe.eval_steps,
        eval_on_start=eval_on_start and bool(recipe.data.eval_size or recipe.data.eval_dataset_name),
        save_strategy="steps" if recipe.save_steps else "no",
        save_steps=recipe.save_steps or recipe.max_steps,
        save_total_limit=recipe.save_total_limit,
        report_to=list(recipe.report_to) or "none",
        seed=recipe.seed,
        data_seed=recipe.seed,
        dataloader_num_workers=recipe.data.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        ignore_data_skip=recipe.data.streaming or recipe.data.sources is not None,  # they know where they are
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        label_names=[],
        disable_tqdm=True,
    )


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


def _recompute(wanted: bool) -> dict[str, Any]:
    """Gradient checkpointing under the name this version of transformers knows it by."""
    fields = TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    return {name: wanted, f"{name}_kwargs": {"use_reentrant": False}}


def _resume_point(recipe: Recipe, out: Path) -> str | None:
    """The checkpoint folder to go on from, or None for a new run."""
    wanted = recipe.resume_from_checkpoint
    newest = _newest_checkpoint(out)
    if wanted is None:
        if newest or (out / FINAL).exists():
            raise UnmaskError(
                f"checkpoint_save_dir: {out} holds a run already; set resume_from_checkpoint=auto to go on"
                " with it, or name another folder."
            )
        return None
    if wanted == "auto":
        if (out / FINAL).exists() and (newest is None or _steps_done(newest) >= recipe.max_steps):
            raise UnmaskError(
                f"resume_from_checkpoint: {out / FINAL} is a finished run, with no checkpoint before"
                f" max_steps = {recipe.max_steps} to go on from; name another checkpoint_save_dir."
            )
        return None if newest is None else str(newest)
    if not (Path(wanted) / "trainer_state.json").exists():
        raise UnmaskError(
            f"resume_from_checkpoint: {wanted} is no training checkpoint: it has no trainer_state.json;"
            " name a checkpoint-N folder, or auto."
        )
    return wanted


def _newest_checkpoint(out: Path) -> Path | None:
    """The last training checkpoint that was written to its end: its trainer_state.json comes last."""
    found = [file.parent for file in out.glob("checkpoint-*/trainer_state.json")]
    numbers = [folder.name.removeprefix("checkpoint-") for folder in found]
    steps = {int(n): folder for n, folder in zip(numbers, found, strict=True) if n.isdecimal()}
    return steps[max(steps)] if steps else None


def _say_what_changed(console: Console, recipe: Recipe, file: Path) -> None:
    """Name the keys in which a resumed run's recipe differs from the one it was started with."""
    try:
        started = load_recipe(file)
    except UnmaskError:
        return  # none there, or of an older version: nothing to compare with
    keys = [f.key for f in recipe_fields() if f.key != "resume_from_checkpoint" and "[]" not in f.key]
    changed = [key for key in keys if _value(recipe, key) != _value(started, key)]
    if changed:
        console.print(
            f"resume: the recipe differs from that of the run so far in {', '.join(changed)};"
            " the optimizer and its schedule go on as the checkpoint has them."
        )


def _value(recipe: Recipe, key: str) -> Any:
    return reduce(getattr, key.split("."), cast(Any, recipe))


def _exact_match_prompts(recipe: Recipe, encoder: Encoder | None) -> list[Prompt]:
    if recipe.evaluation.prompts is None:
        return []
    assert encoder is not None  # the recipe allows prompts in sft alone
    records = read_records(recipe.evaluation.prompts, limit=recipe.evaluation.limit)
    return make_prompts(records, encoder, recipe.data.sft.format, custom_fields(recipe))


def _steps_done(checkpoint: str | Path) -> int:
    file = Path(checkpoint) / "trainer_state.json"
    try:
        return TrainerState.load_from_json(str(file)).global_step
    except (OSError, ValueError, TypeError) as error:
        raise UnmaskError(
            f"resume_from_checkpoint: {file} cannot be read: {first_line(error)}; name an earlier checkpoint."
        ) from error


def _train_or_load(trainer: DiffusionTrainer, resume: str | None) -> dict[str, float]:
    """Train to the end, and return Trainer's metrics; a checkpoint that is there already is only loaded,
    since Trainer would take one more step."""
    if resume is None or _steps_done(resume) < trainer.args.max_steps:
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

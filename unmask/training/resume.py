"""Which checkpoint a run goes on from, and whether it is one of this run."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple, cast

from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from unmask.data.hub import first_line
from unmask.data.prepare import tokenizer_fingerprint as fingerprint
from unmask.errors import UnmaskError
from unmask.recipe import Recipe, load_recipe, recipe_fields
from unmask.training.checkpoints import (
    RECIPE,
    STATE,
    checkpoints,
    newest_whole,
    read_manifest,
    step_of,
    verify,
)

FINAL = "final"  # the checkpoint a finished run leaves, inside checkpoint_save_dir

# What a resumed run may always change: none of it decides what is learnt, beyond rounding. A group stands
# for all its keys.
HARMLESS = (
    *("max_steps", "micro_batch_size", "gradient_checkpointing", "on_non_finite", "data.num_workers"),
    *("log_steps", "eval_steps", "save_steps", "save_total_limit", "report_to", "evaluation"),
    *("early_stopping_patience", "data.eval_dataset_name"),
    *("torch_compile", "distributed", "model.attn_implementation"),
    *("checkpoint_save_dir", "resume_from_checkpoint", "resume"),
)
# What no checkpoint can be loaded into once it has changed.
_FIXED = ("optimizer.type", "lora", "model.freeze_embeddings")
# Of a model's config: what decides the shapes of its weights, and what they are read as.
_ARCHITECTURE = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "tie_word_embeddings", "mask_token_id"),
)


class Resumed(NamedTuple):
    """Where a run starts: the checkpoint to go on from, None for a new run, and what to say about it."""

    checkpoint: str | None
    notes: list[str]


def on_main(find: Callable[[], Resumed], main: bool, processes: int) -> Resumed:
    """Look on one process, since checksums take a while, and have all go on from the same checkpoint.

    Raises:
        UnmaskError: the one that the main process found, on all of them.
    """
    found: list[Any] = [None]
    if main:
        try:
            found = [find()]
        except UnmaskError as error:
            found = [error]
    if processes > 1:
        broadcast_object_list(found)
    if isinstance(found[0], UnmaskError):
        raise found[0]
    return found[0]


def resume_point(recipe: Recipe, out: Path) -> Resumed:
    """Find the checkpoint to go on from.

    Raises:
        UnmaskError: the folder holds a run already, the checkpoint is damaged, or of another recipe.
    """
    wanted, there = recipe.resume_from_checkpoint, checkpoints(out)
    if wanted is None:
        if there or (out / FINAL).exists():
            raise UnmaskError(
                f"checkpoint_save_dir: {out} holds a run already; set resume_from_checkpoint=auto to go on"
                " with it, or name another folder."
            )
        return Resumed(None, [])
    notes = []
    if wanted == "auto":
        start, wrong = newest_whole(out)
        if (out / FINAL).exists() and (start is None or steps_done(start) >= recipe.max_steps):
            raise UnmaskError(
                f"resume_from_checkpoint: {out / FINAL} is a finished run, with no checkpoint before"
                f" max_steps = {recipe.max_steps} to go on from; name another checkpoint_save_dir."
            )
        if start is None:
            if wrong:
                raise UnmaskError(
                    f"resume_from_checkpoint: no checkpoint in {out} is whole: {'; '.join(wrong)}; move them"
                    " away to start anew."
                )
            return Resumed(None, [f"{out} holds no checkpoint yet: a new run"])
        notes = [f"warning: {found}; going on from the one before" for found in wrong]
    else:
        start = Path(wanted)
        if not (start / STATE).exists():
            raise UnmaskError(
                f"resume_from_checkpoint: {wanted} is no training checkpoint: it has no {STATE};"
                " name a checkpoint-N folder, or auto."
            )
        verify(start)
        _check_newest(start, there)
    notes += [f"going on from {start}", *_compare(recipe, start)]
    return Resumed(str(start), notes)


def _check_newest(start: Path, there: list[Path]) -> None:
    """Refuse to leave checkpoints of another course in the folder, which `auto` would take later."""
    here = [folder for folder in there if folder.resolve() == start.resolve()]
    if here and there[0] != here[0]:
        newer = ", ".join(folder.name for folder in there if step_of(folder) > step_of(here[0]))
        raise UnmaskError(
            f"resume_from_checkpoint: {start} is not the newest of its folder: move {newer} away, or name"
            " another checkpoint_save_dir."
        )


def _compare(recipe: Recipe, checkpoint: Path) -> list[str]:
    """Refuse another recipe than the checkpoint's; say which of the keys differ that may."""
    file = checkpoint / RECIPE
    try:
        started = load_recipe(file)
    except UnmaskError as error:
        return [f"resume: the recipe cannot be compared with that of the checkpoint: {error}"]
    keys = [field.key for field in recipe_fields() if "[]" not in field.key]
    changed = [key for key in keys if _value(recipe, key) != _value(started, key)]
    told = [key for key in changed if not _within(key, ("resume", "resume_from_checkpoint"))]
    fixed = [key for key in told if _within(key, _FIXED)]
    refused = fixed or [key for key in told if not _within(key, (*HARMLESS, *recipe.resume.allow))]
    if refused:
        differ = ", ".join(
            f"{key} was {_show(_value(started, key))} and is now {_show(_value(recipe, key))}"
            for key in refused
        )
        remedy = (
            "what was learnt cannot be loaded into that: start a new run"
            if fixed
            else f"set it back, or allow it with resume.allow=[{','.join(refused)}]"
        )
        raise UnmaskError(
            f"resume_from_checkpoint: {checkpoint} is of a run with another recipe: {differ}; {remedy}."
        )
    return [f"resume: the recipe differs from that of the checkpoint in {', '.join(told)}"] if told else []


def check_fits(checkpoint: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a checkpoint of another architecture or tokenizer.

    Raises:
        UnmaskError: with what differs.
    """
    manifest = read_manifest(Path(checkpoint))
    if manifest.tokenizer_sha256 not in (None, fingerprint(tokenizer)):
        raise UnmaskError(
            f"resume_from_checkpoint: {checkpoint} is of a run with another tokenizer; set model.tokenizer"
            " as it was."
        )
    file = Path(checkpoint) / "config.json"
    if not file.exists():
        return
    saved, here = json.loads(file.read_text(encoding="utf-8")), model.config.to_dict()
    differ = [
        f"{name} {saved.get(name)}, here {here.get(name)}"
        for name in _ARCHITECTURE
        if saved.get(name) != here.get(name)
    ]
    if differ:
        raise UnmaskError(
            f"resume_from_checkpoint: {checkpoint} is of another architecture: {'; '.join(differ)}; set the"
            " model as it was, or start a new run."
        )


def _within(key: str, names: tuple[str, ...] | list[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _value(recipe: Recipe, key: str) -> Any:
    return reduce(getattr, key.split("."), cast(Any, recipe))


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def steps_done(checkpoint: str | Path) -> int:
    file = Path(checkpoint) / STATE
    try:
        return TrainerState.load_from_json(str(file)).global_step
    except (OSError, ValueError, TypeError) as error:
        raise UnmaskError(
            f"resume_from_checkpoint: {file} cannot be read: {first_line(error)}; name an earlier checkpoint."
        ) from error


class RecipeFile:
    """Puts the recipe into each checkpoint; see `AlsoSaved`."""

    def __init__(self, recipe: Recipe, main: bool):
        self.recipe, self.main = recipe, main

    def save(self, folder: Path) -> None:
        if self.main:
            (folder / RECIPE).write_text(self.recipe.to_yaml(), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Nothing: it was compared before the run."""

"""Which checkpoint a run resumes from, and whether it belongs to this run."""

from __future__ import annotations

import json
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple, cast

from unmask.config import Recipe, load_recipe, recipe_fields
from unmask.errors import UnmaskError
from unmask.training.checkpoint import (
    FINAL,
    RECIPE,
    STATE,
    RunState,
    checkpoints,
    damage,
    newest_whole,
    read_state,
    step_of,
)

# What a resumed run may always change: it does not change what is trained, beyond rounding. A group stands for
# all its keys.
HARMLESS = (
    *("max_steps", "micro_batch_size", "gradient_checkpointing", "on_non_finite", "data.num_workers"),
    *("log_steps", "eval_steps", "save_steps", "save_total_limit", "report_to", "evaluation"),
    *("early_stopping_patience", "data.eval_dataset_name"),
    *("torch_compile", "distributed", "model.attn_implementation"),
    *("checkpoint_save_dir", "resume_from_checkpoint", "resume"),
)
_FIXED = ("optimizer.type", "lora", "model.freeze_embeddings")  # a checkpoint cannot be loaded into another
# Of a model's config: the shapes of its weights, and what they are read as.
_ARCHITECTURE = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "tie_word_embeddings", "mask_token_id"),
)


class ResumePoint(NamedTuple):
    """Where a run starts: the checkpoint to resume from, None for a new run."""

    checkpoint: Path | None
    state: RunState
    recipe: Recipe | None
    """That of the checkpoint."""
    notes: list[str]
    """What to say about it."""


def resume_point(recipe: Recipe, out: Path) -> ResumePoint:
    """Find the checkpoint to resume from.

    Raises:
        UnmaskError: the folder holds a run already, the checkpoint is damaged, or of another recipe.
    """
    wanted, there = recipe.resume_from_checkpoint, checkpoints(out)
    if wanted is None:
        if there or (out / FINAL).exists():
            raise UnmaskError(
                f"checkpoint_save_dir: {out} holds a run already; set resume_from_checkpoint=auto to resume it,"
                " or name another folder."
            )
        return ResumePoint(None, RunState(), None, [])
    notes = []
    if wanted == "auto":
        start, wrong = newest_whole(out)
        if (out / FINAL).exists() and (start is None or step_of(start) >= recipe.max_steps):
            raise UnmaskError(
                f"resume_from_checkpoint: {out / FINAL} is a finished run, with no checkpoint before"
                f" max_steps = {recipe.max_steps} to resume from; name another checkpoint_save_dir."
            )
        if start is None:
            if wrong:
                raise UnmaskError(
                    f"resume_from_checkpoint: no checkpoint in {out} is whole: {'; '.join(wrong)}; move them"
                    " away to start anew."
                )
            return ResumePoint(None, RunState(), None, [f"{out} has no checkpoint yet: a new run"])
        notes = [f"warning: {found}; resuming from the one before" for found in wrong]
    else:
        start = Path(wanted)
        if not (start / STATE).exists():
            raise UnmaskError(
                f"resume_from_checkpoint: {wanted} is not a training checkpoint: it has no {STATE}; name a"
                " checkpoint-N folder, or auto."
            )
        if (found := damage(start)) is not None:
            raise UnmaskError(
                f"resume_from_checkpoint: {start}: {found}; name an earlier checkpoint, or auto."
            )
        _check_newest(start, there)
    saved, changed = _compare(recipe, start)
    return ResumePoint(start, read_state(start), saved, [*notes, f"resuming from {start}", *changed])


def _check_newest(start: Path, there: list[Path]) -> None:
    """Refuse to leave newer checkpoints in the folder, which `auto` would take later."""
    here = [folder for folder in there if folder.resolve() == start.resolve()]
    if here and there[0] != here[0]:
        newer = ", ".join(folder.name for folder in there if step_of(folder) > step_of(here[0]))
        raise UnmaskError(
            f"resume_from_checkpoint: {start} is not the newest of its folder: move {newer} away, or name"
            " another checkpoint_save_dir."
        )


def _compare(recipe: Recipe, checkpoint: Path) -> tuple[Recipe | None, list[str]]:
    """Refuse another recipe than the checkpoint's; say which of the keys differ that may."""
    try:
        saved = load_recipe(checkpoint / RECIPE)
    except UnmaskError as error:
        return None, [f"resume: the recipe cannot be compared with that of the checkpoint: {error}"]
    keys = [field.key for field in recipe_fields() if "[]" not in field.key]
    changed = [key for key in keys if _value(recipe, key) != _value(saved, key)]
    changed = [key for key in changed if not _within(key, ("resume", "resume_from_checkpoint"))]
    if recipe.precision == "auto":  # it is what that run computed in
        changed = [key for key in changed if key != "precision"]
    fixed = [key for key in changed if _within(key, _FIXED)]
    refused = fixed or [key for key in changed if not _within(key, (*HARMLESS, *recipe.resume.allow))]
    if refused:
        differ = ", ".join(
            f"{key} was {_show(_value(saved, key))} and is now {_show(_value(recipe, key))}"
            for key in refused
        )
        remedy = (
            "the checkpoint is incompatible with that: start a new run"
            if fixed
            else f"set it back, or allow it with resume.allow=[{','.join(refused)}]"
        )
        raise UnmaskError(
            f"resume_from_checkpoint: {checkpoint} is of a run with another recipe: {differ}; {remedy}."
        )
    notes = [f"resume: the recipe differs from that of the checkpoint in {', '.join(changed)}"]
    return saved, notes if changed else []


def check_fits(point: ResumePoint, config: Any, tokenizer: str) -> None:
    """Refuse a checkpoint of another architecture or tokenizer.

    Args:
        config: of the model.
        tokenizer: its fingerprint.

    Raises:
        UnmaskError: with what differs.
    """
    assert point.checkpoint is not None
    if point.state.tokenizer != tokenizer:
        raise UnmaskError(
            f"resume_from_checkpoint: {point.checkpoint} is of a run with another tokenizer; set"
            " model.tokenizer as it was."
        )
    file = point.checkpoint / "config.json"
    if not file.exists():
        return
    saved, here = json.loads(file.read_text(encoding="utf-8")), config.to_dict()
    differ = [
        f"{name} {saved.get(name)}, here {here.get(name)}"
        for name in _ARCHITECTURE
        if saved.get(name) != here.get(name)
    ]
    if differ:
        raise UnmaskError(
            f"resume_from_checkpoint: {point.checkpoint} is of another architecture: {'; '.join(differ)}; set"
            " the model as it was, or start a new run."
        )


def _within(key: str, names: tuple[str, ...] | list[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _value(recipe: Recipe, key: str) -> Any:
    return reduce(getattr, key.split("."), cast(Any, recipe))


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."

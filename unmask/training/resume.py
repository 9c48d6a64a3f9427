"""Which checkpoint a run goes on from, and what has changed since."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from transformers import TrainerState

from unmask.data.hub import first_line
from unmask.errors import UnmaskError
from unmask.recipe import Recipe, load_recipe, recipe_fields

FINAL = "final"  # the checkpoint a finished run leaves, inside checkpoint_save_dir


def resume_point(recipe: Recipe, out: Path) -> str | None:
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
        if (out / FINAL).exists() and (newest is None or steps_done(newest) >= recipe.max_steps):
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


def say_what_changed(console: Console, recipe: Recipe, file: Path) -> None:
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


def steps_done(checkpoint: str | Path) -> int:
    file = Path(checkpoint) / "trainer_state.json"
    try:
        return TrainerState.load_from_json(str(file)).global_step
    except (OSError, ValueError, TypeError) as error:
        raise UnmaskError(
            f"resume_from_checkpoint: {file} cannot be read: {first_line(error)}; name an earlier checkpoint."
        ) from error

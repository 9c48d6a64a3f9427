"""Training checkpoints: whole or not there, verified before use, without anything that could run; and resuming.

    checkpoint-500/
      model.safetensors, config.json, tokenizer ...   a model folder like any other (DDP, one process)
      state/*.safetensors                             optimizer, averaged weights, adapters; all weights under FSDP
      state.json                                      step, losses since the last log, history, data position
      recipe.yaml, provenance.json, manifest.json     the last has the size and checksum of every file

Tensors are written and read by `torch.distributed.checkpoint` as safetensors, so that a run may resume on
another number of processes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import Optimizer

from unmask.config import Recipe, is_within, load_recipe, recipe_fields, value_at
from unmask.errors import UnmaskError
from unmask.io import atomic_dir, reason, sha256
from unmask.model.checkpoint import save_checkpoint
from unmask.training.card import PROVENANCE
from unmask.training.optim import WeightAverage
from unmask.training.parallel import SharedModel, read_tensors, saved_shapes, write_tensors

VERSION = 3  # of the format
MANIFEST, STATE, RECIPE, TENSORS = "manifest.json", "state.json", "recipe.yaml", "state"
PREFIX, FINAL = "checkpoint-", "final"
PARTIAL = f".{PREFIX}*.partial"  # what a killed run leaves of a checkpoint; see `atomic_dir`

# What a resumed run may always change: it does not change what is trained, beyond rounding. A group means
# all its keys.
HARMLESS = (
    *("max_steps", "micro_batch_size", "gradient_checkpointing", "on_non_finite", "data.num_workers"),
    *("log_steps", "eval_steps", "save_steps", "save_total_limit", "report_to", "evaluation"),
    *("early_stopping_patience", "data.eval_dataset_name", "torch_compile", "distributed"),
    *("model.attn_implementation", "checkpoint_save_dir", "resume_from_checkpoint", "resume"),
)
FIXED = ("optimizer.type", "lora", "model.freeze_embeddings")  # a checkpoint cannot be loaded into another


@dataclass
class RunState:
    """What a run has to know of its past, besides tensors."""

    step: int = 0  # optimizer steps taken or left out
    loss_sum: float = 0.0  # of the steps since the last logged loss
    loss_steps: int = 0
    skipped: int = 0  # steps left out because their loss or gradient was not finite
    skipped_in_a_row: int = 0
    history: list[dict[str, float]] = field(default_factory=list)  # what was logged, each with its `step`
    best_loss: float | None = None
    best_step: int | None = None
    without_improvement: int = 0  # evaluations in a row without a lower held-out loss
    exact_before: float | None = (
        None  # share of exact answers before training, to the prompts of `evaluation`
    )
    evaluation_due: bool = False  # a signal came before the evaluation of this step
    tokenizer: str = ""  # its fingerprint
    data: list[Any] = field(default_factory=list)  # position of each process in a stream
    source_counts: list[list[int]] = field(default_factory=list)  # examples and tokens of each source so far


# Write and read


class Checkpointer:
    """Writes and reads all that a resumed run needs; its methods are called on every process.

    Args:
        model: what is saved as a model folder: the denoiser, or the `PeftModel` around it.
        origin: contents of `provenance.json`.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: Any,
        tokenizer: Any,
        shared: SharedModel,
        optimizers: list[Optimizer],
        average: WeightAverage | None,
        origin: dict[str, Any],
    ):
        self.recipe, self.model, self.tokenizer, self.origin = recipe, model, tokenizer, origin
        self.shared, self.optimizers, self.average = shared, optimizers, average
        self.group, self.out = shared.group, Path(recipe.checkpoint_save_dir)

    def save(self, state: RunState) -> None:
        """Write a checkpoint aside, move it to its place when everything is on the disk, and remove old ones."""
        folder = self.out / f"{PREFIX}{state.step}"
        with ExitStack() as stack:
            aside: Path = self.group.on_main(lambda: stack.enter_context(atomic_dir(folder)))
            self.group.together(lambda: self._write_tensors(folder, aside / TENSORS))

            def write_rest() -> None:
                self._write_rest(aside, state)
                stack.close()  # which moves the folder to its place

            self.group.on_main(write_rest)
        if self.group.main:
            rotate(self.out, self.recipe.save_total_limit, state.best_step)

    def _write_tensors(self, folder: Path, aside: Path) -> None:
        optimizer = get_optimizer_state_dict(self.shared.model, self.optimizers)
        # Adapters have other names in a model folder, and a sharded model has none.
        tensors = self._tensors(optimizer, self.shared.sharded or self.recipe.lora.r is not None)
        try:
            write_tensors(tensors, aside, self.group)
        except (OSError, SafetensorError, CheckpointException) as error:
            raise UnmaskError(
                f"{folder}: could not be written: {_first_reason(error)}; earlier checkpoints are as they"
                " were: make room and resume with resume_from_checkpoint=auto."
            ) from error

    def _write_rest(self, folder: Path, state: RunState) -> None:
        if self.shared.sharded:
            self.shared.model.config.save_pretrained(folder)
        else:
            save_checkpoint(self.model, self.tokenizer, folder)
        (folder / RECIPE).write_text(self.recipe.to_yaml(), encoding="utf-8")
        (folder / PROVENANCE).write_text(json.dumps(self.origin, indent=2), encoding="utf-8")
        (folder / STATE).write_text(json.dumps(asdict(state)), encoding="utf-8")
        files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
        manifest = {"format_version": VERSION, "files": _checksums(folder, files)}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Read weights, optimizer state and average; the optimizer's settings stay those of the recipe."""
        optimizer: Any = get_optimizer_state_dict(self.shared.model, self.optimizers)
        try:
            with_weights = any(name.startswith("weights/") for name in saved_shapes(folder / TENSORS))
            tensors = self._tensors(optimizer, with_weights)
            read_tensors(tensors, folder / TENSORS, self.group)
            if not with_weights:
                weights: dict[str, Tensor] = {n: p.detach() for n, p in self.shared.parameters.items()}
                read_tensors(weights, folder, self.group)
            for name, values in optimizer["state"].items():
                values.update({key: tensors[f"optimizer/{key}/{name}"] for key in values})
            set_optimizer_state_dict(self.shared.model, self.optimizers, optimizer)
        except (OSError, SafetensorError, RuntimeError, ValueError, CheckpointException) as error:
            raise UnmaskError(
                f"resume_from_checkpoint: {folder} cannot be loaded: {_first_reason(error)}; it is damaged,"
                " or of another model, optimizer or ema.decay than the recipe's."
            ) from error

    def _tensors(self, optimizer: Any, with_weights: bool) -> dict[str, Tensor]:
        """Name what is saved besides a model folder: `optimizer/KEY/NAME`, `average/NAME`, `weights/NAME`."""
        tensors = {
            f"optimizer/{key}/{name}": torch.as_tensor(value)
            for name, values in optimizer["state"].items()
            for key, value in values.items()
        }
        if self.average is not None:
            tensors |= {f"average/{name}": value for name, value in self.average.average.items()}
        if with_weights:
            tensors |= {f"weights/{name}": p.detach() for name, p in self.shared.parameters.items()}
        return tensors


def _first_reason(error: BaseException) -> str:
    """The first line of an error, of those of several processes the first one's."""
    failures = error.failures.values() if isinstance(error, CheckpointException) else ()
    return reason(next((cause for cause, _ in failures), error))


# Which there are, and which are whole


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, by the checksums of its files; None if nothing is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format_version"] != VERSION:
            return f"its format is {manifest['format_version']}, and this version of unmask reads {VERSION}"
        found = _checksums(folder, manifest["files"])
        names = [name for name, checksum in manifest["files"].items() if found[name] != checksum]
        return f"{names[0]} is damaged: its checksum is not that of {MANIFEST}" if names else None
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} is damaged ({reason(error)})"


def _checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    names = sorted(names)
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(sha256, [folder / name for name in names]), strict=True))


def checkpoints(out: Path) -> list[Path]:
    """The training checkpoints of a run's folder, newest first, whole or damaged."""
    found = [folder for folder in out.glob(f"{PREFIX}*") if folder.name.removeprefix(PREFIX).isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The optimizer step of a checkpoint, by its name."""
    return int(folder.name.removeprefix(PREFIX))


def newest_whole(out: Path) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint that is whole, and say what is wrong with each newer one."""
    wrong = []
    for folder in checkpoints(out):
        if (found := damage(folder)) is None:
            return folder, wrong
        wrong.append(f"{folder}: {found}")
    return None, wrong


def rotate(out: Path, limit: int | None, best_step: int | None) -> None:
    """Remove all checkpoints but the `limit` newest; the best one stays, and counts."""
    found = checkpoints(out)
    best = [folder for folder in found[1:] if step_of(folder) == best_step]
    rest = [folder for folder in found if folder not in best]
    for folder in rest[max(1, limit - len(best)) :] if limit else []:
        os.replace(folder, out / f".{folder.name}.partial")  # at once: half of one would stay for ever
    remove_partial(out)


def remove_partial(out: Path) -> None:
    """Remove what a run that was killed had not written, or not removed, to its end."""
    for folder in out.glob(PARTIAL):
        shutil.rmtree(folder, ignore_errors=True)


# Resume


class ResumePoint(NamedTuple):
    """Where a run starts: its checkpoint (None = a new run), that one's state and recipe, and what to say."""

    checkpoint: Path | None
    state: RunState
    recipe: Recipe | None
    notes: list[str]


def resume_point(recipe: Recipe, out: Path) -> ResumePoint:
    """Find the checkpoint to resume from, and compare its recipe with this one."""
    start, notes = _find(recipe, out)
    if start is None:
        return ResumePoint(None, RunState(), None, notes)
    state = RunState(**json.loads((start / STATE).read_text(encoding="utf-8")))
    saved = load_recipe(start / RECIPE)
    if recipe.evaluation != saved.evaluation:  # the answers before training were to other prompts
        state.exact_before = None
    changed = _changed_keys(recipe, saved)
    notes.append(f"resuming from {start}")
    if changed:
        notes.append(f"resume: the recipe differs from that of the checkpoint in {', '.join(changed)}")
    fixed = [key for key in changed if is_within(key, FIXED)]
    if refused := fixed or [key for key in changed if not is_within(key, (*HARMLESS, *recipe.resume.allow))]:
        remedy = f"set it back, or allow it with resume.allow=[{','.join(refused)}]"
        if fixed:
            remedy = "the checkpoint is incompatible with that: start a new run"
        differ = (f"{key} was {value_at(saved, key)} and is now {value_at(recipe, key)}" for key in refused)
        raise _refusal(f"{start} is of a run with another recipe: {', '.join(differ)}; {remedy}")
    return ResumePoint(start, state, saved, notes)


def _find(recipe: Recipe, out: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint that the recipe names, and what to say about others."""
    wanted, existing, finished = recipe.resume_from_checkpoint, checkpoints(out), (out / FINAL).exists()
    if wanted is None and (existing or finished):
        remedy = "set resume_from_checkpoint=auto to resume it, or name another folder"
        raise UnmaskError(f"checkpoint_save_dir: {out} holds a run already; {remedy}.")
    if wanted is None:
        return None, []
    if wanted == "auto":
        start, wrong = newest_whole(out)
        if finished and (start is None or step_of(start) >= recipe.max_steps):
            last = f"with no checkpoint before max_steps = {recipe.max_steps} to resume from"
            raise _refusal(f"{out / FINAL} is a finished run, {last}; name another checkpoint_save_dir")
        if start is None and wrong:
            raise _refusal(
                f"no checkpoint in {out} is whole: {'; '.join(wrong)}; move them away to start anew"
            )
        if start is None:
            return None, [f"{out} has no checkpoint yet: a new run"]
        return start, [f"warning: {found}; resuming from the one before" for found in wrong]
    start = Path(wanted)
    if not (start / STATE).exists():
        raise _refusal(f"{start} is not a training checkpoint: name a checkpoint-N folder, or auto")
    if (found := damage(start)) is not None:
        raise _refusal(f"{start}: {found}; name an earlier checkpoint, or auto")
    same = [folder for folder in existing if folder.samefile(start)]
    if same and same != existing[:1]:  # which `auto` would take later
        newer = ", ".join(folder.name for folder in existing if step_of(folder) > step_of(same[0]))
        raise _refusal(f"{start} has newer ones next to it: move {newer} away, or name another folder")
    return start, []


def _refusal(why: str) -> UnmaskError:
    return UnmaskError(f"resume_from_checkpoint: {why}.")


def _changed_keys(recipe: Recipe, saved: Recipe) -> list[str]:
    same = ["resume", "resume_from_checkpoint"]
    if recipe.precision == "auto":  # it is what that run computed in
        same.append("precision")
    keys = [key for key in recipe_fields() if "[]" not in key and not is_within(key, same)]
    return [key for key in keys if value_at(recipe, key) != value_at(saved, key)]

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
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as read_tensors
from torch.distributed.checkpoint.state_dict_saver import save as write_tensors
from torch.optim import Optimizer

from unmask.config import Recipe, is_within, load_recipe, recipe_fields, value_at
from unmask.errors import UnmaskError
from unmask.io import atomic_dir, reason, sha256
from unmask.training.parallel import Processes

VERSION = 2  # of the format
MANIFEST, STATE, RECIPE, TENSORS = "manifest.json", "state.json", "recipe.yaml", "state"
PREFIX, FINAL = "checkpoint-", "final"
PARTIAL = f".{PREFIX}*.partial"  # what a killed run leaves of a checkpoint; see `atomic_dir`

# What a resumed run may always change: it does not change what is trained, beyond rounding. A group stands for
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

    step: int = 0
    """Optimizer steps taken or left out."""
    loss_sum: float = 0.0
    """Of the steps since the last logged loss."""
    loss_steps: int = 0
    skipped: int = 0
    """Steps left out because their loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    """What was logged, each entry with its `step`."""
    best_loss: float | None = None
    best_step: int | None = None
    without_improvement: int = 0
    """Evaluations in a row without a lower held-out loss."""
    evaluation_due: bool = False
    """A signal came before the evaluation of this step."""
    precision: str = ""
    tokenizer: str = ""
    """Fingerprint of the tokenizer."""
    data: list[Any] = field(default_factory=list)
    """Position of each process in a stream."""
    source_counts: list[list[int]] = field(default_factory=list)
    """Examples and tokens taken from each source."""


# Write and read


def save(
    folder: Path,
    state: RunState,
    tensors: Mapping[str, Tensor],
    group: Processes,
    write_rest: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a checkpoint aside, and move it to its place when everything is on the disk.

    Called on every process. An earlier checkpoint is never touched.

    Args:
        tensors: those of `training_tensors`.
        write_rest: called with the folder on the main process: model folder, recipe and so on.
    """

    def write_own() -> None:
        with _errors_of_writing(folder), _quiet_single_process():
            writer = HuggingFaceStorageWriter(str(aside / TENSORS), save_distributed=True)
            write_tensors(dict(tensors), storage_writer=writer, no_dist=group.ranks == 1)

    def finish() -> None:
        with _errors_of_writing(folder):
            write_rest(aside)
            (aside / STATE).write_text(json.dumps(asdict(state)), encoding="utf-8")
            files = sorted(file for file in aside.rglob("*") if file.is_file())
            entries = {
                file.relative_to(aside).as_posix(): {"size": file.stat().st_size, "sha256": checksum}
                for file, checksum in zip(files, _checksums(files), strict=True)
            }
            manifest = {"format_version": VERSION, "files": entries}
            (aside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        stack.close()  # which moves the folder to its place

    with ExitStack() as stack:
        aside: Path = group.on_main(lambda: stack.enter_context(atomic_dir(folder)))
        group.together(write_own)
        group.on_main(finish)


@contextmanager
def _errors_of_writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        failures = error.failures.values() if isinstance(error, CheckpointException) else ()
        cause = next((failure[0] for failure in failures), error)
        raise UnmaskError(
            f"{folder}: could not be written: {reason(cause)}; earlier checkpoints are as they were: make room"
            " and resume with resume_from_checkpoint=auto."
        ) from error


def training_tensors(
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    average: Mapping[str, Tensor] | None,
    with_weights: bool,
) -> dict[str, Tensor]:
    """Name every tensor that a resumed run needs: `optimizer/KEY/NAME`, `average/NAME`, `weights/NAME`."""
    tensors = {f"weights/{name}": p.detach() for name, p in parameters.items()} if with_weights else {}
    by_id = {id(p): name for name, p in parameters.items()}
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            tensors[f"optimizer/{key}/{by_id[id(parameter)]}"] = torch.as_tensor(value)
    return tensors | {f"average/{name}": value for name, value in (average or {}).items()}


def load_tensors(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    average: Mapping[str, Tensor] | None,
    group: Processes,
) -> None:
    """Read what `training_tensors` named into the parameters, the optimizer and the average.

    Weights come from `state/` or from the model folder, whichever has them.
    """
    weights = {name: p.detach() for name, p in parameters.items()}
    wanted: dict[str, Tensor] = {}
    try:
        reader = HuggingFaceStorageReader(str(folder / TENSORS))
        for name, metadata in cast(Any, reader.read_metadata().state_dict_metadata).items():
            kind, _, rest = name.partition("/")
            if kind == "weights":
                wanted[name] = weights[rest]
            elif kind == "average" and average is not None:
                wanted[name] = average[rest]
            elif kind == "optimizer":
                like, dtype = weights[rest.partition("/")[2]], metadata.properties.dtype
                same = metadata.size == like.shape  # then it is sharded as the weight is
                wanted[name] = (
                    torch.empty_like(like, dtype=dtype) if same else torch.empty(metadata.size, dtype=dtype)
                )
        kinds = {name.partition("/")[0] for name in wanted}
        if average is not None and "average" not in kinds:
            raise UnmaskError(f"ema.decay: {folder} has no averaged weights; resume without ema.decay.")
        with _quiet_single_process():
            read_tensors(wanted, storage_reader=reader, no_dist=group.ranks == 1)
            if "weights" not in kinds:
                model_folder = HuggingFaceStorageReader(str(folder))
                read_tensors(weights, storage_reader=model_folder, no_dist=group.ranks == 1)
        _load_optimizer(optimizer, parameters, wanted)
    except UnmaskError:
        raise
    except (OSError, SafetensorError, RuntimeError, ValueError, LookupError, CheckpointException) as error:
        raise UnmaskError(
            f"resume_from_checkpoint: {folder} cannot be loaded: {reason(error)}; it is damaged, or of another"
            " model or optimizer than the recipe's."
        ) from error


def _load_optimizer(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Give the optimizer its state back; its settings stay those of the recipe."""
    name_of = {id(p): name for name, p in parameters.items()}
    ordered = [name_of[id(p)] for group in optimizer.param_groups for p in group["params"]]
    index_of = {name: index for index, name in enumerate(ordered)}  # as in a state dict
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            key, _, parameter = rest.partition("/")
            state.setdefault(index_of[parameter], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@contextmanager
def _quiet_single_process() -> Iterator[None]:
    """torch warns wherever a checkpoint is read or written by one process alone, as it is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")
        yield


# Which there are, and which are whole


def damage(folder: Path, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint, None if nothing is; `contents`: compare checksums, not sizes alone."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format_version"] != VERSION:
            return f"its format is {manifest['format_version']}, and this version of unmask reads {VERSION}"
        entries = {folder / name: entry for name, entry in manifest["files"].items()}
        for file, entry in entries.items():
            if (size := file.stat().st_size) != entry["size"]:
                return f"{file.name} has {size:,} bytes instead of {entry['size']:,}"
        if contents:
            for (file, entry), checksum in zip(entries.items(), _checksums(list(entries)), strict=True):
                if checksum != entry["sha256"]:
                    return f"{file.name} is damaged: its checksum is not that of {MANIFEST}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} is damaged ({reason(error)})"
    return None


def _checksums(files: list[Path]) -> list[str]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(sha256, files))


def checkpoints(out: Path) -> list[Path]:
    """The training checkpoints of a run's folder, newest first, whole or damaged."""
    found = [folder for folder in out.glob(f"{PREFIX}*") if folder.name.removeprefix(PREFIX).isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The optimizer step of a checkpoint, by its name."""
    return int(folder.name.removeprefix(PREFIX))


def newest_whole(out: Path, contents: bool = True) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint that is whole, and say what is wrong with each newer one."""
    wrong = []
    for folder in checkpoints(out):
        if (found := damage(folder, contents)) is None:
            return folder, wrong
        wrong.append(f"{folder}: {found}")
    return None, wrong


def rotate(out: Path, limit: int | None, best_step: int | None) -> None:
    """Remove the oldest whole checkpoints beyond the `limit` newest; the best one stays, and counts."""
    whole = [folder for folder in checkpoints(out) if damage(folder, contents=False) is None]
    if limit is None:
        return
    best = [folder for folder in whole[1:] if step_of(folder) == best_step]
    rest = [folder for folder in whole if folder not in best]
    for folder in rest[max(1, limit - len(best)) :]:
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
    """Find the checkpoint to resume from."""
    wanted, existing, finished = recipe.resume_from_checkpoint, checkpoints(out), (out / FINAL).exists()

    def refuse(why: str, key: str = "resume_from_checkpoint") -> UnmaskError:
        return UnmaskError(f"{key}: {why}.")

    if wanted is None:
        if existing or finished:
            remedy = "set resume_from_checkpoint=auto to resume it, or name another folder"
            raise refuse(f"{out} holds a run already; {remedy}", "checkpoint_save_dir")
        return ResumePoint(None, RunState(), None, [])
    wrong: list[str] = []
    if wanted == "auto":
        start, wrong = newest_whole(out)
        if finished and (start is None or step_of(start) >= recipe.max_steps):
            raise refuse(
                f"{out / FINAL} is a finished run, with no checkpoint before max_steps = {recipe.max_steps}"
                " to resume from; name another checkpoint_save_dir"
            )
        if start is None and wrong:
            raise refuse(f"no checkpoint in {out} is whole: {'; '.join(wrong)}; move them away to start anew")
        if start is None:
            return ResumePoint(None, RunState(), None, [f"{out} has no checkpoint yet: a new run"])
    else:
        start = Path(wanted)
        if not (start / STATE).exists():
            raise refuse(f"{start} is not a training checkpoint: name a checkpoint-N folder, or auto")
        if (found := damage(start)) is not None:
            raise refuse(f"{start}: {found}; name an earlier checkpoint, or auto")
        same = [folder for folder in existing if folder.samefile(start)]
        if same and same != existing[:1]:  # which `auto` would take later
            newer = ", ".join(folder.name for folder in existing if step_of(folder) > step_of(same[0]))
            raise refuse(f"{start} has newer ones beside it: move {newer} away, or name another folder")
    state = RunState(**json.loads((start / STATE).read_text(encoding="utf-8")))
    notes = [f"warning: {found}; resuming from the one before" for found in wrong]
    saved = load_recipe(start / RECIPE)
    changed = _changed_keys(recipe, saved)
    notes.append(f"resuming from {start}")
    if changed:
        notes.append(f"resume: the recipe differs from that of the checkpoint in {', '.join(changed)}")
    fixed = [key for key in changed if is_within(key, FIXED)]
    refused = fixed or [key for key in changed if not is_within(key, (*HARMLESS, *recipe.resume.allow))]
    if refused:
        remedy = f"set it back, or allow it with resume.allow=[{','.join(refused)}]"
        if fixed:
            remedy = "the checkpoint is incompatible with that: start a new run"
        differ = (f"{key} was {value_at(saved, key)} and is now {value_at(recipe, key)}" for key in refused)
        raise refuse(f"{start} is of a run with another recipe: {', '.join(differ)}; {remedy}")
    return ResumePoint(start, state, saved, notes)


def _changed_keys(recipe: Recipe, saved: Recipe) -> list[str]:
    keys = [key for key in recipe_fields() if "[]" not in key]
    keys = [key for key in keys if not is_within(key, ("resume", "resume_from_checkpoint"))]
    if recipe.precision == "auto":  # it is what that run computed in
        keys.remove("precision")
    return [key for key in keys if value_at(recipe, key) != value_at(saved, key)]

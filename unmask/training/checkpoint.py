"""Training checkpoints: whole or not there, verified before use, without anything that could run.

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
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as read_tensors
from torch.distributed.checkpoint.state_dict_saver import save as write_tensors
from torch.optim import Optimizer

from unmask import __version__
from unmask.errors import UnmaskError
from unmask.io import reason, sha256, sync, sync_folder
from unmask.training.parallel import Processes

VERSION = 2  # of the format
MANIFEST, STATE, RECIPE, TENSORS = "manifest.json", "state.json", "recipe.yaml", "state"
PREFIX, PARTIAL = "checkpoint-", ".partial"
FINAL = "final"  # what a finished run leaves
_READERS = 8  # files hashed at once


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


def save(
    folder: Path, state: RunState, tensors: Mapping[str, Tensor], group: Processes, write_rest: Any = None
) -> None:
    """Write a checkpoint aside, and move it to its place when everything is on the disk.

    Called on every process. An earlier checkpoint is never touched.

    Args:
        tensors: those of `training_tensors`.
        write_rest: called with the folder on the main process: model folder, recipe and so on.

    Raises:
        UnmaskError: on all processes, if one could not write.
    """
    aside = folder.parent / PARTIAL / folder.name

    def begin() -> None:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)

    def write() -> None:
        writer = HuggingFaceStorageWriter(str(aside / TENSORS), save_distributed=True)
        with _quiet_single_process():
            write_tensors(dict(tensors), storage_writer=writer, no_dist=group.ranks == 1)

    def finish() -> None:
        if write_rest is not None:
            write_rest(aside)
        (aside / STATE).write_text(json.dumps(asdict(state)), encoding="utf-8")
        write_manifest(aside)
        if folder.exists():  # a damaged one of the same step
            shutil.rmtree(folder)
        os.replace(aside, folder)
        sync(folder.parent)
        remove_partial(folder.parent)

    try:
        group.on_main(_as_unmask_error(begin, folder))
        group.together(_as_unmask_error(write, folder))
        group.on_main(_as_unmask_error(finish, folder))
    except UnmaskError:
        if group.main:
            remove_partial(folder.parent)
        raise


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
            value = value if isinstance(value, Tensor) else torch.tensor(value)
            tensors[f"optimizer/{key}/{by_id[id(parameter)]}"] = value
    return tensors | {f"average/{name}": value for name, value in (average or {}).items()}


def load_tensors(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    average: dict[str, Tensor] | None,
    group: Processes,
) -> None:
    """Read what `training_tensors` named into the parameters, the optimizer and the average.

    Weights come from `state/` or from the model folder, whichever has them.

    Raises:
        UnmaskError: tensors are missing, or have other shapes.
    """
    reader = HuggingFaceStorageReader(str(folder / TENSORS))
    try:
        stored: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
        wanted: dict[str, Tensor] = {}
        for name, metadata in stored.items():
            kind, _, rest = name.partition("/")
            parameter = parameters[rest.partition("/")[2] if kind == "optimizer" else rest]
            if kind == "average" and average is None:
                continue
            if kind == "weights":
                wanted[name] = parameter.detach()
            elif kind == "average":
                assert average is not None
                wanted[name] = average[rest]
            elif metadata.size == parameter.shape:
                wanted[name] = torch.empty_like(parameter.detach(), dtype=metadata.properties.dtype)
            else:
                wanted[name] = torch.empty(metadata.size, dtype=metadata.properties.dtype)
        if average is not None and not any(name.startswith("average/") for name in stored):
            raise UnmaskError(
                f"ema.decay: {folder} has no averaged weights; resume without ema.decay, or from a checkpoint"
                " of a run that had it."
            )
        with _quiet_single_process():
            read_tensors(wanted, storage_reader=reader, no_dist=group.ranks == 1)
            if not any(name.startswith("weights/") for name in stored):
                whole = {name: p.detach() for name, p in parameters.items()}
                model_folder = HuggingFaceStorageReader(str(folder))
                read_tensors(whole, storage_reader=model_folder, no_dist=group.ranks == 1)
        _load_optimizer(optimizer, parameters, wanted)
    except (
        *(OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError),
        CheckpointException,
    ) as error:
        if isinstance(error, UnmaskError):
            raise
        raise UnmaskError(
            f"resume_from_checkpoint: {folder} cannot be loaded: {reason(error)}; it may be damaged, or of"
            " another model or optimizer than the recipe's."
        ) from error


def _load_optimizer(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Give the optimizer its state back; its settings stay those of the recipe."""
    by_id = {id(p): name for name, p in parameters.items()}
    tree = optimizer.state_dict()
    indices = [index for group in tree["param_groups"] for index in group["params"]]
    names = [by_id[id(p)] for group in optimizer.param_groups for p in group["params"]]
    index_of = dict(zip(names, indices, strict=True))
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            key, _, parameter = rest.partition("/")
            state.setdefault(index_of[parameter], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": tree["param_groups"]})


def read_state(folder: Path) -> RunState:
    """Read `state.json`.

    Raises:
        UnmaskError: it is damaged.
    """
    try:
        return RunState(**json.loads((folder / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UnmaskError(
            f"resume_from_checkpoint: {folder / STATE} cannot be read: {reason(error)}; name an earlier"
            " checkpoint."
        ) from error


def write_manifest(folder: Path) -> None:
    """List every file with size and checksum, and have all of it on the disk."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    with ThreadPoolExecutor(_READERS) as pool:
        sums = list(pool.map(sha256, files))
    entries = {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": checksum}
        for file, checksum in zip(files, sums, strict=True)
    }
    manifest = {"format_version": VERSION, "unmask_version": __version__, "files": entries}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    sync_folder(folder)


def damage(folder: Path, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint; None if nothing is.

    Args:
        contents: compare checksums, and not sizes alone.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, files = manifest["format_version"], manifest["files"]
        if version != VERSION:
            return f"its format is {version}, and this version of unmask reads {VERSION}"
        for name, entry in files.items():
            file = folder / name
            if not file.resolve().is_relative_to(folder.resolve()):
                return f"its {MANIFEST} names {name!r}, which is outside the folder"
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["size"]:
                return f"{name} has {file.stat().st_size:,} bytes instead of {entry['size']:,}"
        if STATE not in files:
            return f"its {MANIFEST} does not list {STATE}"
        if contents:
            with ThreadPoolExecutor(_READERS) as pool:
                found = pool.map(sha256, [folder / name for name in files])
                for (name, entry), checksum in zip(files.items(), found, strict=True):
                    if checksum != entry["sha256"]:
                        return f"{name} is damaged: its checksum is not that of the {MANIFEST}"
    except FileNotFoundError:
        return f"it has no {MANIFEST}, which a checkpoint written to its end has"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} is damaged ({reason(error)})"
    return None


def checkpoints(out: Path) -> list[Path]:
    """The training checkpoints of a run's folder, newest first, whole or damaged."""
    found = [folder for folder in out.glob(f"{PREFIX}*") if folder.is_dir()]
    numbered = [folder for folder in found if folder.name.removeprefix(PREFIX).isdecimal()]
    return sorted(numbered, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The optimizer step of a checkpoint, by its name."""
    return int(folder.name.removeprefix(PREFIX))


def newest_whole(out: Path, contents: bool = True) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint that is whole, and say what is wrong with each newer one."""
    wrong = []
    for folder in checkpoints(out):
        found = damage(folder, contents)
        if found is None:
            return folder, wrong
        wrong.append(f"{folder}: {found}")
    return None, wrong


def rotate(out: Path, limit: int | None, best_step: int | None) -> None:
    """Remove the oldest whole checkpoints beyond the `limit` newest; the best one stays, and counts."""
    if limit is None:
        return
    whole = [folder for folder in checkpoints(out) if damage(folder, contents=False) is None]
    stay = [folder for folder in whole if step_of(folder) == best_step]
    for folder in whole:
        if folder not in stay and (len(stay) < limit or folder == whole[0]):
            stay.append(folder)
    (out / PARTIAL).mkdir(exist_ok=True)
    for folder in whole:
        if folder not in stay:
            os.replace(folder, out / PARTIAL / folder.name)  # at once: half of one would stay for ever
    remove_partial(out)


def remove_partial(out: Path) -> None:
    """Remove what a run that was killed had not written to its end."""
    shutil.rmtree(out / PARTIAL, ignore_errors=True)


def _as_unmask_error(act: Any, folder: Path) -> Any:
    def run() -> None:
        try:
            act()
        except (OSError, SafetensorError, CheckpointException) as error:
            cause: BaseException = error
            if isinstance(error, CheckpointException):
                cause = next(iter(error.failures.values()))[0]
            raise UnmaskError(
                f"{folder}: could not be written: {reason(cause)}; earlier checkpoints are as they were: make"
                " room and resume with resume_from_checkpoint=auto."
            ) from error

    return run


@contextmanager
def _quiet_single_process() -> Iterator[None]:
    """torch warns wherever a checkpoint is read or written by one process alone, as it is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")
        yield

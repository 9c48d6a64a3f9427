"""A training checkpoint, whole or not there: written aside, listed in a manifest, verified, rotated."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from hashlib import file_digest
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from unmask import __version__
from unmask.data.hub import first_line
from unmask.errors import UnmaskError

VERSION = 1  # of the format
MANIFEST = "manifest.json"
PREFIX = "checkpoint-"
PARTIAL = ".partial"  # in the run's folder: what is not written to its end
STATE = "trainer_state.json"
RECIPE = "recipe.yaml"
_PICKLED = ("pytorch_model*.bin", "adapter_model.bin", "model*.bin", "model*.pt", "model*.pth", "*.pkl")
_READERS = 8  # files hashed at once


class AlsoSaved(Protocol):
    """Something that goes into each checkpoint beside the weights, and comes back from it.

    Both methods are called on every process. `save` gets the folder before its manifest is made; `load` is
    called after weights, optimizer and schedule are loaded.
    """

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


class Entry(BaseModel):
    """What a file of a checkpoint must be."""

    size: int
    sha256: str


class Manifest(BaseModel):
    """What a checkpoint holds; `files` by their paths in its folder."""

    model_config = ConfigDict(frozen=True)

    format_version: int = VERSION
    unmask_version: str = __version__
    step: int
    processes: int
    tokenizer_sha256: str | None = None
    files: dict[str, Entry] = {}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """List every file of `folder` with its size and checksum, and have all of it on the disk.

    Raises:
        OSError: the disk is full, or gone.
    """
    listed = (file for file in folder.rglob("*") if file.is_file() and file != folder / MANIFEST)
    files = sorted(listed)
    with ThreadPoolExecutor(_READERS) as pool:
        entries = list(pool.map(_entry, files))
    names = [file.relative_to(folder).as_posix() for file in files]
    manifest = manifest.model_copy(update={"files": dict(zip(names, entries, strict=True))})
    with (folder / MANIFEST).open("w", encoding="utf-8") as opened:
        opened.write(manifest.model_dump_json(indent=1) + "\n")
        opened.flush()
        os.fsync(opened.fileno())
    for inner in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        _sync_folder(inner)


def put_in_place(aside: Path, place: Path) -> None:
    """Move a whole checkpoint to its place; a damaged one of the same step that is there makes room."""
    if place.exists():
        old = aside.with_name(f"{place.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(place, old)
    os.replace(aside, place)
    _sync_folder(place.parent)
    remove_partial(place.parent)


def remove_partial(out: Path) -> None:
    """Remove what a run that was killed had not written to its end."""
    shutil.rmtree(out / PARTIAL, ignore_errors=True)


def rotate(out: Path, limit: int | None, keep: str | None = None) -> None:
    """Remove the oldest checkpoints beyond the `limit` newest whole ones; damaged ones are not counted.

    Args:
        keep: the best checkpoint, which stays and counts.
    """
    if limit is None:
        return
    best = None if keep is None else Path(keep).resolve()
    whole = [folder for folder in checkpoints(out) if damage(folder, contents=False) is None]
    stay = [folder for folder in whole if folder.resolve() == best]
    for folder in whole:
        if folder not in stay and (len(stay) < limit or folder == whole[0]):
            stay.append(folder)
    for folder in whole:
        if folder not in stay:  # at once, as it came: a half of it would be there for ever
            aside = out / PARTIAL / folder.name
            aside.parent.mkdir(exist_ok=True)
            os.replace(folder, aside)
    remove_partial(out)


def checkpoints(out: Path) -> list[Path]:
    """The training checkpoints of a run's folder, newest first, whole or damaged."""
    found = [folder for folder in out.glob(f"{PREFIX}*") if folder.is_dir()]
    numbered = [folder for folder in found if folder.name.removeprefix(PREFIX).isdecimal()]
    return sorted(numbered, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))


def newest_whole(out: Path) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint that is whole, and say what is wrong with each newer one."""
    wrong = []
    for folder in checkpoints(out):
        found = damage(folder)
        if found is None:
            return folder, wrong
        wrong.append(f"{folder}: {found}")
    return None, wrong


def verify(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint, and compare every file with it.

    Raises:
        UnmaskError: a file is missing or damaged, or is not one that can be loaded safely.
    """
    found = damage(folder)
    if found is not None:
        raise UnmaskError(f"resume_from_checkpoint: {folder}: {found}; name an earlier checkpoint, or auto.")
    return read_manifest(folder)


def damage(folder: Path, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint; None if nothing is.

    Args:
        contents: whether checksums are compared, and pickles looked into, not sizes alone.
    """
    try:
        manifest = read_manifest(folder)
        _check_files(folder, manifest, contents)
    except UnmaskError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def read_manifest(folder: Path) -> Manifest:
    """Read `manifest.json`.

    Raises:
        UnmaskError: there is none, it is damaged, or a newer version made it.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise UnmaskError(f"it has no {MANIFEST}, which a checkpoint written to its end has")
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        version = tree["format_version"]
        if isinstance(version, int) and version > VERSION:
            raise UnmaskError(
                f"its {MANIFEST} is of format {version}, made by a newer unmask"
                f" ({tree.get('unmask_version')}): upgrade unmask"
            )
        return Manifest.model_validate(tree)
    except UnmaskError:
        raise
    except (OSError, ValidationError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnmaskError(f"its {MANIFEST} is damaged") from error


def _check_files(folder: Path, manifest: Manifest, contents: bool) -> None:
    for name, entry in manifest.files.items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            raise UnmaskError(f"its {MANIFEST} names {name!r}, which is outside the folder")
        if not file.is_file():
            raise UnmaskError(f"{name} is missing")
        if file.stat().st_size != entry.size:
            raise UnmaskError(f"{name} has {file.stat().st_size:,} bytes instead of {entry.size:,}")
    if STATE not in manifest.files:
        raise UnmaskError(f"its {MANIFEST} does not list {STATE}")
    pickled = [file.name for pattern in _PICKLED for file in folder.glob(pattern)]
    if pickled:
        raise UnmaskError(f"{pickled[0]} are pickled weights, which may run code: only safetensors are read")
    if not contents:
        return
    files = [folder / name for name in manifest.files]
    with ThreadPoolExecutor(_READERS) as pool:
        for name, checksum in zip(manifest.files, pool.map(_checksum, files), strict=True):
            if checksum != manifest.files[name].sha256:
                raise UnmaskError(f"{name} is damaged: its checksum is not that of the {MANIFEST}")
    for metadata in folder.rglob(".metadata"):
        _check_sharded(metadata)


def _entry(file: Path) -> Entry:
    with file.open("rb") as opened:
        checksum = file_digest(opened, "sha256").hexdigest()
        os.fsync(opened.fileno())
        return Entry(size=os.fstat(opened.fileno()).st_size, sha256=checksum)


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return file_digest(opened, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# All that the index of a sharded checkpoint is made of.
_PLAIN = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("BytesStorageMetadata", "ChunkStorageMetadata", "TensorStorageMetadata"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
}


class _PlainUnpickler(pickle.Unpickler):
    """Reads the index of a sharded checkpoint; a name of anything that could run code is refused."""

    def find_class(self, module: str, name: str) -> Any:
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype) or found is torch.Size or name in _PLAIN.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place there")


def _check_sharded(metadata: Path) -> None:
    """Refuse what `torch.distributed.checkpoint`, which unpickles whatever it finds, would run."""
    name = f"{metadata.parent.name}/{metadata.name}"
    try:
        index = _PlainUnpickler(io.BytesIO(metadata.read_bytes())).load()
        for place, stored in index.storage_data.items():
            if hasattr(index.state_dict_metadata[place.fqn], "size"):
                continue  # a tensor, which is loaded as such
            file = metadata.parent / stored.relative_path
            if not file.resolve().is_relative_to(metadata.parent.resolve()):
                raise UnmaskError(f"{name} names {stored.relative_path!r}, which is outside the folder")
            with file.open("rb") as opened:
                opened.seek(stored.offset)
                torch.load(io.BytesIO(opened.read(stored.length)), weights_only=True)
    except (pickle.UnpicklingError, AttributeError, KeyError, TypeError, EOFError, RuntimeError) as error:
        raise UnmaskError(f"{name} cannot be loaded safely: {first_line(error)}") from error

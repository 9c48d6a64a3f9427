"""Files and folders written whole or not at all, their checksums, and who may write."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from unmask.errors import UnmaskError

ASIDE = ".partial"  # ends the names of files and folders that are being written
LOCK = f".lock{ASIDE}"


def reason(error: BaseException, limit: int = 200) -> str:
    """The first line of what a library says, for one of ours."""
    text = getattr(error, "strerror", None) or str(error)
    return text.strip().splitlines()[0][:limit] if text.strip() else type(error).__name__


@contextmanager
def atomic_dir(folder: str | Path) -> Iterator[Path]:
    """Yield a folder next to `folder` that replaces it, as a whole, once everything in it is on the disk.

    If anything fails, `folder` is as it was.

    Raises:
        UnmaskError: the disk is full, or the folder cannot be written.
    """
    target = Path(folder).absolute()  # `.` has no name of its own
    aside, old = (target.with_name(f".{target.name}.{what}") for what in ("partial", "old"))
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        sync_folder(aside)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)
        try:
            os.replace(aside, target)
        except OSError:
            if old.exists():
                os.replace(old, target)
            raise
        sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise UnmaskError(
            f"{folder}: could not be written: {reason(error)}; nothing already there was changed."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def atomic_write(path: Path, data: str | bytes) -> None:
    """Write a file next to `path` and move it there.

    Raises:
        UnmaskError: the disk is full, or the file cannot be written.
    """
    aside = path.with_name(f".{path.name}.partial")
    try:
        aside.write_bytes(data.encode(errors="backslashreplace") if isinstance(data, str) else data)
        sync(aside)
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UnmaskError(f"{path}: could not be written: {reason(error)}.") from error


def check_writable(folder: str | Path) -> None:
    """Make a folder and find out now whether it can be written.

    Raises:
        UnmaskError: it cannot.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UnmaskError(f"{folder}: cannot be written: {reason(error)}.") from error


def check_output_file(file: Path, option: str) -> None:
    """Check that a file can be written, before the work that fills it.

    Raises:
        UnmaskError: names the option; the path is a folder, its folder is missing, or it is not writable.
    """
    if file.is_dir():
        raise UnmaskError(f"{option}: {file} is a folder; name a file in it.")
    folder = file.absolute().parent
    if not folder.is_dir():
        raise UnmaskError(f"{option}: {file} cannot be written: there is no folder {folder}; make it first.")
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise UnmaskError(f"{option}: {file} cannot be written to.")


def sha256(path: Path) -> str:
    """Checksum of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Have the contents of a file, or the entries of a folder, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Have everything in a folder on the disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


@contextmanager
def directory_lock(folder: str | Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes from writing to the folder; the lock is released when its holder exits or dies.

    Where the file system has no locks, nothing is locked.

    Args:
        what: what is done there, for the message to the other process ("preparing data").
        wait: wait for the other process instead of raising.

    Raises:
        UnmaskError: Another process holds the lock, or nothing can be written there.
    """
    try:
        import fcntl
    except ImportError:  # Windows has none
        yield
        return
    path = Path(folder) / LOCK
    check_writable(folder)
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by child processes
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            if not wait:
                raise UnmaskError(
                    f"{folder}: {holder} is {what} here; wait until it is done, or name another folder."
                ) from error
            time.sleep(0.2)
            continue
        except OSError:
            file.close()
            yield
            return
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # the holder before removed it
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()

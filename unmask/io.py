"""Files and folders written whole or not at all, their checksum, and who may write."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from unmask.errors import UnmaskError

ASIDE = ".partial"  # ends the names of files and folders that are being written
LOCK = f".lock{ASIDE}"


def reason(error: BaseException, limit: int = 200) -> str:
    """The first line of what a library says, for one of ours."""
    text = (getattr(error, "strerror", None) or str(error)).strip()
    return text.splitlines()[0][:limit] if text else type(error).__name__


@contextmanager
def atomic_dir(folder: str | Path) -> Iterator[Path]:
    """Yield a folder next to `folder` that replaces it, as a whole, once everything in it is on the disk.

    Raises:
        UnmaskError: the disk is full, or the folder cannot be written; `folder` is as it was.
    """
    target = Path(folder).absolute()  # `.` has no name
    aside, old = (target.with_name(f".{target.name}{end}") for end in (ASIDE, ".old"))
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        for path in (*aside.rglob("*"), aside):
            sync(path)
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
        problem = f"{folder}: could not be written: {reason(error)}"
        raise UnmaskError(f"{problem}; nothing already there was changed.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def atomic_write(path: Path, data: str | bytes) -> None:
    """Write a file next to `path` and move it there.

    Raises:
        UnmaskError: the disk is full, or the file cannot be written.
    """
    aside = path.with_name(f".{path.name}{ASIDE}")
    try:
        aside.write_bytes(data.encode(errors="backslashreplace") if isinstance(data, str) else data)
        sync(aside)
        os.replace(aside, path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise UnmaskError(f"{path}: could not be written: {reason(error)}.") from error


def check_output_file(file: Path, option: str) -> None:
    """Check that a file can be written, before the work that fills it.

    Raises:
        UnmaskError: names the option; the path is a folder, its folder is missing, or it is not writable.
    """
    folder = file.absolute().parent
    if file.is_dir():
        problem = "is a folder; name a file in it"
    elif not folder.is_dir():
        problem = f"cannot be written: there is no folder {folder}; make it first"
    elif not os.access(file if file.exists() else folder, os.W_OK):
        problem = "cannot be written: no permission"
    else:
        return
    raise UnmaskError(f"{option}: {file} {problem}.")


def sha256(path: Path) -> str:
    """Checksum of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_commit(folder: Path, file: str = ".") -> str | None:
    """The git commit of a folder, ending in -dirty if tracked files have changed since; None if git does not
    know the file: a package may be installed inside another project's folder."""

    def git(*command: str) -> str:
        command = ("git", "-C", str(folder), *command)
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "--", file)
        return git("describe", "--always", "--dirty", "--exclude=*", "--abbrev=40")
    except (OSError, subprocess.SubprocessError):
        return None


def sync(path: Path) -> None:
    """Have the contents of a file, or the entries of a folder, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def directory_lock(folder: str | Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes from writing to a folder; the lock ends with the process. Without file locks, do nothing.

    Args:
        what: what is done there, for the message to the other process ("preparing data").
        wait: wait for the other process instead of raising.

    Raises:
        UnmaskError: another process holds the lock, or nothing can be written there.
    """
    path, held = Path(folder) / LOCK, False
    while not held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise UnmaskError(f"{folder}: cannot be written: {reason(error)}.") from error
        try:
            fcntl.lockf(
                file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
            )  # child processes do not inherit it
            held = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
        except (BlockingIOError, PermissionError) as error:
            with file:
                file.seek(0)
                holder = f"{file.read().strip() or 'another process'} is {what} here"
            raise UnmaskError(
                f"{folder}: {holder}; wait until it is done, or name another folder."
            ) from error
        except OSError:  # the file system has no locks
            held = True
        if not held:  # the holder before removed the file
            file.close()
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()

"""Files and folders that are written whole or not at all, checksums, and a lock for one folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from unmask.errors import UnmaskError

ASIDE = ".partial"  # ends the names of files and folders that are being written
LOCK = f".lock{ASIDE}"


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Write a file whole or not at all."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}{ASIDE}")
    data = content.encode() if isinstance(content, str) else content
    try:
        aside.write_bytes(data)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_dir(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`, which takes its name, and its place, when the block ends well."""
    folder = Path(folder)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}{ASIDE}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_writable(folder: str | Path) -> None:
    """Make `folder`, and check that files can be written to it.

    Raises:
        UnmaskError: They cannot.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}{ASIDE}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UnmaskError(f"{folder}: cannot be written: {error.strerror or error}.") from error


def sha256(path: str | Path) -> str:
    """Compute the checksum of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
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

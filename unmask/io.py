"""Folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from unmask.errors import UnmaskError


@contextmanager
def atomic_dir(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder next to `folder`; it replaces that when the block ends well, and is else removed.

    Raises:
        UnmaskError: the disk is full or the folder cannot be written; `folder` is as it was.
    """
    target = Path(folder).absolute()  # `.` has no name of its own
    aside, old = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "old"))
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)
        try:
            os.replace(aside, target)
        except OSError:
            if old.exists():
                os.replace(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnmaskError(
            f"{folder}: could not be written: {reason}; nothing already there was changed."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)

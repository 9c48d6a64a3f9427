"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from unmask.errors import UnmaskError


def atomic_write(path: Path, data: str | bytes) -> None:
    """Write a file next to its final path and move it there.

    Raises:
        UnmaskError: the file could not be written; one that was there is unchanged.
    """
    partial = path.absolute().with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(data.encode(errors="backslashreplace") if isinstance(data, str) else data)
        os.replace(partial, path)
    except OSError as error:
        raise UnmaskError(f"{path} could not be written: {error.strerror}.") from error
    finally:
        partial.unlink(missing_ok=True)


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

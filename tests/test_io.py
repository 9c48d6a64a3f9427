"""Folders and files are written whole or not at all, by one process at a time."""

from __future__ import annotations

import multiprocessing
import os
import re
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest

from unmask.errors import UnmaskError
from unmask.io import atomic_dir, atomic_write, directory_lock


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an old file in it."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old").write_text("old")
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_new(folder: Path, error: BaseException | None = None) -> None:
    with atomic_dir(folder) as aside:
        (aside / "new").write_text("new")
        if error is not None:
            raise error


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "deep" / "out"
    (tmp_path / "deep" / ".out.partial" / "half").mkdir(parents=True)  # after a crash
    for text in ("first", "second"):
        with atomic_dir(folder) as aside:
            assert aside.parent == folder.parent
            (aside / text).write_text(text)
            assert not (folder / text).exists()
        assert names(folder) == [text] and names(folder.parent) == ["out"]
    monkeypatch.chdir(folder)
    write_new(Path())
    assert names(folder) == ["new"] and names(folder.parent) == ["out"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(28, "No space left on device"),
            "out: could not be written: No space left on device; nothing",
        ),
        (RuntimeError("bug"), "bug"),
        (KeyboardInterrupt("ctrl-C"), "ctrl-C"),
    ],
)
def test_the_old_folder_stays_on_failure(folder: Path, error: BaseException, message: str) -> None:
    with pytest.raises(UnmaskError if isinstance(error, OSError) else type(error), match=re.escape(message)):
        write_new(folder, error)
    assert names(folder.parent) == ["out"] and names(folder) == ["old"]


def test_the_old_folder_stays_when_the_move_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    move = os.replace

    def fail(source: Any, target: Any) -> None:
        if Path(target) == folder and (Path(source) / "new").exists():
            raise OSError(5, "Input/output error")
        move(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UnmaskError, match="nothing already there was changed"):
        write_new(folder)
    assert names(folder.parent) == ["out"] and names(folder) == ["old"]


def test_where_nothing_can_be_written(folder: Path) -> None:
    for write in (lambda path: atomic_write(path, "new"), write_new):
        with pytest.raises(UnmaskError, match="could not be written"):
            write(folder / "old" / "new")
    assert (folder / "old").read_text() == "old"


def hold(folder: Path, held: Event, release: Event) -> None:
    with directory_lock(folder, "training"):
        held.set()
        release.wait()


def test_one_process_at_a_time_writes_to_a_folder(folder: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    held, release = spawn.Event(), spawn.Event()
    other = spawn.Process(target=hold, args=(folder, held, release))
    other.start()
    assert held.wait(60)
    with pytest.raises(UnmaskError, match=f"process {other.pid} on .* is training here"):
        hold(folder, held, release)
    release.set()
    with directory_lock(folder, "training", wait=True):
        assert names(folder) == [".lock.partial", "old"]
    other.join()
    assert names(folder) == ["old"]

"""Folders are written whole or not at all."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from unmask import io
from unmask.errors import UnmaskError
from unmask.io import atomic_dir


def test_atomic_dir_replaces_the_folder_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    for text in ("first", "second"):
        with atomic_dir(folder) as aside:
            assert aside.parent == folder.parent
            (aside / text).write_text(text)
            assert not (folder / text).exists()
        assert [file.name for file in folder.iterdir()] == [text]
        assert [file.name for file in folder.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("bug"), KeyboardInterrupt()]
)
def test_atomic_dir_keeps_the_old_folder_on_failure(tmp_path: Path, error: BaseException) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old").write_text("old")

    def write() -> None:
        with atomic_dir(folder) as aside:
            (aside / "new").write_text("new")
            raise error

    if isinstance(error, OSError):
        expected = re.escape(f"{folder}: could not be written: No space left on device; nothing")
        with pytest.raises(UnmaskError, match=expected):
            write()
    else:
        with pytest.raises(type(error)):
            write()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert [file.name for file in folder.iterdir()] == ["old"]


def test_atomic_dir_keeps_the_old_folder_when_the_move_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old").write_text("old")
    move = io.os.replace

    def fail(source: Any, target: Any) -> None:
        if Path(target) == folder and (Path(source) / "new").exists():
            raise OSError(5, "Input/output error")
        move(source, target)

    monkeypatch.setattr(io.os, "replace", fail)

    with (
        pytest.raises(UnmaskError, match="nothing already there was changed"),
        atomic_dir(folder) as aside,
    ):
        (aside / "new").write_text("new")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert [file.name for file in folder.iterdir()] == ["old"]


def test_atomic_dir_starts_afresh_after_a_crash(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    stale = tmp_path / ".out.partial"
    stale.mkdir()
    (stale / "half").write_text("")
    with atomic_dir(folder) as aside:
        (aside / "new").write_text("new")
    assert [file.name for file in folder.iterdir()] == ["new"]


def test_atomic_dir_onto_the_working_folder_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with atomic_dir(Path()) as aside:
        (aside / "new").write_text("new")
    assert [file.name for file in tmp_path.iterdir()] == ["here"]
    assert [file.name for file in here.iterdir()] == ["new"]


def test_atomic_dir_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnmaskError, match="could not be written"), atomic_dir(tmp_path / "file" / "out"):
        pass

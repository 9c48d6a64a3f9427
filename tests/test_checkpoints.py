"""Folders as a checkpoint: whole, or known not to be."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from unmask.errors import UnmaskError
from unmask.training import checkpoints
from unmask.training.checkpoints import (
    MANIFEST,
    PARTIAL,
    Manifest,
    damage,
    newest_whole,
    put_in_place,
    read_manifest,
    rotate,
    verify,
    write_manifest,
)


def written(out: Path, step: int, **files: str) -> Path:
    """A checkpoint of one process with a state and a weight file, both of few bytes."""
    folder = out / f"checkpoint-{step}"
    (folder / "part").mkdir(parents=True)
    (folder / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    (folder / "part" / "weights").write_text("weights")
    for name, text in files.items():
        (folder / name).write_text(text)
    write_manifest(folder, Manifest(step=step, processes=1))
    return folder


def tree_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def names(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()}


def test_the_manifest_lists_what_hashlib_says(tmp_path: Path) -> None:
    folder = written(tmp_path, 3)
    tree = json.loads((folder / MANIFEST).read_text())
    assert (tree["format_version"], tree["step"], tree["processes"]) == (1, 3, 1)
    assert tree["files"] == {
        name: {
            "size": len((folder / name).read_bytes()),
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        }
        for name in ("part/weights", "trainer_state.json")
    }
    assert verify(folder).step == 3 and damage(folder) is None


def change(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)


def edit(folder: Path, **fields: Any) -> None:
    tree = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**tree, **fields}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / MANIFEST).unlink(), "has no manifest.json"),
        (lambda f: change(f, MANIFEST, "{"), "manifest.json is damaged"),
        (lambda f: change(f, MANIFEST, "[]"), "manifest.json is damaged"),
        (lambda f: edit(f, step="many"), "manifest.json is damaged"),
        (lambda f: edit(f, files={}), "does not list trainer_state.json"),
        (lambda f: (f / "part/weights").unlink(), "part/weights is missing"),
        (lambda f: change(f, "part/weights", "weight"), "part/weights has 6 bytes instead of 7"),
        (lambda f: change(f, "part/weights", "Weights"), "part/weights is damaged: its checksum"),
        (lambda f: change(f, "pytorch_model.bin", ""), "pytorch_model.bin are pickled weights"),
        (lambda f: edit(f, format_version=2, unmask_version="9"), r"made by a newer unmask \(9\): upgrade"),
    ],
)
def test_damage_is_named(tmp_path: Path, spoil: Any, message: str) -> None:
    folder = written(tmp_path, 1)
    spoil(folder)
    with pytest.raises(UnmaskError, match=rf"checkpoint-1: .*{message}") as caught:
        verify(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("outside", ["../secret", "part/../../secret", "/{out}/secret", "link"])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, outside: str) -> None:
    folder, secret = written(tmp_path, 1), tmp_path / "secret"
    secret.write_text("key")
    (folder / "link").symlink_to(secret)
    outside = outside.format(out=tmp_path)
    entry = {"size": 3, "sha256": hashlib.sha256(b"key").hexdigest()}
    edit(folder, files={**json.loads((folder / MANIFEST).read_text())["files"], outside: entry})
    with pytest.raises(UnmaskError, match=f"names '{outside}', which is outside the folder"):
        verify(folder)


def test_the_newest_whole_one_is_found(tmp_path: Path) -> None:
    assert newest_whole(tmp_path) == (None, [])
    for step in (2, 9, 10):
        written(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / PARTIAL / "checkpoint-11").mkdir(parents=True)
    assert newest_whole(tmp_path) == (tmp_path / "checkpoint-10", [])
    change(tmp_path / "checkpoint-10", "trainer_state.json", "")
    found, wrong = newest_whole(tmp_path)
    assert found == tmp_path / "checkpoint-9"
    assert len(wrong) == 1 and "checkpoint-10: trainer_state.json has 0 bytes" in wrong[0]


def test_rotation_keeps_the_newest_whole_ones_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        written(tmp_path, step)
    change(tmp_path / "checkpoint-4", "part/weights", "")
    rotate(tmp_path, None)
    assert len(names(tmp_path)) == 5
    rotate(tmp_path, 2)
    # The damaged one is neither counted nor touched.
    assert names(tmp_path) == {"checkpoint-3", "checkpoint-4", "checkpoint-5"}
    for step in (6, 7):
        written(tmp_path, step)
    rotate(tmp_path, 2, keep=str(tmp_path / "checkpoint-3"))
    assert names(tmp_path) == {"checkpoint-3", "checkpoint-4", "checkpoint-7"}
    rotate(tmp_path, 1, keep=str(tmp_path / "checkpoint-3"))  # the newest stays too: to go on from
    assert names(tmp_path) == {"checkpoint-3", "checkpoint-4", "checkpoint-7"}
    rotate(tmp_path, 1)
    assert names(tmp_path) == {"checkpoint-4", "checkpoint-7"}


def test_rotation_never_takes_the_last_whole_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        written(tmp_path, step)
    for step in (2, 3):
        change(tmp_path / f"checkpoint-{step}", "part/weights", "")
    rotate(tmp_path, 1)
    assert newest_whole(tmp_path)[0] == tmp_path / "checkpoint-1"


def test_a_new_one_takes_the_place_of_a_damaged_one(tmp_path: Path) -> None:
    change(written(tmp_path, 4), "part/weights", "")
    aside = written(tmp_path / PARTIAL, 4, new="new")
    put_in_place(aside, tmp_path / "checkpoint-4")
    assert names(tmp_path) == {"checkpoint-4"}
    assert (tmp_path / "checkpoint-4" / "new").exists() and damage(tmp_path / "checkpoint-4") is None


def test_everything_is_on_the_disk_before_the_manifest_and_that_before_the_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    real_sync, real_move = os.fsync, os.replace

    def sync(handle: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        real_sync(handle)

    def move(source: Path, target: Path) -> None:
        done.append(f"move {Path(target).name}")
        real_move(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", move)
    aside = written(tmp_path / PARTIAL, 4)
    put_in_place(aside, tmp_path / "checkpoint-4")
    assert sorted(done[:2]) == ["trainer_state.json", "weights"]
    assert done[2:] == [MANIFEST, "part", "checkpoint-4", "move checkpoint-4", tmp_path.name]


# Sharded checkpoints, which torch reads with pickle.


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint with a sharded part, as torch writes it."""
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    state = {"w": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16), "step": 3}
    save_sharded(state, folder)
    return folder


def save_sharded(state: dict[str, Any], folder: Path) -> None:
    with pytest.warns(UserWarning, match="a single process"):
        save(state, checkpoint_id=folder / "optimizer_0", no_dist=True)


def finish(folder: Path) -> Path:
    write_manifest(folder, Manifest(step=1, processes=1))
    return folder


def test_a_sharded_checkpoint_of_torch_passes(sharded: Path) -> None:
    verify(finish(sharded))


def test_code_in_the_index_of_a_sharded_checkpoint_is_refused_unrun(sharded: Path, tmp_path: Path) -> None:
    (sharded / "optimizer_0/.metadata").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(UnmaskError, match=r"optimizer_0/.metadata cannot be loaded safely: .* no place"):
        verify(finish(sharded))
    assert not (tmp_path / "ran").exists()


def test_code_in_the_contents_of_a_sharded_checkpoint_is_refused_unrun(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    save_sharded({"step": Evil(tmp_path / "ran")}, folder)
    (tmp_path / "ran").unlink(missing_ok=True)
    with pytest.raises(UnmaskError, match=r"optimizer_0/.metadata cannot be loaded safely"):
        verify(finish(folder))
    assert not (tmp_path / "ran").exists()


def test_read_manifest_refuses_nothing_that_write_manifest_wrote(tmp_path: Path) -> None:
    folder = written(tmp_path, 1)
    manifest = read_manifest(folder)
    assert manifest.unmask_version == checkpoints.__version__
    assert manifest == Manifest.model_validate(manifest.model_dump())

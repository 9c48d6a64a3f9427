from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import unmask
from unmask import byte_tokenizer
from unmask.data.manifest import fingerprint
from unmask.config import recipe_from_dict
from unmask.training import provenance
from unmask.training.provenance import Provenance, file_hash


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(b'{"instruction": "a", "output": "b"}\n')
    (tmp_path / "more").mkdir()
    for name in ("b", "c"):
        (tmp_path / "more" / f"{name}.jsonl").write_text(name)
    return tmp_path


def facts(**data: Any) -> dict[str, Any]:
    recipe = recipe_from_dict(
        {
            "training_mode": "sft",
            "seed": 7,
            "model": {"tokenizer": "bytes", "config": {"model_type": "qwen3"}},
            "data": {"dataset_name": "a.jsonl", **data},
        }
    )
    return Provenance(recipe, byte_tokenizer(), "cpu", 2, main=True).facts


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_recipe_versions_seed_and_tokenizer_are_there() -> None:
    found = facts()
    assert found["recipe"]["seed"] == 7 and found["recipe"]["data"]["block_size"] == 1024
    assert found["versions"]["unmask"] == unmask.__version__
    assert {"python", "torch", "transformers", "accelerate", "datasets"} <= set(found["versions"])
    assert found["tokenizer_sha256"] == fingerprint(byte_tokenizer())
    assert found["processes"] == 2 and found["device"].startswith("CPU (")
    assert found["command"] and found["started_from"] is None
    assert json.loads(json.dumps(found)) == found


def test_every_file_of_the_data_is_hashed(place: Path) -> None:
    found = facts(dataset_name=["a.jsonl", "more"], eval_dataset_name="more/b.jsonl")
    content = (place / "a.jsonl").read_bytes()
    assert found["data"] == {
        "a.jsonl": {"files": {"a.jsonl": {"bytes": len(content), "sha256": sha(content)}}},
        "more": {"files": {f"{n}.jsonl": {"bytes": 1, "sha256": sha(n.encode())} for n in ("b", "c")}},
    }
    assert found["evaluation_data"] == {
        "more/b.jsonl": {"files": {"b.jsonl": {"bytes": 1, "sha256": sha(b"b")}}}
    }


def test_hub_names_and_urls_are_named() -> None:
    assert facts(dataset_name="owner/name")["data"] == {"owner/name": {"hub": "owner/name"}}


def test_of_many_files_it_says_how_many_are_not_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "MOST", 1)
    found = facts(dataset_name="more")["data"]["more"]
    assert list(found["files"]) == ["b.jsonl"] and found["not_hashed"] == 1


def test_of_a_long_file_size_and_ends_are_hashed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "WHOLE", 10)
    monkeypatch.setattr(provenance, "END", 2)
    file = place / "long"
    file.write_bytes(b"ab........yz")
    first = file_hash(file)
    assert first == {"bytes": 12, "sha256_of_ends": sha(b"12abyz")}
    file.write_bytes(b"ab........yx")
    assert file_hash(file) != first
    file.write_bytes(b"0123456789")
    assert file_hash(file) == {"bytes": 10, "sha256": sha(b"0123456789")}


def test_the_weights_that_are_started_from_are_hashed(place: Path) -> None:
    (place / "base").mkdir()
    (place / "base" / "model.safetensors").write_bytes(b"weights")
    recipe = recipe_from_dict(
        {"model": {"name_or_path": "base", "tokenizer": "bytes"}, "data": {"dataset_name": "a.jsonl"}}
    )
    started = Provenance(recipe, byte_tokenizer(), "cpu", 1, main=True).facts["started_from"]
    assert started == {
        "folder": "base",
        "files": {"model.safetensors": {"bytes": 7, "sha256": sha(b"weights")}},
    }


def git(*command: str) -> str:
    settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *settings, *command], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_commit_of_the_working_folder_and_its_changes(place: Path) -> None:
    assert facts()["git"]["working_folder"] is None
    git("init", "-q")
    assert facts()["git"]["working_folder"] is None  # nothing is committed
    git("add", "a.jsonl")
    git("commit", "-qm", "data")
    assert facts()["git"]["working_folder"] == {"commit": git("rev-parse", "HEAD"), "changed": False}
    (place / "a.jsonl").write_text('{"instruction": "other", "output": "b"}\n')
    assert facts()["git"]["working_folder"]["changed"] is True
    installed = place / "site-packages"
    installed.mkdir()
    (installed / "x.py").write_text("")
    assert provenance._commit(installed, str(installed / "x.py")) is None  # in the folder, not of it


def test_the_main_process_alone_writes(place: Path) -> None:
    recipe = recipe_from_dict(
        {
            "model": {"tokenizer": "bytes", "config": {"model_type": "qwen3"}},
            "data": {"dataset_name": "a.jsonl"},
        }
    )
    for main in (False, True):
        one = Provenance(recipe, byte_tokenizer(), "cpu", 1, main)
        one.save(place)
        assert (place / "provenance.json").exists() == main
    assert json.loads((place / "provenance.json").read_text("utf-8")) == one.facts
    assert one.rows()["made with"].startswith(f"unmask {unmask.__version__}, python 3.")
    assert one.rows()["seed"] == "0" and one.rows()["devices"].startswith("1 x CPU")

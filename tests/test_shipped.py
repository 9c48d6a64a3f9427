"""Recipes and the demo's data are found by name where there is no clone, and what a run saves does not say where."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import assert_same_run, autoregressive_folder, run_cli

from unmask import UnmaskError, load_recipe
from unmask.data.files import read_records
from unmask.shipped import find_shipped, purpose, recipe_text, shipped_recipes

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
SHORT = [
    *(
        "max_steps=4",
        "save_steps=2",
        "log_steps=1",
        "eval_steps=2",
        "data.eval_size=8",
        "data.max_records=64",
    ),
    *("global_batch_size=4", "evaluation.limit=2", "report_to=[]", "save_total_limit=null"),
    *("model.config.hidden_size=16", "model.config.num_hidden_layers=1"),
]


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_recipes_are_listed_with_their_purpose_in_sixty_columns() -> None:
    environment = {**os.environ, "COLUMNS": "60"}
    command = [sys.executable, "-m", "unmask", "recipe", "list"]
    said = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    assert max(map(len, said.splitlines())) <= 60
    names = [line.split()[0] for line in said.splitlines() if not line.startswith(" ")]
    assert names == sorted(file.stem for file in RECIPES.glob("*.yaml"))
    assert "The demo: a small Qwen3 diffusion" in said


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_is_shown_as_it_is_and_begins_with_its_purpose(name: str, empty: Path) -> None:
    said = run_cli("recipe", "show", name)
    assert said.code == 0 and said.out == (RECIPES / f"{name}.yaml").read_text()
    assert 20 < len(purpose(said.out)) < 120 and "\n" not in purpose(said.out)
    (empty / "my.yaml").write_text(said.out)
    assert load_recipe("my.yaml") == load_recipe(name) == load_recipe(RECIPES / f"{name}.yaml")


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(
        UnmaskError, match=r"no recipe 'tiny' comes with unmask; the nearest is train_tiny_sft"
    ):
        recipe_text("tiny")
    assert run_cli("recipe", "show", "train_qwen3_1.7").err.count("the nearest is train_qwen3_1.7b:") == 1


def test_what_is_here_comes_before_what_comes_with_unmask(empty: Path) -> None:
    shipped = str(RECIPES / "tiny" / "heldout.jsonl")
    assert (
        find_shipped("recipes/tiny/heldout.jsonl") == find_shipped("./recipes/tiny/heldout.jsonl") == shipped
    )
    assert find_shipped("recipes/tiny/held*.jsonl") == str(RECIPES / "tiny" / "held*.jsonl")
    for elsewhere in ("recipes/mine.jsonl", "tiny/heldout.jsonl", f"{empty}/recipes/tiny/heldout.jsonl"):
        assert find_shipped(elsewhere) == elsewhere
    assert len(list(read_records("recipes/tiny/heldout.jsonl"))) == 300

    (empty / "recipes" / "tiny").mkdir(parents=True)
    (empty / "recipes" / "tiny" / "heldout.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    assert [record["instruction"] for record, _ in read_records("recipes/tiny/heldout.jsonl")] == ["a"]
    (empty / "train_tiny_sft").write_text("seed: 5\nmodel: {name_or_path: x}\ndata: {dataset_name: y}\n")
    assert load_recipe("train_tiny_sft").seed == 5


def test_the_demo_runs_by_name_and_its_saved_recipe_resumes_in_a_clone(empty: Path) -> None:
    said = run_cli("train", "train_tiny_sft", *SHORT, "checkpoint_save_dir=whole")
    assert said.code == 0 and "of 2 held-out prompts" in said.out, said.err
    saved = yaml.safe_load((empty / "whole" / "recipe.yaml").read_text())
    assert saved["data"]["dataset_name"] == "recipes/tiny/train.jsonl"
    assert saved["evaluation"]["prompts"] == "recipes/tiny/heldout.jsonl"
    origin = json.loads((empty / "whole" / "final" / "provenance.json").read_text())
    for names in (origin["data"], origin["evaluation_data"]):
        [(name, contents)] = names.items()
        assert list(contents["files"]) == [str(RECIPES.parent / name)]  # which file, with its checksum

    shutil.copytree(empty / "whole" / "checkpoint-2", empty / "resumed" / "checkpoint-2")
    (empty / "recipes").symlink_to(RECIPES)
    more = (*SHORT, "checkpoint_save_dir=resumed", "resume_from_checkpoint=auto")
    said = run_cli("train", "recipes/train_tiny_sft.yaml", *more)
    assert said.code == 0 and "resuming from" in said.out, said.err
    assert "the recipe differs from that of the checkpoint in checkpoint_save_dir\n" in said.out
    assert_same_run(empty / "whole", empty / "resumed")


def test_data_and_prepare_take_a_name_and_an_edited_copy(empty: Path) -> None:
    (empty / "my.yaml").write_text(recipe_text("train_tiny_sft").replace("seed: 0", "seed: 1"))
    said = run_cli("data", "my.yaml", "data.max_records=64", "data.eval_size=8", "--show", "1")
    assert said.code == 0 and "held out: 8 sequences" in said.out, said.err
    said = run_cli("prepare", "train_tiny_sft", "out", "data.max_records=64", "--workers", "1")
    assert said.code == 0 and "out: 64 sequences of 64 records" in said.out, said.err


def test_prompts_and_texts_of_the_demo_are_found(empty: Path) -> None:
    base = autoregressive_folder(empty / "base", max_position_embeddings=4096)
    assert run_cli("convert", base, "model").code == 0
    for file in ("recipes/tiny/heldout.jsonl", "recipes/tiny/words.txt"):
        said = run_cli("score", "model", file, "--limit", "2", "--samples", "2")
        assert said.code == 0, said.err
        limits = ("--max-new-tokens", "2", "--steps", "1", "--batch-size", "512")
        said = run_cli("generate", "model", "--prompts", file, "--out", f"{Path(file).stem}.out", *limits)
        assert said.code == 0, said.err


@pytest.mark.slow
def test_the_task_of_the_demo_is_found(empty: Path) -> None:
    assert run_cli("convert", autoregressive_folder(empty / "base"), "model").code == 0
    task = ("--tasks", "tiny_words", "--include-path", "recipes/tiny", "--limit", "3", "--canvas", "4")
    said = run_cli("eval", "model", *task, "--chat", "--out", "results")
    assert said.code == 0, said.err
    lines = (empty / "results" / "samples_tiny_words.jsonl").read_text().splitlines()
    first = json.loads((RECIPES / "tiny" / "heldout.jsonl").read_text().splitlines()[0])
    assert len(lines) == 3 and json.loads(lines[0])["doc"]["instruction"] == first["instruction"]

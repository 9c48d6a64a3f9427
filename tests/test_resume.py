"""Going on from a checkpoint: only from a whole one, of this run, and as if it had never stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoints import Evil, edit, tree_of
from test_run import MODEL, assert_close, losses, saved, train, write_data

from unmask.errors import UnmaskError
from unmask.training.checkpoints import MANIFEST, PARTIAL, Manifest, write_manifest

SHORT: dict[str, Any] = {
    "max_steps": 4,
    "save_steps": 2,
    "save_total_limit": None,
    "lr_scheduler__type": "constant",
    "data__eval_size": 0,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with checkpoints after two and four, interrupted before its end."""
    folder = tmp_path_factory.mktemp("run")
    write_data(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(**SHORT)
        shutil.rmtree(folder / "out/final")
    return folder


@pytest.fixture(autouse=True)
def place(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def resume(out: str = "out", start: str = "auto", **changes: Any) -> str:
    """Go on to step 6; returns what was printed."""
    return train(out, **{**SHORT, "max_steps": 6, "resume_from_checkpoint": start, **changes})[1]


def history(folder: Path, key: str = "loss") -> list[float]:
    return losses(json.loads((folder / "trainer_state.json").read_text())["log_history"], key)


# The checkpoint that is taken.


def test_auto_goes_on_from_the_newest_whole_one_and_names_a_damaged_one(place: Path) -> None:
    (place / "out/checkpoint-4/model.safetensors").write_bytes(b"cut")
    stale = place / "out" / PARTIAL / "checkpoint-6"
    stale.mkdir(parents=True)
    said = resume(max_steps=4)
    assert "warning: out/checkpoint-4: model.safetensors has 3 bytes instead of" in said
    assert "step 3/4" in said and "step 2/4" not in said
    assert not stale.exists()
    assert len(saved("out/checkpoint-4")) == len(saved("out/checkpoint-2"))  # written again in its place


def test_auto_does_not_start_anew_over_damaged_checkpoints(place: Path) -> None:
    for step in (2, 4):
        (place / f"out/checkpoint-{step}/manifest.json").unlink()
    before = tree_of(place)
    with pytest.raises(UnmaskError, match=r"no checkpoint in out is whole: .*-4: .*no manifest.*-2: "):
        resume()
    assert tree_of(place) == before


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.mark.parametrize("file", [*FILES, "recipe.yaml", "pending.json", "config.json"])
def test_a_named_checkpoint_that_is_damaged_is_refused(place: Path, file: str) -> None:
    path = place / "out/checkpoint-4" / file
    path.write_bytes(path.read_bytes()[:-1] + b"~")
    before = tree_of(place)
    with pytest.raises(UnmaskError, match=rf"out/checkpoint-4: {file} is damaged: its checksum .*earlier"):
        resume("other", "out/checkpoint-4")
    assert {p: b for p, b in tree_of(place).items() if not p.startswith("other")} == before


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_code_in_a_checkpoint_never_runs(place: Path, file: str) -> None:
    folder = place / "out/checkpoint-4"
    torch.save(Evil(place / "ran"), folder / file)
    write_manifest(folder, Manifest(step=4, processes=1))  # the checksums of whoever put it there
    with pytest.raises(UnmaskError, match="out/checkpoint-4 cannot be loaded: holds code") as caught:
        resume()
    assert not (place / "ran").exists() and "\n" not in str(caught.value)


def test_an_older_checkpoint_is_not_gone_on_from_beside_newer_ones(place: Path) -> None:
    with pytest.raises(UnmaskError, match="checkpoint-2 is not the newest of its folder: move checkpoint-4"):
        resume(start="out/checkpoint-2")
    assert "step 3/6" in resume("other", "out/checkpoint-2")


# A run with another recipe.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 6}, r"seed was 5 and is now 6; set it back, or allow it with resume.allow=\[seed\]"),
        ({"global_batch_size": 4}, "global_batch_size was 8 and is now 4"),
        ({"data__block_size": 90}, "data.block_size was 96 and is now 90"),
        ({"model__loss": "uniform"}, 'model.loss was "elbo" and is now "uniform"'),
        ({"optimizer__learning_rate": 0.1, "seed": 6}, "seed was .*, optimizer.learning_rate was 0.005 and"),
        ({"optimizer": {"type": "adafactor"}}, "optimizer.type was .* cannot be loaded into that"),
        (
            {"optimizer": {"type": "adafactor"}, "resume__allow": ["optimizer"]},
            "optimizer.type was .* cannot be loaded into that: start a new run",
        ),
    ],
)
def test_another_recipe_is_refused_with_its_keys(place: Path, changes: Any, message: str) -> None:
    before = tree_of(place)
    with pytest.raises(UnmaskError, match=f"out/checkpoint-4 is of a run with another recipe: {message}"):
        resume(**changes)
    assert tree_of(place) == before


def test_what_only_divides_the_work_may_always_differ() -> None:
    said = resume(micro_batch_size=2, log_steps=3, gradient_checkpointing=True, data__num_workers=1)
    line = next(line for line in said.splitlines() if line.startswith("resume: "))
    assert line == (
        "resume: the recipe differs from that of the checkpoint in data.num_workers, micro_batch_size,"
        " max_steps, gradient_checkpointing, log_steps"
    )


def test_an_allowed_setting_of_the_optimizer_takes_effect(place: Path) -> None:
    allow = ["optimizer.learning_rate", "optimizer.weight_decay"]
    changes = {"optimizer__learning_rate": 0.1, "optimizer__weight_decay": 0.5, "resume__allow": allow}
    resume(**changes)
    assert history(place / "out/checkpoint-6", "learning_rate") == [0.005] * 4 + [0.1] * 2
    groups = torch.load(place / "out/checkpoint-6/optimizer.pt", weights_only=True)["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    # The next resume has the same recipe as its checkpoint.
    said = resume(**changes, max_steps=7)
    assert "differs from that of the checkpoint in max_steps\n" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resume__allow": ["optimizer.lerning_rate"]}, "did you mean 'optimizer.learning_rate'"),
        ({"resume__allow": ["seed"], "resume_from_checkpoint": None}, "resume.allow has no effect without"),
    ],
)
def test_resume_allow_names_known_keys_and_needs_a_resume(changes: Any, message: str) -> None:
    with pytest.raises(UnmaskError, match=message):
        resume(**changes)


# A checkpoint of another model.


@pytest.mark.parametrize(
    ("field", "value"), [("hidden_size", 48), ("num_hidden_layers", 2), ("model_type", "llama")]
)
def test_another_architecture_is_refused(field: str, value: Any) -> None:
    name = f"{field} .*, here {f'unmask_{value}' if field == 'model_type' else value}"
    changes = {"model__config": {**MODEL, field: value}, "resume__allow": ["model.config"]}
    with pytest.raises(UnmaskError, match=f"out/checkpoint-4 is of another architecture: .*{name}"):
        resume(**changes)


def test_another_tokenizer_is_refused(place: Path) -> None:
    edit(place / "out/checkpoint-4", tokenizer_sha256="0" * 64)
    with pytest.raises(UnmaskError, match="out/checkpoint-4 is of a run with another tokenizer"):
        resume()


def test_a_checkpoint_of_a_newer_version_is_refused(place: Path) -> None:
    edit(place / "out/checkpoint-4", format_version=9)
    with pytest.raises(UnmaskError, match=f"{MANIFEST} is of format 9, made by a newer unmask"):
        resume("other", "out/checkpoint-4")


# As if it had never stopped.


def test_the_mean_since_the_last_log_is_carried_over(place: Path) -> None:
    """The log after three steps has the mean over all of them, two of which were before the stop."""
    each = {"log_steps": 3, "save_steps": 2, "max_steps": 6}
    whole = train("whole", **{**SHORT, **each})[0]
    resumed = train("more", **{**SHORT, **each, "resume_from_checkpoint": "whole/checkpoint-2"})[0]
    assert len(history(place / "whole/checkpoint-6")) == 3  # the first step is always logged
    assert history(place / "more/checkpoint-6") == history(place / "whole/checkpoint-6")
    assert_close(saved(resumed.checkpoint), saved(whole.checkpoint), atol=0)

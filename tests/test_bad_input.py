"""Bad input, as a user meets it: one line with file, record, field and remedy, exit code 2, no traceback,
and nothing already written is harmed."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from tiny import autoregressive_folder, run_cli

RECORD = {"instruction": "Say a", "output": "a"}
RECIPE = """\
training_mode: sft
model: {name_or_path: diffusion}
data: {dataset_name: good.jsonl, block_size: 64, eval_size: 2}
global_batch_size: 4
max_steps: 2
save_steps: 1
precision: fp32
report_to: []
checkpoint_save_dir: run
"""


def tree_of(folder: Path) -> dict[str, bytes]:
    """The contents of every file of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def lines(*records: dict[str, Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def without(tokenizer_folder: Path, token: str) -> None:
    file = tokenizer_folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config[token]
    file.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a diffusion checkpoint, a finished run, and every kind of bad file and folder."""
    root = tmp_path_factory.mktemp("bad")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        autoregressive_folder(root / "base")
        assert run_cli("convert", "base", "diffusion").code == 0
        Path("recipe.yaml").write_text(RECIPE)
        Path("good.jsonl").write_text(lines(*[RECORD] * 10))
        assert run_cli("train", "recipe.yaml").code == 0

        Path("broken.jsonl").write_text(lines(RECORD, RECORD) + '{"instruction": "a", "output": }\n')
        Path("no_field.jsonl").write_text(lines(RECORD, {"instruction": "a", "outptu": "b"}))
        Path("no_text.jsonl").write_text(lines({"text": "fine"}, {"body": "a"}))
        Path("mixed.jsonl").write_text(
            lines(RECORD, {"instruction": "a", "output": ""}) + "{\n" + lines(*[RECORD] * 8) + "[\n"
        )
        for token in ("pad_token", "eos_token"):
            shutil.copytree("base", f"no_{token}")
            without(root / f"no_{token}", token)
        Path("folder").mkdir()
        shutil.copytree("diffusion", "no_mask")
        config = json.loads(Path("no_mask/config.json").read_text())
        Path("no_mask/config.json").write_text(json.dumps({**config, "mask_token_id": None}))
        shutil.copytree("diffusion", "cut")
        whole = Path("cut/model.safetensors").read_bytes()
        Path("cut/model.safetensors").write_bytes(whole[: len(whole) // 2])
    return root


# A command line -> words that its one line must have: where, what, and what to do.
NEW = "checkpoint_save_dir=new"
CASES = {
    f"train recipe.yaml data.dataset_name=goood.jsonl {NEW}": (
        "goood.jsonl: no such file",
        "did you mean good.jsonl?",
    ),
    "data recipe.yaml data.eval_dataset_name=held.jsonl data.eval_size=0": ("held.jsonl: no such file",),
    f"train recipe.yaml data.dataset_name=broken.jsonl {NEW}": (
        "broken.jsonl line 3: not valid JSON",
        "column 32",
    ),
    "data recipe.yaml data.dataset_name=no_field.jsonl": (
        "no_field.jsonl line 2: no known format has these fields: instruction, outptu",
        "did you mean 'output' instead of 'outptu'?",
    ),
    "data recipe.yaml training_mode=pretrain data.dataset_name=no_text.jsonl": (
        "no_text.jsonl line 2: field 'text' is missing",
        "set data.text_field",
    ),
    # Named before the data are read.
    "data recipe.yaml data.dataset_name=none.jsonl --html none/page.html": (
        "--html: none/page.html",
        "no folder",
    ),
    "data recipe.yaml data.on_bad_record=ignore": (
        "data.on_bad_record: ",
        "'stop' or 'skip'",
        'got "ignore"',
    ),
    f"train recipe.yaml data.dataset_name=no_text.jsonl data.on_bad_record=skip {NEW}": (
        "no_text.jsonl: no record can be used: 2 skipped: no known format",
        "(first: no_text.jsonl line 1)",
    ),
    "data recipe.yaml data.dataset_name=some/data": ("some/data: no such local file", "give a local path"),
    f"train recipe.yaml model.name_or_path=some/model {NEW}": (
        "some/model: no such local",
        "give a local path",
    ),
    f"train recipe.yaml model.name_or_path=no_pad_token {NEW}": (
        "no_pad_token: the tokenizer has no padding token (pad_token)",
        "tokenizer_config.json",
    ),
    "data recipe.yaml model.name_or_path=no_eos_token": ("the tokenizer has no end token (eos_token)",),
    "generate no_mask --prompt a": ("the model has no mask token", "`unmask convert`"),
    f"train recipe.yaml data.block_size=1 {NEW}": ("data.block_size: ", "greater than or equal to 2; got 1"),
    "generate folder --prompt a": ("folder: this folder is not a checkpoint", "name a Hugging Face folder"),
    "generate run --prompt a": ("run: this folder is not a checkpoint", "did you mean run/final?"),
    "convert good.jsonl new": ("good.jsonl: a checkpoint is a folder",),
    "generate cut --prompt a": ("cut: the model cannot be loaded", "damaged or incomplete, copy it again"),
    "generate base --prompt a": ("base: this is an autoregressive checkpoint", "`unmask convert base OUT`"),
    "train recipe.yaml": ("run holds a run already", "resume_from_checkpoint=auto", "name another folder"),
    "convert base diffusion": ("diffusion: exists already", "name a folder"),
    "train recipe.yaml resume_from_checkpoint=folder": (
        "resume_from_checkpoint: folder is not a training checkpoint",
        "name a checkpoint-N folder, or auto",
    ),
    "score good.jsonl diffusion": ("good.jsonl: a checkpoint is a folder", "MODEL comes before it"),
    "train recipe.yaml data=good.jsonl": (
        "override 'data=good.jsonl': data: a group of keys",
        "did you mean data.dataset_name=good.jsonl?",
    ),
    "train recipe.yaml model=Qwen/Qwen3-0.6B": ("did you mean model.name_or_path=Qwen/Qwen3-0.6B?",),
    "train recipe.yaml optimizer=3": ("optimizer: a group of keys; got 3; did you mean optimizer.type?",),
    "train recipe.yaml optimizer.lr=1": (
        "unknown key 'optimizer.lr'",
        "did you mean 'optimizer.learning_rate'?",
    ),
    "train recipe.yaml lr=1": ("did you mean 'optimizer.learning_rate'?",),
    "train recipe.yaml optimizer.foo=1": (
        "unknown key 'optimizer.foo'; optimizer has type, learning_rate, ",
    ),
    "train recipe.yaml lora.xyzzy=1": ("unknown key 'lora.xyzzy'; lora has r, ",),
    "train recipe.yaml max_steps = 2": ("'max_steps' is not key=value", "=1e-4, without spaces"),
    "train recipe.yaml --max-steps 2": ("No such option: --max-steps", "have no dashes: max_steps=VALUE."),
    "train folder": ("folder: cannot be read as a recipe: a folder; name a .yaml file",),
    "recipe show nope": ("no recipe 'nope' comes with unmask; `unmask recipe list` shows all",),
    "train recipe.yaml optimizer.learning_rat=1": (
        "unknown key 'optimizer.learning_rat'",
        "did you mean 'optimizer.learning_rate'?",
    ),
}


@pytest.mark.parametrize("command", CASES)
def test_one_line_exit_code_2_and_nothing_harmed(
    made: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    before = tree_of(made)
    said = run_cli(*command.split())
    assert said.code == 2
    assert len(said.error) < 400
    assert "Traceback" not in said.err + said.out
    assert all(words in said.err for words in CASES[command])
    assert tree_of(made) == before


def test_skipped_records_are_counted_wherever_a_run_is_described(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    skip = ("data.dataset_name=mixed.jsonl", "data.on_bad_record=skip", "data.eval_size=0")
    skip = (*skip, "data.eval_dataset_name=mixed.jsonl", f"checkpoint_save_dir={tmp_path / 'new'}")
    looked, trained = run_cli("data", "recipe.yaml", *skip), run_cli("train", "recipe.yaml", *skip)
    assert looked.code == trained.code == 0
    card = (tmp_path / "new" / "final" / "README.md").read_text(encoding="utf-8")
    assert "data: 9 examples" in trained.out and "| data | 9 examples" in card
    texts = [" ".join(text.split()) for text in (looked.out, trained.out, card)]
    for count, reason, line in ((1, "field 'output' is empty", 2), (2, "not valid JSON", 3)):
        assert f"skipped {count} {reason}; first: mixed.jsonl line {line}" in texts[0]
        said = f"{count} skipped: {reason} (first: mixed.jsonl line {line})"
        assert all(said in text for text in texts[1:])
        assert all(f"of the evaluation data {said}" in text for text in texts)


@pytest.mark.parametrize(
    "command", ["data recipe.yaml data.dataset_name=a/b", "convert a/b new", "generate a/b --prompt x"]
)
def test_without_a_network_a_hub_name_fails_at_once(
    made: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("connection refused")

    monkeypatch.chdir(made)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", unreachable)
    said = run_cli(*command.split())
    assert said.code == 2
    assert "a/b: no such local file or folder, and the hub cannot be reached" in said.error


def test_no_room_for_a_converted_checkpoint(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    before, limits = tree_of(made), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # bytes that a file can have
    try:
        said = run_cli("convert", "base", "other")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert said.code == 2
    assert said.error.startswith("error: other: could not be written: ")
    assert tree_of(made) == before and not list(made.glob("*other*"))

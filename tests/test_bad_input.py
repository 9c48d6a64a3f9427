"""Bad input, as a user meets it: one line with file, record, field and remedy, exit code 2, no traceback,
and nothing already written is harmed."""

from __future__ import annotations

import json
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


class Full:
    """Inside, no file of this process can grow beyond some bytes."""

    def __init__(self, size: int):
        self.size = size

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


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
    place = tmp_path_factory.mktemp("bad")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        autoregressive_folder(place / "base")
        assert run_cli("convert", "base", "diffusion").code == 0
        Path("recipe.yaml").write_text(RECIPE)
        Path("good.jsonl").write_text(lines(*[RECORD] * 10))
        assert run_cli("train", "recipe.yaml").code == 0

        Path("broken.jsonl").write_text(lines(RECORD, RECORD) + '{"instruction": "a", "output": }\n')
        Path("broken.json").write_text('[\n  {"instruction": "a", "output": "b"},\n  {"instruction": "a"')
        Path("no_field.jsonl").write_text(lines(RECORD, {"instruction": "a", "outptu": "b"}))
        Path("empty.json").write_text(json.dumps([RECORD, {"instruction": "a", "output": " \n"}]))
        Path("no_text.jsonl").write_text(lines({"text": "fine"}, {"body": "a"}))
        user, assistant = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
        Path("order.jsonl").write_text(
            lines({"messages": [user, assistant]}, {"messages": [assistant, user]})
        )
        Path("mixed.jsonl").write_text(
            lines(RECORD, {"instruction": "a", "output": ""}) + "{\n" + lines(*[RECORD] * 8) + "[\n"
        )
        for token in ("pad_token", "eos_token"):
            shutil.copytree("base", f"no_{token}")
            without(place / f"no_{token}", token)
        Path("folder").mkdir()
        shutil.copytree("diffusion", "no_mask")
        config = json.loads(Path("no_mask/config.json").read_text())
        Path("no_mask/config.json").write_text(json.dumps({**config, "mask_token_id": None}))
        shutil.copytree("diffusion", "cut")
        whole = Path("cut/model.safetensors").read_bytes()
        Path("cut/model.safetensors").write_bytes(whole[: len(whole) // 2])
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what was made, in which the command runs."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@dataclass
class Case:
    """A command line, and the words that its one line must hold: where, what, and what to do."""

    arguments: str
    words: tuple[str, ...]


START = "model.name_or_path="
CASES = {
    "missing data file": Case(
        "train recipe.yaml data.dataset_name=goood.jsonl checkpoint_save_dir=new",
        ("goood.jsonl: no such file", "did you mean good.jsonl?"),
    ),
    "missing evaluation data": Case(
        "data recipe.yaml data.eval_dataset_name=held.jsonl data.eval_size=0", ("held.jsonl: no such file",)
    ),
    "broken JSON lines": Case(
        "data recipe.yaml data.dataset_name=broken.jsonl",
        ("broken.jsonl line 3: not valid JSON", "column 32", "expected one record a line"),
    ),
    "broken JSON array": Case(
        "train recipe.yaml data.dataset_name=broken.json checkpoint_save_dir=new",
        ("broken.json line 3: not valid JSON", "column 22"),
    ),
    "record of no format": Case(
        "train recipe.yaml data.dataset_name=no_field.jsonl checkpoint_save_dir=new",
        (
            "no_field.jsonl line 2: no known format has these fields: instruction, outptu",
            "set data.sft.format=custom",
        ),
    ),
    "document without the field": Case(
        "data recipe.yaml training_mode=pretrain data.dataset_name=no_text.jsonl",
        ("no_text.jsonl line 2: field 'text' is missing", "fields here: body", "set data.text_field"),
    ),
    "empty response": Case(
        "train recipe.yaml data.dataset_name=empty.json checkpoint_save_dir=new",
        ("empty.json record 2: field 'output' is empty", "a response needs text"),
    ),
    "turns out of order": Case(
        "data recipe.yaml data.dataset_name=order.jsonl",
        (
            "order.jsonl line 2: turns out of order: the first assistant turn has no user turn before it",
            "expected system (if any), user, assistant",
            "turns: assistant, user",
        ),
    ),
    "page in a missing folder, named before the data are read": Case(
        "data recipe.yaml data.dataset_name=none.jsonl --html none/page.html",
        ("--html: none/page.html", "there is no folder", "make it first"),
    ),
    "bad records that are neither stopped at nor skipped": Case(
        "data recipe.yaml data.on_bad_record=ignore",
        ("data.on_bad_record: ", "'stop' or 'skip'", 'got "ignore"'),
    ),
    "nothing but bad records": Case(
        "train recipe.yaml data.dataset_name=no_text.jsonl data.on_bad_record=skip checkpoint_save_dir=new",
        ("no_text.jsonl: no record can be used: 2 skipped: no known format", "(first: no_text.jsonl line 1)"),
    ),
    "data set name without network": Case(
        "data recipe.yaml data.dataset_name=some/data",
        ("some/data: no such local file or folder", "give a local path"),
    ),
    "model name without network": Case(
        f"train recipe.yaml {START}some/model checkpoint_save_dir=new",
        ("some/model: no such local file or folder", "give a local path"),
    ),
    "no padding token": Case(
        f"train recipe.yaml {START}no_pad_token checkpoint_save_dir=new",
        ("no_pad_token: the tokenizer has no padding token (pad_token)", "tokenizer_config.json"),
    ),
    "no end token": Case(
        f"data recipe.yaml {START}no_eos_token",
        ("no_eos_token: the tokenizer has no end token (eos_token)", "tokenizer_config.json"),
    ),
    "no mask token": Case(
        "generate no_mask --prompt a",
        ("the model has no mask token", "config.mask_token_id", "`unmask convert`"),
    ),
    "block size of 1": Case(
        "train recipe.yaml data.block_size=1 checkpoint_save_dir=new",
        ("data.block_size: ", "greater than or equal to 2; got 1"),
    ),
    "folder that is no checkpoint": Case(
        "generate folder --prompt a",
        ("folder: this folder is not a checkpoint: it has no config.json", "name a Hugging Face folder"),
    ),
    "a run's own folder": Case(
        "generate run --prompt a", ("run: this folder is not a checkpoint", "did you mean run/final?")
    ),
    "file that is no checkpoint": Case("convert good.jsonl new", ("good.jsonl: a checkpoint is a folder",)),
    "damaged checkpoint": Case(
        "generate cut --prompt a",
        ("cut: the model cannot be loaded", "damaged or incomplete, copy it again"),
    ),
    "autoregressive folder to generate": Case(
        "generate base --prompt a",
        ("base: this is an autoregressive checkpoint", "`unmask convert base OUT`"),
    ),
    "folder with a run": Case(
        "train recipe.yaml", ("run holds a run already", "resume_from_checkpoint=auto", "name another folder")
    ),
    "folder to convert to that exists": Case(
        "convert base diffusion", ("diffusion: exists already", "name a folder")
    ),
    "nothing to resume": Case(
        "train recipe.yaml resume_from_checkpoint=folder",
        (
            "resume_from_checkpoint: folder is not a training checkpoint",
            "name a checkpoint-N folder, or auto",
        ),
    ),
    "unknown key": Case(
        "train recipe.yaml optimizer.learning_rat=1",
        ("unknown key 'optimizer.learning_rat'", "did you mean 'optimizer.learning_rate'?"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_exit_code_2_and_nothing_harmed(
    made: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    before = tree_of(made)
    said = run_cli(*CASES[name].arguments.split())
    assert said.code == 2
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and len(said.err) < 400
    assert "Traceback" not in said.err + said.out
    for words in CASES[name].words:
        assert words in said.err
    assert tree_of(made) == before


def test_skipped_records_are_counted_wherever_a_run_is_described(place: Path) -> None:
    skip = ("data.dataset_name=mixed.jsonl", "data.on_bad_record=skip")
    reasons = (
        "1 skipped: field 'output' is empty (first: mixed.jsonl line 2)",
        "2 skipped: not valid JSON (first: mixed.jsonl line 3)",
    )
    skip = (*skip, "data.eval_size=0", "data.eval_dataset_name=mixed.jsonl")
    looked = run_cli("data", "recipe.yaml", *skip)
    said = " ".join(looked.out.split())
    assert looked.code == 0
    assert "skipped 1 field 'output' is empty; first: mixed.jsonl line 2" in said
    assert "skipped 2 not valid JSON; first: mixed.jsonl line 3" in said
    for reason in reasons:
        assert f"of the evaluation data {reason}" in said
    trained = run_cli("train", "recipe.yaml", *skip, "checkpoint_save_dir=new")
    assert trained.code == 0
    card = (place / "new/final/README.md").read_text(encoding="utf-8")
    assert "data: 9 examples" in trained.out and "| training examples | 9 |" in card
    said = " ".join(trained.out.split())
    for reason in reasons:
        assert reason in said and reason in card
        assert f"of the evaluation data {reason}" in said and f"of the evaluation data {reason}" in card


@pytest.mark.parametrize(
    "command", ["data recipe.yaml data.dataset_name=a/b", "convert a/b new", "generate a/b --prompt x"]
)
def test_without_a_network_a_hub_name_fails_at_once(
    place: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    class ConnectionError_(ConnectionError):
        pass

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError_("connection refused")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", unreachable)
    said = run_cli(*command.split())
    assert said.code == 2
    assert said.err == (
        "error: a/b: no such local file or folder, and the hub cannot be reached;"
        " give a local path, or set HF_HUB_OFFLINE=1 if it is in the hub cache.\n"
    )


def test_no_room_for_a_converted_checkpoint(place: Path) -> None:
    before = tree_of(place)
    with Full(2000):
        said = run_cli("convert", "base", "other")
    assert said.code == 2 and said.err.count("\n") == 1
    assert said.err.startswith("error: other: could not be written: ")
    assert "nothing already there was changed" in said.err
    assert tree_of(place) == before and not list(place.glob("*other*"))

"""Everything README.md shows is run: its commands in their order, its Python, and the scripts."""

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from foreign import BY_NAME, foreign_folder
from tiny import autoregressive_folder, run_cli

from unmask import load_model

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

HUB = {"Qwen/Qwen3-0.6B": "base", "Salesforce/CoDA-v0-Instruct": "coda", "JetLM/SDAR-1.7B-Chat": "sdar"}
SHORT = [
    "max_steps=2",
    "evaluation.limit=3",
    "global_batch_size=4",
    "data.max_records=64",
    "data.eval_size=8",
]


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)


def commands(page: str = README) -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("bash", page) for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the clone, with a tiny autoregressive base in it."""
    place = tmp_path_factory.mktemp("clone")
    (place / "recipes").symlink_to(ROOT / "recipes")
    autoregressive_folder(place / "base", max_position_embeddings=2048)
    for name in ("coda", "sdar"):
        foreign_folder(place / name, BY_NAME[name], max_position_embeddings=2048)
    for name in ("humaneval", "gsm8k"):
        (place / f"{name}.jsonl").write_text('{"prompt": "Say hello."}\n')
    (place / "my.jsonl").write_text('{"instruction": "Say hello.", "output": "Hello!"}\n' * 12)
    (place / "my.txt").write_text("To be, or not to be, that is the question. " * 400)
    return place


def run(command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command as README shows it, only shorter, and with a tiny base for what is on the hub."""
    for on_the_hub, folder in HUB.items():
        command = command.replace(on_the_hub, str(place / folder))
    name, *arguments = shlex.split(command)
    monkeypatch.chdir(place)
    if name == "make" and arguments == ["demo"]:  # the environment exists already
        plan = subprocess.run(["make", "-n", "demo"], cwd=ROOT, check=True, capture_output=True, text=True)
        assert "checkpoint_save_dir=outputs/demo" in plan.stdout
        folder = f"checkpoint_save_dir={place / 'outputs/demo'}"
        said = shell([str(ROOT / "recipes/train_tiny_sft.sh"), *SHORT, folder], place)
        pattern = r"exact match: before [\d.]+%, after [\d.]+% on 3 held-out prompts"
        assert re.fullmatch(pattern, said.strip().splitlines()[-1])
        assert (place / "outputs/demo/loss.png").stat().st_size > 0
    elif name.startswith("./recipes/"):
        local = [argument.replace("dataset_name=", f"dataset_name={place}/") for argument in arguments]
        base = f"model.name_or_path={place / 'base'} checkpoint_save_dir={place / Path(name).stem}"
        base = "" if any(argument.startswith("model.name_or_path=") for argument in local) else base
        sizes = "data.dataset_config=null data.block_size=64 micro_batch_size=2"
        often = "eval_steps=2 data.eval_size=2 save_steps=2"
        shell([name, *local, *SHORT, *f"{base} {sizes} {often}".split()], place)
    elif name == "unmask":
        if arguments[0] in ("train", "prepare"):
            streamed = "data.streaming=true" in arguments  # has no first records
            arguments += [key for key in SHORT if not (streamed and key.startswith("data.max_records"))]
        monkeypatch.setattr(sys, "stdin", io.StringIO("Say it twice: wool.\n/quit\n"))
        said = run_cli(*arguments)
        if arguments[0] == "doctor":  # random weights are off
            [shown] = [block for block in blocks("text") if "mask token" in block]
            names = [re.split(r"  +", line)[1] for line in shown.splitlines()]
            names = ["read" if name.startswith("read") else f"{name} " for name in names]  # as it is not
            assert [name for name in names if f"  {name} " not in said.out] == []
        else:
            assert said.code == 0, said.err
    else:  # the tests run in that environment
        assert command in ("source .venv/bin/activate", "make test")


def shell(arguments: list[str], place: Path) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(arguments, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_readme_commands_run_in_their_order(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = commands()
    assert {"make demo", "make test"} <= set(shown)
    for command in shown:
        run(command, place, monkeypatch)
    assert load_model(str(place / "outputs" / "qwen3-0.6b-diffusion")).config.logit_shift
    assert load_model(str(place / "train_qwen3_1.7b_sft" / "final")).config.logit_shift
    assert (place / "outputs/coda-sft/final/model.safetensors").exists()


@pytest.mark.slow
def test_commands_of_the_checkpoints_page_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = autoregressive_folder(place / "final", max_position_embeddings=2048)
    assert run_cli("convert", folder, place / "outputs/demo/final").code in (0, 2)  # 2: README made it
    shutil.rmtree(place / "outputs/hub", ignore_errors=True)
    for command in commands((ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")):
        run(command, place, monkeypatch)
    assert (place / "coda.jsonl").read_text() and (place / "sdar.jsonl").read_text()


def test_readme_python_runs() -> None:
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})


def test_the_tree_names_files_that_exist() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    [tree] = re.findall(r"^```text\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    folder = Path()
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = Path(name) if name.endswith("/") else Path()
            found = ROOT / name
        else:
            if line.startswith("  ") and not line.startswith("    ") and name.endswith("/"):
                folder = Path("unmask") / name
                found = ROOT / folder
            else:
                found = ROOT / ("unmask" if not line.startswith("    ") else folder) / name
        assert found.exists(), line


def test_readme_links_exist() -> None:
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / link).exists(), link


@pytest.mark.slow
def test_example_of_the_contract_shows_both_modes() -> None:
    out = shell([sys.executable, str(ROOT / "sft_example.py")], ROOT)
    assert "1. pretrain" in out and "2. sft" in out and "ValueError: training_mode='sft'" in out
    losses = [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+)", out)]
    assert losses[-1] < losses[0]

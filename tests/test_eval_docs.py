"""What docs/evaluation.md shows is run: its commands in their order, and its Python."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from foreign import BY_NAME, foreign_folder
from tiny import autoregressive_folder, run_cli

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
MODELS = {
    "MODEL": "outputs/demo/final",
    "Salesforce/CoDA-v0-Instruct": "models/coda",
    "JetLM/SDAR-1.7B-Chat": "models/sdar",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints, tasks and data that the page names, small."""
    place = tmp_path_factory.mktemp("docs")
    folder = autoregressive_folder(place / "base", max_position_embeddings=2048)
    assert run_cli("convert", folder, place / "outputs/demo/final").code == 0
    for name in ("coda", "sdar"):
        foreign_folder(place / "models" / name, BY_NAME[name], max_position_embeddings=2048)
    (place / "tasks").mkdir()
    [task] = blocks("yaml")
    (place / "tasks" / "words.yaml").write_text(task)
    lines = [{"instruction": f"Say {word}.", "output": word} for word in ("wool", "monk", "drum")]
    (place / "words.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    problem = {
        "task_id": "T/0",
        "entry_point": "one",
        "prompt": "def one():\n",
        "canonical_solution": "    return 1\n",
    }
    problem |= {"test": "def check(candidate):\n    assert candidate() == 1\n"}
    (place / "HumanEval.jsonl.gz").write_bytes(gzip.compress(json.dumps(problem).encode() + b"\n"))
    mbpp = {"task_id": 11, "text": "Return one.", "code": "def one():\n    return 1"}
    mbpp |= {"test_list": ["assert one() == 1"] * 3, "test_setup_code": "", "challenge_test_list": []}
    (place / "mbpp.jsonl").write_text(json.dumps(mbpp) + "\n")
    return place


def shorter(command: str) -> list[str]:
    """The command with small models, local data, and a canvas of a few tokens."""
    words = [MODELS.get(word, word) for word in shlex.split(command)]
    if "gsm8k_cot" in words:
        words[words.index("gsm8k_cot")] = "words"
        words += ["--include-path", "tasks"]
    if "unmask_humaneval_instruct" in words:
        words += ["--data", "HumanEval.jsonl.gz"]
    if "--canvas" in words:
        words[words.index("--canvas") + 1] = "8"
    elif any(task in " ".join(words) for task in ("unmask_", "sdar")):
        words += ["--canvas", "8"]
    return words


@pytest.mark.slow
def test_what_the_page_shows_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    shown = commands()
    assert len(shown) == 11
    for command in shown:
        name, *arguments = shorter(command)
        if name == "unmask":
            said = run_cli(*arguments)
            assert said.code == 0, (command, said.err)
            continue
        module = ["-m", "torch.distributed.run", "--standalone"] if name == "torchrun" else []
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        run = [sys.executable, *module, *arguments]
        done = subprocess.run(run, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, (command, done.stderr)
    for block in blocks("python"):
        exec(compile(block, "docs/evaluation.md", "exec"), {})
    made = {"results", "results-fast", "results-two", "sweep", "coda", "sdar", "code", "mbpp"}
    assert made <= {file.name for file in place.iterdir()}
    [sample] = map(json.loads, (place / "code" / "samples_unmask_humaneval.jsonl").read_text().splitlines())
    assert sample["filtered_resps"][0][0]["status"] in ("wrong", "error") and sample["pass@1"] == 0
    assert json.loads((place / "sdar" / "results.json").read_text())["unmask"]["settings"] == {
        "preset": "sdar"
    }


def test_options_named_on_the_page_exist() -> None:
    help_ = run_cli("eval", "--help").out
    others = {
        "--apply_chat_template",
        "--use_cache",
        "--prompts",
        "--model",
        "--model_args",
        "--include_path",
    }
    others |= {"--nproc_per_node"}  # of torchrun, of the harness, and of `unmask generate`
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", PAGE))
    assert len(named) > 20 and {option for option in named - others if option not in help_} == set()


def test_links_of_the_page_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+)", PAGE):
        assert link.startswith("https://") or (ROOT / "docs" / link).exists(), link

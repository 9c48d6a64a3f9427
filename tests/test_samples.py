from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from unmask.evaluation.exact_match import Prompt
from unmask.generation.text import Completion
from unmask.training.report import shown
from unmask.training.samples import Samples

PROMPTS = [Prompt([1], "Say *hi*.", "hi"), Prompt([2], "Two\nlines", "b")]


def answer(prompts: Sequence[Prompt]) -> list[Completion]:
    return [Completion(prompt.text.upper() + " é", [], []) for prompt in prompts]


def evaluate(samples: Samples, out: Path, step: int, main: bool = True) -> list[dict[str, Any]]:
    args = TrainingArguments(str(out), report_to="none", use_cpu=True)
    state = TrainerState(global_step=step, is_world_process_zero=main)
    samples.on_evaluate(args, state, TrainerControl())
    file = out / "samples.jsonl"
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


def test_every_evaluation_is_kept_with_its_step(tmp_path: Path) -> None:
    texts: list[tuple[str, str, int]] = []
    board = SimpleNamespace(tb_writer=SimpleNamespace(add_text=lambda *given: texts.append(given)))
    samples = Samples(PROMPTS, answer, tensorboard=board)
    evaluate(samples, tmp_path, 0)
    lines = evaluate(samples, tmp_path, 50)
    assert [line["step"] for line in lines] == [0, 0, 50, 50]
    assert lines[2] == {
        "step": 50,
        "prompt": "Say *hi*.",
        "completion": "SAY *HI*. é",
        "expected": "hi",
    }
    assert texts[2:] == [
        ("samples/1", "    Say *hi*.\n\n    SAY *HI*. é", 50),
        ("samples/2", "    Two\n    lines\n\n    TWO\n    LINES é", 50),
    ]
    assert len(evaluate(samples, tmp_path, 50)) == 4  # the evaluation at the end of a run is of the same step


@pytest.mark.parametrize("together", [False, True])
def test_other_processes_generate_only_where_they_must(tmp_path: Path, together: bool) -> None:
    asked: list[int] = []

    def counted(prompts: Sequence[Prompt]) -> list[Completion]:
        asked.append(len(prompts))
        return answer(prompts)

    assert evaluate(Samples(PROMPTS, counted, together), tmp_path, 3, main=False) == []
    assert asked == ([2] if together else [])


def test_going_on_takes_out_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    samples = Samples(PROMPTS, answer)
    for step in (0, 20, 40):
        evaluate(samples, tmp_path, step)
    with (tmp_path / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 20, "pro')  # killed while it wrote
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    samples.on_train_begin(args, TrainerState(global_step=30, is_world_process_zero=True), TrainerControl())
    lines = (tmp_path / "samples.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 0, 20, 20]
    samples.on_train_begin(args, TrainerState(is_world_process_zero=True), TrainerControl())  # a new run
    assert (tmp_path / "samples.jsonl").read_text("utf-8") == ""


def test_those_shown_are_spread_over_all() -> None:
    assert shown(range(100), 4) == [12, 37, 62, 87]
    assert shown("ab", 3) == ["a", "b"]
    assert shown([], 3) == [] and shown("abc", 0) == []

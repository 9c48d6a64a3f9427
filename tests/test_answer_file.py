"""Files of answers: resumable, and by several processes."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tiny import byte_model, written
from transformers import PreTrainedTokenizerBase

from unmask.errors import UnmaskError
from unmask.generation.answer_file import answer_file, generate_answers
from unmask.generation.prompts import read_prompts


@pytest.fixture(scope="module")
def model() -> Any:
    return byte_model().double().eval()


def test_a_killed_run_resumes(tmp_path: Path, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = read_prompts(written(tmp_path, "p.txt", "a long one\nb\n<|mask|>\nd"), tokenizer, raw=True)
    settings = {"max_new_tokens": 4, "temperature": 1.0, "batch_size": 2}
    answer = partial(generate_answers, model, tokenizer, **settings)
    counts: list[int] = []
    run: dict[str, Any] = {"samples": 2, "seed": 5, "settings": {"steps": 4}}
    whole = tmp_path / "whole.jsonl"
    totals = answer_file(answer, prompts, whole, advance=counts.append, **run)
    lines = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [(line["index"], line["sample"], line["seed"]) for line in lines] == [
        (index, sample, 5 + sample) for index in range(4) for sample in range(2)
    ]
    assert lines[4]["prompt"] == "<|mask|>" and lines[0]["response"] != lines[1]["response"]
    assert totals == {
        "answers": sum(counts),
        "tokens": sum(line["tokens"] for line in lines),
        "forward_passes": sum(line["forward_passes"] for line in lines),
    }
    data = whole.read_bytes()
    for size in (0, 10, len(data) // 2, len(data)):
        part = written(tmp_path, "part.jsonl", data[:size])
        assert answer_file(answer, prompts, part, resume=True, **run) == totals
        assert part.read_bytes() == data
    for other, message in (
        ({**run, "settings": {"steps": 3}}, "line 1: settings"),
        ({**run, "seed": 6}, "line 1: seed is 5, now it would be 6"),
        ({**run, "samples": 1}, "8 answers"),
    ):
        with pytest.raises(UnmaskError, match=message):
            answer_file(answer, prompts, whole, resume=True, **other)
    with pytest.raises(UnmaskError, match="line 1"):
        answer_file(answer, prompts, written(tmp_path, "x.jsonl", "what\n"), resume=True, **run)
    assert whole.read_bytes() == data

    def killed(*_: Any) -> list[tuple[int, dict[str, Any]]]:
        raise KeyboardInterrupt

    first = data.index(b"\n") + 1
    part = written(tmp_path, "part.jsonl", data[: first + 20])
    with pytest.raises(KeyboardInterrupt):  # killed again
        answer_file(killed, prompts, part, resume=True, **run)
    assert part.read_bytes() == data[:first]


@pytest.mark.slow
def test_two_processes_write_the_file_of_one(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    byte_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("".join(f"Say {n} times {n}.\n" for n in range(7)))
    files = []
    for name, launch in (
        ("one", []),
        ("two", ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]),
    ):
        asked = ["-m", "unmask", "generate", tmp_path / "model", "--prompts", tmp_path / "prompts.txt"]
        asked += ["--out", tmp_path / name, "--max-new-tokens", "8", "--temperature", "1", "--samples", "3"]
        command = [sys.executable, *launch, *map(str, asked)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("21 answers to 7 prompts") == 1
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1] and files[0].count(b"\n") == 21

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import byte_model
from transformers import PreTrainedTokenizerBase

from unmask.data.encode import Encoder
from unmask.errors import UnmaskError
from unmask.generation.complete import chat_example, chat_turns
from unmask.generation.prompts import (
    answer_file,
    check_lengths,
    check_out,
    generated,
    prompt_turns,
    read_prompts,
)

USER = {"role": "user", "content": "Hi"}
SAID = {"role": "assistant", "content": "Yes?"}


def written(tmp_path: Path, name: str, data: bytes | str) -> Path:
    file = tmp_path / name
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return file


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"messages": [USER]}, ["Hi"]),
        ({"messages": [USER, SAID]}, ["Hi"]),
        ({"messages": [USER, SAID, USER]}, ["Hi", "Yes?", "Hi"]),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, ["Hi"]),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "a"}]}, ["Hi"]),
        ({"prompt": "Hi"}, ["Hi"]),
        ({"prompt": "Hi", "completion": ""}, ["Hi"]),
        ({"prompt": [USER, SAID, USER]}, ["Hi", "Yes?", "Hi"]),
        ({"prompt": "Hi", "completion": "a"}, ["Hi"]),
        ({"instruction": "Hi", "input": "2"}, ["Hi\n2"]),
        ({"instruction": "Hi", "output": "a", "history": [["x", "y"]]}, ["x", "y", "Hi"]),
        ({"instruction": "Hi", "response": "a"}, ["Hi"]),
    ],
)
def test_everything_before_the_last_response_is_the_prompt(record: dict[str, Any], turns: list[str]) -> None:
    found, _ = prompt_turns(record, "x line 1")
    assert [turn.content for turn in found] == turns


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = written(tmp_path, "p.txt", "\ufeffone\r\n\n two\n")
    found = read_prompts(file, tokenizer, system="Be short.")
    assert [(prompt.text, prompt.where) for prompt in found] == [
        ("one", "p.txt line 1"),
        (" two", "p.txt line 3"),
    ]
    assert found[0].example == chat_example(tokenizer, chat_turns("one", "Be short."))
    raw = read_prompts(file, tokenizer, raw=True)[1].example
    assert (raw.input_ids, raw.src_mask) == (list(b" two"), [False] * 4)


def test_a_system_prompt_is_for_those_that_have_none(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    lines = [{"prompt": "a"}, {"messages": [{"role": "system", "content": "own"}, {**USER}]}]
    file = written(tmp_path, "p.jsonl", "\n".join(map(json.dumps, lines)))
    found = read_prompts(file, tokenizer, system="Be short.")
    texts = [str(tokenizer.decode(prompt.example.input_ids)) for prompt in found]
    assert "Be short." in texts[0] and "own" in texts[1] and "Be short." not in texts[1]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.txt", b"a\nb\xff\n", r"p.txt line 2: not UTF-8 text \(byte 2 of the line\)"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}', "p.jsonl line 2: not UTF-8 text"),
        ("p.txt", b"\n \n", "there is no prompt in it"),
        ("p.jsonl", b'{"prompt": " "}', "p.jsonl line 1: the prompt is empty"),
        (
            "p.jsonl",
            b'{"question": "a"}',
            "line 1: no known format has these fields: question; a prompt is read",
        ),
        ("p.jsonl", b'{"messages": [{"role": "king", "content": "a"}]}', "unknown role 'king'"),
    ],
)
def test_bad_prompts_are_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str, data: bytes, message: str
) -> None:
    with pytest.raises(UnmaskError, match=message):
        read_prompts(written(tmp_path, name, data), tokenizer)


def test_a_prompt_without_room_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    found = read_prompts(written(tmp_path, "p.txt", "ab\n" + "x" * 50), tokenizer, raw=True)
    check_lengths(found, 6, 56)
    with pytest.raises(UnmaskError, match=r"p.txt line 2: a prompt of 50 tokens and max_new_tokens = 7 need"):
        check_lengths(found, 7, 56)


def test_a_history_is_cut_as_training_cuts_it(tokenizer: PreTrainedTokenizerBase) -> None:
    turns, _ = prompt_turns({"messages": [USER, SAID, USER]}, "x")
    encoder = Encoder(tokenizer, layout="chat")
    example = encoder.prompt_example(turns)
    assert example.input_ids == encoder.encode_prompt(turns)
    said = [i for i, source in zip(example.input_ids, example.src_mask, strict=True) if not source]
    assert said == [*b"Yes?", 258]


@pytest.fixture(scope="module")
def model() -> Any:
    return byte_model().double().eval()


def test_a_run_that_was_killed_goes_on(
    tmp_path: Path, model: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = read_prompts(written(tmp_path, "p.txt", "a long one\nb\n<|mask|>\nd"), tokenizer, raw=True)
    answer = generated(model, tokenizer, max_new_tokens=4, temperature=1.0, batch_size=2)
    told: list[int] = []
    given: dict[str, Any] = {"samples": 2, "seed": 5, "settings": {"steps": 4}, "together": 3}
    whole = tmp_path / "whole.jsonl"
    totals = answer_file(answer, prompts, whole, advance=told.append, **given)
    lines = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [(line["index"], line["sample"], line["seed"]) for line in lines] == [
        (index, sample, 5 + sample) for index in range(4) for sample in range(2)
    ]
    assert lines[4]["prompt"] == "<|mask|>" and lines[0]["response"] != lines[1]["response"]
    assert totals == {
        "answers": 8,
        "tokens": sum(line["tokens"] for line in lines),
        "forwards": sum(line["forwards"] for line in lines),
    }
    assert sum(told) == 8
    data = whole.read_bytes()
    for size in (0, 10, len(data) // 2, len(data) - 1, len(data)):
        part = written(tmp_path, "part.jsonl", data[:size])
        assert answer_file(answer, prompts, part, resume=True, **given) == totals
        assert part.read_bytes() == data
    for other, message in (
        ({**given, "settings": {"steps": 3}}, "line 1: steps is 4, now it would be 3"),
        ({**given, "settings": {}}, "line 1: steps is 4, now it would be None"),
        ({**given, "seed": 6}, "line 1: seed is 5, now it would be 6"),
        ({**given, "samples": 1}, "has 8 answers, but there are 4 to give"),
    ):
        with pytest.raises(UnmaskError, match=message):
            answer_file(answer, prompts, whole, resume=True, **other)
    with pytest.raises(UnmaskError, match="line 1: is no answer"):
        answer_file(answer, prompts, written(tmp_path, "x.jsonl", "what\n"), resume=True, **given)
    assert whole.read_bytes() == data


def test_a_run_that_is_killed_twice_leaves_whole_lines(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = read_prompts(written(tmp_path, "p.txt", "a\nb"), tokenizer, raw=True)

    def killed(*_: Any) -> list[dict[str, Any]]:
        raise KeyboardInterrupt

    out = tmp_path / "a.jsonl"
    answer_file(lambda *_: [{"response": "x"}], prompts, out, together=1)
    data = out.read_bytes()
    first = data.index(b"\n") + 1
    out.write_bytes(data[: first + 20])
    with pytest.raises(KeyboardInterrupt):
        answer_file(killed, prompts, out, resume=True)
    assert out.read_bytes() == data[:first]


def test_a_file_in_the_way_is_said_first(tmp_path: Path) -> None:
    there = written(tmp_path, "a.jsonl", "")
    check_out(there, resume=True)
    for out, message in (
        (there, "exists already; --resume goes on with it"),
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "a.jsonl", "there is no folder"),
    ):
        with pytest.raises(UnmaskError, match=message):
            check_out(out, resume=False)

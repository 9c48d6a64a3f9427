"""Prompts -> texts: completions, stop strings, files of prompts and of answers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import byte_model
from transformers import PreTrainedTokenizerBase

from unmask.data.encode import Encoder, encode_records
from unmask.data.records import Conversation, CustomFields, Turn, to_conversation
from unmask.data.tokenizer import byte_tokenizer
from unmask.errors import UnmaskError, UnmaskWarning
from unmask.generation.config import DiffusionGenerationConfig
from unmask.generation.policy import Decision, Proposal, most_confident
from unmask.generation.text import (
    StopStrings,
    answer_file,
    chat_encoder,
    complete,
    completions,
    generate_answers,
    make_prompts,
    prompt_example,
    read_prompts,
)

USER = {"role": "user", "content": "Hi"}
SAID = {"role": "assistant", "content": "Yes?"}
PROMPTS = [list(text) for text in (b"a longer prompt", b"ab", b"", b"xyz", b"ab", b"another one")]
SETTINGS = {"max_new_tokens": 8, "eos_token_id": list(range(0, 250, 7))}


@pytest.fixture(scope="module")
def model() -> Any:
    return byte_model().double().eval()


def written(tmp_path: Path, name: str, data: bytes | str) -> Path:
    file = tmp_path / name
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return file


# Completions.


@pytest.mark.parametrize("fields", [{}, {"attention": "block_causal", "block_length": 4}], ids=str)
def test_a_completion_is_what_generate_returns_in_any_batch(
    tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any]
) -> None:
    model, settings = byte_model(**fields).double().eval(), {"temperature": 1.0, **SETTINGS}
    counts: list[int] = []
    found = complete(model, tokenizer, PROMPTS, batch_size=4, advance=counts.append, **settings)
    assert counts == [1] * 6 and len({tuple(done.ids) for done in found}) > 3
    for ids, done in zip(PROMPTS, found, strict=True):
        out = model.generate(torch.tensor([ids], dtype=torch.long), return_trace=True, **settings)
        in_answer = out.commit_step[0] >= 0
        assert done.ids == out.sequences[0, len(ids) :][in_answer].tolist()
        assert done.commit_step == out.commit_step[0][in_answer].tolist()
        assert done.text == tokenizer.decode(done.ids, skip_special_tokens=True)
        assert done.num_forwards == out.num_forwards.item() and done.states == []
    assert complete(model, tokenizer, PROMPTS, **settings) == found
    assert complete(model, tokenizer, []) == []
    with pytest.raises(UnmaskError, match="300 tokens"):
        complete(model, tokenizer, [list(b"x" * 300)], max_new_tokens=4)


@pytest.mark.parametrize(
    "settings", [{"generation_config": DiffusionGenerationConfig(max_new_tokens=700)}, {"preset": "coda"}]
)
def test_the_cache_has_room_for_any_canvas(
    settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = byte_model(attention="block_causal", block_length=32, max_position_embeddings=1024).eval()
    settings |= {"threshold": 0.001, "policy": "threshold", "temperature": 0.0, "eos_token_id": []}
    [done] = complete(model, tokenizer, [[65]], **settings)
    assert len(done.ids) >= 700


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"stop": "end"}, "stop must be a list of strings; got 'end'"),
        ({"seed": [1, 2]}, "seed: 2 numbers for 1 prompts"),
        ({"batch_size": 0}, "batch_size must be 1 or more; got 0"),
    ],
)
def test_a_setting_of_another_number_is_refused(
    settings: dict[str, Any], message: str, model: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(UnmaskError, match=message):
        complete(model, tokenizer, [[65]], max_new_tokens=4, **settings)


def test_two_calls_at_once_on_one_engine_are_refused(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    engine = model.make_engine()
    each = [{"max_new_tokens": 1, "stop": None}, {"max_new_tokens": 3}]
    first = completions(model, tokenizer, [[65], [66]], engine=engine, each=each)
    next(first)
    complete(model, tokenizer, [[67]], engine=engine, max_new_tokens=8)
    with pytest.raises(UnmaskError, match="another call took the events"):
        list(first)


def test_a_text_is_a_prompt_of_a_user(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["Hi", "Hello there"]
    encoded = [prompt_example(tokenizer, text) for text in texts]
    assert complete(model, tokenizer, texts, max_new_tokens=6) == complete(
        model, tokenizer, encoded, max_new_tokens=6
    )
    with pytest.raises(UnmaskError, match="put it into a list"):
        complete(model, tokenizer, "Hi", max_new_tokens=6)


def test_states_show_the_canvas_after_each_step(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = [list(b"ab"), list(b"hello")]
    for done in complete(model, tokenizer, prompts, keep_states=True, max_new_tokens=6, threshold=0.05):
        steps = done.num_forwards
        assert len(done.states) == steps and len(done.confidence) == len(done.entropy) == len(done.ids)
        for position, (token, step) in enumerate(zip(done.ids, done.commit_step, strict=True)):
            assert [state[position] for state in done.states] == [259] * step + [token] * (steps - step)


# Prompts.


def test_a_chat_prompt_is_the_prefix_that_training_shows(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = (Turn("system", "Be short."), Turn("user", "Hi <|im_end|>"), Turn("assistant", "Hello"))
    example = Encoder(tokenizer, layout="chat").encode(Conversation(turns, "here"))
    prompt = prompt_example(tokenizer, "Hi <|im_end|>", system="Be short.")
    assert prompt.input_ids == example.input_ids[: example.src_mask.index(False)]
    # A special token's string in what the user says is plain text: the only real ones are the template's.
    assert sum(i >= 256 for i in prompt.input_ids) == 5
    begun = prompt_example(tokenizer, "Hi <|im_end|>", system="Be short.", prefix="We<|mask|>")
    assert begun.input_ids == prompt.input_ids + list(b"We<|mask|>")
    assert begun.src_mask == [True] * len(prompt.input_ids) + [False] * 10
    assert prompt_example(tokenizer, " ", raw=True).input_ids == list(b" ")
    with pytest.raises(UnmaskError, match="empty"):
        prompt_example(tokenizer, " ")
    bare = byte_tokenizer()
    bare.chat_template = None
    with pytest.raises(UnmaskError, match="chat template"):
        prompt_example(bare, "Hi")


def test_what_the_template_leaves_out_of_a_prompt_is_said_as_in_training(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "".join(
        (
            "{%- for m in messages if m.role in ('user', 'assistant') %}",
            "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}",
            "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}",
        )
    )
    said = [{"role": "system", "content": "Be short."}, USER, SAID]
    record = {"messages": said, "tools": [{"name": "add"}]}
    _, report = encode_records([(record, "here")], Encoder(tokenizer))
    file = written(tmp_path, "p.jsonl", json.dumps(record))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_prompts(file, tokenizer)  # `generate --prompts`
    told = [str(one.message).removeprefix("prompt: ").removesuffix(".") for one in caught]
    assert "leaves out system turns" in told[0] and "tools" in told[1] and told == list(report.notes)
    with pytest.warns(UnmaskWarning, match="leaves out system turns"):
        prompt_example(tokenizer, "Hi", system="Be short.")  # `generate` and `infill --prompt`
    with pytest.warns(UnmaskWarning, match="leaves out system turns"):
        chat_encoder(tokenizer).prompt_example([Turn("system", "Be short."), Turn("user", "Hi")])  # `chat`


def test_earlier_responses_are_cut_into_blocks_as_in_training(tokenizer: PreTrainedTokenizerBase) -> None:
    model = byte_model(attention="block_causal", block_length=4).double().eval()
    turns = (Turn("user", "Hi"), Turn("assistant", "Yes indeed"), Turn("user", "And?"))
    example = chat_encoder(tokenizer).prompt_example(turns)
    [done] = complete(model, tokenizer, [example], max_new_tokens=1, keep_states=True)
    # Training masks the last token of the same conversation, and sees it by its own forward pass.
    whole = Encoder(tokenizer, layout="chat").encode(Conversation((*turns, Turn("assistant", "X")), "here"))
    size = len(example.input_ids)
    assert whole.input_ids[:size] == example.input_ids and whole.src_mask[:size] == example.src_mask
    ids = torch.tensor([[*example.input_ids, 259]])
    source = torch.tensor([[*example.src_mask, False]])
    logits = model(input_ids=ids, src_mask=source, training_mode="sft").logits[0, -1]
    logits[259] = -torch.inf
    assert done.confidence[0] == pytest.approx(logits.softmax(dim=0).max().item(), rel=1e-5)
    [other] = complete(model, tokenizer, [example.input_ids], max_new_tokens=1, keep_states=True)
    assert other.confidence[0] != pytest.approx(done.confidence[0], rel=1e-5)


# Stop strings.


def remask_all(proposal: Proposal) -> Decision:
    """Commit the most confident, and once mask everything again."""
    best = most_confident(proposal.confidence, proposal.candidates, proposal.quota)
    return Decision(best, proposal.committed & (proposal.step == 4)[:, None])


@pytest.mark.parametrize("policy", ["left_to_right", "remdm_cap", "remdm_rescale", remask_all])
@pytest.mark.parametrize("block_length", [None, 4])
def test_a_stop_string_waits_for_what_is_final(
    model: Any, tokenizer: PreTrainedTokenizerBase, policy: Any, block_length: int | None
) -> None:
    """A draft that would be masked again ends nothing: the answer is that without the stop string, cut."""
    eta = 1.0 if "remdm" in str(policy) else None
    settings = {"max_new_tokens": 12, "temperature": 1.0, "policy": policy, "eta": eta, **SETTINGS}
    settings |= {"block_length": block_length, "seed": list(range(30))}
    prompts = [PROMPTS[row % 3] for row in range(30)]
    whole = complete(model, tokenizer, prompts, **settings)
    stop = list("aeiou#%QX")
    cut = complete(model, tokenizer, prompts, stop=stop, **settings)
    cutter = StopStrings(tokenizer, stop)
    assert [done.text for done in cut] == [cutter.cut(done.text) for done in whole]
    shorter = sum(short.num_forwards < long.num_forwards for short, long in zip(cut, whole, strict=True))
    assert any(short.text != long.text for short, long in zip(cut, whole, strict=True))
    assert (shorter > 0) == (block_length is not None or policy == "left_to_right")  # later steps are saved


@pytest.mark.parametrize("text", ["", "ab", "xy.", "..x", "x\n\né", "é"])
def test_a_response_ends_with_the_token_that_completes_a_stop_string(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    stop, prompt = StopStrings(tokenizer, ["é", ".x"]), "é .x."  # none of the prompt counts
    ids = list((prompt + text).encode())
    start = len(prompt.encode())
    for end in range(start, len(ids) + 1):
        answer = bytes(ids[start:end]).decode(errors="replace")
        met = stop(torch.tensor([ids[:end]]), None, prompt_length=start)
        assert bool(met) == ("é" in answer or ".x" in answer)
    assert StopStrings(tokenizer, ["c", "bc"]).cut("abcd") == "a" and stop.cut("xyz") == "xyz"
    with pytest.raises(UnmaskError, match="stop"):
        StopStrings(tokenizer, ["a", ""])


# Files of prompts.

CALL = {"name": "add", "arguments": {"a": 1}}
# (record, the prompt's turns with the system's and the user's text, response)
RECORDS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": [USER]}, "Hi", ""),
    ({"messages": [USER, SAID]}, "Hi", "Yes?"),
    ({"messages": [USER, SAID, USER]}, "Hi Yes? Hi", ""),
    ({"messages": [{"role": "system", "content": "s"}, USER, SAID]}, "s Hi", "Yes?"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]}, "Hi", "<tool_call>"),
    ({"conversations": [{"from": "human", "value": "Hi"}]}, "Hi", ""),
    ({"prompt": "Hi"}, "Hi", ""),
    ({"prompt": "Hi", "completion": ""}, "Hi", ""),
    ({"prompt": [USER, SAID, USER]}, "Hi Yes? Hi", ""),
    ({"prompt": "Hi", "completion": "a", "messages": None}, "Hi", "a"),
    ({"instruction": "Hi", "input": "2"}, "Hi\n2", ""),
    ({"instruction": "Hi", "output": "a", "history": [["x", "y"]]}, "x y Hi", "a"),
]


@pytest.mark.parametrize(("record", "turns", "expected"), RECORDS)
def test_all_that_training_shows_before_the_last_response_is_the_prompt(
    tokenizer: PreTrainedTokenizerBase, record: dict[str, Any], turns: str, expected: str
) -> None:
    encoder = Encoder(tokenizer, train_on="last")
    [prompt] = make_prompts([(record, "x line 1")], encoder, answered=False)
    text = str(tokenizer.decode(prompt.example.input_ids))
    assert re.findall(r"(?s)<\|im_start\|>\w+\n(.+?)<\|im_end\|>", text) == turns.split(" ")
    assert prompt.text == turns.split(" ")[-1] and prompt.expected.startswith(expected)
    if expected:
        learnt = encoder.encode(to_conversation(record, where="x line 1"))
        start = learnt.src_mask.index(False)
        assert prompt.example.input_ids == learnt.input_ids[:start]
        stop = learnt.input_ids.index(258, start)
        assert prompt.expected == tokenizer.decode(learnt.input_ids[start:stop])


def test_prompts_with_responses(tokenizer: PreTrainedTokenizerBase) -> None:
    """As `evaluation.prompts` has them: the response is needed, and turns after it are left out."""
    record, fields = {"q": "Why?", "a": "So."}, CustomFields(instruction_field="q", response_field="a")
    [prompt] = make_prompts([(record, "x")], Encoder(tokenizer), "custom", fields)
    assert (prompt.text, prompt.expected) == ("Why?", "So.")
    [prompt] = make_prompts([({"messages": [USER, SAID, USER]}, "x")], Encoder(tokenizer))
    assert prompt.example == prompt_example(tokenizer, "Hi") and prompt.expected == "Yes?"
    with pytest.raises(UnmaskError, match=r"^x line 2: "):
        make_prompts([({"prompt": "a"}, "x line 2")], Encoder(tokenizer))


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = written(tmp_path, "p.txt", "\ufeffone\r\n\n two\n")
    one, two = read_prompts(file, tokenizer, system="Be short.", prefix="We")
    assert (one.text, one.location, two.text, two.location) == ("one", "p.txt line 1", " two", "p.txt line 3")
    assert one.example == prompt_example(tokenizer, "one", system="Be short.", prefix="We")
    raw = read_prompts(file, tokenizer, raw=True)[1].example
    assert (raw.input_ids, raw.src_mask) == (list(b" two"), [False] * 4)
    longest = len(one.example.input_ids)
    assert read_prompts(file, tokenizer, system="Be short.", prefix="We", longest=longest + 1)[0] == one
    with pytest.raises(UnmaskError, match=r"p.txt line 1: .*max_new_tokens"):
        read_prompts(file, tokenizer, system="Be short.", prefix="We", longest=longest - 1)


def test_a_system_prompt_is_for_those_that_have_none_and_unused_fields_are_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    lines = [{"prompt": "a", "source": "x"}, {"messages": [{"role": "system", "content": "own"}, USER]}]
    file = written(tmp_path, "p.jsonl", "\n".join(map(json.dumps, lines)))
    with pytest.warns(UnmaskWarning, match=r"fields not used: source"):
        one, two = read_prompts(file, tokenizer, system="Be short.")
    assert one.example == prompt_example(tokenizer, "a", system="Be short.")
    assert two.example == prompt_example(tokenizer, "Hi", system="own")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.txt", b"a\nb\xff\n", "p.txt line 2: "),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}', "p.jsonl line 2: "),
        ("p.txt", b"\n \n", "no prompt"),
        ("p.jsonl", b'{"prompt": " "}', "p.jsonl line 1.*empty"),
        ("p.jsonl", b'{"title": "a"}', "line 1: .*title"),
        ("p.jsonl", b'{"messages": [{"role": "king", "content": "a"}]}', "'king'"),
    ],
)
def test_bad_prompts_are_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str, data: bytes, message: str
) -> None:
    with pytest.raises(UnmaskError, match=message):
        read_prompts(written(tmp_path, name, data), tokenizer)


# Files of answers.


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

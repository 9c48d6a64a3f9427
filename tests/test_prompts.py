"""Chat and raw prompts, and files of them."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import byte_model, written
from transformers import PreTrainedTokenizerBase

from unmask.data.encode import Encoder, encode_records
from unmask.data.records import Conversation, CustomFields, Turn, to_conversation
from unmask.data.tokenizer import byte_tokenizer
from unmask.errors import UnmaskError, UnmaskWarning
from unmask.generation.prompts import chat_encoder, make_prompts, prompt_example, read_prompts
from unmask.generation.text import complete

USER = {"role": "user", "content": "Hi"}
SAID = {"role": "assistant", "content": "Yes?"}


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

"""A prompt ends exactly where training lets the response start, by every route that asks a model."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny import byte_model
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unmask.data.encode import Encoder, Example
from unmask.data.records import to_conversation
from unmask.data.tokenizer import byte_tokenizer
from unmask.evaluation.choose import choose_answers
from unmask.generation.chat import chat
from unmask.generation.infill import Gap, infill_text
from unmask.generation.text import chat_encoder, make_prompts, prompt_example, read_prompts

# As Qwen3's: reasoning of earlier turns is dropped, the last answer has a think block, and the prompt opens an
# empty one where thinking is off.
TEMPLATE = r"""
{%- set ns = namespace(query=-1) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{%- set ns.query = loop.index0 %}{%- endif %}
{%- endfor %}
{%- if tools %}{{- '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- set content = message.content %}
{%- if message.role == 'assistant' %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in content else '' %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- if loop.index0 > ns.query %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}
{{- content }}
{%- for call in message.tool_calls %}{{- '<tool_call>' + call.function | tojson + '</tool_call>' }}{%- endfor %}
{%- else %}{{- content }}{%- endif %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""

USER = {"role": "user", "content": "1+2?"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
ADD = {"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}
RECORDS: dict[str, dict[str, Any]] = {
    "plain": {
        "messages": [{"role": "system", "content": "Sum."}, USER, {"role": "assistant", "content": "3"}]
    },
    "thinking": {"messages": [USER, {"role": "assistant", "content": "<think>\nAdd.\n</think>\n\n3"}]},
    "call": {
        "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
        "tools": [ADD],
    },
    "result": {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "It is 3."},
        ],
        "tools": [ADD],
    },
    "turns": {
        "messages": [
            USER,
            {"role": "assistant", "content": "3"},
            USER,
            {"role": "assistant", "content": "Three"},
        ]
    },
}


@pytest.fixture(params=["template", "off", "on"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    made = byte_tokenizer()
    made.chat_template, made.init_kwargs["thinking"] = TEMPLATE, request.param  # as training records it
    return made


class Watched:
    """A model that keeps the ids that it is asked about."""

    def __init__(self, **fields: Any):
        self.model: Any = byte_model(max_position_embeddings=512, **fields).eval()
        self.asked: list[list[int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def infill(self, ids: Tensor, is_gap: Tensor, *more: Any, **settings: Any) -> Any:
        self.asked += ids.tolist()
        return self.model.infill(ids, is_gap, *more, **settings)

    def masked_nll(self, ids: Tensor, *more: Any, **settings: Any) -> Any:
        self.asked += ids.tolist()
        return self.model.masked_nll(ids, *more, **settings)


def starts(example: Example) -> list[int]:
    """Where the responses of an example start."""
    pairs = pairwise([True, *example.src_mask])
    return [i for i, (before, now) in enumerate(pairs) if before and not now]


@pytest.mark.parametrize("kind", RECORDS)
def test_a_record_is_asked_as_it_is_learnt(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, kind: str
) -> None:
    thinking = tokenizer.init_kwargs["thinking"]
    if kind == "thinking" and thinking == "off":
        pytest.skip("training drops reasoning under thinking=off")
    record, encoder = RECORDS[kind], Encoder(tokenizer, layout="chat")
    conversation = to_conversation(record, where="here")
    learnt = encoder.encode(conversation)
    prompt = learnt.input_ids[: starts(learnt)[-1]]
    opening = {"template": "assistant\n", "off": "</think>\n\n", "on": "<think>\n"}[thinking]
    assert str(tokenizer.decode(prompt)).endswith(opening)
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps(record), encoding="utf-8")
    [read] = read_prompts(file, tokenizer)  # `generate --prompts`
    [evaluated] = make_prompts([(record, "here")], encoder)  # `evaluation.prompts`
    assert read.example.input_ids == evaluated.example.input_ids == prompt
    assert read.example.src_mask == evaluated.example.src_mask == learnt.src_mask[: len(prompt)]


def test_a_question_is_asked_as_it_is_learnt(tokenizer: PreTrainedTokenizerBase) -> None:
    model, encoder = Watched(), Encoder(tokenizer, layout="chat")
    learnt = encoder.encode(to_conversation(RECORDS["plain"], where="here"))
    start = starts(learnt)[-1]
    question = prompt_example(tokenizer, "1+2?", system="Sum.")  # `generate --prompt`
    assert question.input_ids == learnt.input_ids[:start]
    question = prompt_example(tokenizer, "1+2?", system="Sum.", to_answer=True)
    stop = len(learnt.input_ids) - 1  # without "\n"
    choose_answers(model, tokenizer, ["3", "4"], [question], [0], num_samples=2)  # `--choice`
    assert learnt.input_ids[:stop] in model.asked
    model.asked.clear()
    end = chat_encoder(tokenizer).end_token_id
    infill_text(model, tokenizer, [Gap(1, 1)], prompt=question, end=end)  # `infill --prompt`
    assert model.asked == [[*learnt.input_ids[: stop - 2], 0, end]]


def test_every_turn_of_a_chat_is_asked_as_it_is_learnt(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    thinking, model = tokenizer.init_kwargs["thinking"], Watched()
    written = {"template": "<think>\n\n</think>\n\n3", "off": "3", "on": "Add.\n</think>\n\n3"}[thinking]
    from unmask.generation import chat as module

    ids: list[list[int]] = []

    def complete(_: Any, __: Any, prompts: list[Example], **___: Any) -> list[Any]:
        ids.append(prompts[0].input_ids)
        return [module.Completion(written, [], [])]

    monkeypatch.setattr(module, "complete", complete)
    lines = iter(["1+2?", "1+2?", "1+2?"])
    console = Console(file=io.StringIO())

    def ask() -> str:
        return next(lines, "/quit")

    chat(model, tokenizer, ask=ask, console=console)
    whole = "<think>\n" * (thinking == "on") + written
    messages = [USER, {"role": "assistant", "content": whole}] * 3
    for turn in (1, 2, 3):
        conversation = to_conversation({"messages": messages[: 2 * turn]}, where="here")
        learnt = Encoder(tokenizer, layout="chat").encode(conversation)
        assert ids[turn - 1] == learnt.input_ids[: starts(learnt)[-1]]

"""Chat templates of other families, written by hand in their shape: exactly the responses are learnt."""

from __future__ import annotations

import json
from itertools import groupby
from typing import Any, NamedTuple

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from unmask.data.encode import DropRecord, Encoder, Example, encode_records
from unmask.data.records import Conversation, RecordError, Turn, call_text, to_conversation
from unmask.data.template import special_strings
from unmask.data.tokenizer import CHATML_TEMPLATE, byte_tokenizer

# As Llama 3: a header for each role, contents trimmed, calls as an object with "parameters".
LLAMA = r"""
{{- bos_token }}
{%- for message in messages %}
  {%- set role = 'ipython' if message.role == 'tool' else message.role %}
  {{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}
  {%- if message.tool_calls %}
    {%- if message.tool_calls | length != 1 %}{{- raise_exception('One call in a turn.') }}{%- endif %}
    {%- set call = message.tool_calls[0].function %}
    {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' }}
  {%- else %}
    {{- message.content | trim }}
  {%- endif %}
  {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
"""

# As Mistral: the system prompt inside the first instruction, users and assistants strictly in turn.
MISTRAL = r"""
{%- if messages[0].role == 'system' %}
  {%- set system = messages[0].content + '\n\n' %}
  {%- set turns = messages[1:] %}
{%- else %}
  {%- set system = '' %}
  {%- set turns = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in turns %}
  {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('After the system prompt users and assistants must alternate.') }}
  {%- endif %}
  {%- if message.role == 'user' %}
    {{- '[INST] ' + (system if loop.first else '') + message.content + ' [/INST]' }}
  {%- elif message.role == 'assistant' %}
    {{- ' ' + message.content + eos_token }}
  {%- else %}
    {{- raise_exception('There is no role ' + message.role + '.') }}
  {%- endif %}
{%- endfor %}
"""

# As Gemma: no system role, the assistant is called model, contents trimmed, alternation demanded.
GEMMA = r"""
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for message in messages %}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
  {%- endif %}
  {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
  {{- '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}
"""

# As Qwen 2.5: a default system prompt, the list of tools in it, calls in tags, results as user turns.
TOOLS = r"""
{{- '<|im_start|>system\n' }}
{{- messages[0].content if messages[0].role == 'system' else 'You help.' }}
{%- if tools %}{{- '\n\n# Tools' }}{%- endif %}
{%- for tool in tools or [] %}{{- '\n' + tool | tojson }}{%- endfor %}
{{- '<|im_end|>\n' }}
{%- for message in messages %}
  {%- if message.role == 'assistant' and message.tool_calls %}
    {{- '<|im_start|>assistant' }}
    {%- if message.content %}{{- '\n' + message.content }}{%- endif %}
    {%- for call in message.tool_calls %}
      {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
      {{- call.function.arguments | tojson + '}\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
  {%- elif message.role == 'tool' %}
    {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
  {%- elif message.role != 'system' or not loop.first %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""


class Family(NamedTuple):
    template: str
    specials: tuple[str, ...]
    end: str
    trims: bool = False
    system: bool = True
    alternates: bool = False


CHATML = ("<|im_start|>", "<|im_end|>")
FAMILIES = {
    "chatml": Family(CHATML_TEMPLATE, CHATML, "<|im_end|>"),
    "tools": Family(TOOLS, CHATML, "<|im_end|>"),
    "llama": Family(
        LLAMA, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>", trims=True
    ),
    "mistral": Family(MISTRAL, ("[INST]", "[/INST]"), "</s>", alternates=True),
    "gemma": Family(
        GEMMA,
        ("<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        trims=True,
        system=False,
        alternates=True,
    ),
}


def encoder_of(name: str, **settings: Any) -> Encoder:
    family = FAMILIES[name]
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    if family.end == "</s>":
        tokenizer.add_special_tokens({"eos_token": "</s>"})
    tokenizer.add_special_tokens({"extra_special_tokens": list(family.specials)})
    tokenizer.chat_template = family.template
    return Encoder(tokenizer, layout="chat", **settings)


ENCODERS = {name: encoder_of(name) for name in FAMILIES}
every_family = pytest.mark.parametrize("name", FAMILIES)


def learnt(encoder: Encoder, row: Example) -> list[str]:
    """The supervised texts without the one end token that each must end in."""
    runs = groupby(zip(row.src_mask, row.input_ids, strict=True), key=lambda pair: pair[0])
    texts = []
    for ids in ([i for _, i in run] for is_source, run in runs if not is_source):
        assert ids[-1] == encoder.end_token_id
        assert encoder.end_token_id not in ids[:-1]
        texts.append(str(encoder.tokenizer.decode(ids[:-1])))
    return texts


def control_tokens(encoder: Encoder, row: Example) -> int:
    ids = {index for index, token in encoder.tokenizer.added_tokens_decoder.items() if token.special}
    return sum(i in ids for i in row.input_ids)


def rendering(encoder: Encoder, conversation: Conversation) -> str:
    messages = [{"role": turn.role, "content": turn.content} for turn in conversation.turns]
    text = encoder.tokenizer.apply_chat_template(messages, tokenize=False)
    assert isinstance(text, str)
    return text


def test_the_layouts_are_those_of_the_families() -> None:
    """So that nobody takes these tests for more than they are."""
    turns = (Turn("system", "s"), Turn("user", "q"), Turn("assistant", "a"))
    whole = {
        "chatml": "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
        "<|im_start|>assistant\na<|im_end|>\n",
        "tools": "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
        "<|im_start|>assistant\na<|im_end|>\n",
        "llama": "<s><|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\nq<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\na<|eot_id|>",
        "mistral": "<s>[INST] s\n\nq [/INST] a</s>",
        "gemma": "<s><start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\na<end_of_turn>\n",
    }
    for name, encoder in ENCODERS.items():
        given = turns if FAMILIES[name].system else turns[1:]
        row = encoder.encode(Conversation(given, "here"))
        assert encoder.tokenizer.decode(row.input_ids) == whole[name]
        assert encoder.tokenizer.convert_ids_to_tokens(encoder.end_token_id) == FAMILIES[name].end
        # The blank before a response is a part of it, as words of many tokenizers begin with theirs.
        assert learnt(encoder, row) == [" a" if name == "mistral" else "a"]


SPECIALS = [
    "<|im_end|>",
    "<|im_start|>",
    "<|eot_id|>",
    "<|end_header_id|>",
    "</s>",
    "<s>",
    "[INST]",
    " [/INST]",
]
SPECIALS += ["<start_of_turn>", "<end_of_turn>", "<|mask|>", "<|endoftext|>"]
words = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        [*SPECIALS, "\n", "\n\n", " ", "e\u0301", "\u00e9", "👩‍👩‍👧", "שלום", "\u0000", "\ufeff"]
    ),
    st.sampled_from(["<|im_end|>\n<|im_start|>assistant\n", " [/INST] a</s>", "\ue0000\ue001r1\ue002"]),
)
texts = st.lists(words, max_size=5).map("".join)
answers = texts.filter(lambda text: text.strip() != "")


@st.composite
def conversations(draw: st.DrawFn, alternates: bool = False, system: bool = True) -> Conversation:
    turns = []
    if system and draw(st.booleans()):
        turns.append(Turn("system", draw(texts)))
    for _ in range(draw(st.integers(1, 3))):
        turns.append(Turn("user", draw(texts)))
        if not alternates and draw(st.booleans()):
            turns.append(Turn("user", draw(texts)))
        turns.append(Turn("assistant", draw(answers), draw(st.integers(0, 3)) > 0))
        if not alternates and draw(st.booleans()):
            turns += [Turn("tool", draw(texts)), Turn("assistant", draw(answers))]
    return Conversation(tuple(turns), "here")


@every_family
@settings(max_examples=60)
@given(data=st.data())
def test_round_trip(name: str, data: st.DataObject) -> None:
    """Supervised positions hold exactly the responses; all positions together exactly the rendering."""
    family, encoder = FAMILIES[name], ENCODERS[name]
    conversation = data.draw(conversations(family.alternates, family.system))
    expected = [t.content for t in conversation.turns if t.role == "assistant" and t.train]
    assume(expected)
    row = encoder.encode(conversation)
    blank = " " if name == "mistral" else ""  # of the template, before the response
    assert learnt(encoder, row) == [blank + (text.strip() if family.trims else text) for text in expected]
    shown = max(i for i, turn in enumerate(conversation.turns) if turn.role == "assistant") + 1
    whole = Conversation(conversation.turns[:shown], "here")
    assert encoder.tokenizer.decode(row.input_ids) == rendering(encoder, whole)
    # Of control tokens there are those the template writes, whatever the contents say.
    bare = Conversation(tuple(Turn(t.role, "x") for t in whole.turns), "here")
    assert control_tokens(encoder, row) == control_tokens(encoder, encoder.encode(bare))


@every_family
@settings(max_examples=20)
@given(data=st.data())
def test_the_prompt_of_generation_is_the_training_prefix(name: str, data: st.DataObject) -> None:
    family = FAMILIES[name]
    encoder = ENCODERS[name]
    conversation = data.draw(conversations(family.alternates, family.system))
    turns = (*conversation.turns[:-1], Turn("assistant", conversation.turns[-1].content))
    row = encoder_of(name, train_on="last").encode(Conversation(turns, "here"))
    prompt = encoder.encode_prompt(turns[:-1])
    assert row.input_ids[: len(prompt)] == prompt
    assert row.src_mask.index(False) == len(prompt)


# Turns that are not to be learnt


@every_family
def test_turns_that_are_context(name: str) -> None:
    encoder = ENCODERS[name]
    messages = [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    record = {"messages": [{"role": role, "content": text} for role, text in messages]}
    record["messages"][1]["train"] = False  # pyright: ignore[reportArgumentType]
    shared = {
        "conversations": [{"from": {"user": "human"}.get(role, "gpt"), "value": t} for role, t in messages]
    }
    shared["conversations"][1]["weight"] = 0  # pyright: ignore[reportArgumentType]
    one, other = (encoder.encode(to_conversation(given, where="x")) for given in (record, shared))
    assert one == other
    blank = " " if name == "mistral" else ""
    assert learnt(encoder, one) == [f"{blank}b"]
    del record["messages"][1]["train"]
    assert learnt(encoder, encoder.encode(to_conversation(record, where="x"))) == [f"{blank}a", f"{blank}b"]


# Tools

CALL = {"name": "add", "arguments": {"a": [1, 2], "note": 'é "<|im_end|>" \n'}}
CALLED: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "tool", "content": "3 <|im_end|>"},
        {"role": "assistant", "content": "It is 3."},
    ],
    "tools": [{"type": "function", "function": {"name": "add", "description": "Adds. <|im_start|>"}}],
}
ARGUMENTS = json.dumps(CALL["arguments"], ensure_ascii=False)


def test_calls_are_learnt_as_the_template_writes_them() -> None:
    encoder = ENCODERS["llama"]
    row = encoder.encode(to_conversation(CALLED, where="x"))
    assert learnt(encoder, row) == [f'{{"name": "add", "parameters": {ARGUMENTS}}}', "It is 3."]
    encoder = ENCODERS["tools"]
    conversation = to_conversation(CALLED, where="x")
    row = encoder.encode(conversation)
    assert learnt(encoder, row) == [call_text(conversation.turns[1]), "It is 3."]
    whole = str(encoder.tokenizer.decode(row.input_ids))
    assert (
        '# Tools\n{"type": "function", "function": {"name": "add", "description": "Adds. <|im_start|>"}}'
        in whole
    )
    assert "<tool_response>\n3 <|im_end|>\n</tool_response>" in whole
    assert control_tokens(encoder, row) == 2 * 5  # system, user, call, result, answer


def test_ids_of_calls_reach_a_template_that_writes_them() -> None:
    record = json.loads(json.dumps(CALLED))
    record["messages"][1]["tool_calls"][0]["id"] = "c<|im_end|>1"
    record["messages"][2]["tool_call_id"] = "c<|im_end|>1"
    conversation = to_conversation(record, where="x")
    without = to_conversation(CALLED, where="x")
    for name in ("chatml", "llama", "tools"):  # none of them writes ids
        assert ENCODERS[name].encode(conversation) == ENCODERS[name].encode(without)
    tokenizer = encoder_of("tools").tokenizer
    tokenizer.chat_template = TOOLS.replace(
        '"name": "\' + call', '"id": "\' + call.id + \'", "name": "\' + call'
    ).replace("<tool_response>\\n'", "<tool_response>\\n' + message.tool_call_id + ': '")
    encoder = Encoder(tokenizer)
    row = encoder.encode(conversation)
    called, answer = learnt(encoder, row)
    assert called == call_text(conversation.turns[1]).replace('{"name"', '{"id": "c<|im_end|>1", "name"')
    assert answer == "It is 3."
    assert "<tool_response>\nc<|im_end|>1: 3 <|im_end|>\n" in str(tokenizer.decode(row.input_ids))
    assert control_tokens(encoder, row) == 2 * 5
    prompt = encoder.encode_prompt(conversation.turns[:3], conversation.tools)
    assert row.input_ids[: len(prompt)] == prompt


def test_calls_with_words_before_them_and_several() -> None:
    encoder = ENCODERS["tools"]
    turns = (
        Turn("user", "q"),
        Turn("assistant", "Let me see.", tool_calls=(CALL, CALL)),
        Turn("tool", "1"),
        Turn("assistant", "a", tool_calls=(CALL,), train=False),
        Turn("tool", "2"),
        Turn("assistant", "done"),
    )
    row = encoder.encode(Conversation(turns, "here"))
    assert learnt(encoder, row) == [call_text(turns[1]), "done"]


@pytest.mark.parametrize("layout", ["chat", "separator"])
def test_calls_are_written_as_text_for_a_template_that_does_not_know_them(layout: Any) -> None:
    encoder = Encoder(byte_tokenizer(), layout=layout)
    conversation = to_conversation(CALLED, where="x")
    row = encoder.encode(conversation)
    assert learnt(encoder, row) == [call_text(conversation.turns[1]), "It is 3."]
    examples, report = encode_records([(CALLED, "x line 1")], encoder)
    assert examples[0].input_ids == row.input_ids and any("list of tools" in n for n in report.notes)
    assert not encode_records([(CALLED, "x line 1")], ENCODERS["tools"])[1].unused


def test_a_prompt_shows_the_tools_that_training_shows() -> None:
    encoder = ENCODERS["tools"]
    conversation = to_conversation(CALLED, where="x")
    row = encoder_of("tools", train_on="last").encode(conversation)
    prompt = encoder.encode_prompt(conversation.turns[:-1], conversation.tools)
    assert row.input_ids[: len(prompt)] == prompt and row.src_mask.index(False) == len(prompt)


# What a template refuses


@pytest.mark.parametrize(
    ("name", "turns", "reason"),
    [
        (
            "gemma",
            (Turn("system", "s"), Turn("user", "q"), Turn("assistant", "a")),
            "System role not supported",
        ),
        ("gemma", (Turn("user", "q"), Turn("user", "r"), Turn("assistant", "a")), "roles must alternate"),
        (
            "mistral",
            (Turn("user", "q"), Turn("assistant", "a"), Turn("tool", "1"), Turn("assistant", "b")),
            "alternate",
        ),
        ("llama", (Turn("user", "q"), Turn("assistant", "", tool_calls=(CALL, CALL))), "One call in a turn"),
    ],
)
def test_a_role_the_template_refuses_stops_or_is_skipped(
    name: str, turns: tuple[Turn, ...], reason: str
) -> None:
    def record(turns: tuple[Turn, ...]) -> dict[str, Any]:
        return {
            "messages": [
                {"role": turn.role, "content": turn.content, "tool_calls": list(turn.tool_calls)}
                for turn in turns
            ]
        }

    good = record((Turn("user", "q"), Turn("assistant", "a")))
    records = [
        (good, "x line 1"),
        (record(turns), "x line 2"),
        (good, "x line 3"),
        (record(turns), "x line 4"),
    ]
    with pytest.raises(RecordError) as caught:
        encode_records(records, ENCODERS[name])
    assert str(caught.value).startswith("x line 2: the chat template refuses the turns: ")
    assert reason in str(caught.value) and str(caught.value).count("\n") == 0
    examples, report = encode_records(records, ENCODERS[name], on_bad_record="skip")
    assert [row.record for row in examples] == [0, 2]
    assert report.skipped == {"the chat template refuses the turns": (2, "x line 2")}
    assert (report.records, report.kept) == (4, 2)


def test_a_template_without_a_system_role_is_used_without_system_prompts() -> None:
    encoder = encoder_of("gemma", include_system_prompt=False)
    turns = (Turn("system", "s"), Turn("user", "q"), Turn("assistant", "a"))
    assert encoder.encode(Conversation(turns, "x")) == encoder.encode(Conversation(turns[1:], "x"))


def test_a_template_that_loses_a_call_drops_the_record() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML_TEMPLATE.replace(
        "message.content", "(message.content if not message.tool_calls else '') "
    ).replace("'<|im_end|>\\n'", "('!' if message.tool_calls else '<|im_end|>\\n')")
    with pytest.raises(DropRecord, match="rewrites the response"):
        Encoder(tokenizer).encode(to_conversation(CALLED, where="x"))


def test_special_strings() -> None:
    pattern = special_strings(byte_tokenizer())
    assert pattern.findall("a<|im_end|><|im_end><|mask|>") == ["<|im_end|>", "<|mask|>"]

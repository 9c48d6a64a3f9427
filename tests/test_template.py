"""Chat templates of other families, written by hand in their shape: exactly the responses are learnt."""

from __future__ import annotations

import json
from itertools import groupby
from typing import Any, NamedTuple

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from unmask.data.encode import DropRecord, Encoder, Example, encode_records, separator_template
from unmask.data.records import Conversation, RecordError, Turn, call_text, to_conversation
from unmask.data.template import special_strings
from unmask.data.tokenizer import CHATML_TEMPLATE, byte_tokenizer
from unmask.errors import UnmaskError

# As Qwen 3: no generation tag, thinking moved about, and before the final assistant turn
# alone an empty think block.
QWEN = r"""
{%- if messages[0].role == 'system' %}
{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(query=-1) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{%- set ns.query = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'user' %}
{{- '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}
{%- elif message.role == 'assistant' %}
{%- set content = message.content %}
{%- set thought = '' %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.query %}
{{- '<think>\n' + thought + '\n</think>\n\n' + content.lstrip('\n') }}
{%- else %}
{{- content }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""

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

# As DeepSeek R1: the generation prompt opens a think block, earlier thoughts are left out.
OPENED = r"""
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + message.content.split('</think>')[-1] | trim + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}
"""


class Family(NamedTuple):
    template: str | None
    specials: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")
    trims: bool = False
    system: bool = True
    alternates: bool = False


FAMILIES = {
    "chatml": Family(CHATML_TEMPLATE),
    "separator": Family(None),
    "tools": Family(TOOLS),
    "llama": Family(LLAMA, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), trims=True),
    "mistral": Family(MISTRAL, ("[INST]", "[/INST]", "</s>"), alternates=True),
    "gemma": Family(GEMMA, ("<start_of_turn>", "<end_of_turn>"), True, system=False, alternates=True),
}


def encoder_of(name: str, **settings: Any) -> Encoder:
    family = FAMILIES[name]
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    if "</s>" in family.specials:
        tokenizer.add_special_tokens({"eos_token": "</s>"})
    tokenizer.add_special_tokens({"extra_special_tokens": list(family.specials)})
    tokenizer.chat_template = family.template
    return Encoder(tokenizer, **settings)


def with_template(template: str, **settings: Any) -> Encoder:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return Encoder(tokenizer, **settings)


ENCODERS = {name: encoder_of(name) for name in FAMILIES}
every_family = pytest.mark.parametrize("name", FAMILIES)


def talk(*contents: str, system: str | None = None) -> Conversation:
    """A conversation of user and assistant in turn."""
    turns = [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(contents)]
    return Conversation(tuple([Turn("system", system)] if system else []) + tuple(turns), "here")


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
    template = encoder.chat_template
    return str(encoder.tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template))


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("separator", "s\n\nq\n\n### Response:\na<|im_end|>"),
        ("mistral", "<s>[INST] s\n\nq [/INST] a</s>"),
        ("gemma", "<s><start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\na<end_of_turn>\n"),
    ],
)  # fmt: skip
def test_the_layouts_are_those_of_the_families(name: str, whole: str) -> None:
    """So that nobody takes these tests for more than they are."""
    encoder = ENCODERS[name]
    row = encoder.encode(talk("q", "a", system="s" if FAMILIES[name].system else None))
    assert encoder.tokenizer.decode(row.input_ids) == whole
    # The blank before a response is a part of it, as words of many tokenizers begin with theirs.
    assert learnt(encoder, row) == [" a" if name == "mistral" else "a"]


SPECIALS = ["<|im_end|>", "<|im_start|>", "<|eot_id|>", "<|end_header_id|>", "</s>", "<s>", "[INST]"]
SPECIALS += [" [/INST]", "<start_of_turn>", "<end_of_turn>", "<|mask|>", "<|endoftext|>"]
ODD = ["\n", "\n\n", " ", "e\u0301", "👩‍👩‍👧", "שלום", "\u0000", "\ufeff", "<think>"]
ODD += [
    "<|im_end|>\n<|im_start|>assistant\n",
    " [/INST] a</s>",
    "\ue0000\ue001r1\ue002",
    "\ue0000\ue001s0\ue002",
]
words = st.one_of(st.text(max_size=8), st.sampled_from([*SPECIALS, *ODD]))
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
@settings(max_examples=40)
@given(data=st.data())
def test_round_trip(name: str, data: st.DataObject) -> None:
    """Supervised positions hold exactly the responses; all positions together exactly the rendering; and
    generation asks with the ids that are before a response."""
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
    for place, turn in enumerate(whole.turns):
        if turn.role == "assistant" and turn.train:
            row = encoder.encode(Conversation(whole.turns[: place + 1], "here"))
            prompt = encoder.prompt_example(whole.turns[:place])
            size = len(prompt.input_ids)
            assert (row.input_ids[:size], row.src_mask[:size]) == (prompt.input_ids, prompt.src_mask)
            assert not row.src_mask[size] and (
                row.src_mask[size - 1] or row.input_ids[size - 1] == encoder.end_token_id
            )


# Where a response starts

THOUGHT = "<think>\nhm\n</think>\n\n"
BLANK = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize("template", [QWEN, OPENED], ids=["qwen", "opened"])
@pytest.mark.parametrize("thinking", ["template", "off", "on"])
def test_a_prompt_ends_where_training_lets_the_response_start(template: str, thinking: Any) -> None:
    encoder = with_template(template, thinking=thinking)
    opening = {"off": BLANK, "on": "<think>\n", "template": "" if template is QWEN else "<think>\n"}[thinking]
    for answer in ("b", f"{BLANK}b", f"{THOUGHT}b"):
        conversation = talk("q", "a", "r", answer)
        if thinking == "off" and answer.startswith(THOUGHT) and template is QWEN:
            with pytest.raises(DropRecord, match="thinking=off"):
                encoder.encode(conversation)
            continue
        row, prompt = encoder.encode(conversation), encoder.prompt_example(conversation.turns[:3])
        size = len(prompt.input_ids)
        assert (row.input_ids[:size], row.src_mask[:size]) == (prompt.input_ids, prompt.src_mask)
        assert str(encoder.tokenizer.decode(prompt.input_ids)).endswith(f"assistant\n{opening}")
        thought = THOUGHT if answer.startswith(THOUGHT) and template is QWEN else BLANK
        written = "b" if thinking == "off" else f"{thought}b".removeprefix(opening)
        assert learnt(encoder, row)[-1] == written
        first = "" if opening == BLANK or (template is QWEN and not opening) else BLANK.removeprefix(opening)
        assert learnt(encoder, row)[0] == f"{first}a"
        assert (
            encoder.tokenizer.decode(row.input_ids[size:][: -1 if template is QWEN else None])
            == f"{written}<|im_end|>"
        )


def test_reasoning_is_written_where_the_template_writes_it_and_its_loss_is_said() -> None:
    encoder = with_template(QWEN)
    turns = [Turn("user", "q"), Turn("assistant", "b", reasoning="hm")]
    assert learnt(encoder, encoder.encode(Conversation(tuple(turns), "here"))) == [f"{THOUGHT}b"]
    known = with_template(
        CHATML_TEMPLATE.replace("message.content +", "(message.thinking or '') + '|' + message.content +")
    )
    assert learnt(known, known.encode(Conversation(tuple(turns), "here"))) == ["hm|b"]
    message = {"role": "assistant", "content": "a", "reasoning": "hm"}
    record = {"messages": [{"role": "user", "content": "q"}, message] * 2}
    _, report = encode_records([(record, "x line 1")], encoder)
    assert report.notes == {"the chat template leaves out the reasoning of some turns": 1}


def test_a_tag_in_the_text_that_costs_a_part_of_it_drops_the_record() -> None:
    record = {"instruction": "q", "output": "The tag </think> closes <think>. Use </think> once."}
    examples, report = encode_records([(record, "x line 1")], with_template(QWEN))
    assert not examples and report.dropped == {
        "the chat template rewrites the response beyond recognition": (1, "x line 1")
    }
    assert learnt(ENCODERS["chatml"], encode_records([(record, "x")], ENCODERS["chatml"])[0][0]) == [
        record["output"]
    ]


def test_thinking_on_needs_a_think_block() -> None:
    with pytest.raises(UnmaskError, match="thinking=on"):
        encoder_of("chatml", thinking="on")


# Templates of other kinds


@pytest.mark.parametrize("separator", ["\n\"'\\{{ x }}{% end %}\n", "→🎉\t", ""])
def test_separator_may_be_any_text(separator: str) -> None:
    encoder = Encoder(byte_tokenizer(), layout="separator", separator=separator)
    assert encoder.chat_template == separator_template(separator)
    assert rendering(encoder, talk("q", "a")) == f"q{separator}a<|im_end|>"
    assert learnt(encoder, encoder.encode(talk("q", "a"))) == ["a"]
    turns = (Turn("user", "q"), Turn("tool", "t"), Turn("assistant", "a"))
    assert rendering(encoder, Conversation(turns, "here")) == f"q\n\nt{separator}a<|im_end|>"


@pytest.mark.parametrize(
    ("before", "after", "answer", "written"),
    [
        (
            "",
            "",
            " a<|im_end|>[user]r[assistant] ",
            "a<|im_end|>[user]r[assistant]",
        ),  # a copy of what follows
        (" ", " ", "a", " a "),  # blanks before and after are a part of the response
    ],
)
def test_templates_without_a_generation_prompt(before: str, after: str, answer: str, written: str) -> None:
    trim = "" if before else " | trim"
    encoder = with_template(
        f"{{%- for m in messages %}}{{{{- '[' + m.role + ']{before}' + m.content{trim} }}}}"
        f"{{%- if m.role == 'assistant' %}}{{{{- '{after}' + eos_token }}}}{{%- endif %}}{{%- endfor %}}"
    )
    assert learnt(encoder, encoder.encode(talk("q", answer, "r", "b"))) == [written, f"{before}b{after}"]


def test_generation_tags_change_nothing() -> None:
    tagged = CHATML_TEMPLATE.replace("{{- '<|im_start|>' +", "{%- generation %}{{- '<|im_start|>' +")
    encoder = with_template(tagged.replace("'<|im_end|>\\n' }}", "'<|im_end|>\\n' }}{% endgeneration %}"))
    assert "endgeneration" in encoder.chat_template
    assert (
        encoder.encode(talk("q", "a")).input_ids
        == with_template(CHATML_TEMPLATE).encode(talk("q", "a")).input_ids
    )


def test_turns_that_a_template_leaves_out_are_counted() -> None:
    encoder = with_template(
        CHATML_TEMPLATE.replace("in messages %}", "in messages if message.role in ['user', 'assistant'] %}")
    )
    roles = ("system", "user", "assistant", "tool", "assistant")
    record = {
        "messages": [{"role": role, "content": f"the {role}"} for role in roles],
        "tools": [{"name": "f"}],
    }
    [row], report = encode_records([(record, "x")], encoder)
    assert learnt(encoder, row) == ["the assistant"] * 2
    assert set(report.notes) == {
        "the chat template leaves out system turns",
        "the chat template leaves out tool turns",
        "had a list of tools, which the chat template has no place for",
    }


def test_a_template_may_demand_a_system_turn() -> None:
    demands = "{%- if messages[0].role != 'system' %}{{- raise_exception('System!') }}{%- endif %}"
    encoder = with_template(demands + CHATML_TEMPLATE)
    assert learnt(encoder, encoder.encode(talk("q", "a", system="s"))) == ["a"]
    with pytest.raises(RecordError, match="here: the chat template refuses the turns: System"):
        encoder.encode(talk("q", "a"))


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{%- for m in messages %}{{- m.role + m.content }}{%- endfor %}", "no end token after a response"),
        ("{%- for m in messages %}{{- m.content | length }}{%- endfor %}", "does not write"),
        ("{{- raise_exception('no') }}", "refuses the turns: no"),
        ({"tool_use": CHATML_TEMPLATE}, "named tool_use and none named default"),
    ],
)
def test_unusable_templates(template: Any, error: str) -> None:
    with pytest.raises(UnmaskError, match=error):
        with_template(template)


@pytest.mark.parametrize(
    "turn", [Turn("assistant", "x"), Turn("assistant", "", tool_calls=({"name": "f", "arguments": {}},))]
)
def test_a_response_that_is_rewritten_drops_the_record(turn: Turn) -> None:
    rewrites = "(message.content if not message.tool_calls and 'x' not in message.content else '')"
    encoder = with_template(
        CHATML_TEMPLATE.replace("message.content", rewrites).replace(
            "'<|im_end|>\\n'", f"('<|im_end|>\\n' if {rewrites} else '!')"
        )
    )
    with pytest.raises(DropRecord, match="rewrites the response"):
        encoder.encode(Conversation((Turn("user", "q"), turn), "here"))


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


def test_special_strings() -> None:
    pattern = special_strings(byte_tokenizer())
    assert pattern.findall("a<|im_end|><|im_end><|mask|>") == ["<|im_end|>", "<|mask|>"]

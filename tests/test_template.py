"""Chat templates of other families, written by hand in their shape: exactly the responses are learnt, and a
prompt ends exactly where training lets the response start, by every route that asks a model."""

from __future__ import annotations

import io
import json
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rich.console import Console
from tiny import Watched
from transformers import PreTrainedTokenizerBase

from unmask.data.encode import DropRecord, Encoder, Example, encode_records, separator_template
from unmask.data.records import Conversation, RecordError, Turn, call_text, to_conversation
from unmask.data.tokenizer import CHATML_TEMPLATE, byte_tokenizer
from unmask.errors import UnmaskError
from unmask.evaluation.choose import choose_answers
from unmask.generation import chat
from unmask.generation.infill import Gap, infill_text
from unmask.generation.prompts import chat_encoder, make_prompts, prompt_example, read_prompts
from unmask.generation.text import Completion

# As Qwen 3: reasoning of earlier turns is dropped, the last answer alone has a think block, and the prompt
# opens an empty one where thinking is off.
QWEN = r"""
{%- set ns = namespace(query=-1) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{%- set ns.query = loop.index0 %}{%- endif %}
{%- endfor %}
{%- if tools %}{{- '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- set content = message.content %}
{%- if message.role == 'assistant' %}
{%- set thought = '' %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
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
    for index, turn in enumerate(whole.turns):
        if turn.role == "assistant" and turn.train:
            row = encoder.encode(Conversation(whole.turns[: index + 1], "here"))
            prompt = encoder.prompt_example(whole.turns[:index])
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
        first = "" if opening == BLANK or (template is QWEN and not opening) else BLANK.removeprefix(opening)
        assert learnt(encoder, row) == [f"{first}a", written]
        after = "\n" if template is QWEN else ""
        assert encoder.tokenizer.decode(row.input_ids[size:]) == f"{written}<|im_end|>{after}"


def test_reasoning_is_written_where_the_template_writes_it_and_its_loss_is_said() -> None:
    conversation = Conversation((Turn("user", "q"), Turn("assistant", "b", reasoning="hm")), "here")
    known = CHATML_TEMPLATE.replace("message.content +", "(message.thinking or '') + '|' + message.content +")
    for template, written in ((QWEN, f"{THOUGHT}b"), (known, "hm|b")):
        encoder = with_template(template)
        assert learnt(encoder, encoder.encode(conversation)) == [written]
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning": "hm"}]
    _, report = encode_records([({"messages": turns * 2}, "x line 1")], with_template(QWEN))
    assert report.notes == {"the chat template leaves out the reasoning of some turns": 1}


def test_a_tag_in_the_text_that_costs_a_part_of_it_drops_the_record() -> None:
    text = "The tag </think> closes <think>. Use </think> once."
    with pytest.raises(DropRecord, match="rewrites the response"):
        with_template(QWEN).encode(talk("q", text))
    encoder = ENCODERS["chatml"]
    assert learnt(encoder, encoder.encode(talk("q", text))) == [text]


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
    ("before", "after", "trim", "answer", "written"),
    [
        # A copy of what follows the response.
        ("", "", " | trim", " a<|im_end|>[user]r[assistant] ", "a<|im_end|>[user]r[assistant]"),
        (" ", " ", "", "a", " a "),  # blanks before and after are a part of the response
    ],
)
def test_templates_without_a_generation_prompt(
    before: str, after: str, trim: str, answer: str, written: str
) -> None:
    encoder = with_template(
        f"{{%- for m in messages %}}{{{{- '[' + m.role + ']{before}' + m.content{trim} }}}}"
        f"{{%- if m.role == 'assistant' %}}{{{{- '{after}' + eos_token }}}}{{%- endif %}}{{%- endfor %}}"
    )
    assert learnt(encoder, encoder.encode(talk("q", answer, "r", "b"))) == [written, f"{before}b{after}"]


def test_turns_that_a_template_leaves_out_are_counted() -> None:
    only = "in messages if message.role in ['user', 'assistant'] %}"
    encoder = with_template(CHATML_TEMPLATE.replace("in messages %}", only))
    roles = ("system", "user", "assistant", "tool", "assistant")
    turns = [{"role": role, "content": f"the {role}"} for role in roles]
    [row], report = encode_records([({"messages": turns, "tools": [{"name": "f"}]}, "x")], encoder)
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
    ("template", "thinking", "error"),
    [
        ("{%- for m in messages %}{{- m.role + m.content }}{%- endfor %}", None, "no end token"),
        ("{%- for m in messages %}{{- m.content | length }}{%- endfor %}", None, "does not write"),
        ("{{- raise_exception('no') }}", None, "refuses the turns: no"),
        ({"tool_use": CHATML_TEMPLATE}, None, "named tool_use and none named default"),
        (CHATML_TEMPLATE, "on", "thinking=on"),
    ],
)
def test_unusable_templates(template: Any, thinking: Any, error: str) -> None:
    with pytest.raises(UnmaskError, match=error):
        with_template(template, thinking=thinking)


CALL = {"name": "add", "arguments": {"a": [1, 2], "note": 'é "<|im_end|>" \n'}}


@pytest.mark.parametrize("turn", [Turn("assistant", "x"), Turn("assistant", "", tool_calls=(CALL,))])
def test_a_response_that_is_rewritten_drops_the_record(turn: Turn) -> None:
    rewrites = "(message.content if not message.tool_calls and 'x' not in message.content else '')"
    template = CHATML_TEMPLATE.replace("message.content", rewrites)
    encoder = with_template(template.replace("'<|im_end|>\\n'", f"('<|im_end|>\\n' if {rewrites} else '!')"))
    with pytest.raises(DropRecord, match="rewrites the response"):
        encoder.encode(Conversation((Turn("user", "q"), turn), "here"))


@pytest.mark.parametrize(
    ("name", "turns", "reason"),
    [
        ("gemma", (Turn("system", "s"), Turn("user", "q"), Turn("assistant", "a")), "not supported"),
        ("gemma", (Turn("user", "q"), Turn("user", "r"), Turn("assistant", "a")), "must alternate"),
        ("llama", (Turn("user", "q"), Turn("assistant", "", tool_calls=(CALL, CALL))), "One call in a turn"),
    ],
)
def test_what_a_template_refuses_stops_or_is_skipped(name: str, turns: tuple[Turn, ...], reason: str) -> None:
    good = {"prompt": "q", "completion": "a"}
    bad = {"messages": [{"role": t.role, "content": t.content, "tool_calls": t.tool_calls} for t in turns]}
    records = [(record, f"x line {n}") for n, record in enumerate([good, bad, good, bad], 1)]
    with pytest.raises(RecordError, match=f"^x line 2: the chat template refuses the turns: .*{reason}"):
        encode_records(records, ENCODERS[name])
    examples, report = encode_records(records, ENCODERS[name], on_bad_record="skip")
    assert [row.record for row in examples] == [0, 2]
    assert report.skipped == {"the chat template refuses the turns": (2, "x line 2")}


# Tools

CALLED: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "tool", "content": "3 <|im_end|>"},
        {"role": "assistant", "content": "It is 3."},
    ],
    "tools": [{"type": "function", "function": {"name": "add", "description": "Adds. <|im_start|>"}}],
}


def test_calls_are_learnt_as_the_template_writes_them() -> None:
    conversation = to_conversation(CALLED, where="x")
    arguments = json.dumps(CALL["arguments"], ensure_ascii=False)
    for name, call in (
        ("llama", f'{{"name": "add", "parameters": {arguments}}}'),
        ("tools", call_text(conversation.turns[1])),
        ("chatml", call_text(conversation.turns[1])),  # as text, for a template that does not know calls
        ("separator", call_text(conversation.turns[1])),
    ):
        [row], report = encode_records([(CALLED, "x")], ENCODERS[name])
        assert learnt(ENCODERS[name], row) == [call, "It is 3."]
        assert any("list of tools" in note for note in report.notes) == (name != "tools")
    encoder = ENCODERS["tools"]
    row = encoder.encode(conversation)
    whole = str(encoder.tokenizer.decode(row.input_ids))
    assert f"# Tools\n{json.dumps(CALLED['tools'][0])}" in whole
    assert "<tool_response>\n3 <|im_end|>\n</tool_response>" in whole
    assert control_tokens(encoder, row) == 2 * 5  # system, user, call, result, answer
    # A prompt shows the tools that training shows.
    last = encoder_of("tools", train_on="last").encode(conversation)
    prompt = encoder.prompt_example(conversation.turns[:-1], conversation.tools).input_ids
    assert last.input_ids[: len(prompt)] == prompt and last.src_mask.index(False) == len(prompt)


def test_ids_of_calls_reach_a_template_that_writes_them() -> None:
    record = json.loads(json.dumps(CALLED))
    record["messages"][1]["tool_calls"][0]["id"] = "c<|im_end|>1"
    record["messages"][2]["tool_call_id"] = "c<|im_end|>1"
    conversation, without = to_conversation(record, where="x"), to_conversation(CALLED, where="x")
    for name in ("chatml", "llama", "tools"):  # none of them writes ids
        assert ENCODERS[name].encode(conversation) == ENCODERS[name].encode(without)
    tokenizer = encoder_of("tools").tokenizer
    template = TOOLS.replace('"name": "\' + call', '"id": "\' + call.id + \'", "name": "\' + call')
    answered = "<tool_response>\\n' + message.tool_call_id + ': '"
    tokenizer.chat_template = template.replace("<tool_response>\\n'", answered)
    encoder = Encoder(tokenizer)
    row = encoder.encode(conversation)
    call = call_text(conversation.turns[1]).replace('{"name"', '{"id": "c<|im_end|>1", "name"')
    assert learnt(encoder, row) == [call, "It is 3."]
    assert "<tool_response>\nc<|im_end|>1: 3 <|im_end|>\n" in str(tokenizer.decode(row.input_ids))
    assert control_tokens(encoder, row) == 2 * 5
    prompt = encoder.prompt_example(conversation.turns[:3], conversation.tools).input_ids
    assert row.input_ids[: len(prompt)] == prompt


# Strings that look like control tokens

NAUGHTY = "<|im_end|> <|im_start|>assistant <|mask|><|endoftext|>"


def everywhere(text: str) -> dict[str, dict[str, Any]]:
    """A record of every format, with `text` in every place that it has."""
    user, answer = {"role": "user", "content": text}, {"role": "assistant", "content": f"a{text}"}
    call = {"name": f"f{text}", "arguments": {f"k{text}": [text]}}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    turns = [{"role": "system", "content": text}, user, called, {"role": "tool", "content": text}, answer]
    history = [[text, f"a{text}"]]
    return {
        "alpaca": {"instruction": text, "input": f"i{text}", "output": answer["content"], "history": history},
        "sharegpt": {"system": text, "conversations": [user, answer]},
        "messages": {"messages": turns},
        "prompt_completion": {"prompt": text, "completion": f"a{text}"},
        "custom": {"instruction": text, "response": f"a{text}"},
    }


@pytest.mark.parametrize("format", everywhere(""))
@pytest.mark.parametrize("layout", ["chat", "separator"])
def test_control_strings_are_text_wherever_they_stand(format: str, layout: Any) -> None:
    encoder = Encoder(byte_tokenizer(), layout=layout)
    [row], report = encode_records([(everywhere(NAUGHTY)[format], "x")], encoder, format)
    [tame], plain = encode_records([(everywhere("t")[format], "x")], encoder, format)
    assert report.notes == {"held strings like special tokens, read as plain text": 1} and not plain.notes
    assert control_tokens(encoder, row) == control_tokens(encoder, tame)
    assert learnt(encoder, row)[-1] == f"a{NAUGHTY}"
    places = json.dumps(everywhere("?")[format]).count("?")
    assert str(encoder.tokenizer.decode(row.input_ids)).count(NAUGHTY) == places


# Every route that asks a model

USER = {"role": "user", "content": "1+2?"}
ADD = {"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}
SUM = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}


def reply(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


RECORDS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [{"role": "system", "content": "Sum."}, USER, reply("3")]},
    "thinking": {"messages": [USER, reply("<think>\nAdd.\n</think>\n\n3")]},
    "call": {"messages": [USER, reply(None, tool_calls=[SUM])], "tools": [ADD]},
    "result": {
        "messages": [
            USER,
            reply(None, tool_calls=[SUM]),
            {"role": "tool", "content": "3"},
            reply("It is 3."),
        ],
        "tools": [ADD],
    },
    "turns": {"messages": [USER, reply("3"), USER, reply("Three")]},
}


@pytest.fixture(params=["template", "off", "on"])
def thinker(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template, tokenizer.init_kwargs["thinking"] = QWEN, request.param  # as training records it
    return tokenizer


def starts(example: Example) -> list[int]:
    """Where the responses of an example start."""
    pairs = pairwise([True, *example.src_mask])
    return [i for i, (before, now) in enumerate(pairs) if before and not now]


@pytest.mark.parametrize("kind", RECORDS)
def test_a_record_is_asked_as_it_is_learnt(
    tmp_path: Path, thinker: PreTrainedTokenizerBase, kind: str
) -> None:
    thinking = thinker.init_kwargs["thinking"]
    if kind == "thinking" and thinking == "off":
        pytest.skip("training drops reasoning under thinking=off")
    record, encoder = RECORDS[kind], Encoder(thinker, layout="chat")
    row = encoder.encode(to_conversation(record, where="here"))
    size = starts(row)[-1]
    opening = {"template": "assistant\n", "off": "</think>\n\n", "on": "<think>\n"}[thinking]
    assert str(thinker.decode(row.input_ids[:size])).endswith(opening)
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps(record), encoding="utf-8")
    [read] = read_prompts(file, thinker)  # `generate --prompts`
    [evaluated] = make_prompts([(record, "here")], encoder)  # `evaluation.prompts`
    assert read.example.input_ids == evaluated.example.input_ids == row.input_ids[:size]
    assert read.example.src_mask == evaluated.example.src_mask == row.src_mask[:size]


def test_a_question_is_asked_as_it_is_learnt(thinker: PreTrainedTokenizerBase) -> None:
    model, encoder = Watched(), Encoder(thinker, layout="chat")
    ids = (row := encoder.encode(to_conversation(RECORDS["plain"], where="here"))).input_ids
    question = prompt_example(thinker, "1+2?", system="Sum.")  # `generate --prompt`
    assert question.input_ids == ids[: starts(row)[-1]]
    question = prompt_example(thinker, "1+2?", system="Sum.", to_answer=True)
    list(choose_answers(model, thinker, ["3", "4"], [question], [0], num_samples=2))  # `--choice`
    assert ids[:-1] in model.asked  # without "\n"
    model.asked.clear()
    end = chat_encoder(thinker).end_token_id
    infill_text(model, thinker, [Gap(1, 1)], prompt=question, end=end)  # `infill --prompt`
    assert model.asked == [[*ids[:-3], 0, end]]


def test_every_turn_of_a_chat_is_asked_as_it_is_learnt(
    thinker: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    thinking, asked = thinker.init_kwargs["thinking"], []
    written = {"template": "<think>\n\n</think>\n\n3", "off": "3", "on": "Add.\n</think>\n\n3"}[thinking]

    def complete(_: Any, __: Any, prompts: list[Example], **___: Any) -> list[Any]:
        asked.append(prompts[0].input_ids)
        return [Completion(written, [], [])]

    monkeypatch.setattr(chat, "complete", complete)
    lines = iter(["1+2?", "1+2?", "1+2?", "/quit"])
    chat.chat(Watched(), thinker, ask=lambda: next(lines), console=Console(file=io.StringIO()))
    messages = [USER, reply("<think>\n" * (thinking == "on") + written)] * 3
    for turn in (1, 2, 3):
        row = Encoder(thinker, layout="chat").encode(
            to_conversation({"messages": messages[: 2 * turn]}, where="x")
        )
        assert asked[turn - 1] == row.input_ids[: starts(row)[-1]]

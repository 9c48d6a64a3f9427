"""Filled from a skeleton and rendered by transformers: the same spans, for any template and contents."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.data.records import Turn
from unmask.data.skeleton import Skeletons
from unmask.data.template import ChatLayout, DropRecord, Span, separator_template
from unmask.data.tokenizer import CHATML_TEMPLATE, byte_tokenizer

TOKENIZER = byte_tokenizer()


def chat(text: str, before: str = "") -> str:
    """A ChatML template that writes `text` as each turn's content, after `before`."""
    turn = "{{- '<|im_start|>' + message.role + '\\n' + " + text + " + '<|im_end|>\\n' }}"
    return "{%- for message in messages %}" + before + turn + "{%- endfor %}"


ASKS = "{%- set text = message.content %}{%- if '</think>' in text or text.startswith('x') and text %}"
TEMPLATES = {
    "chatml": CHATML_TEMPLATE,
    "separator": separator_template("\n=>\n"),
    "trim": chat("message.content | trim"),
    "lstrip": chat("message['content'].lstrip('\\n')"),
    "asks": chat("text", ASKS + "{%- set text = 'thought: ' + text %}{%- endif %}"),
    "splits": chat("message.content.split('</think>')[-1]"),
    "equals": chat("message.content", "{%- if message.content == 'x' %}(x){%- endif %}"),
    "length": chat("message.content", "{%- if message.content | length > 2 %}long{%- endif %}"),
    "tilde": chat("(text | trim)", "{%- set text = 'a' ~ message.content %}"),
    "macro": "{%- macro show(text) %}{{ text }}{%- endmacro %}" + chat("show(message.content) | trim"),
    "block": chat("text | trim", "{%- set text %}{{ message.content }}{%- endset %}"),
    "json": chat("message.content", "{%- if message.role == 'user' %}{{- message | tojson }}{%- endif %}"),
    "sequence": chat("message.content", "{%- if message.content is sequence %}text{%- endif %}"),
    "other": "{{- messages[-1].content[:1] }}" + chat("message.content"),
}

content = st.text(
    st.sampled_from("x \n</think>|\ue000\ue0020") | st.characters(), max_size=6
) | st.sampled_from(
    ["x", "</think>", "a</think>b", " x ", "\n", "<|im_end|>", "\ue0000\ue001r1\ue002", "\ue003", "0"]
)
conversation = st.lists(st.tuples(content, content), min_size=1, max_size=3)


def spans(layout: ChatLayout, pairs: list[tuple[str, str]]) -> list[Span] | str:
    turns = [
        Turn(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    try:
        return layout.spans(turns, [turn.role == "assistant" for turn in turns], "here")
    except DropRecord as reason:
        return str(reason)


class Never(Skeletons):
    def fill(self, roles: object, contents: object) -> None:
        return None


def layout_of(template: str, quick: bool) -> ChatLayout:
    layout = ChatLayout(TOKENIZER, template)
    if not quick:
        layout._skeletons = Never(template, {})
    return layout


@pytest.mark.parametrize("name", TEMPLATES)
@given(conversations=st.lists(conversation, min_size=3, max_size=12))
@settings(max_examples=30)
def test_filled_and_rendered_are_the_same(name: str, conversations: list[list[tuple[str, str]]]) -> None:
    quick, slow = (layout_of(TEMPLATES[name], quick) for quick in (True, False))
    for pairs in conversations:
        assert spans(quick, pairs) == spans(slow, pairs)


@pytest.mark.parametrize(
    ("name", "learns"),
    [(name, True) for name in ("chatml", "separator", "trim", "lstrip", "asks", "equals")]
    + [
        (name, False) for name in ("splits", "length", "tilde", "macro", "block", "json", "sequence", "other")
    ],
)
def test_what_is_learnt(name: str, learns: bool) -> None:
    layout = layout_of(TEMPLATES[name], True)
    spans(layout, [("one", "two")])
    found = layout._skeletons.fill(["user", "assistant"], ["three", "four"])
    assert (found is not None) == learns
    if found is not None:
        text, [(start, stop)] = found
        assert text[start:stop] == "four" and "three" in text
        assert layout._skeletons.fill(["user", "user", "assistant"], ["a", "b", "c"]) is None


def test_a_way_not_seen_yet_is_not_filled() -> None:
    layout = layout_of(TEMPLATES["asks"], True)
    spans(layout, [("one", "two")])
    assert layout._skeletons.fill(["user", "assistant"], ["x", "two"]) is None
    assert layout._skeletons.fill(["user", "assistant"], ["o", "</think>"]) is None
    assert layout._skeletons.fill(["user", "assistant"], ["", ""]) is not None

from __future__ import annotations

import json
from typing import Any

import pytest

from unmask.data.records import (
    BadRecord,
    CustomFields,
    RecordError,
    Turn,
    call_text,
    detect_format,
    to_conversation,
)
from unmask.errors import UnmaskError

WHERE = "x.jsonl line 4"


def turns(record: dict[str, Any], format: str = "auto", **kwargs: Any) -> list[tuple[str, str]]:
    conversation = to_conversation(record, format, where=WHERE, **kwargs)
    assert conversation.where == WHERE
    return [(turn.role, turn.content) for turn in conversation.turns]


@pytest.mark.parametrize(
    ("format", "record", "expected"),
    [
        ("alpaca", {"instruction": "Add.", "output": "3"}, [("user", "Add."), ("assistant", "3")]),
        (
            "alpaca",
            {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Count."},
            [("system", "Count."), ("user", "Add.\n1 2"), ("assistant", "3")],
        ),
        (
            "alpaca",
            {"instruction": "b", "input": "", "output": "B", "history": [["a", "A"]]},
            [("user", "a"), ("assistant", "A"), ("user", "b"), ("assistant", "B")],
        ),
        (
            "sharegpt",
            {
                "system": "s",
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                    {"from": "observation", "value": "1"},
                    {"from": "gpt", "value": "a"},
                ],
            },
            [
                ("system", "s"),
                ("user", "q"),
                ("assistant", ""),  # the call is in tool_calls
                ("tool", "1"),
                ("assistant", "a"),
            ],
        ),
        (
            "messages",
            {
                "messages": [
                    {"role": "developer", "content": "s"},
                    {"role": "user", "content": [{"type": "text", "text": "q"}]},
                    {"role": "assistant", "content": "a"},
                ]
            },
            [("system", "s"), ("user", "q"), ("assistant", "a")],
        ),
        (
            "prompt_completion",
            {"prompt": "q", "completion": "a"},
            [("user", "q"), ("assistant", "a")],
        ),
        (
            "alpaca",
            {"instruction": "q", "response": "a"},
            [("user", "q"), ("assistant", "a")],
        ),
    ],
)
def test_formats(format: str, record: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert detect_format(record, WHERE) == format
    assert turns(record) == expected
    assert turns(record, format) == expected


def test_custom_field_names() -> None:
    names = CustomFields("question", "table", "answer", "rule")
    record = {"question": "q", "table": "t", "answer": "a", "rule": "r"}
    expected = [("system", "r"), ("user", "q\nt"), ("assistant", "a")]
    assert turns(record, "custom", custom_format=names) == expected
    assert turns(record, "auto", custom_format=names) == expected
    with pytest.raises(UnmaskError, match="no field 'table'"):
        turns({"question": "q", "answer": "a"}, "custom", custom_format=names)


def test_completion_of_messages_makes_the_prompt_context() -> None:
    record = {
        "prompt": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "A"},
            {"role": "user", "content": "b"},
        ],
        "completion": [{"role": "assistant", "content": "B"}],
    }
    conversation = to_conversation(record, where=WHERE)
    assert conversation.turns == (
        Turn("user", "a", train=False),
        Turn("assistant", "A", train=False),
        Turn("user", "b", train=False),
        Turn("assistant", "B", train=True),
    )


def test_train_flag_of_a_message() -> None:
    record = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a", "train": False},
            {"role": "assistant", "content": "b"},
        ]
    }
    flags = [turn.train for turn in to_conversation(record, where=WHERE).turns]
    assert flags == [True, False, True]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"weight": 0}, False),
        ({"weight": 1}, True),
        ({"weight": 0.0}, False),  # as a table of numbers has it
        ({"weight": None}, True),
        ({"train": True, "weight": 1}, True),
        ({"train": False, "weight": 0}, False),
    ],
)
@pytest.mark.parametrize(
    "keys", [("from", "value", "human", "gpt"), ("role", "content", "user", "assistant")]
)
def test_weight_of_a_message(keys: tuple[str, ...], flags: dict[str, Any], expected: bool) -> None:
    role, text, user, assistant = keys
    messages = [{role: user, text: "q"}, {role: assistant, text: "a", **flags}]
    field = "conversations" if role == "from" else "messages"
    assert [turn.train for turn in to_conversation({field: messages}, where=WHERE).turns] == [True, expected]


def test_tool_calls_in_openais_shape_and_flat() -> None:
    nested = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": [1, "é"]}'}}
    flat = {"name": "add", "arguments": {"a": [1, "é"]}}
    record = {
        "messages": [
            USER,
            message("assistant", None, tool_calls=[nested]),
            message("tool", "3", tool_call_id="1"),
            message("assistant", "Let me see.", tool_calls=[flat, flat]),
            message("function", "4"),
            message("assistant", "4", tool_calls=[]),
        ],
        "tools": '[{"name": "add"}]',
    }
    conversation = to_conversation(record, where=WHERE)
    calls = [turn.tool_calls for turn in conversation.turns]
    assert calls == [(), ({**flat, "id": "1"},), (), (flat, flat), (), ()]
    assert [turn.tool_call_id for turn in conversation.turns] == [None, None, "1", None, None, None]
    assert call_text(conversation.turns[1]) == call_text(Turn("assistant", "", tool_calls=(flat,)))
    for place in (1, 2):
        broken = json.loads(json.dumps(record["messages"]))
        (broken[1]["tool_calls"][0] if place == 1 else broken[2])["id" if place == 1 else "tool_call_id"] = 7
        with pytest.raises(RecordError, match=rf"messages {place + 1}.*id' must be text; got the number 7"):
            to_conversation({"messages": broken}, where=WHERE)
    roles = ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert [turn.role for turn in conversation.turns] == roles
    assert conversation.tools == ({"name": "add"},)
    written = '<tool_call>\n{"name": "add", "arguments": {"a": [1, "é"]}}\n</tool_call>'
    assert call_text(conversation.turns[1]) == written
    assert call_text(conversation.turns[3]) == f"Let me see.\n{written}\n{written}"
    assert call_text(conversation.turns[5]) == "4"


@pytest.mark.parametrize("tools", [None, [], "", " ", "[]"])
def test_no_tools(tools: Any) -> None:
    record = {"messages": [USER, message("assistant", "a")], "tools": tools}
    assert to_conversation(record, where=WHERE).tools == ()


def message(role: Any, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


USER = message("user", "q")


@pytest.mark.parametrize(
    ("format", "record", "error"),
    [
        (
            "alpaca",
            {"a": 1, "b": 2},
            "x.jsonl line 4: no field 'instruction', or it is null (alpaca format needs instruction, output); "
            "fields here: a, b.",
        ),
        ("alpaca", {"instruction": "q", "output": None}, "field 'output'"),
        ("alpaca", {"instruction": "q", "output": ""}, "line 4: field 'output' is empty"),
        ("alpaca", {"instruction": "q", "output": " \n"}, "field 'output' is empty"),
        ("alpaca", {"instruction": ["q"], "output": "a"}, "'instruction' must be text; got a list"),
        ("alpaca", {"instruction": "q", "output": 42}, "'output' must be text; got the number 42"),
        ("alpaca", {"instruction": "\ud800", "output": "a"}, "unpaired surrogate"),
        (
            "alpaca",
            {"instruction": "q", "output": "a", "history": [["a"]]},
            "'history' must be a list of [user, assistant] pairs",
        ),
        ("auto", {"a": 1, "b": 2}, "no known format has these fields: a, b; expected instruction"),
        ("auto", {"a": 1}, "data.sft.format=custom with data.sft.custom_format.instruction_field"),
        (
            "custom",
            {"a": 1},
            "no field 'instruction', or it is null (custom format needs instruction, response",
        ),
        ("sharegpt", {"messages": []}, "no field 'conversations'"),
        ("sharegpt", {"conversations": "hi"}, "must be a list of messages; got text"),
        ("sharegpt", {"conversations": [{"value": "q"}]}, "conversations 1: no field 'from'"),
        ("messages", {"messages": []}, "no assistant turn, so nothing to train on; turns: none"),
        (
            "messages",
            {"messages": [USER]},
            "no assistant turn, so nothing to train on; turns: user",
        ),
        ("messages", {"messages": ["q"]}, "messages 1: expected an object; got text"),
        (
            "messages",
            {"messages": [USER, message("robot", "a")]},
            "messages 2: unknown role 'robot'",
        ),
        (
            "messages",
            {"messages": [message("assistant", "a"), USER]},
            "x.jsonl line 4: turns out of order: the first assistant turn has no user turn before it; "
            "expected system (if any), user, assistant, ...; turns: assistant, user.",
        ),
        (
            "messages",
            {"messages": [USER, message("tool", "1"), message("assistant", "a")]},
            "turns out of order: a tool turn is before any assistant turn; expected it after the "
            "assistant turn that calls the tool; turns: user, tool, assistant.",
        ),
        (
            "messages",
            {"messages": [message(["user"], "q")]},
            "messages 1: unknown role \"['user']\"; expected",
        ),
        ("messages", {"messages": [USER, message("assistant", "")]}, "2: field 'content' is empty"),
        (
            "messages",
            {"messages": [USER, message("assistant", None, tool_calls=[{}])]},
            "messages 2, tool_calls 1: no field 'name', or it is null (a tool call needs name, arguments)",
        ),
        (
            "messages",
            {"messages": [USER, message("assistant", "a", tool_calls=[{"name": "f", "arguments": "{"}])]},
            "messages 2, tool_calls 1: field 'arguments' is not valid JSON",
        ),
        (
            "messages",
            {"messages": [USER, message("assistant", "a", tool_calls=[{"name": "f", "arguments": "[1]"}])]},
            "tool_calls 1: field 'arguments' must be an object; got a list",
        ),
        (
            "messages",
            {"messages": [USER, message("assistant", "a", tool_calls="f()")]},
            "messages 2: field 'tool_calls' must be a list; got text",
        ),
        (
            "messages",
            {"messages": [message("user", "q", tool_calls=[{"name": "f", "arguments": {}}])]},
            "messages 1: only an assistant turn may have 'tool_calls'; this one is of user",
        ),
        (
            "messages",
            {"messages": [USER, message("assistant", None)]},
            "messages 2: no field 'content', or it is null (a message needs role, content)",
        ),
        (
            "messages",
            {"messages": [USER, message("assistant", "a")], "tools": "{"},
            "line 4: field 'tools' is not valid JSON",
        ),
        (
            "messages",
            {"messages": [USER, message("assistant", "a")], "tools": ["add"]},
            "line 4: field 'tools' must be a list of objects; got a list",
        ),
        (
            "messages",
            {"messages": [USER, message("assistant", "a", weight=0.5)]},
            "messages 2: field 'weight' must be 0 or 1; got the number 0.5",
        ),
        (
            "messages",
            {"messages": [USER, message("assistant", "a", weight=True)]},
            "field 'weight' must be 0 or 1; got true",
        ),
        (
            "messages",
            {"messages": [USER, message("assistant", "a", weight=1, train=False)]},
            "messages 2: fields 'train' and 'weight' contradict one another; remove one",
        ),
        (
            "alpaca",
            {f"column {n}\n": 1 for n in range(99)},
            "column 7, column 8, column 9, column 10, column 11 and 87 more.",
        ),
        (
            "messages",
            {"messages": [USER, message("assistant", "a", train="no")]},
            "field 'train' must be true or false; got text",
        ),
        (
            "messages",
            {"messages": [message("user", [{"type": "image_url"}])]},
            "messages 1: field 'content' has a part that is not text",
        ),
        ("prompt_completion", {"prompt": "q"}, "no field 'completion'"),
        ("prompt_completion", {"prompt": "q", "completion": []}, "no assistant turn"),
        ("yaml", {}, "unknown format 'yaml'; expected one of auto, alpaca"),
    ],
)
def test_bad_records(format: str, record: dict[str, Any], error: str) -> None:
    with pytest.raises(UnmaskError) as caught:
        turns(record, format)
    assert error in str(caught.value)
    assert "\n" not in str(caught.value)
    assert format == "yaml" or isinstance(caught.value, RecordError)


def test_reasons_are_few() -> None:
    """What differs from record to record is not in the reason, or every skipped record had its own."""
    bad: list[dict[str, Any]] = []
    for n in range(20):
        bad += [
            {"instruction": "q", "output": n},
            {f"column{n}": 1, "instruction": "q"},
            {"messages": [USER] * n + [message(f"robot{n}", "a")]},
            {"messages": [USER] * n + [message("user", "q", train="no" * n)]},
            {"messages": [USER] * (n + 1)},
            {"messages": [USER], "conversation": "\ud800"},
            {"instruction": "q", "output": "a" * n + "\udfff"},
        ]
    reasons = set()
    for record in bad:
        with pytest.raises(RecordError) as caught:
            to_conversation(record, where=WHERE)
        assert str(caught.value).startswith(f"{caught.value.where}: {caught.value.reason}")
        reasons.add(caught.value.reason)
    assert len(reasons) == 6


def test_a_record_that_could_not_be_read_says_why() -> None:
    error = BadRecord("not valid JSON", " (Expecting value, column 3)").error(WHERE)
    assert str(error) == "x.jsonl line 4: not valid JSON (Expecting value, column 3)."
    assert (error.where, error.reason) == (WHERE, "not valid JSON")

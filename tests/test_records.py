from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from unmask.data.records import (
    MESSAGE,
    READ,
    ROLES,
    CustomFields,
    RecordError,
    Turn,
    call_text,
    detect_format,
    to_conversation,
)
from unmask.errors import UnmaskError

WHERE = "x.jsonl line 4"
NAN = float("nan")
CALL = {"name": "add", "arguments": {"a": [1, "é"]}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def message(role: Any, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


USER = message("user", "q")
ANSWER = message("assistant", "a")


def turns(record: dict[str, Any], format: str = "auto", **kwargs: Any) -> list[tuple[str, str]]:
    conversation = to_conversation(record, format, where=WHERE, **kwargs)
    assert conversation.where == WHERE and not conversation.unused
    return [(turn.role, turn.content) for turn in conversation.turns]


# The table of formats and keys

BASE: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "alpaca": {"instruction": "q", "output": "a"},
}
VALUES: dict[str, Any] = {"turns": [USER, message("assistant", "marked")], "history": [["marked", "A"]]}
VALUES |= {"tools": [{**TOOL, "description": "marked"}], "prompt": [message("user", "marked")]}


@pytest.mark.parametrize(
    ("format", "part", "key"),
    [(format, part, key) for format, parts in READ.items() for part, keys in parts.items() for key in keys],
)
def test_every_key_of_a_record_reaches_the_conversation(format: str, part: str, key: str) -> None:
    kept = {name: value for name, value in BASE[format].items() if name not in READ[format][part]}
    record = {**kept, key: VALUES.get(part, "marked"), "source": "web", "nothing": None}
    assert detect_format(record, WHERE) == format
    conversation = to_conversation(record, where=WHERE)
    assert "marked" in str((conversation.turns, conversation.tools))
    assert conversation.unused == ("source",)
    if part == "system":
        assert conversation.turns[0] == Turn("system", "marked")


@pytest.mark.parametrize(("part", "key"), [(part, key) for part, keys in MESSAGE.items() for key in keys])
def test_every_key_of_a_message_is_read(part: str, key: str) -> None:
    values: dict[str, Any] = {"role": "assistant", "trained": False, "calls": CALL, "tool_call_id": "marked"}
    value = [CALL] if key == "tool_calls" else 0 if key == "weight" else values.get(part, "marked")
    messages = [USER, message("assistant", "b"), message("tool", "c"), ANSWER]
    marked = 2 if part == "tool_call_id" else 1
    for name in MESSAGE[part]:
        messages[marked].pop(name, None)
    messages[marked] |= {key: value, "refusal": "no", "audio": None}
    conversation = to_conversation({"messages": messages}, where=WHERE)
    turn = conversation.turns[marked]
    found = {"trained": turn.train is False, "calls": turn.tool_calls == (CALL,)}
    assert found.get(part, "marked" in str(turn) or turn.role == value)
    assert conversation.unused == ("messages.refusal",)
    shared = [
        {"from" if k == "role" else "value" if k == "content" else k: v for k, v in m.items()}
        for m in messages
    ]
    if part not in ("role", "content"):
        assert to_conversation({"conversations": shared}, where=WHERE).turns == conversation.turns


@pytest.mark.parametrize("role", ROLES)
def test_every_role(role: str) -> None:
    text = json.dumps(CALL) if role in ("function_call", "tool_call") else "marked"
    record = {"messages": [USER, ANSWER, message(role, text), ANSWER]}
    turn = to_conversation(record, where=WHERE).turns[2]
    assert turn.role == ROLES[role] and (turn.content == "marked" or turn.tool_calls == (CALL,))


def test_the_page_has_the_table() -> None:
    page = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
    names = {key for table in (*READ.values(), MESSAGE) for keys in table.values() for key in keys}
    assert not [name for name in (*READ, *names, *ROLES) if f"`{name}`" not in page]


CALLS = [
    {"from": "human", "value": "q"},
    {"from": "function_call", "value": json.dumps([CALL, CALL])},
    {"from": "observation", "value": "1"},
    {"from": "gpt", "value": "a"},
]
PARTS = message("user", [{"type": "text", "text": "q"}])
ASKED = [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("format", "record", "expected"),
    [
        (  # Dolly
            "alpaca",
            {"instruction": "Add.", "context": "1 2", "response": "3", "system": ""},
            [("user", "Add.\n1 2"), ("assistant", "3")],
        ),
        (
            "alpaca",
            {"query": "q", "input": "i", "context": "c", "response": "a", "history": [["p", "A"]]},
            [("user", "p"), ("assistant", "A"), ("user", "q\ni\nc"), ("assistant", "a")],
        ),
        (
            "sharegpt",
            {"system": "s", "conversations": CALLS},
            [("system", "s"), ("user", "q"), ("assistant", ""), ("tool", "1"), ("assistant", "a")],
        ),
        ("messages", {"messages": [message("developer", "s"), PARTS, ANSWER]}, [("system", "s"), *ASKED]),
        (
            "messages",
            {"messages": [message("system", "s"), USER, ANSWER], "system": "s"},
            [("system", "s"), *ASKED],
        ),
        ("prompt_completion", {"prompt": [USER], "completion": "a"}, ASKED),
        (
            "prompt_completion",
            {"messages": None, "prompt": "q", "completion": "a"},
            ASKED,
        ),  # of a table with both
    ],
)
def test_formats(format: str, record: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert detect_format(record, WHERE) == format
    assert turns(record) == turns(record, format) == expected


def test_custom_field_names() -> None:
    names = CustomFields("question", "table", "answer", "rule")
    record = {"question": "q", "table": "t", "answer": "a", "rule": "r"}
    expected = [("system", "r"), ("user", "q\nt"), ("assistant", "a")]
    assert turns(record, "custom", custom_format=names) == expected
    assert turns(record, custom_format=names) == expected
    with pytest.raises(RecordError, match="no field 'table'"):
        turns({"question": "q", "answer": "a"}, "custom", custom_format=names)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q"},
        {"query": "q"},
        {"messages": [USER]},
        {"conversations": [{"from": "human", "value": "q"}]},
    ],
)
def test_a_prompt_may_lack_its_response(record: dict[str, Any]) -> None:
    assert turns({**record, "system": "s"}, answered=False) == [("system", "s"), ("user", "q")]
    with pytest.raises(RecordError):
        turns(record)


def test_completion_of_messages_makes_the_prompt_context() -> None:
    record = {"prompt": [USER, ANSWER, USER], "completion": [message("assistant", "B")]}
    conversation = to_conversation(record, where=WHERE)
    assert [turn.train for turn in conversation.turns if turn.role == "assistant"] == [False, True]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [({"weight": 0.0}, False), ({"weight": None}, True), ({"train": True, "weight": 1, "loss": True}, True)],
)
def test_flags_of_a_message(flags: dict[str, Any], expected: bool) -> None:
    record = {"messages": [USER, message("assistant", "b", **flags), ANSWER]}
    assert [turn.train for turn in to_conversation(record, where=WHERE).turns] == [True, expected, True]


def test_tool_calls_in_every_shape() -> None:
    nested = {"id": "1", "type": "function", "function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}
    padded = {"type": "function", "function": {"name": "add", "arguments": {"a": [1, "é"], "city": None}}}
    record = {
        "messages": [
            USER,
            message("assistant", None, tool_calls=[nested]),
            message("tool", "3", tool_call_id="1"),
            message("assistant", "Let me see.", tool_calls=json.dumps([CALL, padded | {"function": CALL}])),
            message("function", "4", name="add"),
            {"role": "assistant", "tool_calls": [padded], "function_call": {"name": None}},  # of a table
            message("tool", "5"),
            message("assistant", None, function_call={"name": "now", "arguments": " "}),
            message("tool", "6"),
            message("assistant", "4", tool_calls=[]),
        ],
        "functions": [{"name": "add", "description": None}],
    }
    conversation = to_conversation(record, where=WHERE)
    now = {"name": "now", "arguments": {}}
    calls = [turn.tool_calls for turn in conversation.turns if turn.role == "assistant"]
    assert calls == [({**CALL, "id": "1"},), (CALL, CALL), (CALL,), (now,), ()]
    assert [turn.tool_call_id for turn in conversation.turns[:4]] == [None, None, "1", None]
    assert conversation.tools == ({"type": "function", "function": {"name": "add"}},)
    written = '<tool_call>\n{"name": "add", "arguments": {"a": [1, "é"]}}\n</tool_call>'
    assert call_text(conversation.turns[1]) == written
    assert call_text(conversation.turns[3]) == f"Let me see.\n{written}\n{written}"
    text = {**record, "functions": None, "tools": json.dumps([TOOL])}
    assert to_conversation(text, where=WHERE).tools == (TOOL,)
    for none in (None, [], "", " ", "[]"):
        assert to_conversation({**text, "tools": none}, where=WHERE).tools == ()


def bad_call(**call: Any) -> dict[str, Any]:
    return {"messages": [USER, message("assistant", "a", tool_calls=[call])]}


def answered(**more: Any) -> dict[str, Any]:
    return {"messages": [USER, message("assistant", "a", **more)]}


@pytest.mark.parametrize(
    ("format", "record", "named"),
    [
        ("alpaca", {"a": 1, "b": 2}, ["line 4: no field 'instruction' or 'question'", "fields here: a, b"]),
        ("alpaca", {"instruction": "q", "output": None}, ["'output'"]),
        ("alpaca", {"instruction": "q", "output": " \n"}, ["'output' is empty"]),
        ("alpaca", {"instruction": ["q"], "output": "a"}, ["'instruction' must be text; got a list"]),
        ("alpaca", {"instruction": "q", "output": ["a"]}, ["line 4: field 'output' must be text; got a list."]),
        ("alpaca", {"instruction": "q", "output": NAN}, ["line 4: field 'output' must be text; got NaN."]),
        ("alpaca", {"instruction": "q", "output": NAN, "response": NAN}, ["'output' and 'response'"]),
        ("sharegpt", {"conversations": ["a"]}, ["'conversations' must be a list of messages; its item 1 is text"]),
        ("alpaca", {"instruction": "q", "output": 42}, ['must be text; got 42; write it in quotes: "42".']),
        ("alpaca", {"instruction": "q", "output": True}, ["'output' must be text; got true."]),
        ("alpaca", {"instruction": "\ud800", "output": "a"}, ["'instruction' has an unpaired surrogate"]),
        ("alpaca", {"instruction": "q", "output": "a", "history": [["a"]]}, ["history 1", "[user, assistant]"]),
        ("alpaca", {"instruction": "q", "output": "a", "response": "b"}, ["'output' and 'response'"]),
        ("alpaca", {f"column {n}\n": 1 for n in range(99)}, ["column 10, column 11 and 87 more."]),
        ("auto", {"a": 1}, ["no known format", ": a;", "data.sft.custom_format.instruction_field"]),
        ("auto", {"instruction": "q"}, ["field 'output' is missing, or it is null; records of alpaca have it"]),
        ("auto", {"instruction": "q", "output": None}, ["field 'output' is missing, or it is null"]),
        ("auto", {"prompt": "q", "source": None}, ["field 'completion' is missing", "prompt_completion"]),
        ("auto", {"instruction": "q", "ouput": "a"}, ["did you mean 'output' instead of 'ouput'?"]),
        (
            "auto",
            {"Instruction": "q", "Output": "a"},
            ["did you mean 'instruction' instead of 'Instruction' and 'output' instead of 'Output'?"],
        ),
        ("auto", {"conversation": [USER]}, ["did you mean 'conversations' instead of 'conversation'?"]),
        ("auto", {"data": [USER]}, ["if the records are in 'data', save that list alone"]),
        (
            "auto",
            {"id": "7", "gold_answer": "a", "input": "q"},
            ["custom_format.instruction_field=id ", "custom_format.response_field=gold_answer."],
        ),
        ("auto", {"question": "q", "answer": "a"}, ["instruction_field=question ", "response_field=answer."]),
        ("auto", {"input": "q", "output": "a"}, ["instruction_field=input ", "response_field=output."]),
        ("custom", {"a": 1}, ["no field 'instruction'"]),
        ("sharegpt", {"messages": []}, ["no field 'conversations'"]),
        ("sharegpt", {"conversations": "hi"}, ["'conversations' must be a list", "text"]),
        ("sharegpt", {"conversations": [{"value": "q"}]}, ["conversations 1: no field 'role' or 'from'"]),
        ("auto", {"messages": [USER]}, ["no assistant turn", "turns: user"]),
        ("auto", {"messages": [USER, message("robot", "a")]}, ["messages 2: unknown role 'robot'", "user"]),
        ("auto", {"messages": [message(["user"], "q")]}, ["messages 1: unknown role"]),
        ("auto", {"messages": [ANSWER, USER]}, ["out of order", "turns: assistant, user"]),
        ("auto", {"messages": [USER, message("tool", "1"), ANSWER]}, ["tool turn is before", "user, tool"]),
        ("auto", {"messages": [USER, message("assistant", None)]}, ["messages 2: no field 'content'"]),
        ("auto", {"messages": [message("user", [{"type": "image_url"}])]}, ["'content'", "not text"]),
        ("auto", {"messages": [message("system", "s"), USER, ANSWER], "system": "t"}, ["'system' contradicts"]),
        ("auto", bad_call(), ["messages 2, tool_calls 1: no field 'name'"]),
        ("auto", bad_call(name="f", arguments="{"), ["tool_calls 1: field 'arguments' is not valid JSON"]),
        ("auto", bad_call(name="f", arguments="[1]"), ["'arguments' must be an object", "a list"]),
        ("auto", bad_call(name="f", id=7), ["'id' must be text"]),
        ("auto", answered(tool_calls="f()"), ["'tool_calls'", "JSON"]),
        ("auto", answered(tool_calls=[CALL], function_call=CALL), ["'tool_calls' and 'function_call'"]),
        ("auto", {"messages": [message("user", "q", tool_calls=[CALL]), ANSWER]}, ["messages 1", "tool_calls"]),
        ("auto", {"messages": [USER, message("function_call", "[]")]}, ["'content (function_call)' has no call"]),
        ("auto", {"messages": [USER, ANSWER], "tools": "{"}, ["'tools' is not valid JSON"]),
        ("auto", {"messages": [USER, ANSWER], "tools": ["add"]}, ["tools 1", "must be an object"]),
        ("auto", answered(weight=0.5), ["'weight' must be 0 or 1", "0.5"]),
        ("auto", answered(weight=True), ["'weight' must be 0 or 1", "true"]),
        ("auto", answered(loss="no"), ["'loss' must be true or false"]),
        ("auto", answered(weight=1, train=False), ["'train' and 'weight'"]),
        ("prompt_completion", {"prompt": "q"}, ["no field 'completion'"]),
        ("prompt_completion", {"prompt": "q", "completion": []}, ["no assistant turn"]),
    ],
)  # fmt: skip
def test_bad_records(format: str, record: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(RecordError) as caught:
        to_conversation(record, format, where=WHERE)
    error = caught.value
    assert all(text in str(error) for text in named) and "\n" not in str(error)
    assert str(error).startswith(f"{error.where}: {error.reason}")


def test_a_table_without_header_is_suspected() -> None:
    for where in ("x.csv record 1", "x.tsv.gz record 1"):
        with pytest.raises(RecordError, match=r"fields: Say a\?, a \(the first row of a table must name"):
            detect_format({"Say a?": "Say b?", "a": "b"}, where)


@pytest.mark.parametrize("value", [0, False, 7, ["a"]])
def test_an_answer_that_a_prompt_need_not_have_is_checked_where_it_is_there(value: Any) -> None:
    with pytest.raises(RecordError, match="field 'output' must be text; got"):
        to_conversation({"instruction": "q", "output": value}, where=WHERE, answered=False)
    for nothing in (None, "", []):
        record = {"instruction": "q", "output": nothing}
        assert turns(record, answered=False) == [("user", "q")]


def test_unknown_format() -> None:
    with pytest.raises(UnmaskError, match="'yaml'; expected one of auto"):
        to_conversation({}, "yaml", where=WHERE)


def test_reasons_are_few() -> None:
    """What differs from record to record is not in the reason, or every skipped record had its own."""
    reasons = set()
    for n in range(20):
        for record in (
            {"instruction": "q", "output": n},
            {f"column{n}": 1, "instruction": "q"},
            {"messages": [USER] * n + [message(f"robot{n}", "a")]},
            {"messages": [USER] * n + [message("user", "q", train="no" * n)]},
            {"messages": [USER] * (n + 1)},
            {"instruction": "q", "output": "a" * n + "\udfff"},
            {"instruction": "q", "output": "a", "history": [["q", "a"]] * n + [["q"]]},
        ):
            with pytest.raises(RecordError) as caught:
                to_conversation(record, where=WHERE)
            reasons.add(caught.value.reason)
    assert len(reasons) == 7

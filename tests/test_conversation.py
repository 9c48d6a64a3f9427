from __future__ import annotations

from typing import Any

import pytest

from unmask.data.conversation import CustomFields, Turn, detect_format, to_conversation
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
                    {"from": "function_call", "value": "f()"},
                    {"from": "observation", "value": "1"},
                    {"from": "gpt", "value": "a"},
                ],
            },
            [
                ("system", "s"),
                ("user", "q"),
                ("assistant", "f()"),
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
            "custom",
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


def message(role: Any, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


USER = message("user", "q")


@pytest.mark.parametrize(
    ("format", "record", "error"),
    [
        (
            "alpaca",
            {"a": 1, "b": 2},
            "x.jsonl line 4: no field 'instruction' (alpaca format needs instruction, output); "
            "fields here: a, b.",
        ),
        ("alpaca", {"instruction": "q", "output": None}, "field 'output' is null"),
        ("alpaca", {"instruction": "q", "output": ""}, "line 4: field 'output' is empty"),
        ("alpaca", {"instruction": "q", "output": " \n"}, "field 'output' is empty"),
        ("alpaca", {"instruction": ["q"], "output": "a"}, "'instruction' must be text; got a list"),
        ("alpaca", {"instruction": "q", "output": 42}, "'output' must be text; got the number 42"),
        ("alpaca", {"instruction": "\ud800", "output": "a"}, "half a surrogate pair"),
        (
            "alpaca",
            {"instruction": "q", "output": "a", "history": [["a"]]},
            "'history' must be a list of [user, assistant] pairs",
        ),
        ("auto", {"a": 1, "b": 2}, "no known format has these fields: a, b; expected instruction"),
        ("auto", {"a": 1}, "data.sft.format=custom with data.sft.custom_format.instruction_field"),
        ("custom", {"a": 1}, "no field 'instruction' (custom format needs instruction, response"),
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
        ("messages", {"messages": [message("assistant", "a")]}, "no user turn before it"),
        ("messages", {"messages": [USER, message("assistant", "")]}, "2: field 'content' is empty"),
        (
            "messages",
            {"messages": [USER, message("assistant", None, tool_calls=[{}])]},
            "messages 2: 'tool_calls' cannot be trained on",
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
        ("prompt_completion", {"prompt": "q", "completion": []}, "'completion' must be text"),
        ("yaml", {}, "unknown format 'yaml'; expected one of auto, alpaca"),
    ],
)
def test_bad_records(format: str, record: dict[str, Any], error: str) -> None:
    with pytest.raises(UnmaskError) as caught:
        turns(record, format)
    assert error in str(caught.value)
    assert "\n" not in str(caught.value)

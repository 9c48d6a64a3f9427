"""Records of the usual instruction formats -> Conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from unmask.errors import UnmaskError

FORMATS = ("auto", "alpaca", "sharegpt", "messages", "prompt_completion", "custom")

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


class RecordError(UnmaskError):
    """A record that cannot be used; the message is "`where`: `reason``detail`.".

    `reason` is one of a few texts, so that skipped records can be counted by it; what differs from
    record to record is in `detail`, a continuation of the sentence. `counted`, if given, is what it is
    counted as instead.
    """

    def __init__(self, where: str, reason: str, detail: str = "", counted: str = ""):
        super().__init__(f"{where}: {reason}{detail}.")
        self.where = where
        self.reason = reason
        self.detail = detail
        self.counted = counted or reason

    def __reduce__(self) -> tuple[type[RecordError], tuple[str, str, str, str]]:
        return type(self), (self.where, self.reason, self.detail, self.counted)  # from one process to another


@dataclass(frozen=True)
class BadRecord:
    """Stands in the place of a record that could not be read; the parts are those of `RecordError`."""

    reason: str
    detail: str = ""
    counted: str = ""

    def error(self, where: str) -> RecordError:
        """Return the error that says so."""
        return RecordError(where, self.reason, self.detail, self.counted)


@dataclass(frozen=True)
class Turn:
    """One message; its role is system, user, assistant or tool. `train` False: context only.

    `tool_calls` of an assistant turn: {"name": text, "arguments": object}, written after its content, and
    where the record has it "id": text, which `tool_call_id` of a tool turn names.
    """

    role: str
    content: str
    train: bool = True
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True)
class Conversation:
    """Turns in order; `where` names the record they came from ("x.jsonl line 4").

    `tools` describes the tools that may be called, as OpenAI does (JSON schema).
    """

    turns: tuple[Turn, ...]
    where: str
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class CustomFields:
    """Field names of the `custom` format."""

    instruction_field: str = "instruction"
    input_field: str | None = None
    response_field: str = "response"
    system_field: str | None = None


def detect_format(record: Mapping[str, Any], where: str, custom_format: CustomFields | None = None) -> str:
    """Return the format of `record`, one of `FORMATS` but "auto".

    Raises:
        RecordError: No format fits.
    """
    if "messages" in record:
        return "messages"
    if "conversations" in record:
        return "sharegpt"
    if "prompt" in record and "completion" in record:
        return "prompt_completion"
    if "instruction" in record and "output" in record:
        return "alpaca"
    custom = custom_format or CustomFields()
    if custom.instruction_field in record and custom.response_field in record:
        return "custom"
    raise RecordError(
        where,
        "no known format has these fields",
        f": {_names(record)}; expected instruction and output (alpaca), conversations (sharegpt), messages,"
        " or prompt and completion; for others set data.sft.format=custom with"
        " data.sft.custom_format.instruction_field and .response_field",
    )


def to_conversation(
    record: Mapping[str, Any],
    format: str = "auto",
    *,
    where: str,
    custom_format: CustomFields | None = None,
) -> Conversation:
    """Read `record` in `format` (one of `FORMATS`) as a conversation.

    Raises:
        RecordError: A field is missing, is not text, a response is empty, or turns are out of order;
            the message names the record (`where`) and the field.
        UnmaskError: `format` is unknown.
    """
    if format == "auto":
        format = detect_format(record, where, custom_format)
    if format == "alpaca":
        turns = _alpaca(record, where)
    elif format == "sharegpt":
        turns = _system(record, "system", where) + _turns(record, "conversations", where, format)
    elif format == "messages":
        turns = _turns(record, "messages", where, format)
    elif format == "prompt_completion":
        turns = _prompt_completion(record, where)
    elif format == "custom":
        turns = _custom(record, where, custom_format or CustomFields())
    else:
        raise UnmaskError(f"unknown format {format!r}; expected one of {', '.join(FORMATS)}.")
    _check_order(turns, where)
    tools = _tools(record, where) if format in ("messages", "sharegpt", "prompt_completion") else ()
    return Conversation(tuple(turns), where, tools)


def _alpaca(record: Mapping[str, Any], where: str) -> list[Turn]:
    needs = "alpaca format needs instruction, output"
    turns = _system(record, "system", where)
    history = record.get("history") or []
    pairs = isinstance(history, Sequence) and not isinstance(history, str)
    if not pairs or not all(isinstance(p, Sequence) and len(p) == 2 for p in history):
        raise RecordError(where, "field 'history' must be a list of [user, assistant] pairs")
    for number, (user, assistant) in enumerate(history, 1):
        field = f"history pair {number}"
        turns.append(Turn("user", check_text(user, field, where)))
        turns.append(Turn("assistant", _response(assistant, field, where)))
    instruction = check_text(_get(record, "instruction", where, needs), "instruction", where)
    turns.append(Turn("user", _with_input(instruction, record, "input", where)))
    output = _response(_get(record, "output", where, needs), "output", where)
    turns.append(Turn("assistant", output))
    return turns


def _custom(record: Mapping[str, Any], where: str, names: CustomFields) -> list[Turn]:
    fields = f"{names.instruction_field}, {names.response_field}"
    needs = f"custom format needs {fields}: see data.sft.custom_format"
    turns = _system(record, names.system_field, where)
    instruction = _get(record, names.instruction_field, where, needs)
    instruction = check_text(instruction, names.instruction_field, where)
    if names.input_field is not None and names.input_field not in record:
        _get(record, names.input_field, where, needs)
    turns.append(Turn("user", _with_input(instruction, record, names.input_field, where)))
    response = _get(record, names.response_field, where, needs)
    turns.append(Turn("assistant", _response(response, names.response_field, where)))
    return turns


def _prompt_completion(record: Mapping[str, Any], where: str) -> list[Turn]:
    needs = "prompt_completion format needs prompt, completion"
    prompt = _get(record, "prompt", where, needs)
    completion = _get(record, "completion", where, needs)
    if isinstance(prompt, str) or isinstance(completion, str):
        return [
            Turn("user", check_text(prompt, "prompt", where)),
            Turn("assistant", _response(completion, "completion", where)),
        ]
    # Assistant turns of a prompt made of messages are context: only the completion is trained on.
    context = _turns(record, "prompt", where, "prompt_completion")
    context = [replace(turn, train=False) for turn in context]
    return context + _turns(record, "completion", where, "prompt_completion")


def _turns(record: Mapping[str, Any], field: str, where: str, format: str) -> list[Turn]:
    """The turns of a list field, of {"role", "content"} or {"from", "value"} objects."""
    messages = _get(record, field, where, f"{format} format needs {field}")
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise RecordError(where, f"field '{field}' must be a list of messages", f"; got {_kind(messages)}")
    return [
        _turn(message, f"{where}, {field} {number}", format) for number, message in enumerate(messages, 1)
    ]


def _turn(message: Any, place: str, format: str) -> Turn:
    if not isinstance(message, Mapping):
        raise RecordError(place, "expected an object", f"; got {_kind(message)}")
    sharegpt = "from" in message or (format == "sharegpt" and "role" not in message)
    role_key, text_key = ("from", "value") if sharegpt else ("role", "content")
    needs = f"a message needs {role_key}, {text_key}"
    name = _get(message, role_key, place, needs)
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise RecordError(
            place, f"unknown {role_key}", f" {str(name)[:40]!r}; expected one of {', '.join(ROLES)}"
        )
    calls = _tool_calls(message, role, place)
    if calls and message.get(text_key) is None:
        content = ""  # as OpenAI writes a turn that only calls tools
    else:
        content = _parts(_get(message, text_key, place, needs), text_key, place)
    if role == "assistant" and not calls:
        content = _response(content, text_key, place)
    answered = message.get("tool_call_id")
    if answered is not None:
        check_text(answered, "tool_call_id", place)
    return Turn(role, content, _is_trained(message, place), calls, answered)


def _is_trained(message: Mapping[str, Any], place: str) -> bool:
    """What "train" (true or false) or "weight" (1 or 0) of a message says; True where neither stands."""
    said = []
    for field, expected in (("train", "true or false"), ("weight", "0 or 1")):
        value = message.get(field)
        if value is None:
            continue
        if isinstance(value, bool) != (field == "train") or value not in (0, 1):
            raise RecordError(place, f"field '{field}' must be {expected}", f"; got {_kind(value)}")
        said.append(bool(value))
    if len(set(said)) > 1:
        raise RecordError(place, "fields 'train' and 'weight' contradict one another", "; remove one")
    return all(said)


def _tool_calls(message: Mapping[str, Any], role: str, place: str) -> tuple[Mapping[str, Any], ...]:
    """The calls as {"name", "arguments"}; OpenAI nests them in "function" and writes arguments as a text."""
    calls = message.get("tool_calls")
    if not calls:
        return ()
    if role != "assistant":
        raise RecordError(place, "only an assistant turn may have 'tool_calls'", f"; this one is of {role}")
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise RecordError(place, "field 'tool_calls' must be a list", f"; got {_kind(calls)}")
    read = []
    for number, call in enumerate(calls, 1):
        at = f"{place}, tool_calls {number}"
        if not isinstance(call, Mapping):
            raise RecordError(at, "a tool call must be an object", f"; got {_kind(call)}")
        inner = call.get("function") if "function" in call else call
        if not isinstance(inner, Mapping):
            raise RecordError(at, "field 'function' must be an object", f"; got {_kind(inner)}")
        name = check_text(_get(inner, "name", at, "a tool call needs name, arguments"), "name", at)
        arguments = _get(inner, "arguments", at, "a tool call needs name, arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(check_text(arguments, "arguments", at))
            except (ValueError, RecursionError) as error:
                raise RecordError(at, "field 'arguments' is not valid JSON", f" ({error})") from error
        if not isinstance(arguments, Mapping):
            raise RecordError(at, "field 'arguments' must be an object", f"; got {_kind(arguments)}")
        check_text(json.dumps(arguments, ensure_ascii=False), "arguments", at)
        own = {} if call.get("id") is None else {"id": check_text(call["id"], "id", at)}
        read.append({"name": name, "arguments": dict(arguments), **own})
    return tuple(read)


def _tools(record: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], ...]:
    """The field "tools": a list of objects, or a text that holds one as JSON."""
    tools = record.get("tools") or []
    if isinstance(tools, str):
        try:
            tools = json.loads(check_text(tools, "tools", where)) if tools.strip() else []
        except (ValueError, RecursionError) as error:
            raise RecordError(where, "field 'tools' is not valid JSON", f" ({error})") from error
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RecordError(where, "field 'tools' must be a list of objects", f"; got {_kind(tools)}")
    check_text(json.dumps(tools, ensure_ascii=False), "tools", where)
    return tuple(tools)


def call_text(turn: Turn) -> str:
    """Return content and tool calls of a turn as one text, the calls as Qwen's templates write them.

    Example:
        >>> call_text(Turn("assistant", "", tool_calls=({"name": "add", "arguments": {"a": 1}},)))
        '<tool_call>\\n{"name": "add", "arguments": {"a": 1}}\\n</tool_call>'
    """
    shown = [{"name": call["name"], "arguments": call["arguments"]} for call in turn.tool_calls]
    calls = [f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in shown]
    return "\n".join([turn.content] * bool(turn.content) + calls)


def _parts(value: Any, field: str, where: str) -> str:
    """Text, or the joined text of a list of {"type": "text", "text": ...} parts."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            if not isinstance(part, Mapping) or part.get("type", "text") != "text":
                raise RecordError(where, f"field '{field}' has a part that is not text")
        return "".join(check_text(part.get("text"), f"{field}.text", where) for part in value)
    return check_text(value, field, where)


def _check_order(turns: Sequence[Turn], where: str) -> None:
    roles = [turn.role for turn in turns]
    listed = ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "")
    if "assistant" not in roles:
        raise RecordError(
            where, "there is no assistant turn, so nothing to train on", f"; turns: {listed or 'none'}"
        )
    first = roles.index("assistant")
    if "user" not in roles[:first]:
        raise RecordError(
            where,
            "turns out of order: the first assistant turn has no user turn before it",
            f"; expected system (if any), user, assistant, ...; turns: {listed}",
        )
    if "tool" in roles[:first]:
        raise RecordError(
            where,
            "turns out of order: a tool turn stands before any assistant turn",
            f"; expected it after the assistant turn that calls the tool; turns: {listed}",
        )


def _system(record: Mapping[str, Any], field: str | None, where: str) -> list[Turn]:
    value = None if field is None else record.get(field)
    if value is None or value == "":
        return []
    return [Turn("system", check_text(value, str(field), where))]


def _with_input(instruction: str, record: Mapping[str, Any], field: str | None, where: str) -> str:
    value = None if field is None else record.get(field)
    if value is None or not (text := check_text(value, str(field), where)).strip():
        return instruction
    return f"{instruction}\n{text}" if instruction else text


def _get(record: Mapping[str, Any], field: str, where: str, needs: str) -> Any:
    # Tables (Parquet, CSV) write a missing value as None.
    if record.get(field) is None:
        what = f"field '{field}' is null" if field in record else f"no field '{field}'"
        raise RecordError(where, what, f" ({needs}); fields here: {_names(record)}")
    return record[field]


def check_text(value: Any, field: str, where: str) -> str:
    """Return `value`, checked to be text that a tokenizer can read.

    Raises:
        RecordError: It is no text, or holds half a surrogate pair.
    """
    if not isinstance(value, str):
        raise RecordError(where, f"field '{field}' must be text", f"; got {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RecordError(
            where,
            f"field '{field}' holds half a surrogate pair",
            f" at character {error.start + 1}, which is no text",
        ) from error
    return value


def _response(value: Any, field: str, where: str) -> str:
    text = check_text(value, field, where)
    if not text.strip():
        raise RecordError(where, f"field '{field}' is empty", "; a response needs text")
    return text


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return "text"
    return "an object" if isinstance(value, Mapping) else "a list"


def _names(record: Mapping[str, Any]) -> str:
    names = [" ".join(str(name)[:40].split()) for name in record]
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(names[:12]) + more or "none"

"""Records of the usual instruction formats -> Conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Turn:
    """One message; its role is system, user, assistant or tool. `train` False: context only."""

    role: str
    content: str
    train: bool = True


@dataclass(frozen=True)
class Conversation:
    """Turns in order; `where` names the record they came from ("x.jsonl line 4")."""

    turns: tuple[Turn, ...]
    where: str


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
        UnmaskError: No format fits.
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
    raise UnmaskError(
        f"{where}: no known format has these fields: {_names(record)}; expected instruction and "
        "output (alpaca), conversations (sharegpt), messages, or prompt and completion; for others "
        "set data.sft.format=custom with data.sft.custom_format.instruction_field and "
        ".response_field."
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
        UnmaskError: A field is missing, is not text, or a response is empty; the message names
            the record (`where`) and the field.
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
    return Conversation(tuple(turns), where)


def _alpaca(record: Mapping[str, Any], where: str) -> list[Turn]:
    needs = "alpaca format needs instruction, output"
    turns = _system(record, "system", where)
    history = record.get("history") or []
    pairs = isinstance(history, Sequence) and not isinstance(history, str)
    if not pairs or not all(isinstance(p, Sequence) and len(p) == 2 for p in history):
        raise UnmaskError(f"{where}: field 'history' must be a list of [user, assistant] pairs.")
    for number, (user, assistant) in enumerate(history, 1):
        field = f"history pair {number}"
        turns.append(Turn("user", _text(user, field, where)))
        turns.append(Turn("assistant", _response(assistant, field, where)))
    instruction = _text(_get(record, "instruction", where, needs), "instruction", where)
    turns.append(Turn("user", _with_input(instruction, record, "input", where)))
    output = _response(_get(record, "output", where, needs), "output", where)
    turns.append(Turn("assistant", output))
    return turns


def _custom(record: Mapping[str, Any], where: str, names: CustomFields) -> list[Turn]:
    fields = f"{names.instruction_field}, {names.response_field}"
    needs = f"custom format needs {fields}: see data.sft.custom_format"
    turns = _system(record, names.system_field, where)
    instruction = _get(record, names.instruction_field, where, needs)
    instruction = _text(instruction, names.instruction_field, where)
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
            Turn("user", _text(prompt, "prompt", where)),
            Turn("assistant", _response(completion, "completion", where)),
        ]
    # Assistant turns of a prompt made of messages are context: only the completion is trained on.
    context = _turns(record, "prompt", where, "prompt_completion")
    context = [Turn(turn.role, turn.content, train=False) for turn in context]
    return context + _turns(record, "completion", where, "prompt_completion")


def _turns(record: Mapping[str, Any], field: str, where: str, format: str) -> list[Turn]:
    """The turns of a list field, of {"role", "content"} or {"from", "value"} objects."""
    messages = _get(record, field, where, f"{format} format needs {field}")
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise UnmaskError(f"{where}: field '{field}' must be a list of messages; got {_kind(messages)}.")
    turns = []
    for number, message in enumerate(messages, 1):
        place = f"{where}, {field} {number}"
        if not isinstance(message, Mapping):
            raise UnmaskError(f"{place}: expected an object; got {_kind(message)}.")
        sharegpt = "from" in message or (format == "sharegpt" and "role" not in message)
        role_key, text_key = ("from", "value") if sharegpt else ("role", "content")
        needs = f"a message needs {role_key}, {text_key}"
        role = ROLES.get(str(_get(message, role_key, place, needs)))
        if role is None:
            known = ", ".join(ROLES)
            raise UnmaskError(f"{place}: unknown {role_key} {message[role_key]!r}; expected one of {known}.")
        if message.get("tool_calls"):
            raise UnmaskError(
                f"{place}: 'tool_calls' cannot be trained on; write the call as text in 'content'."
            )
        content = _parts(_get(message, text_key, place, needs), text_key, place)
        if role == "assistant":
            content = _response(content, text_key, place)
        train = message.get("train")
        if not isinstance(train, bool | None):
            raise UnmaskError(f"{place}: field 'train' must be true or false; got {_kind(train)}.")
        turns.append(Turn(role, content, train is not False))
    return turns


def _parts(value: Any, field: str, where: str) -> str:
    """Text, or the joined text of a list of {"type": "text", "text": ...} parts."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            if not isinstance(part, Mapping) or part.get("type", "text") != "text":
                raise UnmaskError(f"{where}: field '{field}' has a part that is not text.")
        return "".join(_text(part.get("text"), f"{field}.text", where) for part in value)
    return _text(value, field, where)


def _check_order(turns: Sequence[Turn], where: str) -> None:
    roles = [turn.role for turn in turns]
    if "assistant" not in roles:
        raise UnmaskError(
            f"{where}: there is no assistant turn, so nothing to train on; turns: "
            f"{', '.join(roles) or 'none'}."
        )
    if "user" not in roles[: roles.index("assistant")]:
        raise UnmaskError(f"{where}: the first assistant turn has no user turn before it.")


def _system(record: Mapping[str, Any], field: str | None, where: str) -> list[Turn]:
    value = None if field is None else record.get(field)
    if value is None or value == "":
        return []
    return [Turn("system", _text(value, str(field), where))]


def _with_input(instruction: str, record: Mapping[str, Any], field: str | None, where: str) -> str:
    value = None if field is None else record.get(field)
    if value is None or not (text := _text(value, str(field), where)).strip():
        return instruction
    return f"{instruction}\n{text}" if instruction else text


def _get(record: Mapping[str, Any], field: str, where: str, needs: str) -> Any:
    # Tables (Parquet, CSV) write a missing value as None.
    if record.get(field) is None:
        what = f"field '{field}' is null" if field in record else f"no field '{field}'"
        raise UnmaskError(f"{where}: {what} ({needs}); fields here: {_names(record)}.")
    return record[field]


def _text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise UnmaskError(f"{where}: field '{field}' must be text; got {_kind(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UnmaskError(
            f"{where}: field '{field}' holds half a surrogate pair at character {error.start + 1}, "
            "which is no text."
        ) from error
    return value


def _response(value: Any, field: str, where: str) -> str:
    text = _text(value, field, where)
    if not text.strip():
        raise UnmaskError(f"{where}: field '{field}' is empty; a response needs text.")
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
    return ", ".join(str(name) for name in record) or "none"

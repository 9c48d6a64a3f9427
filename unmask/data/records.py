"""Records of the usual instruction formats -> Conversation. docs/data.md has the table of formats and keys."""

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
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
CALL_ROLES = ("function_call", "tool_call")  # the text of such a turn is a call, or a list of calls, as JSON

# The keys that are read, of each format, in the order in which they are looked for.
SYSTEM = ("system", "system_prompt", "system_message")
INSTRUCTION = ("instruction", "question", "query")
INPUT = ("input", "context")
RESPONSE = ("output", "response")
TOOLS = ("tools", "functions")
REASONING = ("reasoning_content", "reasoning", "thinking")
TRAINED = {"train": "true or false", "loss": "true or false", "weight": "0 or 1"}
MESSAGE = ("role", "content", "from", "value", "name", "tool_calls", "function_call", "tool_call_id")


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
    """Replaces a record that could not be read; the parts are those of `RecordError`."""

    reason: str
    detail: str = ""
    counted: str = ""

    def error(self, where: str) -> RecordError:
        """Return the error that says so."""
        return RecordError(where, self.reason, self.detail, self.counted)


@dataclass(frozen=True)
class Turn:
    """One message; its role is system, user, assistant or tool. `train` False: context only.

    `reasoning` of an assistant turn comes before its content. `tool_calls`: {"name": text, "arguments":
    object}, written after its content, and where the record has it "id": text, which `tool_call_id` of a
    tool turn names.
    """

    role: str
    content: str
    train: bool = True
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tool_call_id: str | None = None
    reasoning: str = ""
    name: str | None = None


@dataclass(frozen=True)
class Conversation:
    """Turns in order; `where` names the record they came from ("x.jsonl line 4").

    `tools` describes the tools that may be called, as OpenAI does (JSON schema). `unused` names the fields
    of the record that no turn was made of ("source", "messages.refusal").
    """

    turns: tuple[Turn, ...]
    where: str
    tools: tuple[Mapping[str, Any], ...] = ()
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class CustomFields:
    """Field names of the `custom` format."""

    instruction_field: str = "instruction"
    input_field: str | None = None
    response_field: str = "response"
    system_field: str | None = None


def detect_format(record: Mapping[str, Any], where: str, custom_format: CustomFields | None = None) -> str:
    """Return the format of `record`, one of `FORMATS` but "auto". A field that is null is not there.

    Raises:
        RecordError: No format fits.
    """
    there = {key for key, value in record.items() if value is not None}
    if "messages" in there:
        return "messages"
    if "conversations" in there:
        return "sharegpt"
    if {"prompt", "completion"} <= there:
        return "prompt_completion"
    custom = custom_format or CustomFields()
    if custom != CustomFields() and {custom.instruction_field, custom.response_field} <= there:
        return "custom"
    if there & set(INSTRUCTION) and there & set(RESPONSE):
        return "alpaca"
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
    if format not in FORMATS:
        raise UnmaskError(f"unknown format {format!r}; expected one of {', '.join(FORMATS)}.")
    fields = _Fields(_without_nulls(record), where, f"{format} format needs ")
    tools: tuple[Mapping[str, Any], ...] = ()
    if format == "custom":
        turns = _custom(fields, custom_format or CustomFields())
    else:
        system = fields.first(SYSTEM)
        if format == "alpaca":
            turns = _alpaca(fields)
        elif format == "prompt_completion":
            turns = _prompt_completion(fields)
        else:
            turns = _turns(fields, "conversations" if format == "sharegpt" else "messages", format)
        turns = _with_system(system, turns, where)
        if format != "alpaca":
            tools = _tools(fields)
    _check_order(turns, where)
    return Conversation(tuple(turns), where, tools, fields.unused())


class _Fields:
    """The fields of one record, or of one of its messages; remembers which of them were read."""

    def __init__(self, record: Mapping[str, Any], where: str, needs: str = "", prefix: str = "") -> None:
        self.record, self.where, self.needs, self.prefix = record, where, needs, prefix
        self.used: set[str] = set()
        self.inner: dict[str, None] = {}  # unused fields of messages

    def get(self, name: str, needed: str = "") -> Any:
        """The value of a field, which must be there if `needed` says for what."""
        self.used.add(name)
        if needed and name not in self.record:
            detail = f" ({self.needs}{needed}); fields here: {_names(self.record)}"
            raise RecordError(self.where, f"no field '{name}', or it is null", detail)
        return self.record.get(name)

    def first(self, names: Sequence[str], needed: str = "") -> tuple[str, Any]:
        """The one field of several spellings that is there, as (name, value); ("", None) without one."""
        there = [name for name in names if name in self.record]
        if len(there) > 1 and len({json.dumps(self.record[name]) for name in there}) > 1:
            raise RecordError(self.where, f"fields '{there[0]}' and '{there[1]}' contradict one another")
        self.used.update(there)
        if there:
            return there[0], self.record[there[0]]
        return (names[0], self.get(names[0], needed)) if needed else ("", None)

    def text(self, name: str, needed: str) -> str:
        return check_text(self.get(name, needed), name, self.where)

    def unused(self) -> tuple[str, ...]:
        return (*(self.prefix + str(name) for name in self.record if name not in self.used), *self.inner)


def _without_nulls(value: Any) -> Any:
    """`value` without the keys that are null: tables write them for what a record does not have."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list | tuple) else value


def _alpaca(fields: _Fields) -> list[Turn]:
    where, needs = fields.where, "instruction, output"
    turns: list[Turn] = []
    history = fields.get("history") or []
    pairs = isinstance(history, Sequence) and not isinstance(history, str)
    if not pairs or not all(isinstance(p, Sequence) and len(p) == 2 for p in history):
        raise RecordError(where, "field 'history' must be a list of [user, assistant] pairs")
    for number, (user, assistant) in enumerate(history, 1):
        field = f"history pair {number}"
        turns.append(Turn("user", check_text(user, field, where)))
        turns.append(Turn("assistant", _response(assistant, field, where)))
    name, instruction = fields.first(INSTRUCTION, needs)
    text = check_text(instruction, name, where)
    for name in INPUT:
        text = _with_input(text, fields, name)
    turns.append(Turn("user", text))
    name, output = fields.first(RESPONSE, needs)
    name_of_reasoning, reasoning = fields.first(REASONING)
    turns.append(
        Turn(
            "assistant",
            _response(output, name, where),
            reasoning="" if reasoning is None else check_text(reasoning, name_of_reasoning, where),
        )
    )
    return turns


def _custom(fields: _Fields, names: CustomFields) -> list[Turn]:
    needs = f"{names.instruction_field}, {names.response_field}: see data.sft.custom_format"
    instruction = fields.text(names.instruction_field, needs)
    if names.input_field is not None:
        if names.input_field not in fields.record:
            fields.get(names.input_field, needs)
        instruction = _with_input(instruction, fields, names.input_field)
    response = _response(fields.get(names.response_field, needs), names.response_field, fields.where)
    turns = [Turn("user", instruction), Turn("assistant", response)]
    if names.system_field is None:
        return turns
    return _with_system((names.system_field, fields.get(names.system_field)), turns, fields.where)


def _prompt_completion(fields: _Fields) -> list[Turn]:
    needs = "prompt, completion"
    prompt, completion = fields.get("prompt", needs), fields.get("completion", needs)
    if isinstance(prompt, str):
        context = [Turn("user", check_text(prompt, "prompt", fields.where))]
    else:
        # Assistant turns of a prompt made of messages are context: only the completion is trained on.
        context = [replace(turn, train=False) for turn in _turns(fields, "prompt", "prompt_completion")]
    if isinstance(completion, str):
        return [*context, Turn("assistant", _response(completion, "completion", fields.where))]
    return context + _turns(fields, "completion", "prompt_completion")


def _turns(fields: _Fields, field: str, format: str) -> list[Turn]:
    """The turns of a list field, of {"role", "content"} or {"from", "value"} objects."""
    messages = fields.get(field, field)
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise RecordError(
            fields.where, f"field '{field}' must be a list of messages", f"; got {_kind(messages)}"
        )
    turns = []
    for number, message in enumerate(messages, 1):
        place = f"{fields.where}, {field} {number}"
        if not isinstance(message, Mapping):
            raise RecordError(place, "expected an object", f"; got {_kind(message)}")
        sharegpt = "from" in message or (format == "sharegpt" and "role" not in message)
        keys = ("from", "value") if sharegpt else ("role", "content")
        inner = _Fields(message, place, "a message needs ", f"{field}.")
        turns.append(_turn(inner, *keys))
        fields.inner |= dict.fromkeys(inner.unused())
    return turns


def _turn(fields: _Fields, role_key: str, text_key: str) -> Turn:
    place, needs = fields.where, f"{role_key}, {text_key}"
    name = fields.get(role_key, needs)
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise RecordError(
            place, f"unknown {role_key}", f" {str(name)[:40]!r}; expected one of {', '.join(ROLES)}"
        )
    calls = _tool_calls(fields, role)
    if name in CALL_ROLES and not calls:
        content, calls = "", _calls_in_text(fields.get(text_key, needs), text_key, name, place)
    elif calls and text_key not in fields.record:
        content = ""  # as OpenAI writes a turn that only calls tools
    else:
        content = _parts(fields.get(text_key, needs), text_key, place)
    fields.used.add(text_key)
    key, reasoning = fields.first(REASONING) if role == "assistant" else ("", None)
    if role == "assistant" and not calls:
        content = _response(content, text_key, place)
    texts = {}
    for field in ("tool_call_id", "name"):
        if fields.get(field) is not None:
            texts[field] = check_text(fields.record[field], field, place)
    return Turn(
        role,
        content,
        _is_trained(fields),
        calls,
        texts.get("tool_call_id"),
        "" if reasoning is None else check_text(reasoning, key, place),
        texts.get("name"),
    )


def _is_trained(fields: _Fields) -> bool:
    """What "train" or "loss" (true or false) or "weight" (1 or 0) of a message say; True without them."""
    said = {}
    for field, expected in TRAINED.items():
        value = fields.get(field)
        if value is None:
            continue
        if isinstance(value, bool) == (field == "weight") or value not in (0, 1):
            raise RecordError(fields.where, f"field '{field}' must be {expected}", f"; got {_kind(value)}")
        said[field] = bool(value)
    if len(set(said.values())) > 1:
        one, other = list(said)[:2]
        raise RecordError(
            fields.where, f"fields '{one}' and '{other}' contradict one another", "; remove one"
        )
    return all(said.values())


def _tool_calls(fields: _Fields, role: str) -> tuple[Mapping[str, Any], ...]:
    """The calls in "tool_calls", or the one in "function_call" (OpenAI until 2023)."""
    place = fields.where
    calls, single = fields.get("tool_calls"), fields.get("function_call")
    if single and calls:
        raise RecordError(
            place, "fields 'tool_calls' and 'function_call' contradict one another", "; remove one"
        )
    field = "function_call" if single else "tool_calls"
    if not (calls or single):
        return ()
    if role != "assistant":
        raise RecordError(place, f"only an assistant turn may have '{field}'", f"; this one is of {role}")
    if single:
        return (_call(single, f"{place}, function_call"),)
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise RecordError(place, "field 'tool_calls' must be a list", f"; got {_kind(calls)}")
    return tuple(_call(call, f"{place}, tool_calls {number}") for number, call in enumerate(calls, 1))


def _calls_in_text(value: Any, field: str, role: str, place: str) -> tuple[Mapping[str, Any], ...]:
    """The calls of a turn whose role says that its text is one, or a list of them."""
    calls = _json(value, field, place, f" of a {role} turn")
    calls = calls if isinstance(calls, list) else [calls]
    if not calls:
        raise RecordError(place, f"field '{field}' of a {role} turn has no call")
    return tuple(_call(call, place) for call in calls)


def _call(call: Any, at: str) -> Mapping[str, Any]:
    """A call as {"name", "arguments"}; OpenAI nests them in "function" and writes arguments as a text."""
    if not isinstance(call, Mapping):
        raise RecordError(at, "a tool call must be an object", f"; got {_kind(call)}")
    inner = call.get("function") if "function" in call else call
    if not isinstance(inner, Mapping):
        raise RecordError(at, "field 'function' must be an object", f"; got {_kind(inner)}")
    fields = _Fields(inner, at, "a tool call needs ")
    name = fields.text("name", "name, arguments")
    arguments = fields.get("arguments")
    if isinstance(arguments, str):
        arguments = _json(arguments, "arguments", at) if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise RecordError(at, "field 'arguments' must be an object", f"; got {_kind(arguments)}")
    check_text(json.dumps(arguments, ensure_ascii=False), "arguments", at)
    own = {} if call.get("id") is None else {"id": check_text(call["id"], "id", at)}
    return {"name": name, "arguments": dict(arguments), **own}


def _tools(fields: _Fields) -> tuple[Mapping[str, Any], ...]:
    """The tools: a list of objects, or a text with one as JSON; "functions" are the older form of them."""
    field, tools = fields.first(TOOLS)
    if isinstance(tools, str):
        tools = _without_nulls(_json(tools, field, fields.where)) if tools.strip() else []
    tools = tools or []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RecordError(fields.where, f"field '{field}' must be a list of objects", f"; got {_kind(tools)}")
    check_text(json.dumps(tools, ensure_ascii=False), field, fields.where)
    return tuple({"type": "function", "function": tool} if field == "functions" else tool for tool in tools)


def _json(value: Any, field: str, where: str, of: str = "") -> Any:
    try:
        return json.loads(check_text(value, field, where))
    except (ValueError, RecursionError) as error:
        raise RecordError(where, f"field '{field}'{of} is not valid JSON", f" ({error})") from error


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
            "turns out of order: a tool turn is before any assistant turn",
            f"; expected it after the assistant turn that calls the tool; turns: {listed}",
        )


def _with_system(field: tuple[str, Any], turns: list[Turn], where: str) -> list[Turn]:
    name, value = field
    if value is None or value == "":
        return turns
    text = check_text(value, name, where)
    if turns and turns[0].role == "system":
        if turns[0].content == text:
            return turns
        raise RecordError(where, f"field '{name}' contradicts the system turn", "; remove one of them")
    return [Turn("system", text), *turns]


def _with_input(instruction: str, fields: _Fields, field: str) -> str:
    value = fields.get(field)
    if value is None or not (text := check_text(value, field, fields.where)).strip():
        return instruction
    return f"{instruction}\n{text}" if instruction else text


def check_text(value: Any, field: str, where: str) -> str:
    """Return `value`, checked to be text that a tokenizer can read.

    Raises:
        RecordError: It is not text, or has an unpaired surrogate.
    """
    if not isinstance(value, str):
        raise RecordError(where, f"field '{field}' must be text", f"; got {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RecordError(
            where,
            f"field '{field}' has an unpaired surrogate",
            f" at character {error.start + 1}, which is not text",
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

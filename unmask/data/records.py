"""Records of the usual instruction formats -> Conversation.

`READ` and `MESSAGE` list every key that is read; docs/data.md shows them. A field that is null is not there, and
one that is not read is named in `Conversation.unused`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from unmask.errors import UnmaskError

_SYSTEM = {"system": ("system", "system_prompt", "system_message")}
_TOOLS = {"tools": ("tools", "functions")}
_REASONING = {"reasoning": ("reasoning_content", "reasoning", "thinking")}

# Format -> what is read of a record -> the keys it is read from, which must not contradict one another.
READ: dict[str, dict[str, tuple[str, ...]]] = {
    "messages": {"turns": ("messages",), **_SYSTEM, **_TOOLS},
    "sharegpt": {"turns": ("conversations",), **_SYSTEM, **_TOOLS},
    "prompt_completion": {"instruction": ("prompt",), "response": ("completion",), **_SYSTEM, **_TOOLS},
    "alpaca": {
        "instruction": ("instruction", "question", "query"),
        "response": ("output", "response"),
        "input": ("input",),
        "context": ("context",),
        "history": ("history",),
        **_SYSTEM,
        **_TOOLS,
        **_REASONING,
    },
}
FORMATS = ("auto", "alpaca", "sharegpt", "messages", "prompt_completion", "custom")

# The same for a message of "messages" or "conversations".
MESSAGE: dict[str, tuple[str, ...]] = {
    "role": ("role", "from"),
    "content": ("content", "value"),
    **_REASONING,
    "trained": ("train", "loss", "weight"),
    "calls": ("tool_calls", "function_call"),
    "tool_call_id": ("tool_call_id",),
    "name": ("name",),
}
# Words in the names of fields that hold answers, for a suggestion.
ANSWERS = {"answer", "output", "response", "completion", "solution", "target", "reply", "label", "chosen"}
_CALL = {"name": ("name",), "arguments": ("arguments",), "id": ("id",)}
_KINDS = {str: "text", list: "a list", Mapping: "an object"}

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response"), "tool"),
}
CALL_ROLES = ("function_call", "tool_call")  # the text of such a turn is a call, or a list of calls, as JSON


class RecordError(UnmaskError):
    """A record that cannot be used; the message is "`where`: `reason``detail`.".

    `reason` is one of a few texts, so that skipped records can be counted by it; what differs from record to
    record is in `detail`, a continuation of the sentence. `counted`: what it is counted as instead.
    """

    def __init__(self, where: str, reason: str, detail: str = "", counted: str = ""):
        super().__init__(f"{where}: {reason}{detail}.")
        self.where, self.reason, self.detail, self.counted = where, reason, detail, counted or reason

    def __reduce__(self) -> tuple[type[RecordError], tuple[str, str, str, str]]:
        return type(self), (self.where, self.reason, self.detail, self.counted)  # from one process to another


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

    def keys(self) -> dict[str, tuple[str, ...]]:
        """What is read, as `READ` says it."""
        fields = (self.instruction_field, self.response_field, self.input_field, self.system_field)
        parts = zip(("instruction", "response", "input", "system"), fields, strict=True)
        return {part: (field,) for part, field in parts if field is not None}


def detect_format(
    record: Mapping[str, Any], where: str, custom_format: CustomFields | None = None, *, answered: bool = True
) -> str:
    """Return the format of `record`, one of `FORMATS` but "auto"; not `answered`: it may lack its response.

    Raises:
        RecordError: No format fits.
    """
    tables = list(READ.items())
    if custom_format not in (None, CustomFields()):
        tables.insert(-1, ("custom", custom_format.keys()))
    needed = ("turns", "instruction", "response") if answered else ("turns", "instruction")
    for name, keys in tables:
        parts = [keys[part] for part in needed if part in keys]
        if all(any(record.get(key) is not None for key in part) for part in parts):
            return name
    raise _unknown_format(record, where, needed)


def _unknown_format(record: Mapping[str, Any], where: str, needed: Sequence[str]) -> RecordError:
    """The error of a record that fits no format, with what its author most likely meant."""
    reason, names = "no known format has these fields", _names(record)
    required = {key: name for name, keys in READ.items() for part in needed for key in keys.get(part, ())}
    named = [str(key) for key in record if record[key] is not None]
    lower = {key.lower(): key for key in named if key not in required}
    typos = {key: difflib.get_close_matches(key, lower, 1, 0.75) for key in required if key not in named}
    meant = [f"'{key}' instead of '{lower[near[0]][:40]}'" for key, near in typos.items() if near]
    if meant:
        return RecordError(where, reason, f": {names}; did you mean {' and '.join(meant[:2])}?")
    known = {key for keys in READ.values() for part in keys.values() for key in part}
    texts = [str(key) for key, value in record.items() if isinstance(value, str)]
    for name, keys in READ.items():
        has = [part for part in needed if any(key in named for key in keys.get(part, ()))]
        if has == ["instruction"] and "response" in needed and not set(texts) - known:
            detail = f", or it is null; records of {name} have it; fields here: {names}"
            return RecordError(where, f"field '{keys['response'][0]}' is missing", detail)
    if lists := [key for key in named if isinstance(record[key], list) and key not in known]:
        detail = f": {names}; if the records are in '{lists[0][:40]}', save that list alone as a .json file"
        return RecordError(where, reason, detail)
    answers = [key for key in texts if ANSWERS & set(re.split(r"[^a-z]+", key.lower()))]
    asked = next((key for key in texts if key not in answers), "PROMPT")
    answer = answers[0] if answers else next((key for key in texts if key != asked), "ANSWER")
    if {asked, answer} & {"PROMPT", "ANSWER"} or not re.fullmatch(
        r"[\w.-]{1,30}=[\w.-]{1,30}", f"{asked}={answer}"
    ):
        asked, answer = "PROMPT", "ANSWER"
    if re.search(r"\.[ct]sv\b", where):
        names += " (the first row of a table must name its columns)"
    custom = "data.sft.custom_format"
    detail = (
        f": {names}; expected instruction and output (alpaca), conversations (sharegpt), messages, or prompt"
    )
    detail += f" and completion; name others: data.sft.format=custom {custom}.instruction_field={asked}"
    return RecordError(where, reason, f"{detail} {custom}.response_field={answer}")


def to_conversation(
    record: Mapping[str, Any],
    format: str = "auto",
    *,
    where: str,
    custom_format: CustomFields | None = None,
    answered: bool = True,
) -> Conversation:
    """Read `record` in `format` (one of `FORMATS`); not `answered`: it may lack its last response.

    Raises:
        RecordError: A field is missing, is not text, a response is empty, or turns are out of order;
            the message names the record (`where`) and the field.
        UnmaskError: `format` is unknown.
    """
    if format not in FORMATS:
        raise UnmaskError(f"unknown format {format!r}; expected one of {', '.join(FORMATS)}.")
    if format == "auto":
        format = detect_format(record, where, custom_format, answered=answered)
    keys = (custom_format or CustomFields()).keys() if format == "custom" else READ[format]
    fields = _Fields(_without_nulls(record), where, keys)
    if "turns" in keys:
        turns = _turns(fields, *fields.take("turns", required=True))
    else:
        turns = _instruction(fields, answered, inputs_required=format == "custom")
    key, system = fields.take("system")
    if key and check_text(system, key, where):
        if not turns or turns[0].role != "system":
            turns = [Turn("system", system), *turns]
        elif turns[0].content != system:
            raise RecordError(where, f"field '{key}' contradicts the system turn", "; remove one of them")
    tools = _tools(fields)
    _check_order(turns, where, answered)
    return Conversation(tuple(turns), where, tools, tuple(map(str, fields.left)))


class _Fields:
    """The fields of a record, a message or a call; `left` has those that were not taken."""

    def __init__(self, record: Mapping[str, Any], where: str, keys: Mapping[str, tuple[str, ...]]) -> None:
        self.where, self.keys, self.left, self.names = where, keys, dict(record), _names(record)

    def take(self, part: str, *, required: bool = False) -> tuple[str, Any]:
        """The key and the value of a part; ("", None) if it is not there and not `required`."""
        keys = self.keys.get(part, ())
        there = [key for key in keys if key in self.left]
        if required and keys and not there:
            names = "' or '".join(keys)
            raise RecordError(
                self.where, f"no field '{names}', or it is null", f"; fields here: {self.names}"
            )
        values = [self.left.pop(key) for key in there]
        for key, value in zip(there[1:], values[1:], strict=True):
            if value != values[0]:
                raise RecordError(self.where, f"fields '{there[0]}' and '{key}' contradict one another")
        return (there[0], values[0]) if there else ("", None)

    def text(self, part: str, *, required: bool = False) -> str:
        """The text of a part; "" if it is not there and not `required`."""
        key, value = self.take(part, required=required)
        return check_text(value, key, self.where) if key else ""


def _instruction(fields: _Fields, answered: bool, inputs_required: bool) -> list[Turn]:
    """The turns of an instruction and a response, each a text or a list of messages."""
    turns: list[Turn] = []
    for number, pair in enumerate(_typed(fields.take("history")[1] or [], list, "history", fields.where), 1):
        where = f"{fields.where}, history {number}"
        if len(_typed(pair, list, "history", where)) != 2:
            raise RecordError(where, "field 'history' must be a list of [user, assistant] pairs")
        turns += [Turn("user", check_text(pair[0], "history", where)), _answer(pair[1], "history", where)]
    key, value = fields.take("instruction", required=True)
    if _are_messages(value):  # its assistant turns are context: only the response is trained on
        turns += [replace(turn, train=False) for turn in _turns(fields, key, value)]
    else:
        inputs = [fields.text(part, required=inputs_required) for part in ("input", "context")]
        texts = [check_text(value, key, fields.where), *(text for text in inputs if text.strip())]
        turns.append(Turn("user", "\n".join(filter(None, texts))))
    key, value = fields.take("response", required=answered)
    if _are_messages(value):
        turns += _turns(fields, key, value)
    elif key and (answered or value != ""):  # a prompt's answer may be empty
        turns.append(replace(_answer(value, key, fields.where), reasoning=fields.text("reasoning")))
    return turns


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and (not value or any(isinstance(item, Mapping) for item in value))


def _turns(fields: _Fields, key: str, messages: Any) -> list[Turn]:
    """The turns of a list of {"role", "content"} or {"from", "value"} objects."""
    turns = []
    for number, message in enumerate(_typed(messages, list, key, fields.where), 1):
        where = f"{fields.where}, {key} {number}"
        if not isinstance(message, Mapping):
            detail = f"; its item {number} is {_kind(message)}"
            raise RecordError(fields.where, f"field '{key}' must be a list of messages", detail)
        given = {name: value for name, value in message.items() if value or name not in MESSAGE["calls"]}
        inner = _Fields(given, where, MESSAGE)
        turns.append(_turn(inner))
        fields.left |= dict.fromkeys(f"{key}.{name}" for name in inner.left)
    return turns


def _turn(fields: _Fields) -> Turn:
    where = fields.where
    role_key, name = fields.take("role", required=True)
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        detail = f" {str(name)[:40]!r}; expected one of {', '.join(ROLES)}"
        raise RecordError(where, f"unknown {role_key}", detail)
    key, value = fields.take("calls")
    if key and role != "assistant":
        detail = f"; this one is of {role}"
        raise RecordError(where, f"only an assistant turn may have '{key}'", detail)
    calls = _calls(value, key, where) if key else ()
    key, value = fields.take("content", required=not calls)  # OpenAI's calls come without content
    if name in CALL_ROLES and not calls:
        calls, key = _calls(value, f"{key} ({name})", where), ""
    content = _joined(value, key, where) if key else ""
    if role == "assistant" and not calls:
        _answer(content, key, where)
    return Turn(
        role,
        content,
        _is_trained(fields),
        calls,
        fields.text("tool_call_id") or None,
        fields.text("reasoning") if role == "assistant" else "",
        fields.text("name") or None,
    )


def _is_trained(fields: _Fields) -> bool:
    """What "train" or "loss" (true or false) or "weight" (1 or 0) of a message say; True without them."""
    for key, value in fields.left.items():
        if key in MESSAGE["trained"] and (
            isinstance(value, bool) == (key == "weight") or value not in (0, 1)
        ):
            expected = "0 or 1" if key == "weight" else "true or false"
            raise RecordError(fields.where, f"field '{key}' must be {expected}", f"; got {_kind(value)}")
    return fields.take("trained")[1] in (None, True)


def _calls(value: Any, key: str, where: str) -> tuple[Mapping[str, Any], ...]:
    """A call, or a list of them, as {"name", "arguments"}; OpenAI nests them, with the arguments as text."""
    value, calls = _json(value, key, where) or [], []
    for number, call in enumerate(value if isinstance(value, list) else [value], 1):
        at = f"{where}, {key} {number}"
        call = _typed(call, Mapping, "call", at)
        fields = _Fields(_typed(call.get("function", call), Mapping, "function", at), at, _CALL)
        name, (_, arguments) = fields.text("name", required=True), fields.take("arguments")
        arguments = _typed(_json(arguments, "arguments", at) or {}, Mapping, "arguments", at)
        check_text(json.dumps(arguments, ensure_ascii=False), "arguments", at)
        own = _Fields(call, at, _CALL).text("id")
        calls.append({"name": name, "arguments": dict(arguments), **({"id": own} if own else {})})
    if not calls:
        raise RecordError(where, f"field '{key}' has no call")
    return tuple(calls)


def _tools(fields: _Fields) -> tuple[Mapping[str, Any], ...]:
    """The tools: a list of objects, or a text with one as JSON; "functions" are the older form of them."""
    key, tools = fields.take("tools")
    tools = _typed(_without_nulls(_json(tools, key, fields.where) or []), list, key, fields.where)
    tools = [_typed(tool, Mapping, key, f"{fields.where}, {key} {n}") for n, tool in enumerate(tools, 1)]
    check_text(json.dumps(tools, ensure_ascii=False), key, fields.where)
    return tuple({"type": "function", "function": tool} if key == "functions" else tool for tool in tools)


def call_text(turn: Turn) -> str:
    """Return content and tool calls of a turn as one text, the calls as Qwen's templates write them.

    Examples:
        >>> call_text(Turn("assistant", "", tool_calls=({"name": "add", "arguments": {"a": 1}},)))
        '<tool_call>\\n{"name": "add", "arguments": {"a": 1}}\\n</tool_call>'
    """
    shown = [{"name": call["name"], "arguments": call["arguments"]} for call in turn.tool_calls]
    calls = [f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in shown]
    return "\n".join([turn.content] * bool(turn.content) + calls)


def _check_order(turns: Sequence[Turn], where: str, answered: bool) -> None:
    roles = [turn.role for turn in turns]
    listed = ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "") or "none"
    before = roles[: roles.index("assistant")] if "assistant" in roles else roles
    if answered and "assistant" not in roles:
        raise RecordError(where, "there is no assistant turn, so nothing to train on", f"; turns: {listed}")
    if "user" not in before:
        reason = "turns out of order: the first assistant turn has no user turn before it"
        detail = f"; expected system (if any), user, assistant, ...; turns: {listed}"
        raise RecordError(where, reason, detail)
    if "tool" in before:
        detail = f"; expected it after the assistant turn that calls the tool; turns: {listed}"
        raise RecordError(where, "turns out of order: a tool turn is before any assistant turn", detail)


def check_text(value: Any, field: str, where: str) -> str:
    """Return `value`, checked to be text that a tokenizer can read.

    Raises:
        RecordError: It is not text, or has an unpaired surrogate.
    """
    try:
        _typed(value, str, field, where).encode()
    except UnicodeEncodeError as error:
        detail = f" at character {error.start + 1}, which is not text"
        raise RecordError(where, f"field '{field}' has an unpaired surrogate", detail) from error
    return value


def _answer(value: Any, field: str, where: str) -> Turn:
    if not check_text(value, field, where).strip():
        raise RecordError(where, f"field '{field}' is empty", "; a response needs text")
    return Turn("assistant", value)


def _joined(value: Any, field: str, where: str) -> str:
    """Text, or the joined text of a list of {"type": "text", "text": ...} parts."""
    if not isinstance(value, list):
        return check_text(value, field, where)
    for part in value:
        if not isinstance(part, Mapping) or part.get("type", "text") != "text":
            raise RecordError(where, f"field '{field}' has a part that is not text")
    return "".join(check_text(part.get("text"), f"{field}.text", where) for part in value)


def _json(value: Any, field: str, where: str) -> Any:
    """What a text says, None if it is blank; what is not a text is returned."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(check_text(value, field, where)) if value.strip() else None
    except (json.JSONDecodeError, RecursionError) as error:
        raise RecordError(where, f"field '{field}' is not valid JSON", f" ({error})") from error


def _without_nulls(value: Any) -> Any:
    """`value` without the keys that are null: tables write them for what a record does not have."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list | tuple) else value


def _typed(value: Any, kind: type, field: str, where: str) -> Any:
    if not isinstance(value, kind):
        shown = _kind(value)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and value == value
        quoted = f'; write it in quotes: "{shown}"' if kind is str and is_number else ""
        raise RecordError(where, f"field '{field}' must be {_KINDS[kind]}", f"; got {shown}{quoted}")
    return value


def _kind(value: Any) -> str:
    kinds = (name for kind, name in _KINDS.items() if isinstance(value, kind))
    return next(kinds, json.dumps(value, default=str))


def _names(record: Mapping[str, Any]) -> str:
    names = [" ".join(str(name)[:40].split()) for name in record]
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(names[:12]) + more or "none"

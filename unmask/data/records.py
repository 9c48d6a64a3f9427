"""Records of the usual instruction formats -> Conversation.

`READ` and `MESSAGE` list every key that is read; docs/data.md shows them. A field that is null is not there, and
one that is not read is named in `Conversation.unused`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from unmask.errors import UnmaskError

_SYSTEM = {"system": ("system", "system_prompt", "system_message")}
_TOOLS = {"tools": ("tools", "functions")}
_REASONING = {"reasoning": ("reasoning_content", "reasoning", "thinking")}

# Format -> what is read of a record -> the keys it is read from. Two keys of one list must not contradict one
# another, but those of "input" are all read.
READ: dict[str, dict[str, tuple[str, ...]]] = {
    "messages": {"turns": ("messages",), **_SYSTEM, **_TOOLS},
    "sharegpt": {"turns": ("conversations",), **_SYSTEM, **_TOOLS},
    "prompt_completion": {"prompt": ("prompt",), "completion": ("completion",), **_SYSTEM, **_TOOLS},
    "alpaca": {
        "instruction": ("instruction", "question", "query"),
        "response": ("output", "response"),
        "input": ("input", "context"),
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
    needed = ("turns", "prompt", "instruction", *(("completion", "response") if answered else ()))
    for name, keys in tables:
        if all(_first(record, keys[part]) for part in needed if part in keys):
            return name
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
    fields = _Fields(_without_nulls(record), where, keys, f"{format} format needs ")
    if "turns" in keys:
        turns = _turns(fields, "turns")
    elif "prompt" in keys:
        turns = _prompt_completion(fields, answered)
    else:
        turns = _instruction(fields, answered, custom=format == "custom")
    if system := fields.text("system"):
        if not turns or turns[0].role != "system":
            turns = [Turn("system", system), *turns]
        elif turns[0].content != system:
            key = _first(fields.record, keys["system"])
            raise RecordError(where, f"field '{key}' contradicts the system turn", "; remove one of them")
    tools = _tools(fields)
    _check_order(turns, where, answered)
    return Conversation(tuple(turns), where, tools, fields.unused())


class _Fields:
    """The fields of a record, or of a message of one; remembers which were read."""

    def __init__(
        self, record: Mapping[str, Any], where: str, keys: Mapping[str, tuple[str, ...]], needs: str
    ) -> None:
        self.record, self.where, self.keys, self.needs = record, where, keys, needs
        self.used: set[str] = set()
        self.inner: dict[str, None] = {}  # unused fields of messages

    def one(self, part: str, needed: str = "") -> tuple[str, Any]:
        """The key and the value of a part; ("", None) if it is not there and not `needed`."""
        names = self.keys.get(part, ())
        there = [name for name in names if name in self.record]
        if len({json.dumps(self.record[name]) for name in there}) > 1:
            raise RecordError(self.where, f"fields '{there[0]}' and '{there[1]}' contradict one another")
        self.used.update(there)
        if needed and not there:
            detail = f" ({self.needs}{needed}); fields here: {_names(self.record)}"
            raise RecordError(self.where, f"no field '{names[0]}', or it is null", detail)
        return (there[0], self.record[there[0]]) if there else ("", None)

    def text(self, part: str, needed: str = "") -> str:
        """The text of a part; "" if it is not there and not `needed`."""
        key, value = self.one(part, needed)
        return check_text(value, key, self.where) if key else ""

    def unused(self) -> tuple[str, ...]:
        return (*(str(name) for name in self.record if name not in self.used), *self.inner)


def _instruction(fields: _Fields, answered: bool, custom: bool) -> list[Turn]:
    where, keys = fields.where, fields.keys
    needs = f"{keys['instruction'][0]}, {keys['response'][0]}{': see data.sft.custom_format' * custom}"
    turns: list[Turn] = []
    for number, pair in enumerate(_typed(fields.one("history")[1] or [], list, "history", where), 1):
        place = f"{where}, history {number}"
        if len(_typed(pair, list, "history", place)) != 2:
            raise RecordError(place, "field 'history' must be a list of [user, assistant] pairs")
        turns += [Turn("user", check_text(pair[0], "history", place)), _answer(pair[1], "history", place)]
    texts = [fields.text("instruction", needs)]
    for key in keys.get("input", ()):
        own = _Fields(fields.record, where, {"input": (key,)}, fields.needs)
        texts.append(own.text("input", needs if custom else ""))
        fields.used |= own.used
    texts = [text for number, text in enumerate(texts) if text.strip() or (number == 0 and text)]
    turns.append(Turn("user", "\n".join(texts)))
    key, response = fields.one("response", needs if answered else "")
    if key and (answered or response):
        turns.append(replace(_answer(response, key, where), reasoning=fields.text("reasoning")))
    return turns


def _prompt_completion(fields: _Fields, answered: bool) -> list[Turn]:
    turns: list[Turn] = []
    for part in ("prompt", "completion"):
        key, value = fields.one(part, "prompt, completion" if answered or part == "prompt" else "")
        if isinstance(value, str) and part == "prompt":
            turns.append(Turn("user", check_text(value, key, fields.where)))
        elif isinstance(value, str):
            turns += [_answer(value, key, fields.where)] if answered or value else []
        elif key:
            turns += _turns(fields, part)
        if part == "prompt":  # its assistant turns are context: only the completion is trained on
            turns = [replace(turn, train=turn.role == "user" and isinstance(value, str)) for turn in turns]
    return turns


def _turns(fields: _Fields, part: str) -> list[Turn]:
    """The turns of a list of {"role", "content"} or {"from", "value"} objects."""
    key, messages = fields.one(part, fields.keys[part][0])
    keys = MESSAGE
    if key == "conversations":
        keys = {**MESSAGE, "role": MESSAGE["role"][::-1], "content": MESSAGE["content"][::-1]}
    turns = []
    for number, message in enumerate(_typed(messages, list, key, fields.where), 1):
        where = f"{fields.where}, {key} {number}"
        message = _typed(message, Mapping, "message", where)
        inner = _Fields(message, where, keys, "a message needs ")
        turns.append(_turn(inner, f"{keys['role'][0]}, {keys['content'][0]}"))
        fields.inner |= dict.fromkeys(f"{key}.{name}" for name in inner.unused())
    return turns


def _turn(fields: _Fields, needs: str) -> Turn:
    where = fields.where
    role_key, name = fields.one("role", needs)
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        detail = f" {str(name)[:40]!r}; expected one of {', '.join(ROLES)}"
        raise RecordError(where, f"unknown {role_key}", detail)
    calls = _calls(fields, role)
    key, value = fields.one("content", "" if calls else needs)  # OpenAI's calls come without content
    if name in CALL_ROLES and not calls:
        content, calls = "", _call_list(_json(value, key, where, f" of a {name} turn"), key, where)
    else:
        content = _joined(value, key, where) if key else ""
    if role == "assistant" and not calls:
        content = _answer(content, key, where).content
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
    said = {}
    for key in fields.keys["trained"]:
        if (value := fields.record.get(key)) is None:
            continue
        fields.used.add(key)
        if isinstance(value, bool) == (key == "weight") or value not in (0, 1):
            expected = "0 or 1" if key == "weight" else "true or false"
            raise RecordError(fields.where, f"field '{key}' must be {expected}", f"; got {_kind(value)}")
        said[key] = bool(value)
    if len(set(said.values())) > 1:
        reason = "fields '{}' and '{}' contradict one another".format(*said)
        raise RecordError(fields.where, reason, "; remove one")
    return all(said.values())


def _calls(fields: _Fields, role: str) -> tuple[Mapping[str, Any], ...]:
    """The calls in "tool_calls", or the one in "function_call" (OpenAI until 2023)."""
    there = [key for key in fields.keys["calls"] if fields.record.get(key)]
    fields.used.update(fields.keys["calls"])
    if not there:
        return ()
    if len(there) > 1:
        reason = "fields '{}' and '{}' contradict one another".format(*there)
        raise RecordError(fields.where, reason, "; remove one")
    [key] = there
    if role != "assistant":
        detail = f"; this one is of {role}"
        raise RecordError(fields.where, f"only an assistant turn may have '{key}'", detail)
    value = fields.record[key]
    if key == "tool_calls":
        value = _json(value, key, fields.where) if isinstance(value, str) else value
        value = _typed(value, list, key, fields.where)
    return _call_list(value, key, fields.where)


def _call_list(calls: Any, key: str, where: str) -> tuple[Mapping[str, Any], ...]:
    """A call, or a list of them, as {"name", "arguments"}; OpenAI nests them, with the arguments as text."""
    if not isinstance(calls, list):
        return (_call(calls, f"{where}, {key}"),)
    if not calls:
        raise RecordError(where, f"field '{key}' has no call")
    return tuple(_call(call, f"{where}, {key} {number}") for number, call in enumerate(calls, 1))


def _call(call: Any, where: str) -> Mapping[str, Any]:
    call = _typed(call, Mapping, "call", where)
    inner = _typed(call.get("function", call), Mapping, "function", where)
    keys = {name: (name,) for name in ("name", "arguments", "id")}
    fields = _Fields(inner, where, keys, "a tool call needs ")
    name, (_, arguments) = fields.text("name", "name, arguments"), fields.one("arguments")
    if isinstance(arguments, str):
        arguments = _json(arguments, "arguments", where) if arguments.strip() else {}
    arguments = _typed({} if arguments is None else arguments, Mapping, "arguments", where)
    check_text(json.dumps(arguments, ensure_ascii=False), "arguments", where)
    own = _Fields(call, where, keys, "").text("id")
    return {"name": name, "arguments": dict(arguments), **({"id": own} if own else {})}


def _tools(fields: _Fields) -> tuple[Mapping[str, Any], ...]:
    """The tools: a list of objects, or a text with one as JSON; "functions" are the older form of them."""
    key, tools = fields.one("tools")
    if isinstance(tools, str):
        tools = _without_nulls(_json(tools, key, fields.where)) if tools.strip() else []
    tools = _typed(tools or [], list, key, fields.where)
    tools = [_typed(tool, Mapping, key, f"{fields.where}, {key} {n}") for n, tool in enumerate(tools, 1)]
    check_text(json.dumps(tools, ensure_ascii=False), key, fields.where)
    return tuple({"type": "function", "function": tool} if key == "functions" else tool for tool in tools)


def call_text(turn: Turn) -> str:
    """Return content and tool calls of a turn as one text, the calls as Qwen's templates write them.

    Example:
        >>> call_text(Turn("assistant", "", tool_calls=({"name": "add", "arguments": {"a": 1}},)))
        '<tool_call>\\n{"name": "add", "arguments": {"a": 1}}\\n</tool_call>'
    """
    shown = [{"name": call["name"], "arguments": call["arguments"]} for call in turn.tool_calls]
    calls = [f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in shown]
    return "\n".join([turn.content] * bool(turn.content) + calls)


def _check_order(turns: Sequence[Turn], where: str, answered: bool) -> None:
    roles = [turn.role for turn in turns]
    listed = ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "")
    if answered and "assistant" not in roles:
        detail = f"; turns: {listed or 'none'}"
        raise RecordError(where, "there is no assistant turn, so nothing to train on", detail)
    before = roles[: roles.index("assistant")] if "assistant" in roles else roles
    if "user" not in before:
        raise RecordError(
            where,
            "turns out of order: the first assistant turn has no user turn before it",
            f"; expected system (if any), user, assistant, ...; turns: {listed or 'none'}",
        )
    if "tool" in before:
        raise RecordError(
            where,
            "turns out of order: a tool turn is before any assistant turn",
            f"; expected it after the assistant turn that calls the tool; turns: {listed}",
        )


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


def _json(value: Any, field: str, where: str, of: str = "") -> Any:
    try:
        return json.loads(check_text(value, field, where))
    except (ValueError, RecursionError) as error:
        raise RecordError(where, f"field '{field}'{of} is not valid JSON", f" ({error})") from error


def _without_nulls(value: Any) -> Any:
    """`value` without the keys that are null: tables write them for what a record does not have."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list | tuple) else value


def _first(record: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if record.get(name) is not None), None)


def _typed(value: Any, kind: type, field: str, where: str) -> Any:
    if not isinstance(value, kind):
        expected = "text" if kind is str else "a list" if kind is list else "an object"
        raise RecordError(where, f"field '{field}' must be {expected}", f"; got {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):
        return f"the number {value}"
    return "text" if isinstance(value, str) else "an object" if isinstance(value, Mapping) else "a list"


def _names(record: Mapping[str, Any]) -> str:
    names = [" ".join(str(name)[:40].split()) for name in record]
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(names[:12]) + more or "none"

"""A conversation -> the text that its chat template renders, cut where training lets each response start.

Templates rarely say where a response begins and ends. Most write the same header before each one (what
`add_generation_prompt` adds) and the end token after it, and nothing else writes either: one rendering
tells it all. For others a second rendering has a private mark in place of each response; what is between
the marks is the template's own writing. Training and generation prompts come from the same cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from unmask.data.records import RecordError, Turn, call_text
from unmask.errors import UnmaskError

REWRITTEN = "the chat template rewrites the response beyond recognition"
NO_REASONING = "the chat template leaves out the reasoning of some turns"
REASONS = "has reasoning, but thinking=off lets every response start after an empty think block"
PRIVATE = "has both strings of special tokens and characters for private use"
OPEN, CLOSE = "\U000ffff0", "\U000ffff1"  # for private use, around the number of what a mark stands for
EMPTY = "<think>\n\n</think>\n\n"
THINK = re.compile(r"\s*<think>((?!</?think>).)*</think>(?P<answer>((?!</?think>).)*)", re.S)

Thinking = Literal["off", "on", "template"]


class DropRecord(Exception):
    """A record that cannot be used; the message is one of a few fixed reasons, for counting.

    `tokens`: its length, or that of its prompt, where this is the reason; 0 otherwise.
    """

    def __init__(self, reason: str, tokens: int = 0):
        super().__init__(reason)
        self.tokens = tokens


@dataclass
class Rendered:
    """A text in pieces, each with whether it is a response to learn, its end token included.

    The blanks before a response belong to it: they are part of its first token. `aliased`: the record's own
    texts have strings of special tokens, so those that the template wrote are replaced by `special_aliases`.
    `lost` says what the template left out.
    """

    pieces: list[tuple[str, bool]]
    aliased: bool = False
    lost: list[str] = field(default_factory=list)


def special_aliases(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the strings of the tokenizer's control tokens, each with a text that replaces it."""
    specials = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    specials |= set(tokenizer.all_special_tokens)
    # Longest first, so that of two tokens with one beginning the longer is found.
    ordered = sorted(specials, key=lambda text: (-len(text), text))
    return {text: f"{OPEN}{number}{CLOSE}" for number, text in enumerate(ordered)}


def special_strings(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return what finds strings of the tokenizer's control tokens in a text."""
    return re.compile("|".join(map(re.escape, special_aliases(tokenizer))) or "(?!)")


def separator_template(separator: str) -> str:
    r"""Return a Jinja chat template for the plain layout without role markers.

    A system turn is its text and a blank line; a user turn its text and `separator`; an assistant
    turn its text and the end token, then a blank line if another turn follows. A turn that another
    user or tool turn follows ends in a blank line, so that `separator` always announces a response.
    """
    quoted = json.dumps(separator, ensure_ascii=False)
    return (
        "{%- for message in messages %}{{- message.content }}"
        "{%- if message.role == 'assistant' %}"
        "{{- eos_token }}{%- if not loop.last %}{{- '\\n\\n' }}{%- endif %}"
        "{%- elif message.role == 'system' or (not loop.last and loop.nextitem.role != 'assistant') %}"
        "{{- '\\n\\n' }}{%- else %}{{- " + quoted + " }}{%- endif %}{%- endfor %}"
    )


class ChatLayout:
    """Renders conversations with `chat_template` and finds the responses.

    `thinking` says where a response starts, in training and for generation: "template" where the template's
    own generation prompt ends, "off" after an empty think block, "on" after the opening of one. Where the
    template does not write that before a response, it is written here. It has no effect on a template that
    knows no think blocks.

    Attributes:
        end_token: The special token that the template writes after a response.
        shows_tools: Whether the template has a place for a conversation's list of tools.

    Raises:
        UnmaskError: The template writes no end token after a response, or not the response itself, or it
            has no think block to open.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat_template: str, thinking: Thinking = "template"
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self._aliases = special_aliases(tokenizer)
        self._special = special_strings(tokenizer)
        self._writes_calls = "tool_calls" in chat_template
        self._writes_ids = re.search(r"\b(id|tool_call_id)\b", chat_template) is not None
        keys = (key for key in ("reasoning_content", "thinking", "reasoning") if f".{key}" in chat_template)
        self._reasoning_key = next(keys, "")
        self.shows_tools = re.search(r"\btools\b", chat_template) is not None
        self._probe(thinking)

    def _probe(self, thinking: Thinking) -> None:
        """Find end token, header and think block from a conversation of two turns."""
        mark = f"{OPEN}r{CLOSE}"
        asked, answer = [{"role": "user", "content": "a"}], {"role": "assistant", "content": mark}
        where = "a conversation of two turns"
        try:
            text = self._render([*asked, answer], where)
        except RecordError:  # some demand a system turn
            asked = [{"role": "system", "content": "s"}, *asked]
            text = self._render([*asked, answer], where)
        before, *after = text.split(mark)
        if len(after) != 1:
            raise UnmaskError(
                "the chat template does not write the assistant's text as it is; "
                "use layout=separator or another template."
            )
        if (end := re.match(rf"\s*({self._special.pattern})", after[0])) is None:
            raise UnmaskError(
                "the chat template writes no end token after a response, so a model could not "
                "learn to stop; use layout=separator or another template."
            )
        self.end_token = end.group(1)
        # The header is what opens a response; an empty or open think block at its end is kept apart.
        opened, opened_off = (self._opened(asked, where, **off) for off in ({}, {"enable_thinking": False}))
        self._header, _, _ = opened.partition("<think>")
        self._opening = opened.removeprefix(self._header)
        self._span = re.compile(f"{re.escape(self._header)}(.*?{re.escape(self.end_token)})", re.S)
        blocks = (opened_off.removeprefix(self._header), before.rpartition(self._header or before)[2])
        empty = next((block for block in blocks if THINK.fullmatch(block.rstrip())), None)
        self._empty = empty or (EMPTY if self._opening else "")
        if thinking == "off":
            self._opening = self._empty
        elif thinking == "on":
            if not self._empty:
                raise UnmaskError("thinking=on: the chat template has no think block to open.")
            self._opening = self._empty.partition("</think>")[0].rstrip() + "\n"

    def render(
        self,
        turns: Sequence[Turn],
        trained: Sequence[bool],
        where: str,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Rendered:
        """Render `turns` and find the responses to learn: `trained[i]` says that turn i is one.

        A response has its reasoning, its tool calls and the end token after it. `tools` are shown if the
        template has a place for them (`shows_tools`).

        Raises:
            DropRecord: The template rewrites a response so that it cannot be found.
            RecordError: The template refuses the conversation.
        """
        messages, shown, hidden = self._messages(turns, tools)
        text = self._render(messages, where, shown)
        spans = self._spans(text, messages, shown, where)
        rendered = Rendered([], bool(hidden), self._lost(messages, text, spans))
        if tools and not self.shows_tools:
            rendered.lost.append("had a list of tools, which the chat template has no place for")
        done = 0
        for index, (start, stop) in spans.items():
            if not trained[index]:
                continue
            written = text[start:stop]
            if not written.startswith(self._opening):
                if written.lstrip().startswith("<think>"):
                    raise DropRecord(REASONS)
                written = self._empty + written
            prompt = text[done:start] + self._opening
            bare = prompt.rstrip(" ")
            response = prompt[len(bare) :] + written[len(self._opening) :]
            rendered.pieces += [(bare, False), (response, True)]
            done = stop
        rendered.pieces.append((text[done:], False))
        if hidden:
            either = re.compile(f"{OPEN}h(\\d+){CLOSE}|{self._special.pattern}")

            def put_back(match: re.Match[str]) -> str:
                return hidden[int(match[1])] if match[1] else self._aliases[match.group()]

            rendered.pieces = [(either.sub(put_back, piece), response) for piece, response in rendered.pieces]
        return rendered

    def render_prompt(
        self,
        turns: Sequence[Turn],
        trained: Sequence[bool],
        where: str = "the prompt",
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Rendered:
        """Render `turns` up to where training lets the next response start."""
        answered = [*turns, Turn("assistant", "x")]
        for flags in (trained, [False] * len(turns)):  # an earlier response may be one that training drops
            try:
                rendered = self.render(answered, [*flags, True], where, tools)
            except DropRecord:
                continue
            del rendered.pieces[-2:]
            return rendered
        raise UnmaskError(f"{where}: the chat template does not write a response after it.")

    def _spans(
        self, text: str, messages: list[dict[str, Any]], shown: Sequence[Any], where: str
    ) -> dict[int, tuple[int, int]]:
        """Where each assistant turn is in `text` with its end token, by the turn's number."""
        header = self._header
        indices = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if header and not any(header in message["content"] for message in messages):
            found = [match.span(1) for match in self._span.finditer(text)]
            if len(found) == text.count(header) == len(indices):
                return dict(zip(indices, found, strict=True))
        marks = {index: f"{OPEN}r{index}{CLOSE}" for index in indices}
        marked = [
            {"role": "assistant", "content": marks[index]} if index in marks else message
            for index, message in enumerate(messages)
        ]
        parts = re.split(f"({OPEN}r\\d+{CLOSE})", self._render(marked, where, shown))
        if parts[1::2] != list(marks.values()) or not text.startswith(parts[0]):
            raise DropRecord(REWRITTEN)
        spans: dict[int, tuple[int, int]] = {}
        start = len(parts[0])
        for index, after in zip(indices, parts[2::2], strict=True):
            # The text as it was given first, as it might have a copy of what follows.
            content = messages[index]["content"]
            given = (len(part) for part in (content, content.strip()) if text.startswith(part + after, start))
            size = next(given, text.find(after, start) - start)
            if size < 0:
                raise DropRecord(REWRITTEN)
            stop = start + size
            end = re.compile(rf"\s*{re.escape(self.end_token)}").match(text, stop)
            spans[index] = (start, end.end() if end else stop)
            start = stop + len(after)
        if start != len(text):
            raise DropRecord(REWRITTEN)
        return spans

    def _lost(
        self, messages: Sequence[Mapping[str, Any]], text: str, spans: Mapping[int, tuple[int, int]]
    ) -> list[str]:
        """What the template leaves out of the messages; a response has to be there whole."""
        lost: dict[str, None] = {}
        whole = _squeezed(text)
        for index, message in enumerate(messages):
            content = _squeezed(message["content"])
            if index not in spans:
                if content not in whole:
                    lost[f"the chat template leaves out {message['role']} turns"] = None
                continue
            written = _squeezed(text[slice(*spans[index])])
            reasoning = _squeezed(message.get(self._reasoning_key, ""))
            names = [_squeezed(call["function"]["name"]) for call in message.get("tool_calls", ())]
            if all(part in written for part in (*names, content, reasoning)):
                continue
            parsed = THINK.fullmatch(message["content"])
            answer = _squeezed(parsed["answer"]) if parsed else content
            if not (parsed or reasoning) or not all(part in written for part in (*names, answer)):
                raise DropRecord(REWRITTEN)
            lost[NO_REASONING] = None
        return list(lost)

    def _messages(
        self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[Any], list[str]]:
        """What the template is given: messages and tools, with strings of special tokens hidden by marks.

        Tool calls are left to a template that knows them, with their ids if it writes ids; for others they
        are written into the content, and so is reasoning. Also returns what was hidden, by number.
        """
        messages: list[dict[str, Any]] = []
        for turn in turns:
            message: dict[str, Any] = {"role": turn.role, "content": turn.content}
            if turn.tool_calls and self._writes_calls:
                message["tool_calls"] = [
                    {name: call[name] for name in ("id",) if name in call and self._writes_ids}
                    | {"type": "function", "function": {name: call[name] for name in ("name", "arguments")}}
                    for call in turn.tool_calls
                ]
            elif turn.tool_calls:
                message["content"] = call_text(turn)
            if turn.reasoning and self._reasoning_key:
                message[self._reasoning_key] = turn.reasoning
            elif turn.reasoning:
                message["content"] = f"<think>\n{turn.reasoning}\n</think>\n\n{message['content']}"
            if turn.tool_call_id is not None and self._writes_ids:
                message["tool_call_id"] = turn.tool_call_id
            if turn.name is not None:
                message["name"] = turn.name
            messages.append(message)
        given, hidden = [messages, list(tools) if self.shows_tools else []], []

        def hide(match: re.Match[str]) -> str:
            hidden.append(match.group())
            return f"{OPEN}h{len(hidden) - 1}{CLOSE}"

        messages, shown = _in_texts(given, lambda text: self._special.sub(hide, text))
        if hidden and re.search(f"{OPEN}h?\\d+{CLOSE}", json.dumps(given, ensure_ascii=False)):
            raise DropRecord(PRIVATE)
        return messages, shown, hidden

    def _render(
        self, messages: list[dict[str, Any]], where: str, tools: Sequence[Any] = (), **variables: Any
    ) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tools=list(tools) or None,
                    tokenize=False,
                    chat_template=self.chat_template,
                    **variables,
                )
            )
        except (TemplateError, TypeError) as error:
            reason = (str(error).strip() or type(error).__name__).rstrip(".")
            raise RecordError(where, "the chat template refuses the turns", f": {reason}") from error

    def _opened(self, messages: list[dict[str, Any]], where: str, **variables: Any) -> str:
        """What the template writes to open a response after `messages`."""
        before = self._render(messages, where, **variables)
        opened = self._render(messages, where, add_generation_prompt=True, **variables)
        return opened.removeprefix(before) if opened.startswith(before) else ""


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _in_texts(value: Any, change: Callable[[str], str]) -> Any:
    """`value`, of JSON's types, with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_in_texts(key, change): _in_texts(inner, change) for key, inner in value.items()}
    return [_in_texts(inner, change) for inner in value] if isinstance(value, list | tuple) else value

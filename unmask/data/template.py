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
OPEN, MIDDLE, CLOSE = "\ue000", "\ue001", "\ue002"  # of private marks
ALIAS = ("\U000ffff0", "\U000ffff1")  # around the number of a special token
EMPTY = "<think>\n\n</think>\n\n"
THINK = re.compile(
    r"\s*<think>(?P<reasoning>(?:(?!</?think>).)*)</think>(?P<answer>(?:(?!</?think>).)*)", re.S
)

Thinking = Literal["off", "on", "template"]


class DropRecord(Exception):
    """A record that cannot be used; the message is one of a few fixed reasons, for counting."""


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
    return {text: f"{ALIAS[0]}{number}{ALIAS[1]}" for number, text in enumerate(ordered)}


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
        if text.count(mark) != 1:
            raise UnmaskError(
                "the chat template does not write the assistant's text as it is; "
                "use layout=separator or another template."
            )
        before, after = text.split(mark)
        if (end := re.match(rf"\s*({self._special.pattern})", after)) is None:
            raise UnmaskError(
                "the chat template writes no end token after a response, so a model could not "
                "learn to stop; use layout=separator or another template."
            )
        self.end_token = end.group(1)
        # The header is what opens a response; an empty or open think block at its end is kept apart.
        header = self._opened(asked, where)
        self._header = header.split("<think>")[0]
        written = before.rpartition(self._header)[2] if self._header and self._header in before else ""
        if "enable_thinking" in self.chat_template:
            off = self._opened(asked, where, enable_thinking=False)
            written = off.removeprefix(self._header) if off.startswith(f"{self._header}<think>") else written
        knows = THINK.fullmatch(written.rstrip()) is not None or "<think>" in header
        self._empty = (written if THINK.fullmatch(written.rstrip()) else EMPTY) if knows else ""
        self._opening = header[len(self._header) :]
        if thinking == "off":
            self._opening = self._empty
        elif thinking == "on":
            if not knows:
                raise UnmaskError("thinking=on: the chat template has no think block to open.")
            self._opening = self._empty[: self._empty.index("</think>")].rstrip() + "\n"

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
        text, bounds = self._located(messages, shown, where)
        rendered = Rendered([], bool(hidden), self._lost(messages, text, bounds))
        if tools and not self.shows_tools:
            rendered.lost.append("had a list of tools, which the chat template has no place for")
        done = 0
        for place, (start, stop) in bounds.items():
            if not trained[place]:
                continue
            written = text[start:stop]
            if not written.startswith(self._opening):
                if written.lstrip().startswith("<think>"):
                    raise DropRecord(REASONS)
                written = self._empty + written
            before = text[done:start] + self._opening
            blanks = before[len(before.rstrip(" ")) :]
            response = blanks + written[len(self._opening) :]
            rendered.pieces += [(before.rstrip(" "), False), (response, True)]
            done = stop
        rendered.pieces.append((text[done:], False))
        if hidden:
            either = re.compile(f"{hidden[0]}(\\d+){CLOSE}|{self._special.pattern}")

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

    def _located(
        self, messages: list[dict[str, Any]], shown: Sequence[Any], where: str
    ) -> tuple[str, dict[int, tuple[int, int]]]:
        """The text, and where each assistant turn is in it with its end token, by the turn's number."""
        text, header = self._render(messages, where, shown), self._header
        places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if header and not any(header in message["content"] for message in messages):
            starts = [match.end() for match in re.finditer(re.escape(header), text)]
            stops = [text.find(self.end_token, start) for start in starts]
            if len(starts) == len(places) and all(
                start <= stop < after
                for start, stop, after in zip(starts, stops, [*starts[1:], len(text)], strict=True)
            ):
                ends = [stop + len(self.end_token) for stop in stops]
                return text, dict(zip(places, zip(starts, ends, strict=True), strict=True))
        mark = _fresh_mark(messages)
        marks = {place: f"{mark}r{place}{CLOSE}" for place in places}
        marked = [
            {"role": "assistant", "content": marks[place]} if place in marks else message
            for place, message in enumerate(messages)
        ]
        anchors = _split(self._render(marked, where, shown), list(marks.values()))
        responses = [messages[place]["content"] for place in places]
        found = _search(text, anchors, responses) if anchors else None
        if not found:
            raise DropRecord(REWRITTEN)
        bounds: dict[int, tuple[int, int]] = {}
        done = 0
        for place, (start, stop) in zip(places, found, strict=True):
            if header and (at := text.rfind(header, done, start)) >= 0:
                start = at + len(header)
            end = re.compile(r"\s*" + re.escape(self.end_token)).match(text, stop)
            done = end.end() if end else stop
            bounds[place] = (start, done)
        return text, bounds

    def _lost(
        self, messages: Sequence[Mapping[str, Any]], text: str, bounds: Mapping[int, tuple[int, int]]
    ) -> list[str]:
        """What the template leaves out of the messages; a response has to be there whole."""
        lost: dict[str, None] = {}
        for place, message in enumerate(messages):
            content = _squeezed(message["content"])
            if place not in bounds:
                if message["content"].strip() not in text and content not in _squeezed(text):
                    lost[f"the chat template leaves out {message['role']} turns"] = None
                continue
            written = _squeezed(text[slice(*bounds[place])])
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
        are written into the content, and so is reasoning. Also returns what was hidden, after the beginning
        of every mark.
        """
        messages: list[dict[str, Any]] = []
        for turn in turns:
            message: dict[str, Any] = {"role": turn.role, "content": turn.content}
            if turn.tool_calls and self._writes_calls:
                message["tool_calls"] = [self._call(call) for call in turn.tool_calls]
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
        shown = list(tools) if self.shows_tools else []
        texts = _texts([messages, shown])
        if not any(map(self._special.search, texts)):
            return messages, shown, []
        if any(re.search("\\d+".join(ALIAS), text) for text in texts):
            raise DropRecord(PRIVATE)
        hidden = [f"{_fresh_mark([messages, shown])}s"]

        def hide(match: re.Match[str]) -> str:
            hidden.append(match.group())
            return f"{hidden[0]}{len(hidden) - 1}{CLOSE}"

        messages, shown = _in_texts([messages, shown], lambda text: self._special.sub(hide, text))
        return messages, shown, hidden

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """A tool call as OpenAI writes it."""
        own = {"id": call["id"]} if "id" in call and self._writes_ids else {}
        return {**own, "type": "function", "function": {name: call[name] for name in ("name", "arguments")}}

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


def _fresh_mark(value: Any) -> str:
    """A string that no text in `value` has, of private-use characters, which templates pass on."""
    texts, number = _texts(value), 0
    while any(f"{OPEN}{number}{MIDDLE}" in text for text in texts):
        number += 1
    return f"{OPEN}{number}{MIDDLE}"


def _texts(value: Any) -> list[str]:
    texts: list[str] = []
    _in_texts(value, lambda text: texts.append(text) or text)
    return texts


def _in_texts(value: Any, change: Callable[[str], str]) -> Any:
    """`value`, of JSON's types, with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_in_texts(key, change): _in_texts(inner, change) for key, inner in value.items()}
    return [_in_texts(inner, change) for inner in value] if isinstance(value, list | tuple) else value


def _split(text: str, marks: list[str]) -> list[str] | None:
    """`text` split at each of `marks`; None unless each is in it once and in this order."""
    anchors = []
    for mark in marks:
        if text.count(mark) != 1:
            return None
        anchor, _, text = text.partition(mark)
        anchors.append(anchor)
    return [*anchors, text]


def _search(text: str, anchors: list[str], responses: list[str]) -> list[tuple[int, int]] | None:
    """Where the responses are between the anchors; the template may strip or rewrite them."""
    if not text.startswith(anchors[0]) or not text.endswith(anchors[-1]):
        return None
    bounds = []
    start, limit = len(anchors[0]), len(text) - len(anchors[-1])
    for response, anchor in zip(responses[:-1], anchors[1:-1], strict=True):
        # The expected text first: the response might have a copy of the anchor.
        expected = (response, response.strip())
        stop = next((start + len(e) for e in expected if text.startswith(e + anchor, start)), None)
        stop = text.find(anchor, start, limit) if stop is None else stop
        if stop < 0:
            return None
        bounds.append((start, stop))
        start = stop + len(anchor)
    return [*bounds, (start, limit)] if start <= limit else None

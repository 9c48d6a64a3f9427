"""A conversation -> the text its chat template renders, and where in it the responses are.

Templates rarely say where a response begins and ends. Most write the same header before each one (what
`add_generation_prompt` adds) and the end token after it, and nothing else writes either: one rendering
tells it all. For others a second rendering has a private mark in place of each response; what is between
the marks is the template's own writing. Training and generation prompts come from the same cut.
"""

from __future__ import annotations

import itertools
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
REASONS = "has reasoning, but thinking=off lets every response start after an empty think block"
OPEN, CLOSE = "\ue000", "\ue002"  # around private marks
THINK = re.compile(
    r"\s*<think>(?P<reasoning>(?:(?!</?think>).)*)</think>(?P<answer>(?:(?!</?think>).)*)", re.S
)

Thinking = Literal["off", "on", "template"]


class Hidden(list[str]):
    """Strings of special tokens that marks stand for, while a template writes the texts that have them."""

    mark = ""
    """What each mark starts with; no text of the conversation has it."""

    def without_marks(self, text: str) -> str:
        """Remove the marks from a text."""
        return re.sub(f"{self.mark}s\\d+{CLOSE}", "", text) if self else text


class DropRecord(Exception):
    """A record that cannot be used; the message is one of a few fixed reasons, for counting."""


@dataclass
class Rendered:
    """A text, and the trained responses in it as (start, stop) in characters, end tokens included.

    `literals`: (start, stop) of strings of special tokens in the record's own texts: plain text. `specials`:
    those that the template wrote, listed where there are literals. `lost` says what the template left out.
    """

    text: str
    responses: list[tuple[int, int]]
    literals: list[tuple[int, int]] = field(default_factory=list)
    specials: list[tuple[int, int]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def special_strings(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return what finds strings of the tokenizer's control tokens in a text."""
    specials = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    specials |= set(tokenizer.all_special_tokens)
    # Longest first, so that of two tokens with one beginning the longer is found.
    choices = "|".join(map(re.escape, sorted(specials, key=len, reverse=True)))
    return re.compile(choices or "(?!)")


def separator_template(separator: str) -> str:
    r"""Return a Jinja chat template for the plain layout without role markers.

    A system turn is its text and a blank line; a user turn its text and `separator`; an assistant
    turn its text and the end token, then a blank line if another turn follows. A turn that another
    user or tool turn follows ends in a blank line, so that `separator` always announces a response.
    """
    quoted = json.dumps(separator, ensure_ascii=False)
    return (
        "{%- for message in messages %}"
        "{{- message.content }}"
        "{%- if message.role == 'assistant' %}"
        "{{- eos_token }}{%- if not loop.last %}{{- '\\n\\n' }}{%- endif %}"
        "{%- elif message.role == 'system' or "
        "(not loop.last and loop.nextitem.role != 'assistant') %}"
        "{{- '\\n\\n' }}"
        "{%- else %}"
        "{{- " + quoted + " }}"
        "{%- endif %}"
        "{%- endfor %}"
    )


class ChatLayout:
    """Renders conversations with `chat_template` and finds the responses.

    `thinking` says where a response starts, in training and for generation: "template" where the template's
    own generation prompt ends, "off" after an empty think block, "on" after the opening of one. Where the
    template does not write that before a response, it is written here. It has no effect on a template that
    knows no think blocks.

    Attributes:
        end_token: The special token that the template writes after a response.

    Raises:
        UnmaskError: The template writes no end token after a response, or not the response itself, or it
            has no think block to open.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat_template: str, thinking: Thinking = "template"
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.thinking = thinking
        self._special = special_strings(tokenizer)
        self._writes_calls = "tool_calls" in chat_template
        self._writes_ids = "tool_call_id" in chat_template or re.search(r"\bid\b", chat_template) is not None
        self._reasoning_key = next(
            (key for key in ("reasoning_content", "thinking", "reasoning") if f".{key}" in chat_template), ""
        )
        self.shows_tools = re.search(r"\btools\b", chat_template) is not None
        self._probe()

    def _probe(self) -> None:
        """Find end token, header and think block from a conversation of two turns."""
        mark = f"{OPEN}r{CLOSE}"
        user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": mark}
        asked, where = [user], "a conversation of two turns"
        try:
            text = self._render([user, answer], where)
        except RecordError:  # some demand a system turn
            asked = [{"role": "system", "content": "s"}, user]
            text = self._render([*asked, answer], where)
        anchors = _split(text, [mark])
        if anchors is None:
            raise UnmaskError(
                "the chat template does not write the assistant's text as it is; "
                "use layout=separator or another template."
            )
        end = re.match(rf"\s*({self._special.pattern})", anchors[1])
        if end is None:
            raise UnmaskError(
                "the chat template writes no end token after a response, so a model could not "
                "learn to stop; use layout=separator or another template."
            )
        self.end_token = end.group(1)
        self._end = re.compile(r"\s*" + re.escape(self.end_token))
        header = self._header(asked, where)
        self._generation = header
        self._base = header[: header.index("<think>")] if "<think>" in header else header
        at = anchors[0].rfind(self._base) + len(self._base)
        written = anchors[0][at:] if self._base and at >= len(self._base) else ""
        if "enable_thinking" in self.chat_template:
            off = self._header(asked, where, enable_thinking=False)
            written = off[len(self._base) :] if off.startswith(self._base + "<think>") else written
        self._empty = written if THINK.fullmatch(written.rstrip()) else ""
        self._opening = header[len(self._base) :]
        if self.thinking == "off":
            self._opening = self._empty
        elif self.thinking == "on":
            if not (found := re.match(r"\s*<think>\n?", self._empty)):
                raise UnmaskError("thinking=on: the chat template has no think block to open.")
            self._opening = found.group()

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
        places = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        text, bounds = self._located(messages, shown, places, where)
        found = Rendered("", [], lost=self._lost(turns, text, dict(zip(places, bounds, strict=True)), hidden))
        done = 0
        for place, (start, stop) in zip(places, bounds, strict=True):
            if not trained[place]:
                continue
            insert = ""
            if not text.startswith(self._opening, start):
                if text[start:stop].lstrip().startswith("<think>"):
                    raise DropRecord(REASONS)
                insert = self._empty
            found.text += text[done:start]
            begun = len(found.text) + len(self._opening)
            found.text += insert + text[start:stop]
            found.responses.append((begun, len(found.text)))
            done = stop
        found.text += text[done:]
        return self._with_literals(found, hidden)

    def render_prompt(
        self,
        turns: Sequence[Turn],
        trained: Sequence[bool],
        where: str = "the prompt",
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Rendered:
        """Render `turns` up to where training lets the next response start.

        `responses` are the earlier ones that are `trained`.
        """
        answered = [*turns, Turn("assistant", "x")]
        try:
            whole = self.render(answered, [*trained, True], where, tools)
        except DropRecord:  # an earlier response that training would drop
            try:
                whole = self.render(answered, [False] * len(turns) + [True], where, tools)
            except DropRecord as error:
                raise UnmaskError(
                    f"{where}: the chat template does not write a response after it."
                ) from error
        start = whole.responses.pop()[0]
        whole.text = whole.text[:start]
        whole.literals = [bounds for bounds in whole.literals if bounds[1] <= start]
        whole.specials = [bounds for bounds in whole.specials if bounds[1] <= start]
        return whole

    def _located(
        self, messages: list[dict[str, Any]], shown: Sequence[Any], places: list[int], where: str
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and where the assistant turns, at `places`, are in it, each with its end token."""
        text = self._render(messages, where, shown)
        header = self._base
        if header and not any(header in message["content"] for message in messages):
            parts = text.split(header)
            bounds: list[tuple[int, int]] = []
            start = len(parts[0]) + len(header)
            for part in parts[1:]:
                stop = part.find(self.end_token)
                bounds.append((start, start + stop + len(self.end_token)))
                if stop < 0:
                    break
                start += len(part) + len(header)
            else:
                if len(bounds) == len(places):
                    return text, bounds
        mark = _fresh_mark(messages)
        marks = {place: f"{mark}r{place}{CLOSE}" for place in places}
        marked = [
            {"role": "assistant", "content": marks[i]} if i in marks else message
            for i, message in enumerate(messages)
        ]
        anchors = _split(self._render(marked, where, shown), list(marks.values()))
        if anchors is None:
            raise DropRecord(REWRITTEN)
        responses = [messages[place]["content"] for place in places]
        bounds = _match(text, anchors, responses) or _search(text, anchors, responses) or []
        if not bounds:
            raise DropRecord(REWRITTEN)
        whole, done = [], 0
        for start, stop in bounds:
            if header and (at := text.rfind(header, done, start)) >= 0:
                start = at + len(header)
            end = self._end.match(text, stop)
            done = end.end() if end else stop
            whole.append((start, done))
        return text, whole

    def _lost(
        self, turns: Sequence[Turn], text: str, bounds: Mapping[int, tuple[int, int]], hidden: Hidden
    ) -> list[str]:
        """What the template leaves out of the turns; a response has to be there whole."""
        lost: dict[str, None] = {}
        everything = ""
        for place, turn in enumerate(turns):
            content = turn.content if not hidden else self._special.sub("", turn.content)
            if place not in bounds:
                if content.strip() not in text:
                    everything = everything or _squeezed(hidden.without_marks(text))
                    if _squeezed(content) not in everything:
                        lost[f"the chat template leaves out {turn.role} turns"] = None
                continue
            start, stop = bounds[place]
            written = hidden.without_marks(text[start:stop])
            names = [
                self._special.sub("", call["name"]) if hidden else call["name"] for call in turn.tool_calls
            ]
            if not all(name in written for name in names):
                raise DropRecord(REWRITTEN)
            written = _squeezed(written)
            if _squeezed(content) in written and _squeezed(turn.reasoning) in written:
                continue
            parsed = THINK.fullmatch(content)
            answer = parsed["answer"] if parsed else content
            if _squeezed(answer) not in written or not (parsed or turn.reasoning):
                raise DropRecord(REWRITTEN)
            lost["the chat template leaves out the reasoning of some turns"] = None
        return list(lost)

    def _messages(
        self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[Any], Hidden]:
        """What the template is given, messages and tools, with special-token strings hidden by marks.

        Tool calls are left to a template that knows them, with their ids if it writes ids; for others they
        are written into the content, and so is reasoning. Also returns what was hidden.
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
        plain = not shown and not any(turn.tool_calls or turn.reasoning or turn.name for turn in turns)
        texts = [turn.content for turn in turns] if plain else _texts([messages, shown])
        if not any(map(self._special.search, texts)):
            return messages, shown, Hidden()
        hidden = Hidden()
        hidden.mark = mark = _fresh_mark([messages, shown])

        def hide(match: re.Match[str]) -> str:
            hidden.append(match.group())
            return f"{mark}s{len(hidden) - 1}{CLOSE}"

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
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=list(tools) or None,
                tokenize=False,
                chat_template=self.chat_template,
                **variables,
            )
        except (TemplateError, TypeError) as error:
            reason = str(error).strip() or type(error).__name__
            raise RecordError(
                where, "the chat template refuses the turns", f": {reason.rstrip('.')}"
            ) from error
        assert isinstance(text, str)
        return text

    def _header(self, messages: list[dict[str, Any]], where: str, **variables: Any) -> str:
        """What the template writes to open a response after `messages`."""
        before = self._render(messages, where, **variables)
        opened = self._render(messages, where, add_generation_prompt=True, **variables)
        return opened.removeprefix(before) if opened.startswith(before) else ""

    def _with_literals(self, found: Rendered, hidden: Hidden) -> Rendered:
        """Put back what was hidden, and list where it and the template's own special tokens are."""
        if not hidden:
            return found
        either = re.compile(f"{hidden.mark}s(\\d+){CLOSE}|{self._special.pattern}")
        cuts = sorted({0, len(found.text), *(at for bounds in found.responses for at in bounds)})
        moved: dict[int, int] = {0: 0}
        text = ""
        for start, stop in itertools.pairwise(cuts):
            at = start
            for match in either.finditer(found.text, start, stop):
                text += found.text[at : match.start()]
                kind = found.specials if match[1] is None else found.literals
                shown = match.group() if match[1] is None else hidden[int(match[1])]
                kind.append((len(text), len(text) + len(shown)))
                text, at = text + shown, match.end()
            text += found.text[at:stop]
            moved[stop] = len(text)
        found.responses = [(moved[start], moved[stop]) for start, stop in found.responses]
        found.text = text
        return found


def without_empty_thinking(text: str) -> str:
    """Return a response without the empty think block that it starts with, if it does."""
    return re.sub(r"^\s*<think>\s*</think>\s*", "", text)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _fresh_mark(value: Any) -> str:
    """A string that no text in `value` has, of private-use characters, which templates pass on."""
    texts = _texts(value)
    number = 0
    while any(f"{OPEN}{number}\ue001" in text for text in texts):
        number += 1
    return f"{OPEN}{number}\ue001"


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


def _match(text: str, anchors: list[str], responses: list[str]) -> list[tuple[int, int]] | None:
    """Where the responses are if `text` is just anchors and responses in turn, else None."""
    bounds = []
    at = 0
    for anchor, response in zip(anchors, responses, strict=False):
        start = at + len(anchor)
        at = start + len(response)
        bounds.append((start, at))
    whole = "".join(part for pair in zip(anchors, [*responses, ""], strict=True) for part in pair)
    return bounds if whole == text else None


def _search(text: str, anchors: list[str], responses: list[str]) -> list[tuple[int, int]] | None:
    """Where the responses are if the template strips or rewrites them: between the anchors."""
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

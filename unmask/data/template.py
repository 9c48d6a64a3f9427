"""A conversation -> the text its chat template renders, cut into source and response spans.

Templates rarely say where a response begins and ends, and some move or strip what they are given.
So each conversation is rendered twice: once as it is, and once with a private mark in place of each
response. What stands between the marks is the template's own writing, and the real rendering is cut
there. Training and generation prompts come from the same cut, so they cannot differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from unmask.data.conversation import RecordError, Turn, call_text
from unmask.data.skeleton import Skeletons
from unmask.errors import UnmaskError

FIRST_MARK = "\ue0000\ue001"  # in nearly all conversations
REWRITTEN = "the chat template rewrites the response beyond recognition"


class DropRecord(Exception):
    """A record that cannot be used; the message is one of a few fixed reasons, for counting."""


class Span(NamedTuple):
    """A piece of text. `literal` True: a special-token string to read as plain text."""

    text: str
    is_response: bool
    literal: bool = False


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
    """Cuts what `chat_template` renders into spans.

    Attributes:
        end_token: The special token that the template writes after a response.

    Raises:
        UnmaskError: The template writes no end token after a response, or not the response itself.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self._special = special_strings(tokenizer)
        self._writes_calls = "tool_calls" in chat_template
        self._writes_ids = "tool_call_id" in chat_template or re.search(r"\bid\b", chat_template) is not None
        self.shows_tools = re.search(r"\btools\b", chat_template) is not None
        self._skeletons = Skeletons(chat_template, dict(tokenizer.special_tokens_map))
        self.end_token = self._find_end_token()
        self._end = re.compile(r"\s*" + re.escape(self.end_token))

    def spans(
        self,
        turns: Sequence[Turn],
        trained: Sequence[bool],
        where: str,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[Span]:
        """Render `turns` and cut the text; `trained[i]` says that turn i is a response to learn.

        A response takes the tool calls and the end token after it along. The texts joined are the
        rendering. `tools` are shown if the template has a place for them (`shows_tools`).

        Raises:
            DropRecord: The template rewrites a response so that it cannot be found.
            RecordError: The template refuses the conversation.
        """
        messages, shown, mark, hidden = self._messages(turns, tools)
        places = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        text, bounds = self._located(messages, shown, mark, places, where)
        return self._show_specials(self._pieces(text, places, bounds, trained), mark, hidden)

    def _pieces(
        self, text: str, places: list[int], bounds: list[tuple[int, int]], trained: Sequence[bool]
    ) -> list[Span]:
        """`text` cut where the trained of the assistant turns at `places` stand, each with its end token."""
        pieces: list[Span] = []
        done = 0
        for place, (start, stop) in zip(places, bounds, strict=True):
            if not trained[place]:
                continue
            if end := self._end.match(text, stop):
                stop = end.end()
            pieces += [Span(text[done:start], False), Span(text[start:stop], True)]
            done = stop
        return [*pieces, Span(text[done:], False)]

    def _located(
        self,
        messages: list[dict[str, Any]],
        shown: Sequence[Any],
        mark: str,
        places: list[int],
        where: str,
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text the template renders, and where the assistant turns, at `places`, stand in it."""
        marks = {place: f"{mark}r{place}\ue002" for place in places}
        marked = [
            {"role": "assistant", "content": marks[i]} if i in marks else message
            for i, message in enumerate(messages)
        ]
        # The quick way, for what has nothing but text; the mark is then the same for all.
        plain = not shown and mark == FIRST_MARK and all(len(message) == 2 for message in messages)
        roles = [message["role"] for message in messages]
        contents = [message["content"] for message in messages]
        if plain and (located := self._skeletons.fill(roles, contents)):
            return located
        text = self._render(messages, where, shown)
        anchors = _split(self._render(marked, where, shown), list(marks.values()))
        if anchors is None:
            raise DropRecord(REWRITTEN)
        responses = [contents[place] for place in places]
        bounds = _match(text, anchors, responses)
        if bounds is not None and plain:
            self._skeletons.learn(roles, contents, [m["content"] for m in marked], (text, bounds))
        if bounds is None:
            headers = [self._header(messages[:place], where, shown) for place in places]
            bounds = _search(text, anchors, responses, headers)
        if bounds is None:
            raise DropRecord(REWRITTEN)
        return text, bounds

    def prompt_spans(
        self,
        turns: Sequence[Turn],
        where: str = "the prompt",
        tools: Sequence[Mapping[str, Any]] = (),
        trained: Sequence[bool] = (),
    ) -> list[Span]:
        """Render `turns` up to where the next response would begin.

        Earlier responses that are `trained` (by default none) are cut out as in `spans`.
        """
        messages, shown, mark, hidden = self._messages(turns, tools)
        response = f"{mark}r\ue002"
        answered = [*messages, {"role": "assistant", "content": response}]
        anchors = _split(self._render(answered, where, shown), [response])
        if anchors is None:
            raise UnmaskError(f"{where}: the chat template does not write a response after it.")
        pieces = [Span(anchors[0], False)]
        if any(trained):
            places = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
            answered[-1] = {"role": "assistant", "content": "x"}
            try:
                text, bounds = self._located(answered, shown, mark, [*places, len(turns)], where)
            except DropRecord:
                return self._show_specials(pieces, mark, hidden)  # training drops such a conversation
            if anchors[0].startswith(text[: bounds[-2][1]]):
                pieces = self._pieces(anchors[0], places, bounds[:-1], trained)
        return self._show_specials(pieces, mark, hidden)

    def _messages(
        self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[Any], str, list[str]]:
        """What the template is given, messages and tools, with special-token strings hidden by marks.

        Tool calls are left to a template that knows them, with their ids if it writes ids; for others they
        are written into the content.
        Also returns a mark that occurs nowhere in them, and what was hidden.
        """
        messages: list[dict[str, Any]] = []
        for turn in turns:
            if turn.tool_calls and self._writes_calls:
                calls = [self._call(call) for call in turn.tool_calls]
                messages.append({"role": turn.role, "content": turn.content, "tool_calls": calls})
                continue
            messages.append({"role": turn.role, "content": call_text(turn)})
            if turn.tool_call_id is not None and self._writes_ids:
                messages[-1]["tool_call_id"] = turn.tool_call_id
        given = [messages, list(tools) if self.shows_tools else []]
        if all(len(message) == 2 for message in messages) and not given[1]:
            # Nothing but contents: the usual case, and faster so.
            given = [[message["content"] for message in messages], []]
        mark = _fresh_mark(given)
        hidden: list[str] = []

        def hide(match: re.Match[str]) -> str:
            hidden.append(match.group())
            return f"{mark}s{len(hidden) - 1}\ue002"

        changed, shown = _in_texts(given, lambda text: self._special.sub(hide, text))
        if given[0] is not messages:
            changed = [{**message, "content": text} for message, text in zip(messages, changed, strict=True)]
        return changed, shown, mark, hidden

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """A tool call as OpenAI writes it."""
        own = {"id": call["id"]} if "id" in call and self._writes_ids else {}
        return {**own, "type": "function", "function": {name: call[name] for name in ("name", "arguments")}}

    def _find_end_token(self) -> str:
        response = f"{_fresh_mark(())}r\ue002"
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": response}]
        anchors = _split(self._render(messages, "a conversation of two turns"), [response])
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
        return end.group(1)

    def _render(
        self,
        messages: list[dict[str, Any]],
        where: str,
        tools: Sequence[Any] = (),
        generation: bool = False,
    ) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=list(tools) or None,
                tokenize=False,
                chat_template=self.chat_template,
                add_generation_prompt=generation,
            )
        except (TemplateError, TypeError) as error:
            reason = str(error).strip() or type(error).__name__
            raise RecordError(
                where, "the chat template refuses the turns", f": {reason.rstrip('.')}"
            ) from error
        assert isinstance(text, str)
        return text

    def _header(self, messages: list[dict[str, Any]], where: str, tools: Sequence[Any]) -> str:
        """What the template writes to open a response after `messages`."""
        before = self._render(messages, where, tools)
        opened = self._render(messages, where, tools, generation=True)
        return opened.removeprefix(before) if opened.startswith(before) else ""

    def _show_specials(self, pieces: list[Span], mark: str, hidden: list[str]) -> list[Span]:
        pieces = [piece for piece in pieces if piece.text]
        if not hidden:
            return pieces
        shown = []
        for piece in pieces:
            parts = re.split(f"{mark}s(\\d+)\ue002", piece.text)
            for i, part in enumerate(parts):
                literal = i % 2 == 1
                text = hidden[int(part)] if literal else part
                shown.append(Span(text, piece.is_response, literal))
        return [piece for piece in shown if piece.text]


def _fresh_mark(given: Any) -> str:
    """A string that no text in `given` holds, of private-use characters, which templates pass on."""
    texts: list[str] = []
    _in_texts(given, lambda text: texts.append(text) or text)
    number = 0
    while any(f"\ue000{number}\ue001" in text for text in texts):
        number += 1
    return f"\ue000{number}\ue001"


def _in_texts(value: Any, change: Callable[[str], str]) -> Any:
    """`value`, of JSON's types, with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_in_texts(key, change): _in_texts(inner, change) for key, inner in value.items()}
    return [_in_texts(inner, change) for inner in value] if isinstance(value, list | tuple) else value


def _split(text: str, marks: list[str]) -> list[str] | None:
    """`text` split at each of `marks`; None unless each stands in it once and in this order."""
    anchors = []
    for mark in marks:
        if text.count(mark) != 1:
            return None
        anchor, _, text = text.partition(mark)
        anchors.append(anchor)
    return [*anchors, text]


def _match(text: str, anchors: list[str], responses: list[str]) -> list[tuple[int, int]] | None:
    """Where the responses stand if `text` is just anchors and responses in turn, else None."""
    bounds = []
    at = 0
    for anchor, response in zip(anchors, responses, strict=False):
        start = at + len(anchor)
        at = start + len(response)
        bounds.append((start, at))
    whole = "".join(part for pair in zip(anchors, [*responses, ""], strict=True) for part in pair)
    return bounds if whole == text else None


def _search(
    text: str, anchors: list[str], responses: list[str], headers: list[str]
) -> list[tuple[int, int]] | None:
    """Where the responses stand if the template strips or rewrites them: between the anchors.

    An anchor that is not there as a whole may end in something that the template writes only for
    some responses (Qwen3's empty think block); it then counts up to its last generation header, and
    what follows belongs to the response.
    """
    ways = [[anchor] for anchor in anchors]
    for way, header in zip(ways, headers, strict=False):
        if header and header in way[0]:
            way.append(way[0][: way[0].rindex(header) + len(header)])
    opening = next((way for way in ways[0] if text.startswith(way)), None)
    if opening is None or not text.endswith(anchors[-1]):
        return None
    bounds = []
    start = len(opening)
    limit = len(text) - len(anchors[-1])
    for response, following in zip(responses[:-1], ways[1:-1], strict=True):
        found = _next_anchor(text, start, limit, response, following)
        if found is None:
            return None
        stop, anchor = found
        bounds.append((start, stop))
        start = stop + len(anchor)
    return [*bounds, (start, limit)] if start <= limit else None


def _next_anchor(
    text: str, start: int, limit: int, response: str, following: list[str]
) -> tuple[int, str] | None:
    for anchor in following:
        # The expected text first: the response might hold a copy of the anchor.
        for expected in (response, response.strip()):
            if text.startswith(expected + anchor, start):
                return start + len(expected), anchor
        stop = text.find(anchor, start, limit)
        if stop >= 0:
            return stop, anchor
    return None

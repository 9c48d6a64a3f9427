"""A conversation -> the text its chat template renders, cut into source and response spans.

Templates rarely say where a response begins and ends, and some move or strip what they are given.
So each conversation is rendered twice: once as it is, and once with a private mark in place of each
response. What stands between the marks is the template's own writing, and the real rendering is cut
there. Training and generation prompts come from the same cut, so they cannot differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from unmask.data.conversation import Turn
from unmask.errors import UnmaskError

REWRITTEN = "the chat template rewrites the response beyond recognition"


class DropRecord(Exception):
    """A record that cannot be used; the message is one of a few fixed reasons, for counting."""


class Span(NamedTuple):
    """A piece of text. `literal` True: a special-token string to read as plain text."""

    text: str
    is_response: bool
    literal: bool = False


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
        added = tokenizer.added_tokens_decoder.values()
        specials = {token.content for token in added if token.special}
        specials |= set(tokenizer.all_special_tokens)
        # Longest first, so that of two tokens with one beginning the longer is found.
        choices = "|".join(map(re.escape, sorted(specials, key=len, reverse=True)))
        self._special = re.compile(choices or "(?!)")
        self.end_token = self._find_end_token()
        self._end = re.compile(r"\s*" + re.escape(self.end_token))

    def spans(self, turns: Sequence[Turn], trained: Sequence[bool], where: str) -> list[Span]:
        """Render `turns` and cut the text; `trained[i]` says that turn i is a response to learn.

        A response takes the end token after it along. The texts joined are the rendering.

        Raises:
            DropRecord: The template rewrites a response so that it cannot be found.
            UnmaskError: The template refuses the conversation.
        """
        contents, mark, hidden = self._hide_specials([turn.content for turn in turns])
        messages = _messages(turns, contents)
        places = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        text = self._render(messages, where)
        marks = {place: f"{mark}r{place}\ue002" for place in places}
        marked = [marks.get(i, content) for i, content in enumerate(contents)]
        anchors = _split(self._render(_messages(turns, marked), where), list(marks.values()))
        if anchors is None:
            raise DropRecord(REWRITTEN)
        responses = [contents[place] for place in places]
        bounds = _match(text, anchors, responses)
        if bounds is None:
            headers = [self._header(messages[:place], where) for place in places]
            bounds = _search(text, anchors, responses, headers)
        if bounds is None:
            raise DropRecord(REWRITTEN)

        pieces: list[Span] = []
        done = 0
        for place, (start, stop) in zip(places, bounds, strict=True):
            if not trained[place]:
                continue
            if end := self._end.match(text, stop):
                stop = end.end()
            pieces += [Span(text[done:start], False), Span(text[start:stop], True)]
            done = stop
        pieces.append(Span(text[done:], False))
        return self._show_specials(pieces, mark, hidden)

    def prompt_spans(self, turns: Sequence[Turn], where: str = "the prompt") -> list[Span]:
        """Render `turns` up to where the next response would begin."""
        contents, mark, hidden = self._hide_specials([turn.content for turn in turns])
        response = f"{mark}r\ue002"
        messages = [*_messages(turns, contents), {"role": "assistant", "content": response}]
        anchors = _split(self._render(messages, where), [response])
        if anchors is None:
            raise UnmaskError(f"{where}: the chat template does not write a response after it.")
        return self._show_specials([Span(anchors[0], False)], mark, hidden)

    def _find_end_token(self) -> str:
        response = f"{_fresh_mark([])}r\ue002"
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

    def _render(self, messages: list[dict[str, str]], where: str, generation: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                chat_template=self.chat_template,
                add_generation_prompt=generation,
            )
        except (TemplateError, TypeError) as error:
            reason = str(error).strip() or type(error).__name__
            raise UnmaskError(f"{where}: the chat template refuses the turns: {reason}") from error
        assert isinstance(text, str)
        return text

    def _header(self, messages: list[dict[str, str]], where: str) -> str:
        """What the template writes to open a response after `messages`."""
        before = self._render(messages, where)
        opened = self._render(messages, where, generation=True)
        return opened.removeprefix(before) if opened.startswith(before) else ""

    def _hide_specials(self, contents: list[str]) -> tuple[list[str], str, list[str]]:
        """Replace special-token strings in `contents` by private marks, before rendering.

        Returns the contents, a mark that occurs in none of them, and what was replaced.
        """
        mark = _fresh_mark(contents)
        hidden: list[str] = []

        def hide(match: re.Match[str]) -> str:
            hidden.append(match.group())
            return f"{mark}s{len(hidden) - 1}\ue002"

        return [self._special.sub(hide, content) for content in contents], mark, hidden

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


def _fresh_mark(contents: Sequence[str]) -> str:
    """A string that no content holds, of private-use characters, which templates pass on."""
    number = 0
    while any(f"\ue000{number}\ue001" in content for content in contents):
        number += 1
    return f"\ue000{number}\ue001"


def _messages(turns: Sequence[Turn], contents: Sequence[str]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": content} for turn, content in zip(turns, contents, strict=True)]


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

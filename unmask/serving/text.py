"""The text of an answer while it grows, and the calls in it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from unmask.generation.text import StopStrings

UNFINISHED = "\ufffd"  # what a tokenizer writes for bytes that are not a whole character
CALL = "<tool_call>"
_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.S)


class TextStream:
    """Turns the final tokens of an answer into text that no later token can change.

    Held back: bytes of a character that is not whole, a text that a stop string may begin with, and all from
    one of `markers` on.

    Args:
        ends: ids of end tokens; the text ends before the first.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str],
        ends: Collection[int],
        markers: Sequence[str] = (),
    ):
        self.tokenizer, self.ends, self.markers = tokenizer, ends, list(markers)
        self.stop = StopStrings(tokenizer, stop)
        self.sent = ""

    def text(self, ids: Sequence[int]) -> str:
        """The text of an answer, up to an end token and a stop string."""
        kept = list(takewhile(lambda token: token not in self.ends, ids))
        return self.stop.cut(str(self.tokenizer.decode(kept, skip_special_tokens=True)))

    def push(self, ids: Sequence[int]) -> str:
        """The text that is new and final, given the tokens that are final, from the first on."""
        kept = list(takewhile(lambda token: token not in self.ends, ids))
        whole = str(self.tokenizer.decode(kept, skip_special_tokens=True))
        text = self.stop.cut(whole)
        if text == whole and len(kept) == len(ids):  # more may follow
            text = text.rstrip(UNFINISHED)
            text = _held_back(text, self.stop.strings)
        text = min((text.partition(marker)[0] for marker in self.markers), key=len, default=text)
        return self._send(_held_back(text, self.markers))

    def finish(self, text: str) -> str:
        """The rest of the answer, whose whole text is given."""
        return self._send(text)

    def _send(self, text: str) -> str:
        if not text.startswith(self.sent):
            return ""
        new, self.sent = text[len(self.sent) :], text
        return new


def _held_back(text: str, strings: Sequence[str]) -> str:
    """The text without an ending that one of the strings begins with."""
    longest = max((len(string) - 1 for string in strings), default=0)
    for start in range(max(0, len(text) - longest), len(text)):
        if any(string.startswith(text[start:]) for string in strings):
            return text[:start]
    return text


def split_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """Split an answer into its text and its tool calls, {"name", "arguments"}, as Qwen's templates write them.

    Where one of them is not such a call, all is text.

    Examples:
        >>> split_calls('<tool_call>\\n{"name": "add", "arguments": {"a": 1}}\\n</tool_call>')
        ('', [{'name': 'add', 'arguments': {'a': 1}}])
    """
    calls: list[dict[str, Any]] = []
    for found in _CALL.findall(text):
        try:
            call = json.loads(found)
        except (ValueError, RecursionError):
            return text, []
        if not isinstance(call.get("name"), str) or not isinstance(call.get("arguments", {}), dict):
            return text, []
        calls.append({"name": call["name"], "arguments": call.get("arguments", {})})
    rest = _CALL.sub("", text)
    if CALL in rest:
        return text, []
    return rest, calls

"""What a chat template writes around the contents of a conversation, learnt once for each shape of one.

Jinja takes half the time of encoding a record, and almost always writes the same text around other
contents. So one rendering is watched: its contents are stand-ins that note what the template asks of
them ("does it hold `</think>`?") and where they are written. Another conversation of the same roles for
which every answer is the same takes the same path through the template, so its rendering is the same text
around its own contents. A template that asks what is not understood here is simply rendered each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError, nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

# What these make is a plain text by the time the template looks at it: nothing would be noticed.
CAPTURING = (nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock)
UNSEEN = ("strftime_now", "sameas")  # neither asks a content, and either can change the text
SHAPES = 256  # sequences of roles that are learnt
WAYS = 8  # renderings that are watched for each of them


class Skeleton(NamedTuple):
    """The pieces a template writes, texts and numbers of messages, and the answers this holds for."""

    pieces: tuple[str | int, ...]
    answers: tuple[tuple[int, str, tuple[Any, ...], bool], ...]  # message, method, arguments, answer

    def fits(self, contents: Sequence[str]) -> bool:
        """Whether the template would take the same path for these contents."""
        return all(_ask(contents[i], method, given) == answer for i, method, given, answer in self.answers)


class Skeletons:
    """The skeletons of one chat template, learnt from the renderings it is shown.

    Args:
        chat_template: Jinja, as transformers renders it.
        variables: what it is given beside the messages, such as the special tokens.
    """

    def __init__(self, chat_template: str, variables: dict[str, Any]) -> None:
        self._known: dict[tuple[str, ...], list[Skeleton | None]] = {}
        self._variables = {"tools": None, "documents": None, "add_generation_prompt": False, **variables}
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], finalize=_written
        )
        environment.globals["raise_exception"] = _refuse
        self._template = None
        try:
            captures = any(True for _ in environment.parse(chat_template).find_all(CAPTURING))
            if not captures and not any(word in chat_template for word in UNSEEN):
                self._template = environment.from_string(chat_template)
        except TemplateError:
            pass  # a tag of its own, such as transformers' `generation`

    def fill(self, roles: Sequence[str], contents: Sequence[str]) -> tuple[str, list[tuple[int, int]]] | None:
        """Write the conversation; returns the text and where each assistant turn stands in it.

        None if no skeleton is known for it.
        """
        for skeleton in self._known.get(tuple(roles), ()):
            if skeleton is not None and skeleton.fits(contents):
                return _fill(skeleton, roles, contents)
        return None

    def learn(
        self,
        roles: Sequence[str],
        contents: Sequence[str],
        marks: Sequence[str],
        rendered: tuple[str, list[tuple[int, int]]],
    ) -> None:
        """Keep what the template writes around `contents`, if that can be known for certain.

        Args:
            marks: the contents with a mark in place of each assistant turn's: the template must take the
                same path for them.
            rendered: the text that transformers renders, and where each assistant turn stands in it.
        """
        if self._template is None or (tuple(roles) not in self._known and len(self._known) == SHAPES):
            return
        ways = self._known.setdefault(tuple(roles), [])
        if len(ways) == WAYS:
            return
        skeleton = self._watch(roles, contents)
        responses = [i for i, role in enumerate(roles) if role == "assistant"]
        sound = (
            skeleton is not None
            and [piece for piece in skeleton.pieces if piece in responses] == responses
            and skeleton.fits(marks)
            and _fill(skeleton, roles, contents) == rendered
        )
        ways.append(skeleton if sound else None)

    def _watch(self, roles: Sequence[str], contents: Sequence[str]) -> Skeleton | None:
        assert self._template is not None
        log = _Log()
        messages = [
            {"role": role, "content": _Content(log, content, (number,))}
            for number, (role, content) in enumerate(zip(roles, contents, strict=True))
        ]
        try:
            parts = self._template.render(messages=messages, **self._variables).split(_EDGE)
            # Every second part is the number of a content.
            pieces = tuple(int(part) if i % 2 else part for i, part in enumerate(parts))
        except Exception:  # whatever a template makes of a stand-in; the real rendering reports its own
            return None
        return None if log.lost else Skeleton(pieces, tuple(dict.fromkeys(log.answers)))


_EDGE = "\ue003"


class _Log:
    """What a template asked of the contents; `lost` if it did what cannot be followed."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, str, tuple[Any, ...], bool]] = []
        self.lost = False


class _Lost(Exception):
    """The template looked at a content in a way that is not followed."""


class _Content:
    """Stands for a content, or for several and texts joined, in a rendering that is watched.

    It passes for a text where a type is asked for, but is none, so that whatever reads it as one fails.
    """

    def __init__(self, log: _Log, text: str, pieces: tuple[str | int, ...]) -> None:
        self._log, self._text, self._pieces = log, text, pieces

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]
        return str

    def _answer(self, method: str, *given: Any) -> bool:
        plain = all(type(value) is str for value in given)
        if len(self._pieces) != 1 or not isinstance(self._pieces[0], int) or not plain:
            self._lose()
        answer = _ask(self._text, method, given)
        self._log.answers.append((self._pieces[0], method, given, answer))  # pyright: ignore[reportArgumentType]
        return answer

    def _lose(self, *_: Any, **__: Any) -> Any:
        self._log.lost = True  # the template may catch the exception
        raise _Lost

    def _stripped(self, method: str, *given: Any) -> _Content:
        if not self._answer(method, *(value for value in given if value is not None)):
            self._lose()
        return self

    def _joined(self, one: Any, other: Any) -> _Content:
        text, pieces = "", ()
        for value in (one, other):
            if type(value) is str and _EDGE not in value:
                text, pieces = text + value, (*pieces, value)
            elif type(value) is _Content:
                text, pieces = text + value._text, (*pieces, *value._pieces)
            else:
                self._lose()
        return _Content(self._log, text, pieces)

    def __add__(self, other: Any) -> _Content:
        return self._joined(self, other)

    def __radd__(self, other: Any) -> _Content:
        return self._joined(other, self)

    def __contains__(self, other: Any) -> bool:
        return self._answer("__contains__", other)

    def __eq__(self, other: Any) -> bool:
        return other is not None and self._answer("__eq__", other)

    def __ne__(self, other: Any) -> bool:
        return not self == other

    def __bool__(self) -> bool:
        return self._answer("__len__")

    def startswith(self, prefix: Any) -> bool:
        return self._answer("startswith", prefix)

    def endswith(self, suffix: Any) -> bool:
        return self._answer("endswith", suffix)

    def strip(self, chars: Any = None) -> _Content:
        return self._stripped("strip", chars)

    def lstrip(self, chars: Any = None) -> _Content:
        return self._stripped("lstrip", chars)

    def rstrip(self, chars: Any = None) -> _Content:
        return self._stripped("rstrip", chars)

    def __getattr__(self, name: str) -> Any:
        if hasattr(str, name):
            self._lose()
        raise AttributeError(name)

    # Everything else that a text can do.
    __str__ = __repr__ = __format__ = __hash__ = __len__ = __iter__ = __getitem__ = _lose
    __mod__ = __rmod__ = __mul__ = __rmul__ = __lt__ = __le__ = __gt__ = __ge__ = _lose


def _written(value: Any) -> Any:
    """Called by Jinja on everything it is about to write."""
    if type(value) is not _Content:
        return value
    return "".join(f"{_EDGE}{piece}{_EDGE}" if isinstance(piece, int) else piece for piece in value._pieces)


def _ask(text: str, method: str, given: tuple[Any, ...]) -> bool:
    """The answer of a text: of a method that strips, whether it leaves the text as it is."""
    found = getattr(text, method)(*given)
    return found == text if method.endswith("strip") else bool(found)


def _fill(
    skeleton: Skeleton, roles: Sequence[str], contents: Sequence[str]
) -> tuple[str, list[tuple[int, int]]]:
    texts: list[str] = []
    bounds: list[tuple[int, int]] = []
    at = 0
    for piece in skeleton.pieces:
        text = piece if isinstance(piece, str) else contents[piece]
        if not isinstance(piece, str) and roles[piece] == "assistant":
            bounds.append((at, at + len(text)))
        texts.append(text)
        at += len(text)
    return "".join(texts), bounds


def _refuse(message: str) -> None:
    raise TemplateError(message)

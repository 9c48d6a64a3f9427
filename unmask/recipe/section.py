"""What a group of recipe keys is made of: its types, and the words its errors use."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo


class Says(str):
    """The words an error uses for what a field expects."""


def _not_bool(value: Any) -> Any:
    # Python's bool is an int: without this, `seed: true` would quietly become 1.
    if isinstance(value, bool):
        raise ValueError("a number is expected")
    return value


_NUMBER = BeforeValidator(_not_bool)
Count = Annotated[int, _NUMBER, Field(ge=0), Says("an integer, 0 or more")]
Positive = Annotated[int, _NUMBER, Field(gt=0), Says("a positive integer")]
TwoOrMore = Annotated[int, _NUMBER, Field(ge=2), Says("an integer, 2 or more")]
Amount = Annotated[float, _NUMBER, Field(ge=0), Says("a number, 0 or more")]
PositiveFloat = Annotated[float, _NUMBER, Field(gt=0), Says("a number above 0")]
Decay = Annotated[float, _NUMBER, Field(ge=0, lt=1), Says("a number from 0, below 1")]
OpenUnit = Annotated[float, _NUMBER, Field(gt=0, lt=1), Says("a number above 0, below 1")]
Probability = Annotated[float, _NUMBER, Field(ge=0, le=1), Says("a number from 0 to 1")]
LIST = Says("a list of such numbers")
Probabilities = Probability | Annotated[list[Probability], Field(min_length=1), LIST]
Rates = OpenUnit | Annotated[list[OpenUnit], Field(min_length=1), LIST]
Size = Annotated[int, _NUMBER, Field(ge=2)]
Sizes = Annotated[list[Size], Field(min_length=1)]
Phases = Annotated[list[Sizes], Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1), Says("a list of texts")]


class Section(BaseModel):
    """A group of keys: unknown ones are refused, and nothing changes it once it is made."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, data: Any) -> Any:
        """A group that is absent, or whose keys are all commented out, has its defaults."""
        if data is None:
            return {}
        if isinstance(data, Mapping):
            groups = (name for name, f in cls.model_fields.items() if is_section(f.annotation))
            return {**dict.fromkeys(groups), **data}
        return data

    def changed(self) -> list[str]:
        """Names of the fields that differ from their defaults."""
        return [
            name
            for name, field in type(self).model_fields.items()
            if getattr(self, name) != field.get_default(call_default_factory=True)
        ]


def listed_section(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds a list of; None for every other field."""

    def search(kind: Any) -> type[Section] | None:
        if get_origin(kind) is list and is_section(get_args(kind)[0]):
            return get_args(kind)[0]
        found = (search(inner) for inner in get_args(kind))
        return next((section for section in found if section is not None), None)

    return search(field.annotation)


def is_section(annotation: Any) -> TypeGuard[type[Section]]:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def expected(field: FieldInfo) -> str:
    """The words for what a field accepts."""

    def words(kind: Any, marks: Sequence[Any] = ()) -> list[str]:
        said = [str(mark) for mark in marks if isinstance(mark, Says)]
        if said:
            return said
        origin, args = get_origin(kind), get_args(kind)
        if origin is Annotated:
            return words(args[0], args[1:])
        if origin in (Union, types.UnionType):
            return [word for arg in args for word in words(arg)]
        if origin is Literal:
            return [str(arg) for arg in args]
        return [{str: "a text", bool: "true or false", type(None): "null"}[kind]]

    return either(words(field.annotation, field.metadata))


def refuse(key: str, mode: str, other: str) -> None:
    raise ValueError(
        f"{key} has no effect with training_mode: {mode}; remove it or set training_mode: {other}"
    )


def either(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "a group of keys"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

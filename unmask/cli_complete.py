"""What the shell completes: recipes, their keys and values, tasks; nothing that takes a second to find out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from textwrap import shorten
from typing import Any

import typer


def complete_from(values: Sequence[str] | None) -> Callable[[str], list[str]] | None:
    """Complete one of some values; None where any can be given."""
    if values is None:
        return None

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


def complete_recipe(incomplete: str) -> list[tuple[str, str]]:
    """Complete the name of a recipe that comes with unmask; a shell completes files where there is none."""
    from unmask.shipped import purpose, recipe_text, shipped_recipes

    names = [name for name in shipped_recipes() if name.startswith(incomplete)]
    return [(name, _short(purpose(recipe_text(name)))) for name in names]


def complete_override(ctx: typer.Context, incomplete: str) -> Iterator[tuple[str, str]]:
    """Complete KEY=VALUE: a key comes with its default, one of few values with each of them.

    Bash splits words at "=": then the key, and possibly the "=", are words before that of the value.
    """
    from unmask.config import recipe_fields

    fields = {key: schema for key, schema in recipe_fields().items() if "[]" not in key}
    before = [word for word in ctx.params.get("overrides") or () if word != "="][-1:]
    if "=" not in incomplete and before and before[0] in fields:
        yield from ((value, "") for value in _values(fields[before[0]]))
        return
    for key, schema in fields.items():
        meaning = _short(schema["description"])
        for value in _values(schema) or [_default(schema)]:
            yield f"{key}={value}", meaning


def complete_tasks(incomplete: str) -> list[str]:
    """Complete the last of several tasks, of those that come with unmask."""
    before, comma, last = incomplete.rpartition(",")
    tasks = (file.name for file in files("unmask.evaluation.tasks").iterdir() if file.name.endswith(".yaml"))
    names = sorted(name.removesuffix(".yaml") for name in tasks)
    return [before + comma + name for name in names if name.startswith(last)]


def _values(schema: dict[str, Any]) -> list[str]:
    """The values of a key that has few."""
    if "anyOf" in schema:
        return [value for kind in schema["anyOf"] for value in _values(kind)]
    return ["true", "false"] if schema.get("type") == "boolean" else list(schema.get("enum", ()))


def _short(text: str) -> str:
    """A text that typer does not break into lines, which a shell would take for further choices."""
    return shorten(text, 50, placeholder=" ...")


def _default(schema: dict[str, Any]) -> str:
    """A default as one word of a shell, "" where there is none."""
    value = schema.get("default")
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return "" if value is None or any(map(str.isspace, text)) else text

"""A YAML file and `key=value` overrides -> a checked `Recipe`, or one line that says what is wrong."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from pydantic import ValidationError

from unmask.errors import UnmaskError
from unmask.recipe.run import Recipe
from unmask.recipe.section import Section, expected, is_section, listed_section, show


class RecipeField(NamedTuple):
    """One documented key of the recipe."""

    key: str  # dotted, such as optimizer.learning_rate
    default: Any  # `...` where a value must be given
    accepts: str  # the words of the error message
    meaning: str  # with its unit


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe, apply `key=value` overrides in order, and check the result.

    Raises:
        UnmaskError: a file that cannot be read, broken YAML, an override that is not `key=value`,
            an unknown key, a value of the wrong type or range, or settings that contradict.
    """
    where = str(path)
    config = _read_yaml(Path(path), where)
    origin = {}
    for text in overrides:
        key, equals, _ = text.partition("=")
        if not (equals and re.fullmatch(r"[^\s.\[\]]+(\.[^\s.\[\]]+)*", key)):
            raise UnmaskError(f"'{text}' is not key=value; write for instance optimizer.learning_rate=1e-4")
        try:
            config = _merged(config, OmegaConf.from_dotlist([text]), key)
        except (OmegaConfBaseException, yaml.YAMLError, TypeError) as error:
            raise UnmaskError(f"override '{text}': {_reason(error)}") from error
        origin[key] = f"override '{text}'"
    try:
        tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        raise UnmaskError(f"{origin.get(key, where)}: {key}: {_reason(error)}") from error
    return _validate(tree, where, origin)


def _merged(config: DictConfig, override: DictConfig, key: str) -> DictConfig:
    """`config` with one override, whose key may lead into a list: data.sources.0.weight."""
    for place in (match.start() for match in re.finditer(r"\.\d+(\.|$)", key)):
        if isinstance(OmegaConf.select(config, key[:place]), ListConfig):
            OmegaConf.update(config, key, OmegaConf.select(override, key))
            return config
    return cast(DictConfig, OmegaConf.merge(config, override))


def recipe_from_dict(d: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Check a nested dict of recipe keys; `where` opens the error message.

    Raises:
        UnmaskError: as for `load_recipe`.
    """
    return _validate(d, where, {})


@cache
def recipe_fields() -> tuple[RecipeField, ...]:
    """List every key of the recipe, in its order, with default and meaning."""
    return tuple(_walk(Recipe))


def _walk(section: type[Section], prefix: str = "") -> Iterator[RecipeField]:
    for name, field in section.model_fields.items():
        inner = field.annotation
        if is_section(inner):
            yield from _walk(inner, f"{prefix}{name}.")
        else:
            listed = listed_section(field)
            default = ... if field.is_required() else field.get_default(call_default_factory=True)
            meaning = " ".join((field.description or "").split())
            yield RecipeField(prefix + name, default, expected(field), meaning)
            if listed is not None:
                yield from _walk(listed, f"{prefix}{name}[].")


def _read_yaml(path: Path, where: str) -> DictConfig:
    try:
        config = OmegaConf.load(io.StringIO(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise UnmaskError(f"{where}: no such recipe file") from error
    except UnicodeDecodeError as error:
        raise UnmaskError(f"{where}: not a text file in UTF-8") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}" if mark else ""
        raise UnmaskError(f"{where}{line}: {_reason(error)}") from error
    except (OSError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UnmaskError(f"{where}: cannot be read as a recipe: {_reason(error)}") from error
    if not isinstance(config, DictConfig):
        raise UnmaskError(f"{where}: expected keys such as 'max_steps: 1000'; got a list")
    return config


def _validate(tree: Any, where: str, origin: dict[str, str]) -> Recipe:
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as invalid:
        messages: dict[str, str] = {}
        # Unknown keys come first: a misspelt key is often why another one is missing.
        unknown = ("extra_forbidden", "invalid_key")
        errors = sorted(invalid.errors(), key=lambda e: e["type"] not in unknown)
        for error in errors:
            key, message = _explain(error["type"], error["loc"], error.get("ctx", {}), tree)
            source = next((origin[o] for o in reversed(origin) if f"{key}.".startswith(f"{o}.")), where)
            # A union reports one error for each of its members: one is enough.
            messages.setdefault(key, f"{source}: {message}")
        more = f" (and {len(messages) - 1} more)" if len(messages) > 1 else ""
        raise UnmaskError(next(iter(messages.values())) + more) from invalid
    known = [field.key for field in recipe_fields()]
    for key in recipe.resume.allow:
        if not any(name == key or name.startswith(f"{key}.") for name in known):
            raise UnmaskError(f"{where}: resume.allow: {_unknown(key, None)[1]}")
    return recipe


def _explain(kind: str, loc: tuple[Any, ...], ctx: Mapping[str, Any], tree: Any) -> tuple[str, str]:
    """Turn one pydantic error into (dotted key, message)."""
    section: type[Section] = Recipe
    value: Any = tree
    parts: list[str] = []
    for place, part in enumerate(loc):
        parts.append(str(part))
        key = ".".join(parts)
        if isinstance(value, list) and isinstance(part, int):  # of a list of sections
            value = value[part]
            continue
        field = section.model_fields.get(str(part))
        value = value.get(part) if isinstance(value, Mapping) else value
        if field is None:
            return _unknown(key, value)
        listed = listed_section(field)
        if is_section(field.annotation):
            section = field.annotation
        elif listed is not None and len(loc) > place + 1:
            section = listed
        elif kind == "missing":
            return key, f"{key}: missing; expected {expected(field)}"
        else:
            return key, f"{key}: expected {expected(field)}; got {show(value)}"
    if "error" in ctx:  # raised by a section's own check, whose message names its keys
        return str(ctx["error"]), str(ctx["error"])
    name = ".".join(parts) or "recipe"
    return name, f"{name}: expected a group of keys; got {show(value)}"


def _unknown(key: str, value: Any) -> tuple[str, str]:
    """Name an unknown key by the first value in it, since a group is rarely misspelt alone."""
    full = key
    while isinstance(value, Mapping) and value:
        name, value = next(iter(value.items()))
        full += f".{name}"
    for named in (full, key):
        if near := _nearest(named):
            return full, f"unknown key '{named}'; did you mean '{near}'?"
    return full, f"unknown key '{full}'; docs/recipes.md lists the known ones"


def _nearest(key: str) -> str | None:
    """The known key most like `key`, also where only the level is wrong; None if none is near."""
    fields = [field.key for field in recipe_fields()]
    groups = {field.rsplit(".", 1)[0] for field in fields if "." in field}

    def score(known: str) -> tuple[float, float]:
        whole = SequenceMatcher(None, key, known).ratio()
        last = SequenceMatcher(None, key.rsplit(".", 1)[-1], known.rsplit(".", 1)[-1]).ratio()
        return max(whole, last), whole

    best = max([*fields, *sorted(groups)], key=score)
    return best if score(best)[0] >= 0.7 else None


def _reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        return f"not valid YAML: {error.problem}"
    if isinstance(error, GrammarParseError):
        return "broken ${...} in a value; write a literal one as \\${"
    strerror = error.strerror if isinstance(error, OSError) else None
    return strerror or str(error).splitlines()[0]

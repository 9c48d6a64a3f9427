"""What decides how a recipe's data is encoded, and whether data prepared earlier fits it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from unmask.data.conversation import CustomFields
from unmask.data.encode import Encoder
from unmask.data.manifest import differences, digest, fingerprint, is_prepared, read_manifest, say_differences
from unmask.data.prepared import PreparedExamples, open_prepared
from unmask.errors import UnmaskError
from unmask.config import DataRecipe, Recipe

if TYPE_CHECKING:
    from unmask.training.feed import Group

# Which data: that of a prepared folder is what it was when it was prepared.
ORIGIN = ("dataset_name", "dataset_config", "split", "text_field", "max_records")
# What is done with encoded data.
USE = (
    "eval_dataset_name",
    "eval_size",
    "num_workers",
    "sources",
    "on_source_end",
    "streaming",
    "shuffle_buffer",
)
TEXT = ("packing", "long_documents")  # in pre-training alone they change what is encoded


def identity(
    recipe: Recipe, group: Group, tokenizer: PreTrainedTokenizerBase, encoder: Encoder | None
) -> dict[str, Any]:
    """List what decides the encoding: settings, chat template and tokenizer, and the data, as JSON.

    Args:
        group: the source that is encoded.
        encoder: that of the recipe; None in pre-training.
    """
    left_out = (*ORIGIN, *USE, *(TEXT if encoder is not None else ("sft",)))
    data = {name: value for name, value in recipe.data.model_dump().items() if name not in left_out}
    if encoder is not None:
        fields = asdict(group.custom_format or CustomFields())
        data["sft"] = {**data["sft"], "format": group.format, "custom_format": fields}
    settings = {"training_mode": recipe.training_mode, "data": data}
    template = None if encoder is None else encoder.chat_template
    return {
        "settings": settings,
        "settings_sha256": digest(settings),
        "tokenizer_sha256": fingerprint(tokenizer),
        "chat_template": template,
        "chat_template_sha256": digest(template),
        "end_token_id": tokenizer.eos_token_id if encoder is None else encoder.end_token_id,
        "mask_token_id": tokenizer.mask_token_id,
        "origin": {"data": _origin(group, recipe.data.max_records)},
    }


def load_prepared(
    group: Group,
    source: int,
    limit: int | None,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder | None,
) -> PreparedExamples:
    """Open prepared data, the only name in `group`, for a run of `recipe`.

    Args:
        source: its number in the recipe.
        limit: records wanted; None = all.

    Raises:
        UnmaskError: it does not fit the recipe or its tokenizer, or it is unfinished or damaged, or there
            are further names.
    """
    if len(group.names) > 1:
        name = next(name for name in group.names if is_prepared(name))
        raise UnmaskError(
            f"data.dataset_name: {name} is prepared data, which stands alone; prepare all files together, or"
            " name each in data.sources."
        )
    [name] = group.names
    manifest = read_manifest(Path(name).expanduser())
    now, before = identity(recipe, group, tokenizer, encoder), manifest.identity
    found = differences(before["settings"], now["settings"])
    for key, value in _origin(group, limit).items():  # a value that is given is meant
        prepared = before["origin"]["data"][key]
        if key != "dataset_name" and value not in (DataRecipe.model_fields[key].default, prepared):
            found.append((f"data.{key}", prepared, value))
    if before["tokenizer_sha256"] != now["tokenizer_sha256"]:
        raise UnmaskError(
            f"{name}: the tokenizer has changed since it was prepared (sha256"
            f" {before['tokenizer_sha256'][:12]}, now {now['tokenizer_sha256'][:12]}); use that one, or"
            " prepare the data again with `unmask prepare`."
        )
    if not found:  # settings first: a template may follow from one
        names = ("chat_template", "end_token_id", "mask_token_id")
        found = [(key, before[key], now[key]) for key in names if before[key] != now[key]]
    if found:
        raise UnmaskError(
            f"{name}: was prepared for other settings than the recipe's ({say_differences(found)}); set them"
            " alike, or prepare the data again with `unmask prepare`."
        )
    return open_prepared(name).as_source(source)


def _origin(group: Group, limit: int | None) -> dict[str, Any]:
    values = (group.names, group.config_name, group.split, group.text_field, limit)
    return dict(zip(ORIGIN, values, strict=True))

"""Checkpoints of other systems: found on disk or on the hub, and their weights by our names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unmask.data.hub import first_line, load_named, model_folder
from unmask.data.tokenizer import has_tokenizer, load_tokenizer
from unmask.errors import UnmaskError
from unmask.formats import Format, find_format, native_values, stored_name


class Foreign(NamedTuple):
    """A checkpoint of another system."""

    folder: Path
    format: Format
    values: dict[str, Any]
    """Its config in our fields."""
    assumed: list[str]
    """What it does not say, in words."""
    files: dict[str, Path]
    """The file that each weight is in, by their names."""


def find_foreign(name: str, values: dict[str, Any]) -> Foreign | None:
    """Find what a checkpoint of another system is; None for one of transformers or ours.

    Args:
        name: folder or hub name. Of a model on the hub all but its code is downloaded.
        values: its `config.json`.

    Raises:
        UnmaskError: a format that cannot be opened, or a config without a required fact.
    """
    format = find_format(values, name)
    if format is None:
        return None
    folder: Path = load_named(name, "checkpoint", model_folder)
    values, assumed = native_values(values, format, name)
    # What is left to the files next to the config: whether weights are tied, and the mask token.
    files = weight_files(folder)
    embedding, head = (stored_name(f"{key}.weight", format) for key in ("model.embed_tokens", "lm_head"))
    if embedding in files:
        tied = head not in files
        if not tied and values.get("tie_word_embeddings") is not False:
            tied = torch.equal(read_weight(files, embedding), read_weight(files, head))
        values["tie_word_embeddings"] = tied
    if values["mask_token_id"] is None and has_tokenizer(folder):
        values["mask_token_id"] = load_tokenizer(str(folder)).mask_token_id
    elif values["mask_token_id"] is None:
        values["mask_token_id"] = format.mask_token_id
        assumed.append(f"mask token {format.mask_token_id}")
    return Foreign(folder, format, values, assumed, files)


def weight_files(folder: Path) -> dict[str, Path]:
    """The file that each weight of a folder is in."""
    files: dict[str, Path] = {}
    whole = folder / "model.safetensors"  # whatever lies next to it
    parts = sorted(folder.glob("model-*.safetensors")) or sorted(folder.glob("*.safetensors"))
    for file in [whole] if whole.exists() else parts:
        try:
            with safe_open(file, framework="pt") as opened:
                files.update(dict.fromkeys(opened.keys(), file))
        except SafetensorError as error:
            raise UnmaskError(
                f"{file}: {first_line(error)}; the file is damaged or incomplete, copy it again."
            ) from error
    return files


def read_weight(files: dict[str, Path], key: str) -> Tensor:
    """Read one weight; in mapped memory, so that what is not used is not read."""
    with safe_open(files[key], framework="pt") as opened:
        return opened.get_tensor(key)


def renamed_weights(foreign: Foreign, model_class: Any, config: Any) -> dict[str, Tensor]:
    """Read the weights by our names, of a format that has others."""
    with torch.device("meta"):
        names = model_class(config).state_dict()
    stored = {name: stored_name(name, foreign.format) for name in names}
    return {name: read_weight(foreign.files, key) for name, key in stored.items() if key in foreign.files}

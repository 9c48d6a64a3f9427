"""A recipe -> a folder of prepared data, from which its runs need no tokenizer."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from unmask.data.encode import Encoder, EncodeReport, Example, encode_each
from unmask.data.manifest import Manifest, is_prepared
from unmask.data.prepare import (
    SHARD,
    Encoding,
    RecordEncoding,
    TextEncoding,
    write_prepared,
)
from unmask.data.sources import read_files
from unmask.data.text import TextBlocks, TextParts
from unmask.errors import UnmaskError
from unmask.config import Recipe
from unmask.training.dataset import make_encoder, run_tokenizer
from unmask.training.feed import Group, groups_of, list_group
from unmask.training.identity import identity


def prepare(
    recipe: Recipe,
    out: str | Path,
    *,
    workers: int | None = None,
    shard_records: int = SHARD,
    console: Console | None = None,
) -> Manifest:
    """Encode the training data of a recipe into the folder `out`, in parallel; returns its manifest.

    Interrupted at any moment, the same call goes on. A run whose `data.dataset_name` is the folder has the
    examples, in the order and with the sample ids, that it would have encoded itself.

    Args:
        workers: processes that encode; one for each core by default.
        shard_records: records, or documents, of a shard.
        console: where progress is shown.

    Raises:
        UnmaskError: as for `write_prepared`, or the recipe names a mixture or a stream.
    """
    group = _group(recipe)
    tokenizer = run_tokenizer(recipe)
    encoder = make_encoder(recipe, tokenizer) if recipe.training_mode == "sft" else None
    encoding: Encoding
    if encoder is not None:
        encoding = RecordEncoding(_Records(group, encoder, recipe.data.on_bad_record))
    else:
        end, size = tokenizer.eos_token_id, recipe.data.block_size
        assert isinstance(end, int)  # `run_tokenizer` has seen to it
        cut = recipe.data.long_documents == "cut"
        way = TextParts(end, size, cut=cut) if recipe.data.packing else TextBlocks(end, size)
        encoding = TextEncoding(tokenizer, way, recipe.data.on_bad_record)
    files = list_group(group, text=encoder is None)
    items = read_files(files, group.text_field if encoder is None else None)
    whole = identity(recipe, group, tokenizer, encoder)
    whole["origin"]["files"] = [file.label for file in files]
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        shown = bar.add_task("preparing", total=None)

        def progress(records: int, shards: int) -> None:
            bar.update(shown, description=f"preparing: {records:,} records, {shards:,} shards")

        return write_prepared(
            out,
            whole,
            islice(items, recipe.data.max_records),
            encoding,
            inputs=_stamps(group.names),
            workers=workers,
            shard_records=shard_records,
            progress=progress,
        )


class _Records:
    """The recipe's way from records to examples, to be called in any process."""

    def __init__(self, group: Group, encoder: Encoder, on_bad_record: Literal["stop", "skip"]) -> None:
        self.group, self.encoder, self.on_bad_record = group, encoder, on_bad_record

    def __call__(self, items: list[Any], report: EncodeReport) -> Iterator[Example]:
        return encode_each(
            items,
            self.encoder,
            self.group.format,
            self.group.custom_format,
            on_bad_record=self.on_bad_record,  # pyright: ignore[reportArgumentType]
            report=report,
        )


def _group(recipe: Recipe) -> Group:
    if recipe.data.sources is not None:
        raise UnmaskError(
            "data.sources: a mixture is not prepared as a whole; prepare each source with data.dataset_name,"
            " and name the folders in data.sources."
        )
    if recipe.data.streaming:
        raise UnmaskError(
            "data.streaming has no effect on a preparation, which never holds all data; set it to false."
        )
    [group] = groups_of(recipe)
    for name in group.names:
        if is_prepared(name):
            raise UnmaskError(f"data.dataset_name: {name} is prepared data already.")
    return group


def _stamps(names: list[str]) -> dict[str, tuple[int, int]]:
    """Size and time of every local file, which change when it does."""
    found: dict[str, tuple[int, int]] = {}
    for name in names:
        path = Path(name).expanduser()
        inside = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
        files = [path] if path.is_file() else sorted(file for file in inside if file.is_file())
        found |= {str(file): (file.stat().st_size, file.stat().st_mtime_ns) for file in files}
    return found

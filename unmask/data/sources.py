"""Files, folders, globs, hub names and URLs -> records or documents, each with its place for messages."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

from unmask.data.conversation import BadRecord
from unmask.data.files import (
    RECORD_SUFFIXES,
    TEXT_SUFFIXES,
    HubShard,
    Place,
    Raw,
    RecordFile,
    is_array,
    is_url,
    record_id,
    suffix_of,
)
from unmask.data.hub import HUB_NAME, first_line, offline_hint, require_hub
from unmask.errors import UnmaskError


def read_records(
    name: str | Path,
    *,
    split: str = "train",
    config_name: str | None = None,
    limit: int | None = None,
    keep_bad: bool = False,
) -> Iterator[tuple[Any, str]]:
    """Yield the records of `name` with their places, at most `limit` of them.

    `name` is a JSON, JSON-lines (also .gz), Parquet or CSV file, a folder or glob of such files, a URL
    that fsspec opens, or a data set on the hub; `split` and `config_name` say which part of a hub data
    set. A place reads "alpaca.json record 17" or "x.jsonl line 4", counted from 1.

    Args:
        keep_bad: yield a `BadRecord` in the place of a line that is no record, instead of raising.

    Raises:
        UnmaskError: A missing, empty or broken file, a record that is no object, or a hub name
            that cannot be read.
    """
    files = list_files([name], split=split, config_name=config_name, limit=limit)
    records = ((record, where) for record, where, _ in read_files(files))
    return _checked(islice(records, limit), keep_bad)


def read_documents(
    name: str | Path,
    *,
    text_field: str = "text",
    split: str = "train",
    config_name: str | None = None,
    limit: int | None = None,
) -> Iterator[str]:
    """Yield the texts of `name`, at most `limit` of them, for pre-training.

    A file that is no table of records (.txt, .py, ...) is one document; of a JSON, Parquet or CSV
    file or a hub data set each record's `text_field` is one. Blank texts are left out.

    Raises:
        UnmaskError: As for `read_records`; a record without `text_field`; text that is not UTF-8.
    """
    files = list_files([name], split=split, config_name=config_name, text=True)
    texts = ((text, where) for text, where, _ in read_files(files, text_field))
    return islice((text for text, _ in _checked(texts, keep_bad=False)), limit)


def read_files(
    files: Sequence[RecordFile | HubTable], text_field: str | None = None
) -> Iterator[tuple[Any, str, int]]:
    """Yield the records of all files, or with `text_field` their texts, with their places and numbers.

    A `BadRecord` stands in the place of a bad one. The numbers are those of `record_id`.

    Raises:
        UnmaskError: An empty file, one that is gone or cannot be read, or a hub name that cannot.
    """
    for index, file in enumerate(files):
        empty = True
        for raw, place in file.read():
            empty = False
            record = raw.record()
            if text_field is not None:
                record = document_text(record, text_field)
                if isinstance(record, str) and not record.strip():
                    continue
            yield record, raw.where, record_id(index, place.number - 1, files)
        if not empty or isinstance(file, HubTable):
            continue
        if file.suffix in RECORD_SUFFIXES:
            raise UnmaskError(f"{file.label}: the file holds no records.")
        if len(files) == 1:  # of many text files some may well be empty
            raise UnmaskError(f"{file.label}: the file is empty.")


def document_text(record: Any, field: str) -> Any:
    """Return the text of a record, or of a whole text file, or a BadRecord."""
    if isinstance(record, str | BadRecord):
        return record
    text = record.get(field)
    if isinstance(text, str):
        return text
    what = "is not text" if field in record else "is missing"
    detail = f"; fields here: {', '.join(map(str, record))}; set data.text_field"
    return BadRecord(f"field '{field}' {what}", detail)


def list_files(
    names: Iterable[str | Path],
    *,
    split: str = "train",
    config_name: str | None = None,
    text: bool = False,
    limit: int | None = None,
) -> list[RecordFile | HubTable]:
    """Find the files that `names` stand for, each name's in their order; a hub name counts as one.

    Args:
        text: whether a file that is no table of records is a document.
        limit: records that are wanted of a hub data set; None = all.

    Raises:
        UnmaskError: There is none of a name, or one is of another kind.
    """
    files: list[RecordFile | HubTable] = []
    for name in map(str, names):
        found = find_files(name, text)
        files += [HubTable(name, split, config_name, limit)] if found is None else found
    return files


def open_files(
    names: Iterable[str | Path], *, split: str = "train", config_name: str | None = None, text: bool = False
) -> list[RecordFile | HubShard]:
    """Find the files of a streamed source likewise, and the shards of a hub name; only names are read.

    Raises:
        UnmaskError: As for `list_files`, or a file is a JSON array, which cannot be read record by record.
    """
    files: list[RecordFile | HubShard] = []
    for name in map(str, names):
        found = find_files(name, text)
        for file in found or ():
            if file.suffix in (".json", ".json.gz") and is_array(file):
                raise UnmaskError(
                    f"{file.label}: a JSON array cannot be streamed, since it ends where the file ends; write"
                    " one record a line (.jsonl), or set data.streaming=false."
                )
        files += _hub_shards(name, split, config_name) if found is None else found
    return files


def _checked(records: Iterator[tuple[Any, str]], keep_bad: bool) -> Iterator[tuple[Any, str]]:
    for record, where in records:
        if isinstance(record, BadRecord) and not keep_bad:
            raise record.error(where)
        yield record, where


def find_files(name: str, text: bool) -> list[RecordFile] | None:
    """Find the files that `name` stands for, in the order of their names; None for a hub name.

    Args:
        text: whether any file that is named is a document.

    Raises:
        UnmaskError: there is no file of a known kind.
    """
    suffixes = (*RECORD_SUFFIXES, *TEXT_SUFFIXES) if text else RECORD_SUFFIXES
    known = ", ".join(suffixes)
    if is_url(name):
        return _find_remote(name, suffixes, text)
    path = Path(name).expanduser()
    if path.is_file():
        if suffix_of(path) not in suffixes and not text:
            hint = "; plain text needs training_mode=pretrain" if path.suffix == ".txt" else ""
            raise UnmaskError(f"{name}: not a file of records; expected {known}{hint}.")
        return [RecordFile(str(path), path.name)]
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file() and suffix_of(p) in suffixes)
        inside = [p for p in inside if "/." not in f"/{p.relative_to(path).as_posix()}"]
        if not inside:
            raise UnmaskError(f"{name}: the folder holds no file of a known kind ({known}).")
        return [RecordFile(str(p), str(p.relative_to(path))) for p in inside]
    if glob.has_magic(name):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        matches = [str(p) for p in matches if p.is_file()]
        return _known_files(name, matches, suffixes, text)
    if _looks_like_path(name):
        raise UnmaskError(f"{name}: no such file{_suggestion(path)}")
    return None


def _known_files(
    name: str, matches: list[str], suffixes: tuple[str, ...], any_suffix: bool
) -> list[RecordFile]:
    if not matches:
        raise UnmaskError(f"{name}: no file matches.")
    if wrong := [p for p in matches if suffix_of(Path(p)) not in suffixes and not any_suffix]:
        raise UnmaskError(f"{wrong[0]}: not a file of records; expected {', '.join(suffixes)}.")
    return [RecordFile(p, p) for p in matches]


def _find_remote(name: str, suffixes: tuple[str, ...], any_suffix: bool) -> list[RecordFile]:
    import fsspec

    try:
        system, path = fsspec.url_to_fs(name)
        if glob.has_magic(path):
            found = [p for p in system.glob(path) if system.isfile(p)]
        elif system.isdir(path):
            found = [p for p in system.find(path) if suffix_of(Path(p)) in suffixes]
        else:
            found = [path] if system.exists(path) else []
        matches = sorted(system.unstrip_protocol(p) for p in cast(list[str], found))
    except ImportError as error:  # fsspec says which package is missing
        raise UnmaskError(f"{name}: {first_line(error)}.") from error
    except Exception as error:  # every store has errors of its own
        raise UnmaskError(f"{name}: cannot be opened ({first_line(error)}).") from error
    return _known_files(name, matches, suffixes, any_suffix)


def _looks_like_path(name: str) -> bool:
    known = suffix_of(Path(name)) in (*RECORD_SUFFIXES, *TEXT_SUFFIXES)
    return known or name[:1] in "./~\\" or not HUB_NAME.fullmatch(name)


def _suggestion(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f" (nor a folder {path.parent})."
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else "."


@dataclass(frozen=True)
class HubTable:
    """A data set on the hub as a whole; with `limit` it is streamed, as a few of many need no download."""

    label: str
    split: str
    config_name: str | None
    limit: int | None = None

    def read(self) -> Iterator[tuple[Raw, Place]]:
        """Yield the records, each with the place after it.

        Raises:
            UnmaskError: The data set cannot be loaded.
        """
        rows = _load_hub(self.label, self.split, self.config_name, streaming=self.limit is not None)
        for number, row in enumerate(rows, 1):
            yield Raw(row, dict, self.label, number), Place(number)


def _hub_shards(name: str, split: str, config_name: str | None) -> list[RecordFile | HubShard]:
    dataset = _load_hub(name, split, config_name, streaming=True)
    several = dataset.num_shards > 1
    labels = [f"{name} shard {index + 1}" if several else name for index in range(dataset.num_shards)]
    return [HubShard(dataset, index, label) for index, label in enumerate(labels)]


def _load_hub(name: str, split: str, config_name: str | None, streaming: bool) -> Any:
    require_hub(name, "dataset")
    from datasets import load_dataset

    try:
        return load_dataset(name, config_name, split=split, streaming=streaming)
    except Exception as error:
        raise UnmaskError(
            f"{name}: no such local file or folder, and the hub data set cannot be loaded "
            f"(split {split!r}): {first_line(error)}.{offline_hint()}"
        ) from error

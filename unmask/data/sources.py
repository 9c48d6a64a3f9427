"""Files, folders, globs and hub names -> records or documents, each with its place for messages."""

from __future__ import annotations

import csv
import difflib
import glob
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from unmask.data.hub import HUB_NAME, first_line, offline_hint, require_hub
from unmask.errors import UnmaskError

RECORD_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet", ".csv")
TEXT_SUFFIXES = (".txt",)


def read_records(
    name: str | Path,
    *,
    split: str = "train",
    config_name: str | None = None,
    limit: int | None = None,
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the records of `name` with their places, at most `limit` of them.

    `name` is a JSON, JSON-lines (also .gz), Parquet or CSV file, a folder or glob of such files, or
    a data set on the hub; `split` and `config_name` say which part of a hub data set. A place reads
    "alpaca.json record 17" or "x.jsonl line 4", counted from 1.

    Raises:
        UnmaskError: A missing, empty or broken file, a record that is no object, or a hub name
            that cannot be read.
    """
    files = _find(str(name), RECORD_SUFFIXES)
    if files is None:
        records = _hub_records(str(name), split, config_name, limit)
    else:
        records = (item for path, label in files for item in _file_records(path, label))
    return islice(records, limit)


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
    files = _find(str(name), (*RECORD_SUFFIXES, *TEXT_SUFFIXES), any_suffix=True)
    return islice(_documents(str(name), files, text_field, split, config_name), limit)


def _documents(
    name: str,
    files: list[tuple[Path, str]] | None,
    text_field: str,
    split: str,
    config_name: str | None,
) -> Iterator[str]:
    if files is None:
        yield from _texts(_hub_records(name, split, config_name, None), text_field)
        return
    for path, label in files:
        if _suffix(path) in RECORD_SUFFIXES:
            yield from _texts(_file_records(path, label), text_field)
            continue
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UnmaskError(f"{label}: not UTF-8 text (byte {error.start + 1}).") from error
        except OSError as error:
            raise UnmaskError(f"{label}: cannot be read ({error.strerror}).") from error
        if text.strip():
            yield text
        elif len(files) == 1:
            raise UnmaskError(f"{label}: the file is empty.")


def _texts(records: Iterator[tuple[dict[str, Any], str]], field: str) -> Iterator[str]:
    for record, where in records:
        text = record.get(field)
        if not isinstance(text, str):
            what = "is not text" if field in record else "is missing"
            raise UnmaskError(
                f"{where}: field '{field}' {what}; fields here: {', '.join(map(str, record))}; "
                "set data.text_field."
            )
        if text.strip():
            yield text


def _find(name: str, suffixes: tuple[str, ...], any_suffix: bool = False) -> list[tuple[Path, str]] | None:
    """The files that `name` stands for, each with its name for messages; None for a hub name."""
    path = Path(name).expanduser()
    known = ", ".join(suffixes)
    if path.is_file():
        if _suffix(path) not in suffixes and not any_suffix:
            hint = "; plain text needs training_mode=pretrain" if path.suffix == ".txt" else ""
            raise UnmaskError(f"{name}: not a file of records; expected {known}{hint}.")
        return [(path, path.name)]
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file() and _suffix(p) in suffixes)
        inside = [p for p in inside if "/." not in f"/{p.relative_to(path).as_posix()}"]
        if not inside:
            raise UnmaskError(f"{name}: the folder holds no file of a known kind ({known}).")
        return [(p, str(p.relative_to(path))) for p in inside]
    if glob.has_magic(name):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        matches = [p for p in matches if p.is_file()]
        if not matches:
            raise UnmaskError(f"{name}: no file matches.")
        if wrong := [p for p in matches if _suffix(p) not in suffixes and not any_suffix]:
            raise UnmaskError(f"{wrong[0]}: not a file of records; expected {known}.")
        return [(p, str(p)) for p in matches]
    if _looks_like_path(name):
        raise UnmaskError(f"{name}: no such file{_suggestion(path)}")
    return None


def _suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return "".join(suffixes) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


def _looks_like_path(name: str) -> bool:
    known = _suffix(Path(name)) in (*RECORD_SUFFIXES, *TEXT_SUFFIXES)
    return known or name[:1] in "./~\\" or not HUB_NAME.fullmatch(name)


def _suggestion(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f" (nor a folder {path.parent})."
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else "."


def _file_records(path: Path, label: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The records of one file, each checked to be an object; an empty file is an error."""
    suffix = _suffix(path)
    if suffix == ".parquet":
        items = _parquet_items(path, label)
    elif suffix == ".csv":
        items = _csv_items(path, label)
    else:
        items = _json_items(path, label, suffix)
    empty = True
    try:
        for record, where in items:
            if not isinstance(record, dict):
                kind = {list: "a list", str: "text"}.get(type(record), repr(record)[:40])
                raise UnmaskError(f"{where}: expected a record {{...}}; got {kind}.")
            empty = False
            yield record, where
    except (OSError, EOFError, zlib.error) as error:
        raise UnmaskError(f"{label}: cannot be read ({first_line(error)}).") from error
    if empty:
        raise UnmaskError(f"{label}: the file holds no records.")


def _json_items(path: Path, label: str, suffix: str) -> Iterator[tuple[Any, str]]:
    opener = gzip.open if suffix.endswith(".gz") else open
    with opener(path, "rb") as file:
        if suffix.startswith(".json.") or suffix == ".json":
            start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
            file.seek(0)
            if start.startswith(b"["):
                yield from _json_array(file.read(), label)
                return
        yield from _json_lines(file, label)


def _json_array(data: bytes, label: str) -> Iterator[tuple[Any, str]]:
    try:
        records = json.loads(data.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UnmaskError(
            f"{label} line {error.lineno}: not valid JSON ({error.msg}, column {error.colno})."
        ) from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UnmaskError(f"{label} line {line}: not UTF-8 text.") from error
    for number, record in enumerate(records, 1):
        yield record, f"{label} record {number}"


def _json_lines(lines: Iterable[bytes], label: str) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(lines, 1):
        where = f"{label} line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if text.strip():
                yield json.loads(text), where
        except json.JSONDecodeError as error:
            raise UnmaskError(
                f"{where}: not valid JSON ({error.msg}, column {error.colno}); expected one record "
                "a line, or in a .json file one array of records."
            ) from error
        except UnicodeDecodeError as error:
            raise UnmaskError(f"{where}: not UTF-8 text.") from error


def _csv_items(path: Path, label: str) -> Iterator[tuple[Any, str]]:
    # The csv module rather than `datasets`: every cell stays the text it is ("007" is no number).
    csv.field_size_limit(2**31 - 1)
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file, strict=True), 1):
                where = f"{label} record {number}"
                if None in row:
                    raise UnmaskError(f"{where}: more cells than the header has names.")
                yield {k: v for k, v in row.items() if v is not None}, where
    except csv.Error as error:
        raise UnmaskError(f"{label} record {number + 1}: not valid CSV ({error}).") from error
    except UnicodeDecodeError as error:
        raise UnmaskError(f"{label}: not UTF-8 text (near record {number + 1}).") from error


def _parquet_items(path: Path, label: str) -> Iterator[tuple[Any, str]]:
    from datasets import load_dataset

    try:
        rows = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield row, f"{label} record {number}"
    except Exception as error:  # pyarrow and datasets each have their own families
        raise UnmaskError(f"{label}: not a readable Parquet file ({first_line(error)}).") from error


def _hub_records(
    name: str, split: str, config_name: str | None, limit: int | None
) -> Iterator[tuple[dict[str, Any], str]]:
    require_hub(name, "dataset")
    from datasets import load_dataset

    try:
        # With a limit the records are streamed: a few of many need no download of all.
        rows = load_dataset(name, config_name, split=split, streaming=limit is not None)
    except Exception as error:
        raise UnmaskError(
            f"{name}: no such local file or folder, and the hub data set cannot be loaded "
            f"(split {split!r}): {first_line(error)}.{offline_hint()}"
        ) from error
    for number, row in enumerate(rows, 1):
        yield dict(row), f"{name} record {number}"

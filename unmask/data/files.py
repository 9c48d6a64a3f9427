"""Files, folders, globs, URLs and hub names -> records or documents, each with its location for messages."""

from __future__ import annotations

import csv
import difflib
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast

from unmask.data.hub import HUB_NAME, first_line, load_named
from unmask.data.records import RecordError
from unmask.data.sniff import JSON_LINES, is_doubtful, mistaken
from unmask.errors import UnmaskError
from unmask.shipped import find_shipped

BLOCK = 1 << 20  # bytes read at once
ROWS = 1024  # rows of a table read at once
BOM = b"\xef\xbb\xbf"
# What readers and decompressors raise.
UNREADABLE = (csv.Error, ValueError, EOFError, zlib.error, lzma.LZMAError, OSError, ImportError)


class Broken(Exception):
    """A record, or the file from there on, cannot be read; `line`: of the file, if it is known."""

    def __init__(self, reason: str, detail: str = "", line: int = 0):
        super().__init__(reason)
        self.reason, self.detail, self.line = reason, detail, line


class Record(NamedTuple):
    """A record as it was read, not yet decoded, so that passing over it costs little."""

    data: Any
    decode: Callable[[Any], Any]
    label: str  # of its file
    index: int  # among the records of its file, from 0
    line: int = 0  # of its file; 0 = count records

    @property
    def where(self) -> str:
        """The record's location, for messages: "alpaca.json record 17" or "x.jsonl line 4", from 1."""
        return f"{self.label} line {self.line}" if self.line else f"{self.label} record {self.index + 1}"

    def load(self) -> Any:
        """Return the record, or a text file's text; in place of one that cannot be read, the error."""
        try:
            return self.decode(self.data)
        except Broken as error:
            return RecordError(self.where, error.reason, error.detail)


# Kinds of files. A reader yields (data, line of the file or 0) of each record, `decode` makes the record of it.


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = error.start - data.rfind(b"\n", 0, error.start)
        detail = f" (byte {byte} of the line); save the file as UTF-8"
        raise Broken("not UTF-8 text", detail, line) from error


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(_decoded(data), object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        detail = f" ({error.msg}, column {error.colno}); expected one record a line, or in a .json file one"
        raise Broken("not valid JSON", f"{detail} array of records", error.lineno) from error
    except (RecursionError, ValueError) as error:  # brackets, or digits, without end
        raise Broken("not valid JSON", f" ({first_line(error, 80)})") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _check_unique("key", [name for name, _ in pairs])
    return dict(pairs)


def _check_unique(what: str, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise Broken(f"{what} {twice[:40]!r} is given twice", "; remove one of them")


def _starts_array(opened: BinaryIO) -> bool:
    return cast(io.BufferedReader, opened).peek(4096)[:4096].removeprefix(BOM).lstrip().startswith(b"[")


def _json(opened: BinaryIO) -> Iterator[tuple[Any, int]]:
    """One array of records, or JSON lines."""
    if _starts_array(opened):
        yield from ((record, 0) for record in _parsed(opened.read()))
    else:
        yield from _json_lines(opened)


def _json_lines(opened: BinaryIO) -> Iterator[tuple[Any, int]]:
    for line, text in enumerate(opened, 1):
        if text.removeprefix(BOM).strip():
            yield text.rstrip(b"\r\n"), line


def _json_record(data: Any) -> Any:
    record = _parsed(data) if isinstance(data, bytes) else data
    if not isinstance(record, dict):
        kind = {list: "a list", str: "text"}.get(type(record), repr(record)[:40])
        raise Broken("expected a record {...}", f"; got {kind}")
    return record


def _csv(opened: BinaryIO, delimiter: str = ",") -> Iterator[tuple[Any, int]]:
    # The csv module rather than `datasets`: every cell stays the text it is ("007" is not a number).
    csv.field_size_limit(2**31 - 1)
    # Bytes that are not UTF-8 come as unpaired surrogates, so that their record is known.
    with io.TextIOWrapper(opened, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        rows = csv.DictReader(text, strict=True, delimiter=delimiter)
        _check_unique("column", rows.fieldnames or ())
        yield from ((row, 0) for row in rows)


def _csv_row(row: dict[str | None, Any]) -> Any:
    if None in row:
        raise Broken("more cells than the header has names")
    try:
        "".join(text or "" for text in (*cast(Any, row), *row.values())).encode()
    except UnicodeEncodeError as error:
        raise Broken("not UTF-8 text", "; save the file as UTF-8") from error
    return {name: cell for name, cell in row.items() if cell is not None}


def _parquet(opened: BinaryIO) -> Iterator[tuple[Any, int]]:
    from pyarrow.parquet import ParquetFile

    table = ParquetFile(opened)
    _check_unique("column", table.schema_arrow.names)
    for batch in table.iter_batches(batch_size=ROWS):
        yield from (((batch, row), 0) for row in range(len(batch)))


def _arrow_row(location: tuple[Any, int]) -> Any:
    table, row = location
    try:
        return table.slice(row, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        raise Broken("not UTF-8 text") from error


def _text(opened: BinaryIO) -> Iterator[tuple[str, int]]:
    if (text := _decoded(opened.read())).strip():
        yield text, 0


def _same(record: Any) -> Any:
    return record


COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
READERS: dict[str, tuple[Callable[[BinaryIO], Iterator[tuple[Any, int]]], Callable[[Any], Any]]] = {
    ".json": (_json, _json_record),
    **dict.fromkeys(JSON_LINES, (_json_lines, _json_record)),
    ".parquet": (_parquet, _arrow_row),
    ".csv": (_csv, _csv_row),
    ".tsv": (partial(_csv, delimiter="\t"), _csv_row),
}
KNOWN = f"{', '.join(READERS)}, also compressed ({', '.join(COMPRESSED)})"
ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")
NOT_RECORDS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # of `datasets`
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def kind_of(path: str) -> str:
    """The suffix that says the kind of a file, ".csv" of "x.csv.gz"; "" if there is none."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(path).suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in COMPRESSED), "")


@dataclass(frozen=True)
class RecordFile:
    """One file of a source: local, or anything that fsspec opens. `label` names it in messages."""

    path: str
    label: str

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        import fsspec

        compression = "infer" if self.path.lower().endswith(COMPRESSED) else None
        with fsspec.open(self.path, "rb", compression=compression) as opened:
            yield cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, opened), BLOCK))

    def read(self) -> Iterator[Record]:
        """Yield the records. If the file is broken: those before, then one whose `load` is the error.

        Raises:
            UnmaskError: The file has no record, does not exist, or cannot be read.
        """
        kind, count = kind_of(self.path), 0
        reader, decode = READERS.get(kind, (_text, _same))
        try:
            with self.open() as file:
                self._check_kind(file, kind)
                for data, line in reader(file):
                    yield Record(data, decode, self.label, count, line)
                    count += 1
        except (Broken, *UNREADABLE) as error:
            if isinstance(error, ImportError) or getattr(error, "errno", None) is not None:
                # Of a missing package, the disk or the network, not of the contents.
                if isinstance(error, PermissionError) and "://" not in self.path:
                    todo = f"allow it (chmod u+r {self.path}), or name a copy"
                    raise UnmaskError(f"{self.label}: permission denied; {todo}.") from error
                raise UnmaskError(f"{self.label}: cannot be read ({first_line(error)}).") from error
            if not isinstance(error, Broken):
                error = Broken(f"not a readable {kind} file", f" ({first_line(error)})")
            bad = Record(None, _same, self.label, count, error.line)
            counted = f"{error.reason}: {'the rest' if count else 'all'} of {self.label} is left out"
            where = bad.where if count or error.line else self.label
            yield bad._replace(data=RecordError(where, error.reason, error.detail, counted))
            return
        if not count and kind in READERS:
            raise UnmaskError(f"{self.label}: the file has no records.")

    def _check_kind(self, file: BinaryIO, kind: str) -> None:
        if kind != ".parquet" and is_doubtful(cast(io.BufferedReader, file).peek(BLOCK), kind):
            with self.open() as again:
                reason, detail = mistaken(again, kind, self.label)
            if reason:
                raise Broken(reason, detail)

    def is_array(self) -> bool:
        """Whether it is one JSON array."""
        if kind_of(self.path) != ".json":
            return False
        with self.open() as opened:
            return _starts_array(opened)

    def stamp(self) -> list[Any]:
        """What changes when the file does: its path, size and time, or what its store says of it."""
        import fsspec

        system, path = fsspec.url_to_fs(self.path)
        found = system.info(path)
        return [self.path, *([found["size"], found["mtime"]] if "mtime" in found else [str(found)])]


@dataclass(frozen=True)
class Table:
    """A data set of `datasets`: on the hub, or a folder of `save_to_disk`."""

    label: str
    split: str = "train"
    config_name: str | None = None
    limit: int | None = None
    """with a limit a hub data set is streamed, as a few of many records need no download"""

    def open(self, streaming: bool = False) -> Any:
        """Load it.

        Raises:
            UnmaskError: It cannot be loaded, or has no such split.
        """
        from datasets import DatasetDict, load_dataset, load_from_disk

        def load(name: str) -> Any:
            if Path(name).is_dir():
                return load_from_disk(name)
            return load_dataset(name, self.config_name, split=self.split, streaming=streaming)

        data = load_named(self.label, "data set", load)
        if isinstance(data, DatasetDict):
            _check_split(self.label, self.split, list(map(str, data)))
            data = data[self.split]
        return data.to_iterable_dataset() if streaming and hasattr(data, "to_iterable_dataset") else data

    def read(self) -> Iterator[Record]:
        """Yield the records.

        Raises:
            UnmaskError: The data set cannot be loaded.
        """
        tables = self.open(streaming=self.limit is not None).with_format("arrow").iter(batch_size=ROWS)
        rows = ((table, row) for table in tables for row in range(len(table)))
        return (Record(row, _arrow_row, self.label, index) for index, row in enumerate(rows))

    def stamp(self) -> list[Any]:
        """What changes when the data do: names and sizes of the files that `datasets` keeps of them."""
        names = [file["filename"] for file in self.open().cache_files]
        return [self.label, self.split, [[name, Path(name).stat().st_size] for name in names]]


Source = RecordFile | Table


def read_records(
    name: str | Path,
    *,
    split: str = "train",
    config_name: str | None = None,
    limit: int | None = None,
    text: bool = False,
) -> Iterator[tuple[Any, str]]:
    """Yield the records of `name` with their locations, at most `limit` of them.

    `name` is a JSON, JSON-lines, CSV, TSV (also compressed) or Parquet file, a folder or glob of such
    files, a URL that fsspec opens, or a data set on the hub; `split` and `config_name` say which part.

    Args:
        text: also read files of other kinds, each as one text.

    Raises:
        UnmaskError: A missing, empty or broken file, a record that is not an object, or a hub name
            that cannot be read.
    """
    files = find_files(name, split=split, config_name=config_name, text=text, limit=limit)
    for record in islice((record for file in files for record in file.read()), limit):
        loaded = record.load()
        if isinstance(loaded, RecordError):
            raise loaded
        yield loaded, record.where


def document_text(record: Record, field: str) -> str | RecordError:
    """Return the text of a record, or of a whole text file, or the error."""
    loaded = record.load()
    if isinstance(loaded, str | RecordError):
        return loaded
    text = loaded.get(field)
    if isinstance(text, str):
        return text
    what = "is not text" if text is not None else "is missing"
    detail = f"; fields here: {', '.join(map(str, loaded))}; set data.text_field"
    return RecordError(record.where, f"field '{field}' {what}", detail)


def find_files(
    name: str | Path,
    *,
    split: str = "train",
    config_name: str | None = None,
    text: bool = False,
    limit: int | None = None,
) -> list[Source]:
    """Find the files of `name` in the order of their names; a hub name counts as one.

    Args:
        text: whether any file that is named is a document.
        limit: records that are wanted of a hub data set; None = all.

    Raises:
        UnmaskError: The name has no file, or one of another kind, or not the split.
    """
    import fsspec

    name, matches, is_folder = find_shipped(name), None, False
    local, known = "://" not in name, (*READERS, ".txt") if text else tuple(READERS)
    try:
        system, path = fsspec.url_to_fs(name)
        if system.isfile(path):
            matches = [path]
        elif is_folder := system.isdir(path):
            matches = system.find(path)
        elif re.search(r"[*?\[]", path):
            matches = [match for match in system.glob(path) if system.isfile(match)]
    except Exception as error:  # every store has its own errors
        raise UnmaskError(f"{name}: cannot be opened ({first_line(error)}).") from error
    if matches is None:
        if local and Path(path).is_symlink():
            raise UnmaskError(f"{name}: no such file: a link to {Path(path).readlink()}, which is not there.")
        if kind_of(name) in (*READERS, ".txt") or not HUB_NAME.fullmatch(name):
            raise UnmaskError(f"{name}: no such file{_suggestion(Path(name).expanduser())}")
        return [Table(name, split, config_name, limit)]
    if is_folder and local:
        if any((Path(path) / of).is_file() for of in ("state.json", "dataset_dict.json")):
            return [Table(name, split, config_name)]
        if of_card := _splits_of_card(name, Path(path), config_name):
            _check_split(name, split, list(of_card))
            return [RecordFile(file, str(Path(file).relative_to(path))) for file in of_card[split]]
    root = path if is_folder else re.split(r"[*?\[]", path)[0].rpartition("/")[0]
    labels = {match: match.removeprefix(root).removeprefix("/") for match in sorted(matches)}
    labels = {match: label for match, label in labels.items() if "/." not in f"/{label}"}
    if is_folder:
        kept = [m for m in labels if kind_of(m) in known and Path(m).name not in NOT_RECORDS]
        splits = {match: _split_of(labels[match]) for match in kept}
        if not splits:
            raise UnmaskError(f"{name}: the folder has no file of a known kind ({KNOWN}).")
        _check_split(name, split, sorted(set(splits.values())))
        labels = {match: labels[match] for match in kept if splits[match] == split}
    elif not labels:
        raise UnmaskError(f"{name}: no file matches.")
    elif split != "train":
        raise UnmaskError(f"{name}: a file has no split {split!r}; remove data.split, or name a folder.")
    for match in labels:
        if (kind := kind_of(match)) in ARCHIVES:
            raise UnmaskError(f"{match}: an archive; unpack it and name the folder.")
        if kind not in READERS and not text:
            hint = "; plain text needs training_mode=pretrain" if kind == ".txt" else ""
            raise UnmaskError(f"{match}: not a file of records; expected {KNOWN}{hint}.")
    return [RecordFile(m if local else system.unstrip_protocol(m), label) for m, label in labels.items()]


def _splits_of_card(name: str, folder: Path, config_name: str | None) -> dict[str, list[str]]:
    """The files of each split that the README.md of a data set names; {} if it names none."""
    card = folder / "README.md"
    if not (card.is_file() and re.search(r"^configs:", card.read_text("utf-8", "replace"), re.MULTILINE)):
        return {}
    from datasets import load_dataset_builder

    try:
        splits = load_dataset_builder(str(folder), config_name).config.data_files or {}
    except Exception as error:
        raise UnmaskError(f"{name}: its README.md cannot be used: {first_line(error)}.") from error
    return {str(split): list(map(str, files)) for split, files in splits.items()}


def _split_of(label: str) -> str:
    """The split that a file's name, or a folder's on the way to it, says; "train" if none does."""
    words = set(re.split(r"[^a-z]+", label.lower()))
    return next((split for split, names in SPLITS.items() if words & set(names)), "train")


def _check_split(name: str, split: str, there: Sequence[str]) -> None:
    if split not in there:
        raise UnmaskError(f"{name}: has no split {split!r} (data.split); it has {', '.join(there)}.")


def _suggestion(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor a folder {path.parent})."
    close = difflib.get_close_matches(
        path.name, [entry.name for entry in path.parent.iterdir() if entry.exists()], n=1
    )
    return f"; did you mean {path.parent / close[0]}?" if close else "."

"""Files, folders, globs, URLs and hub names -> records or documents, each with its location for messages."""

from __future__ import annotations

import csv
import difflib
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast

from unmask.data.hub import HUB_NAME, first_line, offline_hint, require_hub
from unmask.data.records import RecordError
from unmask.errors import UnmaskError

JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
TABLES = (".json", *JSON_LINES, ".parquet", ".csv", ".tsv")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")
RECORD_SUFFIXES = (*TABLES, *(table + end for table in TABLES if table != ".parquet" for end in COMPRESSED))
TEXT_SUFFIXES = (".txt", *(".txt" + end for end in COMPRESSED))
KNOWN = f"{', '.join(TABLES)}, also compressed ({', '.join(COMPRESSED)})"
NOT_RECORDS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # of `datasets`
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
READ = 1 << 20  # bytes read at once
ROWS = 1024  # rows of a table read at once
BOM = b"\xef\xbb\xbf"


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


@dataclass(frozen=True)
class RecordFile:
    """One file of a source: local, or anything that fsspec opens. `label` names it in messages."""

    path: str
    label: str

    @property
    def suffix(self) -> str:
        return suffix_of(self.path)

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        import fsspec

        compression = "infer" if self.suffix.endswith(COMPRESSED) else None
        with fsspec.open(self.path, "rb", compression=compression) as opened:
            yield cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, opened), READ))

    def read(self) -> Iterator[Record]:
        """Yield the records. If the file is broken: those before, then one whose `load` is the error.

        Raises:
            UnmaskError: The file has no record, does not exist, or cannot be read.
        """
        readers = {".parquet": _parquet, ".csv": _csv, ".tsv": _csv, ".json": _json}
        readers |= dict.fromkeys(JSON_LINES, _json_lines)
        reader = readers.get("." + self.suffix[1:].split(".")[0], _text)
        count = 0
        try:
            with self.open() as file:
                try:
                    for data, decode, line in reader(self, file):
                        yield Record(data, decode, self.label, count, line)
                        count += 1
                except (Broken, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
                    if isinstance(error, OSError) and error.errno is not None:
                        raise  # of the disk or the network, not of what the file holds
                    if not isinstance(error, Broken):
                        error = Broken("cannot be decompressed", f" ({first_line(error)})")
                    what = f"{'the rest' if count else 'all'} of {self.label} is left out"
                    bad = Record(None, _same, self.label, count, error.line)
                    counted = f"{error.reason}: {what}"
                    yield bad._replace(data=RecordError(bad.where, error.reason, error.detail, counted))
                    return
        except FileNotFoundError as error:
            raise UnmaskError(f"{self.label}: the file does not exist any more.") from error
        except (OSError, ImportError) as error:
            raise UnmaskError(f"{self.label}: cannot be read ({first_line(error)}).") from error
        if not count and self.suffix in RECORD_SUFFIXES:
            raise UnmaskError(f"{self.label}: the file has no records.")

    def is_array(self) -> bool:
        """Whether it is one JSON array."""
        if not self.suffix.startswith(".json") or self.suffix.startswith(JSON_LINES):
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

        path = Path(self.label).expanduser()
        if not path.is_dir():
            require_hub(self.label, "dataset")
        try:
            if not path.is_dir():
                return load_dataset(self.label, self.config_name, split=self.split, streaming=streaming)
            data = load_from_disk(str(path))
        except Exception as error:  # pyarrow, datasets and the hub client each have their own families
            what = "" if path.is_dir() else "no such local file or folder, and the hub data set "
            reason = f"{what}cannot be loaded (split {self.split!r}): {first_line(error)}"
            raise UnmaskError(f"{self.label}: {reason}.{offline_hint()}") from error
        if isinstance(data, DatasetDict):
            _check_split(self.label, self.split, list(map(str, data)))
            data = data[self.split]
        return data.to_iterable_dataset() if streaming else data

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
    keep_bad: bool = False,
) -> Iterator[tuple[Any, str]]:
    """Yield the records of `name` with their locations, at most `limit` of them.

    `name` is a JSON, JSON-lines, CSV, TSV (also compressed) or Parquet file, a folder or glob of such
    files, a URL that fsspec opens, or a data set on the hub; `split` and `config_name` say which part.

    Args:
        keep_bad: yield the error in place of a line that is not a record, instead of raising it.

    Raises:
        UnmaskError: A missing, empty or broken file, a record that is not an object, or a hub name
            that cannot be read.
    """
    files = find_files([name], split=split, config_name=config_name, limit=limit)
    for record in islice((record for file in files for record in file.read()), limit):
        loaded = record.load()
        if isinstance(loaded, RecordError) and not keep_bad:
            raise loaded
        yield loaded, record.where


def read_documents(
    name: str | Path,
    *,
    text_field: str = "text",
    split: str = "train",
    config_name: str | None = None,
    limit: int | None = None,
) -> Iterator[str]:
    """Yield the texts of `name`, at most `limit` of them, for pre-training.

    A file that is not a table of records (.txt, .py, ...) is one document; of a table or a hub data set
    each record's `text_field` is one. Blank texts are left out.

    Raises:
        UnmaskError: As for `read_records`; a record without `text_field`; text that is not UTF-8.
    """

    def texts() -> Iterator[str]:
        for file in find_files([name], split=split, config_name=config_name, text=True):
            for record in file.read():
                text = document_text(record, text_field)
                if isinstance(text, RecordError):
                    raise text
                if text.strip():
                    yield text

    return islice(texts(), limit)


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
    names: Iterable[str | Path],
    *,
    split: str = "train",
    config_name: str | None = None,
    text: bool = False,
    limit: int | None = None,
) -> list[Source]:
    """Find the files of `names`, each name's in the order of their names; a hub name counts as one.

    Args:
        text: whether any file that is named is a document.
        limit: records that are wanted of a hub data set; None = all.

    Raises:
        UnmaskError: A name has no file, or one of another kind, or not the split.
    """
    return [file for name in map(str, names) for file in _find(name, split, config_name, text, limit)]


def _find(name: str, split: str, config_name: str | None, text: bool, limit: int | None) -> Sequence[Source]:
    import fsspec

    try:
        system, path = fsspec.url_to_fs(name)
        inside = None
        if system.isfile(path):
            matches = [path]
        elif system.isdir(path):
            matches = inside = system.find(path)
        elif re.search(r"[*?\[]", path):
            matches = [match for match in system.glob(path) if system.isfile(match)]
        else:
            matches = None
    except ImportError as error:  # fsspec says which package is missing
        raise UnmaskError(f"{name}: {first_line(error)}.") from error
    except Exception as error:  # every store has errors of its own
        raise UnmaskError(f"{name}: cannot be opened ({first_line(error)}).") from error
    if matches is None:
        bad = suffix_of(name) in (*RECORD_SUFFIXES, *TEXT_SUFFIXES) or name[:1] in "./~\\"
        if bad or not HUB_NAME.fullmatch(name):
            raise UnmaskError(f"{name}: no such file{_suggestion(Path(name).expanduser())}")
        return [Table(name, split, config_name, limit)]
    local = "://" not in name
    if inside is not None and local:
        if any((Path(path) / of).is_file() for of in ("state.json", "dataset_dict.json")):
            return [Table(name, split, config_name)]
        if of_card := _splits_of_card(name, Path(path), config_name):
            _check_split(name, split, list(of_card))
            return [RecordFile(file, str(Path(file).relative_to(path))) for file in of_card[split]]
    root = re.split(r"[*?\[]", path)[0].rpartition("/")[0] if inside is None else path
    labels = {match: match.removeprefix(root).removeprefix("/") for match in sorted(matches)}
    labels = {match: label for match, label in labels.items() if "/." not in f"/{label}"}
    known = (*RECORD_SUFFIXES, *TEXT_SUFFIXES) if text else RECORD_SUFFIXES
    if inside is None:
        for match in labels:
            _check_suffix(match, known, text)
        if not labels:
            raise UnmaskError(f"{name}: no file matches.")
        if split != "train":
            raise UnmaskError(f"{name}: a file has no split {split!r}; remove data.split, or name a folder.")
    else:
        of_data = [m for m in labels if suffix_of(m) in known and Path(m).name not in NOT_RECORDS]
        labels = {match: labels[match] for match in of_data}
        if not labels:
            raise UnmaskError(f"{name}: the folder has no file of a known kind ({KNOWN}).")
        splits = {match: _split_of(label) for match, label in labels.items()}
        _check_split(name, split, sorted(set(splits.values())))
        labels = {match: label for match, label in labels.items() if splits[match] == split}
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
        raise UnmaskError(
            f"{name}: has no split {split!r} (data.split); it has {', '.join(there) or 'none'}."
        )


def _check_suffix(match: str, known: Sequence[str], any_suffix: bool) -> None:
    if match.lower().endswith(ARCHIVES) or re.search(r"\.tar\.\w+$", match.lower()):
        raise UnmaskError(f"{match}: an archive; unpack it and name the folder.")
    if suffix_of(match) not in known and not any_suffix:
        hint = "; plain text needs training_mode=pretrain" if ".txt" in suffix_of(match) else ""
        raise UnmaskError(f"{match}: not a file of records; expected {KNOWN}{hint}.")


def _suggestion(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor a folder {path.parent})."
    close = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else "."


# Readers: (data, decode, line of the file or 0) of each record.
Read = Iterator[tuple[Any, Callable[[Any], Any], int]]


def _starts_array(opened: BinaryIO) -> bool:
    return cast(io.BufferedReader, opened).peek(4096)[:4096].removeprefix(BOM).lstrip().startswith(b"[")


def _json(file: RecordFile, opened: BinaryIO) -> Read:
    """One array of records, or JSON lines."""
    if not _starts_array(opened):
        yield from _json_lines(file, opened)
        return
    try:
        records = json.loads(_decoded(opened.read()), object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise Broken("not valid JSON", f" ({error.msg}, column {error.colno})", error.lineno) from error
    except (RecursionError, ValueError) as error:
        raise Broken("not valid JSON", f" ({_beyond(error)})") from error
    for record in records:
        yield record, _object, 0


def _json_lines(file: RecordFile, opened: BinaryIO) -> Read:
    for line, text in enumerate(opened, 1):
        if line == 1:
            text = text.removeprefix(BOM)
        if text and not text.isspace():
            yield text, _json_record, line


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Broken(f"key {twice[:40]!r} is given twice", "; remove one of them")
    return found


def _json_record(line: bytes) -> Any:
    try:
        return _object(json.loads(_decoded(line.rstrip(b"\r\n")), object_pairs_hook=_once))
    except json.JSONDecodeError as error:
        detail = f" ({error.msg}, column {error.colno}); expected one record a line, or in a .json file one"
        raise Broken("not valid JSON", f"{detail} array of records") from error
    except (RecursionError, ValueError) as error:
        raise Broken("not valid JSON", f" ({_beyond(error)})") from error


def _object(record: Any) -> Any:
    if not isinstance(record, dict):
        kind = {list: "a list", str: "text"}.get(type(record), repr(record)[:40])
        raise Broken("expected a record {...}", f"; got {kind}")
    return record


def _beyond(error: Exception) -> str:
    """What is JSON, but more than Python reads."""
    return "nested too deeply" if isinstance(error, RecursionError) else "a number of too many digits"


def _csv(file: RecordFile, opened: BinaryIO) -> Read:
    # The csv module rather than `datasets`: every cell stays the text it is ("007" is not a number).
    csv.field_size_limit(2**31 - 1)
    # Bytes that are not UTF-8 come as unpaired surrogates, so that their record is known.
    text = io.TextIOWrapper(opened, encoding="utf-8-sig", errors="surrogateescape", newline="")
    try:
        rows = csv.DictReader(text, strict=True, delimiter="\t" if ".tsv" in file.suffix else ",")
        _check_unique(file, list(rows.fieldnames or ()))
        for row in rows:
            yield row, _csv_row, 0
    except csv.Error as error:
        raise Broken("not valid CSV", f" ({error})") from error
    finally:
        text.detach()  # or it would close the file


def _check_unique(file: RecordFile, names: list[str]) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise UnmaskError(f"{file.label}: column {twice[0]!r} is given twice; remove or rename one.")


def _csv_row(row: dict[str | None, Any]) -> Any:
    if None in row:
        raise Broken("more cells than the header has names")
    try:
        "".join(text or "" for text in (*cast(Any, row), *row.values())).encode()
    except UnicodeEncodeError as error:
        raise Broken("not UTF-8 text", "; save the file as UTF-8") from error
    return {name: cell for name, cell in row.items() if cell is not None}


def _parquet(file: RecordFile, opened: BinaryIO) -> Read:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(opened)
        _check_unique(file, list(table.schema_arrow.names))
        for batch in table.iter_batches(batch_size=ROWS):
            yield from (((batch, row), _arrow_row, 0) for row in range(len(batch)))
    except (ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise Broken("not a readable Parquet file", f" ({first_line(error)})") from error


def _arrow_row(place: tuple[Any, int]) -> Any:
    table, row = place
    try:
        return table.slice(row, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        raise Broken("not UTF-8 text") from error


def _text(file: RecordFile, opened: BinaryIO) -> Read:
    if (text := _decoded(opened.read())).strip():
        yield text, _same, 0


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start)
        byte = error.start - data.rfind(b"\n", 0, error.start)
        raise Broken(
            "not UTF-8 text", f" (byte {byte} of the line); save the file as UTF-8", line + 1
        ) from error


def _same(record: Any) -> Any:
    return record


def suffix_of(path: str) -> str:
    suffixes = [suffix.lower() for suffix in PurePosixPath(path).suffixes[-2:]]
    return "".join(suffixes) if suffixes[-1:] and suffixes[-1] in COMPRESSED else "".join(suffixes[-1:])

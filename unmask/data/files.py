"""Files, folders, globs, URLs and hub names -> records or documents, each with its location for messages."""

from __future__ import annotations

import csv
import difflib
import glob
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from unmask.data.hub import HUB_NAME, first_line, offline_hint, require_hub
from unmask.data.records import BadRecord
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
BETWEEN = re.compile(r"[\s,]*")  # the records of an array


class Record(NamedTuple):
    """A record as it was read, not yet decoded, so that passing over it costs little."""

    data: Any
    decode: Callable[[Any], Any]
    label: str  # of its file
    index: int  # among the records of its file, from 0
    line: int = 0  # of its file; 0 = count records
    whole: bool = False  # the file is one document

    @property
    def where(self) -> str:
        """The record's location, for messages: "alpaca.json record 17" or "x.jsonl line 4", from 1."""
        if self.whole:
            return self.label
        return f"{self.label} line {self.line}" if self.line else f"{self.label} record {self.index + 1}"

    def load(self) -> Any:
        """Return the record, a BadRecord in place of a bad one, or the text of a whole text file."""
        return self.decode(self.data)


class Broken(Exception):
    """From here on a file cannot be read; `line` 0 = the next record, -1 = the file."""

    def __init__(self, reason: str, detail: str, line: int = 0):
        super().__init__(reason)
        self.reason, self.detail, self.line = reason, detail, line


@dataclass(frozen=True)
class RecordFile:
    """One file of a source: local, or anything that fsspec opens. `label` names it in messages."""

    path: str
    label: str

    @property
    def suffix(self) -> str:
        return suffix_of(Path(self.path))

    @property
    def remote(self) -> bool:
        """Whether reading it may cost more than a look at a disk."""
        return is_url(self.path)

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        import fsspec

        compression = self.suffix.endswith(COMPRESSED) and "infer"
        with fsspec.open(self.path, "rb", compression=compression or None) as opened:
            yield cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, opened), READ))

    def read(self) -> Iterator[Record]:
        """Yield the records. If the file is broken: those before, then a BadRecord for the rest of it.

        Raises:
            UnmaskError: The file has no record, does not exist, or cannot be read.
        """
        suffix = next(
            (self.suffix.removesuffix(e) for e in COMPRESSED if self.suffix.endswith(e)), self.suffix
        )
        readers = {".parquet": _parquet, ".csv": _csv, ".tsv": _csv, ".json": _json}
        reader = readers.get(suffix, _json_lines if suffix in JSON_LINES else _text)
        last = -1
        try:
            with self.open() as file:
                try:
                    for last, (data, decode, line) in enumerate(reader(self, file)):
                        yield Record(data, decode, self.label, last, line, reader is _text)
                except (Broken, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
                    if isinstance(error, OSError) and error.errno is not None:
                        raise  # of the disk or the network, not of what the file holds
                    if not isinstance(error, Broken):
                        error = Broken("cannot be decompressed", f" ({first_line(error)})")
                    what = f"the rest of {self.label}" if last >= 0 else f"all of {self.label}"
                    bad = BadRecord(error.reason, error.detail, f"{error.reason}: {what} is left out")
                    yield Record(bad, _same, self.label, last + 1, max(0, error.line), error.line < 0)
                    return
        except FileNotFoundError as error:
            raise UnmaskError(f"{self.label}: the file does not exist any more.") from error
        except (OSError, ImportError) as error:
            raise UnmaskError(f"{self.label}: cannot be read ({first_line(error)}).") from error
        if last < 0 and self.suffix in RECORD_SUFFIXES:
            raise UnmaskError(f"{self.label}: the file has no records.")

    def is_array(self) -> bool:
        """Whether it is one JSON array."""
        if not self.suffix.startswith(".json") or self.suffix.startswith(JSON_LINES):
            return False
        with self.open() as opened, suppress(EOFError, zlib.error, OSError):
            return opened.read(4096).removeprefix(BOM).lstrip().startswith(b"[")
        return False

    def stamp(self) -> list[Any]:
        """What changes when the file does: its path, size and time, or what its store says of it."""
        if is_url(self.path):
            import fsspec

            system, path = fsspec.url_to_fs(self.path)
            return [self.path, str(system.info(path))]
        stat = Path(self.path).stat()
        return [str(Path(self.path).absolute()), stat.st_size, stat.st_mtime_ns]


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
        try:
            if not path.is_dir():
                require_hub(self.label, "dataset")
                return load_dataset(self.label, self.config_name, split=self.split, streaming=streaming)
            data = load_from_disk(str(path))
        except UnmaskError:
            raise
        except Exception as error:  # pyarrow, datasets and the hub client each have their own families
            what = (
                "cannot be loaded" if path.is_dir() else "no such local file or folder, and the hub data set"
            )
            what += "" if path.is_dir() else " cannot be loaded"
            raise UnmaskError(
                f"{self.label}: {what} (split {self.split!r}): {first_line(error)}.{offline_hint()}"
            ) from error
        if isinstance(data, DatasetDict):
            _check_split(self.label, self.split, list(map(str, data)))
            data = data[self.split]
        return data.to_iterable_dataset() if streaming else data

    def read(self) -> Iterator[Record]:
        """Yield the records.

        Raises:
            UnmaskError: The data set cannot be loaded.
        """
        data = self.open(streaming=self.limit is not None)
        index = 0
        for table in data.with_format("arrow").iter(batch_size=ROWS):
            for row in range(len(table)):
                yield Record((table, row), _arrow_row, self.label, index)
                index += 1

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
        keep_bad: yield a `BadRecord` in place of a line that is not a record, instead of raising.

    Raises:
        UnmaskError: A missing, empty or broken file, a record that is not an object, or a hub name
            that cannot be read.
    """
    files = find_files([name], split=split, config_name=config_name, limit=limit)
    for record in islice((record for file in files for record in file.read()), limit):
        loaded = record.load()
        if isinstance(loaded, BadRecord) and not keep_bad:
            raise loaded.error(record.where)
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
                text = document_text(record.load(), text_field)
                if isinstance(text, BadRecord):
                    raise text.error(record.where)
                if text.strip():
                    yield text

    return islice(texts(), limit)


def document_text(record: Any, field: str) -> Any:
    """Return the text of a record, or of a whole text file, or a BadRecord."""
    if isinstance(record, str | BadRecord):
        return record
    text = record.get(field)
    if isinstance(text, str):
        return text
    what = "is not text" if text is not None else "is missing"
    detail = f"; fields here: {', '.join(map(str, record))}; set data.text_field"
    return BadRecord(f"field '{field}' {what}", detail)


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
    found: list[Source] = []
    for name in map(str, names):
        found += _find(name, split, config_name, text, limit)
    return found


def _find(name: str, split: str, config_name: str | None, text: bool, limit: int | None) -> Sequence[Source]:
    suffixes = (*RECORD_SUFFIXES, *TEXT_SUFFIXES) if text else RECORD_SUFFIXES
    if is_url(name):
        return _find_remote(name, suffixes, text)
    path = Path(name).expanduser()
    if path.is_file():
        if split != "train":
            raise UnmaskError(f"{name}: a file has no split {split!r}; remove data.split, or name a folder.")
        return _checked(name, [str(path)], suffixes, text, [path.name])
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return [Table(name, split, config_name)]
        return _find_inside(name, path, split, config_name, suffixes)
    if glob.has_magic(name):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        return _checked(name, [str(p) for p in matches if p.is_file()], suffixes, text)
    known = suffix_of(Path(name)) in (*RECORD_SUFFIXES, *TEXT_SUFFIXES)
    if known or name[:1] in "./~\\" or not HUB_NAME.fullmatch(name):
        raise UnmaskError(f"{name}: no such file{_suggestion(path)}")
    return [Table(name, split, config_name, limit)]


def _find_inside(
    name: str, path: Path, split: str, config_name: str | None, suffixes: tuple[str, ...]
) -> list[RecordFile]:
    """The files of one split of a folder, as its README says or as they are named."""
    card = path / "README.md"
    if card.is_file() and re.search(r"^configs:", card.read_text("utf-8", "replace"), re.MULTILINE):
        from datasets import load_dataset_builder

        try:
            of_splits = load_dataset_builder(str(path), config_name).config.data_files
        except Exception as error:
            raise UnmaskError(f"{name}: its README.md cannot be used: {first_line(error)}.") from error
        splits = {str(key): list(map(str, files)) for key, files in (of_splits or {}).items()}
        _check_split(name, split, list(splits))
        return [RecordFile(file, str(Path(file).relative_to(path.absolute()))) for file in splits[split]]
    inside = sorted(p for p in path.rglob("*") if p.is_file() and suffix_of(p) in suffixes)
    inside = [p for p in inside if "/." not in f"/{p.relative_to(path).as_posix()}"]
    inside = [p for p in inside if p.name not in NOT_RECORDS]
    if not inside:
        raise UnmaskError(f"{name}: the folder has no file of a known kind ({KNOWN}).")
    by_split: dict[str, list[Path]] = {}
    for file in inside:
        by_split.setdefault(_split_of(file.relative_to(path)), []).append(file)
    _check_split(name, split, list(by_split))
    return [RecordFile(str(p), str(p.relative_to(path))) for p in by_split[split]]


def _split_of(file: Path) -> str:
    """The split that a file's name, or a folder's on the way to it, says; "train" if none does."""
    words = re.split(r"[^a-z]+", file.as_posix().lower())
    return next((split for split, names in SPLITS.items() if set(names) & set(words)), "train")


def _check_split(name: str, split: str, there: Sequence[str]) -> None:
    if split not in there:
        raise UnmaskError(
            f"{name}: has no split {split!r} (data.split); it has {', '.join(there) or 'none'}."
        )


def _checked(
    name: str,
    matches: list[str],
    suffixes: tuple[str, ...],
    any_suffix: bool,
    labels: Sequence[str] | None = None,
) -> list[RecordFile]:
    if not matches:
        raise UnmaskError(f"{name}: no file matches.")
    for match in matches:
        if match.lower().endswith(ARCHIVES) or re.search(r"\.tar\.\w+$", match.lower()):
            raise UnmaskError(f"{match}: an archive; unpack it and name the folder.")
        if suffix_of(Path(match)) not in suffixes and not any_suffix:
            hint = "; plain text needs training_mode=pretrain" if ".txt" in suffix_of(Path(match)) else ""
            raise UnmaskError(f"{match}: not a file of records; expected {KNOWN}{hint}.")
    return [RecordFile(match, label) for match, label in zip(matches, labels or matches, strict=True)]


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
    return _checked(name, matches, suffixes, any_suffix)


def _suggestion(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f" (nor a folder {path.parent})."
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else "."


Read = Iterator[tuple[Any, Callable[[Any], Any], int]]
"""(data, decode, line of the file or 0) of each record."""


def _json(file: RecordFile, opened: BinaryIO) -> Read:
    """One array of records, or JSON lines."""
    head = cast(io.BufferedReader, opened).peek(4096)[:4096]
    if not head.removeprefix(BOM).lstrip().startswith(b"["):
        yield from _json_lines(file, opened)
        return
    data = opened.read()
    broken = None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        text = data[: error.start].decode("utf-8-sig")
        line = data.count(b"\n", 0, error.start) + 1
        broken = Broken("not UTF-8 text", "; save the file as UTF-8", line)
    decoder, plain = json.JSONDecoder(object_pairs_hook=_once), json.JSONDecoder()
    at = text.index("[") + 1
    while True:
        start = BETWEEN.match(text, at).end()  # pyright: ignore[reportOptionalMemberAccess]
        try:
            record, at = decoder.raw_decode(text, start)
        except DuplicateKey as error:
            record, (_, at) = BadRecord(*error.said), plain.raw_decode(text, start)
        except (RecursionError, ValueError):
            break
        yield record, _object, 0
    try:
        if broken is None:
            json.loads(text)
            return
    except json.JSONDecodeError as error:
        broken = Broken("not valid JSON", f" ({error.msg}, column {error.colno})", error.lineno)
    except (RecursionError, ValueError) as error:
        broken = Broken("not valid JSON", f" ({_beyond(error)})", -1)
    raise broken


def _json_lines(file: RecordFile, opened: BinaryIO) -> Read:
    for line, text in enumerate(opened, 1):
        if line == 1:
            text = text.removeprefix(BOM)
        if text and not text.isspace():
            yield text, _json_line, line


class DuplicateKey(ValueError):
    """An object has one key twice."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.said = (f"key {key[:40]!r} is given twice", "; remove one of them")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise DuplicateKey(next(name for name in names if names.count(name) > 1))
    return found


def _json_line(line: bytes) -> Any:
    try:
        return _object(json.loads(line.rstrip(b"\r\n").decode("utf-8"), object_pairs_hook=_once))
    except UnicodeDecodeError as error:
        return BadRecord("not UTF-8 text", f" (byte {error.start + 1} of the line); save the file as UTF-8")
    except json.JSONDecodeError as error:
        detail = f" ({error.msg}, column {error.colno}); expected one record a line, or in a .json file one"
        return BadRecord("not valid JSON", f"{detail} array of records")
    except DuplicateKey as error:
        return BadRecord(*error.said)
    except (RecursionError, ValueError) as error:
        return BadRecord("not valid JSON", f" ({_beyond(error)})")


def _beyond(error: Exception) -> str:
    """What is JSON, but more than Python reads."""
    return "nested too deeply" if isinstance(error, RecursionError) else "a number of too many digits"


def _object(record: Any) -> Any:
    if isinstance(record, dict | BadRecord):
        return record
    kind = {list: "a list", str: "text"}.get(type(record), repr(record)[:40])
    return BadRecord("expected a record {...}", f"; got {kind}")


def _csv(file: RecordFile, opened: BinaryIO) -> Read:
    # The csv module rather than `datasets`: every cell stays the text it is ("007" is not a number).
    csv.field_size_limit(2**31 - 1)
    # Bytes that are not UTF-8 come as unpaired surrogates, so that their record is known.
    text = io.TextIOWrapper(opened, encoding="utf-8-sig", errors="surrogateescape", newline="")
    try:
        rows = csv.DictReader(text, strict=True, delimiter="\t" if ".tsv" in file.suffix else ",")
        _unique(file, list(rows.fieldnames or ()))
        for row in rows:
            yield row, _csv_row, 0
    except csv.Error as error:
        raise Broken("not valid CSV", f" ({error})") from error
    finally:
        text.detach()  # or it would close the file


def _unique(file: RecordFile, names: list[str]) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise UnmaskError(f"{file.label}: column {twice[0]!r} is given twice; remove or rename one.")


def _csv_row(row: dict[str | None, Any]) -> Any:
    if None in row:
        return BadRecord("more cells than the header has names")
    for text in (*row, *row.values()):
        try:
            (text or "").encode()
        except UnicodeEncodeError:
            return BadRecord("not UTF-8 text", "; save the file as UTF-8")
    return {name: cell for name, cell in row.items() if cell is not None}


def _parquet(file: RecordFile, opened: BinaryIO) -> Read:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    read = False
    try:
        table = ParquetFile(opened)
        _unique(file, list(table.schema_arrow.names))
        for batch in table.iter_batches(batch_size=ROWS):
            for row in range(len(batch)):
                read = True
                yield (batch, row), _arrow_row, 0
    except (ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        detail = f" ({first_line(error)})"
        raise Broken("not a readable Parquet file", detail, 0 if read else -1) from error


def _arrow_row(place: tuple[Any, int]) -> Any:
    table, row = place
    try:
        return table.slice(row, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return BadRecord("not UTF-8 text")


def _text(file: RecordFile, opened: BinaryIO) -> Read:
    data = opened.read()
    if data.removeprefix(BOM).strip():
        yield data, _decoded, 0


def _decoded(data: bytes) -> Any:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return BadRecord("not UTF-8 text", f" (line {line}, byte {error.start + 1}); save the file as UTF-8")


def _same(record: Any) -> Any:
    return record


def is_url(name: str) -> bool:
    return "://" in name


def suffix_of(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return "".join(suffixes) if suffixes[-1:] and suffixes[-1] in COMPRESSED else "".join(suffixes[-1:])

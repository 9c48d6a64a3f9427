"""Files, folders, globs, hub names and URLs -> records or documents, each with its place for messages.

Every file is read record by record from any place in it, so that a stream can go on where it was; in memory
is the same reading from the start to the end.
"""

from __future__ import annotations

import csv
import difflib
import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from unmask.data.conversation import BadRecord
from unmask.data.hub import HUB_NAME, first_line, offline_hint, require_hub
from unmask.errors import UnmaskError

RECORD_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet", ".csv")
TEXT_SUFFIXES = (".txt",)
READ = 1 << 20  # bytes read at once
ROWS = 1024  # rows of a Parquet file or hub data set read at once
BOM = b"\xef\xbb\xbf"


class Place(NamedTuple):
    """Where reading a file goes on: records, bytes and lines before it (the last two for JSON lines)."""

    number: int = 0
    offset: int = 0
    line: int = 0


START = Place()


class Raw(NamedTuple):
    """A record as it was read, not yet decoded: most of a stream is for other processes to decode."""

    data: Any
    decode: Callable[[Any], Any]
    label: str  # of its file
    number: int
    unit: str = "record"  # what it is the number of; "" = the file is one document

    @property
    def where(self) -> str:
        """The record's place, for messages."""
        return f"{self.label} {self.unit} {self.number}" if self.unit else self.label

    def record(self) -> Any:
        """Return the record, a BadRecord in the place of a bad one, or the text of a whole text file."""
        return self.decode(self.data)


@dataclass(frozen=True)
class RecordFile:
    """One file of a source: local, or anything that fsspec opens. `label` names it in messages."""

    path: str
    label: str

    @property
    def suffix(self) -> str:
        return _suffix(Path(self.path))

    def open(self) -> BinaryIO:
        if not _is_url(self.path):
            return open(self.path, "rb", READ)
        import fsspec

        system, path = fsspec.url_to_fs(self.path)
        return io.BufferedReader(system.open(path, "rb"), READ)  # whose own lines are slow

    def read(self, start: Place = START) -> Iterator[tuple[Raw, Place]]:
        """Yield the records from `start` on, each with the place after it.

        Raises:
            UnmaskError: The file is gone, was cut, or cannot be read.
        """
        readers = {".parquet": _parquet, ".csv": _csv}
        reader = readers.get(self.suffix, _json if self.suffix in RECORD_SUFFIXES else _text)
        try:
            with self.open() as file:
                if start.offset and not self.suffix.endswith(".gz"):
                    size = file.seek(0, io.SEEK_END)
                    if size < start.offset:
                        raise UnmaskError(
                            f"{self.label}: has {size:,} bytes, but {start.offset:,} have been read of it"
                            " already: it changed during the run; put the file back as it was."
                        )
                    file.seek(0)
                yield from reader(self, file, start)
        except FileNotFoundError as error:
            raise UnmaskError(
                f"{self.label}: the file is gone; it was there when the run began: put it back, and go on"
                " with resume_from_checkpoint=auto."
            ) from error
        except (OSError, EOFError, zlib.error) as error:
            raise UnmaskError(f"{self.label}: cannot be read ({first_line(error)}).") from error


@dataclass(frozen=True)
class HubShard:
    """One shard of a data set on the hub, streamed by `datasets`."""

    dataset: Any
    index: int
    label: str

    def read(self, start: Place = START) -> Iterator[tuple[Raw, Place]]:
        """Yield the records from `start` on, each with the place after it.

        Raises:
            UnmaskError: The shard cannot be read.
        """
        try:
            shard = self.dataset.with_format("arrow").shard(self.dataset.num_shards, self.index)
            tables = shard.skip(start.number).iter(batch_size=ROWS)
            yield from _rows(tables, self.label, start.number)
        except UnmaskError:
            raise
        except Exception as error:  # pyarrow, datasets and the hub client each have their own families
            raise UnmaskError(f"{self.label}: cannot be read ({first_line(error)}).") from error


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
    files = _find(str(name), RECORD_SUFFIXES)
    if files is None:
        records = _hub_records(str(name), split, config_name, limit)
    else:
        records = (item for file in files for item in _all_records(file))
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
    texts = read_texts(name, text_field=text_field, split=split, config_name=config_name)
    return islice((text for text, _ in _checked(texts, keep_bad=False)), limit)


def read_texts(
    name: str | Path, *, text_field: str = "text", split: str = "train", config_name: str | None = None
) -> Iterator[tuple[Any, str]]:
    """Yield the texts of `read_documents` with their places, a `BadRecord` for each that is bad.

    Raises:
        UnmaskError: A missing, empty or broken file, or a hub name that cannot be read.
    """
    files = _find(str(name), (*RECORD_SUFFIXES, *TEXT_SUFFIXES), any_suffix=True)
    if files is None:
        records = _hub_records(str(name), split, config_name, None)
    else:
        # Of many text files some may well be empty.
        records = (item for file in files for item in _all_records(file, len(files) > 1))
    for record, where in records:
        text = document_text(record, text_field)
        if not isinstance(text, str) or text.strip():
            yield text, where


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


def open_files(
    name: str, *, split: str = "train", config_name: str | None = None, text: bool = False
) -> list[RecordFile | HubShard]:
    """Find the files of a streamed source, in the order of their names; nothing is read but their names.

    Args:
        text: whether a file that is no table of records is a document.

    Raises:
        UnmaskError: There is none, or one is a JSON array, which cannot be read record by record.
    """
    suffixes = (*RECORD_SUFFIXES, *TEXT_SUFFIXES) if text else RECORD_SUFFIXES
    files = _find(name, suffixes, any_suffix=text)
    if files is None:
        return _hub_shards(name, split, config_name)
    for file in files:
        if file.suffix in (".json", ".json.gz") and _is_array(file):
            raise UnmaskError(
                f"{file.label}: a JSON array cannot be streamed, since it ends where the file ends; write one"
                " record a line (.jsonl), or set data.streaming=false."
            )
    return list(files)


def _checked(records: Iterator[tuple[Any, str]], keep_bad: bool) -> Iterator[tuple[Any, str]]:
    for record, where in records:
        if isinstance(record, BadRecord) and not keep_bad:
            raise record.error(where)
        yield record, where


def _all_records(file: RecordFile, may_be_empty: bool = False) -> Iterator[tuple[Any, str]]:
    """The records of one file; an empty file is an error."""
    empty = True
    for raw, _ in file.read():
        empty = False
        yield raw.record(), raw.where
    if file.suffix in RECORD_SUFFIXES and empty:
        raise UnmaskError(f"{file.label}: the file holds no records.")
    if empty and not may_be_empty:
        raise UnmaskError(f"{file.label}: the file is empty.")


def _find(name: str, suffixes: tuple[str, ...], any_suffix: bool = False) -> list[RecordFile] | None:
    """The files that `name` stands for; None for a hub name."""
    known = ", ".join(suffixes)
    if _is_url(name):
        return _find_remote(name, suffixes, any_suffix)
    path = Path(name).expanduser()
    if path.is_file():
        if _suffix(path) not in suffixes and not any_suffix:
            hint = "; plain text needs training_mode=pretrain" if path.suffix == ".txt" else ""
            raise UnmaskError(f"{name}: not a file of records; expected {known}{hint}.")
        return [RecordFile(str(path), path.name)]
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file() and _suffix(p) in suffixes)
        inside = [p for p in inside if "/." not in f"/{p.relative_to(path).as_posix()}"]
        if not inside:
            raise UnmaskError(f"{name}: the folder holds no file of a known kind ({known}).")
        return [RecordFile(str(p), str(p.relative_to(path))) for p in inside]
    if glob.has_magic(name):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        matches = [str(p) for p in matches if p.is_file()]
        return _known_files(name, matches, suffixes, any_suffix)
    if _looks_like_path(name):
        raise UnmaskError(f"{name}: no such file{_suggestion(path)}")
    return None


def _known_files(
    name: str, matches: list[str], suffixes: tuple[str, ...], any_suffix: bool
) -> list[RecordFile]:
    if not matches:
        raise UnmaskError(f"{name}: no file matches.")
    if wrong := [p for p in matches if _suffix(Path(p)) not in suffixes and not any_suffix]:
        raise UnmaskError(f"{wrong[0]}: not a file of records; expected {', '.join(suffixes)}.")
    return [RecordFile(p, p) for p in matches]


def _find_remote(name: str, suffixes: tuple[str, ...], any_suffix: bool) -> list[RecordFile]:
    import fsspec

    try:
        system, path = fsspec.url_to_fs(name)
        if glob.has_magic(path):
            found = [p for p in system.glob(path) if system.isfile(p)]
        elif system.isdir(path):
            found = [p for p in system.find(path) if _suffix(Path(p)) in suffixes]
        else:
            found = [path] if system.exists(path) else []
        matches = sorted(system.unstrip_protocol(p) for p in cast(list[str], found))
    except ImportError as error:  # fsspec says which package is missing
        raise UnmaskError(f"{name}: {first_line(error)}.") from error
    except Exception as error:  # every store has errors of its own
        raise UnmaskError(f"{name}: cannot be opened ({first_line(error)}).") from error
    return _known_files(name, matches, suffixes, any_suffix)


def _is_url(name: str) -> bool:
    return "://" in name


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


def _same(record: Any) -> Any:
    return record


def _json(file: RecordFile, opened: BinaryIO, start: Place) -> Iterator[tuple[Raw, Place]]:
    if file.suffix.endswith(".gz"):
        opened = cast(BinaryIO, io.BufferedReader(cast(Any, gzip.GzipFile(fileobj=opened)), READ))
    if start.offset == 0 and file.suffix.startswith(".json") and not file.suffix.startswith(".jsonl"):
        head = opened.read(4096)
        opened.seek(0)
        if head.removeprefix(BOM).lstrip().startswith(b"["):
            for number, record in enumerate(_json_array(opened.read(), file.label), 1):
                yield Raw(record, _object, file.label, number), Place(number)
            return
    number, offset, line = start
    label = file.label
    opened.seek(offset)
    for text in opened:
        line += 1
        offset += len(text)
        if line == 1:
            text = text.removeprefix(BOM)
        if text and not text.isspace():
            number += 1
            yield Raw(text, _json_line, label, line, "line"), Place(number, offset, line)


def _json_line(line: bytes) -> Any:
    try:
        return _object(json.loads(line.rstrip(b"\r\n").decode("utf-8")))
    except UnicodeDecodeError as error:
        return BadRecord("not UTF-8 text", f" (byte {error.start + 1} of the line); save the file as UTF-8")
    except json.JSONDecodeError as error:
        detail = f" ({error.msg}, column {error.colno}); expected one record a line, or in a .json file one"
        return BadRecord("not valid JSON", f"{detail} array of records")
    except (RecursionError, ValueError) as error:
        return BadRecord("not valid JSON", f" ({_beyond(error)})")


def _beyond(error: Exception) -> str:
    """What is JSON, but more than Python reads."""
    return "nested too deeply" if isinstance(error, RecursionError) else "a number of too many digits"


def _object(record: Any) -> Any:
    if isinstance(record, dict):
        return record
    kind = {list: "a list", str: "text"}.get(type(record), repr(record)[:40])
    return BadRecord("expected a record {...}", f"; got {kind}")


def _json_array(data: bytes, label: str) -> list[Any]:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UnmaskError(
            f"{label} line {error.lineno}: not valid JSON ({error.msg}, column {error.colno})."
        ) from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UnmaskError(f"{label} line {line}: not UTF-8 text; save the file as UTF-8.") from error
    except (RecursionError, ValueError) as error:
        raise UnmaskError(f"{label}: not valid JSON ({_beyond(error)}).") from error


def _is_array(file: RecordFile) -> bool:
    with file.open() as opened:
        head = (cast(Any, gzip.GzipFile(fileobj=opened)) if file.suffix.endswith(".gz") else opened).read(
            4096
        )
    return head.removeprefix(BOM).lstrip().startswith(b"[")


def _csv(file: RecordFile, opened: BinaryIO, start: Place) -> Iterator[tuple[Raw, Place]]:
    # The csv module rather than `datasets`: every cell stays the text it is ("007" is no number).
    csv.field_size_limit(2**31 - 1)
    number = 0
    # Bytes that are no UTF-8 come as half surrogates, so that the record they stand in is known.
    text = io.TextIOWrapper(opened, encoding="utf-8-sig", errors="surrogateescape", newline="")
    try:
        for number, row in enumerate(csv.DictReader(text, strict=True), 1):
            if number > start.number:
                yield Raw(row, _csv_row, file.label, number), Place(number)
    except csv.Error as error:
        raise UnmaskError(f"{file.label} record {number + 1}: not valid CSV ({error}).") from error
    finally:
        text.detach()  # or it would close the file that is its caller's


def _csv_row(row: dict[str | None, Any]) -> Any:
    if None in row:
        return BadRecord("more cells than the header has names")
    for text in (*row, *row.values()):
        try:
            (text or "").encode()
        except UnicodeEncodeError:
            return BadRecord("not UTF-8 text", "; save the file as UTF-8")
    return {name: cell for name, cell in row.items() if cell is not None}


def _parquet(file: RecordFile, opened: BinaryIO, start: Place) -> Iterator[tuple[Raw, Place]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(opened)
        groups = [table.metadata.row_group(index).num_rows for index in range(table.num_row_groups)]
        first, before = 0, 0
        while first < len(groups) and before + groups[first] <= start.number:
            before += groups[first]
            first += 1
        batches = table.iter_batches(batch_size=ROWS, row_groups=list(range(first, len(groups))))
        skipped = _skip(batches, start.number - before)
        yield from _rows(skipped, file.label, start.number)
    except (ArrowException, UnicodeDecodeError) as error:
        raise UnmaskError(f"{file.label}: not a readable Parquet file ({first_line(error)}).") from error


def _skip(batches: Iterator[Any], rows: int) -> Iterator[Any]:
    for batch in batches:
        if rows >= len(batch):
            rows -= len(batch)
        else:
            yield batch.slice(rows)
            rows = 0


def _rows(tables: Iterator[Any], label: str, number: int) -> Iterator[tuple[Raw, Place]]:
    """The rows of Arrow tables or record batches; `number` rows came before."""
    for table in tables:
        for row in range(len(table)):
            number += 1
            yield Raw((table, row), _arrow_row, label, number), Place(number)


def _arrow_row(place: tuple[Any, int]) -> dict[str, Any]:
    table, row = place
    return table.slice(row, 1).to_pylist()[0]


def _text(file: RecordFile, opened: BinaryIO, start: Place) -> Iterator[tuple[Raw, Place]]:
    if start.number == 0:
        data = opened.read()
        if not data.removeprefix(BOM).strip():
            return
        yield Raw(data, _decoded, file.label, 1, ""), Place(1)


def _decoded(data: bytes) -> Any:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return BadRecord("not UTF-8 text", f" (line {line}, byte {error.start + 1}); save the file as UTF-8")


def _hub_records(
    name: str, split: str, config_name: str | None, limit: int | None
) -> Iterator[tuple[dict[str, Any], str]]:
    # With a limit the records are streamed: a few of many need no download of all.
    rows = _load_hub(name, split, config_name, streaming=limit is not None)
    for number, row in enumerate(rows, 1):
        yield dict(row), f"{name} record {number}"


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

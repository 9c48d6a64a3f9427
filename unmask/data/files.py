"""One file of records, read record by record from any place in it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

from unmask.data.conversation import BadRecord
from unmask.data.encode import SOURCE_BIT
from unmask.data.hub import first_line
from unmask.errors import UnmaskError

RECORD_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet", ".csv")
TEXT_SUFFIXES = (".txt",)
READ = 1 << 20  # bytes read at once
ROWS = 1024  # rows of a Parquet file or hub data set read at once
BOM = b"\xef\xbb\xbf"
BETWEEN = re.compile(r"[\s,]*")  # the records of an array


class Place(NamedTuple):
    """Where reading a file goes on: records, bytes and lines before it (the last two for JSON lines).

    `offset` -1: nothing more of it can be read.
    """

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


class Labelled(Protocol):
    """What has a name for messages."""

    @property
    def label(self) -> str: ...


class Broken(Exception):
    """From here on a file cannot be read; `number` counts its `unit`, None = the next record."""

    def __init__(self, reason: str, detail: str, number: int | None = None, unit: str = "record"):
        super().__init__(reason)
        self.reason, self.detail, self.number, self.unit = reason, detail, number, unit

    def at(self, label: str, last: Place) -> tuple[Raw, Place]:
        """Return the bad record that stands for the rest of the file, which was read up to `last`."""
        what = f"the rest of {label}" if last.number else f"all of {label}"
        bad = BadRecord(self.reason, self.detail, f"{self.reason}: {what} is left out")
        number = last.number + 1 if self.number is None else self.number
        return Raw(bad, _same, label, number, self.unit), Place(last.number + 1, -1)


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

    def open(self) -> BinaryIO:
        if not is_url(self.path):
            return open(self.path, "rb", READ)
        import fsspec

        system, path = fsspec.url_to_fs(self.path)
        return io.BufferedReader(system.open(path, "rb"), READ)  # whose own lines are slow

    def read(self, start: Place = START) -> Iterator[tuple[Raw, Place]]:
        """Yield the records from `start` on, each with the place after it.

        Of a file that is broken the records before come first, and a BadRecord for the rest of it last.

        Raises:
            UnmaskError: The file is gone, was cut, or cannot be read.
        """
        if start.offset < 0:
            return
        last = start
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
                try:
                    for raw, last in reader(self, file, start):
                        yield raw, last
                except Broken as error:
                    yield error.at(self.label, last)
                except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                    said = Broken("cannot be decompressed", f" ({first_line(error)})", last.line + 1, "line")
                    yield said.at(self.label, last)
        except FileNotFoundError as error:
            raise UnmaskError(
                f"{self.label}: the file is gone; it was there when the run began: put it back, and go on"
                " with resume_from_checkpoint=auto."
            ) from error
        except OSError as error:
            raise UnmaskError(f"{self.label}: cannot be read ({first_line(error)}).") from error


@dataclass(frozen=True)
class HubShard:
    """One shard of a data set on the hub, streamed by `datasets`."""

    dataset: Any
    index: int
    label: str
    remote = True

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


def record_id(file: int, number: int, files: Sequence[Labelled]) -> int:
    """Number a record of one file (from 0) among those of all `files`: the file is in the upper bits.

    With one file it is the record's number in it.

    Raises:
        UnmaskError: A file has more records than that leaves bits for.
    """
    bits = _number_bits(len(files))
    if number >> bits:
        raise UnmaskError(
            f"{files[file].label}: more than {1 << bits:,} records in one of {len(files):,} files; name the"
            " file as a source of its own."
        )
    return file << bits | number


def from_record_id(number: int, files: int) -> tuple[int, int]:
    """Return the file and the number in it of a record of `files` files; undoes `record_id`."""
    bits = _number_bits(files)
    return number >> bits, number & (1 << bits) - 1


def _number_bits(files: int) -> int:
    return SOURCE_BIT - (files - 1).bit_length()


def _same(record: Any) -> Any:
    return record


def _json(file: RecordFile, opened: BinaryIO, start: Place) -> Iterator[tuple[Raw, Place]]:
    if file.suffix.endswith(".gz"):
        opened = cast(BinaryIO, io.BufferedReader(_Unzipped(opened), READ))
    if start.offset == 0 and file.suffix.startswith(".json") and not file.suffix.startswith(".jsonl"):
        head = opened.read(4096)
        opened.seek(0)
        if head.removeprefix(BOM).lstrip().startswith(b"["):
            for number, record in enumerate(_json_array(opened), 1):
                if number > start.number:
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


class _Unzipped(io.RawIOBase):
    """What a gzip file holds. GzipFile itself, read in large pieces, loses what stands before a fault."""

    def __init__(self, opened: BinaryIO) -> None:
        super().__init__()
        self.file = gzip.GzipFile(fileobj=opened)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def readinto(self, into: Any) -> int:
        data = self.file.read1(len(into))
        into[: len(data)] = data
        return len(data)


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


def _json_array(opened: BinaryIO) -> Iterator[Any]:
    """The records of an array; of a broken one those before the place where it breaks."""
    data, cut = _all_bytes(opened)
    broken = None if cut is None else Broken("cannot be decompressed", f" ({first_line(cut)})")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        text = data[: error.start].decode("utf-8-sig")
        line = data.count(b"\n", 0, error.start) + 1
        broken = broken or Broken("not UTF-8 text", "; save the file as UTF-8", line, "line")
    try:
        if broken is None:
            yield from json.loads(text)
            return
    except json.JSONDecodeError as error:
        broken = Broken("not valid JSON", f" ({error.msg}, column {error.colno})", error.lineno, "line")
    except (RecursionError, ValueError) as error:
        broken = Broken("not valid JSON", f" ({_beyond(error)})", 1, "")
    decoder = json.JSONDecoder()
    at = text.index("[") + 1
    while True:
        try:
            record, at = decoder.raw_decode(text, BETWEEN.match(text, at).end())  # pyright: ignore
        except (RecursionError, ValueError):
            raise broken from None
        yield record


def _all_bytes(opened: BinaryIO) -> tuple[bytes, Exception | None]:
    """What a file holds, up to where it cannot be decompressed, and what stands in the way there."""
    parts: list[bytes] = []
    try:
        while part := cast(Any, opened).read1(READ):
            parts.append(part)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        return b"".join(parts), error
    return b"".join(parts), None


def is_array(file: RecordFile) -> bool:
    """Whether a .json file is one array; one that is broken at its start is found out when it is read."""
    with file.open() as opened, suppress(EOFError, zlib.error, gzip.BadGzipFile):
        plain = cast(BinaryIO, gzip.GzipFile(fileobj=opened)) if file.suffix.endswith(".gz") else opened
        return plain.read(4096).removeprefix(BOM).lstrip().startswith(b"[")
    return False


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
        raise Broken("not valid CSV", f" ({error})", number + 1) from error
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

    number, unit = 0, ""
    try:
        table = ParquetFile(opened)
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if number + rows > start.number:  # others are not read
                batches = table.iter_batches(batch_size=ROWS, row_groups=[group])
                skipped = max(0, start.number - number)
                for raw, place in _rows(_skip(batches, skipped), file.label, number + skipped):
                    unit = "record"
                    yield raw, place
            number += rows
            unit = "record"
    except (ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's or the network's, not of what the file holds
        raise Broken("not a readable Parquet file", f" ({first_line(error)})", unit=unit) from error


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


def _arrow_row(place: tuple[Any, int]) -> Any:
    table, row = place
    try:
        return table.slice(row, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return BadRecord("not UTF-8 text")


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


def is_url(name: str) -> bool:
    return "://" in name


def suffix_of(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return "".join(suffixes) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])

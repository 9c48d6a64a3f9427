"""Encoded data to disk: sharded Parquet with a manifest, written once by all cores.

A folder of prepared data holds `shard-00000.parquet`, ... and `manifest.json`. Until the manifest is
written, `progress.jsonl` says which shards are finished and how the next one goes on. A shard is what a
fixed range of records gives, written aside and moved, so that the folder is the same however often the
work was interrupted and whatever the number of processes.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from unmask.data.encode import EncodeReport, Example
from unmask.data.hub import first_line
from unmask.data.manifest import (
    KIND,
    MANIFEST,
    PROGRESS,
    ROW_GROUP,
    VERSION,
    Manifest,
    Shard,
    differences,
    fault,
    read_manifest,
    say_differences,
    sha256,
    verify,
)
from unmask.data.prepared import SCHEMA, Part
from unmask.data.processes import ASIDE, LOCK, alone, cores, in_order
from unmask.data.text import TextBlocks, TextParts, document_ids, usable_documents
from unmask.errors import UnmaskError

SHARD = 8192  # records, or documents, of a shard
CHUNK = 256  # records of one task of a worker
CHUNK_CHARACTERS = 1 << 20  # documents of a task are fewer if they are long


class Encoding(Protocol):
    """How items become examples: `work` in any process, `join` in one and in order."""

    def work(self, items: list[Any]) -> Any:
        """Do what needs nothing but these items."""
        ...

    def join(self, done: Any, report: EncodeReport) -> Iterator[Part]:
        """Yield the examples of what `work` returned, and count in `report` what became of its items."""
        ...

    def finish(self, report: EncodeReport) -> Iterator[Part]:
        """Yield what is left after the last item."""
        ...

    def state(self) -> dict[str, Any]:
        """What is carried from one item to the next, for JSON."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        ...


class RecordEncoding:
    """Encodes (record, place, sample id), each by itself."""

    def __init__(self, encode: Callable[[list[Any], EncodeReport], Iterator[Example]]) -> None:
        self.encode = encode

    def work(self, items: list[Any]) -> tuple[Part, EncodeReport]:
        report = EncodeReport()
        return Part.of(self.encode(items, report)), report

    def join(self, done: tuple[Part, EncodeReport], report: EncodeReport) -> Iterator[Part]:
        part, counts = done
        report.merge(counts)
        yield part

    def finish(self, report: EncodeReport) -> Iterator[Part]:
        yield from ()

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


class TextEncoding:
    """Tokenizes (document, place, sample id), and joins or splits the documents in order."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        way: TextBlocks | TextParts,
        on_bad_record: Literal["stop", "skip"] = "stop",
    ) -> None:
        self.tokenizer = tokenizer
        self.way = way
        self.on_bad_record: Literal["stop", "skip"] = on_bad_record

    def work(self, items: list[Any]) -> tuple[list[tuple[np.ndarray, int]], EncodeReport]:
        report = EncodeReport()
        documents = usable_documents(items, self.tokenizer, report, self.on_bad_record)
        tokenized = [
            (np.array(document_ids(text, self.tokenizer), np.int32), sample_id)
            for text, sample_id in documents
        ]
        return tokenized, report

    def join(
        self, done: tuple[list[tuple[np.ndarray, int]], EncodeReport], report: EncodeReport
    ) -> Iterator[Part]:
        documents, counts = done
        report.merge(counts)
        self._count_in(report)
        examples = chain.from_iterable(self.way.add(ids.tolist(), sample_id) for ids, sample_id in documents)
        while rows := list(islice(examples, 16 * ROW_GROUP)):
            yield Part.of(rows)

    def finish(self, report: EncodeReport) -> Iterator[Part]:
        self._count_in(report)
        yield Part.of(self.way.finish())

    def _count_in(self, report: EncodeReport) -> None:
        if isinstance(self.way, TextParts):
            self.way.report = report

    def state(self) -> dict[str, Any]:
        left = {"left": self.way.left} if isinstance(self.way, TextBlocks) else {}
        return {"number": self.way.number, **left}

    def restore(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self.way, name, value)


def write_prepared(
    out: str | Path,
    identity: Mapping[str, Any],
    items: Iterable[Any],
    encoding: Encoding,
    *,
    inputs: Mapping[str, Any] | None = None,
    workers: int | None = None,
    shard_records: int = SHARD,
    progress: Callable[[int, int], None] = lambda records, shards: None,
) -> Manifest:
    """Encode `items` into the folder `out`, or go on where an interrupted call stopped.

    The folder's bytes depend on the arguments up to `encoding`, and `shard_records`, alone.

    Args:
        identity: what decides the encoding and where the items come from, as JSON; goes into the manifest.
        items: records or documents in order, each a tuple that opens with it; read from the start also
            when going on, as shards that are finished already are only counted off.
        inputs: what would show that the items have changed since an interruption, such as sizes and times
            of files.
        workers: processes that encode; one for each core by default, 1 = this process.
        shard_records: items of a shard.
        progress: called with the items and shards done so far.

    Raises:
        UnmaskError: `out` holds other things or another preparation, or one is at work there; an item is bad
            input, nothing can be used, or a shard cannot be written: finished shards stay, and the same call
            goes on.
    """
    folder = Path(out).expanduser()
    writer = _Writer(folder, identity, inputs or {}, encoding, shard_records)
    with alone(folder, "preparing data"):
        manifest = writer.open()
        if manifest is not None:
            return manifest
        progress(writer.records, len(writer.shards))
        chunks = _chunks(islice(iter(items), writer.records, None), shard_records)
        try:
            for count, done in in_order(encoding.work, chunks, workers or cores()):
                writer.add(count, done)
                progress(writer.records + writer.pending, len(writer.shards))
            return writer.close()
        finally:
            writer.leave()


class _Writer:
    """The folder being written: finished shards, and the parts of the one begun."""

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        inputs: Mapping[str, Any],
        encoding: Encoding,
        shard_records: int,
    ) -> None:
        self.folder = folder
        self.identity = json.loads(json.dumps({**identity, "shard_records": shard_records}))
        self.inputs = json.loads(json.dumps(dict(inputs)))
        self.encoding = encoding
        self.shard_records = shard_records
        self.shards: list[Shard] = []
        self.report = EncodeReport()
        self.records = 0  # in finished shards
        self._lines: list[dict[str, Any]] = []
        self._begin()

    def _begin(self) -> None:
        self.pending = 0  # records in the shard begun
        self._report = EncodeReport()
        self._tables: list[pa.Table] = []  # rows that are not written yet
        self._rows = 0  # that are
        self._tokens = self._supervised = 0  # of both
        self._file: pq.ParquetWriter | None = None

    def open(self) -> Manifest | None:
        """Make the folder or take it up; the manifest if there is nothing left to do."""
        head = {"kind": KIND, "version": VERSION, "identity": self.identity, "inputs": self.inputs}
        with self._disk():
            self.folder.mkdir(parents=True, exist_ok=True)
            if (self.folder / MANIFEST).exists():
                return self._finished()
            names = sorted(entry.name for entry in self.folder.iterdir())
            if PROGRESS in names:
                self._take_up(head)
            elif others := [name for name in names if not name.endswith(ASIDE)]:
                raise UnmaskError(f"{self.folder}: holds other things ({others[0]}); name another folder.")
            for stale in self.folder.glob(f".*{ASIDE}"):
                if stale.name != LOCK:
                    stale.unlink()
            _replace(
                self.folder / PROGRESS, "".join(json.dumps(line) + "\n" for line in [head, *self._lines])
            )
        return None

    def _finished(self) -> Manifest:
        manifest = read_manifest(self.folder)
        self._same(manifest.identity)
        verify(self.folder, manifest.shards)
        (self.folder / PROGRESS).unlink(missing_ok=True)
        return manifest

    def _same(self, before: Mapping[str, Any]) -> None:
        if found := differences(before, self.identity):
            raise UnmaskError(
                f"{self.folder}: holds data prepared otherwise ({say_differences(found)}); name another"
                " folder, or remove this one."
            )

    def _take_up(self, head: dict[str, Any]) -> None:
        """Read which shards are finished, and check them; what follows a broken one is done again."""
        lines = _json_lines(self.folder / PROGRESS)
        first = lines[0] if lines else head  # killed before the first line was whole
        if first.get("kind") != KIND or first.get("version") != VERSION:
            raise UnmaskError(
                f"{self.folder / PROGRESS}: not of this version of unmask; name another folder."
            )
        self._same(first["identity"])
        if changed := differences(first["inputs"], self.inputs):
            raise UnmaskError(
                f"{changed[0][0]}: has changed since the preparation in {self.folder} began; remove that"
                " folder, or name another one."
            )
        for line in lines[1:]:
            shard = Shard(**line["shard"])
            if fault(self.folder, shard) is not None:
                break
            self._lines.append(line)
            self.shards.append(shard)
            self.records = line["records"]
            self.report.merge(EncodeReport.from_json(line["report"]))
            self.encoding.restore(line["state"])

    def add(self, count: int, result: Any) -> None:
        """Take `count` items, encoded; they are never of two shards."""
        with self._disk():
            self._put(self.encoding.join(result, self._report))
            self.pending += count
            if self.pending == self.shard_records:
                self._close_shard()

    def _put(self, parts: Iterator[Part]) -> None:
        for part in parts:
            self._tables.append(part.table())
            self._tokens += len(part.src_mask)
            self._supervised += len(part.src_mask) - int(part.src_mask.sum())
            self._flush()

    def _flush(self, last: bool = False) -> None:
        """Write whole row groups, so that where they end does not depend on how items come."""
        held = sum(len(table) for table in self._tables)
        if held < 16 * ROW_GROUP and not last:
            return
        table = pa.concat_tables([SCHEMA.empty_table(), *self._tables]).combine_chunks()
        whole = held if last else held - held % ROW_GROUP
        if self._file is None:
            self._file = pq.ParquetWriter(
                self._partial,
                SCHEMA,
                compression="zstd",
                use_dictionary=False,
                write_statistics=False,
                write_page_checksum=True,
            )
        if whole:
            self._file.write_table(table.slice(0, whole), row_group_size=ROW_GROUP)
        self._tables = [table.slice(whole)]
        self._rows += whole

    @property
    def _name(self) -> str:
        return f"shard-{len(self.shards):05d}.parquet"

    @property
    def _partial(self) -> Path:
        return self.folder / f".{self._name}{ASIDE}"

    def _close_shard(self) -> None:
        self._flush(last=True)
        assert self._file is not None
        self._file.close()
        counts = (self._rows, self._tokens, self._supervised, self._partial.stat().st_size)
        shard = Shard(self._name, *counts, sha256(self._partial))
        os.replace(self._partial, self.folder / shard.file)
        self.records += self.pending
        self.shards.append(shard)
        line = {
            "shard": shard._asdict(),
            "records": self.records,
            "report": asdict(self._report),
            "state": self.encoding.state(),
        }
        with (self.folder / PROGRESS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.report.merge(self._report)
        self._begin()

    def close(self) -> Manifest:
        """Write the last shard, and then the manifest."""
        with self._disk():
            self._put(self.encoding.finish(self._report))
            if self.pending or any(map(len, self._tables)):
                self._close_shard()
            if not sum(shard.rows for shard in self.shards):
                why = "; ".join(self.report.left_out()) or "there is none"
                raise UnmaskError(f"{self.folder}: no record can be used: {why}.")
            manifest = Manifest(self.identity, self.report, self.shards)
            _replace(self.folder / MANIFEST, manifest.to_json())
            (self.folder / PROGRESS).unlink()
        return manifest

    def leave(self) -> None:
        """Give up the shard begun; nothing of it stays."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._partial.unlink(missing_ok=True)

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = error.errno == errno.ENOSPC
            reason = "no space left on the disk" if full else error.strerror or first_line(error)
            raise UnmaskError(
                f"{self.folder}: cannot be written: {reason}; the {len(self.shards)} finished shards stay,"
                " and the same command goes on with them."
            ) from error


def _chunks(items: Iterator[Any], shard_records: int) -> Iterator[list[Any]]:
    """Tasks for a worker, which end where shards do."""
    while True:
        shard = islice(items, shard_records)
        empty = True
        chunk: list[Any] = []
        size = 0
        for item in shard:
            empty = False
            chunk.append(item)
            size += len(item[0]) if isinstance(item[0], str) else 0
            if len(chunk) == CHUNK or size >= CHUNK_CHARACTERS:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk
        if empty:
            return


def _json_lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; the last may have been cut short."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def _replace(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    aside = file.with_name(f".{file.name}{ASIDE}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, file)

"""Encoded data on disk: sharded Parquet with a manifest, written once by all cores, read row by row.

A folder of prepared data holds `shard-00000.parquet`, ... and `manifest.json`. Until the manifest is
written, `progress.jsonl` says which shards are finished and how the next one goes on. A shard is what a
fixed range of records gives, written aside and moved, so that the folder is the same however often the
work was interrupted and whatever the number of processes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from unmask.data.encode import (
    EncodeReport,
    Example,
    TextBlocks,
    TextParts,
    document_ids,
    usable_documents,
)
from unmask.data.hub import first_line
from unmask.errors import UnmaskError

VERSION = 1
MANIFEST = "manifest.json"
PROGRESS = "progress.jsonl"
KIND = "unmask prepared data"
ASIDE = ".partial"  # ends the names of files that are being written
MISSING = "this shard of prepared data is missing; prepare again into a new folder."
BROKEN = "this shard of prepared data is damaged; prepare again into a new folder."
SHARD = 8192  # records, or documents, of a shard
CHUNK = 256  # records of one task of a worker
CHUNK_CHARACTERS = 1 << 20  # documents of a task are fewer if they are long
ROW_GROUP = 64  # rows that are read together: what one access costs
VERIFIED = 4 << 30  # bytes up to which every checksum is verified before a run; pages always are

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("src_mask", pa.list_(pa.bool_())),
        ("sample_id", pa.int64()),
        ("source", pa.int32()),
    ]
)


class Part(NamedTuple):
    """Encoded examples as arrays: what processes pass on and shards are made of."""

    lengths: np.ndarray  # int64 (N,), in tokens
    input_ids: np.ndarray  # int32 (sum of the lengths,)
    src_mask: np.ndarray  # bool (sum of the lengths,), True = never masked
    sample_ids: np.ndarray  # int64 (N,)
    sources: np.ndarray  # int32 (N,)

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Part:
        """Collect examples."""
        ids: list[int] = []
        src: list[bool] = []
        rows: list[tuple[int, int, int]] = []
        for example in examples:
            ids += example.input_ids
            src += example.src_mask
            rows.append((len(example.input_ids), example.sample_id, example.source))
        lengths, sample_ids, sources = zip(*rows, strict=True) if rows else ((), (), ())
        return cls(
            np.array(lengths, np.int64),
            np.array(ids, np.int32),
            np.array(src, np.bool_),
            np.array(sample_ids, np.int64),
            np.array(sources, np.int32),
        )

    def table(self) -> pa.Table:
        """Lay the arrays out as the columns of a shard."""
        offsets = pa.array(np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32))
        columns = [
            pa.ListArray.from_arrays(offsets, pa.array(self.input_ids)),
            pa.ListArray.from_arrays(offsets, pa.array(self.src_mask)),
            pa.array(self.sample_ids),
            pa.array(self.sources),
        ]
        return pa.Table.from_arrays(columns, schema=SCHEMA)


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
        merge_reports(report, counts)
        yield part

    def finish(self, report: EncodeReport) -> Iterator[Part]:
        yield from ()

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


class TextEncoding:
    """Tokenizes (document, place), and joins or splits the documents in order."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        way: TextBlocks | TextParts,
        on_bad_record: Literal["stop", "skip"] = "stop",
    ) -> None:
        self.tokenizer = tokenizer
        self.way = way
        self.on_bad_record: Literal["stop", "skip"] = on_bad_record

    def work(self, items: list[Any]) -> tuple[list[np.ndarray], EncodeReport]:
        report = EncodeReport()
        documents = usable_documents(items, self.tokenizer, report, self.on_bad_record)
        return [np.array(document_ids(text, self.tokenizer), np.int32) for text in documents], report

    def join(self, done: tuple[list[np.ndarray], EncodeReport], report: EncodeReport) -> Iterator[Part]:
        documents, counts = done
        merge_reports(report, counts)
        self._count_in(report)
        examples = chain.from_iterable(self.way.add(ids.tolist()) for ids in documents)
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


class Shard(NamedTuple):
    """One file of prepared data."""

    file: str
    rows: int
    tokens: int
    supervised_tokens: int
    bytes: int
    sha256: str


@dataclass
class Manifest:
    """What a folder of prepared data holds. `identity` is what decided it, by name."""

    identity: dict[str, Any]
    report: EncodeReport = field(default_factory=EncodeReport)
    shards: list[Shard] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """Sequences and tokens over all shards."""
        names = ("rows", "tokens", "supervised_tokens", "bytes")
        return {name: sum(getattr(shard, name) for shard in self.shards) for name in names}

    def to_json(self) -> str:
        """Write it out, for `manifest.json`."""
        head = {"kind": KIND, "version": VERSION, **self.identity}
        shards = [shard._asdict() for shard in self.shards]
        body = {
            "row_group": ROW_GROUP,
            "counts": self.counts,
            "report": asdict(self.report),
            "shards": shards,
        }
        return json.dumps({**head, **body}, ensure_ascii=False, indent=1) + "\n"


def is_prepared(name: str | Path) -> bool:
    """Whether `name` is a folder of prepared data, finished or not."""
    folder = Path(name).expanduser()
    return (folder / MANIFEST).is_file() or (folder / PROGRESS).is_file()


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash what decides the ids of a text: vocabulary, merges, normalisation and added tokens.

    Where the tokenizer came from does not matter.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        tree: Any = {"vocab": tokenizer.get_vocab(), "class": type(tokenizer).__name__}
        tree["added"] = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    else:
        tree = json.loads(backend.to_str())
        for setting in ("padding", "truncation"):  # of the last call
            tree.pop(setting, None)
        tree["added_tokens"] = sorted(tree["added_tokens"], key=lambda token: token["id"])
    return digest(tree)


def digest(tree: Any) -> str:
    """Hash a value of JSON's types; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], group: str = ""
) -> list[tuple[str, Any, Any]]:
    """List the keys, dotted, in which two identities differ, with both values."""
    found = []
    for key in dict.fromkeys([*before, *now]):
        one, other = before.get(key), now.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            inner = "" if key in ("settings", "origin") else f"{group}{key}."  # these two hold recipe keys
            found += differences(one, other, inner)
        elif one != other:
            found.append((f"{group}{key}", one, other))
    return found


def say_differences(found: Sequence[tuple[str, Any, Any]]) -> str:
    """Name each key with what was prepared and what is wanted now; what follows from others is left out."""
    told = [item for item in found if not item[0].endswith("_sha256")] or found
    return "; ".join(f"{key}: prepared {_short(one)}, now {_short(other)}" for key, one, other in told)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:40]}... (sha256 {digest(value)[:12]})"


# Writing


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
        UnmaskError: `out` holds other things or another preparation, an item is bad input, nothing can
            be used, or a shard cannot be written; finished shards stay, and the same call goes on.
    """
    writer = _Writer(Path(out).expanduser(), identity, inputs or {}, encoding, shard_records)
    manifest = writer.open()
    if manifest is not None:
        return manifest
    progress(writer.records, len(writer.shards))
    chunks = _chunks(islice(iter(items), writer.records, None), shard_records)
    try:
        for count, done in in_order(encoding.work, chunks, workers or _cores()):
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
                stale.unlink()
            _replace(
                self.folder / PROGRESS, "".join(json.dumps(line) + "\n" for line in [head, *self._lines])
            )
        return None

    def _finished(self) -> Manifest:
        manifest = read_manifest(self.folder)
        self._same(manifest.identity)
        _verify(self.folder, manifest.shards)
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
            if _fault(self.folder, shard) is not None:
                break
            self._lines.append(line)
            self.shards.append(shard)
            self.records = line["records"]
            merge_reports(self.report, report_from(line["report"]))
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
        shard = Shard(self._name, *counts, _sha256(self._partial))
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
        merge_reports(self.report, self._report)
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


# Processes


def in_order(
    work: Callable[[list[Any]], Any], chunks: Iterable[list[Any]], workers: int
) -> Iterator[tuple[int, Any]]:
    """Yield the size of each chunk and what `work` makes of it, in order, made by several processes.

    An error of `work`, or of reading the chunks, comes in its turn.

    Raises:
        UnmaskError: a process died.
    """
    if workers == 1:
        yield from ((len(chunk), work(chunk)) for chunk in chunks)
        return
    source = iter(chunks)
    waiting: deque[tuple[int, Future]] = deque()
    failure: Exception | None = None
    more = True
    with _pool(work, workers) as pool:
        while more or waiting:
            while more and len(waiting) < 3 * workers:
                try:
                    chunk = next(source)
                except StopIteration:
                    more = False
                except Exception as error:
                    more, failure = False, error
                else:
                    waiting.append((len(chunk), pool.submit(_work, chunk)))
            if waiting:
                count, future = waiting.popleft()
                try:
                    done = future.result()
                except BrokenProcessPool as error:
                    raise UnmaskError(
                        "a process that encodes was killed, perhaps for want of memory; the same command goes"
                        " on where it stopped, with fewer --workers if need be."
                    ) from error
                yield count, done
    if failure is not None:
        raise failure


@contextmanager
def _pool(work: Callable[[list[Any]], Any], workers: int) -> Iterator[ProcessPoolExecutor]:
    # A copy of this process is there at once; elsewhere than on Linux it is not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process is a core: threads would only be in the way
    pool = ProcessPoolExecutor(workers, context, _start, (work,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


_task: Callable[[list[Any]], Any] | None = None  # of a worker


def _start(work: Callable[[list[Any]], Any]) -> None:
    global _task
    _task = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _work(chunk: list[Any]) -> Any:
    assert _task is not None
    return _task(chunk)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Reading


class PreparedExamples(Sequence[Example]):
    """Rows of prepared data, read from disk when they are asked for; a slice is a view.

    Raises on access:
        UnmaskError: a shard has gone, or a page of it is damaged.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, rows: range | None = None, source: int | None = None
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self._ends = list(accumulate(shard.rows for shard in manifest.shards))
        self.rows = range(self._ends[-1] if self._ends else 0) if rows is None else rows
        self.source = source

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> PreparedExamples: ...

    def __getitem__(self, index: int | slice) -> Example | PreparedExamples:
        if isinstance(index, slice):
            return PreparedExamples(self.folder, self.manifest, self.rows[index], self.source)
        part, place = self._find(self.rows[index])
        stop = int(part.lengths[: place + 1].sum())
        span = slice(stop - int(part.lengths[place]), stop)
        sample_id, source = int(part.sample_ids[place]), int(part.sources[place])
        if self.source is not None:
            sample_id, source = self.source << 40 | sample_id & (1 << 40) - 1, self.source
        return Example(part.input_ids[span].tolist(), part.src_mask[span].tolist(), sample_id, source)

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def _find(self, row: int) -> tuple[Part, int]:
        """The row group that a row is in, and its place there."""
        number = bisect_right(self._ends, row)
        shard = self.manifest.shards[number]
        group, place = divmod(row - (self._ends[number] - shard.rows), ROW_GROUP)
        return _row_group((self.folder / shard.file).absolute(), shard.sha256, group), place

    def as_source(self, source: int) -> PreparedExamples:
        """Return the same rows as those of source number `source` of a recipe."""
        return PreparedExamples(self.folder, self.manifest, self.rows, source)

    def lengths(self) -> list[int]:
        """Read the tokens of each row."""
        found = ((part.lengths, place) for part, place in map(self._find, self.rows))
        return [int(lengths[place]) for lengths, place in found]

    def totals(self) -> tuple[int, int]:
        """Count tokens, and those that may be masked; shards that are here whole are not read for it."""
        tokens = supervised = 0
        for shard, end in zip(self.manifest.shards, self._ends, strict=True):
            start, stop = max(self.rows.start, end - shard.rows), min(self.rows.stop, end)
            if self.rows.step == 1 and stop - start == shard.rows:
                tokens, supervised = tokens + shard.tokens, supervised + shard.supervised_tokens
                continue
            for row in self.rows[start - self.rows.start : stop - self.rows.start] if start < stop else ():
                part, place = self._find(row)
                end_of = int(part.lengths[: place + 1].sum())
                size = int(part.lengths[place])
                tokens += size
                supervised += size - int(part.src_mask[end_of - size : end_of].sum())
        return tokens, supervised


# The checksum tells files of one name apart.
@lru_cache(maxsize=32)
def _open(file: Path, sha256: str) -> pq.ParquetFile:
    return pq.ParquetFile(file, memory_map=True, page_checksum_verification=True)


@lru_cache(maxsize=16)
def _row_group(file: Path, sha256: str, group: int) -> Part:
    try:
        table = _open(file, sha256).read_row_group(group, use_threads=False)
    except FileNotFoundError as error:
        raise UnmaskError(f"{file}: {MISSING}") from error
    except (OSError, pa.ArrowException) as error:
        raise UnmaskError(f"{file}: {BROKEN}") from error
    ids, src, sample_ids, sources = (column.combine_chunks() for column in table.columns)
    return Part(
        np.diff(ids.offsets.to_numpy()).astype(np.int64),
        ids.flatten().to_numpy(),
        src.flatten().to_numpy(zero_copy_only=False),
        sample_ids.to_numpy(),
        sources.to_numpy(),
    )


def open_prepared(folder: str | Path) -> PreparedExamples:
    """Open a folder of prepared data, and verify that its shards are whole.

    Sizes are compared always, checksums where there are at most 4 GiB to read; pages carry their own, which
    are verified whenever one is read.

    Raises:
        UnmaskError: the preparation was not finished, the manifest is damaged or of another version, or a
            shard is missing or damaged.
    """
    folder = Path(folder).expanduser()
    manifest = read_manifest(folder)
    _verify(folder, manifest.shards)
    return PreparedExamples(folder, manifest)


def read_manifest(folder: Path) -> Manifest:
    """Read `manifest.json`.

    Raises:
        UnmaskError: there is none, it is damaged, or it is of another version.
    """
    file = folder / MANIFEST
    if not file.exists():
        raise UnmaskError(f"{folder}: the preparation was interrupted; run the same `unmask prepare` again.")
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        if tree.pop("kind") != KIND:
            raise ValueError
        version = tree.pop("version")
        if version == VERSION:
            if tree.pop("row_group") != ROW_GROUP:
                raise ValueError
            counts, shards = tree.pop("counts"), [Shard(**shard) for shard in tree.pop("shards")]
            manifest = Manifest(tree, report_from(tree.pop("report")), shards)
            if manifest.counts != counts:
                raise ValueError
            return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnmaskError(
            f"{file}: no manifest of prepared data, or a damaged one; prepare again into a new folder."
        ) from error
    raise UnmaskError(f"{file}: version {version}, but this is for version {VERSION}; prepare again.")


def _verify(folder: Path, shards: Sequence[Shard]) -> None:
    contents = sum(shard.bytes for shard in shards) <= VERIFIED
    for shard in shards:
        if (fault := _fault(folder, shard, contents)) is not None:
            raise UnmaskError(f"{folder / shard.file}: {fault}")


def _fault(folder: Path, shard: Shard, contents: bool = True) -> str | None:
    """What is wrong with a shard."""
    file = folder / shard.file
    if not file.is_file():
        return MISSING
    whole = file.stat().st_size == shard.bytes and (not contents or _sha256(file) == shard.sha256)
    return None if whole else BROKEN


def merge_reports(into: EncodeReport, other: EncodeReport) -> None:
    """Add what became of later records to a report."""
    for name in (item.name for item in fields(EncodeReport)):
        mine, theirs = getattr(into, name), getattr(other, name)
        if not isinstance(theirs, dict):
            setattr(into, name, mine + theirs)
            continue
        for key, value in theirs.items():
            if isinstance(value, tuple):  # how often, and where first
                count, first = mine.get(key, (0, value[1]))
                mine[key] = (count + value[0], first)
            else:
                mine[key] = mine.get(key, 0) + value


def report_from(tree: Mapping[str, Any]) -> EncodeReport:
    """Read back a report that was written as JSON, in which pairs are lists."""
    report = EncodeReport(**tree)
    for counts in (report.dropped, report.skipped):
        counts.update({reason: tuple(pair) for reason, pair in counts.items()})  # pyright: ignore
    return report


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


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()

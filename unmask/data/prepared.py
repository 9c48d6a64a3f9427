"""Prepared data, read from disk row by row."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from unmask.data.encode import SOURCE_BIT, SOURCES, Example
from unmask.data.manifest import BROKEN, MISSING, ROW_GROUP, Manifest, read_manifest, verify
from unmask.errors import UnmaskError

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
            others = sample_id & ~((SOURCES - 1) << SOURCE_BIT)
            sample_id, source = others | self.source << SOURCE_BIT, self.source
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
    verify(folder, manifest.shards)
    return PreparedExamples(folder, manifest)

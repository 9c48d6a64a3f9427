"""Figures about encoded examples: where they come from, how long they are, which are there twice."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import islice, takewhile

from unmask.data.encode import SOURCE_BIT, EncodeReport, Example
from unmask.data.files import from_record_id
from unmask.data.collate import filled, pack

BINS = 10
PLACES = 3  # pairs of places named of each kind of duplicates


@dataclass(frozen=True)
class SourceShare:
    """What one source brings: sequences, and their tokens."""

    name: str
    sequences: int
    tokens: int
    supervised: int


@dataclass(frozen=True)
class Duplicates:
    """Sequences that repeat an earlier one in `what`; `places` are the first (earlier, later) pairs."""

    what: str
    repeats: int
    places: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Filling:
    """Positions of which `share` hold a token when sequences are laid out in this `way`."""

    way: str
    share: float


@dataclass(frozen=True)
class Survey:
    """Everything `unmask data` says about the sequences of a run; lengths and counts in tokens."""

    sequences: int
    tokens: int
    supervised: int
    lengths: tuple[int, int, int] | None
    """shortest, median, longest; None without sequences"""
    histogram: tuple[tuple[int, int, int], ...]
    """(shortest, longest, sequences) of each range of lengths"""
    sources: tuple[SourceShare, ...]
    duplicates: tuple[Duplicates, ...]
    filling: tuple[Filling, ...]
    report: EncodeReport | None
    block_size: int | None


def survey(
    examples: Sequence[Example],
    report: EncodeReport | None = None,
    *,
    names: Sequence[str] = (),
    files: Sequence[Sequence[str]] = (),
    block_size: int | None = None,
    micro_batch: int | None = None,
    packed: bool = False,
    held_out: Sequence[Example] = (),
    seed: int = 0,
) -> Survey:
    """Count what is in `examples`.

    Args:
        report: what became of the records.
        names: of the sources, in the recipe's order.
        files: names of the files of each, see `place`.
        block_size: tokens of the longest row, for the share of filled positions.
        micro_batch: sequences of one forward, likewise.
        packed: whether the run packs rows, likewise.
        held_out: sequences of the evaluation, to be found among `examples`.
        seed: of the order in which these batches are drawn.
    """
    sizes = [len(example.input_ids) for example in examples]
    ordered = sorted(sizes)
    return Survey(
        sequences=len(examples),
        tokens=sum(sizes),
        supervised=sum(example.supervised for example in examples),
        lengths=(ordered[0], ordered[len(ordered) // 2], ordered[-1]) if ordered else None,
        histogram=_histogram(sizes),
        sources=tuple(_sources(examples, names)),
        duplicates=tuple(_duplicates(examples, held_out, partial(place, names=names, files=files))),
        filling=tuple(_filling(examples, block_size, micro_batch, packed, seed)) if examples else (),
        report=report,
        block_size=block_size,
    )


def place(example: Example, names: Sequence[str] = (), files: Sequence[Sequence[str]] = ()) -> str:
    """Name the record of `example`: "alpaca.json record 17"; of a single source just "record 17".

    Args:
        names: of the sources.
        files: names of the files of each source; where there are several, the record is one of its file.
    """
    said = [names[example.source]] if len(names) > 1 else []
    if example.sample_id >= 0:
        number = example.sample_id & (1 << SOURCE_BIT) - 1
        labels = files[example.source] if example.source < len(files) else ()
        if len(labels) > 1:
            file, number = from_record_id(number, len(labels))
            said.append(labels[file])
        said.append(f"record {number + 1:,}")
    return " ".join(said)


def sections(found: Survey) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Yield the tables of a report: a title, and rows of (label, figure, remark)."""
    if found.sources:
        yield (
            "tokens per source",
            [
                (
                    source.name,
                    f"{source.tokens:,}",
                    f"{source.tokens / found.tokens if found.tokens else 0:.1%} of the tokens;"
                    f" {source.sequences:,} sequences, {source.supervised:,} tokens supervised",
                )
                for source in found.sources
            ],
        )
    if found.filling:
        yield (
            "positions that hold a token",
            [(filling.way, f"{filling.share:.1%}", "") for filling in found.filling],
        )
    repeats: list[tuple[str, str, str]] = []
    for duplicates in found.duplicates:
        pairs = [f"{later} = {earlier}" for earlier, later in duplicates.places]
        more = duplicates.repeats - len(pairs)
        remarks = [*pairs, f"and {more:,} more"] if more and pairs else pairs
        repeats.append((duplicates.what, f"{duplicates.repeats:,}", "; ".join(remarks)))
    yield "sequences that repeat an earlier one", repeats
    if found.report is not None:
        yield "records", list(record_rows(found.report))


def record_rows(report: EncodeReport) -> Iterator[tuple[str, str, str]]:
    """Yield what became of the records as rows of (label, count, remark)."""
    formats = ", ".join(f"{name} ({count:,})" for name, count in report.formats.items())
    yield "read", f"{report.records:,}", f"format: {formats or 'none'}"
    yield "kept", f"{report.kept:,}", ""
    if report.truncated:
        yield "truncated", f"{report.truncated:,}", "kept, but cut at block_size, end token lost"
    for label, reasons in (("dropped", report.dropped), ("skipped", report.skipped)):
        if not reasons:
            yield label, "0", ""
        for reason, (count, where) in reasons.items():
            yield label, f"{count:,}", f"{reason}; first: {where}"
    notes = {
        "held strings like special tokens, read as plain text": report.with_special_strings,
        "had turns after the last response, left out": report.with_turns_after,
        "had a list of tools, which the chat template has no place for": report.with_tools_unshown,
    }
    for note, count in notes.items():
        if count:
            yield "noted", f"{count:,}", note


def _histogram(sizes: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    if not sizes:
        return ()
    low, high = min(sizes), max(sizes)
    width = (high - low) // BINS + 1
    counts = [0] * ((high - low) // width + 1)
    for size in sizes:
        counts[(size - low) // width] += 1
    starts = [low + index * width for index in range(len(counts))]
    return tuple(
        (start, min(start + width - 1, high), count) for start, count in zip(starts, counts, strict=True)
    )


def _sources(examples: Sequence[Example], names: Sequence[str]) -> Iterator[SourceShare]:
    counts = {source: [0, 0, 0] for source in range(len(names))}
    for example in examples:
        count = counts.setdefault(example.source, [0, 0, 0])
        for index, value in enumerate((1, len(example.input_ids), example.supervised)):
            count[index] += value
    for source, count in sorted(counts.items()):
        yield SourceShare(names[source] if source < len(names) else f"source {source + 1}", *count)


def _duplicates(
    examples: Sequence[Example], held_out: Sequence[Example], where: Callable[[Example], str]
) -> Iterator[Duplicates]:
    def whole(example: Example) -> list[int]:
        return example.input_ids

    def prompt(example: Example) -> list[int]:
        return example.input_ids[: sum(1 for _ in takewhile(bool, example.src_mask))]

    yield _repeats("whole sequence", whole, examples, where)
    prompts = any(example.src_mask[:1] == [True] for example in examples)
    if prompts:
        yield _repeats("prompt (all before the first response)", prompt, examples, where)
    if held_out:
        kind, part = ("prompt", prompt) if prompts else ("sequence", whole)
        seen = {_digest(part(example)) for example in examples}
        repeats = sum(bool(ids := part(example)) and _digest(ids) in seen for example in held_out)
        yield Duplicates(f"held-out {kind} that is trained on, too", repeats, ())


def _digest(ids: list[int]) -> bytes:
    return blake2b(array("q", ids).tobytes(), digest_size=16).digest()


def _repeats(
    what: str,
    part: Callable[[Example], list[int]],
    examples: Sequence[Example],
    where: Callable[[Example], str],
) -> Duplicates:
    first: dict[bytes, int] = {}
    repeats = 0
    places: list[tuple[str, str]] = []
    for index, example in enumerate(examples):
        if not (ids := part(example)):
            continue
        earlier = first.setdefault(_digest(ids), index)
        if earlier == index:
            continue
        repeats += 1
        if len(places) < PLACES:
            places.append((where(examples[earlier]), where(example)))
    return Duplicates(what, repeats, tuple(places))


def _filling(
    examples: Sequence[Example],
    block_size: int | None,
    micro_batch: int | None,
    packed: bool,
    seed: int,
) -> Iterator[Filling]:
    sizes = [len(example.input_ids) for example in examples]
    if block_size is not None:
        yield Filling(f"padded to block_size {block_size:,}", sum(sizes) / (len(sizes) * block_size))
    if micro_batch is not None:
        shuffled = iter(random.Random(seed).sample(sizes, len(sizes)))
        batches = iter(lambda: list(islice(shuffled, micro_batch)), [])
        computed = sum(max(batch) * len(batch) for batch in batches)
        yield Filling(f"padded to the longest of {micro_batch:,} in random order", sum(sizes) / computed)
    if block_size is not None:
        share = filled(list(pack(examples, block_size)), block_size)
        yield Filling(f"packed into rows of {block_size:,}{', as here' if packed else ''}", share)

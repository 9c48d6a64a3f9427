"""What training will see, for `unmask data`: figures, sequences in colour, and both as an HTML page."""

from __future__ import annotations

import os
import random
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from importlib.resources import files as package_files
from itertools import groupby, islice, takewhile
from pathlib import Path
from typing import Any

from jinja2 import Environment
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from unmask.data.collate import Row, filled, pack
from unmask.data.encode import EncodeReport, Example
from unmask.errors import UnmaskError

BINS = 10
PAIRS = 3  # named of each kind of duplicates
STYLES = {"source": "dim", "response": "green", "end": "black on yellow", "text": "green"}
MEANINGS = {
    "source": "never masked",
    "response": "supervised",
    "end": "end token, supervised",
    "text": "supervised",
}
# Line and paragraph ends, what turns the direction of a text, and the byte order mark.
_INVISIBLE = re.compile("[\u2028-\u202e\u2066-\u2069\ufeff]")
BAR = 40  # characters of the longest bar
SHOWN = 400  # characters of one piece, before its middle is left out
SEQUENCES = 1000  # on a page, at most
TOKENS = 500_000  # on a page, at most: a browser still scrolls their text with ease
DOCUMENTS = ("#3b82c4", "#c2569b", "#d07b2c", "#5a9e4b", "#7d63c9", "#2a9d9d")  # in turn, in a row


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
        files: names of the files of each, see `location`.
        block_size: tokens of the longest row, for the share of filled positions.
        micro_batch: sequences of one forward pass, likewise.
        packed: whether the run packs rows, likewise.
        held_out: sequences of the evaluation, to be found among `examples`.
        seed: of the order in which these batches are drawn.
    """
    sizes: list[int] = []
    supervised = 0
    counts = {source: [0, 0, 0] for source in range(len(names))}
    for example in examples:
        size, learnt = len(example.input_ids), example.supervised
        sizes.append(size)
        supervised += learnt
        count = counts.setdefault(example.source, [0, 0, 0])
        count[:] = [count[0] + 1, count[1] + size, count[2] + learnt]
    ordered = sorted(sizes)
    shares = [
        SourceShare(names[source] if source < len(names) else f"source {source + 1}", *count)
        for source, count in sorted(counts.items())
    ]
    return Survey(
        sequences=len(sizes),
        tokens=sum(sizes),
        supervised=supervised,
        lengths=(ordered[0], ordered[len(ordered) // 2], ordered[-1]) if ordered else None,
        histogram=_histogram(sizes),
        sources=tuple(shares),
        duplicates=tuple(_duplicates(examples, held_out, partial(location, names=names, files=files))),
        filling=tuple(_filling(sizes, block_size, micro_batch, packed, seed)) if sizes else (),
        report=report,
        block_size=block_size,
    )


def location(example: Example, names: Sequence[str] = (), files: Sequence[Sequence[str]] = ()) -> str:
    """Name the record of `example`: "alpaca.json record 17"; of a single source just "record 17".

    Args:
        names: of the sources.
        files: names of the files of each source; where there are several, the record is one of its file.
    """
    said = [names[example.source]] if len(names) > 1 else []
    if example.record >= 0:
        labels = files[example.source] if example.source < len(files) else ()
        if len(labels) > 1:
            said.append(labels[example.file])
        said.append(f"record {example.record + 1:,}")
    return " ".join(said)


def sections(found: Survey) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Yield the tables of a report: a title, and rows of (label, figure, remark)."""
    if found.sources:
        rows = [
            (
                source.name,
                f"{source.tokens:,}",
                f"{source.tokens / found.tokens if found.tokens else 0:.1%} of the tokens;"
                f" {source.sequences:,} sequences, {source.supervised:,} tokens supervised",
            )
            for source in found.sources
        ]
        yield "tokens per source", rows
    if found.filling:
        rows = [(filling.way, f"{filling.share:.1%}", "") for filling in found.filling]
        yield "positions that hold a token", rows
    repeats: list[tuple[str, str, str]] = []
    for duplicates in found.duplicates:
        pairs = [f"{later} = {earlier}" for earlier, later in duplicates.places]
        more = duplicates.repeats - len(pairs)
        remarks = [*pairs, f"and {more:,} more"] if more and pairs else pairs
        repeats.append((duplicates.what, f"{duplicates.repeats:,}", "; ".join(remarks)))
    yield "duplicates", repeats
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
    for note, count in report.notes.items():
        yield "noted", f"{count:,}", note
    if report.unused:
        names = ", ".join(f"{name} ({count:,})" for name, count in report.unused.items())
        yield "fields not used", f"{sum(report.unused.values()):,}", names


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
        if len(places) < PAIRS:
            places.append((where(examples[earlier]), where(example)))
    return Duplicates(what, repeats, tuple(places))


def _filling(
    sizes: list[int], block_size: int | None, micro_batch: int | None, packed: bool, seed: int
) -> Iterator[Filling]:
    if block_size is not None:
        yield Filling(f"padded to block_size {block_size:,}", sum(sizes) / (len(sizes) * block_size))
    if micro_batch is not None:
        shuffled = iter(random.Random(seed).sample(sizes, len(sizes)))
        batches = iter(lambda: list(islice(shuffled, micro_batch)), [])
        computed = sum(max(batch) * len(batch) for batch in batches)
        yield Filling(f"padded to the longest of {micro_batch:,} in random order", sum(sizes) / computed)
    if block_size is not None:
        rows = list(pack((Example([0] * size, []) for size in sizes), block_size))
        way = f"packed into rows of {block_size:,}{', as here' if packed else ''}"
        yield Filling(way, filled(rows, block_size))


def show_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int = 3,
    names: Sequence[str] = (),
    files: Sequence[Sequence[str]] = (),
    console: Console | None = None,
) -> None:
    """Print the first `limit` examples piece by piece, each piece with its kind and its tokens.

    `names` are those of the sources, in the recipe's order, `files` those of their files.

    Kinds: source (never masked), response, and the end tokens that close one; "text" in place of
    response where nothing is source (pre-training). A line break shows as ⏎ before it breaks.
    """
    console = console or Console()
    plain = _plain(console)
    kinds: list[str] = []
    for number, example in enumerate(islice(examples, limit), 1):
        name = f", {of}" if (of := location(example, names, files)) else ""
        total = len(example.input_ids)
        console.print(
            f"example {number} of {len(examples)}{name}: {total} tokens, {example.supervised} supervised",
            style="bold",
            highlight=False,
        )
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True, style="dim")
        table.add_column(overflow="fold")
        for kind, ids in pieces(example, tokenizer):
            kinds.append(kind)
            # Repeated end tokens show once; their number is next to them.
            text = visible(str(tokenizer.decode(ids[:1] if kind == "end" else ids)), plain=plain)
            style = STYLES[kind]
            table.add_row(Text(kind, style), str(len(ids)), Text(_shortened(text), style))
        console.print(table)
        console.print()
    legend = [Text.assemble((kind, STYLES[kind]), f": {MEANINGS[kind]}") for kind in STYLES if kind in kinds]
    console.print(Text(" | ").join(legend), highlight=False)


def show_report(found: Survey, *, console: Console | None = None) -> None:
    """Print lengths, shares, filled positions, duplicates, and what became of the records."""
    console = console or Console()
    plain = _plain(console)
    _show_lengths(found, console)
    share = 100 * found.supervised / found.tokens if found.tokens else 0.0
    console.print(
        f"supervised: {found.supervised:,} of {found.tokens:,} tokens ({share:.1f}%)"
        f" in {found.sequences:,} sequences",
        highlight=False,
    )
    for title, rows in sections(found):
        console.print(f"{title}:", highlight=False)
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(overflow="fold", max_width=60)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(overflow="fold")
        for label, value, note in rows:
            styles = {"kept": "green", "dropped": "red", "skipped": "red"}
            style = styles.get(label, "") if value != "0" else ""
            table.add_row(Text(f"  {visible(label, plain=plain)}", style), value, visible(note, plain=plain))
        console.print(table, highlight=False, markup=False)


def visible(text: str, *, plain: bool = False) -> str:
    """Return `text` safe to print: line breaks marked ⏎, other control characters as pictures.

    Several line breaks in a row break once. With `plain` only ASCII comes out.
    """
    text = re.sub("\n+", lambda run: ("\\n" if plain else "⏎") * len(run[0]) + "\n", text)
    shown = []
    for char in text.removesuffix("\n"):
        if char == "\n":
            shown.append(char)
        elif ord(char) < 32:
            shown.append(chr(0x2400 + ord(char)))
        elif 0x7F <= ord(char) < 0xA0 or _INVISIBLE.match(char):
            shown.append(f"\\u{ord(char):04x}")
        else:
            shown.append(char)
    joined = "".join(shown)
    return joined.encode("ascii", "backslashreplace").decode() if plain else joined


def _plain(console: Console) -> bool:
    return not (console.encoding or "").lower().startswith("utf")


def pieces(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, list[int]]]:
    """Cut an example into runs of tokens of one kind, a key of `MEANINGS`."""
    # Text never has control tokens, so a supervised one can only end a response.
    added = tokenizer.added_tokens_decoder.items()
    ends = {index for index, token in added if token.special}
    response = "response" if any(example.src_mask) else "text"

    def kind(place: int) -> str:
        if example.src_mask[place]:
            return "source"
        return "end" if example.input_ids[place] in ends else response

    runs = groupby(range(len(example.input_ids)), key=kind)
    return [(name, [example.input_ids[i] for i in run]) for name, run in runs]


def _shortened(text: str) -> str:
    if len(text) <= SHOWN:
        return text
    half = SHOWN // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


def _show_lengths(found: Survey, console: Console) -> None:
    """A bar for each range of lengths."""
    if found.lengths is None:
        return
    low, median, high = found.lengths
    of = "" if found.block_size is None else f" (block_size {found.block_size:,})"
    console.print(
        f"length in tokens{of}: shortest {low:,}, median {median:,}, longest {high:,}", highlight=False
    )
    block = "#" if _plain(console) else "█"
    digits = len(f"{high:,}")
    most = max(count for _, _, count in found.histogram)
    for start, stop, count in found.histogram:
        bar = block * -(-count * BAR // most)
        label = f"{start:>{digits},} to {stop:>{digits},}"
        console.print(
            Text.assemble("  ", label, "  ", (bar, "cyan"), " " if bar else "", f"{count:,}"), highlight=False
        )
    console.print()


def check_page(file: Path) -> None:
    """Find out whether a page can be written, before the data are read.

    Raises:
        UnmaskError: A folder, or a path that is missing or cannot be written to.
    """
    if file.is_dir():
        raise UnmaskError(f"--html: {file} is a folder; name a file in it, such as {file / 'data.html'}.")
    parent = file.absolute().parent
    if not parent.is_dir():
        raise UnmaskError(f"--html: {file}: there is no folder {file.parent}; make it first.")
    if not os.access(file if file.exists() else parent, os.W_OK):
        raise UnmaskError(f"--html: {file} cannot be written to.")


def write_page(
    file: Path,
    rows: Sequence[Example | Row],
    found: Survey,
    tokenizer: PreTrainedTokenizerBase,
    *,
    title: str,
    names: Sequence[str] = (),
    files: Sequence[Sequence[str]] = (),
    width: int | None = None,
    micro_batch: int = 1,
    first_of_run: bool = False,
) -> int:
    """Write the page, and return how many rows it shows: `SEQUENCES` at most, of about `TOKENS` tokens.

    Args:
        rows: what batches are made of, in order.
        found: the report above them.
        title: heading of the page.
        names: of the sources, in the recipe's order.
        files: names of the files of each, see `location`.
        width: tokens of a packed row; None = each row is padded to the longest of its micro batch.
        micro_batch: rows of one forward pass.
        first_of_run: rows are those that a run begins with, in its order, and not all there are.

    Raises:
        UnmaskError: The file cannot be written.
    """
    counts: Counter[str] = Counter()
    shown: list[dict[str, Any]] = []
    tokens = 0
    for start in range(0, min(len(rows), SEQUENCES), micro_batch):
        taken = (rows[i] for i in range(start, min(len(rows), start + micro_batch)))
        batch = [[row] if isinstance(row, Example) else row for row in taken]
        sizes = [sum(len(example.input_ids) for example in row) for row in batch]
        for row, size in zip(batch, sizes, strict=True):
            tokens += size
            if len(shown) < SEQUENCES and (tokens <= TOKENS or not shown):
                padding = (max(sizes) if width is None else width) - size
                shown.append(_row_of_page(row, size, padding, tokenizer, names, files, counts))
        if tokens > TOKENS:
            break
    total = None if first_of_run else len(rows)
    if total is None:
        which = f"the first {len(shown):,} rows of the run"
    else:
        every = len(shown) == total
        which = f"all {total:,} rows" if every else f"the first {len(shown):,} of {total:,} rows"
    order = "" if total is None else ", in the order of the data (training draws its own)"
    laid = f"padded to the longest of {micro_batch:,}{order}"
    text = (package_files("unmask") / "templates" / "data.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)
    kinds = {**MEANINGS, "pad": "padding, never masked or attended"}
    content = page.render(
        title=title,
        found=found,
        sections=[
            (
                name.capitalize(),
                [(visible(label), figure, visible(remark)) for label, figure, remark in table],
            )
            for name, table in sections(found)
        ],
        most=max((count for _, _, count in found.histogram), default=1),
        rows=shown,
        total=total,
        which=which,
        laid=laid if width is None else f"packed into rows of {width:,} tokens",
        legend=[(kind, counts[kind], meaning) for kind, meaning in kinds.items() if counts[kind]],
        documents=counts["documents"] if counts["documents"] > len(shown) else 0,
        colours=DOCUMENTS,
    )
    try:
        # A file name may have bytes that are not text.
        file.write_text(content, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UnmaskError(f"--html: {file} cannot be written: {error.strerror}.") from error
    return len(shown)


def _row_of_page(
    row: Sequence[Example],
    size: int,
    padding: int,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    files: Sequence[Sequence[str]],
    counts: Counter[str],
) -> dict[str, Any]:
    """One row as the template of the page reads it; counts the tokens of each kind."""
    documents = []
    for example in row:
        shown = []
        for kind, ids in pieces(example, tokenizer):
            counts[kind] += len(ids)
            # Repeated end tokens show once, with their number.
            text = str(tokenizer.decode(ids[:1] if kind == "end" else ids))
            repeated = f" ×{len(ids)}" if kind == "end" and len(ids) > 1 else ""
            shown.append((kind, len(ids), visible(text) + "\n" * text.endswith("\n") + repeated))
        documents.append((visible(location(example, names, files)), example, shown))
    counts["documents"] += len(row)
    counts["pad"] += padding
    learnt = sum(example.supervised for example in row)
    return {"size": size, "supervised": learnt, "padding": padding, "documents": documents}

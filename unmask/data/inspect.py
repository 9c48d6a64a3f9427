"""What training will see, for `unmask data`: figures, sequences in colour, and both as an HTML page."""

from __future__ import annotations

import random
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from importlib.resources import files as package_files
from itertools import groupby, islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from unmask.data.collate import filled, pack
from unmask.data.dataset import RunData, first_rows, source_names
from unmask.data.encode import EncodeReport, Example
from unmask.errors import UnmaskError

if TYPE_CHECKING:
    from unmask.config import Recipe

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
INVISIBLE = re.compile("[\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff]")
BAR = 40  # characters of the longest bar
SHOWN = 400  # characters of one piece, before its middle is left out
SEQUENCES = 1000  # on a page, at most
TOKENS = 500_000  # on a page, at most: a browser still scrolls their text with ease
DOCUMENTS = ("#3b82c4", "#c2569b", "#d07b2c", "#5a9e4b", "#7d63c9", "#2a9d9d")  # in turn, in a row

Rows = list[tuple[str, str, str]]
"""Label, figure and remark of each line of a table."""


@dataclass(frozen=True)
class Survey:
    """Everything `unmask data` says about the sequences of a run; lengths and counts in tokens."""

    sequences: int
    tokens: int
    supervised: int
    lengths: tuple[int, int, int] | None
    """shortest, median, longest; None without sequences"""
    histogram: list[tuple[int, int, int]]
    """(shortest, longest, sequences) of each range of lengths"""
    tables: dict[str, Rows]
    """tokens of sources, filled positions, duplicates, and what became of the records, by title"""
    block_size: int | None


def survey(data: RunData) -> Survey:
    """Count what is in the training data of a run."""
    recipe, names, examples = data.recipe, source_names(data.recipe), data.train
    sizes: list[int] = []
    counts = [[0, 0, 0] for _ in names]
    for example in examples:
        sizes.append(len(example.input_ids))
        for number, count in enumerate((1, sizes[-1], example.supervised)):
            counts[example.source][number] += count
    tokens, ordered = sum(sizes), sorted(sizes)
    tables: dict[str, Rows] = {}
    tables["tokens per source"] = [
        (
            name,
            f"{size:,}",
            f"{size / max(1, tokens):.1%} of the tokens; {number:,} sequences, {learnt:,} tokens supervised",
        )
        for name, (number, size, learnt) in zip(names, counts, strict=True)
    ]
    if sizes:
        tables["positions that hold a token"] = [
            (way, f"{share:.1%}", "") for way, share in _filling(sizes, recipe)
        ]
    tables["duplicates"] = list(_duplicates(data))
    tables["records"] = list(record_rows(data.report))
    if data.encoder is not None and "think" in data.encoder.chat_template:
        thinking = data.encoder.thinking
        tables["records"].append(("thinking", thinking, "where responses start: data.sft.thinking"))
    return Survey(
        sequences=len(sizes),
        tokens=tokens,
        supervised=sum(learnt for _, _, learnt in counts),
        lengths=(ordered[0], ordered[len(ordered) // 2], ordered[-1]) if ordered else None,
        histogram=_histogram(sizes) if sizes else [],
        tables=tables,
        block_size=recipe.data.block_size,
    )


def location(example: Example, data: RunData) -> str:
    """Name the record of `example`: "alpaca.json record 17"; of a single source just "record 17"."""
    names = source_names(data.recipe)
    said = [names[example.source]] if len(names) > 1 else []
    if example.record >= 0:
        files = data.files[example.source] if data.files else ()
        said += [files[example.file]] if len(files) > 1 else []
        said.append(f"record {example.record + 1:,}")
    return " ".join(said)


def record_rows(report: EncodeReport) -> Iterator[tuple[str, str, str]]:
    """Yield what became of the records as rows of (label, count, remark)."""

    def named(counts: dict[str, int]) -> str:
        return ", ".join(f"{name} ({count:,})" for name, count in counts.items())

    yield "read", f"{report.records:,}", f"format: {named(report.formats) or 'none'}"
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
        yield "fields not used", f"{sum(report.unused.values()):,}", named(report.unused)


def _histogram(sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    low, high = min(sizes), max(sizes)
    width = (high - low) // BINS + 1
    counts = Counter((size - low) // width for size in sizes)
    return [
        (start, min(start + width - 1, high), counts[number])
        for number, start in enumerate(range(low, high + 1, width))
    ]


def _duplicates(data: RunData) -> Iterator[tuple[str, str, str]]:
    """Sequences, prompts and held-out ones that repeat an earlier one, by a hash of their ids."""

    def whole(example: Example) -> list[int]:
        return example.input_ids

    def prompt(example: Example) -> list[int]:
        return example.input_ids[: sum(1 for _ in takewhile(bool, example.src_mask))]

    def digest(ids: list[int]) -> bytes:
        return blake2b(array("q", ids).tobytes(), digest_size=16).digest()

    examples, parts = data.train, {"whole sequence": whole}
    if any(example.src_mask[:1] == [True] for example in examples):
        parts["prompt (all before the first response)"] = prompt
    first: dict[bytes, int] = {}
    for what, part in parts.items():
        first, repeats, pairs = {}, 0, []
        for index, example in enumerate(examples):
            if (ids := part(example)) and (earlier := first.setdefault(digest(ids), index)) != index:
                repeats += 1
                if repeats <= PAIRS:
                    pairs.append(f"{location(example, data)} = {location(examples[earlier], data)}")
        if repeats > PAIRS:
            pairs.append(f"and {repeats - PAIRS:,} more")
        yield what, f"{repeats:,}", "; ".join(pairs)
    if len(data.held_out):  # `first` has the prompts now, if there are any
        kind, part = ("prompt", prompt) if len(parts) > 1 else ("sequence", whole)
        repeats = sum(bool(ids := part(example)) and digest(ids) in first for example in data.held_out)
        yield f"held-out {kind} that is trained on, too", f"{repeats:,}", ""


def _filling(sizes: list[int], recipe: Recipe) -> Iterator[tuple[str, float]]:
    """The share of positions that hold a token when sequences are laid out in a way."""
    total, length, size = sum(sizes), recipe.data.block_size, micro_batch(recipe)
    yield f"padded to block_size {length:,}", total / (len(sizes) * length)
    shuffled = random.Random(recipe.seed).sample(sizes, len(sizes))
    batches = [shuffled[start : start + size] for start in range(0, len(sizes), size)]
    computed = sum(max(batch) * len(batch) for batch in batches)
    yield f"padded to the longest of {size:,} in random order", total / computed
    rows = pack([Example([0] * size, []) for size in sizes], length)
    yield f"packed into rows of {length:,}{', as here' if recipe.data.packing else ''}", filled(rows, length)


def micro_batch(recipe: Recipe) -> int:
    """Rows of one forward pass, on one process."""
    return recipe.micro_batch_size or recipe.global_batch_size


def show_examples(
    data: RunData, tokenizer: PreTrainedTokenizerBase, *, limit: int = 3, console: Console | None = None
) -> None:
    """Print the first `limit` examples piece by piece, each piece with its kind and its tokens.

    Kinds: source (never masked), response, and the end tokens that close one; "text" in place of
    response where nothing is source (pre-training). A line break shows as ⏎ before it breaks.
    """
    console = console or Console()
    kinds = set[str]()
    for number, example in enumerate(islice(data.train, limit), 1):
        name = f", {of}" if (of := location(example, data)) else ""
        size = f"{len(example.input_ids)} tokens, {example.supervised} supervised"
        console.print(f"example {number} of {len(data.train)}{name}: {size}", style="bold", highlight=False)
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True, style="dim")
        table.add_column(overflow="fold")
        for kind, count, text in pieces(example, tokenizer):
            kinds.add(kind)
            if len(text) > SHOWN:
                half = SHOWN // 2
                text = f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"
            shown = Text(visible(text, plain=_plain(console)), STYLES[kind])
            table.add_row(Text(kind, STYLES[kind]), str(count), shown)
        console.print(table)
        console.print()
    legend = [Text.assemble((kind, STYLES[kind]), f": {MEANINGS[kind]}") for kind in STYLES if kind in kinds]
    console.print(Text(" | ").join(legend), highlight=False)


def show_report(found: Survey, *, console: Console | None = None) -> None:
    """Print lengths, shares, filled positions, duplicates, and what became of the records."""
    console = console or Console()
    plain = _plain(console)
    if found.lengths is not None:
        low, median, high = found.lengths
        of = "" if found.block_size is None else f" (block_size {found.block_size:,})"
        console.print(
            f"length in tokens{of}: shortest {low:,}, median {median:,}, longest {high:,}", highlight=False
        )
        digits, most = len(f"{high:,}"), max(count for _, _, count in found.histogram)
        for start, stop, count in found.histogram:
            bar = ("#" if plain else "█") * -(-count * BAR // most)
            label = f"  {start:>{digits},} to {stop:>{digits},}  "
            console.print(
                Text.assemble(label, (bar, "cyan"), " " if bar else "", f"{count:,}"), highlight=False
            )
        console.print()
    console.print(
        f"supervised: {found.supervised:,} of {found.tokens:,} tokens"
        f" ({found.supervised / max(1, found.tokens):.1%}) in {found.sequences:,} sequences",
        highlight=False,
    )
    styles = {"kept": "green", "dropped": "red", "skipped": "red"}
    for title, rows in found.tables.items():
        console.print(f"{title}:", highlight=False)
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(overflow="fold", max_width=60)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(overflow="fold")
        for label, value, note in rows:
            style = styles.get(label, "") if value != "0" else ""
            table.add_row(Text(f"  {visible(label, plain=plain)}", style), value, visible(note, plain=plain))
        console.print(table, highlight=False, markup=False)


def visible(text: str, *, plain: bool = False) -> str:
    """Return `text` safe to print: line breaks marked ⏎, other control characters as pictures.

    Several line breaks in a row break once. With `plain` only ASCII comes out.
    """
    text = re.sub("\n+", lambda run: ("\\n" if plain else "⏎") * len(run[0]) + "\n", text)
    text = re.sub("[\x00-\x09\x0b-\x1f]", lambda char: chr(0x2400 + ord(char[0])), text.removesuffix("\n"))
    text = INVISIBLE.sub(lambda char: f"\\u{ord(char[0]):04x}", text)
    return text.encode("ascii", "backslashreplace").decode() if plain else text


def _plain(console: Console) -> bool:
    return not (console.encoding or "").lower().startswith("utf")


def pieces(example: Example, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, int, str]]:
    """Cut an example into runs of tokens of one kind, a key of `MEANINGS`: kind, tokens, text.

    The text of repeated end tokens is that of one.
    """
    # Text never has control tokens, so a supervised one can only end a response.
    ends = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    response = "response" if any(example.src_mask) else "text"

    def kind(place: int) -> str:
        if example.src_mask[place]:
            return "source"
        return "end" if example.input_ids[place] in ends else response

    for name, run in groupby(range(len(example.input_ids)), key=kind):
        ids = [example.input_ids[place] for place in run]
        yield name, len(ids), str(tokenizer.decode(ids[:1] if name == "end" else ids))


def write_page(
    file: Path, data: RunData, found: Survey, tokenizer: PreTrainedTokenizerBase, *, title: str
) -> str:
    """Write the page, and say which rows it shows: `SEQUENCES` at most, of about `TOKENS` tokens.

    Args:
        found: the report above them.
        title: heading of the page.

    Raises:
        UnmaskError: The file cannot be written.
    """
    rows = data.rows if data.stream is None else first_rows(data, SEQUENCES)
    counts: Counter[str] = Counter()
    shown: list[dict[str, Any]] = []
    tokens, size = 0, micro_batch(data.recipe)
    for start in range(0, min(len(rows), SEQUENCES), size):
        taken = (rows[number] for number in range(start, min(len(rows), start + size)))
        batch = [[row] if isinstance(row, Example) else row for row in taken]
        sizes = [sum(len(example.input_ids) for example in row) for row in batch]
        for row, filled_with in zip(batch, sizes, strict=True):
            tokens += filled_with
            if shown and (tokens > TOKENS or len(shown) == SEQUENCES):
                break
            padding = (data.row_length or max(sizes)) - filled_with
            documents = [_document(example, tokenizer, data) for example in row]
            for kind, count, _ in (piece for document in documents for piece in document["pieces"]):
                counts[kind] += count
            counts.update(documents=len(row), pad=padding)
            shown.append({"size": filled_with, "padding": padding, "documents": documents})
        if tokens > TOKENS:
            break
    laid = f"padded to the longest of {size:,}"
    if data.row_length is not None:
        laid = f"packed into rows of {data.row_length:,} tokens"
    if data.stream is not None:
        which = f"the first {len(shown):,} rows of the run"
    else:
        which = f"{f'the first {len(shown):,} of' if len(shown) < len(rows) else 'all'} {len(rows):,} rows"
        laid += ", in the order of the data (training draws its own)"
    kinds = {**MEANINGS, "pad": "padding, never masked or attended"}
    text = (package_files("unmask") / "templates" / "data.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["visible"] = visible
    content = environment.from_string(text).render(
        title=title,
        found=found,
        most=max((count for _, _, count in found.histogram), default=1),
        rows=shown,
        which=f"{which}, {laid}",
        legend=[(kind, counts[kind], meaning) for kind, meaning in kinds.items() if counts[kind]],
        documents=counts["documents"] if counts["documents"] > len(shown) else 0,
        colours=DOCUMENTS,
    )
    try:
        # A file name may have bytes that are not text.
        file.write_text(content, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UnmaskError(f"--html: {file} cannot be written: {error.strerror}.") from error
    return which


def _document(example: Example, tokenizer: PreTrainedTokenizerBase, data: RunData) -> dict[str, Any]:
    """An example as the template of the page reads it."""
    shown = []
    for kind, count, text in pieces(example, tokenizer):
        repeated = f" ×{count}" if kind == "end" and count > 1 else ""
        shown.append((kind, count, visible(text) + "\n" * text.endswith("\n") + repeated))
    size, learnt = len(example.input_ids), example.supervised
    return {"where": visible(location(example, data)), "tokens": size, "supervised": learnt, "pieces": shown}

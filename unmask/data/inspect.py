"""What training will see, for `unmask data`: figures, sequences in colour, and both as an HTML page."""

from __future__ import annotations

import random
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from importlib.resources import files as package_files
from itertools import groupby, islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from unmask.data.collate import Row, pack_sizes
from unmask.data.dataset import RunData, examples_of, first_rows, sizes_of, source_names
from unmask.data.encode import Example
from unmask.data.encode_report import EncodeReport, named
from unmask.io import atomic_write
from unmask.progress import Bar

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

Line = tuple[str, str, str]
"""Label, figure and remark of a line of a table."""


@dataclass(frozen=True)
class Survey:
    """Everything `unmask data` says about the sequences of a run; lengths and counts in tokens."""

    sequences: int
    tokens: int
    supervised: int
    lengths: tuple[int, int, int] | None  # shortest, median, longest; None without sequences
    histogram: list[tuple[int, int, int]]  # (shortest, longest, sequences) of each range of lengths
    tables: dict[str, list[Line]]  # sources, filled positions, duplicates, and what became of the records
    block_size: int


def survey(data: RunData) -> Survey:
    """Count what is in the training data of a run."""
    counted = [sizes_of(part) for part in data.parts]
    sizes = sorted(size for tokens, _ in counted for size in tokens)
    tokens, supervised = sum(sizes), sum(sum(learnt) for _, learnt in counted)
    tables: dict[str, list[Line]] = {"tokens per source": []}
    for name, (part, learnt) in zip(source_names(data.recipe), counted, strict=True):
        share = f"{sum(part) / max(1, tokens):.1%} of the tokens; {len(part):,} sequences"
        remark = f"{share}, {sum(learnt):,} tokens supervised"
        tables["tokens per source"].append((name, f"{sum(part):,}", remark))
    if sizes:
        in_order = [size for part, _ in counted for size in part]
        tables["positions that hold a token"] = list(_filling(in_order, data.recipe))
    tables["duplicates"] = list(_duplicates(data))
    tables["records"] = list(record_lines(data.report))
    if data.encoder is not None and "think" in data.encoder.chat_template:
        remark = "where responses start: data.sft.thinking"
        tables["records"].append(("thinking", data.encoder.thinking, remark))
    lengths = (sizes[0], sizes[len(sizes) // 2], sizes[-1]) if sizes else None
    histogram, block_size = _histogram(sizes) if sizes else [], data.recipe.data.block_size
    return Survey(len(sizes), tokens, supervised, lengths, histogram, tables, block_size)


def location(example: Example, data: RunData) -> str:
    """Name the record of `example`: "alpaca.json record 17"; of a single source just "record 17"."""
    names = source_names(data.recipe)
    said = [names[example.source]] if len(names) > 1 else []
    if example.record >= 0:
        files = data.files[example.source] if data.files else ()
        said += [files[example.file]] if len(files) > 1 else []
        said.append(f"record {example.record + 1:,}")
    return " ".join(said)


def record_lines(report: EncodeReport) -> Iterator[Line]:
    """Yield what became of the records."""
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
    low, high = sizes[0], sizes[-1]
    width = (high - low) // BINS + 1
    counts = Counter((size - low) // width * width + low for size in sizes)
    return [(low, min(low + width - 1, high), counts[low]) for low in range(low, high + 1, width)]


def _duplicates(data: RunData) -> Iterator[Line]:
    """Sequences, prompts and held-out ones that repeat an earlier one, by a hash of their ids."""

    def key(example: Example, prompt: bool) -> bytes | None:
        size = sum(1 for _ in takewhile(bool, example.src_mask)) if prompt else len(example.input_ids)
        return (
            blake2b(array("q", example.input_ids[:size]).tobytes(), digest_size=16).digest() if size else None
        )

    examples, first = data.train, dict[bytes, int]()
    prompts = any(example.src_mask[:1] == [True] for example in examples)
    for prompt in (False, True) if prompts else (False,):
        first, pairs = {}, []
        with Bar("duplicates", len(examples), "sequences") as bar:
            for index, example in enumerate(bar.over(examples)):
                if (name := key(example, prompt)) and (earlier := first.setdefault(name, index)) != index:
                    pairs.append((index, earlier))
        said = [" = ".join(location(examples[index], data) for index in pair) for pair in pairs[:PAIRS]]
        said += [f"and {len(pairs) - PAIRS:,} more"] * (len(pairs) > PAIRS)
        what = "prompt (all before the first response)" if prompt else "whole sequence"
        yield what, f"{len(pairs):,}", "; ".join(said)
    if len(data.held_out):  # `first` has the prompts now, if there are any
        with Bar("duplicates", len(data.held_out), "held out") as bar:
            repeats = sum(key(example, prompts) in first for example in bar.over(data.held_out))
        yield f"held-out {'prompt' if prompts else 'sequence'} that is trained on, too", f"{repeats:,}", ""


def _filling(sizes: Sequence[int], recipe: Recipe) -> Iterator[Line]:
    """The share of positions that hold a token when sequences are laid out in a way."""
    total, length, size = sum(sizes), recipe.data.block_size, micro_batch(recipe)
    shuffled = random.Random(recipe.seed).sample(sizes, len(sizes))
    batches = [shuffled[start : start + size] for start in range(0, len(sizes), size)]
    padded, packed = sum(max(batch) * len(batch) for batch in batches), pack_sizes(sizes, length)
    yield f"padded to block_size {length:,}", f"{total / (len(sizes) * length):.1%}", ""
    yield f"padded to the longest of {size:,} in random order", f"{total / padded:.1%}", ""
    here = ", as here" * recipe.data.packing
    yield f"packed into rows of {length:,}{here}", f"{total / (len(packed) * length):.1%}", ""


def micro_batch(recipe: Recipe) -> int:
    """Rows of one forward pass, on one process."""
    return recipe.micro_batch_size or recipe.global_batch_size


def _print_table(console: Console, lines: Iterable[tuple[Text, str, Text]]) -> None:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(overflow="fold", max_width=60)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for line in lines:
        table.add_row(*line)
    console.print(table, highlight=False)


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
        lines = []
        for kind, count, text in pieces(example, tokenizer):
            kinds.add(kind)
            if len(text) > SHOWN:
                half = SHOWN // 2
                text = f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"
            shown = Text(visible(text, plain=_plain(console)), STYLES[kind])
            lines.append((Text(kind, STYLES[kind]), f"[dim]{count}", shown))
        _print_table(console, lines)
        console.print()
    legend = [Text.assemble((kind, STYLES[kind]), f": {MEANINGS[kind]}") for kind in STYLES if kind in kinds]
    console.print(Text(" | ").join(legend), highlight=False)


def show_report(found: Survey, *, console: Console | None = None) -> None:
    """Print lengths, shares, filled positions, duplicates, and what became of the records."""
    console = console or Console()
    plain = _plain(console)
    if found.lengths is not None:
        low, median, high = found.lengths
        console.print(
            f"length in tokens (block_size {found.block_size:,}): shortest {low:,}, median {median:,},"
            f" longest {high:,}",
            highlight=False,
        )
        digits, most = len(f"{high:,}"), max(count for _, _, count in found.histogram)
        for start, stop, count in found.histogram:
            bar = ("#" if plain else "█") * -(-count * BAR // most)
            label = f"  {start:>{digits},} to {stop:>{digits},}  "
            console.print(Text.assemble(label, (bar, "cyan"), " " * bool(bar), f"{count:,}"), highlight=False)
        console.print()
    console.print(
        f"supervised: {found.supervised:,} of {found.tokens:,} tokens"
        f" ({found.supervised / max(1, found.tokens):.1%}) in {found.sequences:,} sequences",
        highlight=False,
    )
    styles = {"kept": "green", "dropped": "red", "skipped": "red"}
    for title, lines in found.tables.items():
        console.print(f"{title}:", highlight=False)
        shown = []
        for label, value, remark in lines:
            style = styles.get(label, "") if value != "0" else ""
            said = Text(f"  {visible(label, plain=plain)}", style)
            shown.append((said, value, Text(visible(remark, plain=plain))))
        _print_table(console, shown)


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
    """Write the page, and say which rows it shows: `SEQUENCES` at most, of about `TOKENS` tokens."""
    rows = data.rows if data.stream is None else first_rows(data, SEQUENCES)
    counts, shown, tokens, size = Counter[str](), [], 0, micro_batch(data.recipe)
    padded, most = _padded(rows, size, data.row_length), min(len(rows), SEQUENCES)
    with Bar("writing the page", most, "rows") as bar:
        for row, length in bar.over(islice(padded, most)):
            used = sum(len(example.input_ids) for example in row)
            tokens += used
            if shown and tokens > TOKENS:
                break
            documents = []
            for example in row:
                texts = []
                for kind, count, text in pieces(example, tokenizer):
                    counts[kind] += count
                    repeated = f" ×{count}" if kind == "end" and count > 1 else ""
                    texts.append((kind, count, visible(text) + "\n" * text.endswith("\n") + repeated))
                where = visible(location(example, data))
                document = {"where": where, "tokens": len(example.input_ids), "pieces": texts}
                documents.append({**document, "supervised": example.supervised})
            counts.update(documents=len(row), pad=length - used)
            shown.append({"size": used, "padding": length - used, "documents": documents})
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
    atomic_write(file, content)
    return which


def _padded(
    rows: Sequence[Example | Row], size: int, length: int | None
) -> Iterator[tuple[list[Example], int]]:
    """Rows with the length they are padded to: `length`, or that of the longest of `size` of them."""
    for start in range(0, len(rows), size):
        batch = [examples_of(rows[number]) for number in range(start, min(start + size, len(rows)))]
        longest = max(sum(len(example.input_ids) for example in row) for row in batch)
        yield from ((row, length or longest) for row in batch)

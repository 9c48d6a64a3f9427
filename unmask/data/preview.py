"""What training will see, in the terminal: examples in colour, lengths, and what was dropped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby, islice

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from unmask.data.encode import EncodeReport, Example

STYLES = {"source": "dim", "response": "green", "end": "black on yellow", "text": "green"}
MEANINGS = {
    "source": "never masked",
    "response": "supervised",
    "end": "end token, supervised",
    "text": "supervised",
}
BINS = 10
BAR = 40  # characters of the longest bar
SHOWN = 400  # characters of one piece, before its middle is left out


def show_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int = 3,
    console: Console | None = None,
) -> None:
    """Print the first `limit` examples piece by piece, each piece with its kind and its tokens.

    Kinds: source (never masked), response, and the end tokens that close one; "text" in place of
    response where nothing is source (pre-training). A line break shows as ⏎ before it breaks.
    """
    console = console or Console()
    shown = list(islice(examples, limit))
    plain = _plain(console)
    kinds: list[str] = []
    for number, example in enumerate(shown, 1):
        name = "" if example.sample_id < 0 else f", record {example.sample_id + 1}"
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
        for kind, ids in _pieces(example, tokenizer):
            kinds.append(kind)
            # Repeated end tokens show once; their number stands beside.
            text = visible(str(tokenizer.decode(ids[:1] if kind == "end" else ids)), plain=plain)
            style = STYLES[kind]
            table.add_row(Text(kind, style), str(len(ids)), Text(_shortened(text), style))
        console.print(table)
        console.print()
    legend = [Text.assemble((kind, STYLES[kind]), f": {MEANINGS[kind]}") for kind in STYLES if kind in kinds]
    console.print(Text(" | ").join(legend), highlight=False)


def show_report(
    examples: Sequence[Example],
    report: EncodeReport | None = None,
    *,
    block_size: int | None = None,
    console: Console | None = None,
) -> None:
    """Print the length histogram, the share of supervised tokens and what became of the records.

    `report` is None for pre-training, where blocks of text have no records to lose.
    """
    console = console or Console()
    if examples:
        _show_lengths([len(example.input_ids) for example in examples], block_size, console)
    tokens = sum(len(example.input_ids) for example in examples)
    supervised = sum(example.supervised for example in examples)
    share = 100 * supervised / tokens if tokens else 0.0
    console.print(
        f"supervised: {supervised:,} of {tokens:,} tokens ({share:.1f}%) in {len(examples):,} sequences",
        highlight=False,
    )
    if report is None:
        return
    formats = ", ".join(f"{name} ({count:,})" for name, count in report.formats.items())
    console.print(f"format: {formats or 'none'}", highlight=False)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("records", f"{report.records:,}", "")
    table.add_row(Text("kept", "green"), f"{report.kept:,}", "")
    table.add_row("  truncated", f"{report.truncated:,}", "cut at block_size, end token lost")
    dropped = sum(count for count, _ in report.dropped.values())
    table.add_row(Text("dropped", "red" if dropped else ""), f"{dropped:,}", "")
    for reason, (count, where) in report.dropped.items():
        table.add_row("", f"{count:,}", Text(f"{reason}; first: {where}"))
    if report.with_special_strings:
        note = "held strings like special tokens, read as plain text"
        table.add_row("noted", f"{report.with_special_strings:,}", note)
    if report.with_turns_after:
        note = "had turns after the last response, left out"
        table.add_row("noted", f"{report.with_turns_after:,}", note)
    console.print(table, highlight=False)


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
        elif 0x7F <= ord(char) < 0xA0 or char in "\u2028\u2029" or "\u202a" <= char <= "\u202e":
            shown.append(f"\\u{ord(char):04x}")
        else:
            shown.append(char)
    joined = "".join(shown)
    return joined.encode("ascii", "backslashreplace").decode() if plain else joined


def _plain(console: Console) -> bool:
    return not (console.encoding or "").lower().startswith("utf")


def _pieces(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, list[int]]]:
    """Runs of tokens of one kind."""
    # Text never holds control tokens, so a supervised one can only end a response.
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


def _show_lengths(lengths: Sequence[int], block_size: int | None, console: Console) -> None:
    """A bar for each range of lengths."""
    low, high = min(lengths), max(lengths)
    ordered = sorted(lengths)
    of = "" if block_size is None else f" (block_size {block_size:,})"
    console.print(
        f"length in tokens{of}: shortest {low:,}, median {ordered[len(ordered) // 2]:,}, longest {high:,}",
        highlight=False,
    )
    width = (high - low) // BINS + 1
    counts = [0] * ((high - low) // width + 1)
    for length in lengths:
        counts[(length - low) // width] += 1
    block = "#" if _plain(console) else "█"
    digits = len(f"{high:,}")
    for index, count in enumerate(counts):
        start = low + index * width
        stop = min(start + width - 1, high)
        bar = block * -(-count * BAR // max(counts))
        label = f"{start:>{digits},} to {stop:>{digits},}"
        console.print(
            Text.assemble("  ", label, "  ", (bar, "cyan"), " " if bar else "", f"{count:,}"),
            highlight=False,
        )
    console.print()

"""What training will see, in the terminal: examples in colour, lengths, and what was dropped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby, islice

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from unmask.data.encode import Example
from unmask.data.survey import Survey, place, sections

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
    shown = list(islice(examples, limit))
    plain = _plain(console)
    kinds: list[str] = []
    for number, example in enumerate(shown, 1):
        name = f", {of}" if (of := place(example, names, files)) else ""
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
            # Repeated end tokens show once; their number stands beside.
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
            style = (
                {"kept": "green", "dropped": "red", "skipped": "red"}.get(label, "") if value != "0" else ""
            )
            plain = _plain(console)
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


def _show_lengths(found: Survey, console: Console) -> None:
    """A bar for each range of lengths."""
    if found.lengths is None:
        return
    low, median, high = found.lengths
    of = "" if found.block_size is None else f" (block_size {found.block_size:,})"
    console.print(
        f"length in tokens{of}: shortest {low:,}, median {median:,}, longest {high:,}",
        highlight=False,
    )
    block = "#" if _plain(console) else "█"
    digits = len(f"{high:,}")
    most = max(count for _, _, count in found.histogram)
    for start, stop, count in found.histogram:
        bar = block * -(-count * BAR // most)
        label = f"{start:>{digits},} to {stop:>{digits},}"
        console.print(
            Text.assemble("  ", label, "  ", (bar, "cyan"), " " if bar else "", f"{count:,}"),
            highlight=False,
        )
    console.print()

"""What training will see, as one page for a browser: the report, then the sequences to scroll through.

The page needs nothing but itself: no script, no font, no picture from elsewhere. Whatever stands in the
data is shown as text.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from unmask.data.encode import Example
from unmask.data.collate import Row
from unmask.data.preview import MEANINGS, pieces, visible
from unmask.data.survey import Survey, place, sections
from unmask.errors import UnmaskError

SEQUENCES = 1000  # shown at most
TOKENS = 500_000  # shown at most: a browser still scrolls their text with ease

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --dim: #5c6370; --paper: #fff; --line: #d5d9e0;
  --source: #6b7280; --response-ink: #0b5d1e; --response: #dcf5e1; --end-ink: #4a3000; --end: #ffd866;
  --pad: #e8eaee; --bar: #3b82c4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --dim: #9aa3b2; --paper: #16181d;
  --line: #3a3f4b; --source: #a1a8b5; --response-ink: #b8f0c2; --response: #143d1e; --end-ink: #2b1d00;
  --end: #e0b33c; --pad: #2a2e37; --bar: #5fa0dc; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 0 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 1.2rem 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
table { border-collapse: collapse; }
td, th { padding: .1rem 1rem .1rem 0; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td.bar { width: 20rem; } td.bar div { background: var(--bar); height: .8rem; margin-top: .3rem; }
td:last-child, .dim { color: var(--dim); }
nav { position: sticky; top: 0; background: var(--paper); border-bottom: 1px solid var(--line);
  padding: .5rem 0; z-index: 1; }
nav > span { display: inline-block; margin-right: 1.2rem; }
article { border: 1px solid var(--line); border-radius: 6px; margin: .8rem 0; overflow: hidden;
  content-visibility: auto; contain-intrinsic-size: auto 12rem; }
header { padding: .2rem .7rem; font-size: .85rem; color: var(--dim); border-bottom: 1px solid var(--line); }
header b { color: var(--ink); }
section { border-left: 8px solid var(--document); padding: .3rem .7rem; }
section + section { border-top: 2px solid var(--document); }
section p { margin: 0; font-size: .8rem; color: var(--dim); }
pre { margin: .1rem 0; font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
pre span { unicode-bidi: isolate; }
.source { color: var(--source); }
.response, .text { background: var(--response); color: var(--response-ink); }
.end { background: var(--end); color: var(--end-ink); border-radius: 3px; padding: 0 2px; font-weight: 600; }
.pad { padding: .2rem .7rem; font-size: .85rem; color: var(--dim);
  background: repeating-linear-gradient(45deg, var(--pad) 0 6px, transparent 6px 12px); }
nav .pad { padding: 0 .3rem; }
.swatch { display: inline-block; width: .6rem; height: 1rem; vertical-align: text-bottom; }
"""
DOCUMENTS = ("#3b82c4", "#c2569b", "#d07b2c", "#5a9e4b", "#7d63c9", "#2a9d9d")  # one after another in a row


def check_page(file: Path) -> None:
    """Find out whether a page can be written, before the data are read.

    Raises:
        UnmaskError: a folder, or a place that is missing or cannot be written to.
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
        files: names of the files of each, see `survey.place`.
        width: tokens of a packed row; None = each row is padded to the longest of its micro batch.
        micro_batch: rows of one forward.
        first_of_run: rows are those that a run begins with, in its order, and not all there are.

    Raises:
        UnmaskError: the file cannot be written.
    """
    shown, tokens = 0, 0
    counts: Counter[str] = Counter()
    body: list[str] = []
    for start in range(0, len(rows), micro_batch):
        batch = [[row] if isinstance(row, Example) else row for row in rows[start : start + micro_batch]]
        sizes = [sum(len(example.input_ids) for example in row) for row in batch]
        for row, size in zip(batch, sizes, strict=True):
            if shown == SEQUENCES or (tokens + size > TOKENS and shown):
                break
            shown, tokens = shown + 1, tokens + size
            body.append(
                _row(
                    row,
                    shown,
                    None if first_of_run else len(rows),
                    max(sizes) if width is None else width,
                    tokenizer,
                    names,
                    files,
                    counts,
                )
            )
        else:
            continue
        break
    page = "\n".join(
        _page(title, found, body, counts, shown, None if first_of_run else len(rows), width, micro_batch)
    )
    try:
        # A file name may hold bytes that are no text.
        file.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UnmaskError(f"--html: {file} cannot be written: {error.strerror}.") from error
    return shown


def _page(
    title: str,
    found: Survey,
    body: list[str],
    counts: Counter[str],
    shown: int,
    total: int | None,
    width: int | None,
    micro_batch: int,
) -> Iterator[str]:
    yield "<!DOCTYPE html>"
    yield '<html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
    yield f"<h1>{escape(title)}</h1>"
    share = found.supervised / found.tokens if found.tokens else 0
    yield (
        f"<div>{found.sequences:,} sequences, {found.tokens:,} tokens,"
        f" {found.supervised:,} ({share:.1%}) supervised</div>"
    )
    yield from _lengths(found)
    for name, table in sections(found):
        yield f"<h2>{escape(name.capitalize())}</h2><table>"
        for label, figure, remark in table:
            label, remark = escape(visible(label)), escape(visible(remark))
            yield f'<tr><td>{label}</td><td class="number">{figure}</td><td>{remark}</td></tr>'
        yield "</table>"
    yield "<h2>Sequences</h2>"
    if width is not None:
        laid = f"packed into rows of {width:,} tokens"
    else:
        order = "" if total is None else ", in the order of the data (training draws its own)"
        laid = f"padded to the longest of {micro_batch:,}{order}"
    which = f"all {shown:,} rows" if shown == total else f"the first {shown:,} of {total or 0:,} rows"
    if total is None:
        which = f"the first {shown:,} rows of the run"
    yield f'<div class="dim">Shown: {which}, {laid}. ⏎ is a line break.</div>'
    yield "<nav><b>Tokens shown:</b> "
    for kind, meaning in (*MEANINGS.items(), ("pad", "padding, never masked or attended")):
        if counts[kind]:
            yield f'<span><span class="{kind}">{kind}</span> {counts[kind]:,} ({meaning})</span>'
    if counts["documents"] > counts["rows"]:
        swatches = "".join(f'<i class="swatch" style="background:{colour}"></i>' for colour in DOCUMENTS)
        yield f"<span>{swatches} {counts['documents']:,} documents that share rows</span>"
    yield "</nav>"
    yield from body
    if total is not None and shown < total:
        yield f'<p class="dim">{total - shown:,} more rows are not shown.</p>'
    yield "</body></html>\n"


def _lengths(found: Survey) -> Iterator[str]:
    if found.lengths is None:
        return
    shortest, median, longest = found.lengths
    of = "" if found.block_size is None else f" (block_size {found.block_size:,})"
    yield f"<h2>Length in tokens{of}</h2>"
    yield f"<div>shortest {shortest:,}, median {median:,}, longest {longest:,}</div><table>"
    most = max(count for _, _, count in found.histogram)
    for start, stop, count in found.histogram:
        bar = f'<div style="width:{100 * count / most:.1f}%"></div>'
        yield (
            f'<tr><td class="number">{start:,} to {stop:,}</td><td class="number">{count:,}</td>'
            f'<td class="bar">{bar}</td></tr>'
        )
    yield "</table>"


def _row(
    row: Row,
    number: int,
    total: int | None,
    width: int,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    files: Sequence[Sequence[str]],
    counts: Counter[str],
) -> str:
    size = sum(len(example.input_ids) for example in row)
    supervised = sum(example.supervised for example in row)
    several = f", {len(row)} documents" if len(row) > 1 else ""
    title = f"row {number:,}" if total is None else f"row {number:,} of {total:,}"
    out = [f"<article><header><b>{title}</b>{several}: {size:,} tokens, {supervised:,} supervised</header>"]
    for index, example in enumerate(row):
        out.append(f'<section style="--document:{DOCUMENTS[index % len(DOCUMENTS)]}">')
        where = escape(visible(place(example, names, files)))
        of = f": {len(example.input_ids):,} tokens, {example.supervised:,} supervised" if several else ""
        if where or of:
            out.append(f"<p>{where or f'document {index + 1}'}{of}</p>")
        out.append("<pre>")
        for kind, ids in pieces(example, tokenizer):
            counts[kind] += len(ids)
            # Repeated end tokens show once, with their number.
            repeated = f" ×{len(ids)}" if kind == "end" and len(ids) > 1 else ""
            text = str(tokenizer.decode(ids[:1] if kind == "end" else ids))
            text = visible(text) + "\n" * text.endswith("\n")
            count = f"{kind}, {len(ids):,} token{'s' * (len(ids) != 1)}"
            out.append(f'<span class="{kind}" title="{count}">{escape(text)}{repeated}</span>')
        out.append("</pre></section>")
    counts["rows"] += 1
    counts["documents"] += len(row)
    if padding := width - size:
        counts["pad"] += padding
        out.append(f'<div class="pad">padding ×{padding:,}</div>')
    out.append("</article>")
    return "".join(out)

"""Likelihood of a file under a model: a bound on -log p of every record, conditional on its prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import compress, islice
from pathlib import Path
from typing import Any

import torch
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from unmask.data.collate import collate
from unmask.data.encode import Encoder, Example, encode_records
from unmask.data.files import READERS, kind_of, read_records
from unmask.data.records import detect_format
from unmask.data.tokenizer import check_vocabulary, load_tokenizer
from unmask.diffusion.likelihood import Likelihood, Score, check_settings, likelihood, total
from unmask.errors import UnmaskError
from unmask.generation.trace import token_texts
from unmask.io import atomic_write, check_output_file
from unmask.model.bf16 import place_for_inference
from unmask.model.checkpoint import load_model, read_config
from unmask.progress import Bar
from unmask.shipped import find_shipped

TEXT_FIELD = "text"
TEXT_BLOCK = 1024  # tokens of a piece of plain text, or the model's positions if they are fewer
RECORDS_AT_ONCE = 512  # in memory as tensors
COLOURS = ((1, "green"), (3, "yellow"), (6, "red"))  # nats below which a token has this colour
HIGHEST = "bold white on red"


@dataclass(frozen=True)
class ScoredText:
    """A record, or a piece of plain text, to score."""

    example: Example
    """`src_mask` True = prompt: given, not scored."""
    location: str
    """File and line, or tokens."""
    num_bytes: int
    """UTF-8 bytes of the text of the scored ids; special tokens have none."""


@dataclass(frozen=True)
class Texts:
    """What is to be scored of a file."""

    items: list[ScoredText]
    unit: str
    """"records", or "blocks" of plain text."""
    notes: list[str]
    """What was left out and why; how plain text was cut."""


@dataclass(frozen=True)
class FileScore:
    """The bound of every record of a file, and of the whole file."""

    lines: list[dict[str, Any]]
    """One a record, as in `out`, with `token_nats`: each scored token and its nats."""
    total: Score
    num_forwards: int
    """Sequences that went through the model."""
    texts: Texts
    tokenizer: PreTrainedTokenizerBase

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the scored texts; end tokens have nats, but no bytes."""
        return sum(item.num_bytes for item in self.texts.items)


def score_file(
    model: str,
    file: str | Path,
    *,
    estimator: str = "exact_k",
    num_samples: int = 64,
    seed: int = 0,
    batch_size: int = 16,
    out: Path | None = None,
    per_token: bool = False,
    **reading: Any,
) -> FileScore:
    """Score every record of a file under a diffusion checkpoint.

    Args:
        model: folder or hub name.
        file: records of any known format, or plain text.
        estimator: see `unmask.likelihood`.
        num_samples: see `unmask.likelihood`.
        seed: see `unmask.likelihood`.
        batch_size: see `unmask.likelihood`.
        out: file for one JSON line per record; written whole, after the scoring.
        per_token: add each scored token with its nats to those lines.
        **reading: see `read_texts`: `raw`, `format`, `end_fill`, `block_size`, `limit`.

    Raises:
        UnmaskError: a setting, the file, a record or the checkpoint cannot be used, or `out` cannot be
            written; raised before the scoring, except for a full disk.
    """
    settings: dict[str, Any] = {"estimator": estimator, "num_samples": num_samples, "seed": seed}
    settings["batch_size"] = batch_size
    check_settings(**settings)
    if per_token and out is None:
        raise UnmaskError("per_token has an effect with out alone: it adds the tokens to its lines.")
    if out is not None:
        check_output_file(out, "out")
    tokenizer = load_tokenizer(model)
    positions = read_config(model).get("max_position_embeddings")
    texts = read_texts(file, tokenizer, positions=positions, **reading)
    denoiser: Any = load_model(model)
    check_vocabulary(tokenizer, denoiser.config, model)
    place_for_inference(denoiser)
    lines: list[dict[str, Any]] = []
    parts: list[Likelihood] = []
    with Bar("scoring", len(texts.items), "records") as advance:
        for start in range(0, len(texts.items), RECORDS_AT_ONCE):
            items = texts.items[start : start + RECORDS_AT_ONCE]
            batch = collate([item.example for item in items], pad_token_id=0)
            part = likelihood(denoiser, batch, advance=advance, **settings)
            parts.append(part)
            lines += [
                {"index": start + row, **_line(item, part, row, tokenizer)} for row, item in enumerate(items)
            ]
    if out is not None:
        hidden = () if per_token else ("token_nats",)
        written = ({name: line[name] for name in line if name not in hidden} for line in lines)
        atomic_write(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in written))
    fields = ("nll", "stderr", "num_tokens", "record_key")
    whole = total(*(torch.cat([getattr(part, name) for part in parts]) for name in fields))
    return FileScore(lines, whole, sum(part.num_forwards for part in parts), texts, tokenizer)


def _line(
    text: ScoredText, bound: Likelihood, row: int, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    score = Score(bound.nll[row], bound.stderr[row], bound.num_tokens[row])
    num_bytes, is_scored = torch.tensor(text.num_bytes), [not source for source in text.example.src_mask]
    scored, nats = (
        compress(text.example.input_ids, is_scored),
        compress(bound.token_nll[row].tolist(), is_scored),
    )
    # · where a character ends with a later token.
    tokens = [
        [token or "·", nll] for token, nll in zip(token_texts(list(scored), tokenizer), nats, strict=True)
    ]
    mixture = {} if bound.mixture_nll is None else {"mixture_nats": bound.mixture_nll[row].item()}
    return {
        "record": text.location,
        "nats": score.nll.item(),
        "stderr": score.stderr.item(),
        "tokens": int(score.num_tokens),
        "bytes": text.num_bytes,
        "nats_per_token": score.nats_per_token().value.item(),
        "perplexity": score.perplexity().value.item(),
        "bits_per_byte": score.bits_per_byte(num_bytes).value.item() if num_bytes else None,
        **mixture,
        "token_nats": tokens,
    }


def read_texts(
    file: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    raw: bool = False,
    format: str = "auto",
    end_fill: int = 1,
    block_size: int | None = None,
    limit: int | None = None,
    positions: int | None = None,
) -> Texts:
    """Read and encode the conversations or the plain text of a file.

    Conversations are rendered with the tokenizer's chat template; the last response is scored with its end
    token, given everything before it. Plain text is a file that has no records, records with a field "text"
    that are not conversations, or with `raw` every file; each piece is scored without the one before.

    Args:
        file: file, folder, glob or hub name.
        raw: read plain text, from the field "text" of records.
        format: format of the records, or "auto".
        end_fill: end tokens fill a response to a multiple of so many tokens, all of them scored, like
            `data.sft.end_fill` in training.
        block_size: tokens of a piece of plain text, 1024 by default; longer conversations are dropped.
        limit: conversations or pieces at most.
        positions: the longest sequence that the model takes, and the largest `block_size`.

    Raises:
        UnmaskError: the file or a record cannot be used, a setting does not fit, or nothing is left.
    """
    if block_size is not None and positions is not None and block_size > positions:
        raise UnmaskError(
            f"block_size: {block_size} tokens exceed the model's {positions} positions"
            " (max_position_embeddings)."
        )
    plain = raw or _is_text_file(file)
    if not plain and format == "auto":
        first, where = next(read_records(file, limit=1))
        try:
            detect_format(first, where)
        except UnmaskError:
            plain = isinstance(first.get(TEXT_FIELD), str)
    if plain:
        for setting, has_effect in (("format", format != "auto"), ("end_fill", end_fill != 1)):
            if has_effect:
                raise UnmaskError(f"{setting} has no effect on plain text; {file} is read as such.")
        size = block_size or min(TEXT_BLOCK, positions or TEXT_BLOCK)
        pieces = (piece for text, at in _plain_texts(file) for piece in _cut(text, at, tokenizer, size))
        items = list(islice(pieces, limit))
        if not items:
            raise UnmaskError(f"{file}: there is no text to score.")
        note = f"plain text, in blocks of at most {size:,} tokens, each scored independently"
        return Texts(items, "blocks", [note])
    if not tokenizer.chat_template:
        raise UnmaskError("the tokenizer has no chat template for conversations; score plain text (--raw).")
    size = block_size or positions
    encoder = Encoder(
        tokenizer, layout="chat", train_on="last", end_fill=end_fill, block_size=size, too_long="drop"
    )
    records = list(read_records(file, limit=limit))
    with Bar("encoding", len(records), "records") as bar:
        examples, report = encode_records(bar.over(records), encoder, format)
    if not examples:
        raise UnmaskError(f"{file}: no record can be scored: {'; '.join(report.left_out())}.")
    items = [ScoredText(e, records[e.record][1], _response_bytes(e, tokenizer)) for e in examples]
    return Texts(
        items,
        "records",
        [
            f"not scored: {count:,} {reason} (first: {location})"
            for reason, (count, location) in report.dropped.items()
        ],
    )


def show_records(scored: FileScore, count: int, console: Console) -> None:
    """Print the first records with their tokens coloured by nats; a digit below each token is its nats."""
    for line, text in zip(scored.lines[:count], scored.texts.items, strict=False):
        console.print(
            f"{line['record']}: {line['tokens']} tokens, {line['nats']:.2f} ± {line['stderr']:.2f} nats,"
            f" perplexity {line['perplexity']:.3g}",
            style="bold",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        if prompt := list(compress(text.example.input_ids, text.example.src_mask)):
            console.print(Text("".join(token_texts(prompt, scored.tokenizer)), "dim"), soft_wrap=True)
        for drawn in coloured_tokens(line["token_nats"], console.width):
            console.print(drawn, no_wrap=True, overflow="crop")
        console.print()
    if scored.lines[:count]:
        console.print(Text("below each token its nats, rounded down; + means 10 or more", "dim"))


def show_total(scored: FileScore, console: Console) -> None:
    """Print the figures of the whole file, each with its standard error, and the records left out."""
    score = scored.total
    rows = [
        (scored.texts.unit, f"{len(scored.lines):,}", ""),
        ("tokens", f"{int(score.num_tokens):,}", ""),
        ("bytes", f"{scored.num_bytes:,}", ""),
        ("nats", f"{score.nll:,.1f}", f"± {score.stderr:,.1f}"),
    ]
    for name, (value, stderr) in (
        ("nats per token", score.nats_per_token()),
        ("perplexity", score.perplexity()),
        ("bits per byte", score.bits_per_byte(torch.tensor(scored.num_bytes))),
    ):
        rows.append((name, f"{value:,.4f}", f"± {stderr:,.4f}"))
    if "mixture_nats" in scored.lines[0]:
        mixture = sum(line["mixture_nats"] for line in scored.lines)
        rows.append(("nats of the mixture", f"{mixture:,.1f}", "over the orders sampled"))
    rows.append(("forward passes", f"{scored.num_forwards:,}", ""))
    table = Table(box=None, show_header=False, pad_edge=False)
    for justify in ("left", "right", "left"):
        table.add_column(no_wrap=True, justify=justify)
    for row in rows:
        table.add_row(*row)
    console.print(table, highlight=False)
    interval = (
        "± is one standard error; the 95% interval is 2.0 of them for 64 samples, 2.8 for 8, 12.7 for 2"
    )
    console.print("\n".join([*scored.texts.notes, interval]), highlight=False, markup=False)


def coloured_tokens(token_nats: list[list[Any]], width: int) -> Iterator[Text]:
    """Lines of tokens at most `width` cells wide, each followed by a line with the nats of its tokens."""
    tokens, digits = Text(), Text(style="dim")
    for text, nats in token_nats:
        size = cell_len(text)
        if tokens.cell_len + size > width and tokens:
            yield from (tokens, digits)
            tokens, digits = Text(), Text(style="dim")
        tokens.append(text, next((style for below, style in COLOURS if nats < below), HIGHEST))
        digits.append((str(int(nats)) if nats < 10 else "+").ljust(size))
    if tokens:
        yield from (tokens, digits)


def _is_text_file(file: str | Path) -> bool:
    return Path(find_shipped(file)).expanduser().is_file() and kind_of(str(file)) not in READERS


def _plain_texts(file: str | Path) -> Iterator[tuple[str, str]]:
    """Texts with their locations."""
    for record, location in read_records(file, text=_is_text_file(file)):
        if isinstance(record, str):
            yield record, Path(file).name
            continue
        text = record.get(TEXT_FIELD)
        if not isinstance(text, str):
            raise UnmaskError(
                f"{location}: plain text is read from the field '{TEXT_FIELD}'; fields here:"
                f" {', '.join(map(str, record))}."
            )
        if text.strip():
            yield text, location


def _cut(text: str, location: str, tokenizer: PreTrainedTokenizerBase, size: int) -> Iterator[ScoredText]:
    """Pieces of a text with their bytes, which add up to those of the text."""
    encoded: Any = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    for start in range(0, len(ids), size):
        stop = min(start + size, len(ids))
        # A character whose bytes are tokens of two pieces counts in the second.
        end = offsets[stop][0] if stop < len(ids) else len(text)
        piece = text[offsets[start][0] if start else 0 : end]
        at = location if len(ids) <= size else f"{location}, tokens {start + 1} to {stop}"
        yield ScoredText(Example(ids[start:stop], [False] * (stop - start)), at, len(piece.encode()))


def _response_bytes(example: Example, tokenizer: PreTrainedTokenizerBase) -> int:
    scored = [token for token, source in zip(example.input_ids, example.src_mask, strict=True) if not source]
    return len(str(tokenizer.decode(scored, skip_special_tokens=True)).encode())

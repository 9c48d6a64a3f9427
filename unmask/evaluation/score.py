"""How likely a file is under a model: a bound on -log p of every record, conditional on its prompt."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from unmask.data.collate import collate
from unmask.data.records import detect_format
from unmask.data.encode import Encoder, Example, encode_records
from unmask.data.inspect import visible
from unmask.data.files import RECORD_SUFFIXES, read_documents, read_records
from unmask.data.tokenizer import load_tokenizer
from unmask.diffusion.likelihood import Estimate, Score, check_settings, likelihood, total
from unmask.errors import UnmaskError
from unmask.generation.trace import token_texts
from unmask.model.bf16 import place_for_inference
from unmask.model.checkpoint import load_model, read_config

TEXT_FIELD = "text"
TEXT_BLOCK = 1024  # tokens of a block of plain text, or the model's positions if they are fewer
TOGETHER = 512  # records in memory as tensors at a time
LEVELS = ((1, "green"), (3, "yellow"), (6, "red"))  # nats below which a token has this colour
HIGHEST = "bold white on red"


@dataclass(frozen=True)
class ScoredText:
    """A record, or a block of plain text, that is to be scored."""

    example: Example
    """Its ids; `src_mask` True = prompt: given, not scored."""
    where: str
    """The record or block it is, for people."""
    num_bytes: int
    """UTF-8 bytes of the text that the scored ids stand for; special tokens stand for none."""


@dataclass(frozen=True)
class Texts:
    """What a file holds; `dropped` maps a reason to (count, first place)."""

    items: list[ScoredText]
    kind: str
    """"conversations" or "plain text"."""
    block_size: int
    dropped: dict[str, tuple[int, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class RecordScore:
    """The bound of one record; floats in nats."""

    text: ScoredText
    score: Score
    token_nll: list[float]
    """What each token contributes, 0 for those of the prompt."""
    mixture_nll: float | None
    """See `unmask.Likelihood`; with the estimator "chain" alone."""

    def as_json(self, index: int, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Any]:
        """One line of `out`; with a tokenizer also each scored token with its nats."""
        num_bytes = self.text.num_bytes
        bits_per_byte = self.score.bits_per_byte(torch.tensor(num_bytes)).value.item() if num_bytes else None
        line: dict[str, Any] = {
            "index": index,
            "record": self.text.where,
            "nats": self.score.nll.item(),
            "stderr": self.score.stderr.item(),
            "tokens": int(self.score.num_tokens),
            "bytes": num_bytes,
            "nats_per_token": self.score.nats_per_token().value.item(),
            "perplexity": self.score.perplexity().value.item(),
            "bits_per_byte": bits_per_byte,
        }
        if self.mixture_nll is not None:
            line["mixture_nats"] = self.mixture_nll
        if tokenizer is not None:
            ids, nll = self.scored()
            line["token_nats"] = [
                [text, nats] for text, nats in zip(_texts(ids, tokenizer), nll, strict=True)
            ]
        return line

    def scored(self) -> tuple[list[int], list[float]]:
        """The ids scored and their nats."""
        example = self.text.example
        places = [i for i, source in enumerate(example.src_mask) if not source]
        return [example.input_ids[i] for i in places], [self.token_nll[i] for i in places]


@dataclass(frozen=True)
class FileScore:
    """The bound of every record of a file, and of the whole."""

    records: list[RecordScore]
    total: Score
    num_bytes: int
    num_forwards: int
    texts: Texts
    tokenizer: PreTrainedTokenizerBase

    def bits_per_byte(self) -> Estimate:
        """Bits per UTF-8 byte of the scored text; the nats of end tokens count, their bytes are none."""
        return self.total.bits_per_byte(torch.tensor(self.num_bytes))


def score_file(
    model: str,
    file: str | Path,
    *,
    raw: bool = False,
    format: str = "auto",
    end_fill: int = 1,
    block_size: int | None = None,
    limit: int | None = None,
    estimator: str = "exact_k",
    num_samples: int = 64,
    seed: int = 0,
    batch_size: int = 16,
    out: Path | None = None,
    per_token: bool = False,
    console: Console | None = None,
) -> FileScore:
    """Score every record of a file under a diffusion checkpoint.

    Args:
        model: folder or hub name.
        file, raw, format, end_fill, block_size, limit: see `read_texts`.
        estimator, num_samples, seed, batch_size: see `unmask.likelihood`.
        out: file for one JSON line a record; it appears when all is scored, or not at all.
        per_token: write each scored token with its nats, too.
        console: where a progress bar is shown; none by default.

    Raises:
        UnmaskError: a setting, the file, a record or the checkpoint cannot be used, or `out` cannot be
            written. All of it is found out before the scoring, but for a disk that fills up.
    """
    check_settings(estimator, num_samples, seed, batch_size=batch_size)
    if per_token and out is None:
        raise UnmaskError("per_token has an effect with out alone: it adds the tokens to its lines.")
    if out is not None:
        _check_out(out)
    positions = read_config(model).get("max_position_embeddings")
    tokenizer = load_tokenizer(model)
    texts = read_texts(
        file,
        tokenizer,
        raw=raw,
        format=format,
        end_fill=end_fill,
        block_size=block_size,
        limit=limit,
        positions=positions,
    )
    denoiser: Any = load_model(model)
    place_for_inference(denoiser)
    records: list[RecordScore] = []
    parts = []
    console = console or Console(quiet=True)
    columns = (TextColumn("scoring"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("scoring", total=len(texts.items))
        for start in range(0, len(texts.items), TOGETHER):
            items = texts.items[start : start + TOGETHER]
            found = likelihood(
                denoiser,
                collate([item.example for item in items], pad_token_id=0),
                estimator=estimator,
                num_samples=num_samples,
                seed=seed,
                batch_size=batch_size,
                advance=lambda count: progress.advance(task, count),
            )
            parts.append(found)
            for row, item in enumerate(items):
                score = Score(found.nll[row], found.stderr[row], found.num_tokens[row])
                token_nll = found.token_nll[row, : len(item.example.input_ids)].tolist()
                mixture = None if found.mixture_nll is None else found.mixture_nll[row].item()
                records.append(RecordScore(item, score, token_nll, mixture))
    fields = ("nll", "stderr", "num_tokens", "record_key")
    scored = FileScore(
        records,
        total(*(torch.cat([getattr(part, name) for part in parts]) for name in fields)),
        sum(item.num_bytes for item in texts.items),
        sum(part.num_forwards for part in parts),
        texts,
        tokenizer,
    )
    if out is not None:
        _write(out, (record.as_json(i, tokenizer if per_token else None) for i, record in enumerate(records)))
    return scored


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
    """Read and encode what is to be scored.

    Records of conversations are laid out by the tokenizer's chat template. The last response is scored, its
    end token included; all before it is the prompt. Anything else is plain text: a file that is no table of
    records, records with a field "text" and no conversation, or with `raw` every file. A text longer than
    `block_size` is cut into blocks, each of which is scored on its own, without the one before.

    Args:
        file: file, folder, glob or hub name.
        raw: read plain text, from the field "text" of records.
        format: format of the records, or "auto".
        end_fill: end tokens fill a response to a multiple of so many tokens, all of them scored: what
            `data.sft.end_fill` was in training.
        block_size: tokens of a block of plain text, 1024 by default; of conversations longer ones are
            dropped. At most `positions`, and that by default.
        limit: conversations or blocks at most.
        positions: the longest sequence that the model takes.

    Raises:
        UnmaskError: the file or a record cannot be used, a setting does not fit, or nothing is left.
    """
    if block_size is not None and positions is not None and block_size > positions:
        raise UnmaskError(
            f"block_size: {block_size} tokens exceed the model's {positions} positions"
            " (max_position_embeddings)."
        )
    name = str(file)
    plain = raw or (Path(name).expanduser().is_file() and not name.lower().endswith(RECORD_SUFFIXES))
    if not plain and format == "auto":
        first, where = next(read_records(file, limit=1))
        plain = isinstance(first.get(TEXT_FIELD), str) and not _has_format(first, where)
    if plain:
        if format != "auto":
            raise UnmaskError(f"format has no effect on plain text; {name} is read as such.")
        if end_fill != 1:
            raise UnmaskError(f"end_fill has no effect on plain text; {name} is read as such.")
        size = block_size or min(TEXT_BLOCK, positions or TEXT_BLOCK)
        blocks = (block for text, where in _plain_texts(file) for block in _cut(text, where, tokenizer, size))
        items = list(islice(blocks, limit))
        if not items:
            raise UnmaskError(f"{name}: there is no text to score.")
        return Texts(items, "plain text", size)
    if not tokenizer.chat_template:
        raise UnmaskError(
            "the tokenizer has no chat template to lay conversations out with; score plain text (--raw)."
        )
    size = block_size or positions
    encoder = Encoder(
        tokenizer, layout="chat", train_on="last", end_fill=end_fill, block_size=size, too_long="drop"
    )
    records = list(read_records(file, limit=limit))
    examples, report = encode_records(records, encoder, format)
    if not examples:
        why = "; ".join(
            f"{count:,} {reason} (first: {where})" for reason, (count, where) in report.dropped.items()
        )
        raise UnmaskError(f"{name}: no record can be scored: {why}.")
    items = [ScoredText(e, records[e.sample_id][1], _response_bytes(e, tokenizer)) for e in examples]
    return Texts(items, "conversations", size or 0, report.dropped)


def show_records(scored: FileScore, count: int, console: Console) -> None:
    """Print the first records with their tokens coloured by nats; a digit below each says how many."""
    tokenizer = scored.tokenizer
    plain = not (console.encoding or "").lower().startswith("utf")
    for record in scored.records[:count]:
        score = record.score
        console.print(
            f"{record.text.where}: {int(score.num_tokens)} tokens,"
            f" {score.nll:.2f} ± {score.stderr:.2f} nats, perplexity {score.perplexity().value:.3g}",
            style="bold",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        example = record.text.example
        prompt = [i for i, source in zip(example.input_ids, example.src_mask, strict=True) if source]
        if prompt:
            console.print(Text(_ascii("".join(token_texts(prompt, tokenizer)), plain), "dim"), soft_wrap=True)
        ids, nll = record.scored()
        for line in _coloured([_ascii(text, plain) for text in _texts(ids, tokenizer)], nll, console.width):
            console.print(line, no_wrap=True, overflow="crop")
        console.print()
    if scored.records[:count]:
        legend = "below each token its nats, rounded down; + means 10 or more"
        console.print(Text(legend, "dim"))


def show_total(scored: FileScore, console: Console) -> None:
    """Print the figures of the whole file, each with its standard error, and what was left out."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for justify in ("left", "right", "left"):
        table.add_column(no_wrap=True, justify=justify)
    of_file = scored.total
    table.add_row("records" if scored.texts.kind == "conversations" else "blocks", f"{len(scored.records):,}")
    table.add_row("tokens", f"{int(of_file.num_tokens):,}")
    table.add_row("bytes", f"{scored.num_bytes:,}")
    table.add_row("nats", f"{of_file.nll:,.1f}", f"± {of_file.stderr:,.1f}")
    for name, (value, stderr) in (
        ("nats per token", of_file.nats_per_token()),
        ("perplexity", of_file.perplexity()),
        ("bits per byte", scored.bits_per_byte()),
    ):
        table.add_row(name, f"{value:,.4f}", f"± {stderr:,.4f}")
    if scored.records[0].mixture_nll is not None:
        mixture = sum(record.mixture_nll or 0.0 for record in scored.records)
        table.add_row("nats of the mixture", f"{mixture:,.1f}", "of all orders tried")
    table.add_row("forwards", f"{scored.num_forwards:,}")
    console.print(table, highlight=False)
    for reason, (number, where) in scored.texts.dropped.items():
        console.print(f"not scored: {number:,} {reason} (first: {where})", highlight=False, markup=False)
    if scored.texts.kind == "plain text":
        console.print(
            f"plain text, in blocks of at most {scored.texts.block_size:,} tokens, each scored on its own",
            highlight=False,
        )


def _has_format(record: dict[str, Any], where: str) -> bool:
    try:
        detect_format(record, where)
    except UnmaskError:
        return False
    return True


def _plain_texts(file: str | Path) -> Iterator[tuple[str, str]]:
    """Texts with their places."""
    name = str(file)
    if Path(name).expanduser().is_file() and not name.lower().endswith(RECORD_SUFFIXES):
        yield from ((text, Path(name).name) for text in read_documents(file))
        return
    for record, where in read_records(file):
        text = record.get(TEXT_FIELD)
        if not isinstance(text, str):
            fields = ", ".join(map(str, record))
            raise UnmaskError(
                f"{where}: plain text is read from the field '{TEXT_FIELD}'; fields here: {fields}."
            )
        if text.strip():
            yield text, where


def _cut(text: str, where: str, tokenizer: PreTrainedTokenizerBase, size: int) -> Iterator[ScoredText]:
    """Blocks of a text, with the bytes of what each holds: those of all add up to those of the text."""
    encoded: Any = tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=bool(tokenizer.is_fast),
        verbose=False,
    )
    ids = encoded["input_ids"]
    for start in range(0, len(ids), size):
        block = ids[start : start + size]
        stop = start + len(block)
        if tokenizer.is_fast:
            # A character whose bytes are tokens of two blocks counts in the second.
            offsets = encoded["offset_mapping"]
            end = offsets[stop][0] if stop < len(ids) else len(text)
            piece = text[offsets[start][0] if start else 0 : end]
        else:
            piece = str(tokenizer.decode(block))
        place = where if len(ids) <= size else f"{where}, tokens {start + 1} to {stop}"
        yield ScoredText(Example(block, [False] * len(block)), place, len(piece.encode()))


def _response_bytes(example: Example, tokenizer: PreTrainedTokenizerBase) -> int:
    scored = [i for i, source in zip(example.input_ids, example.src_mask, strict=True) if not source]
    return len(str(tokenizer.decode(scored, skip_special_tokens=True)).encode())


def _texts(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token on one line; · where a character ends with a later token."""
    return [text or "·" for text in token_texts(ids, tokenizer)]


def _ascii(text: str, plain: bool) -> str:
    return visible(text, plain=True) if plain else text


def _coloured(texts: list[str], nll: list[float], width: int) -> Iterator[Text]:
    """Lines of tokens, each followed by a line with the nats of the tokens above it."""
    tokens, digits = Text(), Text(style="dim")
    for text, nats in zip(texts, nll, strict=True):
        size = cell_len(text)
        if tokens.cell_len + size > width and tokens:
            yield from (tokens, digits)
            tokens, digits = Text(), Text(style="dim")
        style = next((style for below, style in LEVELS if nats < below), HIGHEST)
        tokens.append(text, style)
        digits.append((str(int(nats)) if nats < 10 else "+").ljust(size))
    if tokens:
        yield from (tokens, digits)


def _check_out(out: Path) -> None:
    if out.is_dir():
        raise UnmaskError(f"out: {out} is a folder; name a file.")
    if not out.absolute().parent.is_dir():
        raise UnmaskError(f"out: there is no folder {out.absolute().parent}; make it first.")
    if not os.access(out.absolute().parent, os.W_OK):
        raise UnmaskError(f"out: {out.absolute().parent} cannot be written to.")


def _write(out: Path, lines: Iterator[dict[str, Any]]) -> None:
    """Write the lines aside and move them into place: a file that is there is whole."""
    aside = out.absolute().with_name(f".{out.name}.partial")
    try:
        with aside.open("w", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        os.replace(aside, out)
    except OSError as error:
        raise UnmaskError(f"{out}: could not be written: {error.strerror}; nothing was changed.") from error
    finally:
        aside.unlink(missing_ok=True)

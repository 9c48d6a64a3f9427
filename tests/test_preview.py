from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from unmask.data.records import RecordError
from unmask.data.encode import Encoder, EncodeReport, Example, encode_records
from unmask.data.preview import show_examples, show_report, visible
from unmask.data.survey import survey
from unmask.data.encode import pack_text
from unmask.data.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()


def console(*, terminal: bool = False, encoding: str = "utf-8") -> tuple[Console, io.BytesIO]:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    colour = "truecolor" if terminal else None
    return Console(file=file, force_terminal=terminal, width=80, color_system=colour), raw


def lines(raw: io.BytesIO, encoding: str = "utf-8") -> list[str]:
    return [line.rstrip() for line in raw.getvalue().decode(encoding).splitlines()]


def encoded(**settings: Any) -> tuple[list[Example], EncodeReport]:
    records = [
        ({"instruction": "Say\nhi [bold].", "output": "hi\x1b[31m <|im_end|>"}, "x line 1"),
        ({"instruction": "q" * 200, "output": "a"}, "x line 2"),
        ({"instruction": "q", "output": "a" * 80}, "x line 3"),
    ]
    return encode_records(records, Encoder(TOKENIZER, block_size=100, **settings))


def test_examples_without_colour() -> None:
    out, raw = console()
    show_examples(encoded(end_fill=16)[0], TOKENIZER, console=out, limit=1)
    assert lines(raw) == [
        "example 1 of 2, record 1: 65 tokens, 32 supervised",
        "source    33  <|im_start|>user⏎",
        "              Say⏎",
        "              hi [bold].<|im_end|>⏎",
        "              <|im_start|>assistant⏎",
        "response  18  hi␛[31m <|im_end|>",
        "end       14  <|im_end|>",
        "",
        "source: never masked | response: supervised | end: end token, supervised",
    ]


def test_kinds_have_colours_in_a_terminal() -> None:
    out, raw = console(terminal=True)
    show_examples(encoded()[0], TOKENIZER, console=out, limit=1)
    text = raw.getvalue().decode()
    assert "\x1b[2msource" in text
    assert "\x1b[32mresponse" in text
    assert "\x1b[30;43mend" in text
    assert "\x1b[31m" not in text  # the record's own escape sequence is defused


def test_ascii_terminals() -> None:
    out, raw = console(encoding="ascii")
    show_examples([Example(list("é\n".encode()), [False] * 3)], TOKENIZER, console=out)
    examples, report = encoded()
    report.skip(RecordError("ü.jsonl line 1", "no field 'é'"))
    show_report(survey(examples, report), console=out)
    text = raw.getvalue().decode("ascii")
    assert "\\xe9\\n" in text and "no field '\\xe9'; first: \\xfc.jsonl line 1" in text
    assert "#" * 40 in text


def test_report() -> None:
    examples, report = encoded()
    out, raw = console()
    show_report(survey(examples, report, block_size=100), console=out)
    found = lines(raw)
    assert found[0] == ("length in tokens (block_size 100): shortest 53, median 100, longest 100")
    assert found[1] == "   53 to  57  " + "█" * 40 + " 1"
    assert found[2] == "   58 to  62  0"
    assert found[10] == "   98 to 100  " + "█" * 40 + " 1"
    assert found[12:] == [
        "supervised: 99 of 153 tokens (64.7%) in 2 sequences",
        "tokens per source:",
        "  source 1  153  100.0% of the tokens; 2 sequences, 99 tokens supervised",
        "positions that hold a token:",
        "  padded to block_size 100  76.5%",
        "  packed into rows of 100   76.5%",
        "sequences that repeat an earlier one:",
        "  whole sequence                          0",
        "  prompt (all before the first response)  0",
        "records:",
        "  read       3  format: alpaca (3)",
        "  kept       2",
        "  truncated  1  kept, but cut at block_size, end token lost",
        "  dropped    1  response would vanish: the prompt alone fills block_size;",
        "                first: x line 2",
        "  skipped    0",
        "  noted      1  held strings like special tokens, read as plain text",
    ]


def test_pretraining() -> None:
    examples = list(pack_text(["abcdef" * 5], TOKENIZER, 8))
    out, raw = console()
    show_examples(examples, TOKENIZER, console=out, limit=1)
    show_report(survey(examples), console=out)
    found = lines(raw)
    assert found[1] == "text  8  abcdefab"
    assert found[3] == "text: supervised"
    assert "supervised: 30 of 30 tokens (100.0%) in 4 sequences" in found
    assert "  whole sequence  0" in found  # and no prompts


def test_nothing_kept() -> None:
    out, raw = console()
    report = EncodeReport(records=1)
    report.drop("too [long]", "x line 1")
    show_examples([], TOKENIZER, console=out)
    show_report(survey([], report), console=out)
    assert "supervised: 0 of 0 tokens (0.0%) in 0 sequences" in lines(raw)
    assert any("too [long]; first: x line 1" in line for line in lines(raw))


def test_long_pieces_lose_their_middle() -> None:
    out, raw = console()
    show_examples([Example([97] * 5000, [False] * 5000)], TOKENIZER, console=out)
    assert "[... 4600 characters ...]" in " ".join(lines(raw))
    assert len(lines(raw)) < 20


def test_visible() -> None:
    assert visible("a\n\nb\t\x7f\u202e") == "a⏎⏎\nb␉\\u007f\\u202e"
    assert visible("\ufeffa\u2066b\u200dc") == "\\ufeffa\\u2066b\u200dc"  # a joiner makes emoji: it stays
    assert visible("a\n", plain=True) == "a\\n"
    assert visible("é␛", plain=True) == "\\xe9\\u241b"

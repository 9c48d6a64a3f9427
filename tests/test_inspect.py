from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from unmask.config import recipe_from_dict
from unmask.data import inspect
from unmask.data.collate import collate, pack
from unmask.data.dataset import RunData
from unmask.data.encode import Encoder, EncodeReport, Example, encode_records
from unmask.data.inspect import (
    location,
    record_lines,
    show_examples,
    show_report,
    survey,
    visible,
    write_page,
)
from unmask.data.records import RecordError
from unmask.data.tokenizer import byte_tokenizer
from unmask.errors import UnmaskError

TOKENIZER = byte_tokenizer()


def run_data(
    examples: Sequence[Example],
    report: EncodeReport | None = None,
    names: Sequence[str] = ("data",),
    files: Sequence[Sequence[str]] = (),
    held_out: Sequence[Example] = (),
    **changes: Any,
) -> RunData:
    """What a run of these examples sees; their sources have these names."""
    micro_batch = changes.pop("micro_batch", 1)
    tree = {
        "training_mode": "sft",
        "model": {"config": {}, "tokenizer": "bytes"},
        "data": {"sources": [{"dataset_name": name} for name in names], **changes},
        "global_batch_size": micro_batch,
    }
    recipe = recipe_from_dict(tree)
    report = report or EncodeReport()
    parts = [[one for one in examples if one.source == number] for number in range(len(names))]
    return RunData(recipe, None, [], [*parts], [held_out] if held_out else [], files=files, report=report)


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
    show_examples(run_data(encoded(end_fill=16)[0]), TOKENIZER, console=out, limit=1)
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
    show_examples(run_data(encoded()[0]), TOKENIZER, console=out, limit=1)
    text = raw.getvalue().decode()
    assert "\x1b[2msource" in text
    assert "\x1b[32mresponse" in text
    assert "\x1b[30;43mend" in text
    assert "\x1b[31m" not in text  # the record's own escape sequence is defused


def test_ascii_terminals() -> None:
    out, raw = console(encoding="ascii")
    show_examples(run_data([Example(list("é\n".encode()), [False] * 3)]), TOKENIZER, console=out)
    examples, report = encoded()
    report.skip(RecordError("ü.jsonl line 1", "no field 'é'"))
    show_report(survey(run_data(examples, report)), console=out)
    text = raw.getvalue().decode("ascii")
    assert "\\xe9\\n" in text and "no field '\\xe9'; first: \\xfc.jsonl line 1" in text
    assert "#" * 40 in text


def test_report() -> None:
    examples, report = encoded()
    out, raw = console()
    show_report(survey(run_data(examples, report, block_size=100)), console=out)
    found = lines(raw)
    assert found[0] == ("length in tokens (block_size 100): shortest 53, median 100, longest 100")
    assert found[1] == "   53 to  57  " + "█" * 40 + " 1"
    assert found[2] == "   58 to  62  0"
    assert found[10] == "   98 to 100  " + "█" * 40 + " 1"
    assert found[12:] == [
        "supervised: 99 of 153 tokens (64.7%) in 2 sequences",
        "tokens per source:",
        "  data  153  100.0% of the tokens; 2 sequences, 99 tokens supervised",
        "positions that hold a token:",
        "  padded to block_size 100                     76.5%",
        "  padded to the longest of 1 in random order  100.0%",
        "  packed into rows of 100                      76.5%",
        "duplicates:",
        "  whole sequence                          0",
        "  prompt (all before the first response)  0",
        "records:",
        "  read       3  format: alpaca (3)",
        "  kept       2",
        "  truncated  1  kept, but cut at block_size, end token lost",
        "  dropped    1  response would vanish: the prompt alone fills block_size; first:",
        "                x line 2",
        "  skipped    0",
        "  noted      1  held strings like special tokens, read as plain text",
    ]


def test_pretraining() -> None:
    text = list(b"abcdef" * 5)
    examples = [Example(text[at : at + 8], [False] * len(text[at : at + 8])) for at in range(0, 30, 8)]
    out, raw = console()
    show_examples(run_data(examples), TOKENIZER, console=out, limit=1)
    show_report(survey(run_data(examples)), console=out)
    found = lines(raw)
    assert found[1] == "text  8  abcdefab"
    assert found[3] == "text: supervised"
    assert "supervised: 30 of 30 tokens (100.0%) in 4 sequences" in found
    assert "  whole sequence  0" in found  # and no prompts


def test_nothing_kept() -> None:
    out, raw = console()
    report = EncodeReport(records=1)
    report.drop("too [long]", "x line 1")
    show_examples(run_data([]), TOKENIZER, console=out)
    show_report(survey(run_data([], report)), console=out)
    assert "supervised: 0 of 0 tokens (0.0%) in 0 sequences" in lines(raw)
    assert any("too [long]; first: x line 1" in line for line in lines(raw))


def test_long_pieces_lose_their_middle() -> None:
    out, raw = console()
    show_examples(run_data([Example([97] * 5000, [False] * 5000)]), TOKENIZER, console=out)
    assert "[... 4600 characters ...]" in " ".join(lines(raw))
    assert len(lines(raw)) < 20


def test_visible() -> None:
    assert visible("a\n\nb\t\x7f\u202e") == "a⏎⏎\nb␉\\u007f\\u202e"
    assert visible("\ufeffa\u2066b\u200dc") == "\\ufeffa\\u2066b\u200dc"  # a joiner makes emoji: it stays
    assert visible("a\n", plain=True) == "a\\n"
    assert visible("é␛", plain=True) == "\\xe9\\u241b"


VOID = {"meta"}
ODD = "<script>alert(1)</script> & </pre><b onclick='x'> \x00\x1b[31m\u202e é \"q\" 👩‍👩‍👧 שלום <|im_end|>"


class Page(HTMLParser):
    """A page as a tree walked once: every element closed in order, and the texts by class."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[tuple[str, str]] = []  # (class of the element, text)
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.append((self.open[-1][1].get("class") or self.open[-1][0], data))

    def of(self, kind: str) -> list[str]:
        """The texts of a class or element, without the legend's."""
        return [text for name, text in self.texts if name == kind and text != kind]


def encoded_page(records: list[dict[str, Any]], **settings: Any) -> list[Example]:
    return encode_records([(r, "x") for r in records], Encoder(TOKENIZER, **settings))[0]


def written(tmp_path: Path, data: RunData, title: str = "t") -> tuple[Page, str]:
    file = tmp_path / "page.html"
    write_page(file, data, survey(data), TOKENIZER, title=title)
    text = file.read_text(encoding="utf-8")
    return Page(text), text


def test_what_stands_in_the_data_is_text(tmp_path: Path) -> None:
    rows = encoded_page([{"instruction": ODD, "output": ODD}, {"instruction": "q", "output": "a"}])
    data = run_data(rows, names=["<i>1</i>", "b"])
    shown, text = written(tmp_path, data, title="<u>t</u>")
    assert {"script", "u", "i", "b onclick"}.isdisjoint(shown.tags)
    assert shown.of("response") == [visible(ODD), "a"]
    assert visible(ODD) in shown.of("source")[0]
    assert "<u>t</u>" in shown.of("h1") and "<i>1</i> record 1" in shown.of("p")
    assert "\x00" not in text and "\x1b" not in text and "\u202e" not in text


def test_nothing_comes_from_elsewhere(tmp_path: Path) -> None:
    shown, text = written(tmp_path, run_data(encoded_page([{"instruction": "q", "output": "a"}])))
    assert {"script", "link", "img", "iframe", "object"}.isdisjoint(shown.tags)
    names = {name for name, _ in shown.attributes}
    assert names <= {"lang", "charset", "name", "content", "class", "style", "title"}
    for outside in ("http:", "https:", "//", "url(", "@import", "src=", "href="):
        assert outside not in text


def test_the_pieces_are_the_example_with_its_padding(tmp_path: Path) -> None:
    records = [{"instruction": "q" * n, "output": "a" * (3 * n)} for n in range(1, 6)]
    rows = encoded_page(records, end_fill=8)
    shown, _ = written(tmp_path, run_data(rows, micro_batch=2))
    assert shown.of("response") == ["a" * (3 * n) for n in range(1, 6)]
    assert shown.of("end") == [
        f"<|im_end|> ×{8 - 3 * n % 8}" if 3 * n % 8 < 7 else "<|im_end|>" for n in range(1, 6)
    ]
    batches = [collate(rows[start : start + 2], pad_token_id=0)["attention_mask"] for start in (0, 2, 4)]
    padding = [int((1 - row).sum()) for batch in batches for row in batch]
    assert shown.of("pad") == [f"padding ×{count}" for count in padding if count]
    said = "".join(text for _, text in shown.texts)
    ends = sum(row.input_ids.count(258) for row in rows) - len(rows)  # one of them closes the question
    for words in (f"end {ends} (end token", f"pad {sum(padding)} (padding", "response 45 (supervised)"):
        assert words in said


def test_packed_rows_show_their_documents_apart(tmp_path: Path) -> None:
    examples = encoded_page([{"instruction": f"q{n}", "output": "a" * (5 + 7 * n)} for n in range(7)])
    rows = pack(examples, 128)
    shown, text = written(tmp_path, run_data(examples, block_size=128, packing=True))
    assert shown.tags.count("article") == len(rows) < len(examples)
    assert shown.tags.count("section") == len(examples)
    colours = [value for name, value in shown.attributes if name == "style" and "--document" in str(value)]
    sizes = [len(row) for row in rows]
    assert max(sizes) > 1 and len(colours) == len(examples)
    start = 0
    for size in sizes:  # neighbours differ
        assert len(set(colours[start : start + size])) == min(size, 6)
        start += size
    padding = [128 - sum(len(example.input_ids) for example in row) for row in rows]
    assert shown.of("pad") == [f"padding ×{count}" for count in padding if count]
    assert "packed into rows of 128 tokens" in text and "7 documents that share rows" in text


def test_blocks_of_plain_text(tmp_path: Path) -> None:
    shown, text = written(tmp_path, run_data([Example([*b"ab\n\ncd", 258], [False] * 7)]))
    assert shown.of("text")[-1] == "ab⏎⏎\ncd" and shown.of("end")[-1] == "<|im_end|>"
    assert "documents that share rows" not in text


def test_of_thousands_the_first_are_shown_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = run_data([Example([97] * 10, [False] * 10, n) for n in range(1203)])
    shown, text = written(tmp_path, data)
    assert shown.tags.count("article") == 1000
    assert "the first 1,000 of 1,203 rows" in text and "the order of the data" in text
    monkeypatch.setattr(inspect, "TOKENS", 95)
    shown, text = written(tmp_path, data)
    assert shown.tags.count("article") == 9 and "the first 9 of 1,203 rows" in text
    shown, text = written(tmp_path, run_data([Example([97] * 500, [False] * 500)]))  # one always is
    assert shown.tags.count("article") == 1 and "all 1 rows" in text


def test_the_report_stands_above(tmp_path: Path) -> None:
    records = [({"instruction": "q", "output": "a"}, "x line 1")] * 3 + [({"instruction": "q"}, "x|<line> 4")]
    rows, report = encode_records(records, Encoder(TOKENIZER), on_bad_record="skip")
    _, text = written(tmp_path, run_data(rows, report, names=["a.jsonl"], block_size=64, micro_batch=2))
    assert "no known format has these fields; first: x|&lt;line&gt; 4" in text
    assert "packed into rows of 64" in text and "record 2 = record 1; record 3 = record 1" in text
    assert text.index("a.jsonl") < text.index("<article>")


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match=r"could not be written: Is a directory"):
        write_page(tmp_path, run_data([]), survey(run_data([])), TOKENIZER, title="t")


def example(ids: list[int], sources: int = 0, source: int = 0, number: int = 0, file: int = 0) -> Example:
    """An example whose first `sources` tokens are the prompt."""
    src_mask = [index < sources for index in range(len(ids))]
    return Example(ids, src_mask, 1, source, file, number)


def test_tokens_per_source() -> None:
    examples = [example([1] * 6, 2, 0, 0), example([2] * 4, 1, 1, 7), example([3] * 2, 0, 1, 8)]
    found = survey(run_data(examples, names=["a.jsonl", "b.jsonl", "none.jsonl"]))
    assert found.tables["tokens per source"] == [
        ("a.jsonl", "6", "50.0% of the tokens; 1 sequences, 4 tokens supervised"),
        ("b.jsonl", "6", "50.0% of the tokens; 2 sequences, 5 tokens supervised"),
        ("none.jsonl", "0", "0.0% of the tokens; 0 sequences, 0 tokens supervised"),
    ]
    assert (found.sequences, found.tokens, found.supervised, found.lengths) == (3, 12, 9, (2, 4, 6))
    assert sum(count for _, _, count in found.histogram) == 3


def test_duplicates_of_whole_sequences_and_of_prompts() -> None:
    examples = [
        example([1, 2, 3, 4], 2, 0, 0),
        example([1, 2, 3, 5], 2, 0, 1),  # the prompt alone
        example([1, 2, 3, 4], 2, 1, 0),  # all of it, in another source
        example([1, 2, 3, 4], 3, 1, 1),  # the same tokens, with a longer prompt
        example([1, 2, 3, 4], 0, 1, 2),  # without one
        example([1, 2, 3, 9], 0, 1, 3),
    ]
    held_out = [example([1, 2, 9], 2), example([1, 2, 3], 1), example([1, 2, 3, 4], 3), example([7], 0)]
    assert survey(run_data(examples, names=["a", "b"], held_out=held_out)).tables["duplicates"] == [
        ("whole sequence", "3", "b record 1 = a record 1; b record 2 = a record 1; b record 3 = a record 1"),
        ("prompt (all before the first response)", "2", "a record 2 = a record 1; b record 1 = a record 1"),
        ("held-out prompt that is trained on, too", "2", ""),
    ]
    blocks = [example([n % 2, 2], number=n) for n in range(6)]
    assert survey(run_data(blocks, held_out=[example([1, 2]), example([3, 5])])).tables["duplicates"] == [
        ("whole sequence", "4", "record 3 = record 1; record 4 = record 2; record 5 = record 1; and 1 more"),
        ("held-out sequence that is trained on, too", "1", ""),
    ]


def test_a_record_is_named_by_its_source_and_file() -> None:
    files = [["one.jsonl"], ["a.jsonl", "b.jsonl", "c.jsonl"]]
    several, single = run_data([], names=["x", "parts"], files=files), run_data([], files=files[1:])
    row = example([1], source=1, file=2, number=1233)
    assert location(row, several) == "parts c.jsonl record 1,234"
    assert location(replace(row, source=0), single) == "c.jsonl record 1,234"
    assert location(example([1], number=16), several) == "x record 17"
    assert location(example([1], number=16), run_data([])) == "record 17"
    assert location(Example([1], [False]), several) == "x"
    assert location(Example([1], [False]), single) == ""


def test_filled_positions_are_those_of_real_batches() -> None:
    draw = random.Random(0)
    sizes = [draw.randrange(5, 60) for _ in range(100)]
    examples = [example([7] * size, 1, 0, number) for number, size in enumerate(sizes)]
    found = survey(run_data(examples, block_size=64, micro_batch=100, packing=True)).tables
    mask, rows = collate(examples, pad_token_id=0)["attention_mask"], pack(examples, 64)
    assert found["positions that hold a token"] == [
        ("padded to block_size 64", f"{sum(sizes) / 6400:.1%}", ""),
        ("padded to the longest of 100 in random order", f"{mask.float().mean().item():.1%}", ""),
        ("packed into rows of 64, as here", f"{sum(sizes) / (len(rows) * 64):.1%}", ""),
    ]
    # Of few, fewer are much shorter; and the last batch may be small.
    _, (_, share, _), _ = survey(run_data(examples, micro_batch=3)).tables["positions that hold a token"]
    assert mask.float().mean().item() < float(share[:-1]) / 100 < 1


def test_every_reason_has_a_row_with_its_first_location() -> None:
    report = EncodeReport(records=5, kept=1, formats=Counter(alpaca=4))
    for line in (3, 4):
        report.skip(RecordError(f"x line {line}", "not valid JSON", f" (column {line})"))
    report.skip(RecordError("x line 7", "field 'output' is empty"))
    report.drop("longer than block_size", "x line 5")
    assert list(record_lines(report)) == [
        ("read", "5", "format: alpaca (4)"),
        ("kept", "1", ""),
        ("dropped", "1", "longer than block_size; first: x line 5"),
        ("skipped", "2", "not valid JSON; first: x line 3"),
        ("skipped", "1", "field 'output' is empty; first: x line 7"),
    ]
    assert report.left_out() == [
        "1 dropped: longer than block_size (first: x line 5)",
        "2 skipped: not valid JSON (first: x line 3)",
        "1 skipped: field 'output' is empty (first: x line 7)",
    ]

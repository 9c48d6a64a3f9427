from __future__ import annotations

import io
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from unmask.config import recipe_from_dict
from unmask.data.collate import collate, pack
from unmask.data.dataset import RunData
from unmask.data.encode import Encoder, Example, encode_records
from unmask.data.encode_report import EncodeReport
from unmask.data.inspect import (
    location,
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


def printed(show: Callable[[Console], None], encoding: str = "utf-8", colour: bool = False) -> str:
    """What is printed on a terminal of 80 columns."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    show(Console(file=file, force_terminal=colour, width=80, color_system="truecolor" if colour else None))
    return raw.getvalue().decode(encoding)


def examples_shown(data: RunData, limit: int = 1, **terminal: Any) -> str:
    return printed(lambda out: show_examples(data, TOKENIZER, console=out, limit=limit), **terminal)


def report_shown(data: RunData, **terminal: Any) -> list[str]:
    said = printed(lambda out: show_report(survey(data), console=out), **terminal)
    return [line.rstrip() for line in said.splitlines()]


def encoded(**settings: Any) -> tuple[list[Example], EncodeReport]:
    records = [
        ({"instruction": "Say\nhi [bold].", "output": "hi\x1b[31m <|im_end|>"}, "x line 1"),
        ({"instruction": "q" * 200, "output": "a"}, "x line 2"),
        ({"instruction": "q", "output": "a" * 80}, "x line 3"),
    ]
    return encode_records(records, Encoder(TOKENIZER, block_size=100, **settings))


def test_examples() -> None:
    shown = examples_shown(run_data(encoded(end_fill=16)[0]))
    assert [line.rstrip() for line in shown.splitlines()] == [
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
    coloured = examples_shown(run_data(encoded()[0]), colour=True)
    for kind in ("\x1b[2msource", "\x1b[32mresponse", "\x1b[30;43mend"):
        assert kind in coloured
    assert "\x1b[31m" not in coloured  # the record's own escape sequence is defused
    long = examples_shown(run_data([Example([97] * 5000, [False] * 5000)]))
    assert "[... 4600 characters ...]" in " ".join(long.split("\n")) and long.count("\n") < 20
    text = examples_shown(run_data([Example([*b"abcdefab"], [False] * 8)]))
    assert "text  8  abcdefab" in text and "text: supervised" in text
    assert "\\xe9\\n" in examples_shown(run_data([Example([*"é\n".encode()], [False] * 3)]), encoding="ascii")


def test_report() -> None:
    examples, report = encoded()
    found = report_shown(run_data(examples, report, block_size=100))
    assert found[0] == ("length in tokens (block_size 100): shortest 53, median 100, longest 100")
    assert found[1:3] == ["   53 to  57  " + "█" * 40 + " 1", "   58 to  62  0"]
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
        "                x line 2, 219 tokens",
        "  skipped    0",
        "  noted      1  held strings like special tokens, read as plain text",
    ]
    report.skip(RecordError("ü.jsonl line 1", "no field 'é'"))
    ascii = "\n".join(report_shown(run_data(examples, report), encoding="ascii"))
    assert "no field '\\xe9'; first: \\xfc.jsonl line 1" in ascii and "#" * 40 in ascii
    report = EncodeReport(records=1)
    report.drop("too [long]", "x line 1")
    nothing = "\n".join(report_shown(run_data([], report)))
    assert "supervised: 0 of 0 tokens (0.0%) in 0 sequences" in nothing
    assert "too [long]; first: x line 1" in nothing
    assert examples_shown(run_data([])) == "\n"


def test_visible() -> None:
    assert visible("a\n\nb\t\x7f\u202e") == "a⏎⏎\nb␉\\u007f\\u202e"
    assert visible("\ufeffa\u2066b\u200dc") == "\\ufeffa\\u2066b\u200dc"  # a joiner makes emoji: it stays
    assert visible("a\n", plain=True) == "a\\n"
    assert visible("é␛", plain=True) == "\\xe9\\u241b"


ODD = "<script>alert(1)</script> & </pre><b onclick='x'> \x00\x1b[31m\u202e é \"q\" 👩‍👩‍👧 שלום <|im_end|>"


class Page(HTMLParser):
    """A page as a tree walked once: every element closed in order, and the texts by class."""

    def __init__(self, file: Path, data: RunData, title: str = "t") -> None:
        super().__init__(convert_charrefs=True)
        write_page(file, data, survey(data), TOKENIZER, title=title)
        self.text = file.read_text(encoding="utf-8")
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[tuple[str, str]] = []  # (class of the element, text)
        self.feed(self.text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.append((self.open[-1][1].get("class") or self.open[-1][0], data))

    def of(self, kind: str) -> list[str]:
        """The texts of a class or element, without the legend's."""
        return [text for name, text in self.texts if name == kind and text != kind]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "page.html"


def encoded_page(records: list[dict[str, Any]], **settings: Any) -> list[Example]:
    return encode_records([(r, "x") for r in records], Encoder(TOKENIZER, **settings))[0]


def test_what_stands_in_the_data_is_text_and_nothing_comes_from_elsewhere(file: Path) -> None:
    rows = encoded_page([{"instruction": ODD, "output": ODD}, {"instruction": "q", "output": "a"}])
    page = Page(file, run_data(rows, names=["<i>1</i>", "b"]), title="<u>t</u>")
    outside = {"script", "u", "i", "b onclick", "link", "img", "iframe", "object"}
    assert outside.isdisjoint(page.tags)
    assert page.of("response") == [visible(ODD), "a"] and visible(ODD) in page.of("source")[0]
    assert "<u>t</u>" in page.of("h1") and "<i>1</i> record 1" in page.of("p")
    assert "\x00" not in page.text and "\x1b" not in page.text and "\u202e" not in page.text
    names = {name for name, _ in page.attributes}
    assert names <= {"lang", "charset", "name", "content", "class", "style", "title"}
    page = Page(file, run_data(rows[1:]))
    for address in ("http:", "https:", "//", "url(", "@import", "src=", "href="):
        assert address not in page.text


def test_the_pieces_are_the_example_with_its_padding(file: Path) -> None:
    records = [{"instruction": "q" * n, "output": "a" * (3 * n)} for n in range(1, 6)]
    rows = encoded_page(records, end_fill=8)
    page = Page(file, run_data(rows, micro_batch=2))
    assert page.of("response") == ["a" * (3 * n) for n in range(1, 6)]
    assert page.of("end") == [
        f"<|im_end|> ×{8 - 3 * n % 8}" if 3 * n % 8 < 7 else "<|im_end|>" for n in range(1, 6)
    ]
    batches = [collate(rows[start : start + 2], pad_token_id=0)["attention_mask"] for start in (0, 2, 4)]
    padding = [int((1 - row).sum()) for batch in batches for row in batch]
    assert page.of("pad") == [f"padding ×{count}" for count in padding if count]
    said = "".join(text for _, text in page.texts)
    ends = sum(row.input_ids.count(258) for row in rows) - len(rows)  # one of them closes the question
    for words in (f"end {ends} (end token", f"pad {sum(padding)} (padding", "response 45 (supervised)"):
        assert words in said


def test_packed_rows_show_their_documents_apart(file: Path) -> None:
    examples = encoded_page([{"instruction": f"q{n}", "output": "a" * (5 + 7 * n)} for n in range(7)])
    rows = pack(examples, 128)
    page = Page(file, run_data(examples, block_size=128, packing=True))
    assert page.tags.count("article") == len(rows) < len(examples)
    assert page.tags.count("section") == len(examples)
    colours = iter(
        [value for name, value in page.attributes if name == "style" and "--document" in str(value)]
    )
    assert max(map(len, rows)) > 1
    for row in rows:  # neighbours differ
        assert len({next(colours) for _ in row}) == min(len(row), 6)
    padding = [128 - sum(len(example.input_ids) for example in row) for row in rows]
    assert page.of("pad") == [f"padding ×{count}" for count in padding if count]
    assert "packed into rows of 128 tokens" in page.text and "7 documents that share rows" in page.text
    page = Page(file, run_data([Example([*b"ab\n\ncd", 258], [False] * 7)]))
    assert page.of("text")[-1] == "ab⏎⏎\ncd" and page.of("end")[-1] == "<|im_end|>"
    assert "documents that share rows" not in page.text


@pytest.mark.parametrize(
    ("rows", "length", "shown", "said"),
    [
        (1203, 10, 1000, "the first 1,000 of 1,203 rows"),
        (40, 20_000, 25, "the first 25 of 40 rows"),
        (1, 500_001, 1, "all 1 rows"),  # one always is
    ],
)
def test_of_many_rows_the_first_are_shown(file: Path, rows: int, length: int, shown: int, said: str) -> None:
    page = Page(
        file, run_data([Example([97] * length, [False] * length, n) for n in range(rows)], block_size=length)
    )
    assert page.tags.count("article") == shown and said in page.text and "the order of the data" in page.text


def test_the_report_is_above(file: Path) -> None:
    records = [({"instruction": "q", "output": "a"}, "x line 1")] * 3 + [({"words": "q"}, "x|<line> 4")]
    rows, report = encode_records(records, Encoder(TOKENIZER), on_bad_record="skip")
    text = Page(file, run_data(rows, report, names=["a.jsonl"], block_size=64, micro_batch=2)).text
    assert "no known format has these fields; first: x|&lt;line&gt; 4" in text
    assert "packed into rows of 64" in text and "record 2 = record 1; record 3 = record 1" in text
    assert text.index("a.jsonl") < text.index("<article>")
    with pytest.raises(UnmaskError, match="Is a directory"):
        Page(file.parent, run_data([]))


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

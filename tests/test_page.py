from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from unmask.data import page
from unmask.data.collate import collate
from unmask.data.encode import Encoder, Example, encode_records
from unmask.data.collate import Row, pack
from unmask.data.page import check_page, write_page
from unmask.data.preview import visible
from unmask.data.survey import survey
from unmask.data.tokenizer import byte_tokenizer
from unmask.errors import UnmaskError

TOKENIZER = byte_tokenizer()
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


def encoded(records: list[dict[str, Any]], **settings: Any) -> list[Example]:
    return encode_records([(r, "x") for r in records], Encoder(TOKENIZER, **settings))[0]


def written(tmp_path: Path, rows: list[Example] | list[Row], **given: Any) -> tuple[Page, str]:
    file = tmp_path / "page.html"
    examples = [example for row in rows for example in ([row] if isinstance(row, Example) else row)]
    found = given.pop("found", None) or survey(examples)
    write_page(file, rows, found, TOKENIZER, title=given.pop("title", "t"), **given)
    text = file.read_text(encoding="utf-8")
    return Page(text), text


def test_what_stands_in_the_data_is_text(tmp_path: Path) -> None:
    rows = encoded([{"instruction": ODD, "output": ODD}, {"instruction": "q", "output": "a"}])
    names = ["<i>1</i>", "b"]
    shown, text = written(tmp_path, rows, title="<u>t</u>", names=names, found=survey(rows, names=names))
    assert {"script", "u", "i", "b onclick"}.isdisjoint(shown.tags)
    assert shown.of("response") == [visible(ODD), "a"]
    assert visible(ODD) in shown.of("source")[0]
    assert "<u>t</u>" in shown.of("h1") and "<i>1</i> record 1" in shown.of("p")
    assert "\x00" not in text and "\x1b" not in text and "\u202e" not in text


def test_nothing_comes_from_elsewhere(tmp_path: Path) -> None:
    shown, text = written(tmp_path, encoded([{"instruction": "q", "output": "a"}]))
    assert {"script", "link", "img", "iframe", "object"}.isdisjoint(shown.tags)
    names = {name for name, _ in shown.attributes}
    assert names <= {"lang", "charset", "name", "content", "class", "style", "title"}
    for outside in ("http:", "https:", "//", "url(", "@import", "src=", "href="):
        assert outside not in text


def test_the_pieces_are_the_example_with_its_padding(tmp_path: Path) -> None:
    records = [{"instruction": "q" * n, "output": "a" * (3 * n)} for n in range(1, 6)]
    rows = encoded(records, end_fill=8)
    shown, _ = written(tmp_path, rows, micro_batch=2)
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
    examples = encoded([{"instruction": f"q{n}", "output": "a" * (5 + 7 * n)} for n in range(7)])
    rows = list(pack(examples, 128))
    shown, text = written(tmp_path, rows, width=128)
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
    shown, text = written(tmp_path, [Example([*b"ab\n\ncd", 258], [False] * 7)])
    assert shown.of("text")[-1] == "ab⏎⏎\ncd" and shown.of("end")[-1] == "<|im_end|>"
    assert "documents that share rows" not in text


def test_of_thousands_the_first_are_shown_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Example([97] * 10, [False] * 10, n) for n in range(1203)]
    shown, text = written(tmp_path, rows)
    assert shown.tags.count("article") == 1000
    assert "the first 1,000 of 1,203 rows" in text and "row 7 of 1,203" in text
    _, begun = written(tmp_path, rows, first_of_run=True)
    assert "the first 1,000 rows of the run, padded" in begun and "row 7<" in begun
    assert "the order of the data" not in begun and "not shown" not in begun
    assert "the order of the data" in text and "203 more rows are not shown" in text
    monkeypatch.setattr(page, "TOKENS", 95)
    shown, text = written(tmp_path, rows)
    assert shown.tags.count("article") == 9 and "the first 9 of 1,203 rows" in text
    shown, text = written(tmp_path, [Example([97] * 500, [False] * 500)])  # one always is
    assert shown.tags.count("article") == 1 and "all 1 rows" in text


def test_the_report_stands_above(tmp_path: Path) -> None:
    records = [({"instruction": "q", "output": "a"}, "x line 1")] * 3 + [({"instruction": "q"}, "x|<line> 4")]
    rows, report = encode_records(records, Encoder(TOKENIZER), on_bad_record="skip")
    found = survey(rows, report, names=["a.jsonl"], block_size=64, micro_batch=2)
    _, text = written(tmp_path, rows, found=found)
    assert "no known format has these fields; first: x|&lt;line&gt; 4" in text
    assert "packed into rows of 64" in text and "record 2 = record 1; record 3 = record 1" in text
    assert text.index("a.jsonl") < text.index("<article>")


def test_nothing_to_show(tmp_path: Path) -> None:
    shown, text = written(tmp_path, [])
    assert "0 sequences" in text and "article" not in shown.tags


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_page(tmp_path / "new.html")
    with pytest.raises(UnmaskError, match=r"--html: .* is a folder; name a file in it"):
        check_page(tmp_path)
    with pytest.raises(UnmaskError, match=r"--html: .*there is no folder .*none; make it first"):
        check_page(tmp_path / "none" / "a.html")
    monkeypatch.setattr(page.os, "access", lambda *_: False)
    with pytest.raises(UnmaskError, match=r"--html: .*new.html cannot be written to"):
        check_page(tmp_path / "new.html")
    with pytest.raises(UnmaskError, match=r"--html: .* cannot be written: Is a directory"):
        write_page(tmp_path, [], survey([]), TOKENIZER, title="t")

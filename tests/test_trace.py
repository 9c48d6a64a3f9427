"""How a response was denoised: lines in a terminal, and the page."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from unmask.errors import UnmaskError
from unmask.generation.text import Completion
from unmask.generation.trace import MASK_GLYPH, token_texts, trace_data, trace_lines, write_trace_page

MASK, END = 259, 258


def plain(ids: list[int], steps: list[int], tokenizer: PreTrainedTokenizerBase, frames: int = 6) -> list[str]:
    return [line.plain for line in trace_lines(ids, steps, tokenizer, frames)]


def test_masks_become_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert plain([*b"abc", END], [2, 0, 3, 1], tokenizer) == [
        f"    1 {MASK_GLYPH}b{MASK_GLYPH}{MASK_GLYPH}",
        f"    2 {MASK_GLYPH}b{MASK_GLYPH}⏹",
        f"    3 ab{MASK_GLYPH}⏹",
        "    4 abc⏹",
    ]
    # Steps between these committed tokens after the end.
    assert [int(line.split()[0]) for line in plain(list(b"abc"), [4, 1, 9], tokenizer)] == [2, 5, 10]
    assert plain([], [], tokenizer) == []
    first, last = trace_lines(list(b"abc"), [1, 0, 1], tokenizer)
    styles = [{line.plain[span.start]: str(span.style) for span in line.spans} for line in (first, last)]
    assert styles[0][MASK_GLYPH] == "bright_black"
    assert (styles[1]["a"], styles[1]["b"], styles[1]["c"]) == ("bold green", "default", "bold green")


@pytest.mark.parametrize(("frames", "length"), [(1, 5), (2, 1), (6, 20), (100, 20)])
def test_lines_are_spread_over_the_steps_and_end_with_the_whole(
    tokenizer: PreTrainedTokenizerBase, frames: int, length: int
) -> None:
    text = bytes(97 + i for i in range(length))
    lines = plain(list(text), [3 * i for i in range(length)], tokenizer, frames)
    assert len(lines) == min(frames, length) and lines[-1].endswith(" " + text.decode())
    masks = [length, *(line.count(MASK_GLYPH) for line in lines)]
    committed = [before - after for before, after in pairwise(masks)]
    assert max(committed) - min(committed) <= 1 and min(committed) >= 1


def test_tokens_as_text(tokenizer: PreTrainedTokenizerBase) -> None:
    assert token_texts([97, END, MASK], tokenizer) == ["a", "⏹", MASK_GLYPH]
    # A character of several tokens is drawn with its last one; bytes that are not a character are drawn too.
    ids = list("né€".encode())
    assert "".join(token_texts(ids, tokenizer)) == "né€"
    lines = plain(ids, [0, 1, 1, 2, 3, 3], tokenizer)
    assert lines[-1] == "    4 né€" and "�" not in "".join(lines)
    assert token_texts([0xE9, 97], tokenizer) == ["�", "a"]
    # A frame is one line and cannot move the cursor.
    assert plain(list(b"a\nb\x1b[2J\r\t"), [0] * 9, tokenizer) == ["    1 a⏎b␛[2J␍␉"]


# The page.

STATES = [
    [MASK, *b"b", MASK, END],
    [*b"a", MASK, MASK, END],
    [*b"ac", END, END],
]
ANSWER = Completion("ac", [*b"ac", END], [1, 2, 2], [0.5, 0.75, 1.0], [0.7, 0.3, 0.0], 3, STATES)


def test_the_page_plays_the_changes_of_each_step(tokenizer: PreTrainedTokenizerBase) -> None:
    data = trace_data(ANSWER, tokenizer)
    assert data["frames"] == [[[1, "b"], [3, "▪"]], [[0, "a"], [1, None]], [[1, "c"], [2, "▪"]]]
    assert (data["length"], data["num_ids"]) == (4, 3)
    assert data["figures"] == "3 tokens in 3 denoising steps: 1.00 tokens per step. Canvas of 4 tokens."
    early = replace(ANSWER, states=[*STATES[:2], [*b"ac", END, MASK]])  # nothing behind the end was needed
    assert trace_data(early, tokenizer)["figures"].endswith("tokens. 1 place behind the end left masked.")
    # A character of two tokens is drawn when it is complete.
    first, second = "é".encode()
    states = [[MASK, second], [first, second]]
    answer = Completion("é", [first, second], [1, 0], [1.0, 1.0], [0.0, 0.0], 2, states)
    assert trace_data(answer, tokenizer)["frames"] == [[[1, "\ufffd"]], [[0, ""], [1, "é", 0]]]


def test_the_page_loads_nothing_and_shows_text_as_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    odd = "</script><script>alert(1)</script>{{ title }}"
    state = list(odd.encode())
    answer = Completion(odd, state, [0] * len(state), [1.0] * len(state), [0.0] * len(state), 1, [state])
    file = tmp_path / "trace.html"
    write_trace_page(
        file, [ANSWER, answer], tokenizer, title="<b>t</b>", names=["1", "2"], prompt=odd + "\x1b"
    )
    text = file.read_text(encoding="utf-8")
    assert text.count("</script>") == 2 and "<b>t</b>" not in text and "\x1b" not in text
    assert text.count("&lt;b&gt;t&lt;/b&gt;") == 2  # title and heading
    assert not re.search(r"https?:|src=|href=|@import|url[(]", text)
    assert "default-src 'none'" in text
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert [answer["name"] for answer in data] == ["1", "2"]
    assert data[1]["prompt"] == odd + "␛"
    assert "".join(change[1] for change in data[1]["frames"][0]) == odd
    with pytest.raises(UnmaskError, match=r"no/t\.html"):
        write_trace_page(tmp_path / "no" / "t.html", [], tokenizer, title="t", names=[])

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from unmask.generation.trace import MASK_GLYPH, token_texts, trace_lines

END = 258


def plain(ids: list[int], steps: list[int], tokenizer: PreTrainedTokenizerBase, **kw: int) -> list[str]:
    return [line.plain for line in trace_lines(ids, steps, tokenizer, **kw)]


def test_tokens_appear_out_of_masks(tokenizer: PreTrainedTokenizerBase) -> None:
    lines = plain([*b"abc", END], [2, 0, 3, 1], tokenizer)
    assert lines == [
        f"    1 {MASK_GLYPH}b{MASK_GLYPH}{MASK_GLYPH}",
        f"    2 {MASK_GLYPH}b{MASK_GLYPH}⏹",
        f"    3 ab{MASK_GLYPH}⏹",
        "    4 abc⏹",
    ]


def test_the_number_is_that_of_the_forward(tokenizer: PreTrainedTokenizerBase) -> None:
    lines = plain(list(b"abc"), [4, 1, 9], tokenizer)  # forwards between wrote behind the end
    assert [int(line.split()[0]) for line in lines] == [2, 5, 10]


def test_what_was_just_committed_is_green_and_masks_are_grey(tokenizer: PreTrainedTokenizerBase) -> None:
    _, line = trace_lines(list(b"abc"), [1, 0, 1], tokenizer)
    styles = {line.plain[span.start : span.end]: str(span.style) for span in line.spans}
    assert styles["a"] == styles["c"] == "bold green"
    assert styles["b"] == "default"
    first, _ = trace_lines(list(b"abc"), [1, 0, 1], tokenizer)
    assert {str(span.style) for span in first.spans if first.plain[span.start] == MASK_GLYPH} == {
        "bright_black"
    }


@pytest.mark.parametrize("frames", [1, 2, 3, 6, 100])
@pytest.mark.parametrize("length", [1, 5, 20])
def test_lines_are_spread_over_the_steps_and_end_with_the_whole(
    tokenizer: PreTrainedTokenizerBase, frames: int, length: int
) -> None:
    text = bytes(97 + i for i in range(length))
    lines = plain(list(text), [3 * i for i in range(length)], tokenizer, frames=frames)  # gaps between steps
    assert len(lines) == min(frames, length)
    assert lines[-1].endswith(" " + text.decode())
    open_ = [line.count(MASK_GLYPH) for line in lines]
    gaps = [before - after for before, after in zip([length, *open_], open_, strict=False)]
    assert max(gaps) - min(gaps) <= 1 and min(gaps) >= 1


def test_nothing_answered_is_nothing_drawn(tokenizer: PreTrainedTokenizerBase) -> None:
    assert trace_lines([], [], tokenizer) == []


def test_a_frame_is_one_line_and_cannot_move_the_cursor(tokenizer: PreTrainedTokenizerBase) -> None:
    [line] = plain(list(b"a\nb\x1b[2J\r\t"), [0] * 9, tokenizer)
    assert line == "    1 a⏎b␛[2J␍␉"


def test_a_character_of_several_tokens_is_drawn_with_its_last_one(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    ids = list("né€".encode())
    assert "".join(token_texts(ids, tokenizer)) == "né€"
    lines = plain(ids, [0, 1, 1, 2, 3, 3], tokenizer)
    assert lines[-1] == "    4 né€"
    assert "�" not in "".join(lines)
    assert token_texts([0xE9, 97], tokenizer) == ["�", "a"]  # no character at all


def test_special_tokens_are_signs(tokenizer: PreTrainedTokenizerBase) -> None:
    mask = tokenizer.mask_token_id
    assert isinstance(mask, int)
    assert token_texts([97, END, mask], tokenizer) == ["a", "⏹", MASK_GLYPH]

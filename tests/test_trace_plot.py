from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.image import imread
from transformers import PreTrainedTokenizerBase

from unmask.errors import UnmaskError
from unmask.generation.complete import Completion
from unmask.generation.trace_plot import draw_trace


def answer(text: str, steps: list[int]) -> Completion:
    return Completion(text, list(text.encode()), steps, forwards=max(steps, default=0) + 1)


def test_each_cell_has_the_colour_of_its_step(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    images = []
    for steps in ([0, 1, 2, 3] * 10, [3, 1, 2, 0] * 10):
        draw_trace(tmp_path / "t.png", [answer("$a_b" * 10, steps)], tokenizer, title="a $ title")
        images.append(imread(tmp_path / "t.png"))
    assert images[0].shape == images[1].shape
    assert 0.02 < (images[0] != images[1]).any(axis=2).mean() < 0.6  # half of the cells differ


def test_answers_of_any_length_share_a_picture(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    answers = [answer("a" * 70, list(range(70))), answer("", []), answer("b", [0])]
    draw_trace(tmp_path / "t.png", answers, tokenizer, title="t", names=["1", "2", "3"])
    assert (tmp_path / "t.png").stat().st_size > 1000


def test_what_cannot_be_drawn_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UnmaskError, match="the answer has no token to draw"):
        draw_trace(tmp_path / "t.png", [answer("", [])], tokenizer, title="t")
    with pytest.raises(UnmaskError, match="a picture holds 8 answers at most; got 9"):
        draw_trace(tmp_path / "t.png", [answer("a", [0])] * 9, tokenizer, title="t")

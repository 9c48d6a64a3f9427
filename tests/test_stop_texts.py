from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from unmask.errors import UnmaskError
from unmask.generation.stop import StopTexts


@pytest.mark.parametrize("text", ["", "ab", "xy.", "..x", "x\n\né", "é"])
def test_a_response_ends_with_the_token_that_completes_a_stop_text(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    stop, prompt = StopTexts(tokenizer, ["é", ".x"]), "é .x."  # none of it counts
    ids = list((prompt + text).encode())
    start = len(prompt.encode())
    met = [bool(stop(torch.tensor([ids[:n]]), None, prompt_length=start)) for n in range(start, len(ids) + 1)]
    expected = [
        "é" in (said := bytes(ids[start:n]).decode(errors="replace")) or ".x" in said
        for n in range(start, len(ids) + 1)
    ]
    assert met == expected


def test_text_is_cut_before_the_first_stop_text(tokenizer: PreTrainedTokenizerBase) -> None:
    stop = StopTexts(tokenizer, ["c", "bc"])
    assert (stop.cut("abcd"), stop.cut("xyz"), stop.cut("c")) == ("a", None, "")
    assert StopTexts(tokenizer, []).cut("abc") is None


def test_an_empty_stop_text_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UnmaskError, match="must not be empty"):
        StopTexts(tokenizer, ["a", ""])

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import byte_model
from transformers import PreTrainedTokenizerBase

from unmask.diffusion.likelihood import likelihood
from unmask.errors import UnmaskError
from unmask.evaluation.choose import choose, choose_answers
from unmask.generation.prompts import prompt_example, raw_example


@pytest.fixture(scope="module")
def model() -> Any:
    return byte_model().eval()


def bound(model: Any, prompt: list[int], answer: list[int]) -> float:
    batch = {
        "input_ids": torch.tensor([prompt + answer]),
        "src_mask": torch.tensor([[True] * len(prompt) + [False] * len(answer)]),
    }
    return likelihood(model, batch).nll.item()


@pytest.mark.parametrize("end_fill", [1, 4])
def test_the_likeliest_answer_with_its_end_comes_first(
    model: Any, tokenizer: PreTrainedTokenizerBase, end_fill: int
) -> None:
    prompt = prompt_example(tokenizer, "Which?")
    ranked = choose(model, tokenizer, prompt, ["a", "ab", "<|mask|>"[:3]], end_fill=end_fill)
    assert sorted(choice.text for choice in ranked) == ["<|m", "a", "ab"]
    assert [choice.nats for choice in ranked] == sorted(choice.nats for choice in ranked)
    assert sum(choice.probability for choice in ranked) == pytest.approx(1)
    for choice in ranked:
        ids = [*choice.text.encode(), 258]
        ids += [258] * (-len(ids) % end_fill)
        assert choice.nats == pytest.approx(bound(model, prompt.input_ids, ids), rel=1e-5)


def test_lines_of_a_file_and_raw_texts_without_an_end(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = [raw_example(tokenizer, text) for text in ("ab", "x")]
    counts: list[int] = []
    lines = [line for _, line in choose_answers(model, tokenizer, ["c", "d"], prompts, [0, 0], counts.append)]
    assert counts == [1, 1]
    for prompt, line in zip(prompts, lines, strict=True):
        nats = {text: bound(model, prompt.input_ids, list(text.encode())) for text in "cd"}
        assert line["response"] == min(nats, key=lambda text: nats[text])
        assert {text: one["nats"] for text, one in line["choices"].items()} == pytest.approx(nats, abs=1e-4)


@pytest.mark.parametrize("choices", [["a"], ["a", "a"], ["a", ""], ["a", "b" * 260]], ids=len)
def test_choices_that_cannot_be_compared(
    model: Any, tokenizer: PreTrainedTokenizerBase, choices: list[str]
) -> None:
    with pytest.raises(UnmaskError, match="choice"):
        choose(model, tokenizer, raw_example(tokenizer, "ab"), choices)

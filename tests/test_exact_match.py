from __future__ import annotations

import pytest

from unmask.data.encode import Example
from unmask.evaluation.exact_match import exact_share, is_exact
from unmask.generation.prompts import Prompt
from unmask.generation.text import Completion


@pytest.mark.parametrize(
    ("text", "expected", "exact"),
    [
        (" abc\n", "\tabc", True),
        ("Abc", "abc", False),
        ("a  b", "a b", False),
        ("<think>\n\n</think>\n\nabc", "abc", True),
        ("hm\n</think>\n\nabc", "<think>\nwell\n</think>\n\nabc", True),
        ("<think>abc", "abc", False),
    ],
)
def test_exact_is_to_the_letter_but_for_reasoning_and_blanks_around(
    text: str, expected: str, exact: bool
) -> None:
    assert is_exact(Completion(text, [], []), Prompt(Example([], []), "", expected=expected)) is exact


def test_share_counts_each_prompt_once() -> None:
    prompts = [Prompt(Example([], []), "", expected=text) for text in "abcd"]
    assert exact_share([Completion(text, [], []) for text in "abxx"], prompts) == 0.5

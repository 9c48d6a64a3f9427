from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from unmask.data.encode import Encoder, Example
from unmask.data.records import CustomFields, to_conversation
from unmask.errors import UnmaskError
from unmask.evaluation.exact_match import Prompt, exact_share, is_exact, make_prompts
from unmask.generation.text import Completion


@pytest.mark.parametrize(
    ("text", "expected", "exact"),
    [
        ("abc", "abc", True),
        (" abc\n", "abc", True),
        ("abc", "\tabc ", True),
        ("Abc", "abc", False),
        ("a  b", "a b", False),
        ("abcd", "abc", False),
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
    completions = [Completion(text, [], []) for text in "abxx"]
    assert exact_share(completions, prompts) == 0.5
    assert exact_share(completions[:2], prompts[:2]) == 1.0


RECORDS: list[tuple[dict[str, Any], str, str]] = [
    ({"instruction": "Add", "input": "1 2", "output": "3"}, "Add\n1 2", "3"),
    ({"prompt": "Say a", "completion": "a"}, "Say a", "a"),
    (
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "one"},
                {"role": "assistant", "content": "1"},
                {"role": "user", "content": "two"},
                {"role": "assistant", "content": "2"},
            ]
        },
        "two",
        "2",
    ),
    (
        {
            "conversations": [
                {"from": "human", "value": "one"},
                {"from": "gpt", "value": "1"},
                {"from": "human", "value": "thanks"},
            ]
        },
        "one",
        "1",
    ),
]


@pytest.mark.parametrize(("record", "text", "expected"), RECORDS)
def test_a_prompt_is_all_that_training_shows_before_the_last_response(
    tokenizer: PreTrainedTokenizerBase, record: dict[str, Any], text: str, expected: str
) -> None:
    encoder = Encoder(tokenizer, train_on="last")
    [prompt] = make_prompts([(record, "x record 1")], encoder)
    example = encoder.encode(to_conversation(record, where="x record 1"))
    assert prompt.example.input_ids == example.input_ids[: example.src_mask.index(False)]
    assert (prompt.text, prompt.expected) == (text, expected)


def test_the_format_can_be_given(tokenizer: PreTrainedTokenizerBase) -> None:
    record = {"q": "Why?", "a": "Because."}
    [prompt] = make_prompts(
        [(record, "x")], Encoder(tokenizer), "custom", CustomFields(instruction_field="q", response_field="a")
    )
    assert (prompt.text, prompt.expected) == ("Why?", "Because.")


def test_a_record_that_cannot_be_used_is_named(tokenizer: PreTrainedTokenizerBase) -> None:
    records = [({"prompt": "a", "completion": "b"}, "x line 1"), ({"prompt": "a"}, "x line 2")]
    with pytest.raises(UnmaskError, match=r"^x line 2: "):
        make_prompts(records, Encoder(tokenizer))


def test_a_tool_call_that_is_asked_for_is_what_the_model_is_to_write(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "tool_calls": [call]}]
    record = {"messages": turns, "tools": [{"name": "add"}]}
    encoder = Encoder(tokenizer)
    [prompt] = make_prompts([(record, "x line 1")], encoder)
    row = encoder.encode(to_conversation(record, where="x line 1"))
    learnt = [i for i, source in zip(row.input_ids, row.src_mask, strict=True) if not source]
    assert prompt.expected == tokenizer.decode(learnt[:-1])
    assert row.input_ids[: len(prompt.example.input_ids)] == prompt.example.input_ids

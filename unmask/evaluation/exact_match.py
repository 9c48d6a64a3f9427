"""Exact match: the share of held-out prompts whose answer equals the expected one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from unmask.data.encode import Encoder
from unmask.data.records import CustomFields, call_text, detect_format, to_conversation
from unmask.generation.text import Completion, Prompt


def is_exact(completion: Completion, prompt: Prompt) -> bool:
    """Whether the text equals the expected one, apart from reasoning before it and white space around it.

    Reasoning is what ends in `</think>`: an empty think block too, which some templates write before an answer.
    """
    written, expected = (text.rpartition("</think>")[2] for text in (completion.text, prompt.expected))
    return written.strip() == expected.strip()


def exact_share(completions: list[Completion], prompts: list[Prompt]) -> float:
    """The share of prompts that are answered exactly."""
    return sum(map(is_exact, completions, prompts)) / len(prompts)


def make_prompts(
    records: Iterable[tuple[dict[str, Any], str]],
    encoder: Encoder,
    format: str = "auto",
    custom_format: CustomFields | None = None,
) -> list[Prompt]:
    """Turn records into prompts: everything before the last response, which is the expected answer.

    Raises:
        UnmaskError: a record cannot be used.
    """
    prompts = []
    for record, location in records:
        name = detect_format(record, location, custom_format) if format == "auto" else format
        conversation = to_conversation(record, name, where=location, custom_format=custom_format)
        turns = conversation.turns
        last = max(index for index, turn in enumerate(turns) if turn.role == "assistant")
        asked = next((turn for turn in reversed(turns[:last]) if turn.role == "user"), turns[0])
        example = encoder.prompt_example(turns[:last], conversation.tools)
        prompts.append(Prompt(example, asked.content, location, call_text(turns[last])))
    return prompts

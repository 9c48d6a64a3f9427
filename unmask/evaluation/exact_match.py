"""Exact match: the share of held-out prompts whose answer equals the expected one."""

from __future__ import annotations

from unmask.generation.prompts import Prompt
from unmask.generation.text import Completion


def is_exact(completion: Completion, prompt: Prompt) -> bool:
    """Whether the text equals the expected one, apart from reasoning before it and white space around it.

    Reasoning is what ends in `</think>`: an empty think block too, which some templates write before an answer.
    """
    written, expected = (text.rpartition("</think>")[2] for text in (completion.text, prompt.expected))
    return written.strip() == expected.strip()


def exact_share(completions: list[Completion], prompts: list[Prompt]) -> float:
    """The share of prompts that are answered exactly."""
    return sum(map(is_exact, completions, prompts)) / len(prompts)

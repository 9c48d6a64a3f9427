from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rich.console import Console
from rich.live import Live
from tiny import byte_model
from transformers import PreTrainedTokenizerBase

from unmask.data.records import Turn
from unmask.generation.chat import LiveDraft, chat
from unmask.generation.complete import chat_example, complete

MASK, END = 259, 258


@pytest.fixture(scope="module")
def model() -> Any:
    return byte_model().eval()


def asked(*lines: str | type[BaseException]) -> Callable[[], str]:
    """Say these lines, raise these errors, and then end."""
    left: Iterator[str | type[BaseException]] = iter(lines)

    def ask() -> str:
        line = next(left, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return ask


def talk(
    model: Any, tokenizer: PreTrainedTokenizerBase, *lines: str | type[BaseException], **given: Any
) -> tuple[list[Turn], str]:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=given.pop("terminal", False), width=200, color_system=None)
    turns = chat(model, tokenizer, ask=asked(*lines), console=console, max_new_tokens=4, **given)
    return turns, shown.getvalue()


def test_an_answer_knows_what_was_said_before(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    turns, shown = talk(model, tokenizer, "Hi", "", "And?", system="Be short.")
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "user", "assistant"]
    for place in (2, 4):
        prompt = chat_example(tokenizer, turns[:place])
        [expected] = complete(model, tokenizer, [prompt], max_new_tokens=4)
        assert turns[place].content == expected.text and expected.figures in shown


def test_a_terminal_shows_tokens_out_of_masks(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    plain, quiet = talk(model, tokenizer, "Hi")
    turns, shown = talk(model, tokenizer, "Hi", terminal=True)
    assert turns == plain and "░" in shown and "░" not in quiet


def test_commands(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    turns, shown = talk(model, tokenizer, "Hi", "/reset", "/rest", "/quit", "not reached", system="s")
    assert turns == [Turn("system", "s")]
    assert "The conversation starts anew." in shown and "unknown command /rest." in shown
    assert talk(model, tokenizer, KeyboardInterrupt)[0] == []


def test_what_cannot_be_answered_is_forgotten(
    model: Any, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns, shown = talk(model, tokenizer, "x" * 300, "\udcff", "Hi")
    assert turns[0].content == "Hi" and len(turns) == 2
    assert "need more than the model's 256 positions" in shown and "half a surrogate pair" in shown

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("unmask.generation.chat.complete", stopped)
    turns, shown = talk(model, tokenizer, "Hi")
    assert turns == [] and "Stopped; this question is forgotten." in shown


def test_a_draft_ends_at_its_end_token_and_marks_what_is_new(tokenizer: PreTrainedTokenizerBase) -> None:
    draft = LiveDraft(Live(console=Console(quiet=True)), tokenizer, [END])
    draft.before = [97, MASK, MASK, MASK, MASK]
    line = draft.draw([97, 10, MASK, END, MASK])
    assert line.plain == "a\n░"
    assert [str(span.style) for span in line.spans] == ["default", "bold green", "bright_black"]

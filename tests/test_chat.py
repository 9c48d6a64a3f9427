from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from rich.live import Live
from tiny import byte_model
from transformers import PreTrainedTokenizerBase

from unmask.data.records import Turn
from unmask.generation.chat import HELP, TURNS, LiveDraft, chat
from unmask.generation.prompts import chat_encoder
from unmask.generation.rows import Event
from unmask.generation.text import complete

MASK, END = 259, 258


@pytest.fixture(scope="module")
def model() -> Any:
    return byte_model().eval()


def talk(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *lines: str | type[BaseException],
    terminal: bool = False,
    system: str | None = None,
) -> tuple[list[Turn], str]:
    """Say these lines, or raise these errors, and then end."""
    rest = iter(lines)

    def ask() -> str:
        line = next(rest, EOFError)
        if isinstance(line, str):
            return line
        raise line

    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=200, color_system=None)
    turns = chat(model, tokenizer, ask=ask, console=console, system=system, max_new_tokens=4)
    return turns, shown.getvalue()


def test_an_answer_knows_what_was_said_before(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    turns, shown = talk(model, tokenizer, "Hi", "", "And?", system="Be short.")
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "user", "assistant"]
    for index in (2, 4):
        prompt = chat_encoder(tokenizer).prompt_example(turns[:index])
        [expected] = complete(model, tokenizer, [prompt], max_new_tokens=4)
        assert turns[index].content == expected.text and expected.figures in shown


def test_help_says_what_a_conversation_needs(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    turns, shown = talk(model, tokenizer, "/help")
    assert turns == [] and shown.count(HELP) == shown.count(TURNS) == 2  # at first, and when asked for
    assert "/reset" in TURNS


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
    assert "need more than the model's 256 positions" in shown and "surrogate" in shown

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("unmask.generation.chat.complete", stopped)
    turns, shown = talk(model, tokenizer, "Hi")
    assert turns == [] and "Stopped; this question is forgotten." in shown


def test_a_draft_ends_at_its_end_token_and_marks_what_is_new(tokenizer: PreTrainedTokenizerBase) -> None:
    live = Live(console=Console(quiet=True))
    draft = LiveDraft(live, tokenizer, [END])
    draft.draw(Event(0, 5, [0], tokens=[97]))
    draft.draw(Event(0, 5, [1, 3], tokens=[10, END]))
    line: Any = live.renderable
    assert line.plain == "a\n░"
    assert [str(span.style) for span in line.spans] == ["default", "bold green", "bright_black"]

"""A conversation in the terminal: tokens appear out of masks and settle as they are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unmask.data.records import Turn, check_text
from unmask.data.inspect import visible
from unmask.errors import UnmaskError
from unmask.generation.complete import Completion, chat_example, complete
from unmask.generation.trace import MASK_GLYPH, token_texts

HELP = "/reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer."


def chat(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    ask: Callable[[], str],
    console: Console,
    system: str | None = None,
    **settings: Any,
) -> list[Turn]:
    """Talk until the user ends it; returns the turns of the conversation.

    An answer that was stopped or could not be given is forgotten together with its question.

    Args:
        ask: returns what the user says; EOFError or KeyboardInterrupt end the conversation.
        console: where answers are shown; on a terminal they are drawn as they appear.
        **settings: see `complete`.
    """
    opening = [] if system is None else [Turn("system", system)]
    turns = list(opening)
    console.print(HELP, style="dim", highlight=False)
    while True:
        try:
            said = ask()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return turns
        except UnicodeDecodeError:
            _say(console, "error: that was no UTF-8 text.")
            continue
        command = said.strip()
        if command == "/quit":
            return turns
        if command == "/reset":
            turns = list(opening)
            console.print("The conversation starts anew.", style="dim")
        elif command.startswith("/") and " " not in command and "/" not in command[1:]:
            _say(console, f"unknown command {command}. {HELP}")
        elif command:
            asked = [*turns, Turn("user", said)]
            try:
                check_text(said, "your turn", "chat")
                answer = show_answer(model, tokenizer, asked, console, **settings)
            except KeyboardInterrupt:
                _say(console, "Stopped; this question is forgotten.")
                continue
            except UnmaskError as error:
                _say(console, f"error: {error} /reset makes room.")
                continue
            turns = [*asked, Turn("assistant", answer.text)]


def show_answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, turns: list[Turn], console: Console, **settings: Any
) -> Completion:
    """Answer the turns, drawing the answer as it appears, and print it."""
    prompt = chat_example(tokenizer, turns)
    if console.is_terminal:
        with Live(console=console, transient=True, auto_refresh=False) as live:
            drawn = LiveDraft(live, tokenizer, model.generation_config.eos_token_ids)
            [answer] = complete(model, tokenizer, [prompt], streamer=drawn, **settings)
    else:
        [answer] = complete(model, tokenizer, [prompt], **settings)
    console.print(Text("\n".join(visible(line) for line in answer.text.split("\n"))))
    console.print(Text(answer.figures, "dim"), highlight=False)
    return answer


class LiveDraft:
    """A streamer that draws each draft: masks grey, what has just been committed in green.

    Args:
        live: where it is drawn.
        ends: the end tokens; what follows one is not drawn.
    """

    def __init__(self, live: Live, tokenizer: PreTrainedTokenizerBase, ends: list[int]):
        self.live, self.tokenizer, self.ends = live, tokenizer, set(ends)
        self.before: list[int] = []

    def put(self, value: Tensor) -> None:
        """Take the prompt, or the finished response: neither is a draft."""

    def put_draft(self, value: Tensor) -> None:
        """Draw the canvas (1, C)."""
        ids = value[0].tolist()
        self.live.update(self.draw(ids), refresh=True)
        self.before = ids

    def end(self) -> None:
        """Nothing is left to do."""

    def draw(self, ids: list[int]) -> Text:
        """Return the canvas as text."""
        line, mask = Text(), self.tokenizer.mask_token_id
        before = self.before or [mask] * len(ids)
        for one, old, text in zip(ids, before, token_texts(ids, self.tokenizer), strict=True):
            if one in self.ends:
                break
            if one == mask:
                line.append(MASK_GLYPH, style="bright_black")
            else:
                line.append(text.replace("⏎", "\n"), style="default" if one == old else "bold green")
        return line


def _say(console: Console, message: str) -> None:
    console.print(Text(message, "red"), soft_wrap=True)

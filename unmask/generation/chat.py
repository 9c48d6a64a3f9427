"""A conversation in the terminal: tokens replace masks as they are committed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from typing import Any, cast

from rich.console import Console
from rich.live import Live
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from unmask.data.inspect import visible
from unmask.data.records import Turn, check_text
from unmask.errors import UnmaskError
from unmask.generation.prompts import chat_encoder
from unmask.generation.rows import Event
from unmask.generation.text import Completion, complete
from unmask.generation.trace import drawn, token_texts

HELP = "/reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer, /help shows this."
TURNS = (
    "A model trained on single questions answers only the first turn well: /reset before each further one."
)


def chat(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    ask: Callable[[], str],
    console: Console,
    system: str | None = None,
    **settings: Any,
) -> list[Turn]:
    """Answer turn after turn until the user ends the conversation; returns its turns.

    A question whose answer was stopped or failed is forgotten.

    Args:
        ask: returns what the user says; EOFError or KeyboardInterrupt end the conversation.
        console: where answers are shown; on a terminal they are drawn while they are generated.
        **settings: see `complete`.
    """
    opening = [] if system is None else [Turn("system", system)]
    turns, encoder = list(opening), chat_encoder(tokenizer)
    # Its cache knows the conversation so far, if the model attends block by block.
    settings["engine"] = model.make_engine(max_rows=1)

    def error(message: str) -> None:
        console.print(Text(message, "red"), soft_wrap=True)

    def show_help() -> None:
        console.print(f"{HELP}\n{TURNS}", style="dim", highlight=False)

    show_help()
    while True:
        try:
            text = ask()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return turns
        except UnicodeDecodeError:
            error("error: the input is not UTF-8 text.")
            continue
        command = text.strip()
        if command == "/quit":
            return turns
        if command == "/reset":
            turns = list(opening)
            console.print("The conversation starts anew.", style="dim")
        elif command == "/help":
            show_help()
        elif command.startswith("/") and " " not in command and "/" not in command[1:]:
            error(f"unknown command {command}. {HELP}")
        elif command:
            try:
                question = [*turns, Turn("user", check_text(text, "your turn", "chat"))]
                answer = _answer(model, tokenizer, encoder.prompt_example(question), console, settings)
            except KeyboardInterrupt:
                error("Stopped; this question is forgotten.")
            except UnmaskError as failure:
                error(f"error: {failure} /reset makes room.")
            else:
                opened = "</think>" in answer.text and "<think>" not in answer.text  # by the prompt
                turns = [*question, Turn("assistant", "<think>\n" * opened + answer.text)]
                console.print(Text("\n".join(map(visible, answer.text.split("\n")))))
                console.print(Text(answer.figures, "dim"), highlight=False)


def _answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt: Any, console: Console, settings: dict[str, Any]
) -> Completion:
    """Answer a prompt, on a terminal with a drawing of the drafts."""
    if not console.is_terminal:
        return complete(model, tokenizer, [prompt], **settings)[0]
    with Live(console=console, transient=True, auto_refresh=False) as live:
        draft = LiveDraft(live, tokenizer, model.generation_config.eos_token_ids)
        return complete(model, tokenizer, [prompt], watch=draft.draw, **settings)[0]


class LiveDraft:
    """Draws in `live` what each step made of the canvas, up to an end token; tokens of the last step are new."""

    def __init__(self, live: Live, tokenizer: PreTrainedTokenizerBase, ends: list[int]):
        self.live, self.tokenizer, self.ends = live, tokenizer, set(ends)
        self.ids: list[int] = []

    def draw(self, event: Event) -> None:
        """Draw the canvas as it is after a step."""
        mask = cast(int, self.tokenizer.mask_token_id)
        self.ids = self.ids or [mask] * event.length
        event.apply(self.ids, mask)
        new = set(event.positions)
        tokens = zip(token_texts(self.ids, self.tokenizer), self.ids, strict=True)
        shown = takewhile(lambda token: token[1][1] not in self.ends, enumerate(tokens))
        line = drawn((text.replace("⏎", "\n"), id == mask, at in new) for at, (text, id) in shown)
        self.live.update(line, refresh=True)

"""Texts that end a response."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StoppingCriteria

from unmask.errors import UnmaskError


def as_criterion(given: Any) -> Callable[[Tensor, int], bool] | None:
    """Make one test of stopping criteria: (ids (1, L), tokens of the prompt) -> whether one of them is met.

    Args:
        given: None, a criterion or a list of them: transformers' `StoppingCriteria`, or functions of (ids,
            scores), scores None. Those that take a `prompt_length` or any keyword are told it.

    Raises:
        UnmaskError: something that cannot be called.
    """
    several = given if isinstance(given, list | tuple) else [] if given is None else [given]
    told: list[tuple[Any, bool]] = []
    for one in several:
        if not callable(one):
            raise UnmaskError(
                f"stopping_criteria must be functions of (ids, scores); got {type(one).__name__}."
            )
        parameters = inspect.signature(one).parameters.values()
        told.append((one, any(p.name == "prompt_length" or p.kind is p.VAR_KEYWORD for p in parameters)))
    if not told:
        return None

    def is_met(ids: Tensor, prompt_length: int) -> bool:
        answers = (one(ids, None, **({"prompt_length": prompt_length} if more else {})) for one, more in told)
        return any(bool(torch.as_tensor(answer).all()) for answer in answers)

    return is_met


class StopTexts(StoppingCriteria):
    """Ends a response once one of `texts` stands in it, in whatever tokens; the prompt is not looked at.

    transformers' own criterion also finds a text that begins in the prompt, and prepares a table of the
    whole vocabulary first.

    Raises:
        UnmaskError: an empty text, which would end every response.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]):
        if not all(texts):
            raise UnmaskError("a stop text must not be empty.")
        self.tokenizer, self.texts = tokenizer, list(texts)
        # A token that says anything has a byte at least: more of them cannot be part of a text. A few more
        # on the left keep a character whole that is cut there.
        self.reach = max((len(text.encode()) for text in texts), default=0) + 4

    def __call__(self, input_ids: Tensor, scores: Any, *, prompt_length: int = 0, **_: Any) -> Tensor:
        """Say for a row (1, L) whether it ends here; its first `prompt_length` tokens are the prompt."""
        tail = input_ids[0, max(prompt_length, input_ids.shape[1] - self.reach) :].tolist()
        found = self.cut(str(self.tokenizer.decode(tail, skip_special_tokens=True))) is not None
        return torch.full((1,), found, device=input_ids.device)

    def cut(self, text: str) -> str | None:
        """The text before the first of the stop texts; None where there is none."""
        places = [place for stop in self.texts if (place := text.find(stop)) >= 0]
        return text[: min(places)] if places else None

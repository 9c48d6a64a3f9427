"""Which of several answers a model finds most likely."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from unmask.data.collate import collate
from unmask.data.encode import Encoder, Example
from unmask.diffusion.likelihood import likelihood
from unmask.errors import UnmaskError
from unmask.generation.prompts import following_ids


class Choice(NamedTuple):
    """One of the answers, with a bound on its -log p given the prompt."""

    text: str
    nats: float
    stderr: float
    probability: float
    """exp(-nats) divided by its sum over all choices."""


def choose(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Example,
    choices: Sequence[str],
    *,
    end_fill: int = 1,
    num_samples: int = 64,
    seed: int = 0,
    batch_size: int = 16,
) -> list[Choice]:
    """Compare answers to a prompt by `unmask.likelihood`; the likeliest comes first.

    The end token after an answer is scored too, so that the beginning of another answer has no advantage.
    After a raw text, whose `src_mask` is all False, no end token is added.

    Args:
        end_fill: end tokens fill an answer to a multiple of so many tokens, like `data.sft.end_fill`.
        num_samples: see `unmask.likelihood`.
        seed: see `unmask.likelihood`.
        batch_size: see `unmask.likelihood`.

    Raises:
        UnmaskError: fewer than two different choices, an empty one, or one that is too long.
    """
    if len(choices) < 2 or len(set(choices)) < len(choices) or not all(choices):
        raise UnmaskError("give two choices or more, all different and none empty.")
    ends = [Encoder(tokenizer, layout="chat").end_token_id] if any(prompt.src_mask) else []
    examples = []
    for text in choices:
        ids = following_ids(prompt, text, tokenizer) + ends
        ids += ends * (-len(ids) % end_fill)
        sequence = prompt.input_ids + ids
        if len(sequence) > model.config.max_position_embeddings:
            raise UnmaskError(
                f"the prompt with the choice {text!r} has {len(sequence)} tokens, more than the model's"
                f" {model.config.max_position_embeddings} positions."
            )
        examples.append(Example(sequence, [True] * len(prompt.input_ids) + [False] * len(ids)))
    bound = likelihood(
        model, collate(examples, pad_token_id=0), num_samples=num_samples, seed=seed, batch_size=batch_size
    )
    shares = torch.softmax(-bound.nll, dim=0).tolist()
    columns = zip(choices, bound.nll.tolist(), bound.stderr.tolist(), shares, strict=True)
    return sorted((Choice(*column) for column in columns), key=lambda choice: choice.nats)


def choose_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    choices: Sequence[str],
    examples: Sequence[Example],
    seeds: Sequence[int],
    advance: Callable[[int], None] | None = None,
    **settings: Any,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Answer each prompt with one of the choices, see `choose`; with the nats and share of each choice."""
    for index, (example, seed) in enumerate(zip(examples, seeds, strict=True)):
        ranked = choose(model, tokenizer, example, choices, seed=seed, **settings)
        figures = {
            text: {"nats": round(nats, 4), "stderr": round(stderr, 4), "probability": round(share, 4)}
            for text, nats, stderr, share in ranked
        }
        if advance is not None:
            advance(1)
        yield index, {"response": ranked[0].text, "choices": figures}

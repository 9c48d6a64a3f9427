"""Likelihoods that requests ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from unmask.data.collate import collate
from unmask.data.encode import Example
from unmask.diffusion.likelihood import Likelihood, likelihood

BATCH = 16  # sequences of a forward pass


class TokenScore(NamedTuple):
    """A token of a text, given all before it."""

    token: int
    logprob: float  # nats
    best: int  # the likeliest token there
    best_logprob: float


@torch.no_grad()
def left_to_right(model: Any, ids: Sequence[int], pause: Callable[[], None]) -> list[TokenScore]:
    """Compute log p of each token given all before it, those after it masked.

    It is the likelihood under decoding from left to right, on a canvas of the text's length: exact, and the sum
    over the tokens from any point on is log p of these given what is before. Another order gives another one;
    /v1/score bounds the likelihood over all orders. One sequence a token goes through the model.

    Args:
        pause: called after each forward pass.
    """
    scores: list[TokenScore] = []
    text = torch.tensor(ids, dtype=torch.long, device=model.device)
    columns = torch.arange(len(text), device=model.device)
    for at in columns.split(BATCH):
        clean = text.expand(len(at), -1)
        x_t = torch.where(columns >= at[:, None], model.config.mask_token_id, clean)
        hidden = model.shifted_hidden(model.prepare(clean), x_t)[torch.arange(len(at)), at]
        log_p = model.lm_head(hidden).float().log_softmax(dim=-1)
        best = log_p.max(dim=-1)
        facts = (text[at], log_p.gather(1, text[at, None])[:, 0], best.indices, best.values)
        scores += [TokenScore(*fact) for fact in zip(*(values.tolist() for values in facts), strict=True)]
        pause()
    return scores


def bounds(model: Any, examples: Sequence[Example], pause: Callable[[], None], **settings: Any) -> Likelihood:
    """Bound -log p of examples, see `unmask.likelihood`; `pause` is called after each forward pass."""
    sequences = 0

    def advance(_: float) -> None:
        nonlocal sequences
        sequences += 1
        if sequences % BATCH == 0:
            pause()

    batch = collate(list(examples), pad_token_id=0)
    return likelihood(model, batch, advance=advance, batch_size=BATCH, **settings)

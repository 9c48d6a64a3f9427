"""From logits to a token and a confidence, as pure functions over the last axis."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmask.diffusion.keyed import STREAM_SAMPLE, keyed_uniform


def suppress(logits: Float[Tensor, "*rows V"], ids: Int[Tensor, "K"]) -> Float[Tensor, "*rows V"]:
    """Give the listed ids probability 0."""
    return logits.index_fill(-1, ids, -torch.inf)


def gumbel_noise(
    seed: Int[Tensor, "M"], position: Int[Tensor, "M"], step: int, vocab_size: int
) -> Float[Tensor, "M V"]:
    """Draw Gumbel noise as a pure function of (seed, position, step, token)."""
    token = torch.arange(vocab_size, device=seed.device)
    uniform = keyed_uniform(seed[:, None], STREAM_SAMPLE, position[:, None], step, token[None])
    return -torch.log(-torch.log(uniform.clamp(min=1e-30)))


def pick(
    logits: Float[Tensor, "M V"], temperature: float, noise: Float[Tensor, "M V"] | None
) -> tuple[Int[Tensor, "M"], Float[Tensor, "M"]]:
    """Choose a token for each row and say how confident the model is in it.

    With noise the choice is a sample from softmax(logits / temperature) by the Gumbel-max trick, without
    it the most likely token. The confidence is the model's own probability of the chosen token, before
    any temperature.

    Returns:
        (tokens, confidences), confidences in [0, 1].
    """
    log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    scores = log_p if noise is None else log_p / temperature + noise
    tokens = scores.argmax(dim=-1)
    return tokens, log_p.gather(-1, tokens[:, None])[:, 0].exp()

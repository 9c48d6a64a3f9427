"""The forward process: how much noise (`sample_t`) and which tokens it takes (`transition`).

Absorbing-state diffusion with the linear schedule: at time t every maskable token has become the mask
token with probability t, independently (Sahoo et al., "Simple and Effective Masked Diffusion Language
Models", arXiv:2406.07524, eq. 1 with alpha_t = 1 - t; Nie et al., LLaDA, arXiv:2502.09992, eq. 7).

Shapes: B batch, L sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmask.diffusion.keyed import STREAM_MASK, STREAM_SEED, STREAM_TIME, keyed_hash, keyed_uniform


class Noised(NamedTuple):
    """What the forward process made of a batch."""

    x_t: Int[Tensor, "B L"]
    """The corrupted ids."""
    is_masked: Bool[Tensor, "B L"]
    """True where this draw replaced the token, recorded when drawn: never `x_t == mask_token_id`."""
    t: Float[Tensor, "B L"]
    """The masking probability in force at each position, in (0, 1]."""


def example_seeds(seed: int, sample_ids: Int[Tensor, "B"], epoch: int) -> Int[Tensor, "B"]:
    """Derive the `noise_seed` of each sample from the run's seed, the sample's id and the epoch."""
    return keyed_hash(seed, STREAM_SEED, sample_ids, epoch)


def sample_t(
    batch_size: int,
    *,
    eps: float = 1e-3,
    noise_seed: Int[Tensor, "B"] | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, "B"]:
    """Draw the time of each row uniformly from [eps, 1].

    Args:
        eps: smallest time, in (0, 1). The weight 1/t of the loss is at most 1/eps.
        noise_seed: one int64 seed a row; the draw is then a pure function of it.
        generator: torch generator for draws without seeds; torch's global one by default.
    """
    if noise_seed is not None:
        uniform = keyed_uniform(noise_seed, STREAM_TIME)
    else:
        uniform = torch.rand(batch_size, generator=generator, device=device)
    return eps + (1 - eps) * uniform


def transition(
    x_0: Int[Tensor, "B L"],
    sigma: Float[Tensor, "..."] | float,
    maskable_mask: Bool[Tensor, "B L"],
    mask_token_id: int,
    *,
    noise_seed: Int[Tensor, "B"] | None = None,
    positions: Int[Tensor, "B L"] | None = None,
    generator: torch.Generator | None = None,
) -> Noised:
    """Replace each maskable token by the mask token with probability sigma, and nothing else.

    Args:
        x_0: clean ids.
        sigma: masking probability in [0, 1]: a number, one a row (B,) or (B, 1), or one a position (B, L).
        maskable_mask: True where a token may be masked.
        mask_token_id: id of the mask token.
        noise_seed: one int64 seed a row; position i of the row is then masked by a hash of
            (seed, `positions[i]`), whatever else is in the batch. Without it torch's generator is used.
        positions: index of each token within its example; the column by default. It makes the draw
            independent of padding.
        generator: torch generator for draws without seeds; torch's global one by default.

    Returns:
        `Noised(x_t, is_masked, t)`; `is_masked` is True exactly where a token was replaced.

    Raises:
        ValueError: `maskable_mask` has another shape than `x_0`.

    >>> x_0 = torch.tensor([[5, 6, 7]])
    >>> transition(x_0, 1.0, torch.tensor([[False, True, True]]), mask_token_id=9).x_t
    tensor([[5, 9, 9]])
    """
    if maskable_mask.shape != x_0.shape:
        raise ValueError(
            f"maskable_mask must have shape (batch, seq) = {tuple(x_0.shape)};"
            f" got {tuple(maskable_mask.shape)}."
        )
    t = torch.as_tensor(sigma, device=x_0.device)
    if not t.is_floating_point():
        t = t.to(torch.get_default_dtype())
    if t.dim() == 1:
        t = t[:, None]
    t = t.expand(x_0.shape)
    if noise_seed is not None:
        if positions is None:
            positions = torch.arange(x_0.shape[1], device=x_0.device)[None]
        uniform = keyed_uniform(noise_seed[:, None], STREAM_MASK, positions)
    else:
        uniform = torch.rand(x_0.shape, generator=generator, device=x_0.device)
    is_masked = (uniform < t) & maskable_mask
    return Noised(torch.where(is_masked, mask_token_id, x_0), is_masked, t)

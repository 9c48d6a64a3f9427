"""The denoising loop: a canvas of masks after each prompt, filled over a number of forwards.

Shapes: B batch, P prompt columns, C canvas columns, M masked rows that pass the head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.utils.generic import ModelOutput

from unmask.diffusion.attention import token_positions
from unmask.diffusion.keyed import keyed_hash
from unmask.generation.config import DiffusionGenerationConfig
from unmask.generation.policy import most_confident, share_steps, tokens_at_step
from unmask.generation.sampling import gumbel_noise, pick, suppress

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(ids (B, L), is_token (B, L) True = token, where (B, L)) -> aligned logits of the M positions where
`where` is True, in row-major order, (M, V)."""


@dataclass
class DiffusionGenerationOutput(ModelOutput):
    """What `generate` returns.

    Attributes:
        sequences: prompt and response (B, P + C); padding after the first end token of a response.
        tokens_per_forward: response tokens, the end token included, over the forwards a row took (B,).
        num_forwards: model calls each row took part in (B,).
        commit_step: step, from 0, that committed each canvas token (B, C); -1 after the end of a response.
            Only with `return_trace`.
        confidence: the model's probability of each committed token when it was committed (B, C).
            Only with `return_trace`.
    """

    sequences: Int[Tensor, "B L"] | None = None
    tokens_per_forward: Float[Tensor, "B"] | None = None
    num_forwards: Int[Tensor, "B"] | None = None
    commit_step: Int[Tensor, "B C"] | None = None
    confidence: Float[Tensor, "B C"] | None = None


def _before_end(canvas: Tensor, masked: Tensor, eos: Tensor) -> Bool[Tensor, "B C"]:
    """Positions before or at the first committed end token of each row: those still worth denoising."""
    ended = torch.isin(canvas, eos) & ~masked
    return ended.cumsum(dim=1) - ended.long() == 0


def denoise(
    denoiser: Denoiser,
    input_ids: Int[Tensor, "B P"],
    is_token: Bool[Tensor, "B P"],
    config: DiffusionGenerationConfig,
    streamer: Any | None = None,
    block_length: int | None = None,
) -> DiffusionGenerationOutput:
    """Fill a canvas of `config.max_new_tokens` masks after each prompt.

    Every step runs the model once on the rows that are not finished, passes the masked positions alone
    through the head, and commits the most confident of them. What is committed stays. Once an end token
    is committed, the positions after it are left out; a row is finished when nothing before its end token
    is masked, and then leaves the batch. A row's answer does not depend on the rest of the batch: its
    noise is keyed by (seed, position, step).

    With blocks the same happens to one block after another, and the model is shown the canvas up to the
    end of the current one.

    Args:
        denoiser: the model, see `Denoiser`.
        input_ids: prompts, padded on any side.
        is_token: True = token, False = padding.
        config: settings, `mask_token_id` filled in.
        streamer: receives the prompt by `put`, each draft by `put_draft` where it has one, and the
            response by `put`, as transformers' diffusion streamers expect; a batch of one.
        block_length: fill the canvas block by block of so many tokens, as a block-causal model was trained;
            all at once by default. The steps are shared out over the blocks in proportion to their tokens.

    Raises:
        UnmaskError: fewer steps than blocks.
    """
    assert config.mask_token_id is not None
    device = input_ids.device
    batch, length = input_ids.shape
    canvas_length = config.max_new_tokens
    steps = config.steps or canvas_length
    block_length = min(block_length or canvas_length, canvas_length)
    steps_of_block = share_steps(steps, canvas_length, block_length)
    block_of = torch.arange(canvas_length, device=device) // block_length
    schedule = [(block, step, count) for block, count in enumerate(steps_of_block) for step in range(count)]
    eos = torch.tensor(config.eos_token_ids, dtype=torch.long, device=device)
    pad = config.pad_token_id if config.pad_token_id is not None else (config.eos_token_ids or [0])[0]
    forbidden = {config.mask_token_id, *(config.suppress_tokens or [])} - set(config.eos_token_ids)
    forbidden_ids = torch.tensor(sorted(forbidden), device=device)

    ids = torch.cat([input_ids, input_ids.new_full((batch, canvas_length), config.mask_token_id)], dim=1)
    is_token = torch.cat([is_token, is_token.new_ones(batch, canvas_length)], dim=1)
    positions = token_positions(is_token)
    masked = torch.ones(batch, canvas_length, dtype=torch.bool, device=device)
    commit_step = torch.full((batch, canvas_length), -1, dtype=torch.long, device=device)
    confidence = torch.zeros(batch, canvas_length, device=device)
    num_forwards = torch.zeros(batch, dtype=torch.long, device=device)
    seed = keyed_hash(torch.tensor(config.seed, device=device)).expand(batch)
    if streamer is not None:
        streamer.put(input_ids.cpu())

    for step, (block, step_in_block, steps_in_block) in enumerate(schedule):
        canvas = ids[:, length:]
        live = masked & _before_end(canvas, masked, eos) & (block_of == block)
        rows = live.any(dim=1).nonzero()[:, 0]
        if len(rows) == 0:  # every row has ended: in one that has not, each step leaves some to the next
            break
        in_block = min(block_length, canvas_length - block * block_length)
        stop = length + block * block_length + in_block  # no block sees a later one
        where = torch.zeros_like(ids[rows, :stop], dtype=torch.bool)
        where[:, length:] = live[rows, : stop - length]
        logits = suppress(denoiser(ids[rows, :stop], is_token[rows, :stop], where), forbidden_ids)
        noise = None
        if config.temperature > 0:
            row_seed = seed[rows][:, None].expand(where.shape)[where]
            noise = gumbel_noise(row_seed, positions[rows, :stop][where], step, logits.shape[-1])
        token, sure = pick(logits, config.temperature, noise)

        proposal, score = canvas[rows].clone(), confidence[rows].clone()
        proposal[live[rows]] = token
        score[live[rows]] = sure.to(score.dtype)
        count = tokens_at_step(step_in_block, steps_in_block, in_block)
        chosen = most_confident(score, live[rows], count)
        ids[rows, length:] = torch.where(chosen, proposal, canvas[rows])
        confidence[rows] = torch.where(chosen, score, confidence[rows])
        commit_step[rows] = torch.where(chosen, step, commit_step[rows])
        masked[rows] = masked[rows] & ~chosen
        num_forwards[rows] += 1
        if streamer is not None and hasattr(streamer, "put_draft"):
            streamer.put_draft(ids[:, length:].cpu())

    canvas = ids[:, length:]
    kept = _before_end(canvas, masked, eos) & ~masked
    ids[:, length:] = torch.where(kept, canvas, pad)
    if streamer is not None:
        streamer.put(ids[:, length:][kept].cpu())
        streamer.end()
    return DiffusionGenerationOutput(
        sequences=ids,
        tokens_per_forward=kept.sum(dim=1) / num_forwards.clamp(min=1),
        num_forwards=num_forwards,
        commit_step=torch.where(kept, commit_step, -1) if config.return_trace else None,
        confidence=torch.where(kept, confidence, 0.0) if config.return_trace else None,
    )

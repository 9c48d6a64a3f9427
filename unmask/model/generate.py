"""`model.generate`, `model.infill` and `model.make_engine`: the generation engine on a stock backbone."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils.generic import ModelOutput

from unmask.errors import UnmaskError
from unmask.generation.config import DiffusionGenerationConfig
from unmask.generation.rows import Answer
from unmask.generation.sampling import as_functions
from unmask.model.engine import GenerationEngine, checked_settings, make_row, refuse_blocks, write_no_ends


@dataclass
class DiffusionGenerationOutput(ModelOutput):
    """What `generate` returns; a forward pass that only fills a cache is not counted."""

    sequences: Int[Tensor, "B L"] | None = None
    """Prompt and response (B, P + C); padding after the first end token of a response."""
    tokens_per_forward: Float[Tensor, "B"] | None = None
    """Response tokens, the end token included, per denoising step of the row."""
    num_forwards: Int[Tensor, "B"] | None = None
    """Denoising steps of each row."""
    commit_step: Int[Tensor, "B C"] | None = None
    """With `return_trace`, as the next three: the step, from 0, that committed each canvas token; -1 after the
    end of a response."""
    confidence: Float[Tensor, "B C"] | None = None
    """The model's probability of each token at that step."""
    entropy: Float[Tensor, "B C"] | None = None
    """The entropy of the model's distribution at that step, in nats."""
    states: Int[Tensor, "B F C"] | None = None
    """The canvas after each of F steps; rows with fewer steps repeat their last."""


class _Batch(NamedTuple):
    """Padded rows on the CPU, masks in their canvases."""

    ids: Int[Tensor, "B L"]
    is_token: Bool[Tensor, "B L"]
    canvas: Bool[Tensor, "B L"]
    maskable: Bool[Tensor, "B L"]


class GenerateMixin:
    """`generate` and `infill` for a masked-diffusion model."""

    # Provided by the stock class and the mixin.
    config: Any
    generation_config: Any
    prepare: Any

    @torch.no_grad()
    def generate(
        self,
        input_ids: Int[Tensor, "B P"] | None = None,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: Any | None = None,
        logits_processor: Any | None = None,
        stopping_criteria: Any | None = None,
        src_mask: Tensor | None = None,
        *,
        inputs: Int[Tensor, "B P"] | None = None,
        **settings: Any,
    ) -> DiffusionGenerationOutput | Int[Tensor, "B L"]:
        """Fill a canvas of masks after each prompt.

        Args:
            input_ids: prompts (B, P), padded on any side; by default, and with P = 0, none. A mask token in a
                prompt is text like any other. `inputs` is another name.
            attention_mask: (B, P), 1 = token, 0 = padding; all tokens by default.
            generation_config: settings; those of the checkpoint by default, which a stock `GenerationConfig`
                changes where it says something.
            streamer: receives the prompt by `put`, each draft by `put_draft` if it has that method, and the
                response by `put`, like transformers' diffusion streamers; for a batch of one.
            logits_processor: one or a list of transformers' logits processors or functions of (ids of the
                row, logits) of each position; tokens are drawn from what they return.
            stopping_criteria: one or a list of transformers' stopping criteria or functions of (ids, scores),
                scores None; a response ends where one of them is met.
            src_mask: (B, P), False = a part of the prompt that training would mask, such as an earlier
                response; True by default. It matters to block-causal models alone, whose blocks start anew
                wherever it changes.
            **settings: fields of `DiffusionGenerationConfig` that override the config's.

        Returns:
            `DiffusionGenerationOutput`, or its `sequences` with `return_dict_in_generate=False`.

        Raises:
            UnmaskError: an unknown setting or one out of range, prompt and canvas longer than the model's
                positions, fewer steps than blocks, or a setting that has no effect on this model.
            ValueError: input_ids or a mask that `forward` refuses too.

        Examples:
            >>> model.generate(prompt_ids, max_new_tokens=32, steps=16).sequences  # doctest: +SKIP
        """
        config, block_length = checked_settings(self, generation_config, settings)
        if (input_ids := inputs if input_ids is None else input_ids) is None:
            input_ids = torch.zeros(1, 0, dtype=torch.long, device=cast(Any, self).device)
        if not len(input_ids):
            raise UnmaskError("input_ids has no row; for an answer from nothing give one row of no tokens.")
        mode = "pretrain" if src_mask is None else "sft"
        prompts = self.prepare(input_ids, None, attention_mask, src_mask, mode)
        is_token = prompts.layout.is_token.cpu()
        maskable = torch.zeros_like(is_token) if src_mask is None else prompts.maskable.cpu()
        batch = _Batch(
            ids=F.pad(input_ids.cpu(), (0, config.max_new_tokens), value=cast(int, config.mask_token_id)),
            is_token=F.pad(is_token, (0, config.max_new_tokens), value=True),
            canvas=F.pad(torch.zeros_like(is_token), (0, config.max_new_tokens), value=True),
            maskable=F.pad(maskable, (0, config.max_new_tokens), value=True),
        )
        if streamer is not None:
            streamer.put(input_ids.cpu())
        output = self._run(batch, config, block_length, logits_processor, stopping_criteria, streamer)
        length, pad = input_ids.shape[1], config.pad_token_id
        pad = (config.eos_token_ids or [0])[0] if pad is None else pad
        assert output.sequences is not None and output.commit_step is not None
        output.sequences[:, length:][output.commit_step[:, length:] < 0] = pad
        if streamer is not None:
            streamer.put(output.sequences[:, length:][output.commit_step[:, length:] >= 0].cpu())
            streamer.end()
        for name in ("commit_step", "confidence", "entropy", "states"):
            output[name] = output[name][..., length:]
        output = output if config.return_trace else _without_trace(output)
        return output if config.return_dict_in_generate else cast(Tensor, output.sequences)

    @torch.no_grad()
    def infill(
        self,
        input_ids: Int[Tensor, "B L"],
        is_gap: Bool[Tensor, "B L"],
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Any | None = None,
        **settings: Any,
    ) -> DiffusionGenerationOutput:
        """Fill gaps of a text, given everything around them.

        Args:
            input_ids: text (B, L); ids inside a gap are ignored.
            is_gap: (B, L), True = a position to fill. No end token is written.
            attention_mask: as in `generate`.
            generation_config: as in `generate`.
            logits_processor: as in `generate`.
            **settings: as in `generate`; `max_new_tokens` has no effect.

        Returns:
            `DiffusionGenerationOutput` with `sequences`, and the trace for all L positions.

        Raises:
            UnmaskError: as `generate`; and a block-causal model, which does not see the text after a gap.
            ValueError: a gap at padding, or masks of another shape.
        """
        config, block_length = checked_settings(self, generation_config, settings)
        refuse_blocks(block_length)
        is_token = self.prepare(input_ids, None, attention_mask).layout.is_token
        if is_gap.shape != input_ids.shape or (is_gap & ~is_token).any():
            raise ValueError("is_gap must have the shape of input_ids, and be False at padding.")
        write_no_ends(config)
        gaps, is_token = is_gap.cpu(), is_token.cpu()
        ids = torch.where(gaps, cast(int, config.mask_token_id), input_ids.cpu())
        output = self._run(_Batch(ids, is_token, gaps, gaps), config, None, logits_processor)
        return output if config.return_trace else _without_trace(output)

    def make_engine(
        self, *, max_rows: int = 64, longest: int | None = None, cache_tokens: int | None = None
    ) -> GenerationEngine:
        """Make an engine that rows can be added to at any time; see `GenerationEngine`.

        Args:
            max_rows: rows that run at once.
            longest: tokens of the longest row, prompt and answer; the model's positions by default.
            cache_tokens: tokens whose keys and values can be kept at one time; by default four times as many
                as such rows have, but no more than fit an eighth of a CPU's memory, or half of what is free
                on a GPU.
        """
        if cache_tokens is None:
            config, most = self.config, 4 * max_rows * (longest or self.config.max_position_embeddings)
            heads = config.num_key_value_heads * getattr(config, "head_dim", 0)
            heads = heads or config.hidden_size * config.num_key_value_heads // config.num_attention_heads
            size = 2 * config.num_hidden_layers * heads * cast(Any, self).dtype.itemsize
            if cast(Any, self).device.type == "cuda":
                memory = torch.cuda.mem_get_info()[0] // 2
            else:
                memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8
            cache_tokens = int(min(most, memory // size))
        return GenerationEngine(self, max_rows, cache_tokens)

    def _run(
        self,
        batch: _Batch,
        config: DiffusionGenerationConfig,
        block_length: int | None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        streamer: Any = None,
    ) -> DiffusionGenerationOutput:
        """Fill the canvases of a batch; positions of no answer have commit step -1."""
        functions = {
            "logits_processors": as_functions("logits_processor", logits_processor),
            "stopping_criteria": as_functions("stopping_criteria", stopping_criteria),
        }
        count = len(batch.ids)
        seeds = config.seed if isinstance(config.seed, list) else [config.seed] * count
        if len(seeds) == 1:
            seeds = seeds * count
        if len(seeds) != count:
            raise UnmaskError(
                f"seed must be one number, or one for each of the {count} rows; got {len(seeds)}."
            )
        rows = []
        for parts, seed in zip(zip(*batch, strict=True), seeds, strict=True):
            ids, canvas, maskable = (part[parts[1]] for part in (parts[0], *parts[2:]))
            own = copy.copy(config)
            own.seed = seed
            rows.append(make_row(self, ids, canvas, maskable, own, block_length)._replace(**functions))
        # Places for two copies of each row, the second for guidance; none are taken if nothing is cached.
        engine = GenerationEngine(self, max(1, count), 2 * sum(len(row.ids) for row in rows))
        by_slot = {engine.add_row(row): index for index, row in enumerate(rows)}
        columns = [canvas.nonzero()[:, 0] for canvas in batch.canvas]
        drafts = batch.ids.clone()
        states: list[list[Tensor]] = [[] for _ in rows]
        answers: dict[int, Answer] = {}
        for event in (event for events in engine.steps() for event in events):
            index = by_slot[event.slot]
            if event.error is not None:
                if count > 1 and isinstance(event.error, UnmaskError):
                    raise UnmaskError(f"row {index}: {event.error}") from event.error
                event.error.add_note(f"in row {index} of the batch, from 0")
                raise event.error
            drafts[index, columns[index][event.positions]] = torch.tensor(event.tokens, dtype=torch.long)
            drafts[index, columns[index][event.remasked]] = cast(int, config.mask_token_id)
            if event.answer is not None:
                answers[index] = event.answer
            if config.return_trace:
                states[index].append(drafts[index].clone())
            if streamer is not None and hasattr(streamer, "put_draft"):
                streamer.put_draft(drafts[:, columns[0]])
        return _output(
            batch, columns, [answers[index] for index in range(count)], states, cast(Any, self).device
        )


def _output(
    batch: _Batch,
    columns: list[Tensor],
    answers: list[Answer],
    states: list[list[Tensor]],
    device: torch.device,
) -> DiffusionGenerationOutput:
    """Lay the answers out as a batch, with a trace of all its columns."""
    sequences, shape = batch.ids.clone(), batch.ids.shape
    commit_step, (confidence, entropy) = torch.full(shape, -1), (torch.zeros(shape) for _ in range(2))
    for row, answer in enumerate(answers):
        at = row, columns[row][: len(answer.ids)]
        sequences[at] = torch.tensor(answer.ids, dtype=torch.long)
        commit_step[at] = torch.tensor(answer.commit_step, dtype=torch.long)
        if answer.confidence:
            confidence[at], entropy[at] = torch.tensor(answer.confidence), torch.tensor(answer.entropy)
    most = max([1, *(len(of_row) for of_row in states)])
    for row, of_row in enumerate(states):
        of_row += (of_row[-1:] or [batch.ids[row]]) * (most - len(of_row))
    num_forwards = torch.tensor([answer.num_forwards for answer in answers], dtype=torch.long)
    count = torch.tensor([len(answer.ids) for answer in answers])
    return DiffusionGenerationOutput(
        sequences=sequences.to(device),
        tokens_per_forward=(count / num_forwards.clamp(min=1)).to(device),
        num_forwards=num_forwards.to(device),
        commit_step=commit_step.to(device),
        confidence=confidence.to(device),
        entropy=entropy.to(device),
        states=torch.stack([torch.stack(of_row) for of_row in states]).to(device),
    )


def _without_trace(output: DiffusionGenerationOutput) -> DiffusionGenerationOutput:
    names = ("sequences", "tokens_per_forward", "num_forwards")
    return DiffusionGenerationOutput(**{name: output[name] for name in names})

"""`model.generate` and `model.infill`: the generation engine on a stock backbone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import GenerationConfig

from unmask.diffusion.attention import attend_block_causal, block_index, predicting_column, row_layout
from unmask.errors import UnmaskError, UnmaskWarning
from unmask.generation.config import DiffusionGenerationConfig
from unmask.generation.engine import DenoiserInput, DiffusionGenerationOutput, Engine, generate_canvas
from unmask.model.attention import CachedRows, KVCache, run_backbone
from unmask.model.config import block_length_of, mask_token_of
from unmask.model.head import chunk_rows


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
            streamer: see `unmask.generation.engine.generate_canvas`.
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

        >>> model.generate(prompt_ids, max_new_tokens=32, steps=16).sequences  # doctest: +SKIP
        """
        config, block_length = self._settings(generation_config, settings)
        if (input_ids := inputs if input_ids is None else input_ids) is None:
            input_ids = torch.zeros(1, 0, dtype=torch.long, device=cast(Any, self).device)
        mode = "pretrain" if src_mask is None else "sft"
        prompts = self.prepare(input_ids, None, attention_mask, src_mask, mode)
        is_token, new = prompts.layout.is_token, config.max_new_tokens
        self._check_length(is_token, new)
        block = None
        if block_length is not None:
            canvas, anchor = is_token.new_ones(len(input_ids), new), self.config.block_anchor
            maskable = prompts.maskable if src_mask is not None else torch.zeros_like(is_token)
            layout = row_layout(torch.cat([is_token, canvas], dim=1))
            block = block_index(layout, torch.cat([maskable, canvas], dim=1), block_length, anchor)
        output = generate_canvas(
            BackboneDenoiser(self, config, len(input_ids), input_ids.shape[1] + new),
            input_ids,
            is_token,
            config,
            block=block,
            cached=block_length is not None and config.use_cache,
            streamer=streamer,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
        )
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
            attention_mask, generation_config, logits_processor, **settings: as in `generate`;
                `max_new_tokens` has no effect.

        Returns:
            `DiffusionGenerationOutput` with `sequences`, and the trace for all L positions.

        Raises:
            UnmaskError: as `generate`; and a block-causal model, which does not see the text after a gap.
            ValueError: a gap at padding, or masks of another shape.
        """
        config, block_length = self._settings(generation_config, settings)
        if block_length is not None:
            raise UnmaskError(
                "a block-causal model does not see the text after a gap: infill needs a bidirectional one."
            )
        is_token = self.prepare(input_ids, None, attention_mask).layout.is_token
        if is_gap.shape != input_ids.shape or (is_gap & ~is_token).any():
            raise ValueError("is_gap must have the shape of input_ids, and be False at padding.")
        self._check_length(is_token, 0)
        config.suppress_tokens = sorted({*(config.suppress_tokens or []), *config.eos_token_ids})
        config.eos_token_id = []
        ids = torch.where(is_gap, cast(int, config.mask_token_id), input_ids)
        denoiser = BackboneDenoiser(self, config, *ids.shape)
        engine = Engine(denoiser, ids, is_token, is_gap, config, logits_processor=logits_processor)
        for _ in engine.steps():
            pass
        return engine.output(engine.ids, is_gap, slice(None))

    def _check_length(self, is_token: Bool[Tensor, "B L"], new: int) -> None:
        longest = max(is_token.sum(dim=1).tolist(), default=0)
        most = self.config.max_position_embeddings
        if longest + new > most:
            raise UnmaskError(
                f"a prompt of {longest} tokens and max_new_tokens = {new} need more than the model's {most}"
                " positions; shorten one of them."
            )

    def _settings(
        self, generation_config: GenerationConfig | None, settings: dict[str, Any]
    ) -> tuple[DiffusionGenerationConfig, int | None]:
        """The settings of a call, and the block length of a block-causal model."""
        own = DiffusionGenerationConfig.from_generic(self.generation_config)
        config = own.updated(generation_config, **settings)
        config.mask_token_id = mask_token_of(self.config)
        if config.eos_token_id is None:
            config.eos_token_id = self.config.eos_token_id
        length = block_length_of(self.config)
        if length is None:
            if config.canvas == "growing" and config.block_length is None:
                raise UnmaskError("canvas = growing has no effect without block_length; set it.")
            return config, None
        for name, default in (("canvas", "fixed"), ("approximate_cache", None)):
            if getattr(config, name) != default:
                raise UnmaskError(f"{name} has no effect on a block-causal model; remove it.")
        if config.block_length not in (None, length):
            warnings.warn(
                f"the model was trained on blocks of {length} tokens; generating in blocks of"
                f" {config.block_length}.",
                UnmaskWarning,
                stacklevel=3,
            )
        return config, config.block_length or length


class BackboneDenoiser:
    """Runs a stock backbone and head on the engine's inputs, computing only what is needed.

    Args:
        rows, columns: size of the cache, which takes memory once it is used.
    """

    def __init__(self, model: Any, config: DiffusionGenerationConfig, rows: int, columns: int):
        self.model = model
        self.cache = KVCache(rows * (2 if config.guidance_scale else 1), columns)

    def __call__(self, inputs: DenoiserInput) -> Iterator[Tensor]:
        """Compute the logits of the positions that need them, in chunks."""
        layout, needed = row_layout(inputs.is_token), inputs.needs_logits
        predicting = torch.arange(needed.shape[1], device=needed.device).expand(needed.shape)
        if self.model.config.logit_shift:
            predicting = predicting_column(layout)
        attend, cached = None, None
        if inputs.is_computed is not None:
            is_predicting = torch.zeros_like(predicting).scatter_add(1, predicting, needed.long()) > 0
            cached = CachedRows(self.cache, inputs.slots, inputs.is_computed | is_predicting, inputs.block)
        elif inputs.block is not None:
            attend = attend_block_causal(layout, inputs.block)
        ragged = not bool(inputs.is_token.all())
        hidden = run_backbone(self.model.model, inputs.ids, layout, attend, ragged=ragged, cached=cached)
        row, column = needed.nonzero(as_tuple=True)
        if not len(row):
            return iter(())
        hidden = hidden[row, predicting[row, column]]
        head = self.model.lm_head
        size = chunk_rows(len(hidden), self.model.config.vocab_size, hidden.dtype, hidden.device).rows
        return (head(part) for part in hidden.split(size))

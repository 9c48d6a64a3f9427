"""The generation engine on a model: rows of prompts, and the stock backbone with its cache of keys and values."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import GenerationConfig

from unmask.diffusion.attention import attend_block_causal, block_index, predicting_column, row_layout
from unmask.errors import UnmaskError, UnmaskWarning
from unmask.generation.config import DiffusionGenerationConfig
from unmask.generation.engine import Engine
from unmask.generation.pool import KeyPool
from unmask.generation.rows import Row
from unmask.generation.sampling import Logits, as_functions
from unmask.generation.table import DenoiserInput
from unmask.model.attention import CachedRows, KVCache, run_backbone
from unmask.model.config import block_length_of, mask_token_of
from unmask.model.head import head_logits


def checked_settings(
    model: Any, generation_config: GenerationConfig | None, settings: dict[str, Any]
) -> tuple[DiffusionGenerationConfig, int | None]:
    """The settings of a call, and the block length of a block-causal model."""
    own = DiffusionGenerationConfig.from_generic(model.generation_config)
    config = own.updated(generation_config, **settings)
    config.mask_token_id = mask_token_of(model.config)
    if config.eos_token_id is None:
        config.eos_token_id = model.config.eos_token_id
    length = block_length_of(model.config)
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


def make_row(
    model: Any,
    ids: Int[Tensor, "L"],
    canvas: Bool[Tensor, "L"],
    maskable: Bool[Tensor, "L"],
    config: DiffusionGenerationConfig,
    block_length: int | None,
) -> Row:
    """Check that a row without padding fits, and count its blocks."""
    most = model.config.max_position_embeddings
    if len(ids) > most:
        new = int(canvas.sum())
        raise UnmaskError(
            f"a prompt of {len(ids) - new} tokens and max_new_tokens = {new} need more than the model's"
            f" {most} positions; shorten one of them."
        )
    block = None
    if block_length is not None:
        layout = row_layout(torch.ones_like(canvas)[None])
        block = block_index(layout, maskable[None], block_length, model.config.block_anchor)[0]
    return Row(ids, canvas, config, block)


def refuse_blocks(block_length: int | None) -> None:
    """Refuse to infill with a block-causal model."""
    if block_length is not None:
        raise UnmaskError(
            "a block-causal model does not see the text after a gap: infill needs a bidirectional one."
        )


def write_no_ends(config: DiffusionGenerationConfig) -> None:
    """Let end tokens be suppressed, and end nothing."""
    config.suppress_tokens = sorted({*(config.suppress_tokens or []), *config.eos_token_ids})
    config.eos_token_id = []


def _bias(by_id: Mapping[int, float], vocab_size: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A logits processor that adds numbers to the logits of some ids."""
    for token in by_id:
        if not 0 <= token < vocab_size:
            raise UnmaskError(f"logit_bias: id {token} is not in the vocabulary of {vocab_size}.")
    ids, values = torch.tensor(list(by_id)), torch.tensor(list(by_id.values()))
    return lambda _, logits: logits.index_add(
        1, ids.to(logits.device), values.to(logits).expand(len(logits), -1)
    )


class GenerationEngine(Engine):
    """The engine on a model: rows with prompts and settings of their own, added and dropped at any time.

    Examples:
        >>> engine = model.make_engine(max_rows=16)
        >>> slot = engine.add(prompt_ids, max_new_tokens=32, threshold=0.9)
        >>> for events in engine.steps():
        ...     for event in events:
        ...         print(event.slot, event.positions, event.tokens)
    """

    def __init__(self, model: Any, max_rows: int, cache_tokens: int):
        denoiser = BackboneDenoiser(model, cache_tokens)
        pool = KeyPool(cache_tokens) if cache_tokens else None
        super().__init__(denoiser, mask_token_of(model.config), max_rows=max_rows, pool=pool)
        self.model = model

    def add(
        self,
        input_ids: Sequence[int],
        src_mask: Sequence[bool] | None = None,
        *,
        is_gap: Sequence[bool] | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Any = None,
        logit_bias: Mapping[int, float] | None = None,
        stopping_criteria: Any = None,
        **settings: Any,
    ) -> int:
        """Add a prompt whose answer is to be generated, or with `is_gap` a text whose gaps are to be filled.

        Args:
            input_ids: token ids, without padding.
            src_mask: False = a part of the prompt that training would mask; see `model.generate`.
            is_gap: True = a position to fill; needs a bidirectional model.
            logit_bias: numbers added to the logits of some ids, by id.
            generation_config: as in `model.generate`.
            logits_processor: as in `model.generate`.
            stopping_criteria: as in `model.generate`.
            **settings: as in `model.generate`.

        Returns:
            The slot that the row's events carry.

        Raises:
            UnmaskError, ValueError: as `model.generate`; nothing else that runs is touched.
        """
        model = self.model
        config, block_length = checked_settings(model, generation_config, settings)
        ids = torch.as_tensor(input_ids, dtype=torch.long)
        source = None if src_mask is None else torch.as_tensor(src_mask, dtype=torch.bool)[None]
        prepared = model.prepare(ids[None], None, None, source, "pretrain" if source is None else "sft")
        maskable = torch.zeros_like(ids, dtype=torch.bool) if source is None else prepared.maskable[0]
        mask_token_id = cast(int, config.mask_token_id)
        if is_gap is None:
            new = config.max_new_tokens
            ids = F.pad(ids, (0, new), value=mask_token_id)
            canvas = F.pad(torch.zeros_like(maskable), (0, new), value=True)
            maskable = F.pad(maskable, (0, new), value=True)
        else:
            refuse_blocks(block_length)
            if len(is_gap) != len(ids):
                raise ValueError("is_gap must have the length of input_ids.")
            canvas = maskable = torch.as_tensor(is_gap, dtype=torch.bool)
            ids = torch.where(canvas, mask_token_id, ids)
            write_no_ends(config)
        row = make_row(model, ids, canvas, maskable, config, block_length)
        processors = as_functions("logits_processor", logits_processor)
        if logit_bias:
            processors.append(_bias(logit_bias, model.config.vocab_size))
        criteria = as_functions("stopping_criteria", stopping_criteria)
        return self.add_row(row._replace(logits_processors=processors, stopping_criteria=criteria))


class BackboneDenoiser:
    """Runs a stock backbone and head on the engine's inputs, computing only what is needed.

    Args:
        cache_tokens: places of the cache of keys and values, which takes memory once it is used.
    """

    def __init__(self, model: Any, cache_tokens: int):
        self.model, self.cache = model, KVCache(cache_tokens)

    def __call__(self, inputs: DenoiserInput) -> Logits:
        """Compute the hidden states of the positions whose logits are needed; `Logits` does the rest."""
        layout, needed = row_layout(inputs.is_token), inputs.needs_logits
        row, column = needed.nonzero(as_tuple=True)
        if self.model.config.logit_shift:
            column = predicting_column(layout)[row, column]
        attend, cached = None, None
        if (inputs.region >= 0).any():
            # The token before a block, which predicts its first one, is computed again but not kept again.
            computed = inputs.is_computed.clone()
            computed[row, column] = True
            written = inputs.is_computed & (inputs.region >= 0)[:, None]
            cached = CachedRows(self.cache, inputs.region, computed, written, inputs.block)
        elif inputs.block is not None:
            attend = attend_block_causal(layout, inputs.block)
        hidden = run_backbone(
            self.model.model,
            inputs.ids,
            layout,
            attend,
            ragged=not bool(inputs.is_token.all()),
            cached=cached,
            wanted=row * needed.shape[1] + column,
            device=self.model.device,
        )
        return head_logits(self.model.lm_head, hidden, self.model.config.vocab_size)

    def copy_keys(self, source: int, target: int, count: int) -> None:
        """Copy what the cache holds in `count` places from `source` on."""
        self.cache.copy(source, target, count)

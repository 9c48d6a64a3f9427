"""The families: the mixin on each stock class."""

from __future__ import annotations

from typing import Any

import transformers

from unmask.model.config import (
    LlamaDiffusionConfig,
    Qwen2DiffusionConfig,
    Qwen3DiffusionConfig,
)
from unmask.model.denoiser import MaskedDiffusionMixin


class Qwen3ForCausalLM(MaskedDiffusionMixin, transformers.Qwen3ForCausalLM):
    """Qwen3 as a masked-diffusion language model; `forward` and `generate` are the mixin's.

    >>> model = Qwen3ForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")  # doctest: +SKIP
    >>> logits, loss = model(input_ids, src_mask=src_mask, training_mode="sft")  # doctest: +SKIP
    """

    config_class = Qwen3DiffusionConfig


class Qwen2ForCausalLM(MaskedDiffusionMixin, transformers.Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5 as a masked-diffusion language model."""

    config_class = Qwen2DiffusionConfig


class LlamaForCausalLM(MaskedDiffusionMixin, transformers.LlamaForCausalLM):
    """Llama, and what shares its architecture, as a masked-diffusion language model."""

    config_class = LlamaDiffusionConfig


MODEL_CLASSES: dict[str, Any] = {
    Qwen3DiffusionConfig.model_type: Qwen3ForCausalLM,
    Qwen2DiffusionConfig.model_type: Qwen2ForCausalLM,
    LlamaDiffusionConfig.model_type: LlamaForCausalLM,
}
for _model_type, _model in MODEL_CLASSES.items():
    transformers.AutoConfig.register(_model_type, _model.config_class, exist_ok=True)
    transformers.AutoModelForCausalLM.register(_model.config_class, _model, exist_ok=True)

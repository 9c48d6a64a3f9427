"""Configs of diffusion checkpoints: the stock config, its own `model_type`, and five fields.

A checkpoint saved here says `"model_type": "unmask_qwen3"`, so stock `AutoModelForCausalLM` refuses it
instead of reading it as an autoregressive model and producing noise; once `unmask.model` is imported
the Auto classes know it. A plain Qwen3, Qwen2 or Llama config still loads, and is converted on the way.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast, get_args

from transformers import (
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from unmask.diffusion.attention import BlockAnchor
from unmask.diffusion.corrupt import NO_MASK_TOKEN
from unmask.errors import UnmaskError
from unmask.formats import PREFIX

# Every released Qwen3 has this vocabulary, whose first id without a token becomes the mask token. No other
# family is as uniform, so there the id comes from the tokenizer (`unmask convert`).
_QWEN3_VOCAB_SIZE, _QWEN3_MASK_TOKEN_ID = 151936, 151669

FIELDS = ("mask_token_id", "logit_shift", "noise_eps", "attention", "block_length", "block_anchor")
_OF_THE_BASE = ("architectures", "auto_map")  # they name the base's classes and code


@dataclass(kw_only=True)
class DiffusionFields:
    """What the config of a diffusion model has besides the fields of the stock one.

    Args:
        mask_token_id: id of the mask token; None until one is known, and then nothing can be masked.
        logit_shift: True for a model adapted from an autoregressive one: the backbone's output at i - 1
            predicts token i. The shift happens inside the model.
        noise_eps: smallest masking rate t drawn in training, in (0, 1).
        attention: "bidirectional", every token attends to every other, or "block_causal", to its own block
            and to earlier ones (see `unmask.diffusion.attention.block_index`): what the model was trained
            with, which training, likelihood and generation all follow.
        block_length: tokens of a block; with "block_causal" alone.
        block_anchor: where blocks begin to be counted, see `unmask.diffusion.attention.block_index`: "response",
            "document" or "prompt_end".
        is_causal: False: attention is never causal token by token.
    """

    model_type = ""
    mask_token_id: int | None = None
    logit_shift: bool = False
    noise_eps: float = 1e-3
    attention: str = "bidirectional"
    block_length: int | None = None
    block_anchor: BlockAnchor = "response"
    is_causal: bool = False

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a config as transformers does, an autoregressive one as that of a diffusion model."""
        values, kwargs = cast(Any, super()).get_config_dict(*args, **kwargs)
        found = values.get("model_type")
        if found == cls.model_type:
            return values, kwargs
        name = args[0] if args else kwargs.get("pretrained_model_name_or_path", "the checkpoint")
        if found != cls.model_type.removeprefix(PREFIX):
            raise UnmaskError(
                f"{name} is a {found!r} checkpoint, not {cls.model_type!r}; load it with"
                " unmask.load_model, which picks the class."
            )
        return diffusion_values(values), kwargs


class Qwen3DiffusionConfig(DiffusionFields, Qwen3Config):
    """Config of Qwen3 as a diffusion model: the stock one and `DiffusionFields`."""

    model_type = "unmask_qwen3"


class Qwen2DiffusionConfig(DiffusionFields, Qwen2Config):
    """Config of Qwen2 and Qwen2.5 as a diffusion model: the stock one and `DiffusionFields`."""

    model_type = "unmask_qwen2"


class Qwen3MoeDiffusionConfig(DiffusionFields, Qwen3MoeConfig):
    """Config of Qwen3-MoE as a diffusion model: the stock one and `DiffusionFields`."""

    model_type = "unmask_qwen3_moe"


class LlamaDiffusionConfig(DiffusionFields, LlamaConfig):
    """Config of Llama and its like as a diffusion model: the stock one and `DiffusionFields`."""

    model_type = "unmask_llama"


class MistralDiffusionConfig(DiffusionFields, MistralConfig):
    """Config of Mistral as a diffusion model: the stock one and `DiffusionFields`."""

    model_type = "unmask_mistral"


class GemmaDiffusionConfig(DiffusionFields, GemmaConfig):
    """Config of Gemma as a diffusion model: the stock one and `DiffusionFields`."""

    model_type = "unmask_gemma"


def diffusion_values(values: dict[str, Any]) -> dict[str, Any]:
    """Turn the fields of an autoregressive config into those of the diffusion model made from it."""
    model_type = values["model_type"]
    values = {name: value for name, value in values.items() if name not in _OF_THE_BASE}
    if model_type == "qwen3" and values.get("vocab_size") == _QWEN3_VOCAB_SIZE:
        values.setdefault("mask_token_id", _QWEN3_MASK_TOKEN_ID)
    return {**values, "model_type": PREFIX + model_type, "is_causal": False, "logit_shift": True}


def diffusion_config(config: Any, config_class: Any, base: Any = None) -> Any:
    """Return `config` as a `config_class`; a stock config of the same family is copied and completed.

    Everything that the stock config says stays, diffusion fields set on it included. What it does not say is
    that of `base`, the config of the checkpoint whose weights are loaded; by default bidirectional attention
    and no logit shift. The mask token is that of the Qwen3 vocabulary.

    Raises:
        UnmaskError: a config of another family.
    """
    if isinstance(config, config_class):
        return config
    stock = next(c for c in config_class.__mro__ if not issubclass(c, DiffusionFields))
    if not isinstance(config, stock):
        raise UnmaskError(
            f"config must be a {stock.__name__} or a {config_class.__name__}; got a {type(config).__name__}:"
            " use the model class of its family."
        )
    made = config_class() if base is None else base
    said = {name: value for name, value in vars(config).items() if name not in _OF_THE_BASE}
    vars(made).update(copy.deepcopy(said), is_causal=False)
    if made.mask_token_id is None and stock is Qwen3Config and config.vocab_size == _QWEN3_VOCAB_SIZE:
        made.mask_token_id = _QWEN3_MASK_TOKEN_ID
    return made


def mask_token_of(config: Any) -> int:
    """Read the id of the mask token from a config.

    Raises:
        UnmaskError: it has none, or one outside the vocabulary.
    """
    if config.mask_token_id is None:
        raise UnmaskError(NO_MASK_TOKEN)
    if not 0 <= config.mask_token_id < config.vocab_size:
        raise UnmaskError(
            f"config.mask_token_id must be an id in [0, {config.vocab_size}); got {config.mask_token_id}:"
            " call model.resize_token_embeddings, or use `unmask convert`."
        )
    return config.mask_token_id


def block_length_of(config: Any, name: str = "config") -> int | None:
    """Read the block length of a block-causal model from its config; None for a bidirectional one.

    Raises:
        UnmaskError: another attention, or a block length that is not a positive integer.
    """
    attention, length = config.attention, config.block_length
    if config.is_causal:
        raise UnmaskError(
            f"{name}.is_causal must be false; for token by token attention set attention to"
            " 'block_causal' and block_length to 1."
        )
    if attention == "bidirectional":
        return None
    if attention != "block_causal" or type(length) is not int or length < 1:
        raise UnmaskError(
            f"{name}.attention must be 'bidirectional', or 'block_causal' with a positive block_length;"
            f" got {attention!r} and {length!r}."
        )
    if config.block_anchor not in get_args(BlockAnchor):
        raise UnmaskError(
            f"{name}.block_anchor must be one of {', '.join(get_args(BlockAnchor))};"
            f" got {config.block_anchor!r}."
        )
    return length


def describe_attention(config: Any) -> str:
    """Say in words how a model attends and which position predicts which."""
    attention = "bidirectional"
    if config.attention == "block_causal":
        attention = f"block-causal (blocks of {config.block_length} tokens from the {config.block_anchor})"
    return f"{attention}, {'shifted' if config.logit_shift else 'not shifted'}"

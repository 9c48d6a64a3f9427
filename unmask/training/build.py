"""The recipe's model section -> the model to train."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unmask.data.encode import Encoder
from unmask.data.hub import first_line
from unmask.errors import UnmaskError
from unmask.model.checkpoint import (
    fingerprint,
    fit_to_tokenizer,
    is_adapter,
    is_diffusion,
    load_model,
    read_config,
)
from unmask.model.config import PREFIX
from unmask.model.families import MODEL_CLASSES
from unmask.recipe import Recipe
from unmask.training.schedule import check_attention


def build_model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, encoder: Encoder | None = None
) -> PreTrainedModel:
    """Make the model to train: from random weights, an autoregressive base or a diffusion checkpoint.

    Raises:
        UnmaskError: an unknown field of `model.config`, a checkpoint that cannot be loaded, or settings
            that contradict what the checkpoint says.
    """
    settings = recipe.model
    dtype = getattr(torch, settings.dtype)
    overrides = config_overrides(recipe)
    if settings.name_or_path is not None:
        if is_adapter(settings.name_or_path):
            raise UnmaskError(
                f"model.name_or_path: {settings.name_or_path} is an adapter; start from what"
                f" `unmask merge {settings.name_or_path} OUT` makes of it."
            )
        model = load_model(
            settings.name_or_path,
            dtype=dtype,
            attn_implementation=settings.attn_implementation,
            convert_base=True,
            **overrides,
        )
    else:
        model = _from_scratch(settings.config or {}, tokenizer, overrides)
        model = model.to(dtype)
        model.set_attn_implementation(settings.attn_implementation)
    check_attention(recipe, model.config)
    if recipe.lora.r is not None:
        cast(Any, model.config).base_fingerprint = fingerprint(model)  # before a row is added
    fit_to_tokenizer(model, tokenizer)
    if encoder is not None:
        tokenizer.chat_template = encoder.chat_template  # generation lays prompts out as training did
        assert model.generation_config is not None
        ends = dict.fromkeys([encoder.end_token_id, tokenizer.eos_token_id])
        model.generation_config.eos_token_id = list(ends) if len(ends) > 1 else encoder.end_token_id
    if recipe.data.block_size > model.config.max_position_embeddings:
        raise UnmaskError(
            f"data.block_size: {recipe.data.block_size} tokens exceed the model's"
            f" {model.config.max_position_embeddings} positions (max_position_embeddings)."
        )
    if settings.freeze_embeddings:
        # The parameter, which a tied head shares; by default every other one learns.
        cast(Any, model).get_input_embeddings().requires_grad_(False)
    return model if recipe.lora.r is None else _with_adapter(model, recipe)


def config_overrides(recipe: Recipe) -> dict[str, Any]:
    """What the recipe says in place of a model's config."""
    settings, eps = recipe.model, recipe.model.noise_eps
    overrides: dict[str, Any] = {"noise_eps": eps[-1] if isinstance(eps, list) else eps}
    for name in ("logit_shift", "attention", "block_length"):
        if (value := getattr(settings, name)) is not None:
            overrides[name] = value
    if settings.attention == "bidirectional":
        overrides["block_length"] = None  # that of a block-causal checkpoint
    return overrides


def _with_adapter(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    from unmask.model.adapter import add_adapter  # which imports peft: seconds

    name, lora = cast(str, recipe.model.name_or_path), recipe.lora
    adapted = add_adapter(
        model,
        str(Path(name).expanduser().resolve()) if Path(name).expanduser().is_dir() else name,
        r=cast(int, lora.r),
        alpha=lora.alpha or 2 * cast(int, lora.r),
        dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_dora=lora.use_dora,
        learn_mask=not is_diffusion(read_config(name)),
    )
    return cast(PreTrainedModel, adapted)  # it has all that the model in it has


def _from_scratch(
    fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase, overrides: dict[str, Any]
) -> PreTrainedModel:
    config = scratch_config(fields, max(tokenizer.get_vocab().values()) + 1, overrides)
    try:
        model = MODEL_CLASSES[config.model_type](config)
        model.eval()(torch.zeros(1, 2, dtype=torch.long))  # sizes that do not fit one another show here
    except Exception as error:  # whatever the stock code makes of values that it does not check
        raise UnmaskError(f"model.config: no model can be built: {first_line(error)}.") from error
    return model


def scratch_config(fields: dict[str, Any], ids: int, overrides: dict[str, Any]) -> Any:
    """Make the config of a model with random weights, for a tokenizer with this many ids.

    Raises:
        UnmaskError: an unknown field of `model.config`, or values that do not go together.
    """
    fields = dict(fields)
    config_class = MODEL_CLASSES[PREFIX + fields.pop("model_type")].config_class
    known = set(config_class().to_dict())
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else "."
            raise UnmaskError(f"model.config.{name}: {config_class.__name__} has no such field{hint}")
    fields = {"vocab_size": ids, **fields}
    if "num_attention_heads" in fields:
        fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    try:
        if fields["vocab_size"] < ids:
            raise ValueError(f"vocab_size {fields['vocab_size']} is below the {ids} ids of the tokenizer")
        if "head_dim" in known and {"hidden_size", "num_attention_heads"} <= set(fields):
            fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
        return config_class(**fields, **overrides)
    except Exception as error:  # whatever the stock code makes of values that it does not check
        raise UnmaskError(f"model.config: no model can be built: {first_line(error)}.") from error

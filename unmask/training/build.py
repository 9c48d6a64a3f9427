"""The recipe's model section -> the model to train."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unmask.data.encode import Encoder
from unmask.data.hub import first_line
from unmask.errors import UnmaskError
from unmask.model.checkpoint import fit_to_tokenizer, load_model
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
    eps = settings.noise_eps
    overrides: dict[str, Any] = {"noise_eps": eps[-1] if isinstance(eps, list) else eps}
    for name in ("logit_shift", "attention", "block_length"):
        if (value := getattr(settings, name)) is not None:
            overrides[name] = value
    if settings.attention == "bidirectional":
        overrides["block_length"] = None  # that of a block-causal checkpoint
    if settings.name_or_path is not None:
        model = load_model(
            settings.name_or_path,
            dtype=dtype,
            attn_implementation=settings.attn_implementation,
            convert_base=True,
            **overrides,
        )
    else:
        model = _from_scratch(dict(settings.config or {}), tokenizer, overrides)
        model = model.to(dtype)
        try:
            model.set_attn_implementation(settings.attn_implementation)
        except (ImportError, ValueError) as error:
            raise UnmaskError(f"model.attn_implementation: {first_line(error)}; use sdpa.") from error
    check_attention(recipe, model.config)
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
    return model


def _from_scratch(
    fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase, overrides: dict[str, Any]
) -> PreTrainedModel:
    model_class = MODEL_CLASSES[PREFIX + fields.pop("model_type")]
    config_class = model_class.config_class
    known = set(config_class().to_dict())
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else "."
            raise UnmaskError(f"model.config.{name}: {config_class.__name__} has no such field{hint}")
    ids = max(tokenizer.get_vocab().values()) + 1
    fields = {"vocab_size": ids, **fields}
    if "num_attention_heads" in fields:
        fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    try:
        if fields["vocab_size"] < ids:
            raise ValueError(f"vocab_size {fields['vocab_size']} is below the {ids} ids of the tokenizer")
        if "head_dim" in known and {"hidden_size", "num_attention_heads"} <= set(fields):
            fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
        model = model_class(config_class(**fields, **overrides))
        model.eval()(torch.zeros(1, 2, dtype=torch.long))  # sizes that do not fit one another show here
    except Exception as error:  # whatever the stock code makes of values that it does not check
        raise UnmaskError(f"model.config: no model can be built: {first_line(error)}.") from error
    return model

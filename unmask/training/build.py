"""From the recipe to the model and the objective of each step, with everything checked before the long work."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from unmask.config import Recipe, by_epoch, by_phase
from unmask.data.dataset import run_tokenizer
from unmask.diffusion.loss import PRESETS
from unmask.diffusion.objective import PROBABILITIES, Curriculum, Objective
from unmask.errors import UnmaskError
from unmask.formats import PREFIX
from unmask.io import reason
from unmask.model.checkpoint import (
    add_adapter,
    check_weights,
    fingerprint,
    fit_to_tokenizer,
    is_adapter,
    is_diffusion,
    load_model,
    read_config,
    set_generation_defaults,
)
from unmask.model.config import diffusion_values
from unmask.model.denoiser import MODEL_CLASSES
from unmask.training.optim import warmup_steps


def check_base(recipe: Recipe) -> None:
    """Check the curriculum, and that the recipe starts from a checkpoint: else its tokenizer would be missing."""
    make_curriculum(recipe)
    name = recipe.model.name_or_path
    if name is not None and is_adapter(name):
        raise UnmaskError(
            f"model.name_or_path: {name} is an adapter; start from what `unmask merge {name} OUT` makes of it."
        )
    if name is not None:
        read_config(name)
        check_weights(name)


def make_curriculum(recipe: Recipe) -> Curriculum:
    """Build the curriculum that the recipe's model section describes."""
    model, scheduler = recipe.model, recipe.model.masking_scheduler
    tables = {name: tuple(by_epoch(getattr(model, name))) for name in ("noise_eps", *PROBABILITIES)}
    return Curriculum(
        objective=Objective(
            schedule=model.noise_schedule, complementary=model.complementary_masks, loss=model.loss
        ),
        **cast(dict[str, Any], tables),
        mask_block_sizes=tuple(map(tuple, by_phase(model.mask_block_sizes))),
        schedule_type=scheduler.schedule_type,
        schedule_steps=scheduler.max_schedule_steps or recipe.max_steps,
        source_steps=scheduler.source_steps,
        attention_annealing_steps=model.attention_annealing_steps,
    )


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, encoder: Any = None) -> Any:
    """Make the model to train: from random weights, an autoregressive base or a diffusion checkpoint."""
    settings, lora = recipe.model, recipe.lora.r is not None
    kernel: dict[str, Any] = {"attn_implementation": settings.attn_implementation}
    dtype = getattr(torch, settings.dtype)
    if settings.name_or_path is None or (recipe.distributed.type == "fsdp" and not lora):
        # Of a checkpoint without its weights, of which each process later reads its own part (`load_shards`).
        model = empty_model(recipe, "cpu" if settings.name_or_path is None else "meta", tokenizer).to(dtype)
        model.set_attn_implementation(settings.attn_implementation)
        if settings.name_or_path is not None:
            set_generation_defaults(model, settings.name_or_path)
    else:
        model: Any = load_model(
            settings.name_or_path, dtype=dtype, convert_base=True, **kernel, **config_overrides(recipe)
        )
    check_attention(recipe, model.config)
    if lora:
        model.config.base_fingerprint = fingerprint(model)  # before a row is added
    fit_to_tokenizer(model, tokenizer)
    if encoder is not None:
        tokenizer.chat_template = encoder.chat_template  # generation lays prompts out as training did
        ends = dict.fromkeys([encoder.end_token_id, tokenizer.eos_token_id])
        model.generation_config.eos_token_id = list(ends) if len(ends) > 1 else encoder.end_token_id
    if recipe.data.block_size > model.config.max_position_embeddings:
        raise UnmaskError(
            f"data.block_size: {recipe.data.block_size} tokens exceed the model's"
            f" {model.config.max_position_embeddings} positions (max_position_embeddings)."
        )
    return _choose_trained(model, recipe)


def empty_model(recipe: Recipe, device: str, tokenizer: PreTrainedTokenizerBase | None = None) -> Any:
    """Make a model from its config alone: on "cpu" with random weights, on "meta" without any."""
    settings = recipe.model
    where, fields = settings.name_or_path or "model.config", dict(settings.config or {})
    if settings.name_or_path is not None:
        fields = read_config(settings.name_or_path)
        fields = fields if is_diffusion(fields) else diffusion_values(fields)
    model_class = MODEL_CLASSES[PREFIX + fields.pop("model_type").removeprefix(PREFIX)]
    known = model_class.config_class().to_dict().keys() | {"model_type"}
    if unknown := sorted((settings.config or {}).keys() - known):
        raise UnmaskError(
            f"model.config.{unknown[0]}: {model_class.config_class.__name__} has no such field."
        )
    if settings.config is not None:
        rows = max((tokenizer or run_tokenizer(recipe)).get_vocab().values()) + 1
        fields = {"vocab_size": rows, **fields}
        if "num_attention_heads" in fields:
            fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
        if "head_dim" in known and {"hidden_size", "num_attention_heads"} <= set(fields):
            fields.setdefault("head_dim", int(fields["hidden_size"]) // int(fields["num_attention_heads"]))
        if fields["vocab_size"] < rows:
            raise UnmaskError(
                f"model.config.vocab_size: {fields['vocab_size']} is below the tokenizer's {rows} ids."
            )
    try:
        config = model_class.config_class.from_dict({**fields, **config_overrides(recipe)})
        with torch.device(device):
            model = model_class(config)
        if device == "cpu":  # sizes that do not fit one another show here
            model.eval()(torch.zeros(1, 2, dtype=torch.long))
        return model.train()
    except Exception as error:  # whatever the stock code makes of values that it does not check
        raise UnmaskError(f"{where}: no model can be built: {reason(error)}.") from error


def meta_model(recipe: Recipe) -> Any:
    """The denoiser of a recipe without its weights, on torch's "meta" device; no data are read."""
    empty = empty_model(recipe, "meta")
    if (
        empty.config.mask_token_id is None
    ):  # of an autoregressive base the tokenizer says it, which is not read
        empty.config.mask_token_id = empty.config.vocab_size - 1  # any row is as large
    model = _choose_trained(empty, recipe)
    return model if recipe.lora.r is None else model.get_base_model()


def config_overrides(recipe: Recipe) -> dict[str, Any]:
    """What the recipe says in place of a model's config."""
    overrides: dict[str, Any] = {"noise_eps": by_epoch(recipe.model.noise_eps)[-1]}
    for name in ("logit_shift", "attention", "block_length", "block_anchor"):
        if (value := getattr(recipe.model, name)) is not None:
            overrides[name] = value
    if recipe.model.attention == "bidirectional":
        overrides["block_length"] = None  # that of a block-causal checkpoint
    return overrides


def _choose_trained(model: Any, recipe: Recipe) -> Any:
    """Freeze what the recipe freezes, and add its adapters."""
    name, lora = cast(str, recipe.model.name_or_path), recipe.lora
    if recipe.model.freeze_embeddings:  # the parameter, which a tied head shares
        model.get_input_embeddings().requires_grad_(False)
    if lora.r is None:
        return model
    return add_adapter(
        model,
        str(Path(name).expanduser().resolve()) if Path(name).expanduser().is_dir() else name,
        r=lora.r,
        alpha=lora.alpha or 2 * lora.r,
        dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_dora=lora.use_dora,
        learn_mask=not is_diffusion(read_config(name)),
    )


def check_block_sizes(recipe: Recipe, examples: Any) -> None:
    """Refuse masked spans that are longer than any response."""
    curriculum = make_curriculum(recipe)
    if not any(curriculum.block_masking_probability):
        return
    largest, longest = max(map(max, curriculum.mask_block_sizes)), 0
    for example in examples:
        runs = [len(list(run)) for is_source, run in groupby(example.src_mask) if not is_source]
        longest = max([longest, *runs])
        if longest >= largest:
            return
    raise UnmaskError(
        f"model.mask_block_sizes: spans of {largest} tokens are longer than any response or row of the data, at"
        f" most {longest}; use smaller sizes, or set model.block_masking_probability to 0."
    )


def check_attention(recipe: Recipe, config: Any) -> None:
    """Check the recipe against the attention that a model has, which it may leave open."""
    model, length, size = recipe.model, config.block_length, recipe.data.block_size
    causal = config.attention == "block_causal"
    whole = f"the {'block-causal' if causal else 'bidirectional'} attention of {model.name_or_path}"
    if model.attn_implementation == "flex_attention" and not torch.accelerator.is_available():
        raise UnmaskError("model.attn_implementation: flex_attention cannot train on a CPU; use auto.")
    fits = length is None or (length <= size and (recipe.training_mode == "sft" or size % length == 0))
    for key, wrong, remedy in (
        ("model.block_length", not causal and length is not None, "set model.attention: block_causal"),
        ("model.block_length: null", causal and length is None, "set it, in tokens"),
        ("model.attention_annealing_steps", causal and model.attention_annealing_steps, "remove it"),
        ("model.loss: cart", causal and model.loss == "cart", "use elbo: half of the context is hidden"),
        ("data.block_size", causal and not fits, f"use a multiple of the {length} tokens of a block"),
    ):
        if wrong:
            raise UnmaskError(f"{key} does not go with {whole}; {remedy}.")


def loss_unit(recipe: Recipe) -> str:
    """Unit of the training loss."""
    preset = recipe.model.loss
    return "nats per token" if PRESETS[preset].is_bound else f"by preset {preset}"


def schedule_notes(recipe: Recipe, rows: int, block_length: int | None = None) -> list[str]:
    """Say what a user may not expect of the recipe's loss and curriculum, a line each.

    Args:
        rows: how many there are, of batches.
        block_length: that of the model, where it is block-causal.
    """
    notes, model, steps, preset = [], recipe.model, recipe.max_steps, PRESETS[recipe.model.loss]
    if (warmup := warmup_steps(recipe)) != (wanted := recipe.lr_scheduler.warmup_steps):
        notes.append(
            f"lr_scheduler.warmup_steps: {wanted} are more than max_steps = {steps}; the warmup takes {warmup}"
        )
    for name, length in (
        ("masking_scheduler.max_schedule_steps", model.masking_scheduler.max_schedule_steps),
        ("masking_scheduler.source_steps", model.masking_scheduler.source_steps),
        ("attention_annealing_steps", model.attention_annealing_steps),
    ):
        if length and length > steps:
            notes.append(f"model.{name}: the run ends after {steps} of {length} steps of it")
    if recipe.training_mode == "sft" and block_length and (fill := recipe.data.sft.end_fill) % block_length:
        notes.append(
            f"data.sft.end_fill: {fill} is not a multiple of the {block_length} tokens of a block, which"
            " generation fills to its end; a multiple is better"
        )
    if not preset.is_bound:
        notes.append(
            f"loss {model.loss} is not a bound on the likelihood; it is {preset.estimates};"
            " the held-out loss is that of elbo"
        )
    epochs = -(-steps * min(recipe.global_batch_size, rows) // max(1, rows))
    for name, table in make_curriculum(recipe).tables.items():
        if len(table) > epochs:
            notes.append(
                f"model.{name}: the run ends in epoch {epochs} and uses {epochs} of {len(table)} values"
            )
    return notes

"""From the recipe to the model and the objective of each step, with everything checked before the long work."""

from __future__ import annotations

import difflib
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from unmask.config import Recipe
from unmask.data.dataset import run_tokenizer
from unmask.diffusion.loss import PRESETS
from unmask.diffusion.objective import PROBABILITIES, Curriculum, Objective
from unmask.errors import UnmaskError
from unmask.io import reason
from unmask.model.checkpoint import (
    add_adapter,
    fingerprint,
    fit_to_tokenizer,
    is_adapter,
    is_diffusion,
    load_model,
    read_config,
)
from unmask.model.config import PREFIX, diffusion_values
from unmask.model.denoiser import MODEL_CLASSES
from unmask.training.optim import warmup_steps


def check_base(recipe: Recipe) -> None:
    """Find out whether the recipe starts from a checkpoint; otherwise its missing tokenizer would be named.

    Raises:
        UnmaskError: it is not one, or not of a family that can be trained.
    """
    if recipe.model.name_or_path is not None:
        read_config(recipe.model.name_or_path)


def make_curriculum(recipe: Recipe) -> Curriculum:
    """Build the curriculum that the recipe's model section describes."""
    model, scheduler = recipe.model, recipe.model.masking_scheduler
    phases = [sizes for sizes in model.mask_block_sizes if isinstance(sizes, list)]

    def table(value: float | list[float]) -> tuple[float, ...]:
        return tuple(value) if isinstance(value, list) else (value,)

    return Curriculum(
        objective=Objective(
            schedule=model.noise_schedule, complementary=model.complementary_masks, loss=model.loss
        ),
        noise_eps=table(model.noise_eps),
        **{name: table(getattr(model, name)) for name in PROBABILITIES},
        mask_block_sizes=tuple(map(tuple, phases or [cast(list[int], model.mask_block_sizes)])),
        schedule_type=scheduler.schedule_type,
        schedule_steps=scheduler.max_schedule_steps or recipe.max_steps,
        source_steps=scheduler.source_steps,
        attention_annealing_steps=model.attention_annealing_steps,
    )


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, encoder: Any = None) -> Any:
    """Make the model to train: from random weights, an autoregressive base or a diffusion checkpoint.

    Raises:
        UnmaskError: an unknown field of `model.config`, a checkpoint that cannot be loaded, or settings
            that contradict what the checkpoint says.
    """
    settings = recipe.model
    dtype = getattr(torch, settings.dtype)
    overrides = config_overrides(recipe)
    if settings.name_or_path is not None and is_adapter(settings.name_or_path):
        raise UnmaskError(
            f"model.name_or_path: {settings.name_or_path} is an adapter; start from what"
            f" `unmask merge {settings.name_or_path} OUT` makes of it."
        )
    if settings.name_or_path is not None and recipe.distributed.type == "fsdp" and recipe.lora.r is None:
        # Without its weights, of which each process later reads its own part; see `load_shards`.
        read_config(settings.name_or_path)  # which also finds out whether there are any
        model: Any = meta_model(recipe).to(dtype)
        model.set_attn_implementation(settings.attn_implementation)
    elif settings.name_or_path is not None:
        model = load_model(
            settings.name_or_path,
            dtype=dtype,
            attn_implementation=settings.attn_implementation,
            convert_base=True,
            **overrides,
        )
    else:
        model = _from_scratch(settings.config or {}, tokenizer, overrides).to(dtype)
        model.set_attn_implementation(settings.attn_implementation)
    check_attention(recipe, model.config)
    if recipe.lora.r is not None:
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
    if settings.freeze_embeddings:
        # The parameter, which a tied head shares; by default every other one is trained.
        model.get_input_embeddings().requires_grad_(False)
    return model if recipe.lora.r is None else _with_adapter(model, recipe)


def meta_model(recipe: Recipe) -> Any:
    """The model of a recipe without its weights, on torch's "meta" device; no data are read.

    Raises:
        UnmaskError: its config cannot be read or made.
    """
    settings, overrides = recipe.model, config_overrides(recipe)
    if settings.config is not None:
        ids = settings.config.get("vocab_size") or max(run_tokenizer(recipe).get_vocab().values()) + 1
        config = scratch_config(settings.config, ids, overrides)
    else:
        name = cast(str, settings.name_or_path)
        values = read_config(name, weights=False)
        values = values if is_diffusion(values) else diffusion_values(values)
        try:
            config = MODEL_CLASSES[values["model_type"]].config_class.from_dict({**values, **overrides})
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise UnmaskError(f"{name}: no model can be made from its config.json: {error}.") from error
    with torch.device("meta"):
        model = MODEL_CLASSES[config.model_type](config)
    if settings.freeze_embeddings:
        model.get_input_embeddings().requires_grad_(False)
    return model if recipe.lora.r is None else _with_adapter(model, recipe).get_base_model()


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


def _with_adapter(model: Any, recipe: Recipe) -> Any:
    name, lora = cast(str, recipe.model.name_or_path), recipe.lora
    rank = cast(int, lora.r)
    return add_adapter(
        model,
        str(Path(name).expanduser().resolve()) if Path(name).expanduser().is_dir() else name,
        r=rank,
        alpha=lora.alpha or 2 * rank,
        dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_dora=lora.use_dora,
        learn_mask=not is_diffusion(read_config(name)),
    )


def _from_scratch(fields: dict[str, Any], tokenizer: Any, overrides: dict[str, Any]) -> Any:
    config = scratch_config(fields, max(tokenizer.get_vocab().values()) + 1, overrides)
    try:
        model = MODEL_CLASSES[config.model_type](config)
        model.eval()(torch.zeros(1, 2, dtype=torch.long))  # sizes that do not fit one another show here
    except Exception as error:  # whatever the stock code makes of values that it does not check
        raise UnmaskError(f"model.config: no model can be built: {reason(error)}.") from error
    return model.train()


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
        raise UnmaskError(f"model.config: no model can be built: {reason(error)}.") from error


def check_block_sizes(recipe: Recipe, examples: Any) -> None:
    """Refuse masked spans that are longer than any response.

    Raises:
        UnmaskError: one of `model.mask_block_sizes` is.
    """
    curriculum = make_curriculum(recipe)
    if not any(curriculum.block_masking_probability):
        return
    largest = max(size for phase in curriculum.mask_block_sizes for size in phase)
    longest = 0
    for example in examples:
        runs = groupby(example.src_mask)
        longest = max([longest, *(sum(1 for _ in run) for is_source, run in runs if not is_source)])
        if longest >= largest:
            return
    what = "response of the data" if recipe.training_mode == "sft" else "row"
    if recipe.training_mode == "pretrain" and recipe.data.packing:
        what = "document"
    raise UnmaskError(
        f"model.mask_block_sizes: spans of {largest} tokens are longer than any {what}, the longest of which"
        f" has {longest}; use smaller sizes, or set model.block_masking_probability to 0."
    )


def check_attention(recipe: Recipe, config: Any) -> None:
    """Check the recipe against the attention that a model has, which it may leave open.

    Args:
        config: of the model to train, with the recipe's own settings in it.

    Raises:
        UnmaskError: settings that block-causal attention or this machine contradicts, or blocks without
            block-causal attention.
    """
    model, length = recipe.model, config.block_length
    if model.attn_implementation == "flex_attention" and not torch.accelerator.is_available():
        raise UnmaskError("model.attn_implementation: flex_attention cannot train on a CPU; use auto.")
    if config.attention == "bidirectional":
        if length is not None:
            raise UnmaskError(
                f"model.block_length has no effect: {model.name_or_path} has bidirectional attention; set"
                " model.attention: block_causal to change it."
            )
        return
    if length is None:
        raise UnmaskError(
            f"model.block_length: missing; {model.name_or_path} says none, and model.attention: block_causal"
            " needs it."
        )
    whole = f"the block-causal attention of {model.name_or_path}"
    if model.attention_annealing_steps:
        raise UnmaskError(
            f"model.attention_annealing_steps contradicts {whole}, which never becomes bidirectional; remove"
            " it or set model.attention: bidirectional."
        )
    if model.loss == "cart":
        raise UnmaskError(f"model.loss: cart contradicts {whole}, which hides half of its context; use elbo.")
    size = recipe.data.block_size
    if length > size or (recipe.training_mode == "pretrain" and size % length):
        raise UnmaskError(
            f"data.block_size: {size} tokens do not fit {whole}: its blocks have {length} tokens; use a"
            " multiple of that."
        )


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
    notes = []
    if (warmup := warmup_steps(recipe)) != recipe.lr_scheduler.warmup_steps:
        notes.append(
            f"lr_scheduler.warmup_steps: {recipe.lr_scheduler.warmup_steps} are more than max_steps ="
            f" {recipe.max_steps}; the warmup takes {warmup}"
        )
    for name, steps in (
        ("masking_scheduler.max_schedule_steps", recipe.model.masking_scheduler.max_schedule_steps),
        ("masking_scheduler.source_steps", recipe.model.masking_scheduler.source_steps),
        ("attention_annealing_steps", recipe.model.attention_annealing_steps),
    ):
        if steps and steps > recipe.max_steps:
            notes.append(f"model.{name}: the run ends after {recipe.max_steps} of {steps} steps of it")
    if recipe.training_mode == "sft" and block_length and recipe.data.sft.end_fill % block_length:
        notes.append(
            f"data.sft.end_fill: {recipe.data.sft.end_fill} is not a multiple of the {block_length} tokens of a"
            " block: responses end within a block, while generation fills whole ones; a multiple is better"
        )
    preset = PRESETS[recipe.model.loss]
    if not preset.is_bound:
        notes.append(
            f"loss {recipe.model.loss} is not a bound on the likelihood; it is {preset.estimates};"
            " the held-out loss is that of elbo"
        )
    epochs = -(-recipe.max_steps * recipe.global_batch_size // max(1, rows))
    for name, table in make_curriculum(recipe).tables.items():
        if len(table) > epochs:
            notes.append(
                f"model.{name}: the run ends in epoch {epochs}, so that of {len(table)} values, one an epoch,"
                f" the last {len(table) - epochs} are not reached"
            )
    return notes

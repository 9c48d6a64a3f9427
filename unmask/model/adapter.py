"""LoRA adapters: added to a model, saved alone, loaded unmerged, or merged into the base's weights.

A folder of adapters has peft's own two files and the config of the diffusion model, since the base may be an
autoregressive checkpoint without a mask token. peft is imported here at the top, which takes seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unmask.data.hub import first_line
from unmask.data.tokenizer import load_tokenizer
from unmask.errors import UnmaskError
from unmask.generation.config import DiffusionGenerationConfig
from unmask.io import atomic_dir
from unmask.model.checkpoint import (
    ADAPTER_CONFIG,
    add_rows,
    check_new,
    fingerprint,
    is_adapter,
    load_model,
    read_config,
    read_json,
    save_checkpoint,
)

WEIGHTS = "adapter_model.safetensors"

# What the base's own config need not say, or says of another use.
_OWN = ("logit_shift", "attention", "block_length", "noise_eps", "mask_token_id")
_TOKENS = ("eos_token_id", "pad_token_id", "bos_token_id")


class DiffusionAdapter(PeftModel):
    """A diffusion model with LoRA adapters in its linear layers; all else it has is the model's."""

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the adapter and the model's config; rows of the embedding are never written as a whole."""
        super().save_pretrained(save_directory, **{**kwargs, "save_embedding_layers": False})
        if kwargs.get("is_main_process", True):
            model = cast(Any, self.get_base_model())
            model.config.save_pretrained(save_directory)
            model.generation_config.save_pretrained(save_directory)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Write none: the run's own model card says more."""


def add_adapter(
    model: PreTrainedModel,
    base: str,
    *,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: list[str] | None = None,
    use_dora: bool = False,
    learn_mask: bool = False,
) -> DiffusionAdapter:
    """Freeze a model and put adapters into its linear layers (Hu et al., arXiv:2106.09685).

    At first they change nothing: the factor that comes last is 0.

    Args:
        model: diffusion model; it is changed in place.
        base: where its weights can be loaded from again.
        r: rank.
        alpha: an adapter's output is multiplied by alpha / r.
        dropout: share of an adapter's inputs left out in training, by torch's generator.
        target_modules: names of the layers; all linear ones but the head by default.
        use_dora: learn the norm of each weight's rows apart (Liu et al., arXiv:2402.09353).
        learn_mask: also train the mask token's row of the embedding, and of a head tied to it. An
            autoregressive base has never seen that token.

    Raises:
        UnmaskError: a name in `target_modules` that no linear layer has.
    """
    linear = {
        name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    for name in target_modules or ():
        if name not in linear:
            raise UnmaskError(
                f"lora.target_modules: the model has no linear layer {name}; it has"
                f" {', '.join(sorted(linear))}."
            )
    config = LoraConfig(
        r=r,
        lora_alpha=cast(int, alpha),  # peft says int, and only divides it
        lora_dropout=dropout,
        target_modules=target_modules or "all-linear",
        use_dora=use_dora,
        base_model_name_or_path=base,
        trainable_token_indices=[cast(Any, model.config).mask_token_id] if learn_mask else None,
    )
    return DiffusionAdapter(model, config)


def load_adapter(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    **overrides: Any,
) -> DiffusionAdapter:
    """Load the base that an adapter folder names and put the adapter into it, unmerged.

    Args:
        name: folder of an adapter; the others as in `unmask.load_model`.

    Raises:
        UnmaskError: no safetensors, a base that is not there or has other weights than the adapter was
            trained on, or an adapter that does not fit.
    """
    folder = Path(name).expanduser()
    config = read_config(name)
    if not (folder / WEIGHTS).exists():
        raise UnmaskError(f"{name}: the adapter has no {WEIGHTS}; weights in other formats are not read.")
    base = _base_of(folder)
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise UnmaskError(
            f"{name}: the adapter's base {base} is not there; correct base_model_name_or_path in"
            f" {folder / ADAPTER_CONFIG}."
        )
    model = load_model(
        base,
        dtype=dtype,
        attn_implementation=attn_implementation,
        convert_base=True,
        **{**{key: config.get(key) for key in _OWN}, **overrides},
    )
    made_with = config.get("base_fingerprint")
    if made_with is not None and fingerprint(model) != made_with:
        raise UnmaskError(
            f"{name}: {base} has other weights than those that the adapter was trained on; correct"
            f" base_model_name_or_path in {folder / ADAPTER_CONFIG}."
        )
    add_rows(model, config["vocab_size"])
    for key in _TOKENS:
        setattr(model.config, key, config.get(key))
    cast(Any, model.config).base_fingerprint = made_with
    try:
        model.generation_config = DiffusionGenerationConfig.from_pretrained(folder)
        return cast(DiffusionAdapter, DiffusionAdapter.from_pretrained(model, str(folder)))
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UnmaskError(f"{name}: the adapter cannot be put into {base}: {first_line(error)}.") from error


def _base_of(folder: Path) -> str:
    values = read_json(folder / ADAPTER_CONFIG)
    base = values.get("base_model_name_or_path")
    if not isinstance(base, str) or not base or values.get("peft_type") != "LORA":
        raise UnmaskError(
            f"{folder / ADAPTER_CONFIG}: expected peft_type LORA and the base in base_model_name_or_path."
        )
    return base


def merge(adapter: str, out: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Add an adapter to its base's weights and write a plain diffusion checkpoint.

    The sum is taken in float32 at least and rounded to the type that the run held the weights in.

    Args:
        adapter: folder of an adapter, as a run with `lora.r` leaves it.
        out: folder to write; must not exist or be empty.

    Raises:
        UnmaskError: no adapter, one that cannot be loaded, or `out` holds something.
    """
    check_new(out)
    if not is_adapter(adapter):
        raise UnmaskError(f"{adapter}: not a folder of LoRA adapters: it has no {ADAPTER_CONFIG}.")
    saved = getattr(torch, str(read_config(adapter).get("dtype") or "float32"))
    wide = load_adapter(adapter, dtype=torch.promote_types(saved, torch.float32))
    tokenizer = load_tokenizer(adapter)
    model = cast(PreTrainedModel, cast(Any, wide).merge_and_unload()).to(saved)
    del cast(Any, model.config).base_fingerprint
    with atomic_dir(out) as aside:
        save_checkpoint(model, tokenizer, aside)
    return model, tokenizer

"""Checkpoints of other systems: what their `config.json` says in our terms, and ours in theirs.

A `Format` is a row of a table of facts: which stock decoder of transformers computes the model, whether its
output is shifted, where its blocks are counted from, which tokens mask and end. Nothing is executed and no
weight is read here; `unmask.model.checkpoint` opens what this file describes, `unmask.data.tokenizer` its
tokenizer. docs/checkpoints.md is the same table in prose.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unmask.errors import UnmaskError

PREFIX = "unmask_"  # of the model types of our own checkpoints
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_OF_THE_CODE = (
    "architectures",
    "auto_map",
    "model_type",
    "transformers_version",
    "is_causal",
    "_name_or_path",
)
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)


@dataclass(frozen=True, kw_only=True)
class Format:
    """What a checkpoint of another system is, in terms of a stock decoder and our five fields."""

    name: str  # as in `unmask export --as`
    title: str
    model_type: str
    architectures: tuple[str, ...]
    family: str  # the stock model type that computes it
    logit_shift: bool
    block_key: str | None = None  # key of the block length; None = bidirectional
    block_length: int | None = None  # where that key is absent
    mask_token: str
    mask_token_id: int  # where neither config nor tokenizer says
    end_tokens: tuple[str, ...]  # besides the config's own
    preset: str  # of `unmask.generation.config.PRESETS`
    tokenizer_class: str | None = None  # in place of a tokenizer that is remote code
    keys: Mapping[str, str] = field(default_factory=dict)  # their key -> the stock key; empty = the same
    fixed: Mapping[str, Any] = field(default_factory=dict)  # what these keys must say, if there
    dropped: tuple[str, ...] = ()  # keys that mean nothing here


_CODA = Format(
    name="coda",
    title="CoDA",
    model_type="CoDA",
    architectures=("CoDALanguageModel",),
    family="qwen3",
    logit_shift=True,
    mask_token="<|mask|>",
    mask_token_id=151669,
    end_tokens=("<|im_end|>",),
    preset="coda",
    tokenizer_class="Qwen2Tokenizer",
    dropped=(
        "attention_kernel",
        "prefix_probability",
        "truncate_probability",
        "block_masking_probability",
        "mask_block_sizes",
        "sampling_eps",
    ),
)
_DREAM = Format(
    name="dream",
    title="Dream (also DiffuCoder, Dream-Coder, DreamOn)",
    model_type="Dream",
    architectures=("DreamModel",),
    family="qwen2",
    logit_shift=True,
    mask_token="<|mask|>",
    mask_token_id=151666,
    end_tokens=("<|endoftext|>", "<|im_end|>"),
    preset="dream",
    tokenizer_class="Qwen2Tokenizer",
    fixed={"block_size": None},
    dropped=("use_mrope", "expand_token_id"),
)
_LLADA = Format(
    name="llada",
    title="LLaDA (1.0, 1.5)",
    model_type="llada",
    architectures=("LLaDAModelLM",),
    family="llama",
    logit_shift=False,
    mask_token="<|mdm_mask|>",
    mask_token_id=126336,
    end_tokens=("<|endoftext|>", "<|eot_id|>"),
    preset="llada",
    tokenizer_class="PreTrainedTokenizerFast",
    keys={
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "mlp_hidden_size": "intermediate_size",
        "max_sequence_length": "max_position_embeddings",
        "embedding_size": "vocab_size",
        "weight_tying": "tie_word_embeddings",
        "rope_theta": "rope_theta",
        "rms_norm_eps": "rms_norm_eps",
        "mask_token_id": "mask_token_id",
        **{key: key for key in TOKEN_IDS},
    },
    fixed={
        "include_bias": False,
        "multi_query_attention": False,
        "include_qkv_bias": False,
        "activation_type": "silu",
        "block_type": "llama",
        "layer_norm_type": "rms",
        "rope": True,
        "alibi": False,
        "attention_layer_norm": False,
        "input_emb_norm": False,
        "clip_qkv": None,
        "scale_logits": False,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
    },
)
_SDAR = Format(
    name="sdar",
    title="SDAR (also TraDo)",
    model_type="sdar",
    architectures=("SDARForCausalLM",),
    family="qwen3",
    logit_shift=False,
    block_key="block_size",
    block_length=4,
    mask_token="<|MASK|>",
    mask_token_id=151669,
    end_tokens=("<|im_end|>", "<|endoftext|>"),
    preset="sdar",
    tokenizer_class="Qwen2Tokenizer",
    dropped=("fuse_cross_entropy", "debug"),
)
_FAST_DLLM = Format(
    name="fast-dllm-v2",
    title="Fast-dLLM v2",
    model_type="Fast_dLLM_Qwen",
    architectures=("Fast_dLLM_QwenForCausalLM",),
    family="qwen2",
    logit_shift=True,
    block_key="bd_size",
    block_length=32,
    mask_token="|<MASK>|",
    mask_token_id=151665,
    end_tokens=("<|im_end|>",),
    preset="fast-dllm-v2",
    tokenizer_class="Qwen2Tokenizer",
)


def _a2d(family: str, architecture: str) -> Format:
    return Format(
        name="a2d",
        title="Tiny-A2D",
        model_type=f"a2d-{family}",
        architectures=(architecture,),
        family=family,
        logit_shift=False,
        mask_token="<|mask|>",
        mask_token_id=151669,
        end_tokens=("<|im_end|>",),
        preset="a2d",
        tokenizer_class="PreTrainedTokenizerFast" if family == "llama" else "Qwen2Tokenizer",
    )


FORMATS = (
    _CODA,
    _DREAM,
    _LLADA,
    _SDAR,
    _FAST_DLLM,
    _a2d("qwen3", "A2DQwen3LMHeadModel"),
    _a2d("qwen2", "A2DQwen2LMHeadModel"),
    _a2d("llama", "A2DLlamaLMHeadModel"),
)
_A2D_BLOCKS = {"attention": "block_causal", "block_length": 32, "block_anchor": "prompt_end"}  # of bd3lm

REFUSED = {
    "llada2_moe": "its experts are not those of a stock decoder",
    "diffusion_gemma": "transformers has its own class for it",
    "llada_v": "models that see pictures are not supported",
    "llava_llada": "models that see pictures are not supported",
    "mmada": "models that see pictures are not supported",
}


def find_format(values: Mapping[str, Any], name: str) -> Format | None:
    """Find the format of a `config.json` by its model type and architectures; None = not of another system.

    Raises:
        UnmaskError: a diffusion model that cannot be opened here, with the reason.
    """
    model_type, architectures = values.get("model_type"), values.get("architectures") or []
    if isinstance(model_type, str) and model_type in REFUSED:
        raise UnmaskError(f"{name}: {model_type} is not supported: {REFUSED[model_type]}.")
    for one in FORMATS:
        if one.model_type == model_type:
            architectures = [architectures] if isinstance(architectures, str) else architectures
            if architectures and not set(architectures) & set(one.architectures):
                raise UnmaskError(
                    f"{name}: {', '.join(architectures)} says model_type {model_type!r}, but is another model than"
                    f" {' or '.join(one.architectures)}, which is supported."
                )
            return one
    return None


def native_values(values: Mapping[str, Any], format: Format, name: str) -> tuple[dict[str, Any], list[str]]:
    """Say a foreign config in the fields of our own.

    Returns:
        The values of one of our configs (its mask token None where the config does not say it), and what had
        to be assumed, in words.

    Raises:
        UnmaskError: a required fact is missing, or the config asks for what the stock decoder does not compute.
    """
    for key, wanted in format.fixed.items():
        if values.get(key) not in (None, wanted):
            raise UnmaskError(
                f"{name}: config.json says {key} = {values[key]!r}; a {format.title} checkpoint is supported with"
                f" {wanted!r} alone."
            )
    dropped = (*_OF_THE_CODE, *format.dropped, format.block_key)
    if format.keys:
        stock = {ours: values[key] for key, ours in format.keys.items() if values.get(key) is not None}
        stock.setdefault("vocab_size", values.get("vocab_size"))
        stock.setdefault("num_key_value_heads", stock.get("num_attention_heads"))
    else:
        stock = {key: value for key, value in values.items() if key not in dropped}
    theirs = {ours: key for key, ours in format.keys.items()}
    rope = () if stock.get("rope_parameters") else ("rope_theta",)  # by its new name, or its old one
    needed = (*_SIZES, *rope, *(("head_dim",) if format.family == "qwen3" else ()))
    for key in needed:
        if stock.get(key) is None:
            missing = theirs.get(key, key)
            raise UnmaskError(f"{name}: config.json lacks {missing}, which a {format.title} model needs.")
    assumed: list[str] = []
    fields: dict[str, Any] = {"attention": "bidirectional"}
    if format.block_key is not None:
        length = values.get(format.block_key)
        if length is None:
            length = format.block_length
            assumed.append(f"blocks of {length} tokens")
        fields = {"attention": "block_causal", "block_length": length, "block_anchor": "document"}
    elif format.name == "a2d" and "bd3lm" in Path(name).absolute().name.lower():  # of "." that of the folder
        fields = dict(_A2D_BLOCKS)
        assumed.append("block-causal attention, blocks of 32 tokens, by its name")
    elif format.name == "a2d":
        assumed.append("bidirectional attention (the config does not say)")
    if values.get("sampling_eps") is not None:
        fields["noise_eps"] = values["sampling_eps"]
    return {
        **stock,
        "mask_token_id": stock.get("mask_token_id"),
        "model_type": PREFIX + format.family,
        "is_causal": False,
        "logit_shift": format.logit_shift,
        **fields,
    }, assumed


# Names of weights

_LLADA_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
_LLADA_OTHERS = {"model.embed_tokens": "wte", "model.norm": "ln_f", "lm_head": "ff_out"}


def stored_name(weight: str, format: Format | None) -> str:
    """Name that a format stores a weight under, such as `model.norm.weight`; the same by default."""
    if format is None or format.name != "llada":
        return weight
    path, _, kind = weight.rpartition(".")
    if path in _LLADA_OTHERS:
        return f"model.transformer.{_LLADA_OTHERS[path]}.{kind}"
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path)
    assert layer is not None, weight
    return f"model.transformer.blocks.{layer[1]}.{_LLADA_LAYER[layer[2]]}.{kind}"


# The other direction

EXPORTS = ("dream", "sdar", "fast-dllm-v2", "llada", "a2d")
_EXPORTED = (
    *_SIZES,
    "head_dim",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
    "attention_dropout",
    "initializer_range",
    "tie_word_embeddings",
    "use_sliding_window",
    "mask_token_id",
    *TOKEN_IDS,
)


def foreign_format(name: str, config: Mapping[str, Any]) -> Format:
    """Find the format of a name that a diffusion model fits.

    Args:
        name: one of `EXPORTS`.
        config: all fields of the model's config.

    Raises:
        UnmaskError: no such format, or the model does not fit it, with the reason.
    """
    if name not in EXPORTS:
        raise UnmaskError(f"unknown format {name!r}; expected one of {', '.join((*EXPORTS, 'hub'))}.")
    family, attention = config["model_type"].removeprefix(PREFIX), config["attention"]
    ours = [one for one in FORMATS if one.name == name]
    format = next((one for one in ours if one.family == family), ours[0])
    causal = attention == "block_causal"
    shifted = {True: "shifted", False: "not shifted"}
    scaled = (config.get("rope_parameters") or {}).get("rope_type", "default") != "default"
    bias = config.get("attention_bias") or config.get("mlp_bias")
    size = config["hidden_size"] // config["num_attention_heads"]
    odd = config.get("head_dim") not in (None, size) or config.get("hidden_act") != "silu"
    for wrong, reason in (
        (family != format.family, f"it is a {family} decoder, theirs is {format.family}"),
        (
            bool(config["logit_shift"]) != format.logit_shift,
            f"its output is {shifted[bool(config['logit_shift'])]}, theirs is {shifted[format.logit_shift]}",
        ),
        (
            name != "a2d" and causal and format.block_key is None,
            f"its attention is {attention}, theirs is not",
        ),
        (
            not causal and format.block_key is not None,
            f"its attention is {attention}, theirs is block_causal",
        ),
        (
            format.block_key is not None and config["block_anchor"] != "document",
            f"its blocks are counted from the {config['block_anchor']}, theirs from the document: train with"
            " model.block_anchor=document",
        ),
        (config["mask_token_id"] is None, "it has no mask token"),
        (
            bool(format.keys) and (scaled or bias),
            "it has biases or a scaled rotary embedding, theirs has not",
        ),
        (
            bool(format.keys) and odd,
            f"its heads have other than {size} dimensions, or its activation is not silu",
        ),
        (
            name == "a2d" and causal and any(config[key] != _A2D_BLOCKS[key] for key in _A2D_BLOCKS),
            f"its blocks are of {config['block_length']} tokens from the {config['block_anchor']}, theirs of 32"
            " from the prompt_end",
        ),
    ):
        if wrong:
            raise UnmaskError(f"the model does not fit the format {name}: {reason}.")
    return format


def foreign_values(config: Mapping[str, Any], format: Format) -> dict[str, Any]:
    """Say the config of a model that fits a format in its keys."""
    rope = config.get("rope_parameters") or {}
    values = {key: config[key] for key in _EXPORTED if config.get(key) is not None}
    values["rope_theta"] = rope.get("rope_theta", config.get("rope_theta"))
    if rope.get("rope_type", "default") != "default":
        values["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if format.keys:
        values = {key: values[name] for key, name in format.keys.items() if name in values}
        values |= {key: wanted for key, wanted in format.fixed.items() if wanted is not None}
        values["vocab_size"] = values["embedding_size"]
    if format.block_key is not None:
        values[format.block_key] = config["block_length"]
    values["torch_dtype"] = str(config.get("dtype") or "float32").removeprefix("torch.")
    return {"architectures": [format.architectures[0]], "model_type": format.model_type, **values}


def read_format(folder: Path) -> Format | None:
    """Find the format of a folder; None for one without a config, or whose config is not of another system."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # loading the model says so
        return None
    return find_format(values, str(folder)) if isinstance(values, dict) else None

"""Tiny checkpoints of other systems, and a plain decoder that computes what they should."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import byte_tokenizer_without_mask
from torch import Tensor

from unmask.formats import FORMATS, Format, stored_name

VOCAB = 272
BY_NAME = {f"{one.name}-{one.family}" if one.name == "a2d" else one.name: one for one in FORMATS}
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "hidden_act": "silu",
    "eos_token_id": 258,
    "pad_token_id": 256,
    "torch_dtype": "float32",
}


def foreign_config(format: Format, **fields: Any) -> dict[str, Any]:
    """The `config.json` of a tiny checkpoint, in the keys of its system."""
    values = {**_SIZES, "mask_token_id": 259}
    if format.family == "qwen3":
        values["head_dim"] = 6
    if format.keys:
        ours = {name: key for key, name in format.keys.items()}
        values = {ours.get(key, key): value for key, value in values.items() if key in ours}
        values |= {"vocab_size": VOCAB - 3, **{k: v for k, v in format.fixed.items() if v is not None}}
    if format.name in ("fast-dllm-v2", "a2d"):  # the mask token is in the tokenizer alone
        del values["mask_token_id"]
    if format.block_key is not None:
        values[format.block_key] = 4
    architecture = format.architectures[0]
    auto_map = {"AutoModel": f"modeling.{architecture}"}
    return {
        "model_type": format.model_type,
        "architectures": [architecture],
        "auto_map": auto_map,
        **values,
        **fields,
    }


def random_weights(format: Format, *, tied: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Weights by the names of the stock decoder."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, heads, groups = 16, 24, 4, 2
    size = 6 if format.family == "qwen3" else hidden // heads

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.4

    weights = {"model.embed_tokens.weight": random(VOCAB, hidden), "model.norm.weight": 1 + random(hidden)}
    if not tied:
        weights["lm_head.weight"] = random(VOCAB, hidden)
    for layer in range(2):
        here = {
            "self_attn.q_proj.weight": random(heads * size, hidden),
            "self_attn.k_proj.weight": random(groups * size, hidden),
            "self_attn.v_proj.weight": random(groups * size, hidden),
            "self_attn.o_proj.weight": random(hidden, heads * size),
            "mlp.gate_proj.weight": random(inner, hidden),
            "mlp.up_proj.weight": random(inner, hidden),
            "mlp.down_proj.weight": random(hidden, inner),
            "input_layernorm.weight": 1 + random(hidden),
            "post_attention_layernorm.weight": 1 + random(hidden),
        }
        if format.family == "qwen2":
            here |= {
                f"self_attn.{n}_proj.bias": random(s * size)
                for n, s in (("q", heads), ("k", groups), ("v", groups))
            }
        if format.family == "qwen3":
            here |= {f"self_attn.{n}_norm.weight": 1 + random(size) for n in ("q", "k")}
        weights |= {f"model.layers.{layer}.{name}": tensor for name, tensor in here.items()}
    return weights


def foreign_folder(path: Path, format: Format, *, tied: bool = False, shards: int = 1, **fields: Any) -> Path:
    """Write a tiny checkpoint as its system would, in one file or several."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(foreign_config(format, **fields)))
    weights = {
        stored_name(name, format): tensor for name, tensor in random_weights(format, tied=tied).items()
    }
    if shards == 1:
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    else:
        names = list(weights)
        index = {
            name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)
        }
        for file in set(index.values()):
            part = {name: weights[name] for name in names if index[name] == file}
            save_file(part, path / file, metadata={"format": "pt"})
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    tokenizer = byte_tokenizer_without_mask()
    if format.name != "a2d":
        tokenizer.add_tokens([format.mask_token], special_tokens=True)
    tokenizer.save_pretrained(path)
    return path


def plain_logits(
    format: Format, weights: dict[str, Tensor], ids: list[int], block: list[int] | None = None
) -> Tensor:
    """Logits (L, V) of one text, float64, `logits[i]` predicting token i: a decoder written out.

    RMS norm, rotary embedding in halves, grouped heads, SwiGLU; every token sees all others, or those of its
    own and earlier blocks.
    """
    w = {name: tensor.double() for name, tensor in weights.items()}
    length, size = len(ids), 6 if format.family == "qwen3" else 4
    attend = torch.ones(length, length, dtype=torch.bool)
    if block is not None:
        attend = torch.tensor([[key <= query for key in block] for query in block])

    def norm(x: Tensor, scale: Tensor) -> Tensor:
        return x / (x.pow(2).mean(dim=-1, keepdim=True) + 1e-5).sqrt() * scale

    angle = torch.arange(length)[:, None] / 5000.0 ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    sine, cosine = (torch.cat([f(angle)] * 2, dim=1) for f in (torch.sin, torch.cos))

    def rotate(x: Tensor) -> Tensor:  # (heads, L, size)
        first, second = x.chunk(2, dim=-1)
        return x * cosine + torch.cat([-second, first], dim=-1) * sine

    def heads(x: Tensor, layer: str, name: str) -> Tensor:
        y = x @ w[f"{layer}self_attn.{name}_proj.weight"].T + w.get(f"{layer}self_attn.{name}_proj.bias", 0.0)
        y = y.view(length, -1, size).transpose(0, 1)
        if format.family == "qwen3" and name != "v":
            y = norm(y, w[f"{layer}self_attn.{name}_norm.weight"])
        return y

    x = w["model.embed_tokens.weight"][ids]
    for number in range(2):
        layer = f"model.layers.{number}."
        y = norm(x, w[f"{layer}input_layernorm.weight"])
        query, key = (rotate(heads(y, layer, name)) for name in ("q", "k"))
        key, value = (each.repeat_interleave(2, dim=0) for each in (key, heads(y, layer, "v")))
        score = (query @ key.transpose(1, 2) / math.sqrt(size)).masked_fill(~attend, -torch.inf)
        mixed = (score.softmax(dim=-1) @ value).transpose(0, 1).reshape(length, -1)
        x = x + mixed @ w[f"{layer}self_attn.o_proj.weight"].T
        y = norm(x, w[f"{layer}post_attention_layernorm.weight"])
        gate, up = (y @ w[f"{layer}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ w[f"{layer}mlp.down_proj.weight"].T
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    logits = norm(x, w["model.norm.weight"]) @ head.T
    return torch.cat([logits[:1], logits[:-1]]) if format.logit_shift else logits

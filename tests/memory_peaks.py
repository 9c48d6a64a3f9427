"""Prints estimated over measured peak memory of a training step of each of `CASES`, as JSON.

The peak is that of the resident set, which /proc/self/clear_refs sets back, above what the process had before
the model; each large tensor is a mapping of its own (MALLOC_MMAP_THRESHOLD_), given back when it is freed.
"""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import torch

from unmask import byte_tokenizer
from unmask.config import Recipe, recipe_from_dict
from unmask.diffusion.corrupt import corrupt
from unmask.diffusion.objective import Objective
from unmask.training.build import build_model
from unmask.training.memory import estimate
from unmask.training.metrics import peak_memory
from unmask.training.optim import make_optimizers
from unmask.training.parallel import Processes, SharedModel, batch_plan

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "large vocabulary": {"vocab_size": 30_000},
    "recomputed": {"gradient_checkpointing": True},
    "accumulated": {"micro_batch_size": 2},
    "muon": {"optimizer": {"type": "muon"}},
    "llama": {"model_type": "llama", "ema": {"decay": 0.9}},
}
GROUP = Processes(0, 1, torch.device("cpu"))


def recipe(vocab_size: int = 4_000, model_type: str = "qwen3", **changes: Any) -> Recipe:
    """A recipe of a model of some million parameters."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
    sizes = {"hidden_size": 256, "intermediate_size": 768, "max_position_embeddings": 512, **heads}
    config = {**sizes, "vocab_size": vocab_size, "model_type": model_type, "tie_word_embeddings": True}
    return recipe_from_dict(
        {
            "model": {"config": config, "tokenizer": "bytes", "attn_implementation": "sdpa"},
            "data": {"dataset_name": "none", "block_size": 256},
            "global_batch_size": 8,
            "precision": "fp32",
            **changes,
        }
    )


def clear_peak() -> int:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory(GROUP.device)


def ratio(settings: Recipe) -> float:
    """Take two steps, and compare the second one's peak with the estimate."""
    before = clear_peak()
    model = build_model(settings, byte_tokenizer())
    estimated = estimate(settings, model, 1, settings.data.block_size, "cpu")["peak"]
    shared = SharedModel(model, settings, GROUP)
    optimizers = make_optimizers(settings, model, shared.parameters)
    micro, accumulation = batch_plan(settings, 1)
    everything = Objective(eps=0.9999)  # every token is masked
    for _ in range(2):
        clear_peak()
        for _ in range(accumulation):
            inputs = model.prepare(torch.randint(0, 256, (micro, settings.data.block_size)))
            shared.loss(inputs, corrupt(inputs, everything), everything, 1.0).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return estimated / (peak_memory(GROUP.device) - before)


if __name__ == "__main__":
    torch.set_num_threads(1)
    ratio(recipe())  # what libraries allocate once
    print(json.dumps({name: ratio(recipe(**changes)) for name, changes in CASES.items()}), flush=True)
    os._exit(0)

"""How much memory a device needs for a run, by a formula, and what a run on 1 to 1,024 devices would need.

The formula counts tensors: the libraries, a device's context (about 1 GiB) and what its allocator leaves unused
come on top. Bytes saved for the backward pass were counted with `saved_tensors_hooks` on six geometries of
Qwen3 and Llama; `tests/test_memory.py` compares the sum with a measured peak.
"""

from __future__ import annotations

import os
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from unmask.config import Recipe
from unmask.errors import UnmaskError
from unmask.model.head import chunk_rows
from unmask.training.parallel import batch_plan

GIB = 2**30
COMMON = (8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 141, 192)  # GB of devices
STATIC = ("weights", "gradients", "optimizer", "average")  # what is there all the time, whatever the batch


def estimate(recipe: Recipe, model: Any, devices: int, length: int, device_type: str) -> dict[str, int]:
    """Estimate the bytes on one device by what they hold; `peak` is the most at any time of a step.

    Args:
        model: the denoiser; one on "meta" will do.
        length: tokens of the longest row.
    """
    config, sharded = model.config, recipe.distributed.type == "fsdp"
    micro, accumulation = batch_plan(recipe, devices)
    tokens, shards = micro * length, devices if sharded else 1
    held = 2 if recipe.model.dtype == "bfloat16" else 4  # bytes of a weight, and of one in a computation
    width = 2 if recipe.precision == "bf16" else held
    layer, layers = model.model.layers[0], config.num_hidden_layers
    head = model.get_output_embeddings().weight
    trained = [p for p in model.parameters() if p.requires_grad]
    per_layer = sum(p.numel() for p in layer.parameters())
    # 1. What stays; of other devices the weights of two layers and the head while they compute.
    weights = sum(p.numel() for p in model.parameters()) * held // shards
    gradients = sum(p.numel() for p in trained) * held // shards
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m.weight is not head}
    bytes_of = {
        "adamw": lambda p: 2 * held * p.numel(),
        "adamw_8bit": lambda p: 2 * p.numel(),
        "adafactor": lambda p: 4 * (sum(p.shape[-2:]) if p.dim() > 1 else p.numel()),
        "muon": lambda p: (1 if id(p) in matrices else 2) * held * p.numel(),
    }[recipe.optimizer.type]
    optimizer = sum(map(bytes_of, trained)) // shards
    average = gradients // held * 4 if recipe.ema.decay is not None else 0
    gathered = width * (head.numel() + 2 * per_layer) if sharded else 0
    # 2. What a layer saves of a token, and autocast's copies of its weights.
    hidden, inner = config.hidden_size, config.num_attention_heads * layer.self_attn.head_dim
    heads = inner + inner * config.num_key_value_heads // config.num_attention_heads
    kernel, on_cpu = recipe.model.attn_implementation, device_type == "cpu"
    eager = kernel == "eager" or (kernel == "auto" and width == 2 and on_cpu and length <= 512)
    saved = (24 if width == 4 else 26) * hidden + 2 * width * heads + 4 * width * config.intermediate_size
    saved += (4 + width) * heads if hasattr(layer.self_attn, "q_norm") else 0
    saved += config.num_attention_heads * (length * width if eager else 10)
    copies = 2 * per_layer if width < held and not sharded else 0
    one, ends = tokens * saved + copies, 9 * tokens * hidden
    backward = tokens * width * (3 * config.intermediate_size + 2 * hidden)
    activations = ends + layers * one
    if recipe.gradient_checkpointing:
        backward, activations = backward + one, ends + layers * (4 * tokens * hidden + copies)
    # 3. The head, in chunks of rows (see `unmask.model.head`), with its own gradient.
    chunks = chunk_rows(
        tokens, len(head), torch.bfloat16 if width == 2 else torch.float32, torch.device(device_type)
    )
    logits = (min(chunks.rows, tokens) * width + 2 * min(chunks.block, tokens) * 4) * len(head)
    logits += 2 * tokens * hidden * width + head.numel() * width * (head.requires_grad + (copies > 0))
    # 4. The most at once: at the head, in the first layer that is passed backward, or at the embedding.
    embedding = head.numel() * held if head.requires_grad else 0
    peak = max(activations + logits, activations + backward, ends + max(backward, embedding)) + gradients
    if accumulation == 1 and not sharded:  # gradients take the place of activations
        at_end = gradients + ends + max(backward, embedding)
        peak = max(activations + logits, embedding + activations + backward, at_end)
    return {
        **dict(zip(STATIC, (weights, gradients, optimizer, average), strict=True)),
        **{"gathered": gathered, "activations": activations, "head": logits, "backward": backward},
        "peak": peak + weights + optimizer + average + gathered,
    }


def memory_lines(
    recipe: Recipe, model: nn.Module, device: torch.device, devices: int, length: int
) -> list[str]:
    """Say how much memory a run will need, and what to change if it may not fit."""
    memory = estimate(recipe, model, devices, length, device.type)
    parts = ", ".join(f"{name} {_size(size)}" for name, size in memory.items() if size and name != "peak")
    lines = [f"memory: about {_size(memory['peak'])} of tensors a device at the peak ({parts})"]
    if device.type == "cpu":
        free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of a machine share its memory
    else:
        (free, total), sharing = torch.accelerator.get_memory_info(device), 1
    static, peak = sum(memory[name] for name in STATIC) * sharing, memory["peak"] * sharing
    advice = "try gradient_checkpointing=true, a lower micro_batch_size, distributed.type=fsdp or lora.r=16"
    if static > total:
        raise UnmaskError(
            f"memory: weights, gradients and optimizer need {_size(static)}, and {device.type} has"
            f" {_size(total)}; {advice}."
        )
    if peak > free:
        lines.append(f"note: a step needs about {_size(peak)}, and {_size(free)} are free; {advice}")
    return lines


def dry_run(
    recipe: Recipe, devices: int | None = None, console: Console | None = None
) -> dict[int, dict[str, int]]:
    """Show the memory that each device of a run would need; neither weights nor data are read."""
    from unmask.training.build import meta_model

    console = console or Console()
    model, found = meta_model(recipe), {}
    for count in [devices] if devices else [2**power for power in range(11)]:
        try:
            found[count] = estimate(recipe, model, count, recipe.data.block_size, "cuda")
        except UnmaskError:  # the batch cannot be divided
            if devices:
                raise
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    recomputed = ", activation checkpointing" if recipe.gradient_checkpointing else ""
    console.print(f"model: {total:,} parameters, {trained:,} trained", highlight=False)
    console.print(
        f"{recipe.distributed.type}, {recipe.precision}, weights {recipe.model.dtype},"
        f" {recipe.optimizer.type}{recomputed}",
        highlight=False,
    )
    table = Table(title="memory of one device, GiB", title_justify="left", box=None, header_style="bold")
    names = [
        name for name in next(iter(found.values()), {}) if any(memory[name] for memory in found.values())
    ]
    for name in ("devices", "batch", *names, "device"):
        table.add_column(name, justify="right", no_wrap=True)
    for count, memory in found.items():
        micro, accumulation = batch_plan(recipe, count)
        fits = next((f"{gb} GB" for gb in COMMON if memory["peak"] <= 0.9 * gb * 1e9), "none")
        sizes = (f"{memory[name] / GIB:.2f}" for name in names)
        table.add_row(f"{count}", f"{micro} x {accumulation} x {count}", *sizes, fits)
    console.print(table)
    console.print(
        "At the longest rows, with every token masked; not all parts are there at once. batch: rows of a forward"
        " pass x micro-batches x devices. device: the smallest common memory with a tenth to spare."
    )
    return found


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"

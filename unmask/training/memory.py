"""How much memory a device needs for a run, by a formula, and what a run on 1 to 1,024 devices would need.

The formula counts tensors: the libraries, a device's context (about 1 GiB) and what its allocator leaves unused
come on top. Bytes saved for the backward pass were counted with `saved_tensors_hooks` on six geometries of
Qwen3 and Llama; `tests/test_memory.py` compares the sum with a measured peak.
"""

from __future__ import annotations

import os
from contextlib import nullcontext, suppress
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from unmask.config import Recipe
from unmask.errors import UnmaskError
from unmask.model.head import chunk_rows
from unmask.training.build import meta_model
from unmask.training.parallel import batch_plan

GIB = 2**30
COMMON = (8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 141, 192)  # GB of devices
STATIC = ("weights", "gradients", "optimizer", "average")  # what is there all the time, whatever the batch
PARTS = ("gathered", "activations", "head", "recomputed")  # what is there for a part of a step


def estimate(recipe: Recipe, model: Any, devices: int, length: int, device_type: str) -> dict[str, int]:
    """Estimate the bytes on one device by what they hold; `peak` is the most at any time of a step.

    Args:
        model: the denoiser; one on "meta" will do.
        length: tokens of the longest row.
    """
    config, layer, head = model.config, model.model.layers[0], model.get_output_embeddings().weight
    tokens, layers = batch_plan(recipe, devices)[0] * length, config.num_hidden_layers
    sharded = recipe.distributed.type == "fsdp"
    held = 2 if recipe.model.dtype == "bfloat16" else 4  # bytes of a weight, and of one in a computation
    width = 2 if recipe.precision == "bf16" else held
    everything = sum(p.numel() for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    per_layer = sum(p.numel() for p in layer.parameters())
    # 1. What stays, and of other devices the weights of two layers and the head while they compute.
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m.weight is not head}
    state_of = {
        "adamw": lambda p: 2 * held * p.numel(),
        "adamw_8bit": lambda p: 2 * p.numel(),
        "adafactor": lambda p: 4 * (sum(p.shape[-2:]) if p.dim() > 1 else p.numel()),
        "muon": lambda p: (1 if id(p) in matrices else 2) * held * p.numel(),
    }[recipe.optimizer.type]
    learnt = sum(p.numel() for p in trained)
    static = {
        "weights": held * everything,
        "gradients": held * learnt,
        "optimizer": sum(map(state_of, trained)),
        "average": 4 * learnt if recipe.ema.decay is not None else 0,
    }
    static = {name: size // (devices if sharded else 1) for name, size in static.items()}
    gathered = width * (head.numel() + 2 * per_layer) if sharded else 0
    # 2. What a layer saves of its tokens for the backward pass, and autocast's copies of its weights.
    hidden, inner = config.hidden_size, config.num_attention_heads * layer.self_attn.head_dim
    heads = inner + inner * config.num_key_value_heads // config.num_attention_heads
    saved = 6 * 4 * hidden + width * (4 * heads + 4 * config.intermediate_size)
    if recipe.model.attn_implementation == "eager":
        saved += config.num_attention_heads * length * width
    one = tokens * saved + (2 * per_layer if width < held and not sharded else 0)
    recompute = recipe.gradient_checkpointing
    activations = layers * (4 * tokens * hidden if recompute else one)
    # 3. The head, in chunks of rows (see `unmask.model.head`).
    dtype = torch.bfloat16 if width == 2 else torch.float32
    rows = chunk_rows(tokens, len(head), dtype, torch.device(device_type)).rows
    logits = width * (rows * len(head) + 2 * tokens * hidden)
    recomputed = one if recompute else 0  # in the first layer, when the head is done
    peak = sum(static.values()) + gathered + activations + max(logits, recomputed)
    return {
        **static,
        **dict(zip(PARTS, (gathered, activations, logits, recomputed), strict=True)),
        "peak": peak,
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
    console = console or Console()
    model, found = meta_model(recipe), {}
    for count in [devices] if devices else [2**power for power in range(11)]:
        with nullcontext() if devices else suppress(UnmaskError):  # the batch cannot be divided
            found[count] = estimate(recipe, model, count, recipe.data.block_size, "cuda")
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    recomputed = ", activation checkpointing" if recipe.gradient_checkpointing else ""
    console.print(
        f"model: {total:,} parameters, {trained:,} trained\n{recipe.distributed.type}, {recipe.precision}, weights"
        f" {recipe.model.dtype}, {recipe.optimizer.type}{recomputed}",
        highlight=False,
    )
    names = [name for name in (*STATIC, *PARTS, "peak") if any(memory[name] for memory in found.values())]
    table = Table(title="memory of one device, GiB", title_justify="left", box=None, header_style="bold")
    lines, columns = ["memory of one device, GiB"], ("devices", "batch", *names, "device")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for count, memory in found.items():
        micro, accumulation = batch_plan(recipe, count)
        fits = next((f"{gb} GB" for gb in COMMON if memory["peak"] <= 0.9 * gb * 1e9), "none")
        sizes = (f"{memory[name] / GIB:.2f}" for name in names)
        cells = (f"{count}", f"{micro} x {accumulation} x {count}", *sizes, fits)
        table.add_row(*cells)
        lines.append("; ".join(f"{name} {cell}" for name, cell in zip(columns, cells, strict=True)))
    narrow = console.measure(table, options=console.options.update(width=1000)).maximum > console.width
    console.print(
        "\n".join(lines) if narrow else table,
        "At the longest rows, with every token masked; not all parts are there at once. batch: rows of a forward"
        " pass x micro-batches x devices. device: the smallest common memory with a tenth to spare.",
    )
    return found


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"

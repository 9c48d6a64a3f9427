"""How much memory a device needs for a run, by a formula, and what a run on 1 to 1,024 devices would need.

The formula counts tensors: the libraries, a device's context (about 1 GiB) and what its allocator leaves unused
come on top. Bytes saved for the backward pass were counted with `saved_tensors_hooks` on six geometries of
Qwen3 and Llama; `tests/test_memory.py` compares the sum with a measured peak.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from math import ceil
from typing import Any, cast

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
SPARE = 0.9  # of a device's memory that may be used


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by what they hold; `peak` is the most at any time of a step."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    gathered: int
    """Weights of other devices while a layer computes (FSDP)."""
    activations: int
    head: int
    """Logits and gradients of the output head while its loss is computed."""
    backward: int
    """Gradients of activations while one layer computes, with checkpointing also what it computes again."""
    peak: int

    @property
    def static(self) -> int:
        """What is there all the time, whatever the batch."""
        return self.weights + self.optimizer + self.average + self.gradients

    def parts(self) -> list[tuple[str, int]]:
        """The parts that are there, with their bytes."""
        named = [(item.name, getattr(self, item.name)) for item in fields(self)[:-1]]
        return [(name, size) for name, size in named if size]


def estimate(recipe: Recipe, model: nn.Module, devices: int, length: int, device_type: str) -> Memory:
    """Estimate the memory of one device.

    Args:
        model: the denoiser; one on "meta" will do.
        length: tokens of the longest row.
    """
    any_model = cast(Any, model)
    config, sharded = any_model.config, recipe.distributed.type == "fsdp"
    micro, accumulation = batch_plan(recipe, devices)
    tokens = micro * length
    parted = devices if sharded else 1
    held = torch.empty(0, dtype=getattr(torch, recipe.model.dtype)).element_size()
    bf16 = recipe.precision == "bf16" or held == 2
    width = 2 if bf16 else 4
    head_weight = any_model.get_output_embeddings().weight
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    layer = sum(p.numel() for p in any_model.model.layers[0].parameters())
    layers = config.num_hidden_layers

    # 1. What stays.
    weights, gradients = ceil(total * held / parted), ceil(trained * held / parted)
    optimizer = ceil(_optimizer_bytes(recipe, any_model, held) / parted)
    average = ceil(trained * 4 / parted) if recipe.ema.decay is not None else 0
    gathered = width * (head_weight.numel() + 2 * layer) if sharded else 0
    copies = 2 * layer if bf16 and held > 2 and not sharded else 0  # of a layer's weights by autocast
    # 2. Bytes that one layer saves for a token.
    inner = config.num_attention_heads * any_model.model.layers[0].self_attn.head_dim
    heads = inner + inner * config.num_key_value_heads // config.num_attention_heads
    saved = (24 if width == 4 else 26) * config.hidden_size + 2 * width * heads
    saved += 4 * width * config.intermediate_size
    if hasattr(any_model.model.layers[0].self_attn, "q_norm"):
        saved += (4 + width) * heads
    kernel = recipe.model.attn_implementation
    eager = kernel == "eager" or (kernel == "auto" and bf16 and device_type == "cpu" and length <= 512)
    saved += config.num_attention_heads * (length * width if eager else 10)
    one, rest = tokens * saved + copies, 9 * tokens * config.hidden_size
    passing = tokens * width * (3 * config.intermediate_size + 2 * config.hidden_size)
    if recipe.gradient_checkpointing:
        activations, backward = rest + layers * (4 * tokens * config.hidden_size + copies), one + passing
    else:
        activations, backward = rest + layers * one, passing
    # 3. The head, in chunks of rows: see `unmask.model.head`.
    learned = head_weight.requires_grad
    vocab = len(head_weight)
    dtype = torch.bfloat16 if bf16 else torch.float32
    chunks = chunk_rows(tokens, vocab, dtype, torch.device(device_type))
    head = min(chunks.rows, tokens) * vocab * width + 2 * min(chunks.block, tokens) * vocab * 4
    head += 2 * tokens * config.hidden_size * width
    head += head_weight.numel() * width * (int(learned) + int(copies > 0))
    # 4. The most at once: at the head, in the first layer that is passed backward, or at the embedding.
    stays = weights + optimizer + average + gathered
    embedding = head_weight.numel() * held if learned else 0
    at_head, at_start, at_end = activations + head, activations + backward, rest + max(backward, embedding)
    if accumulation > 1 or sharded:
        peak = stays + gradients + max(at_head, at_start, at_end)
    else:  # gradients take the place of activations
        peak = stays + max(at_head, embedding + at_start, gradients + at_end)
    return Memory(weights, gradients, optimizer, average, gathered, activations, head, backward, peak)


def _optimizer_bytes(recipe: Recipe, model: Any, held: int) -> int:
    """Bytes of the optimizer's state of the whole model."""
    kind, head = recipe.optimizer.type, model.get_output_embeddings()
    hidden = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m is not head}
    size = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        count = parameter.numel()
        if kind == "adamw_8bit":
            size += 2 * count
        elif kind == "adafactor":
            size += 4 * (sum(parameter.shape[-2:]) if parameter.dim() > 1 else count)
        else:
            size += (1 if kind == "muon" and id(parameter) in hidden else 2) * held * count
    return size


def memory_lines(
    recipe: Recipe, model: nn.Module, device: torch.device, devices: int, length: int
) -> list[str]:
    """Say how much memory a run will need, and what to change if it may not fit.

    Raises:
        UnmaskError: weights, gradients and optimizer alone are more than the device has.
    """
    memory = estimate(recipe, model, devices, length, device.type)
    whole = ", ".join(f"{name} {_size(size)}" for name, size in memory.parts())
    lines = [f"memory: about {_size(memory.peak)} of tensors a device at the peak ({whole})"]
    if device.type == "cpu":
        virtual = psutil.virtual_memory()
        free, total = virtual.available, virtual.total
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of a machine share its memory
    else:
        (free, total), sharing = torch.accelerator.get_memory_info(device), 1
    has = f"{device.type} has {total / GIB:.1f} GiB"
    advice = ", ".join(_advice(recipe, memory, batch_plan(recipe, devices)[0]))
    if memory.static * sharing > total:
        raise UnmaskError(
            f"memory: weights, gradients and optimizer need {memory.static * sharing / GIB:.1f} GiB, and {has};"
            f" try {advice}."
        )
    if memory.peak * sharing > free:
        lines.append(
            f"note: a step needs about {memory.peak * sharing / GIB:.1f} GiB of memory, and {has}, of which"
            f" {free / GIB:.1f} GiB are free; if it does not fit, try {advice}"
        )
    return lines


def _advice(recipe: Recipe, memory: Memory, micro: int) -> list[str]:
    """Recipe keys that would lower the memory most."""
    ways = []
    if not recipe.gradient_checkpointing and memory.activations > memory.peak / 4:
        ways.append("gradient_checkpointing=true")
    if micro > 1 and memory.peak - memory.static > memory.peak / 4:
        ways.append(f"micro_batch_size={micro // 2}")
    ways.append(
        "more devices" if recipe.distributed.type == "fsdp" else "distributed.type=fsdp on several devices"
    )
    if recipe.lora.r is None and recipe.model.name_or_path is not None:
        ways.append("lora.r=16")
    if recipe.optimizer.type == "adamw":
        ways.append("optimizer.type=adafactor")
    return ways


def dry_run(recipe: Recipe, devices: int | None = None, console: Console | None = None) -> dict[int, Memory]:
    """Show the memory that each device of a run would need; neither weights nor data are read.

    Raises:
        UnmaskError: the config of the model cannot be read or made, or the batch cannot be divided.
    """
    from unmask.training.build import meta_model

    console = console or Console()
    model = meta_model(recipe)
    found = {}
    for count in [devices] if devices else [2**power for power in range(11)]:
        if recipe.distributed.type == "fsdp" and count == 1:
            continue
        try:
            found[count] = estimate(recipe, model, count, recipe.data.block_size, "cuda")
        except UnmaskError:
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
    names = [name for name, _ in next(iter(found.values())).parts()] if found else []
    for name in ("devices", "batch", *names, "peak", "device"):
        table.add_column(name, justify="right", no_wrap=True)
    for count, memory in found.items():
        micro, accumulation = batch_plan(recipe, count)
        fits = next((gb for gb in COMMON if memory.peak <= SPARE * gb * 1e9), None)
        sizes = (f"{getattr(memory, name) / GIB:.2f}" for name in (*names, "peak"))
        table.add_row(
            f"{count}", f"{micro} x {accumulation} x {count}", *sizes, f"{fits} GB" if fits else "none"
        )
    console.print(table)
    console.print(
        "At the longest rows, with every token masked; not all parts are there at once. batch: rows of a forward"
        " pass x micro-batches x devices. device: the smallest common memory with a tenth to spare."
    )
    return found


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"

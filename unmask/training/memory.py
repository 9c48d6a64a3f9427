"""How much memory a device needs for a run, judged before the run.

Sizes are of tensors alone: the libraries themselves, a device's context (about 1 GiB) and what its allocator
leaves unused come on top.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import ceil
from typing import Any, cast

import psutil
import torch
from torch import nn

from unmask.errors import UnmaskError
from unmask.model.head import chunk_rows
from unmask.recipe import Recipe
from unmask.training.outline import Saved, saved_bytes, uses_autocast, weight_dtype
from unmask.training.parallel import batch_plan, zero_stage

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by what they hold."""

    weights: int
    """The weights this device keeps, and with DeepSpeed its share of their copy in float32."""
    gradients: int
    """Under DDP twice: its copies of them are added up over the devices."""
    optimizer: int
    average: int
    """The moving average of the weights."""
    gathered: int
    """Weights of other devices, while a block is at work (FSDP, ZeRO-3)."""
    activations: int
    """What the forward pass keeps for the backward pass, without the head."""
    head: int
    """Logits and gradients of the output head while its loss is computed."""
    backward: int
    """Passing gradients while one block is at work, and with checkpointing what it computes again."""
    peak: int
    """The most at any time of a step. Not all of the above are there at once."""

    @property
    def static(self) -> int:
        """What is there all the time, whatever the batch: no smaller micro-batch avoids it."""
        return self.weights + self.optimizer + self.average + self.gradients


@dataclass(frozen=True)
class Sizes:
    """Numbers of elements of a model's parameters."""

    total: int
    learning: int
    block: int
    """Of one decoder layer, the largest."""
    head: int
    """Of the output head."""
    tied: bool
    """Whether the head is the embedding."""
    head_learns: bool
    optimizer: int
    """Bytes of the optimizer's state."""


def sizes_of(model: nn.Module, recipe: Recipe) -> Sizes:
    """Count a model's parameters; "meta" does."""
    any_model: Any = model
    layers = [m for m in model.modules() if type(m).__name__ in (any_model._no_split_modules or ())]
    head, embedding = any_model.get_output_embeddings().weight, any_model.get_input_embeddings().weight
    parameters = list(model.parameters())
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} - {id(head)}
    return Sizes(
        total=sum(p.numel() for p in parameters),
        learning=sum(p.numel() for p in parameters if p.requires_grad),
        block=max((sum(p.numel() for p in layer.parameters()) for layer in layers), default=0),
        head=head.numel(),
        tied=head is embedding,
        head_learns=head.requires_grad,
        optimizer=sum(_state(p, recipe, id(p) in linear) for p in parameters if p.requires_grad),
    )


def _state(parameter: nn.Parameter, recipe: Recipe, hidden: bool) -> int:
    """Bytes of the optimizer's state for a parameter."""
    kind, count = recipe.optimizer.type, parameter.numel()
    size = weight_dtype(recipe, computing=False).itemsize
    if kind == "adamw_8bit":
        return 2 * count
    if kind == "adafactor":
        if parameter.dim() > 1:
            count = count // parameter.shape[-1] + count // parameter.shape[-2]
        return 4 * count
    return (1 if kind == "muon" and hidden else 2) * size * count


def estimate(
    recipe: Recipe, config: Any, sizes: Sizes, saved: Saved, devices: int, length: int, device_type: str
) -> Memory:
    """Judge the memory of one device.

    Args:
        recipe: settles how the model is shared, the types and the optimizer.
        config: of the model.
        sizes: see `sizes_of`.
        saved: what a forward of this recipe's micro-batch saves; see `saved_bytes`.
        devices: processes, one a device.
        length: tokens of a row.
        device_type: "cpu", "cuda" and so on; the head chooses its chunks by it.
    """
    kind, zero = recipe.distributed.type, zero_stage(recipe)
    micro, accumulation = batch_plan(recipe, devices)
    held = weight_dtype(recipe, computing=False).itemsize
    computed = 2 if recipe.precision == "bf16" else held
    width = weight_dtype(recipe, computing=True).itemsize
    parted = {"ddp": 1, "fsdp": devices, "deepspeed": devices}[kind]

    def share(count: int, divided: bool = True) -> int:
        return ceil(count / parted) if divided else count

    # What stays.
    if kind == "deepspeed":  # the weights in bf16, their copy in float32 divided
        weights = share(sizes.total * width, zero == 3) + (share(sizes.learning * 4) if width < 4 else 0)
        gradients = share(sizes.learning * width, zero >= 2)
    else:
        weights, gradients = share(sizes.total * held), share(sizes.learning * held)
    optimizer = share(sizes.optimizer)
    average = share(sizes.learning * 4) if recipe.ema.decay is not None else 0

    # What a micro-batch needs.
    tokens, layers = micro * length, config.num_hidden_layers
    casts = 2 * (sizes.block if uses_autocast(recipe) and held > 2 else 0)
    gathered = 0
    if kind == "fsdp" or zero == 3:  # the head's unit, the block at work, and the one that comes next
        gathered = width * (sizes.head + 2 * sizes.block)
    head = _head_bytes(config, sizes, tokens, computed, device_type, casts > 0)
    # Of one block: the gradients of its three widest tensors and of its output, and of its weights.
    passing = tokens * (3 * config.intermediate_size * computed + 2 * config.hidden_size * computed)
    passing += sizes.block * (computed if kind == "ddp" else 3 * width) if sizes.learning else 0
    if recipe.gradient_checkpointing:
        activations = saved.rest + layers * saved.layer_input
        at_head = activations + layers * casts + head  # autocast keeps its copies until the forward ends
        backward = saved.layer + passing
    else:
        activations = saved.rest + layers * saved.layer
        at_head = activations + head
        backward = passing
    at_start = activations + backward
    # The embedding comes last, and its gradient has a row for every id.
    embedding = sizes.head * held if sizes.head_learns else 0
    if gathered and sizes.head_learns:  # whole, until it is added up over the devices in float32
        at_start += sizes.head * width
        embedding = sizes.head * (width + 4)
    at_end = saved.rest + max(backward, embedding)
    stays = weights + optimizer + average + gathered
    copies = gradients if kind == "ddp" and devices > 1 else 0  # what DDP adds up over the devices
    if accumulation > 1 or parted > 1:
        peak = stays + copies + gradients + max(at_head, at_start, at_end)
    else:  # gradients take the place of activations
        first = sizes.head * held if sizes.head_learns else 0
        peak = stays + copies + max(at_head, first + at_start, gradients + at_end)
    gradients += copies
    return Memory(weights, gradients, optimizer, average, gathered, activations, head, backward, peak)


def _head_bytes(config: Any, sizes: Sizes, tokens: int, computed: int, device_type: str, casts: bool) -> int:
    """What `weighted_nll` needs at once if every token is masked: see `unmask.model.head`."""
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[computed]
    vocab = config.vocab_size
    chunks = chunk_rows(tokens, vocab, dtype, torch.device(device_type))
    logits = min(chunks.rows, tokens) * vocab * computed + 2 * min(chunks.block, tokens) * vocab * 4
    hidden = 2 * tokens * config.hidden_size * computed  # the masked rows and their gradient
    weight = sizes.head * computed * (int(sizes.head_learns) + int(casts))
    return logits + hidden + weight


def device_memory(device: torch.device) -> tuple[int, int]:
    """Bytes of a device: (free now, all). Of a CPU its memory, shared by the processes on this machine."""
    if device.type == "cpu":
        memory = psutil.virtual_memory()
        return memory.available, memory.total
    free, total = torch.accelerator.get_memory_info(device)
    return free, total


def what_to_change(recipe: Recipe, memory: Memory, micro: int) -> str:
    """Name the recipe keys that would lower the memory most."""
    ways = []
    if not recipe.gradient_checkpointing and memory.activations > memory.peak / 4:
        ways.append("gradient_checkpointing=true")
    if micro > 1 and memory.peak - memory.static > memory.peak / 4:
        ways.append(f"micro_batch_size={micro // 2}")
    if recipe.distributed.type == "ddp":
        ways.append("distributed.type=fsdp on several devices")
    else:
        ways.append("more devices")
    if recipe.lora.r is None and recipe.model.name_or_path is not None:
        ways.append("lora.r=16")
    if recipe.optimizer.type == "adamw":
        ways.append("optimizer.type=adafactor")
    return ", ".join(ways)


def judge(recipe: Recipe, memory: Memory, micro: int, device: torch.device) -> str | None:
    """Compare an estimate with the memory there is: a warning, or None where it fits.

    Raises:
        UnmaskError: weights, gradients and optimizer alone are more than the device has.
    """
    free, total = device_memory(device)
    # The processes of a machine share its CPU's memory; every other device is of one process.
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    need, at_least = memory.peak * sharing, memory.static * sharing
    has = f"{device.type} has {total / GIB:.1f} GiB"
    if at_least > total:
        raise UnmaskError(
            f"memory: weights, gradients and optimizer need {at_least / GIB:.1f} GiB, and {has}; try"
            f" {what_to_change(recipe, memory, micro)}."
        )
    if need > free:
        return (
            f"note: a step needs about {need / GIB:.1f} GiB of memory, and {has}, of which"
            f" {free / GIB:.1f} GiB are free; if it does not fit, try"
            f" {what_to_change(recipe, memory, micro)}"
        )
    return None


def memory_lines(
    recipe: Recipe, model: nn.Module, device: torch.device, processes: int, length: int
) -> list[str]:
    """Say how much memory a run will need, and what to change if it may not fit.

    Args:
        recipe: what is going to be trained.
        model: the model, before it is wrapped.
        device: of this process.
        processes: of the run, one a device.
        length: most tokens of a row.

    Raises:
        UnmaskError: see `judge`.
    """
    config, (micro, _) = cast(Any, model).config, batch_plan(recipe, processes)
    saved = saved_bytes(recipe, config, micro, length)
    memory = estimate(recipe, config, sizes_of(model, recipe), saved, processes, length, device.type)
    whole = ", ".join(f"{name} {_said(size)}" for name, size in parts(memory))
    warning = judge(recipe, memory, micro, device)
    line = f"memory: about {_said(memory.peak)} of tensors a device at the peak ({whole})"
    return [line] if warning is None else [line, warning]


def parts(memory: Memory) -> list[tuple[str, int]]:
    """The parts that are there, with their bytes."""
    names = ("weights", "gradients", "optimizer", "average", "gathered", "activations", "head", "backward")
    return [(name, getattr(memory, name)) for name in names if getattr(memory, name)]


def _said(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"

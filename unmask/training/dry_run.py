"""`unmask train RECIPE --dry-run`: what a run would take on any number of devices; no weights, no data."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from unmask.errors import UnmaskError
from unmask.recipe import Recipe
from unmask.training.memory import GIB, Memory, Sizes, estimate, parts, sizes_of
from unmask.training.outline import model_config, outline, saved_bytes
from unmask.training.parallel import batch_plan, zero_stage

COMMON = (16, 24, 40, 48, 80, 141, 192)  # GB of memory that accelerators come with
SPARE = 0.9  # the share of it that tensors can have


def dry_run(recipe: Recipe, devices: int | None = None, console: Console | None = None) -> dict[int, Memory]:
    """Print and return the memory that a device of an accelerator needs, for each number of devices.

    Args:
        recipe: what would be trained.
        devices: a number of devices; by default 1, 2, 4 and so on while the global batch can be divided.
        console: where it is printed; the terminal by default.

    Raises:
        UnmaskError: no config of the model, or a batch that cannot be divided over `devices`.
    """
    if console is None:
        console = Console(highlight=False)
        console.width = max(console.width, 110)  # or a column of the table would break in the middle
    if recipe.precision == "auto":  # an accelerator without bf16 is rare
        recipe = recipe.model_copy(update={"precision": "bf16"})
    config = model_config(recipe)
    model = outline(recipe, config)
    sizes = sizes_of(model, recipe)
    found: dict[int, Memory] = {}
    for count in [devices] if devices is not None else _counts(recipe):
        micro, _ = batch_plan(recipe, count)
        saved = saved_bytes(recipe, config, micro, recipe.data.block_size)
        length = recipe.data.block_size
        found[count] = estimate(recipe, config, sizes, saved, count, length, device_type="cuda")
    for line in _lines(recipe, config, model, sizes):
        console.print(line, markup=False)
    console.print(_table(recipe, found))
    console.print(
        "At the longest rows, with every token masked; not all parts are there at once. batch: rows of a"
        " forward x forwards of a step x devices. device: the smallest common memory that holds the peak"
        " with a tenth to spare."
    )
    return found


def _counts(recipe: Recipe) -> list[int]:
    """Numbers of devices worth a row."""
    counts = []
    for count in (2**power for power in range(11)):
        if count == 1 and recipe.distributed.type == "fsdp":
            continue  # there is nobody to share with
        try:
            batch_plan(recipe, count)
        except UnmaskError:
            continue
        counts.append(count)
    return counts


def _lines(recipe: Recipe, config: Any, model: nn.Module, sizes: Sizes) -> list[str]:
    layers = f"{config.num_hidden_layers} blocks of {_many(sizes.block)} parameters"
    ends = f"embedding and head, {'one weight' if sizes.tied else 'each'} of {_many(sizes.head)}"
    rows = recipe.global_batch_size
    tokens = recipe.max_steps * rows * recipe.data.block_size
    learning = "" if sizes.learning == sizes.total else f", of which {_many(sizes.learning)} learn"
    plan = {
        "ddp": "every device holds all of it and a part of the batch",
        "fsdp": f"{config.num_hidden_layers} units of a block each, one of head and final norm"
        f"{' with' if sizes.tied else ', one of'} the embedding; each is divided over all devices, and"
        " gathered while it is at work",
        "deepspeed": f"ZeRO-{zero_stage(recipe) or ''} as {recipe.distributed.deepspeed_config} says; its"
        " buffers come on top",
    }[recipe.distributed.type]
    recomputed = ", activations computed again" if recipe.gradient_checkpointing else ""
    return [
        f"model: {_many(sizes.total)} parameters{learning}; {layers}; {ends}",
        f"{recipe.distributed.type}: {plan}",
        f"computation: {recipe.precision}, weights {recipe.model.dtype}, {recipe.optimizer.type}{recomputed}",
        f"steps: {recipe.max_steps:,} of {rows:,} rows of at most {recipe.data.block_size:,} tokens, at most"
        f" {_many(tokens)} tokens",
    ]


def _table(recipe: Recipe, found: dict[int, Memory]) -> Table:
    table = Table(title="memory of one device, GiB", title_justify="left", box=None, header_style="bold")
    names = [name for name, _ in parts(next(iter(found.values())))] if found else []
    for name in ("devices", "batch", *names, "peak", "device"):
        table.add_column(name, justify="right", no_wrap=True)
    for count, memory in found.items():
        micro, accumulation = batch_plan(recipe, count)
        fits = next((gb for gb in COMMON if memory.peak <= SPARE * gb * 1e9), None)
        table.add_row(
            f"{count}",
            f"{micro} x {accumulation} x {count}",
            *(f"{getattr(memory, name) / GIB:.2f}" for name in names),
            f"{memory.peak / GIB:.2f}",
            f"{fits} GB" if fits else "none",
        )
    return table


def _many(count: int) -> str:
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.3g} {name}"
    return f"{count:,}"

"""The processes of a run, started by torchrun, and how they share the model: DDP or FSDP2."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from unmask.config import Recipe
from unmask.errors import UnmaskError

_ENTRIES = ("diffusion_loss", "masked_nll", "generate")  # of a sharded model: each gathers weights as it goes


class Processes:
    """This process among those of the run, one a device; the first one is `main`."""

    def __init__(self, rank: int, ranks: int, device: torch.device):
        self.rank, self.ranks, self.device = rank, ranks, device
        self.main = rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor over the processes, in place."""
        if self.ranks > 1:
            dist.all_reduce(values)
        return values

    def gather(self, item: Any) -> list[Any]:
        """Collect one object of each process, on all of them."""
        if self.ranks == 1:
            return [item]
        items: list[Any] = [None] * self.ranks
        dist.all_gather_object(items, item)
        return items

    def on_main(self, act: Any) -> Any:
        """Call `act` on the first process; its result, or its `UnmaskError`, is that of all processes."""
        result: list[Any] = [None]
        if self.main:
            try:
                result = [act()]
            except UnmaskError as error:
                result = [error]
        if self.ranks > 1:
            dist.broadcast_object_list(result)
        if isinstance(result[0], UnmaskError):
            raise result[0]
        return result[0]

    def together(self, act: Any) -> None:
        """Call `act` on every process; an `UnmaskError` of one is raised on all."""
        failed: UnmaskError | None = None
        try:
            act()
        except UnmaskError as error:
            failed = error
        failures = [error for error in self.gather(failed) if error is not None]
        if failures:
            raise failures[0]

    def wait(self) -> None:
        """Wait for the others."""
        if self.ranks > 1:
            dist.barrier()


@contextmanager
def processes() -> Iterator[Processes]:
    """Join the processes that torchrun started, each with a device of its own."""
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
        accelerator = torch.accelerator.current_accelerator()
        assert accelerator is not None
        device = torch.device(accelerator.type, torch.accelerator.current_device_index())
    mine = ranks > 1 and not dist.is_initialized()
    if mine:
        dist.init_process_group(device_id=None if device.type == "cpu" else device)
    try:
        yield Processes(rank, ranks, device)
    finally:
        if mine:
            dist.destroy_process_group()


def batch_plan(recipe: Recipe, ranks: int) -> tuple[int, int]:
    """Divide the global batch: (sequences of a micro-batch, micro-batches of an optimizer step).

    Raises:
        UnmaskError: it cannot be divided evenly.
    """
    total, micro = recipe.global_batch_size, recipe.micro_batch_size
    if total % ranks:
        raise UnmaskError(
            f"global_batch_size: {total} sequences cannot be divided evenly over {ranks} processes; set it to"
            f" {-(-total // ranks) * ranks}."
        )
    micro = micro or total // ranks
    if total % (micro * ranks):
        raise UnmaskError(
            f"global_batch_size: {total} is not a multiple of micro_batch_size {micro} times {ranks} processes"
            f" = {micro * ranks}; set it to {-(-total // (micro * ranks)) * micro * ranks}, or change one of"
            " the others."
        )
    return micro, total // (micro * ranks)


def check_sharding(recipe: Recipe, ranks: int) -> None:
    """Refuse FSDP on one process.

    Raises:
        UnmaskError: there is nobody to share with.
    """
    if recipe.distributed.type == "fsdp" and ranks == 1:
        raise UnmaskError(
            "distributed.type: fsdp shards the model over several processes, and this is one; start them with"
            " torchrun --nproc_per_node=N -m unmask train ..., or set distributed.type=ddp."
        )


class _DiffusionLoss(nn.Module):
    """The loss as the `forward` that DistributedDataParallel wraps."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, *arguments: Any) -> Tensor:
        return self.model.diffusion_loss(*arguments)


class SharedModel:
    """A model as the processes of a run share it.

    Attributes:
        model: the denoiser itself, with adapters in it where there are some; sharded in place under FSDP.
        parameters: the trainable ones by name, those of this process under FSDP (`DTensor`).
        sharded: whether each process has only its part of them.
    """

    def __init__(self, model: Any, recipe: Recipe, group: Processes):
        self.model, self.group = model, group
        self.sharded = recipe.distributed.type == "fsdp"
        bf16 = recipe.precision == "bf16"
        if recipe.gradient_checkpointing:
            recompute_activations(model)
        if self.sharded:
            shard(model, bf16, group)
            if any(p.is_meta for p in model.parameters()):
                load_shards(model, str(recipe.model.name_or_path), group.device)
            self.module: nn.Module = model
        else:
            model.to(group.device)
            self.module = _DiffusionLoss(model)
        if recipe.torch_compile:
            model.model.compile()
        if group.ranks > 1 and not self.sharded:
            self.module = DistributedDataParallel(self.module, gradient_as_bucket_view=True)
        self.autocast_dtype = torch.bfloat16 if bf16 and not self.sharded else None
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(self, *arguments: Any) -> Tensor:
        """`model.diffusion_loss(...)`, in the precision of the recipe."""
        with self.autocast():
            return self.model.diffusion_loss(*arguments) if self.sharded else self.module(*arguments)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the model computes."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.group.device.type, self.autocast_dtype)

    def accumulating(self) -> AbstractContextManager[Any]:
        """Add gradients up on this process alone; under FSDP they would not fit, and are summed each time."""
        return self.module.no_sync() if isinstance(self.module, DistributedDataParallel) else nullcontext()

    def reshard(self) -> None:
        """Give gathered weights back after an evaluation, which has no backward pass to do so."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def shard(model: Any, bf16: bool, group: Processes) -> None:
    """Shard a model over the processes in place: each decoder layer, then all the rest (FSDP2).

    Gradients are summed in float32; the inputs (noise, divisors) keep their precision.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32 if bf16 else None,
        cast_forward_inputs=False,
    )
    mesh = init_device_mesh(group.device.type, (group.ranks,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for name in _ENTRIES:
        register_fsdp_forward_method(model, name)


@torch.no_grad()
def load_shards(model: Any, name: str, device: torch.device) -> None:
    """Give a sharded model on "meta" its weights, of which this process reads its own part from the disk.

    Rows of the embedding and the head that the checkpoint does not have become the mean of the others.

    Args:
        name: folder or hub name of a checkpoint in safetensors.

    Raises:
        UnmaskError: a weight is missing, or has another shape.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    model.to_empty(device=device)
    # Its buffers are computed, and in no checkpoint.
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=model.config).to(device)
    files = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            files.update(dict.fromkeys(opened.keys(), file))
    for key, parameter in model.named_parameters():
        if key not in files:
            raise UnmaskError(f"{name}: the checkpoint is incomplete: {key} is missing.")
        with safe_open(files[key], framework="pt") as opened:
            whole = opened.get_tensor(key)  # in mapped memory: what is not used is not read
        new_rows = len(parameter) - len(whole)
        if whole.shape[1:] != parameter.shape[1:] or new_rows < 0:
            raise UnmaskError(
                f"{name}: {key} has shape {tuple(whole.shape)}; by its config.json it must be"
                f" {tuple(parameter.shape)}."
            )
        if new_rows:
            mean = whole.float().mean(dim=0, keepdim=True).to(whole.dtype)
            whole = torch.cat([whole, mean.expand(new_rows, -1)])
        part = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(part.to_local())


def recompute_activations(model: Any) -> None:
    """Drop activations in the forward pass and compute them again in the backward pass."""
    # transformers 5.24 renamed this method.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})

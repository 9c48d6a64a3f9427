"""The processes of a run, started by torchrun, and how they share the model: DDP or FSDP2."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from unmask.config import Recipe
from unmask.errors import UnmaskError
from unmask.formats import read_format, stored_name


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
        items: list[Any] = [item] * self.ranks
        if self.ranks > 1:
            dist.all_gather_object(items, item)
        return items

    def together(self, act: Callable[[], Any]) -> None:
        """Call `act` on every process; an `UnmaskError` of one is raised on all."""
        error: UnmaskError | None = None
        try:
            act()
        except UnmaskError as raised:
            error = raised
        for failure in self.gather(error):
            if failure is not None:
                raise failure

    def on_main(self, act: Callable[[], Any]) -> Any:
        """Call `act` on the first process; its result, or its `UnmaskError`, is that of all processes."""
        result: list[Any] = []
        self.together(lambda: result.append(act() if self.main else None))
        return self.gather(result[0])[0]


@contextmanager
def processes() -> Iterator[Processes]:
    """Join the processes that torchrun started, each with its own device."""
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
        device = torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))
        torch.accelerator.set_device_index(device.index)
    joined = ranks > 1 and not dist.is_initialized()
    if joined:
        dist.init_process_group(device_id=None if device.type == "cpu" else device)
    try:
        yield Processes(rank, ranks, device)
        if joined:
            dist.barrier()  # none leaves while another still speaks to it
    finally:
        if joined:
            # The models of the run hold the group, in cycles: its threads would outlive it, and one that frees a
            # tensor while Python ends aborts the process ("terminate called without an active exception").
            gc.collect()
            dist.destroy_process_group()


def batch_plan(recipe: Recipe, ranks: int) -> tuple[int, int]:
    """Divide the global batch: (sequences of a micro-batch, micro-batches of an optimizer step)."""
    if recipe.distributed.type == "fsdp" and ranks == 1:
        raise UnmaskError(
            "distributed.type: fsdp shards the model over several processes, and this is one; start them with"
            " torchrun --nproc_per_node=N -m unmask train ..., or set distributed.type=ddp."
        )
    total, unit = recipe.global_batch_size, ranks * (recipe.micro_batch_size or 1)
    if total % unit:
        raise UnmaskError(
            f"global_batch_size: {total} is not a multiple of {unit}: {ranks} processes, micro_batch_size"
            f" {recipe.micro_batch_size or 'free'}; set it to {-(-total // unit) * unit}."
        )
    micro = recipe.micro_batch_size or total // ranks
    return micro, total // (micro * ranks)


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
        if recipe.gradient_checkpointing:  # whose method transformers 5.24 renamed
            recompute = getattr(model, "activation_checkpointing_enable", None)
            (recompute or model.gradient_checkpointing_enable)({"use_reentrant": False})
        if self.sharded:
            _shard(model, bf16, group)
            if any(p.is_meta for p in model.parameters()):
                load_shards(model, str(recipe.model.name_or_path), group)
        else:
            model.to(group.device)
        self.module: nn.Module = _DiffusionLoss(model)
        if recipe.torch_compile:
            model.model.compile()
        if group.ranks > 1 and not self.sharded:
            self.module = DistributedDataParallel(self.module, gradient_as_bucket_view=True)
        self.autocasts = bf16 and not self.sharded
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(self, *arguments: Any) -> Tensor:
        """`model.diffusion_loss(...)`, in the precision of the recipe."""
        with self.autocast():
            return self.module(*arguments)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the model computes."""
        return torch.autocast(self.group.device.type, torch.bfloat16, enabled=self.autocasts)

    def whole_weights(self, model: Any) -> dict[str, Tensor]:
        """The weights of a sharded model, gathered one after another, on the main process."""
        weights = {}
        for name, parameter in model.named_parameters():
            part = parameter.detach()
            whole = part.full_tensor() if isinstance(part, DTensor) else part
            if self.group.main:
                weights[name] = whole.cpu()
        return weights

    def accumulating(self) -> AbstractContextManager[Any]:
        """Add gradients up on this process alone; under FSDP they would not fit, and are summed each time."""
        return self.module.no_sync() if isinstance(self.module, DistributedDataParallel) else nullcontext()

    @contextmanager
    def evaluating(self) -> Iterator[Any]:
        """The model in eval mode; gathered weights are freed afterwards, for lack of a backward pass."""
        training = self.model.training
        self.model.eval()
        yield self.model
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        self.model.train(training)


def _shard(model: Any, bf16: bool, group: Processes) -> None:
    """Shard a model over the processes in place: each decoder layer, then all the rest (FSDP2).

    Gradients are summed in float32; the inputs (noise, divisors) keep their precision.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32 if bf16 else None,
        cast_forward_inputs=False,
    )
    mesh = init_device_mesh(group.device.type, (group.ranks,))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for name in ("diffusion_loss", "masked_nll", "generate"):  # each gathers the weights it needs
        register_fsdp_forward_method(model, name)


@torch.no_grad()
def load_shards(model: Any, name: str, group: Processes) -> None:
    """Give a sharded model on "meta" its weights, of which this process reads its own part from the disk.

    Rows of the embedding and the head that the checkpoint does not have become the mean of the others.

    Args:
        name: folder or hub name of a checkpoint in safetensors.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    model.to_empty(device=group.device)
    rotary = model.model.rotary_emb  # its buffers are computed, and in no checkpoint
    model.model.rotary_emb = type(rotary)(config=model.config).to(group.device)
    format = read_format(folder)  # other systems have other names for the weights
    parameters: dict[str, Any] = {stored_name(key, format): p.detach() for key, p in model.named_parameters()}
    shapes, shorter = saved_shapes(folder), {}
    for key, parameter in parameters.items():
        shape = shapes.get(key, torch.Size())  # none: it is missing
        if len(shape) != parameter.dim() or shape[1:] != parameter.shape[1:] or shape[0] > len(parameter):
            expected = f"by its config.json it must be {tuple(parameter.shape)}"
            raise UnmaskError(f"{name}: {key} has shape {tuple(shape)}; {expected}.")
        if shape != parameter.shape:
            shorter[key] = torch.empty(shape, dtype=parameter.dtype, device=group.device)
    read_tensors({**parameters, **shorter}, folder, group)
    for key, rows in shorter.items():
        parameter = parameters[key]
        mean = rows.float().mean(dim=0, keepdim=True).to(rows.dtype)
        whole = torch.cat([rows, mean.expand(len(parameter) - len(rows), -1)])
        mesh, placements = parameter.device_mesh, parameter.placements
        parameter.copy_(distribute_tensor(whole, mesh, placements, src_data_rank=None))


def saved_shapes(folder: Path) -> dict[str, torch.Size]:
    """The shape of every tensor in the safetensors files of a folder, also of one in several parts."""
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {key: cast(TensorStorageMetadata, one).size for key, one in metadata.items()}


def read_tensors(tensors: dict[str, Tensor], folder: Path, group: Processes) -> None:
    """Fill tensors from the safetensors files of a folder; of a sharded one every process reads its part."""
    with warnings.catch_warnings(action="ignore"):  # torch.distributed is not used: so it is meant
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=group.ranks == 1)


def write_tensors(tensors: dict[str, Tensor], folder: Path, group: Processes) -> None:
    """Write tensors as safetensors files; of a sharded one every process writes its part."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with warnings.catch_warnings(action="ignore"):  # torch.distributed is not used: so it is meant
        save(tensors, storage_writer=writer, no_dist=group.ranks == 1)

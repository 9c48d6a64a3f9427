"""How several processes share one model: DDP, FSDP2 or DeepSpeed, each by the library that has it."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from unmask.errors import UnmaskError
from unmask.recipe import Recipe


def num_processes() -> int:
    """Count the processes of this run, as torchrun tells them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def batch_plan(recipe: Recipe, processes: int) -> tuple[int, int]:
    """Divide the global batch: (sequences in one forward of a process, forwards of an optimizer step).

    Raises:
        UnmaskError: it cannot be divided evenly.
    """
    total, micro = recipe.global_batch_size, recipe.micro_batch_size
    if total < processes:
        raise UnmaskError(
            f"global_batch_size: {total} sequences cannot be divided over {processes} processes; start at"
            f" most {total} processes or raise it."
        )
    if micro is None and total % processes:
        raise UnmaskError(
            f"global_batch_size: {total} sequences cannot be divided evenly over {processes} processes; set"
            f" it to {-(-total // processes) * processes}."
        )
    micro = micro or total // processes
    together = micro * processes
    if total % together:
        raise UnmaskError(
            f"global_batch_size: {total} is no multiple of micro_batch_size {micro} times {processes}"
            f" processes = {together}; set it to {-(-total // together) * together}, or change one of the"
            " others."
        )
    return micro, total // together


def parallel_settings(recipe: Recipe, processes: int) -> dict[str, Any]:
    """What `TrainingArguments` is told about sharing the model.

    Raises:
        UnmaskError: one process has nothing to share with, or DeepSpeed or its file cannot be used.
    """
    kind = recipe.distributed.type
    if kind != "ddp" and processes == 1:
        raise UnmaskError(
            f"distributed.type: {kind} divides the model over several processes, and this is one; start them"
            " with torchrun --nproc_per_node=N -m unmask train ..., or set distributed.type=ddp."
        )
    if kind == "fsdp":
        # The blocks that are wrapped are those the model names in `_no_split_modules`.
        config = {"version": 2, "reshard_after_forward": True, "state_dict_type": "SHARDED_STATE_DICT"}
        # Without a sum after each micro-batch every process would hold gradients of the whole model.
        accumulation = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
        return {"fsdp": True, "fsdp_config": config, "accelerator_config": accumulation}
    if kind == "deepspeed":
        config = read_deepspeed(Path(str(recipe.distributed.deepspeed_config)))
        if find_spec("deepspeed") is None:
            raise UnmaskError(
                "distributed.type: deepspeed: DeepSpeed is not installed; pip install deepspeed, or set"
                " distributed.type=fsdp and remove distributed.deepspeed_config."
            )
        return {"deepspeed": config}
    return {}


def settle(args: TrainingArguments) -> None:
    """Make sure that the model will be shared as asked for, in the recipe's precision.

    FSDP computes in bf16 and nothing more: gradients are added up over processes in float32. Its default
    would also round what `forward` is given and returns: the loss, its divisor, and the uniforms that
    masking rates are made of.

    Raises:
        UnmaskError: FSDP without accelerators, where accelerate would quietly run DDP.
    """
    if args.fsdp_plugin_args is not None:
        if PartialState().distributed_type == DistributedType.MULTI_CPU:
            raise UnmaskError(
                "distributed.type: fsdp: there is no accelerator, and on CPUs the model is not divided; set"
                " distributed.type=ddp."
            )
        if args.bf16:
            cast(Any, args.fsdp_plugin_args)["mixed_precision_policy"] = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
    # DeepSpeed divides a model that is whole; one loaded in parts could not be fitted to its tokenizer.
    unset_hf_deepspeed_config()


def read_deepspeed(file: Path) -> dict[str, Any]:
    """Read a DeepSpeed configuration, and check what does not take DeepSpeed itself.

    Raises:
        UnmaskError: no such file, no JSON object, no ZeRO stage, or an optimizer of its own.
    """
    key = f"distributed.deepspeed_config: {file}"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not valid JSON ({error})"
        raise UnmaskError(f"{key}: cannot be read: {reason}.") from error
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (1, 2, 3):
        raise UnmaskError(f"{key}: zero_optimization.stage must be 1, 2 or 3; got {stage!r}.")
    for name in ("optimizer", "scheduler"):
        if name in config:
            other = {"optimizer": "optimizer", "scheduler": "lr_scheduler"}[name]
            raise UnmaskError(f"{key}: remove {name!r}: the recipe's {other} says it.")
    if config.get("fp16", {}).get("enabled") is True:
        raise UnmaskError(f"{key}: fp16 is not supported; use bf16 and the recipe's precision.")
    return config


def zero_stage(recipe: Recipe) -> int:
    """The ZeRO stage of `distributed.deepspeed_config`; 0 without DeepSpeed."""
    if recipe.distributed.deepspeed_config is None:
        return 0
    return read_deepspeed(Path(recipe.distributed.deepspeed_config))["zero_optimization"]["stage"]


def check_enough(rows: int, processes: int) -> None:
    """Refuse more processes than there are sequences to train on.

    Raises:
        UnmaskError: some process would have nothing of its own.
    """
    if rows < processes:
        raise UnmaskError(
            f"data: {rows} sequences for {processes} processes; start at most {rows} (torchrun"
            " --nproc_per_node) or use more data."
        )


def divide(trainer: Trainer) -> None:
    """Shard the model over the processes without training it, for a checkpoint that is only loaded."""
    trainer.create_optimizer()
    model = cast(Any, trainer.model)
    trainer.model, trainer.optimizer = trainer.accelerator.prepare(model, trainer.optimizer)
    trainer.model_wrapped = trainer.model


def whole_weights(trainer: Trainer) -> dict[str, Tensor] | None:
    """Gather the weights of a model that is divided over processes; None where every process has all.

    Every process has to call it; only the first one has use for the result.
    """
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return None
    weights = cast(Any, trainer.accelerator.get_state_dict(trainer.model_wrapped))
    model = cast(Any, trainer.accelerator.unwrap_model(cast(Any, trainer.model), keep_torch_compile=False))
    once = {name for name, _ in model.named_parameters()}
    twice = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    return {name: tensor for name, tensor in weights.items() if name not in twice}  # tied ones are saved once

"""Several processes started by torchrun that share out independent work: prompts, or requests of an evaluation."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist


def join() -> tuple[int, int]:
    """Join the other processes if torchrun started several; each takes an accelerator of its own, if there are."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if torch.accelerator.is_available():
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("gloo")  # what they exchange is small, and on the CPU
    return rank_and_size()


def rank_and_size() -> tuple[int, int]:
    """Number of this process and of all that have joined: (0, 1) for one alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value: Any) -> list[Any]:
    """What each process has, in the order of their numbers; all wait for one another."""
    size = rank_and_size()[1]
    values: list[Any] = [value] * size
    if size > 1:
        dist.all_gather_object(values, value)
    return values

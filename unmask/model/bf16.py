"""Which devices multiply matrices faster in bf16 than in float32; of a CPU, found out by doing it.

What a CPU says of itself does not tell: `torch.cpu.get_capabilities()` and /proc/cpuinfo list instructions
that the library behind torch may not use (`ONEDNN_MAX_CPU_ISA`), and other processors have other ones.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.utils.benchmark import Timer
from transformers.utils.import_utils import is_torch_bf16_gpu_available

# Natively bf16 takes half the time of float32. Where it gains less than this it is not worth its rounding.
_GAIN = 0.8


def seconds_of_product(dtype: torch.dtype) -> float:
    """Time a matrix product on one thread, on several of which each waits for the others.

    The best of two, since other processes interrupt some. At this size one takes 0.3 ms in float32, and up to
    40 ms in a type that is not computed natively.
    """
    timer = Timer("torch.mm(a, a)", globals={"torch": torch, "a": torch.ones(256, 256, dtype=dtype)})
    return min(timer.timeit(1).mean for _ in range(2))


@cache
def slowdown(dtype: torch.dtype) -> float:
    """How many times as long as in float32 a matrix product in `dtype` takes on this CPU; measured once."""
    return seconds_of_product(dtype) / seconds_of_product(torch.float32)


def gains_by_bf16(device: torch.device) -> bool:
    """Tell whether a device computes in bf16 natively, and so faster than in float32."""
    if device.type == "cpu":
        return slowdown(torch.bfloat16) < _GAIN
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return is_torch_bf16_gpu_available()


def place_for_inference(model: Any) -> None:
    """Move a model to the accelerator, if there is one; a CPU that is slower in 16 bits holds it in float32."""
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    elif model.dtype.itemsize < 4 and slowdown(model.dtype) > 1:
        model.float()

"""Which devices multiply matrices faster in bf16 than in float32; of a CPU, found out by doing it.

What a CPU says of itself does not tell: `torch.cpu.get_capabilities()` and /proc/cpuinfo list instructions
that the library behind torch may not use (`ONEDNN_MAX_CPU_ISA`), and other processors have other ones.
"""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch
from transformers.utils.import_utils import is_torch_bf16_gpu_available

# A product of this size takes 0.3 ms in float32, and up to 40 ms in a type that is not computed natively.
_SIDE = 256
# Natively bf16 takes half the time of float32. Where it gains less than this it is not worth its rounding.
_GAIN = 0.8


@cache
def slowdown(dtype: torch.dtype) -> float:
    """Measure how many times as long as in float32 a matrix product in `dtype` takes on this CPU.

    The best of a few products each, since other processes interrupt some; on one thread, since several wait
    for one another then. Once a process, 5 to 150 ms.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _best_seconds(dtype) / _best_seconds(torch.float32)
    finally:
        torch.set_num_threads(threads)


def _best_seconds(dtype: torch.dtype) -> float:
    """Of ten products, or of three where those take long."""
    a = torch.ones(_SIDE, _SIDE, dtype=dtype)
    seconds: list[float] = []
    while len(seconds) < 10 and (len(seconds) < 3 or min(seconds) < 0.005):
        start = time.perf_counter()
        torch.mm(a, a)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def gains_by_bf16(device: torch.device) -> bool:
    """Tell whether a device computes in bf16 natively, and so faster than in float32."""
    if device.type == "cpu":
        return slowdown(torch.bfloat16) < _GAIN
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return is_torch_bf16_gpu_available()


def place_for_inference(model: Any) -> None:
    """Move a model to the accelerator, if there is one.

    On a CPU that is slower in its 16 bits than in float32 the weights are held in float32, with the same
    values.
    """
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    elif model.dtype.itemsize < 4 and slowdown(model.dtype) > 1:
        model.float()

"""Whether bf16 is fast here is measured, and nothing that is computed depends on the measuring."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import random_ids, tiny_model

from unmask.model import bf16
from unmask.model.bf16 import gains_by_bf16, place_for_inference, slowdown

measured = bf16.seconds_of_product  # before the tests' own takes its place


@pytest.mark.parametrize(("times", "gains"), [(0.3, True), (0.79, True), (0.81, False), (40.0, False)])
def test_a_cpu_gains_where_a_product_takes_less_time(
    times: float, gains: bool, bf16_takes: Callable[[float], None]
) -> None:
    bf16_takes(times)
    assert slowdown(torch.bfloat16) == times
    assert gains_by_bf16(torch.device("cpu")) is gains


def test_measuring_leaves_everything_as_it_was() -> None:
    state = torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        assert 0 < measured(torch.float32) < 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the variable is one of x86")
def test_a_cpu_that_is_told_to_be_an_older_one_is_found_out() -> None:
    """It still says that it has the instructions. There bf16 takes 20 times as long, natively 0.5 times."""
    code = "import torch; from unmask.model.bf16 import slowdown; print(slowdown(torch.bfloat16))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) > 3


@pytest.mark.parametrize(
    ("dtype", "times", "expected"),
    [
        (torch.bfloat16, 0.5, torch.bfloat16),
        (torch.bfloat16, 30.0, torch.float32),
        (torch.float16, 30.0, torch.float32),
        (torch.float64, 30.0, torch.float64),
    ],
)
def test_weights_are_held_in_what_a_cpu_computes_in(
    dtype: torch.dtype, times: float, expected: torch.dtype, bf16_takes: Callable[[float], None]
) -> None:
    bf16_takes(times)
    model: Any = tiny_model(dtype=dtype).eval()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    place_for_inference(model)
    assert model.dtype == expected
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name].to(expected)), name
    assert model(random_ids(1, 4)).logits.dtype == expected

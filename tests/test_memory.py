"""The memory formula against the peak that a process had, and what `--dry-run` shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import memory_peaks
import pytest
from rich.console import Console

from unmask.training.memory import dry_run


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux' /proc")
def test_the_formula_is_within_a_fifth_of_the_measured_peak() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, memory_peaks.__file__], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    ratios = json.loads(done.stdout)
    assert ratios.keys() == memory_peaks.CASES.keys()
    assert all(0.8 < ratio < 1.2 for ratio in ratios.values()), ratios


def test_a_dry_run_shows_what_divides_over_the_devices() -> None:
    fsdp: dict[str, Any] = {"distributed": {"type": "fsdp"}, "global_batch_size": 16, "micro_batch_size": 1}
    recipe, console = memory_peaks.recipe(**fsdp), Console(quiet=True)
    shown = dry_run(recipe, console=console)
    assert list(shown) == [2, 4, 8, 16]  # the batch cannot be divided further
    for part in ("weights", "gradients", "optimizer"):
        assert shown[2][part] == 4 * shown[8][part]
    assert shown[2]["peak"] > shown[16]["peak"] > shown[16]["gathered"] > 0
    assert list(dry_run(recipe, 8, console)) == [8]

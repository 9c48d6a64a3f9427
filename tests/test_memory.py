"""The memory formula against the peak that a process had, and what `--dry-run` shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from unmask.config import recipe_from_dict
from unmask.training.memory import dry_run

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "large vocabulary": {"vocab_size": 30_000},
    "recomputed": {"gradient_checkpointing": True},
    "accumulated": {"micro_batch_size": 2},
    "muon": {"optimizer": {"type": "muon"}},
    "llama": {"model_type": "llama", "ema": {"decay": 0.9}},
}


def tree(vocab_size: int = 4_000, model_type: str = "qwen3", **changes: Any) -> dict[str, Any]:
    config = {**SIZES, "vocab_size": vocab_size, "model_type": model_type}
    return {
        "model": {"config": config, "tokenizer": "bytes", "attn_implementation": "sdpa"},
        "data": {"dataset_name": "none", "block_size": 256},
        "global_batch_size": 8,
        "precision": "fp32",
        **changes,
    }


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux' /proc")
def test_the_formula_is_within_a_fifth_of_the_measured_peak() -> None:
    trees = json.dumps([tree(**changes) for changes in CASES.values()])
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("memory_peaks.py")), trees],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ratios = {
        name: estimated / measured
        for name, (estimated, measured) in zip(CASES, json.loads(done.stdout), strict=True)
    }
    assert all(0.8 < ratio < 1.2 for ratio in ratios.values()), ratios


def test_a_dry_run_shows_what_divides_over_the_devices() -> None:
    fsdp = {"distributed": {"type": "fsdp"}, "global_batch_size": 16, "micro_batch_size": 1}
    shown = dry_run(recipe_from_dict(tree(**fsdp)), console=Console(quiet=True))
    assert list(shown) == [2, 4, 8, 16]  # the batch cannot be divided further
    for part in ("weights", "gradients", "optimizer"):
        assert shown[2][part] == 4 * shown[8][part]
    assert shown[2]["peak"] > shown[16]["peak"] > shown[16]["gathered"] > 0
    assert list(dry_run(recipe_from_dict(tree(**fsdp)), 8, Console(quiet=True))) == [8]

"""Several processes, through torchrun: DDP and FSDP2 with gloo on a CPU are the run of one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import autoregressive_folder, run_recipe, run_state, run_weights

from unmask.training.train import train

pytestmark = pytest.mark.slow

PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import json
from rich.console import Console
from tiny import run_recipe
from unmask.training.train import train
train(run_recipe(Path(sys.argv[1]), **json.loads(sys.argv[2])), Console(quiet=True))
"""


def launch(folder: Path, processes: int, **changes: Any) -> Path:
    """Train `run_recipe` on some processes; the folder of the run."""
    run_recipe(folder)  # writes the data
    program = folder / "program.py"
    program.write_text(PROGRAM.format(tests=str(Path(__file__).parent)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*command, str(program), str(folder), json.dumps(changes)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return Path(changes["checkpoint_save_dir"])


def assert_same(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    first, second = run_state(one)["history"], run_state(other)["history"]
    assert [log["step"] for log in first] == [log["step"] for log in second]
    for log, expected in zip(second, first, strict=True):
        for name in ("loss", "eval_loss", "grad_norm"):
            assert log.get(name) == (
                pytest.approx(expected[name], rel=tolerance) if name in expected else None
            )
    weights, others = run_weights(one), run_weights(other)
    assert weights.keys() == others.keys()
    for name in weights:
        torch.testing.assert_close(others[name], weights[name], rtol=0, atol=10 * tolerance, msg=name)


def alone(folder: Path, **changes: Any) -> Path:
    """Train `run_recipe` on this process; the folder of the run."""
    train(run_recipe(folder, **changes), Console(quiet=True))
    return Path(changes["checkpoint_save_dir"])


def test_two_processes_are_the_run_of_one(tmp_path: Path) -> None:
    shared: dict[str, Any] = {"save_steps": 3, "eval_steps": 3, "save_total_limit": None}
    shared |= {"model__time_sampling": "low_discrepancy", "ema__decay": 0.5}
    names = ("one", "ddp", "fsdp", "whole")
    folders = [{"checkpoint_save_dir": str(tmp_path / name)} for name in names]
    one = alone(tmp_path, **folders[0], **shared)
    ddp = launch(tmp_path, 2, **folders[1], micro_batch_size=1, **shared)
    fsdp = launch(tmp_path, 2, **folders[2], distributed__type="fsdp", **shared)
    assert_same(one, ddp)
    assert_same(one, fsdp)
    # It was really sharded: two files of parts, and no whole model.
    parts = sorted(file.name for file in (fsdp / "checkpoint-3" / "state").iterdir())
    assert len(parts) == 2 and parts[1].startswith("shard-00002")
    assert not (fsdp / "checkpoint-3" / "model.safetensors").exists()
    # A sharded checkpoint resumes on another number of processes.
    shutil.copytree(fsdp / "checkpoint-3", tmp_path / "whole" / "checkpoint-3")
    assert_same(one, alone(tmp_path, **folders[3], resume_from_checkpoint="auto", **shared))


def test_fsdp_from_a_checkpoint_reads_parts_and_adds_the_row_of_the_mask(tmp_path: Path) -> None:
    base = autoregressive_folder(tmp_path / "base", vocab_size=259)
    shared: dict[str, Any] = {"model": {"name_or_path": str(base)}, "save_steps": 6, "eval_steps": 6}
    shared |= {"data__packing": True, "global_batch_size": 2}
    one = alone(tmp_path, checkpoint_save_dir=str(tmp_path / "one"), **shared)
    changes = {"checkpoint_save_dir": str(tmp_path / "fsdp"), "distributed__type": "fsdp"}
    assert_same(one, launch(tmp_path, 2, **changes, **shared), 1e-4)


def test_streams_and_mixtures_on_two_processes(tmp_path: Path) -> None:
    sources = []
    for name, weight in (("a", 3.0), ("b", 1.0)):
        lines = [{"instruction": f"{name} {n}", "output": name * (n % 5 + 1)} for n in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        sources.append({"dataset_name": str(tmp_path / f"{name}.jsonl"), "weight": weight})
    for streaming in (False, True):
        data: dict[str, Any] = {"sources": sources, "block_size": 64, "streaming": streaming}
        shared = {"data": data, "model__time_sampling": "low_discrepancy", "save_steps": 6}
        one, two = (str(tmp_path / f"{name}-{streaming}") for name in ("one", "two"))
        alone_run = alone(tmp_path, checkpoint_save_dir=one, **shared)
        assert_same(alone_run, launch(tmp_path, 2, checkpoint_save_dir=two, **shared))

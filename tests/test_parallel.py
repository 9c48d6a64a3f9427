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
from tiny import assert_same_run, autoregressive_folder, run_recipe, train_run, two_sources

pytestmark = pytest.mark.slow

PROGRAM = """
import json
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from tiny import train_run
train_run(Path(sys.argv[1]), sys.argv[2], **json.loads(sys.argv[3]))
"""


def launch(folder: Path, out: str, **changes: Any) -> Path:
    """Train `run_recipe` on two processes; the folder of the run."""
    run_recipe(folder)  # writes the data
    program = folder / "program.py"
    program.write_text(PROGRAM.format(tests=str(Path(__file__).parent)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, str(program), str(folder), out, json.dumps(changes)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / out


def test_two_processes_are_the_run_of_one(tmp_path: Path) -> None:
    shared: dict[str, Any] = {"save_steps": 3, "eval_steps": 3, "save_total_limit": None}
    shared |= {"model__time_sampling": "low_discrepancy", "ema__decay": 0.5}
    train_run(tmp_path, "one", **shared)
    assert_same_run(tmp_path / "one", launch(tmp_path, "ddp", micro_batch_size=1, **shared), 1e-5)
    fsdp = launch(tmp_path, "fsdp", distributed__type="fsdp", **shared)
    assert_same_run(tmp_path / "one", fsdp, 1e-5)
    # It was really sharded: two files of parts, and no whole model.
    parts = sorted(file.name for file in (fsdp / "checkpoint-3" / "state").iterdir())
    assert len(parts) == 2 and parts[1].startswith("shard-00002")
    assert not (fsdp / "checkpoint-3" / "model.safetensors").exists()
    # A sharded checkpoint resumes on another number of processes.
    shutil.copytree(fsdp / "checkpoint-3", tmp_path / "whole" / "checkpoint-3")
    train_run(tmp_path, "whole", resume_from_checkpoint="auto", **shared)
    assert_same_run(tmp_path / "one", tmp_path / "whole", 1e-5)


def test_fsdp_from_a_checkpoint_reads_parts_and_adds_the_row_of_the_mask(tmp_path: Path) -> None:
    base = autoregressive_folder(tmp_path / "base", vocab_size=259)
    shared: dict[str, Any] = {"model": {"name_or_path": str(base)}, "save_steps": 6, "eval_steps": 6}
    shared |= {"data__packing": True, "global_batch_size": 2}
    train_run(tmp_path, "one", **shared)
    assert_same_run(tmp_path / "one", launch(tmp_path, "fsdp", distributed__type="fsdp", **shared), 1e-4)


@pytest.mark.parametrize("streaming", [False, True])
def test_streams_and_mixtures_on_two_processes(streaming: bool, tmp_path: Path) -> None:
    data = two_sources(tmp_path, streaming=streaming)
    shared = {"data": data, "model__time_sampling": "low_discrepancy", "save_steps": 6}
    train_run(tmp_path, "one", **shared)
    assert_same_run(tmp_path / "one", launch(tmp_path, "two", **shared), 1e-5)

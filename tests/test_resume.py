"""A run that was stopped, at any moment, continues as if nothing had happened: to the bit."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import autoregressive_folder, run_recipe, run_state, run_weights

from unmask.errors import UnmaskError
from unmask.training.checkpoint import checkpoints, damage, newest_whole, rotate
from unmask.training.train import train


def run(folder: Path, out: str, **changes: Any) -> str:
    printed = io.StringIO()
    train(
        run_recipe(folder, checkpoint_save_dir=str(folder / out), **changes), Console(file=printed, width=200)
    )
    return printed.getvalue()


def assert_equal_runs(one: Path, other: Path) -> None:
    """Histories and final weights to the bit."""
    first, second = run_state(one), run_state(other)
    assert first["history"] == second["history"]
    weights, others = run_weights(one), run_weights(other)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation and logs between saves": {"micro_batch_size": 1, "log_steps": 2},
    "average": {"ema__decay": 0.7},
    "muon": {"optimizer__type": "muon"},
    "adafactor": {"optimizer__type": "adafactor"},
    "packing, low discrepancy": {
        "data__packing": True,
        "global_batch_size": 2,
        "model__time_sampling": "low_discrepancy",
    },
    "dropout": {"model__config__attention_dropout": 0.3},
    "curriculum": {"model__prefix_probability": [0.5, 0.1], "model__noise_eps": [0.1, 0.01]},
    "early stopping": {"early_stopping_patience": 3, "eval_steps": 3},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_resumed_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    changes = {"save_steps": 3, "eval_steps": 2, "save_total_limit": None, **SETTINGS[name]}
    run(tmp_path, "whole", **changes)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    printed = run(tmp_path, "resumed", resume_from_checkpoint="auto", **changes)
    assert f"resuming from {tmp_path / 'resumed' / 'checkpoint-3'}" in printed
    assert_equal_runs(tmp_path / "whole", tmp_path / "resumed")


def test_adapters_resume_to_the_bit(tmp_path: Path) -> None:
    base = autoregressive_folder(tmp_path / "base")
    changes = {"model": {"name_or_path": str(base)}, "lora": {"r": 2, "dropout": 0.2}, "save_steps": 3}
    run(tmp_path, "whole", save_total_limit=None, **changes)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    run(tmp_path, "resumed", resume_from_checkpoint="auto", **changes)
    assert_equal_runs(tmp_path / "whole", tmp_path / "resumed")


def test_a_stream_and_a_mixture_resume_to_the_bit(tmp_path: Path) -> None:
    for name in ("a", "b"):
        lines = [{"instruction": f"{name} {n}", "output": name * (n % 5 + 1)} for n in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    sources = [
        {"dataset_name": str(tmp_path / f"{n}.jsonl"), "weight": w} for n, w in (("a", 3.0), ("b", 1.0))
    ]
    for streaming in (False, True):
        data: dict[str, Any] = {"sources": sources, "block_size": 64, "streaming": streaming}
        if streaming:
            data["shuffle_buffer"] = 5
        changes = {"data": data, "save_steps": 3, "save_total_limit": None}
        whole, resumed = f"whole-{streaming}", f"resumed-{streaming}"
        run(tmp_path, whole, **changes)
        shutil.copytree(tmp_path / whole / "checkpoint-3", tmp_path / resumed / "checkpoint-3")
        run(tmp_path, resumed, resume_from_checkpoint="auto", **changes)
        assert_equal_runs(tmp_path / whole, tmp_path / resumed)


def test_the_work_may_be_divided_otherwise(tmp_path: Path) -> None:
    changes = {"save_steps": 3, "save_total_limit": None}
    run(tmp_path, "whole", **changes)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    printed = run(tmp_path, "resumed", resume_from_checkpoint="auto", micro_batch_size=1, **changes)
    assert "the recipe differs from that of the checkpoint in" in printed and "micro_batch_size" in printed
    for name, tensor in run_weights(tmp_path / "whole").items():
        torch.testing.assert_close(tensor, run_weights(tmp_path / "resumed")[name], rtol=0, atol=1e-4)


def test_a_new_schedule_holds_from_the_first_resumed_step(tmp_path: Path) -> None:
    run(tmp_path, "out", save_steps=3, max_steps=3, lr_scheduler__type="linear")
    run(
        tmp_path,
        "out",
        save_steps=3,
        max_steps=10,
        lr_scheduler__type="linear",
        resume_from_checkpoint="auto",
    )
    rates = [log["learning_rate"] for log in run_state(tmp_path / "out")["history"] if "loss" in log]
    assert rates[3:6] == pytest.approx([0.007, 0.006, 0.005])


def test_another_recipe_is_refused_unless_allowed(tmp_path: Path) -> None:
    run(tmp_path, "out", save_steps=3, max_steps=3)
    again: dict[str, Any] = {"save_steps": 3, "resume_from_checkpoint": "auto"}
    with pytest.raises(UnmaskError, match=r"optimizer\.learning_rate was 0\.01 and is now 0\.5"):
        run(tmp_path, "out", optimizer__learning_rate=0.5, **again)
    with pytest.raises(UnmaskError, match=r"optimizer\.type.*start a new run"):
        run(tmp_path, "out", optimizer__type="muon", resume={"allow": ["optimizer"]}, **again)
    with pytest.raises(UnmaskError, match="of another model or optimizer"):
        allow = {"allow": ["model.config"]}
        run(tmp_path, "out", model__config__hidden_size=48, resume=allow, **again)
    with pytest.raises(UnmaskError, match=r"ema\.decay"):
        run(tmp_path, "out", ema__decay=0.9, resume={"allow": ["ema"]}, **again)
    with pytest.raises(UnmaskError, match="holds a run already"):
        run(tmp_path, "out", save_steps=3)
    run(tmp_path, "out", optimizer__learning_rate=0.5, resume={"allow": ["optimizer"]}, **again)
    with pytest.raises(UnmaskError, match="is a finished run"):
        run(tmp_path, "out", optimizer__learning_rate=0.5, resume={"allow": ["optimizer"]}, **again)


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    run(tmp_path, "out", save_steps=2, save_total_limit=None)
    out = tmp_path / "out"
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoint-6")
    file = next((out / "checkpoint-4" / "state").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "checksum" in str(damage(out / "checkpoint-4")) and damage(out / "checkpoint-2") is None
    printed = run(tmp_path, "out", save_steps=2, resume_from_checkpoint="auto")
    assert "checkpoint-4" in printed and "is damaged" in printed
    assert f"resuming from {out / 'checkpoint-2'}" in printed
    with pytest.raises(UnmaskError, match=r"state\.json has 2 bytes"):
        file.write_bytes(data)
        (out / "checkpoint-4" / "state.json").write_text("{}")
        run(tmp_path, "out", resume_from_checkpoint=str(out / "checkpoint-4"))


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    run(tmp_path, "out", save_steps=1, save_total_limit=None, max_steps=5)
    out = tmp_path / "out"
    rotate(out, 2, best_step=2)
    assert [folder.name for folder in checkpoints(out)] == ["checkpoint-5", "checkpoint-2"]
    (out / "checkpoint-5" / "state.json").write_text("{}")
    newest, wrong = newest_whole(out)
    assert newest == out / "checkpoint-2" and len(wrong) == 1


PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from rich.console import Console
from tiny import run_recipe
from unmask.training.train import train
folder = Path(sys.argv[1])
recipe = run_recipe(folder, checkpoint_save_dir=sys.argv[2], max_steps=200, save_steps=10, log_steps=3,
                    eval_steps=25, resume_from_checkpoint="auto")
print("ready", flush=True)
train(recipe, Console(quiet=True))
"""


def start(folder: Path, out: Path) -> subprocess.Popen[str]:
    program = PROGRAM.format(tests=str(Path(__file__).parent))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", program, str(folder), str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def wait_for_a_checkpoint(process: subprocess.Popen[str], out: Path) -> None:
    while process.poll() is None and not checkpoints(out):
        time.sleep(0.01)


def finish(folder: Path, out: Path) -> None:
    with start(folder, out) as process:
        assert process.wait(200) == 0, process.stderr and process.stderr.read()


@pytest.mark.slow
def test_signals_save_and_kills_lose_nothing(tmp_path: Path) -> None:
    run_recipe(tmp_path)  # writes the data
    whole, out = tmp_path / "whole", tmp_path / "out"
    finish(tmp_path, whole)
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with start(tmp_path, out) as process:
            before = newest_whole(out, contents=False)[0]
            while process.poll() is None and newest_whole(out, contents=False)[0] in (None, before):
                time.sleep(0.01)
            process.send_signal(number)
            assert process.wait(60) == code, process.stderr and process.stderr.read()
    draw = random.Random(0)
    for _ in range(3):
        with start(tmp_path, out) as process:
            wait_for_a_checkpoint(process, out)
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            time.sleep(draw.uniform(0.5, 3.0))
            process.kill()
    if not (out / "final").exists():
        finish(tmp_path, out)
    assert_equal_runs(whole, out)

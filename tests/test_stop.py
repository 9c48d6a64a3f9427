"""Signals and sudden death: what a run leaves, and how it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from test_resume import history
from test_run import assert_close, saved, settings, train, write_data

from unmask.config import recipe_from_dict
from unmask.training.checkpoints import PARTIAL
from unmask.training.stop import StopSignals
from unmask.training.trainer import DiffusionTrainer

LONG: dict[str, Any] = {"max_steps": 6, "save_steps": 3, "eval_steps": 2, "log_steps": 4}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    return tmp_path


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, *numbers: int) -> None:
    """Send signals to this process in the forward of a step."""
    real = DiffusionTrainer.compute_loss

    def compute(self: DiffusionTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step + 1 == step:
            for number in numbers:
                os.kill(os.getpid(), number)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(DiffusionTrainer, "compute_loss", compute)


@pytest.mark.parametrize("step", [2, 5])  # the second has an evaluation, which is left to the resumed run
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(
    place: Path, monkeypatch: pytest.MonkeyPatch, step: int, number: int, code: int
) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    whole, _ = train("whole", **LONG)
    at_step(monkeypatch, step, number, number)  # one comes again at once from a launcher: that is no second
    with pytest.raises(SystemExit) as caught:
        train(**LONG)
    assert caught.value.code == code
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert (place / f"out/checkpoint-{step}").exists() and not (place / "out/final").exists()
    monkeypatch.undo()
    monkeypatch.chdir(place)
    resumed, said = train(**LONG, resume_from_checkpoint="auto")
    assert f"step {step}/6  loss" not in said
    for key in ("loss", "eval_loss", "grad_norm", "learning_rate"):
        assert history(place / "out/checkpoint-6", key) == history(place / "whole/checkpoint-6", key)
    assert_close(saved(resumed.checkpoint), saved(whole.checkpoint), atol=0)


def test_a_signal_without_save_steps_saves_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(monkeypatch, 2, signal.SIGTERM)
    with pytest.raises(SystemExit):
        train()
    assert [path.name for path in (place / "out").glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_limit_of_one_keeps_the_newest_beside_the_best(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 4, signal.SIGTERM)
    with pytest.raises(SystemExit):
        train(save_total_limit=1, save_steps=1, eval_steps=1, optimizer__learning_rate=3.0)
    names = {path.name for path in (place / "out").glob("checkpoint-*")}
    assert len(names) == 2 and "checkpoint-4" in names


def test_before_the_training_a_signal_ends_the_run_at_once(place: Path) -> None:
    with pytest.raises(SystemExit) as caught, StopSignals():
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the signal was passed over")
    assert caught.value.code == 143


def test_another_thread_does_not_listen() -> None:
    found = []

    def listen() -> None:
        with StopSignals() as signals:
            found.append(signals.before)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [{}]


KILLED = """
import os, signal, sys
import torch
import unmask
from rich.console import Console
from unmask.training import checkpoints, run, saving
from unmask.training.trainer import DiffusionTrainer

torch.set_num_threads(1)

def die(owner, name, step, before):
    real = getattr(owner, name)
    calls = []
    def wrapped(*args, **kwargs):
        calls.append(name)
        last = len(calls) == step
        if last and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, wrapped)

recipe = unmask.load_recipe("recipe.yaml")
points = [
    (DiffusionTrainer, "compute_loss", 3, True),               # in training
    (DiffusionTrainer, "_save_optimizer_and_scheduler", 1, False),  # in the middle of a save
    (saving, "write_manifest", 1, False),                      # all written, not in its place
    (saving, "put_in_place", 1, False),                        # just in its place
    None,
]
for point in points:
    child = os.fork()
    if child == 0:
        if point is not None:
            die(*point)
        unmask.train(recipe, Console(quiet=True))
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    names = sorted(p.name for p in __import__("pathlib").Path("out").iterdir() if "checkpoint" in p.name)
    print(code, os.path.exists("out/.partial"), *names, flush=True)
"""


def test_killed_at_any_moment_it_goes_on_as_if_never_stopped(place: Path) -> None:
    changes = {**LONG, "save_steps": 2, "max_steps": 8, "save_total_limit": 2}
    whole, _ = train("whole", **changes)
    tree = settings(**changes, resume_from_checkpoint="auto")
    (place / "recipe.yaml").write_text(recipe_from_dict(tree).to_yaml(), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", KILLED],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "-9 False checkpoint-2",
        "-9 True checkpoint-2",
        "-9 True checkpoint-2",
        "-9 False checkpoint-2 checkpoint-4",
        "0 False checkpoint-6 checkpoint-8",
    ]
    assert not (place / "out" / PARTIAL).exists()
    for key in ("loss", "eval_loss", "grad_norm"):
        assert history(place / "out/checkpoint-8", key) == history(place / "whole/checkpoint-8", key)
    assert_close(saved(place / "out/final"), saved(whole.checkpoint), atol=0)


LAUNCH = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2 driver.py".split()
ONE_RANK = """
import os, signal, sys
from unmask.cli import main
from unmask.training.trainer import DiffusionTrainer

real = DiffusionTrainer.compute_loss

def compute(self, *args, **kwargs):
    if self.state.global_step == 2 and self.args.process_index == 1:
        os.kill(os.getpid(), getattr(signal, os.environ["SEND"]))
    return real(self, *args, **kwargs)

DiffusionTrainer.compute_loss = compute
sys.argv = ["unmask", "train", "recipe.yaml"]
main()
"""


@pytest.mark.parametrize("number", ["SIGTERM", "SIGKILL"])
def test_one_process_of_two(place: Path, number: str) -> None:
    """A signal to one of them stops both after the same step; the death of one is one line of the other."""
    tree = settings(**{**LONG, "save_steps": 2})
    (place / "recipe.yaml").write_text(recipe_from_dict(tree).to_yaml(), encoding="utf-8")
    (place / "driver.py").write_text(ONE_RANK)
    done = subprocess.run(
        LAUNCH,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "SEND": number},
    )
    checkpoints = {path.name for path in (place / "out").glob("checkpoint-*")}
    if number == "SIGTERM":
        assert checkpoints == {"checkpoint-2", "checkpoint-3"}
        assert "stopped after step 3; go on with resume_from_checkpoint=auto" in done.stdout
        assert "exitcode  : 143" in done.stderr
    else:
        assert checkpoints == {"checkpoint-2"}
        assert "error: another process of this run ended" in done.stderr
        assert "out/checkpoint-2 with resume_from_checkpoint=auto" in done.stderr
    assert "unmask/training" not in done.stderr  # no traceback of ours

"""A run that was stopped, at any moment, continues as if nothing had happened: to the bit."""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny import assert_same_run, autoregressive_folder, run_recipe, run_state, train_run, two_sources

from unmask.errors import UnmaskError
from unmask.training.checkpoint import PARTIAL, checkpoints, damage, newest_whole, rotate
from unmask.training.evaluate import Answers

AGAIN: dict[str, Any] = {"resume_from_checkpoint": "auto"}


def run(folder: Path, out: str, **changes: Any) -> str:
    return train_run(folder, out, **{"save_steps": 3, **changes})[1]


def mixture(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"data": two_sources(folder, **changes), "eval_steps": None}


def adapters(folder: Path) -> dict[str, Any]:
    base = autoregressive_folder(folder / "base")
    return {"model": {"name_or_path": str(base)}, "lora": {"r": 2, "dropout": 0.2}}


SETTINGS: dict[str, Any] = {
    "accumulation and logs between saves": {"micro_batch_size": 1, "log_steps": 2},
    "average, muon": {"ema__decay": 0.7, "optimizer__type": "muon"},
    "adafactor, early stopping": {
        "optimizer__type": "adafactor",
        "early_stopping_patience": 3,
        "eval_steps": 3,
    },
    "packing, low discrepancy": {
        "data__packing": True,
        "global_batch_size": 2,
        "model__time_sampling": "low_discrepancy",
    },
    "dropout, curriculum": {
        "model__config__attention_dropout": 0.3,
        "model__prefix_probability": [0.5, 0.1],
        "model__noise_eps": [0.1, 0.01],
    },
    "adapters": adapters,
    "mixture": mixture,
    "stream": lambda folder: mixture(folder, streaming=True, shuffle_buffer=5),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_resumed_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    settings = SETTINGS[name](tmp_path) if callable(SETTINGS[name]) else SETTINGS[name]
    changes = {"eval_steps": 2, "save_total_limit": None, **settings}
    run(tmp_path, "whole", **changes)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    printed = run(tmp_path, "resumed", **AGAIN, **changes)
    assert f"resuming from {tmp_path / 'resumed' / 'checkpoint-3'}" in printed
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


def test_the_work_may_be_divided_otherwise(tmp_path: Path) -> None:
    run(tmp_path, "whole", save_total_limit=None)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    printed = run(tmp_path, "resumed", micro_batch_size=1, **AGAIN)
    assert "the recipe differs from that of the checkpoint in" in printed and "micro_batch_size" in printed
    assert_same_run(tmp_path / "whole", tmp_path / "resumed", 1e-5)


def test_a_new_schedule_holds_from_the_first_resumed_step(tmp_path: Path) -> None:
    run(tmp_path, "out", max_steps=3, lr_scheduler__type="linear")
    shutil.copytree(tmp_path / "out" / "checkpoint-3", tmp_path / "other" / "checkpoint-3")
    run(tmp_path, "out", max_steps=10, lr_scheduler__type="linear", **AGAIN)
    allow = {"resume": {"allow": ["lr_scheduler"]}, "lr_scheduler__type": "constant"}
    run(tmp_path, "other", **allow, **AGAIN)
    for out, expected in (("out", [0.007, 0.006, 0.005]), ("other", [0.01] * 3)):
        rates = [log["learning_rate"] for log in run_state(tmp_path / out)["history"] if "loss" in log]
        assert rates[3:6] == pytest.approx(expected)


def test_a_resumed_run_knows_the_answers_before_training(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"instruction": "Count 3.", "output": "++++"}\n' * 2)
    evaluation = {"prompts": str(prompts), "max_new_tokens": 4}
    whole = run(tmp_path, "whole", save_total_limit=None, evaluation=evaluation).splitlines()[-1]
    assert re.fullmatch(r"exact match: before [\d.]+%, after [\d.]+% on 2 held-out prompts", whole)
    for name in ("resumed", "other"):
        shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / name / "checkpoint-3")
    resumed = run(tmp_path, "resumed", evaluation=evaluation, **AGAIN)
    assert resumed.splitlines()[-1] == whole and "before training" not in resumed
    other = run(tmp_path, "other", evaluation={**evaluation, "limit": 1}, **AGAIN)
    assert "exact match: before" not in other  # it was of two prompts
    assert re.search(r"exact match after training: [\d.]+% of 1 held-out prompts", other)


@pytest.mark.parametrize(
    ("when", "said"),
    [
        ("before training", "SIGINT: stopped before training; nothing to save"),
        (
            "after training",
            "SIGINT: stopped before final was written; resume with resume_from_checkpoint=auto",
        ),
    ],
)
def test_a_signal_outside_the_steps_is_told(
    when: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measure = Answers.measure

    def interrupted(self: Answers, shared: Any, now: str) -> Any:
        if now == when:
            os.kill(os.getpid(), signal.SIGINT)
        return measure(self, shared, now)

    monkeypatch.setattr(Answers, "measure", interrupted)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, "out")
    assert ended.value.code == 130 and capsys.readouterr().err.splitlines()[-1] == said
    monkeypatch.undo()
    run(tmp_path, "out", **AGAIN)
    assert (tmp_path / "out" / "final").exists()


def test_another_recipe_is_refused_unless_allowed(tmp_path: Path) -> None:
    run(tmp_path, "out", max_steps=3)
    allow = {"resume": {"allow": ["optimizer"]}, "optimizer__learning_rate": 0.5, **AGAIN}
    wider = {"model__config__hidden_size": 48, "resume": {"allow": ["model.config"]}}
    for said, changes in {
        r"optimizer\.learning_rate was 0\.01 and is now 0\.5": {**allow, "resume": {}},
        r"optimizer\.type.*start a new run": {**allow, "optimizer__type": "muon"},
        r"cannot be loaded: Size mismatch.*lm_head": {**AGAIN, **wider},
        r"ema\.decay": {**AGAIN, "ema__decay": 0.9, "resume": {"allow": ["ema"]}},
        "holds a run already": {},
    }.items():
        with pytest.raises(UnmaskError, match=said):
            run(tmp_path, "out", **changes)
    run(tmp_path, "out", **allow)
    with pytest.raises(UnmaskError, match="is a finished run"):
        run(tmp_path, "out", **allow)


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
    printed = run(tmp_path, "out", save_steps=2, **AGAIN)
    assert "checkpoint-4" in printed and "is damaged" in printed
    assert f"resuming from {out / 'checkpoint-2'}" in printed
    (out / "checkpoint-4" / "state.json").write_text("{}")
    with pytest.raises(UnmaskError, match=r"state\.json is damaged"):
        run(tmp_path, "out", resume_from_checkpoint=str(out / "checkpoint-4"))


def test_a_full_disk_during_a_checkpoint_loses_nothing(tmp_path: Path) -> None:
    run(tmp_path, "out", max_steps=3)
    out, limits = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # no longer file can be written
    try:
        with pytest.raises(UnmaskError, match=r"checkpoint-6: could not be written"):
            run(tmp_path, "out", **AGAIN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert damage(out / "checkpoint-3") is None
    assert not (out / "checkpoint-6").exists() and not list(out.glob(PARTIAL))
    run(tmp_path, "out", **AGAIN)
    assert run_state(out)["step"] == 6


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
from tiny import train_run
train_run(Path(sys.argv[1]), sys.argv[2], max_steps=100, save_steps=5, log_steps=3, eval_steps=25,
          resume_from_checkpoint="auto")
"""


def start(out: Path) -> subprocess.Popen[bytes]:
    program = PROGRAM.format(tests=str(Path(__file__).parent))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", program, str(out.parent), out.name], env=environment)


@pytest.mark.slow
def test_signals_save_and_kills_lose_nothing(tmp_path: Path) -> None:
    run_recipe(tmp_path)  # writes the data
    whole, out = tmp_path / "whole", tmp_path / "out"
    with start(whole) as process:
        assert process.wait(200) == 0
    draw = random.Random(0)
    for number, code in (
        (signal.SIGTERM, 143),
        (signal.SIGKILL, -9),
        (signal.SIGINT, 130),
        (signal.SIGKILL, -9),
    ):
        before = checkpoints(out)
        with start(out) as process:
            while process.poll() is None and checkpoints(out)[:1] == before[:1]:
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.1))
            process.send_signal(number)
            assert process.wait(60) == code
    assert not (out / "final").exists() and newest_whole(out)[0] is not None
    with start(out) as process:
        assert process.wait(200) == 0
    assert_same_run(whole, out)

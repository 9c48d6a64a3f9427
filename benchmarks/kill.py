"""Kill a run at random moments, resume it each time, and compare it with one that was left alone.

    python benchmarks/kill.py [--kills 30] [--seed 0]

Half of the kills fall where they may, half in the middle of a save. Each is a SIGKILL, after which nothing of
the process runs; the run is resumed by `resume_from_checkpoint: auto`, as after a failure of the machine. At the
end the losses of every step, the held-out losses and the final weights must be those of the run left alone,
bit for bit. The process that trains is a fork of one that has imported everything, so that the moments fall
in training and saving. A model of 150 thousand parameters on a CPU; takes about three minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

from unmask.config import recipe_from_dict
from unmask.training.checkpoint import PARTIAL, STATE, checkpoints, newest_whole, step_of
from unmask.training.train import train  # imported here, so that a fork has it

STEPS = 500
SAVE_STEPS = 5


def recipe(out: Path, data: Path) -> dict[str, Any]:
    """A run that often saves, with a curriculum, evaluations and packed rows."""
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {
        "training_mode": "sft",
        "seed": 3,
        "model": {
            "config": {**sizes, "max_position_embeddings": 256},
            "tokenizer": "bytes",
            "noise_eps": [0.1, 0.001],
            "time_sampling": "low_discrepancy",
            "prefix_probability": 0.2,
        },
        "data": {"dataset_name": str(data), "block_size": 96, "packing": True, "eval_size": 10},
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "max_steps": STEPS,
        "precision": "fp32",
        "optimizer": {"learning_rate": 1e-3},
        "log_steps": 7,
        "eval_steps": 40,
        "save_steps": SAVE_STEPS,
        "save_total_limit": 2,
        "report_to": [],
        "checkpoint_save_dir": str(out),
        "resume_from_checkpoint": "auto",
    }


def start(out: Path, data: Path) -> int:
    """Train in a separate process; returns its id."""
    child = os.fork()
    if child:
        return child
    try:
        train(recipe_from_dict(recipe(out, data)), Console(quiet=True))
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(2)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def steps(out: Path) -> int:
    found, _ = newest_whole(out)
    return 0 if found is None else step_of(found)


def newest(out: Path) -> int:
    """The step of the newest checkpoint, whole or not."""
    found = checkpoints(out)
    return step_of(found[0]) if found else 0


def writing(out: Path) -> bool:
    """Whether a checkpoint is being written, or was when the process was killed."""
    return any(out.glob(PARTIAL))


def history(out: Path) -> list[dict[str, float]]:
    state = json.loads((out / f"checkpoint-{STEPS}" / STATE).read_text())
    names = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")
    return [{name: log[name] for name in names if name in log} for log in state["history"]]


def kill(out: Path, data: Path, draw: random.Random, saving: bool) -> str | None:
    """Train until killed; returns what the moment was, or None if the run came to its end before."""
    before = newest(out)
    child = start(out, data)
    # Some saves after the start, and then at some time, or at some time after the next save begins.
    more, pause = SAVE_STEPS * draw.randint(0, 2), draw.uniform(0.0, 0.02 if saving else 0.4)
    moment = None
    while moment is None or time.monotonic() < moment:
        if os.waitpid(child, os.WNOHANG)[0]:
            return None
        reached = newest(out) >= before + more and (not saving or writing(out))
        if moment is None and reached:
            moment = time.monotonic() + pause
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    if wait(child) != -signal.SIGKILL:
        return None
    return "in a save" if writing(out) else "between saves"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw, moments = random.Random(options.seed), {"in a save": 0, "between saves": 0}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        records = [{"instruction": f"Count {n}", "output": "+" * (n % 40 + 1)} for n in range(120)]
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
        whole, out = Path(folder) / "whole", Path(folder) / "killed"
        assert wait(start(whole, data)) == 0
        lost: list[int] = []
        while sum(moments.values()) < options.kills:
            before = steps(out)
            moment = kill(out, data, draw, saving=sum(moments.values()) % 2 == 0)
            if moment is None:
                sys.exit(f"the run ended after {sum(moments.values())} kills: too few steps for so many")
            moments[moment] += 1
            after = steps(out)
            print(f"kill {sum(moments.values()):2}: {moment}; newest whole checkpoint {before} -> {after}")
            assert after >= before, "a checkpoint was lost"
            lost.append(after)
        assert wait(start(out, data)) == 0
        same_history = history(out) == history(whole)
        weights = [load_file(place / "final" / "model.safetensors") for place in (whole, out)]
        same_weights = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        left = sorted(path.name for path in out.iterdir())
    said = ", ".join(f"{count} {moment}" for moment, count in moments.items())
    print(f"{options.kills} kills: {said}; {len(set(lost))} different checkpoints resumed from")
    print(f"logged losses, gradient norms and held-out losses the same: {same_history}")
    print(f"final weights the same to the bit: {same_weights}")
    print(f"left in the folder: {', '.join(left)}")
    sys.exit(0 if same_history and same_weights else 1)


if __name__ == "__main__":
    main()

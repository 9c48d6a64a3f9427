"""The model card of a checkpoint, and its provenance: everything needed to repeat the run."""

from __future__ import annotations

import glob
import hashlib
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template
from typing import Any

import torch

import unmask
from unmask.config import Recipe
from unmask.data.prepare import tokenizer_fingerprint
from unmask.io import sha256
from unmask.training.build import loss_unit
from unmask.training.checkpoint import RunState
from unmask.training.metrics import GIB, Usage
from unmask.training.parallel import Processes
from unmask.training.report import attention_name, trainable_summary

FILE = "provenance.json"
WHOLE = 2**30  # bytes up to which a file is hashed whole
END = 2**20  # bytes of each end that are hashed of a longer one
MOST = 1000  # files of one name that are hashed
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "peft")


def write_card(
    aside: Path,
    folder: Path,
    *,
    recipe: Recipe,
    model: Any,
    state: RunState,
    data: Any,
    usage: Usage,
    origin: Mapping[str, Any],
    train_loss: float,
    held_out_loss: float | None,
    exact_match: tuple[float, float] | None,
) -> None:
    """Write `README.md`, `recipe.yaml` and `provenance.json` into `aside`, which is going to be `folder`.

    Args:
        data: what was trained on, see `RunData`.
        usage: the work of this session and its time.
        origin: see `provenance`.
    """
    rows: dict[str, Any] = {
        "training mode": recipe.training_mode,
        "started from": recipe.model.name_or_path or "random weights",
        "parameters": f"{model.num_parameters():,}",
        "trained": trainable_summary(model, recipe),
        "weights": None if recipe.ema.decay is None else f"moving average, decay {recipe.ema.decay:g}",
        "logit shift": "on" if model.config.logit_shift else "off",
        "attention": attention_name(model.config),
        "data": ", ".join(data_names(recipe)),
        "training examples": None if recipe.data.streaming else f"{len(data.train):,}",
        "records left out": "; ".join(data.left_out()) or None,
        "optimizer steps": f"{state.step:,}",
        "sequences per step": recipe.global_batch_size,
        f"mean training loss ({loss_unit(recipe)})": f"{train_loss:.4f}",
        "training time of the last session (s)": f"{sum(usage.seconds.values()):.0f}",
        "held-out loss (nats per token)": None if held_out_loss is None else f"{held_out_loss:.4f}",
        "exact match on held-out prompts": exact_match and "{:.1%} before, {:.1%} after".format(*exact_match),
    }
    if state.best_loss is not None:
        rows["lowest held-out loss"] = f"{state.best_loss:.4f} at step {state.best_step:,}"
    if usage.computed:
        rows["supervised tokens per second"] = f"{usage.tokens_per_second:,.0f}"
        rows["useful positions per computed position"] = f"{usage.useful_share:.1%}"
        peak = f"{usage.peak_flops / 1e9:,.0f} GFLOP/s"
        rows["model FLOP utilisation"] = f"{usage.utilisation:.1%} of the measured peak ({peak})"
    if usage.peak_memory is not None:
        rows["peak memory of a process"] = f"{usage.peak_memory / GIB:.2f} GiB"
    rows |= origin_rows(origin)
    table = "\n".join(
        f"| {name} | {str(value).replace('|', chr(92) + '|')} |"
        for name, value in rows.items()
        if value is not None
    )
    template = Path(unmask.__file__).parent / "templates" / "card.md"
    text = Template(template.read_text(encoding="utf-8")).substitute(
        model_type=model.config.model_type,
        folder=folder,
        quoted=shlex.quote(str(folder)),
        table=table,
        recipe=recipe.to_yaml(),
    )
    (aside / "README.md").write_text(text, encoding="utf-8")
    (aside / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    (aside / FILE).write_text(json.dumps(origin, indent=2), encoding="utf-8")


def data_names(recipe: Recipe) -> list[str]:
    """The sources of a recipe, a mixture's with their weights."""
    if recipe.data.sources is not None:
        return [f"{one.dataset_name} (weight {one.weight:g})" for one in recipe.data.sources]
    return _listed(recipe.data.dataset_name)


def provenance(recipe: Recipe, tokenizer: Any, group: Processes) -> dict[str, Any]:
    """Collect what a run is made of: recipe, command, versions, commits, devices, checksums of its inputs."""
    sources = [one.dataset_name for one in recipe.data.sources or []] or _listed(recipe.data.dataset_name)
    evaluated = [*_listed(recipe.data.eval_dataset_name), *_listed(recipe.evaluation.prompts)]
    model = recipe.model.name_or_path
    return {
        "recipe": recipe.model_dump(mode="json"),
        "command": sys.argv,
        "versions": {"unmask": unmask.__version__, "python": platform.python_version(), **_versions()},
        "git": {
            "working_folder": _commit(Path.cwd()),
            "package": _commit(Path(unmask.__file__).parent, unmask.__file__),
        },
        "device": _device_name(group.device),
        "processes": group.ranks,
        "data": {name: _contents(name) for name in sources},
        "evaluation_data": {name: _contents(name) for name in evaluated},
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "started_from": None if model is None else _contents(model, "*.safetensors"),
    }


def origin_rows(origin: Mapping[str, Any]) -> dict[str, str]:
    """The provenance in the model card."""
    rows = {"made with": ", ".join(f"{name} {number}" for name, number in origin["versions"].items())}
    for name, what in (("working_folder", "code of the working folder"), ("package", "code of unmask")):
        if (commit := origin["git"][name]) is not None:
            rows[what] = f"git {commit['commit'][:12]}{' with changes' if commit['changed'] else ''}"
    devices = f"{origin['processes']} x {origin['device']}"
    return {**rows, "devices": devices, "seed": str(origin["recipe"]["seed"])}


def _listed(names: str | list[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit(folder: Path, file: str = ".") -> dict[str, Any] | None:
    """The git commit of a folder, and whether tracked files have changed since; None without one, or if git
    does not know the file: a package may be installed inside another project's folder."""
    try:
        commit, changes, _ = (
            subprocess.run(
                ["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for command in (
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no"],
                ["ls-files", "--error-unmatch", "--", file],
            )
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": bool(changes)}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU ({names[0] if names else platform.machine()})"


def _contents(name: str, pattern: str = "*") -> dict[str, Any]:
    """Checksums of the files that a name stands for."""
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob(pattern) if file.is_file())
    else:
        files = [Path(file) for file in sorted(glob.glob(str(path))) if Path(file).is_file()]
    if not files:
        return {"remote": name}
    left = len(files) - MOST
    found = {str(file): _file_hash(file) for file in files[:MOST]}
    return {"files": found, **({"not_hashed": left} if left > 0 else {})}


def _file_hash(path: Path) -> dict[str, Any]:
    """Checksum of a file; of one above 1 GiB that of its size and its first and last MiB."""
    size = path.stat().st_size
    if size <= WHOLE:
        return {"bytes": size, "sha256": sha256(path)}
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(END))
        file.seek(-END, 2)
        digest.update(file.read(END))
    return {"bytes": size, "sha256_of_ends": digest.hexdigest()}

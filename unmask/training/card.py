"""The model card of a checkpoint, and its provenance: everything needed to repeat the run."""

from __future__ import annotations

import glob
import hashlib
import json
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any

import torch

import unmask
from unmask.config import Recipe
from unmask.data.dataset import listed
from unmask.data.prepare import tokenizer_fingerprint
from unmask.io import sha256
from unmask.training.build import loss_unit
from unmask.training.parallel import Processes
from unmask.training.report import attention_name, trainable_summary

PROVENANCE = "provenance.json"
WHOLE, END = 2**30, 2**20  # bytes up to which a file is hashed whole, and of each end of a longer one
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "peft")


def write_card(aside: Path, run: Any, result: Any) -> None:
    """Write `README.md`, `recipe.yaml` and `provenance.json` into `aside`, which becomes `final/`.

    Args:
        run: the `Run` that ends.
        result: its `TrainResult`.
    """
    recipe, model, state, data, origin = run.recipe, run.model, run.state, run.data, run.origin
    usage, exact = run.accounting.session, result.exact_match
    logs, git = usage.logs(), origin["git"]
    peak = f"measured peak ({usage.peak_flops / 1e9:,.0f} GFLOP/s)"
    rows: dict[str, Any] = {
        "training mode": recipe.training_mode,
        "started from": recipe.model.name_or_path or "random weights",
        "parameters": f"{model.num_parameters():,}",
        "trained": trainable_summary(model, recipe),
        "weights": recipe.ema.decay and f"moving average, decay {recipe.ema.decay:g}",
        "logit shift": "on" if model.config.logit_shift else "off",
        "attention": attention_name(model.config),
        "data": ", ".join(f"{name} (weight {w:g})" if w else name for name, w in _sources(recipe).items()),
        "training examples": None if recipe.data.streaming else f"{len(data.train):,}",
        "records left out": "; ".join(data.left_out()) or None,
        "optimizer steps": f"{state.step:,}",
        "sequences per step": data.step_rows,
        f"mean training loss ({loss_unit(recipe)})": f"{result.train_loss:.4f}",
        "training time of the last session (s)": f"{usage.seconds.sum():.0f}",
        "held-out loss (nats per token)": result.held_out_loss and f"{result.held_out_loss:.4f}",
        "exact match on held-out prompts": exact and "{:.1%} before, {:.1%} after".format(*exact),
        "lowest held-out loss": state.best_loss and f"{state.best_loss:.4f} at step {state.best_step:,}",
        "supervised tokens per second": f"{logs['supervised_tokens_per_second']:,.0f}",
        "useful positions per computed position": f"{logs['useful_positions']:.1%}",
        "model FLOP utilisation": f"{logs['model_flops_utilisation']:.1%} of the {peak}",
        "peak memory of a process": f"{logs['peak_memory_gib']:.2f} GiB" if usage.peak_memory else None,
        "made with": ", ".join(f"{name} {number}" for name, number in origin["versions"].items()),
        "code of the working folder": git["working_folder"],
        "code of unmask": git["package"],
        "devices": f"{origin['processes']} x {origin['device']}",
        "seed": recipe.seed,
    }
    lines = [(name, str(value).replace("|", "\\|")) for name, value in rows.items() if value is not None]
    template = Path(unmask.__file__).parent / "templates" / "card.md"
    text = Template(template.read_text(encoding="utf-8")).substitute(
        model_type=model.config.model_type,
        folder=result.checkpoint,
        quoted=shlex.quote(str(result.checkpoint)),
        table="\n".join(f"| {name} | {value} |" for name, value in lines),
        recipe=recipe.to_yaml(),
    )
    (aside / "README.md").write_text(text, encoding="utf-8")
    (aside / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    (aside / PROVENANCE).write_text(json.dumps(origin, indent=2), encoding="utf-8")


def provenance(recipe: Recipe, tokenizer: Any, group: Processes) -> dict[str, Any]:
    """Collect what a run is made of: recipe, command, versions, commits, devices, checksums of its inputs."""
    versions = {"unmask": unmask.__version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in PACKAGES}
    gpu = group.device.type == "cuda"
    model = recipe.model.name_or_path
    return {
        "recipe": recipe.model_dump(mode="json"),
        "command": sys.argv,
        "versions": versions,
        "git": {
            "working_folder": _commit(Path.cwd()),
            "package": _commit(Path(unmask.__file__).parent, unmask.__file__),
        },
        "device": torch.cuda.get_device_name(group.device) if gpu else f"{group.device} {platform.machine()}",
        "processes": group.ranks,
        "data": {name: _contents(name) for name in _sources(recipe)},
        "evaluation_data": {
            name: _contents(name)
            for name in (*listed(recipe.data.eval_dataset_name), *listed(recipe.evaluation.prompts))
        },
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "started_from": None if model is None else _contents(model, "*.safetensors"),
    }


def _sources(recipe: Recipe) -> dict[str, float | None]:
    """The names of the training data, those of a mixture with their weights."""
    if recipe.data.sources is not None:
        return {source.dataset_name: source.weight for source in recipe.data.sources}
    return dict.fromkeys(listed(recipe.data.dataset_name))


def _commit(folder: Path, file: str = ".") -> str | None:
    """The git commit of a folder, ending in -dirty if tracked files have changed since; None if git does not
    know the file: a package may be installed inside another project's folder."""

    def git(*command: str) -> str:
        command = ("git", "-C", str(folder), *command)
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "--", file)
        return git("describe", "--always", "--dirty", "--exclude=*", "--abbrev=40")
    except (OSError, subprocess.SubprocessError):
        return None


def _contents(name: str, pattern: str = "*") -> dict[str, Any]:
    """Checksums of the files of a name."""
    path = Path(name).expanduser()
    found = path.rglob(pattern) if path.is_dir() else map(Path, glob.glob(str(path)))
    files = sorted(file for file in found if file.is_file())
    return {"files": {str(file): _file_hash(file) for file in files}} if files else {"remote": name}


def _file_hash(path: Path) -> dict[str, Any]:
    """Checksum of a file; of one above 1 GiB that of its size and its first and last MiB."""
    size = path.stat().st_size
    if size <= WHOLE:
        return {"bytes": size, "sha256": sha256(path)}
    with path.open("rb") as file:
        start = file.read(END)
        file.seek(-END, 2)
        digest = hashlib.sha256(str(size).encode() + start + file.read(END))
    return {"bytes": size, "sha256_of_ends": digest.hexdigest()}

"""The model card of a checkpoint, and its provenance: everything needed to repeat the run."""

from __future__ import annotations

import glob
import json
import platform
import shlex
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
from unmask.io import git_commit, sha256
from unmask.shipped import find_shipped
from unmask.training.build import loss_unit
from unmask.training.parallel import Processes

PROVENANCE = "provenance.json"
WHOLE = 2**30  # bytes up to which a file is hashed
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "peft")


def write_card(folder: Path, run: Any, result: Any) -> None:
    """Write `README.md`, `recipe.yaml` and `provenance.json` of a `Run` that ends with a `TrainResult`."""
    recipe, state, origin = run.recipe, run.state, run.origin
    bound, exact, best = result.held_out_loss, result.exact_match, state.best_loss
    rows: dict[str, Any] = {
        **run.facts,
        "training mode": recipe.training_mode,
        "data files": ", ".join(origin["data"]),
        "weights": recipe.ema.decay and f"moving average, decay {recipe.ema.decay:g}",
        "optimizer steps": f"{state.step:,}",
        f"mean training loss ({loss_unit(recipe)})": f"{result.train_loss:.4f}",
        "held-out loss (nats per token)": None if bound is None else f"{bound:.4f}",
        "lowest held-out loss": None if best is None else f"{best:.4f} at step {state.best_step:,}",
        "exact match on held-out prompts": exact and "{:.1%} before, {:.1%} after".format(*exact),
        **run.accounting.summary(),
        "made with": ", ".join(f"{name} {number}" for name, number in origin["versions"].items()),
        "code of the working folder": origin["git"]["working_folder"],
        "code of unmask": origin["git"]["package"],
        "devices": f"{origin['processes']} x {origin['device']}",
        "seed": recipe.seed,
    }
    lines = [(name, str(value).replace("|", "\\|")) for name, value in rows.items() if value is not None]
    template = Path(unmask.__file__).parent / "templates" / "card.md"
    text = Template(template.read_text(encoding="utf-8")).substitute(
        model_type=run.model.config.model_type,
        folder=result.checkpoint,
        quoted=shlex.quote(str(result.checkpoint)),
        table="\n".join(f"| {name} | {value} |" for name, value in lines),
        recipe=recipe.to_yaml(),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    (folder / PROVENANCE).write_text(json.dumps(origin, indent=2), encoding="utf-8")


def provenance(recipe: Recipe, tokenizer: Any, group: Processes) -> dict[str, Any]:
    """Collect what a run is made of: recipe, command, versions, commits, devices, checksums of its inputs."""
    versions = {"unmask": unmask.__version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in PACKAGES}
    gpu = group.device.type == "cuda"
    data, model = recipe.data, recipe.model.name_or_path
    names = [source.dataset_name for source in data.sources or ()] or listed(data.dataset_name)
    evaluated = (*listed(data.eval_dataset_name), *listed(recipe.evaluation.prompts))
    return {
        "recipe": recipe.model_dump(mode="json"),
        "command": sys.argv,
        "versions": versions,
        "git": {
            "working_folder": git_commit(Path.cwd()),
            "package": git_commit(Path(unmask.__file__).parent, unmask.__file__),
        },
        "device": torch.cuda.get_device_name(group.device) if gpu else f"{group.device} {platform.machine()}",
        "processes": group.ranks,
        "data": {name: _contents(name) for name in names},
        "evaluation_data": {name: _contents(name) for name in evaluated},
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "started_from": None if model is None else _contents(model, "*.safetensors"),
    }


def _contents(name: str, pattern: str = "*") -> dict[str, Any]:
    """Size and checksum of each file that a name stands for; of one above 1 GiB the size alone."""
    path = Path(find_shipped(name)).expanduser()
    found = path.rglob(pattern) if path.is_dir() else map(Path, glob.glob(str(path)))
    sizes = {file: file.stat().st_size for file in sorted(found) if file.is_file()}
    files = {
        str(file): {"bytes": size, "sha256": sha256(file) if size <= WHOLE else None}
        for file, size in sizes.items()
    }
    return {"files": files} if files else {"remote": name}

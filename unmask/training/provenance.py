"""Everything a run needs to be repeated: `provenance.json`, in each checkpoint and in `final/`."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

import unmask
from unmask.data.prepare import MANIFEST, is_prepared
from unmask.data.prepare import tokenizer_fingerprint as fingerprint
from unmask.io import sha256
from unmask.data.files import RecordFile, find_files
from unmask.recipe import Recipe
from unmask.data.dataset import data_sources as groups_of
from unmask.data.dataset import eval_names

FILE = "provenance.json"
WHOLE = 2**30  # bytes up to which a file is hashed whole
END = 2**20  # bytes of each end that are hashed of a longer one
MOST = 1000  # files of one name that are hashed
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "peft")


class Provenance:
    """Collects where a run comes from, before its first step; writes it into checkpoints (see `AlsoSaved`).

    Attributes:
        facts: as JSON has it; {} on processes that write nothing.
    """

    def __init__(
        self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, device: str, processes: int, main: bool
    ):
        self.facts = _facts(recipe, tokenizer, device, processes) if main else {}

    def save(self, folder: Path) -> None:
        if self.facts:
            text = json.dumps(self.facts, indent=2, ensure_ascii=False) + "\n"
            (folder / FILE).write_text(text, encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Nothing: the run says where it comes from itself."""

    def rows(self) -> dict[str, str]:
        """The lines of the model card."""
        packages = ", ".join(f"{name} {number}" for name, number in self.facts["versions"].items())
        rows = {"made with": packages}
        for name, what in (("working_folder", "code of the working folder"), ("package", "code of unmask")):
            if (commit := self.facts["git"][name]) is not None:
                rows[what] = f"git {commit['commit'][:12]}{' with changes' if commit['changed'] else ''}"
        devices = f"{self.facts['processes']} x {self.facts['device']}"
        return {**rows, "devices": devices, "seed": str(self.facts["recipe"]["seed"])}


def _facts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, device: str, processes: int) -> dict[str, Any]:
    text = recipe.training_mode == "pretrain"
    data = [name for group in groups_of(recipe) for name in group.names]
    prompts = [] if recipe.evaluation.prompts is None else [recipe.evaluation.prompts]
    model = recipe.model.name_or_path
    return {
        "recipe": recipe.model_dump(mode="json"),
        "command": sys.argv,
        "versions": {"unmask": unmask.__version__, "python": platform.python_version(), **_versions()},
        "git": {
            "working_folder": _commit(Path.cwd()),
            "package": _commit(Path(unmask.__file__).parent, unmask.__file__),
        },
        "device": _device_name(device),
        "processes": processes,
        "data": _hashes(data, text),
        "evaluation_data": _hashes(eval_names(recipe), text) | _hashes(prompts, False),
        "tokenizer_sha256": fingerprint(tokenizer),
        "started_from": _weights(Path(model)) if model is not None and Path(model).is_dir() else model,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # peft need not be there
            continue
    return found


def _commit(folder: Path, file: str = ".") -> dict[str, Any] | None:
    """The git commit of a folder, and whether files that git knows have changed since; None without one,
    or if git does not know the file: a package may be installed somewhere in another project's folder."""
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


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    if device != "cpu":
        return device
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU ({names[0] if names else platform.machine()})"


def _hashes(names: Sequence[str], text: bool) -> dict[str, Any]:
    """What tells the contents of each name: the hashes of its files, or why there is none."""
    return {name: _contents(name, text) for name in names}


def _contents(name: str, text: bool) -> Any:
    if is_prepared(name):  # whose manifest has the hashes of its shards
        file = Path(name).expanduser() / MANIFEST
        return {"prepared": {MANIFEST: {"bytes": file.stat().st_size, "sha256": sha256(file)}}}
    files = [file for file in find_files([name], text=text) if isinstance(file, RecordFile)]
    if not files:
        return {"hub": name}
    found = {
        file.label: {"remote": file.path} if file.remote else file_hash(file.path) for file in files[:MOST]
    }
    left = len(files) - len(found)
    return {"files": found, **({"not_hashed": left} if left > 0 else {})}


def file_hash(path: str | Path) -> dict[str, Any]:
    """Hash a file (`sha256`); of one above 1 GiB its size and its first and last MiB (`sha256_of_ends`)."""
    path = Path(path)
    size = path.stat().st_size
    if size <= WHOLE:
        return {"bytes": size, "sha256": sha256(path)}
    with path.open("rb") as file:
        found = hashlib.sha256(str(size).encode())
        found.update(file.read(END))
        file.seek(-END, 2)
        found.update(file.read(END))
    return {"bytes": size, "sha256_of_ends": found.hexdigest()}


def _weights(folder: Path) -> dict[str, Any]:
    """The files of weights of a checkpoint, hashed."""
    files = sorted(folder.glob("*.safetensors"))
    return {"folder": str(folder), "files": {file.name: file_hash(file) for file in files}}

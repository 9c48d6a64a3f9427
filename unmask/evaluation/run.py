"""`unmask eval`: tasks of lm-evaluation-harness on a diffusion model, with files that say how they were made.

The folder of an evaluation has `results.json` (in the harness's layout) and `samples_TASK.jsonl`, which are the
same bytes whatever the batch size, the number of processes, and however often the run was killed; `requests.jsonl`,
from which it resumes; `timing.json`, with what differs from run to run; `report.html` and `card.md`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import platform
import random
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
from lm_eval import evaluate
from lm_eval.api.registry import get_metric
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, hash_string

from unmask.data.files import read_records
from unmask.errors import UnmaskError, UnmaskWarning
from unmask.evaluation.code_tasks import CodeTask
from unmask.evaluation.harness import UnmaskLM
from unmask.evaluation.journal import Journal
from unmask.evaluation.report import card_lines, write_page
from unmask.evaluation.requests import decoding_of
from unmask.evaluation.sandbox import run
from unmask.evaluation.tasks import TASKS
from unmask.io import atomic_write, git_commit, reason, sha256
from unmask.processes import gather, join
from unmask.shipped import find_shipped

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "lm_eval")
WHOLE = 2**30  # bytes up to which a file of weights is hashed
SEEDS = (
    0,
    1234,
)  # of Python's and numpy's generators, by which some tasks order their choices: the harness's own


@dataclass(frozen=True)
class EvalSettings:
    """What is evaluated and how; results depend on these alone, and on the model."""

    tasks: Sequence[str]
    limit: int | None = None
    """The first documents of each task."""
    num_fewshot: int | None = None
    """Examples in the prompt, in place of the task's."""
    chat: bool = False
    """Apply the tokenizer's chat template."""
    system: str | None = None
    """System prompt."""
    seed: int = 0
    canvas: int | str = "task"
    """This and the next four: see `UnmaskLM`."""
    draws: int = 64
    max_draws: int = 1024
    add_bos: bool = False
    dtype: str | None = None
    decoding: Mapping[str, Any] = field(default_factory=dict)
    """Settings of generation, in place of the tasks'."""
    code: Mapping[str, Any] = field(default_factory=dict)
    """Settings of code tasks: data, repeats, k, allow_unsandboxed."""


def run_eval(
    model: str,
    out: Path,
    settings: EvalSettings,
    *,
    include_path: Sequence[Path] = (),
    batch_size: int = 16,
    resume: bool = False,
    allow_code_execution: bool = False,
) -> dict[str, Any] | None:
    """Evaluate a checkpoint on tasks and write the results into `out`.

    Under torchrun the requests are dealt out to the processes, and the first writes.

    Args:
        model: folder or hub name.
        include_path: folders with task files, which come before the harness's own.
        batch_size: rows of a forward pass; changes no result.
        resume: continue an interrupted evaluation of the same settings.
        allow_code_execution: let tasks run what the model writes.

    Returns:
        What `results.json` has, and `samples`; None in all processes but the first.

    Raises:
        UnmaskError: a task, the checkpoint, a setting or the folder cannot be used.
    """
    started = time.perf_counter()
    rank, size = join()
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UnmaskError(f"--out: {out} exists already; --resume continues it, or name another folder.")
    gather(None)  # before one of them writes
    loaded = load_tasks(settings, include_path, allow_code_execution)
    lm = UnmaskLM(
        model,
        batch_size=batch_size,
        dtype=settings.dtype,
        seed=settings.seed,
        canvas=settings.canvas,
        draws=settings.draws,
        max_draws=settings.max_draws,
        add_bos=settings.add_bos,
        **settings.decoding,
    )
    made = provenance(lm, model, settings, loaded["tasks"])
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnmaskError(f"--out: {out} cannot be written: {reason(error)}.") from error
    lm.journal = Journal(out, made, resume)
    loading = time.perf_counter() - started
    found: dict[str, Any] = cast(Any, evaluate)(
        lm,
        loaded,
        limit=settings.limit,
        system_instruction=settings.system,
        apply_chat_template=settings.chat,
        fewshot_as_multiturn=settings.chat,
        confirm_run_unsafe_code=allow_code_execution,
        bootstrap_iters=1000,
    )
    lm.journal.close()
    if rank:
        return None
    samples = {name: _with_details(name, lines, lm) for name, lines in found.pop("samples").items()}
    results = _plain(
        {
            **found,
            "cost": {name: cost_of(lines) for name, lines in samples.items()},
            "open": {name: shares for name, lines in samples.items() if (shares := open_shares(lines))},
            "config": {
                "model": "unmask",
                "model_args": {"pretrained": model, **settings.decoding},
                "limit": settings.limit,
            },
            "git_hash": made["git"],
            "task_hashes": {name: _hash_of(lines) for name, lines in samples.items()},
            "unmask": made,
        }
    )
    samples = _plain(samples)
    for name, lines in samples.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        atomic_write(out / f"samples_{name}.jsonl", text)
    atomic_write(out / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    write_page(out / "report.html", results, samples)
    atomic_write(out / "card.md", card_lines(results))
    seconds = time.perf_counter() - started - loading
    timing = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "batch_size": batch_size,
        "processes": size,
        "resumed": resume,
        "device": str(lm.model.device),
        "machine": platform.platform(),
        "seconds_of_loading": round(loading, 3),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(sum(cost["tokens"] for cost in results["cost"].values()) / seconds, 2),
    }
    atomic_write(out / "timing.json", json.dumps(timing, indent=2) + "\n")
    return {**results, "samples": samples, "timing": timing}


# Tasks.


def load_tasks(settings: EvalSettings, include_path: Sequence[Path], allow_code_execution: bool) -> Any:
    """Load tasks by name: ours, those of the included folders, and the harness's.

    Raises:
        UnmaskError: an unknown task (names the nearest), data that cannot be read or must be downloaded, or
            code that would run without leave.
    """
    include_path = [Path(find_shipped(folder)) for folder in include_path]
    for folder in include_path:
        if not folder.is_dir():
            raise UnmaskError(f"--include-path: {folder} is not a folder.")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    random.seed(SEEDS[0])
    np.random.seed(SEEDS[1])
    paths: Any = [TASKS, *include_path]
    manager = TaskManager(include_path=paths, include_defaults=False, metadata=dict(settings.code))
    if not set(settings.tasks) <= set(manager.all_tasks):  # reading the harness's own takes seconds
        manager = TaskManager(include_path=paths, metadata=dict(settings.code))
    for name in settings.tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "name its folder with --include-path."
            raise UnmaskError(f"--tasks: unknown task {name!r}; {hint}")
        config = manager.task_index[name].cfg or {}
        if config.get("unsafe_code"):
            _check_code(name, "class" in config, settings, allow_code_execution)
    loaded: Any = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in dict.fromkeys(settings.tasks):
        try:
            parts = manager.load([name])
        except UnmaskError:
            raise
        except Exception as error:  # whatever the libraries make of files that are missing or broken
            raise _data_error(name, manager.task_index[name].cfg or {}, error) from error
        for kind in loaded:
            loaded[kind] |= cast(Any, parts).get(kind, {})
    for name, task in loaded["tasks"].items():
        ours = isinstance(task, CodeTask)
        if not ours:
            _check_metrics(name, task)
        if getattr(task, "UNSAFE_CODE", False):
            _check_code(name, ours, settings, allow_code_execution)
        if ours and "temperature" in settings.decoding:  # it warns of repeats that would be equal
            chosen = {"temperature": settings.decoding["temperature"]}
            task.set_config(key="generation_kwargs", value=chosen, update=True)
        own = task.get_config("num_fewshot")
        if settings.num_fewshot is not None and own != 0:  # 0 = the task has no examples
            task.set_config(key="num_fewshot", value=settings.num_fewshot)
        elif settings.num_fewshot:
            warnings.warn(
                f"task {name}: it says num_fewshot: 0, so --num-fewshot has no effect on it.",
                UnmaskWarning,
                stacklevel=2,
            )
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEEDS[1])
    return loaded


def _check_metrics(name: str, task: Any) -> None:
    """Refuse a metric that nobody knows, which the harness finds out once all answers are there."""
    if task.OUTPUT_TYPE != "generate_until" or task.get_config("process_results") is not None:
        return
    for metric in task.get_config("metric_list") or []:
        if (
            isinstance(metric["metric"], str)
            and get_metric(metric["metric"], bool(metric.get("hf_evaluate"))) is None
        ):
            raise UnmaskError(f"task {name}: unknown metric {metric['metric']!r}.")


def _check_code(name: str, sandboxed: bool, settings: EvalSettings, allowed: bool) -> None:
    """Refuse to run code without leave, and before the model is loaded where it could not be isolated."""
    if not allowed:
        raise UnmaskError(
            f"task {name}: it runs code that the model writes; allow it: --allow-code-execution."
        )
    unsandboxed = settings.code.get("allow_unsandboxed", False)
    if not sandboxed and not unsandboxed:
        raise UnmaskError(
            f"task {name}: it runs code that the model writes without isolation; take one of our own"
            " (unmask_humaneval, unmask_mbpp, ...), or allow it: --allow-unsandboxed."
        )
    if sandboxed:
        run("", allow_unsandboxed=unsandboxed)


def _data_error(name: str, config: Mapping[str, Any], error: Exception) -> UnmaskError:
    """The error of a task that does not load, in one line: the place in its data, or that they are elsewhere."""
    files = (config.get("dataset_kwargs") or {}).get("data_files") or []
    splits = files.values() if isinstance(files, Mapping) else [files]
    for file in [one for split in splits for one in ([split] if isinstance(split, str) else split)]:
        if not Path(file).exists():
            return UnmaskError(f"task {name}: its data file {file} does not exist.")
        try:
            for _ in read_records(file):
                pass
        except UnmaskError as problem:
            return UnmaskError(f"task {name}: {problem}")
    if isinstance(error, ConnectionError) or "offline" in str(error).lower():
        return UnmaskError(
            f"task {name}: its data {config.get('dataset_path')} must be downloaded, and the hub cannot be reached;"
            " run it once online, or give a task file with local data_files by --include-path."
        )
    return UnmaskError(f"task {name}: it cannot be loaded: {reason(error)} ({type(error).__name__}).")


# What was found, and how.


def provenance(lm: UnmaskLM, model: str, settings: EvalSettings, tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that results depend on: also what `--resume` compares."""
    config, chat = lm.model.config, lm.encoder.chat if settings.chat else None
    decoding = {}
    for name, task in tasks.items():
        if task.OUTPUT_TYPE == "generate_until":
            asked = task.get_config("generation_kwargs") or {}
            one = decoding_of(lm.own, asked, lm.canvas, lm.settings, f"task {name}")
            told = {key: value for key, value in one.settings.items() if value not in (None, False)}
            policy = lm.own.updated(None, **one.settings).policy_name
            decoding[name] = {**told, "policy": policy, "until": list(one.stop)}
    tokenizer = lm.tokenizer
    return _plain(
        {
            "model": model,
            "weights": weights_of(model, config),
            "parameters": lm.model.num_parameters(),
            "dtype": str(lm.model.dtype).removeprefix("torch."),
            "attention": config.attention,
            "block_length": config.block_length,
            "logit_shift": config.logit_shift,
            "limit": settings.limit,
            "num_fewshot": {name: task.get_config("num_fewshot") for name, task in tasks.items()},
            "canvas": lm.canvas,
            "settings": dict(settings.decoding),
            "tasks": {
                name: {"version": task.VERSION, "config": _hash(task.dump_config())}
                for name, task in tasks.items()
            },
            "decoding": decoding,
            "chat_template": chat and {"sha256": _hash(chat.chat_template), "thinking": chat.thinking},
            "system": settings.system,
            "bos": {"added": settings.add_bos, "token": tokenizer.bos_token},
            "end_tokens": lm.own.eos_token_ids or config.eos_token_id,
            "seed": settings.seed,
            "draws": lm.draws,
            "max_draws": lm.max_draws,
            "code": dict(settings.code),
            "versions": {"unmask": version("unmask"), "python": platform.python_version()}
            | {name: version(name) for name in PACKAGES},
            "git": git_commit(Path(__file__).parent, __file__),
        }
    )


def weights_of(model: str, config: Any) -> dict[str, Any]:
    """Size and checksum of each file of weights of a folder, of one above 1 GiB the size alone; or the commit of
    a model on the hub."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return {"commit": getattr(config, "_commit_hash", None)}
    files = sorted(folder.glob("*.safetensors"))
    return {
        file.name: {"bytes": size, "sha256": sha256(file) if size <= WHOLE else None}
        for file, size in ((file, file.stat().st_size) for file in files)
    }


def _with_details(name: str, lines: list[dict[str, Any]], lm: UnmaskLM) -> list[dict[str, Any]]:
    """Samples in the harness's layout, in the order of the documents, with what each request took."""
    whole = []
    for line in lines:
        arguments = {
            f"gen_args_{i}": {f"arg_{j}": value for j, value in enumerate(request)}
            for i, request in enumerate(line["arguments"])
        }
        requests = lm.details[name, line["doc_id"]]
        whole.append({**line, "arguments": arguments, "requests": requests, "cost": _sums(requests)})
    return whole


def _sums(requests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    sums = {name: sum(one[name] for one in requests) for name in ("tokens", "forward_passes")}
    return {**sums, "tokens_per_forward": round(sums["tokens"] / max(1, sums["forward_passes"]), 4)}


def cost_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Tokens and forward passes of all documents; each counts once, whatever the number of filters."""
    return _sums([line["cost"] for line in {line["doc_id"]: line for line in lines}.values()])


def open_shares(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of multiple-choice questions: the share whose best answer more draws could still change, by metric."""
    questions = [one["open"] for line in lines for one in line["requests"][:1] if "open" in one]
    return {
        name: round(sum(one[name] for one in questions) / len(questions), 6)
        for name in ("acc", "acc_norm")
        if questions and name in lines[0]
    }


def _hash_of(lines: Sequence[Mapping[str, Any]]) -> str:
    return hash_string(
        "".join(line["doc_hash"] + line["prompt_hash"] + line["target_hash"] for line in lines)
    )


def _hash(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    """The value as JSON has it."""
    return json.loads(json.dumps(value, default=handle_non_serializable))

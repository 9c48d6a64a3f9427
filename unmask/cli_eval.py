"""`unmask eval`: tasks of lm-evaluation-harness on a diffusion model."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from typer import Option

from unmask.cli_options import BatchSize, Model, System, decoding_options
from unmask.errors import UnmaskError

SETTINGS = (
    "preset",
    "steps",
    "policy",
    "threshold",
    "factor",
    "entropy_bound",
    "alg_temp",
    "eta",
    "temperature",
    "top_k",
    "top_p",
    "block_length",
    "sub_block_length",
    "first_token_alone",
    "defer_end",
    "guidance_scale",
    "approximate_cache",
)


@decoding_options(*SETTINGS)
def evaluate(
    model: Model,
    tasks: Annotated[str, Option(metavar="A,B", help="Tasks of lm-evaluation-harness, ours, or your own.")],
    out: Annotated[Path, Option(metavar="DIR", help="Folder for the results.")],
    include_path: Annotated[
        list[Path] | None, Option(metavar="DIR", help="Folder with task files; repeatable.")
    ] = None,
    limit: Annotated[int | None, Option(min=1, help="The first N documents of each task.")] = None,
    canvas: Annotated[
        str, Option(metavar="task|N", help="Tokens of the canvas: each task's own token limit, or N for all.")
    ] = "task",
    seed: Annotated[int, Option(help="Seed of the run; each request has one of its own.")] = 0,
    batch_size: BatchSize = 16,
    resume: Annotated[bool, Option("--resume", help="Continue an interrupted evaluation.")] = False,
    chat: Annotated[bool, Option("--chat", help="Apply the chat template.")] = False,
    system: System = None,
    num_fewshot: Annotated[
        int | None, Option(min=0, help="Examples in the prompt, in place of the task's.")
    ] = None,
    draws: Annotated[int, Option(min=2, help="Masks sampled for a likelihood, an even number.")] = 64,
    max_draws: Annotated[
        int, Option(min=2, help="Most draws of a multiple-choice question that is undecided.")
    ] = 1024,
    add_bos: Annotated[
        bool, Option("--add-bos", help="The BOS token begins a prompt without chat template.")
    ] = False,
    dtype: Annotated[str | None, Option(help="float32, bfloat16, ...; by default the checkpoint's.")] = None,
    allow_code_execution: Annotated[
        bool, Option("--allow-code-execution", help="Let code tasks run what the model writes.")
    ] = False,
    allow_unsandboxed: Annotated[
        bool, Option("--allow-unsandboxed", help="... also where the system has no namespaces to isolate it.")
    ] = False,
    data: Annotated[
        list[str] | None,
        Option(metavar="[TASK=]FILE", help="Data of our code tasks: file or hub name; repeatable."),
    ] = None,
    repeats: Annotated[int | None, Option(min=1, help="Answers to each problem of our code tasks.")] = None,
    k: Annotated[str | None, Option(metavar="1,10", help="pass@k of our code tasks.")] = None,
    *,
    decoding: dict[str, Any],
) -> None:
    """Evaluate a checkpoint on tasks: scores with their errors, and what they cost.

    Settings given here come before a task's own. The results do not depend on
    the batch size; an interrupted evaluation is resumable. On several devices:
    torchrun --nproc_per_node=N -m unmask eval ...
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UnmaskError("--tasks: name at least one task.")
    code = _code_settings(data or [], repeats, k, allow_unsandboxed)
    os.environ.setdefault("TQDM_DISABLE", "1")  # the progress bars of the harness, before it is imported
    if find_spec("lm_eval") is None:
        raise UnmaskError("lm-evaluation-harness is not installed: pip install 'unmask[eval]'.")
    from datasets import disable_progress_bars

    from unmask.cli_generate import hide_progress_bars
    from unmask.evaluation.report import show_results
    from unmask.evaluation.run import EvalSettings, run_eval

    hide_progress_bars()
    disable_progress_bars()
    settings = EvalSettings(
        names,
        limit=limit,
        num_fewshot=num_fewshot,
        chat=chat,
        system=system,
        seed=seed,
        canvas=int(canvas) if canvas.isdigit() else canvas,
        draws=draws,
        max_draws=max_draws,
        add_bos=add_bos,
        dtype=dtype,
        decoding=decoding,
        code=code,
    )
    how: dict[str, Any] = {"include_path": include_path or [], "batch_size": batch_size, "resume": resume}
    results = run_eval(model, out, settings, allow_code_execution=allow_code_execution, **how)
    if results is not None:
        show_results(results, Console())
        print(f"results: {out / 'results.json'}")


def _code_settings(
    data: list[str], repeats: int | None, k: str | None, allow_unsandboxed: bool
) -> dict[str, Any]:
    """What code tasks are told."""
    told: dict[str, Any] = {"allow_unsandboxed": True} if allow_unsandboxed else {}
    named = dict(one.split("=", 1) for one in data if "=" in one)
    plain = [one for one in data if "=" not in one]
    if len(plain) > 1 or (plain and named):
        raise UnmaskError("--data: several files need the names of their tasks: --data TASK=FILE.")
    if data:
        told["data"] = plain[0] if plain else named
    if repeats is not None:
        told["repeats"] = repeats
    if k is not None:
        if not all(part.isdigit() and int(part) for part in k.split(",")):
            raise UnmaskError(f"--k: expected numbers such as 1,10; got {k!r}.")
        told["k"] = [int(part) for part in k.split(",")]
    return told

"""What measures a model: `unmask eval`, tasks of lm-evaluation-harness, and `unmask score`, likelihoods."""

from __future__ import annotations

import difflib
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from typer import Argument, Option

from unmask.cli_complete import complete_tasks
from unmask.cli_options import DECODING, BatchSize, System, decoding_options, refuse_unused
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
    model: Annotated[
        list[str] | None, Argument(metavar="MODEL", help="Diffusion checkpoint: folder or hub name.")
    ] = None,
    tasks: Annotated[
        str,
        Option(
            metavar="A,B",
            help="Tasks of lm-evaluation-harness, ours, or your own.",
            autocompletion=complete_tasks,
        ),
    ] = "",
    out: Annotated[Path | None, Option(metavar="DIR", help="Folder for the results.")] = None,
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
    sweep: Annotated[
        str | None,
        Option(
            metavar="NAME=A,B",
            help="Accuracy against tokens per forward pass, by a setting; MODELs compared.",
        ),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None, Option(metavar="A B", help="Paired differences of two folders of results.")
    ] = None,
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
    if compare is not None:
        refuse_unused(True, "with --compare", model=model, tasks=tasks, sweep=sweep, out=out)
        from unmask.evaluation.sweep import compare as run_compare
        from unmask.evaluation.sweep import show_differences

        show_differences(run_compare(*compare), Console())
        return
    if find_spec("lm_eval") is None:
        raise UnmaskError("lm-evaluation-harness is not installed: pip install 'unmask[eval]'.")
    if not model or (len(model) > 1 and sweep is None):
        raise UnmaskError("name a MODEL; several are for --sweep.")
    if out is None:
        raise UnmaskError("--out: name a folder for the results.")
    setting, values = _sweep_values(sweep, decoding) if sweep is not None else ("", [])
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UnmaskError("--tasks: name at least one task.")
    code = _code_settings(data or [], repeats, k, allow_unsandboxed)
    os.environ.setdefault("TQDM_DISABLE", "1")  # the progress bars of the harness, before it is imported
    from datasets import disable_progress_bars

    from unmask.cli_generate import hide_progress_bars
    from unmask.evaluation.report import show_results
    from unmask.evaluation.run import EvalSettings, run_eval

    hide_progress_bars(model[0])
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
    how["allow_code_execution"] = allow_code_execution
    if sweep is not None:
        from unmask.evaluation.sweep import run_sweep, show_sweep

        found = run_sweep(model, out, settings, setting, values, **how)
        if found is not None:
            show_sweep(found, Console())
            print(f"picture: {out / 'sweep.png'}")
        return
    results = run_eval(model[0], out, settings, **how)
    if results is not None:
        show_results(results, Console())
        print(f"results: {out / 'results.json'}")


def _sweep_values(sweep: str, decoding: dict[str, Any]) -> tuple[str, list[Any]]:
    """The setting of --sweep and its values."""
    name, _, texts = sweep.partition("=")
    name = name.strip().replace("-", "_")
    if name not in SETTINGS:
        near = difflib.get_close_matches(name, SETTINGS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it can be one of {', '.join(SETTINGS)}."
        raise UnmaskError(f"--sweep: unknown setting {name!r}; {hint}")
    if name in decoding:
        raise UnmaskError(f"--sweep: {name} is also given by itself; remove one of them.")
    kind, values = DECODING[name][0], []
    for text in texts.split(","):
        try:
            values.append(text.strip().lower() == "true" if kind is bool else kind(text.strip()))
        except ValueError as error:
            raise UnmaskError(f"--sweep: {text.strip()!r} is not a value of {name}.") from error
    if not texts or len(set(values)) < len(values):
        raise UnmaskError(f"--sweep: give different values: {name}=A,B,C; got {sweep!r}.")
    return name, values


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


def score(
    model: Annotated[str, Argument(metavar="MODEL", help="Diffusion checkpoint: folder or hub name.")],
    file: Annotated[
        str, Argument(metavar="FILE", help="Conversations or plain text: file, folder or hub name.")
    ],
    estimator: Annotated[
        str, Option(help="exact_k, continuous (what training estimates) or chain (short texts).")
    ] = "exact_k",
    samples: Annotated[
        int, Option(min=2, help="Draws a record, an even number; more lower the standard error.")
    ] = 64,
    seed: Annotated[int, Option(help="Seed of the masks.")] = 0,
    batch_size: Annotated[int, Option(min=1, help="Batch size; does not change the figures.")] = 16,
    limit: Annotated[int | None, Option(min=1, help="Score the first N records or blocks.")] = None,
    format: Annotated[
        str, Option(help="auto, alpaca, sharegpt, messages, prompt_completion or custom.")
    ] = "auto",
    end_fill: Annotated[
        int, Option(min=1, help="End tokens fill a response to a multiple of N, as in training.")
    ] = 1,
    raw: Annotated[bool, Option("--raw", help="Plain text: in records the field text.")] = False,
    block_size: Annotated[
        int | None, Option(min=1, help="Longest sequence in tokens; plain text is cut into such blocks.")
    ] = None,
    out: Annotated[Path | None, Option(help="Write one JSON line a record to this file.")] = None,
    per_token: Annotated[bool, Option("--per-token", help="With --out: each token, too.")] = False,
    show: Annotated[int, Option(min=0, help="Records to print with their tokens in colour.")] = 0,
) -> None:
    """Bound the likelihood of a file: nats, perplexity and bits per byte, with standard errors.

    Of a conversation the last response is scored, given all before it; plain
    text is scored block by block. The figures are upper bounds of -log p.
    """
    from unmask.cli_generate import hide_progress_bars

    hide_progress_bars(model)
    from unmask.evaluation.score import score_file, show_records, show_total

    console = Console()
    scored = score_file(
        model,
        file,
        raw=raw,
        format=format,
        end_fill=end_fill,
        block_size=block_size,
        limit=limit,
        estimator=estimator,
        num_samples=samples,
        seed=seed,
        batch_size=batch_size,
        out=out,
        per_token=per_token,
    )
    show_records(scored, show, console)
    show_total(scored, console)

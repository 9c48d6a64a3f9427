"""Accuracy against parallelism: one setting at several values, for models side by side; and evaluations compared.

The area under the curve is AUP, as d3LLM defines it (Qian et al., arXiv:2601.07568): with accuracies y_i in percent
at rho_1 < rho_2 < ... tokens per forward pass,

    AUP = rho_1 y_1 + 1/2 sum_{i>1} (rho_i - rho_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1}))
    W(y) = min(exp(-3 (1 - y / y_max)), 1)

over the points with y_i >= y_1 - 5; y_max is the best accuracy of all models in the picture.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from unmask.errors import UnmaskError
from unmask.evaluation.harness import UnmaskLM
from unmask.evaluation.report import metric_rows
from unmask.evaluation.requests import decoding_of
from unmask.evaluation.run import EvalSettings, run_eval
from unmask.io import atomic_write
from unmask.plots import draw_sweep
from unmask.progress import Bar

ALPHA, WITHIN = 3.0, 5.0  # of AUP: weight of lost accuracy, and percent that may be lost at all
RESAMPLES = 10_000
FORMULA = (
    "rho_1 y_1 + 1/2 sum_{i>1} (rho_i - rho_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1})), W(y) = min(exp(-3 (1 -"
)
FORMULA += " y / y_max)), 1), y in percent, rho in tokens per forward pass, points with y_i >= y_1 - 5"


def aup(points: Sequence[tuple[float, float]], best: float) -> float:
    """Accuracy under parallelism of (tokens per forward pass, accuracy in percent); see the head of this module.

    Examples:
        >>> aup([(1.0, 80.0), (3.0, 80.0)], best=80.0)
        240.0
    """
    ordered = sorted(points)
    kept = [(rho, y) for rho, y in ordered if y >= ordered[0][1] - WITHIN]

    def weighted(y: float) -> float:
        return y * min(math.exp(-ALPHA * (1 - y / best)), 1.0) if best else 0.0

    (rho, y), area = kept[0], kept[0][0] * kept[0][1]
    for next_rho, next_y in kept[1:]:
        area += (next_rho - rho) * (weighted(next_y) + weighted(y)) / 2
        rho, y = next_rho, next_y
    return area


def run_sweep(
    models: Sequence[str], out: Path, settings: EvalSettings, setting: str, values: Sequence[Any], **how: Any
) -> dict[str, Any] | None:
    """Evaluate models at each value of a setting of generation; write `sweep.json` and `sweep.png` into `out`.

    Every evaluation has a folder of its own, `out/MODEL/SETTING=VALUE`; the curve of a task is that of its first
    metric.

    Args:
        **how: see `run_eval`; with `resume` finished evaluations are read again.

    Returns:
        What `sweep.json` has; None in all processes but the first.
    """
    names = _short_names(models)
    each = [replace(settings, decoding={**settings.decoding, setting: value}) for value in values]
    for model in models:
        _check(model, each, setting)
    curves: dict[str, dict[str, list[dict[str, Any]]]] = {}
    metrics: dict[str, str] = {}
    runs = [
        (model, name, value, one)
        for model, name in zip(models, names, strict=True)
        for value, one in zip(values, each, strict=True)
    ]
    with Bar("evaluating", len(runs), "runs") as bar:
        for model, name, value, one in bar.over(runs):
            results = run_eval(model, out / name / f"{setting}={value}", one, **how)
            if results is None:
                continue
            for row in metric_rows(results):
                if row.task not in results["unmask"]["decoding"]:
                    raise UnmaskError(
                        f"--sweep: task {row.task} writes no answers; {setting} changes nothing in it."
                    )
                if metrics.setdefault(row.task, row.metric) != row.metric:
                    continue
                cost = results["cost"][row.task]["tokens_per_forward"]
                point = {"value": value, "score": row.value, "stderr": row.stderr, "tokens_per_forward": cost}
                curves.setdefault(row.task, {}).setdefault(name, []).append(point)
    if not curves:
        return None
    tasks = {}
    for task, by_model in curves.items():
        best = 100 * max(point["score"] for points in by_model.values() for point in points)
        tasks[task] = {
            "metric": metrics[task],
            "best_percent": best,
            "curves": [
                {
                    "model": name,
                    "points": points,
                    "aup": aup(
                        [(point["tokens_per_forward"], 100 * point["score"]) for point in points], best
                    ),
                }
                for name, points in by_model.items()
            ],
        }
    sweep = {"setting": setting, "aup": FORMULA, "tasks": tasks}
    atomic_write(out / "sweep.json", json.dumps(sweep, indent=2, ensure_ascii=False) + "\n")
    draw_sweep(tasks, out / "sweep.png", setting)
    return sweep


def _check(model: str, each: Sequence[EvalSettings], setting: str) -> None:
    """Refuse what can be refused before the first evaluation, which may take hours."""
    first = each[0]
    lm = UnmaskLM(model, dtype=first.dtype, canvas=first.canvas, **first.decoding)
    for one in each:
        decoding_of(lm.own, {}, lm.canvas, one.decoding, f"--sweep {setting}={one.decoding[setting]}")


def show_sweep(sweep: Mapping[str, Any], console: Console) -> None:
    """Print the points of every curve and its area."""
    table = Table(box=None, pad_edge=False)
    for name in ("task", "model", sweep["setting"], "score", "", "tokens per forward pass", "AUP"):
        table.add_column(name)
    for task, found in sweep["tasks"].items():
        for curve in found["curves"]:
            for number, point in enumerate(curve["points"]):
                error = "" if point["stderr"] is None else f"± {point['stderr']:.4f}"
                area = "" if number else f"{curve['aup']:.1f}"
                figures = (f"{point['score']:.4f}", error, f"{point['tokens_per_forward']:.2f}", area)
                table.add_row(task, curve["model"], str(point["value"]), *figures)
    console.print(table, highlight=False)


def _short_names(models: Sequence[str]) -> list[str]:
    """The last part of each name, all different."""
    names = [Path(model).name for model in models]
    if len(set(names)) < len(names):
        names = [model.strip("/").replace("/", "_") for model in models]
    if len(set(names)) < len(names):
        raise UnmaskError("--sweep: the same model is named twice.")
    return names


@dataclass(frozen=True)
class Difference:
    """The mean of B minus A over the documents that both have, with its 95% bootstrap interval."""

    task: str
    metric: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    documents: int


def compare(a: Path, b: Path) -> list[Difference]:
    """Compare two evaluations document by document: differences B - A of every metric of their common tasks.

    The interval is the percentile bootstrap over the documents (10,000 resamples, a fixed seed), which keeps what
    both evaluations find hard together.

    Raises:
        UnmaskError: a folder is not one of `unmask eval`, they share no task, or the documents of one differ.
    """
    first, second = _read(a), _read(b)
    shared = [task for task in first if task in second]
    if not shared:
        raise UnmaskError(
            f"--compare: {a} has tasks {', '.join(first)}; {b} has {', '.join(second)}: none in common."
        )
    return [one for task in shared for one in _differences(task, first[task], second[task], a, b)]


def _differences(task: str, first: Any, second: Any, a: Path, b: Path) -> Iterator[Difference]:
    if first.keys() != second.keys() or any(
        first[key]["doc_hash"] != second[key]["doc_hash"] for key in first
    ):
        raise UnmaskError(f"--compare: task {task}: {a} and {b} have other documents; evaluate both alike.")
    for kind in dict.fromkeys(kind for _, kind in first):
        keys = [key for key in first if key[1] == kind]
        for metric in first[keys[0]]["metrics"]:
            pairs = [(first[key].get(metric), second[key].get(metric)) for key in keys]
            if not all(isinstance(value, int | float) for pair in pairs for value in pair):
                continue  # a pair of sums, such as nats and bytes, has no mean over documents
            values = np.array(pairs, dtype=float)
            difference = values[:, 1] - values[:, 0]
            drawn = np.random.default_rng(0).integers(len(difference), size=(RESAMPLES, len(difference)))
            low, high = np.quantile(difference[drawn].mean(axis=1), [0.025, 0.975])
            name = metric if kind == "none" else f"{metric} ({kind})"
            means = values.mean(axis=0)
            figures = (means[0], means[1], difference.mean(), low, high)
            yield Difference(task, name, *map(float, figures), documents=len(difference))


def _read(folder: Path) -> dict[str, dict[tuple[int, str], Any]]:
    """The samples of each task of an evaluation, by document and filter."""
    try:
        tasks = json.loads((folder / "results.json").read_text(encoding="utf-8"))["cost"]
        return {
            task: {
                (line["doc_id"], line["filter"]): line
                for line in map(
                    json.loads, (folder / f"samples_{task}.jsonl").read_text("utf-8").splitlines()
                )
            }
            for task in tasks
        }
    except (OSError, ValueError, KeyError) as error:
        raise UnmaskError(f"--compare: {folder} has no finished evaluation of `unmask eval`.") from error


def show_differences(differences: Sequence[Difference], console: Console) -> None:
    """Print a table of differences."""
    table = Table(box=None, pad_edge=False)
    for name in ("task", "metric", "A", "B", "B - A", "95% interval", "documents"):
        table.add_column(name)
    for one in differences:
        interval = f"{one.low:+.4f} to {one.high:+.4f}"
        figures = (f"{one.a:.4f}", f"{one.b:.4f}", f"{one.difference:+.4f}", interval, f"{one.documents:,}")
        table.add_row(one.task, one.metric, *figures)
    console.print(table, highlight=False)

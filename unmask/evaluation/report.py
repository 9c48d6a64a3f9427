"""What an evaluation found, for people: a table in the terminal, a page, lines for a model card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table


class Row(NamedTuple):
    """One metric of one task."""

    task: str
    metric: str
    value: float
    stderr: float | None
    documents: int
    open: float | None  # share of questions that more draws could still turn


def metric_rows(results: Mapping[str, Any]) -> Iterator[Row]:
    """The metrics of `results.json`, task by task; a filter is named where it is not "none"."""
    for task, figures in results["results"].items():
        for name, value in figures.items():
            metric, _, kind = name.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = figures.get(f"{metric}_stderr,{kind}")
            shown = metric if kind == "none" else f"{metric} ({kind})"
            open_ = results["open"].get(task, {}).get(metric)
            yield Row(
                task,
                shown,
                value,
                stderr if isinstance(stderr, float) else None,
                figures["sample_len"],
                open_,
            )


def cost_text(cost: Mapping[str, Any]) -> str:
    """What a task cost, in words."""
    return (
        f"{cost['forward_passes']:,} forward passes, {cost['tokens']:,} tokens,"
        f" {cost['tokens_per_forward']:.2f} tokens per forward pass"
    )


def show_results(results: Mapping[str, Any], console: Console) -> None:
    """Print the scores with their standard errors, what is still open, and what it cost."""
    table = Table(box=None, pad_edge=False)
    for name, justify in (
        ("task", "left"),
        ("metric", "left"),
        ("score", "right"),
        ("", "left"),
        ("documents", "right"),
    ):
        table.add_column(name, justify=justify, no_wrap=name != "task")  # pyright: ignore[reportArgumentType]
    for row in metric_rows(results):
        error = "" if row.stderr is None else f"± {row.stderr:.4f}"
        table.add_row(row.task, row.metric, f"{row.value:.4f}", error, f"{row.documents:,}")
    console.print(table, highlight=False)
    for task, shares in results["open"].items():
        for metric, share in shares.items():
            console.print(
                f"{task}: {metric}: more draws could still turn {share:.1%} of the questions", highlight=False
            )
    for task, cost in results["cost"].items():
        console.print(f"{task}: {cost_text(cost)}", highlight=False)
    timing = results["timing"]
    console.print(f"{timing['seconds']:,.1f} s, {timing['tokens_per_second']:,.1f} tokens/s", highlight=False)

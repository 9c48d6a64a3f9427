"""What an evaluation found, for people: a table in the terminal, a page, lines for a model card."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment
from rich.console import Console
from rich.table import Table

from unmask.io import atomic_write

SHOWN = 500  # documents of a task on the page
LONGEST = 4000  # characters of a text on the page


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
            stderr = stderr if isinstance(stderr, int | float) else None
            shown = metric if kind == "none" else f"{metric} ({kind})"
            open_ = results["open"].get(task, {}).get(metric)
            yield Row(task, shown, value, stderr, figures["sample_len"], open_)


def show_results(results: Mapping[str, Any], console: Console) -> None:
    """Print the scores with their standard errors, what is still open, and what it cost."""
    table = Table(box=None, pad_edge=False)
    for name in ("task", "metric", "score", "", "documents"):
        justify = "right" if name in ("score", "documents") else "left"
        table.add_column(name, justify=justify, no_wrap=name != "task")
    for row in metric_rows(results):
        error = "" if row.stderr is None else f"± {row.stderr:.4f}"
        table.add_row(row.task, row.metric, f"{row.value:.4f}", error, f"{row.documents:,}")
    console.print(table, highlight=False)
    lines = [
        f"{task}: more draws could still turn {share:.1%} of the questions by {metric}"
        for task, shares in results["open"].items()
        for metric, share in shares.items()
    ]
    for task, cost in results["cost"].items():
        written = task in results["unmask"]["decoding"]
        tokens = f"{cost['tokens']:,} tokens {'written' if written else 'scored'}"
        share = f", {cost['tokens_per_forward']:.2f} per forward pass" if written else ""
        lines.append(f"{task}: {cost['forward_passes']:,} forward passes, {tokens}{share}")
    timing = results["timing"]
    lines.append(f"{timing['seconds']:,.1f} s, {timing['tokens_per_second']:,.1f} tokens/s")
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def card_lines(results: Mapping[str, Any]) -> str:
    """Lines for a model card: the scores as a table, with what is needed to read them."""
    made = results["unmask"]
    lines = [
        "| task | version | metric | score | documents | tokens per forward pass |",
        "|---|---|---|---|---|---|",
    ]
    for row in metric_rows(results):
        error = "" if row.stderr is None else f" ± {row.stderr:.4f}"
        cost, version_ = results["cost"].get(row.task), results["versions"].get(row.task)
        passes = f"{cost['tokens_per_forward']:.2f}" if cost and row.task in made["decoding"] else ""
        lines.append(
            f"| {row.task} | {version_} | {row.metric} | {row.value:.4f}{error} | {row.documents:,} | {passes} |"
        )
    limit = "" if made["limit"] is None else f", the first {made['limit']} documents of each task"
    settings = ", ".join(f"{name}={value}" for name, value in made["settings"].items()) or "the tasks' own"
    chat = "applied" if made["chat_template"] else "not applied"
    lines += [
        "",
        f"`unmask eval` {made['versions']['unmask']}, lm-eval {made['versions']['lm_eval']}, {made['dtype']}, canvas"
        f" {made['canvas']}, settings {settings}, chat template {chat},"
        f" seed {made['seed']}{limit}; ± is one standard error.",
    ]
    return "\n".join(lines) + "\n"


def write_page(file: Path, results: Mapping[str, Any], samples: Mapping[str, Sequence[Any]]) -> None:
    """Write the page: the scores, their cost, and the first documents of each task with their answers."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    source = (files("unmask") / "templates" / "report.html").read_text(encoding="utf-8")
    made = results["unmask"]
    page = environment.from_string(source).render(
        title=f"unmask eval {made['model']}",
        made=made,
        rows=list(metric_rows(results)),
        costs=results["cost"],
        settings=json.dumps(made, indent=2, ensure_ascii=False),
        tasks={task: [_item(line) for line in lines[:SHOWN]] for task, lines in samples.items()},
        left={task: max(0, len(lines) - SHOWN) for task, lines in samples.items()},
    )
    atomic_write(file, page)


def _item(line: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of one document."""
    verdicts = []
    for name in line["metrics"]:
        value = line[name]
        if isinstance(value, int | float):
            kind = "right" if value == 1 else "wrong" if value == 0 else ""
            verdicts.append((name, f"{value:g}", kind))
    if line["filter"] != "none":
        verdicts.append(("filter", line["filter"], ""))
    first = next(iter(line["arguments"].values()))
    answers = []
    if "nats" in line["requests"][0]:
        best = min(range(len(line["requests"])), key=lambda index: line["requests"][index]["nats"])
        for index, (one, asked) in enumerate(zip(line["requests"], line["arguments"].values(), strict=False)):
            text = asked.get("arg_1", asked["arg_0"])
            mark = ", the likeliest" if index == best and len(line["requests"]) > 1 else ""
            remark = f"{one['nats']:.3f} ± {one['stderr']:.3f} nats, {one['draws']} draws{mark}"
            answers.append({"text": _short(text), "remark": remark})
    else:
        filtered = line["filtered_resps"]
        for number, text in enumerate(text for repeats in line["resps"] for text in repeats):
            taken = filtered[0] if len(filtered) == 1 else None
            remark = "" if number or taken in (None, text) else f"taken: {_short(_text(taken))}"
            answers.append({"text": _short(_text(text)), "remark": remark})
    return {
        "document": line["doc_id"],
        "verdicts": verdicts,
        "prompt": _short(first["arg_0"]) if "arg_1" in first else "",
        "answers": answers,
        "cost": line["cost"],
        "target": _short(_text(line["target"])),
    }


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}\n[...]\n{text[-LONGEST // 2 :]}"

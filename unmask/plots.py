"""The pictures: losses, losses by noise level, the curriculum, and how answers were denoised.

Each function draws data into one file, whose suffix chooses the format (.png, .pdf, .svg).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from unmask.diffusion.objective import PROBABILITIES, Curriculum
from unmask.errors import UnmaskError
from unmask.generation.text import Completion
from unmask.generation.trace import token_texts
from unmask.io import check_output_file

BY_NOISE_LEVEL = "eval_by_t/"  # before the middle of a range of t: a held-out loss by noise level
MOST_STEPS = 4000  # of a curriculum drawn, evenly spaced
MOST_EPOCHS = 12  # named
MOST_ANSWERS = 8  # in one picture
CELLS = 32  # in a row at most
LETTERS = 7  # of a token in the widest kind of cell
LABELS = {
    "prefix_probability": ("prefix as context", "#0072b2"),
    "truncate_probability": ("end cut off", "#d55e00"),
    "block_masking_probability": ("masked in spans", "#009e73"),
    "source_share": ("source never masked", "#cc79a7"),
    "future_share": ("later tokens visible", "#5b4db3"),
}
DASHES = ((1, 0), (5, 2), (1, 1))  # so that equal lines are all visible


def check_picture(file: Path, option: str) -> None:
    """Check that a picture can be written, before the work that it shows.

    Raises:
        UnmaskError: names the option; a suffix that matplotlib does not write, or a path that cannot be
            written.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    suffix = file.suffix.removeprefix(".").lower()
    if suffix not in FigureCanvasBase.get_supported_filetypes():
        raise UnmaskError(
            f"{option}: {file} must end in .png, .pdf or .svg; got {file.suffix or 'no suffix'!r}."
        )
    check_output_file(file, option)


def draw_losses(log_history: Iterable[Mapping[str, float]], file: Path, unit: str = "nats per token") -> None:
    """Plot training and held-out loss against the optimizer step.

    Args:
        log_history: logs with "step" and "loss" (training) or "eval_loss" (held out); others are skipped.
        unit: of the training loss; the held-out loss is always in nats per token.
    """
    logs = list(log_history)
    curves = [
        (
            label,
            style,
            "C0" if key == "loss" else "C1",
            [(log["step"], log[key]) for log in logs if key in log],
        )
        for key, label, style in (
            ("loss", f"training, {unit}", "-"),
            ("eval_loss", "held out, nats per token", "o-"),
        )
    ]
    figure = _draw_curves(curves, "optimizer step", "loss")
    losses = [loss for *_, points in curves for _, loss in points]
    if losses and min(losses) > 0 and max(losses) > 20 * min(losses):
        figure.axes[0].set_yscale("log")  # or the second half of a run would look like zero
    _save(figure, file)


def draw_noise_levels(log_history: Iterable[Mapping[str, float]], file: Path) -> None:
    """Plot the held-out nll per masked token against t, the share of a sample that is masked.

    Args:
        log_history: logs with "step" and "eval_by_t/<t>" for each t; the first and the last are drawn.
    """
    curves = []
    for log in log_history:
        levels = {k.removeprefix(BY_NOISE_LEVEL): v for k, v in log.items() if k.startswith(BY_NOISE_LEVEL)}
        if levels:
            points = sorted((float(level), loss) for level, loss in levels.items())
            curves.append((f"step {log['step']:,}", "o-", "C0" if curves else "0.6", points))
    curves = [*curves[:1], *curves[1:][-1:]]
    figure = _draw_curves(
        curves, "t, share of the sample that is masked", "nats per masked token, held out", xlim=(0, 1)
    )
    _save(figure, file)


def _draw_curves(
    curves: Iterable[tuple[str, str, str, list[Any]]], xlabel: str, ylabel: str, **limits: Any
) -> Any:
    """Draw (label, style, colour, points) from zero to a little above the largest finite value."""
    figure = _figure(8, 4.5)
    axes = figure.subplots()
    top = [0.0]
    for label, style, colour, points in curves:
        if points:
            axes.plot(
                *zip(*points, strict=True), style, color=colour, label=label, linewidth=1.5, markersize=4
            )
            axes.legend()
            top += [value for _, value in points if math.isfinite(value)]
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, 1.05 * max(top) or 1.0), **limits)
    axes.grid(alpha=0.3)
    return figure


def draw_trace(
    file: Path,
    answers: Sequence[Completion],
    tokenizer: PreTrainedTokenizerBase,
    *,
    title: str,
    names: Sequence[str] = (),
) -> None:
    """Draw a heat map of commit step by position, in reading order, one panel per answer.

    Raises:
        UnmaskError: more than `MOST_ANSWERS` answers, nothing to draw, or the file cannot be written.
    """
    from matplotlib.ticker import MaxNLocator

    if len(answers) > MOST_ANSWERS:
        raise UnmaskError(f"a picture shows {MOST_ANSWERS} answers at most; got {len(answers)}.")
    if not any(answer.ids for answer in answers):
        raise UnmaskError("the answer has no token to draw.")
    columns = min(CELLS, max(len(answer.ids) for answer in answers))
    rows = [max(1, math.ceil(len(answer.ids) / columns)) for answer in answers]
    texts = [[_shortened(text) for text in token_texts(answer.ids, tokenizer)] for answer in answers]
    letters = max(len(text) for answer_texts in texts for text in answer_texts)
    width = columns * (0.32 + 0.06 * max(0, letters - 3)) + 2.2  # inches
    height = max(2.2, sum(0.34 * count + 0.75 for count in rows) + 0.6)
    figure = _figure(max(6.0, width), height)
    panels = figure.subplots(len(answers), 1, squeeze=False, gridspec_kw={"height_ratios": rows})[:, 0]
    last = max(2, *(step + 1 for answer in answers for step in answer.commit_step))
    image: Any = None
    for index, (panel, answer, count) in enumerate(zip(panels, answers, rows, strict=True)):
        grid = [[math.nan] * columns for _ in range(count)]
        for position, (step, text) in enumerate(zip(answer.commit_step, texts[index], strict=True)):
            row, column = divmod(position, columns)
            grid[row][column] = step + 1
            colour = "white" if step + 1 < 0.7 * last else "black"
            style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8, "family": "monospace"}
            panel.text(column, row, text, color=colour, parse_math=False, **style)
        image = panel.imshow(grid, cmap="viridis", vmin=1, vmax=last, aspect="auto")
        panel.set_xticks(range(0, columns, max(1, columns // 8)))
        panel.set_yticks(range(count), [str(row * columns) for row in range(count)])
        panel.tick_params(length=0, labelsize=8)
        panel.set_ylabel("position", fontsize=9)
        panel.spines[:].set_visible(False)
        name = f"{names[index]}: " if len(answers) > 1 and names else ""
        panel.set_title(name + answer.figures, fontsize=9, loc="left", parse_math=False)
    figure.suptitle(f"{title}: the step that committed each token", fontsize=10, parse_math=False)
    ticks = MaxNLocator(integer=True)
    figure.colorbar(image, ax=list(panels), label="step", fraction=0.03, ticks=ticks)
    _save(figure, file)


def draw_curriculum(curriculum: Curriculum, max_steps: int, steps_per_epoch: int, file: Path) -> None:
    """Plot what changes over a run against the optimizer step; the title says what never changes.

    Args:
        max_steps: length of the run, in optimizer steps.
        steps_per_epoch: optimizer steps of an epoch; the epochs are marked.

    Raises:
        UnmaskError: the file could not be written.
    """
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    count = min(max_steps, MOST_STEPS)
    steps = [index * max_steps // count for index in range(count)]
    objectives = [curriculum.at(step, step // steps_per_epoch) for step in steps]
    edges = [*steps, max_steps]  # each objective holds from its edge to the next
    names = (*PROBABILITIES, "source_share", "future_share", "eps", "mask_block_sizes")
    values = {name: [getattr(objective, name) for objective in objectives] for name in names}
    changing = {name for name in names if len(set(values[name])) > 1}
    spans = any(values["block_masking_probability"])
    used = [name for name in PROBABILITIES if any(values[name])]

    panels: list[tuple[str, list[str]]] = []
    if changing & set(PROBABILITIES):
        panels.append(("share of\nsequences", used))
    if spans and "mask_block_sizes" in changing:
        panels.append(("span\n(tokens)", []))
    if shares := [name for name in ("source_share", "future_share") if name in changing]:
        panels.append(("share of\ntokens", shares))
    if "eps" in changing:
        panels.append(("smallest\nmasking rate", ["eps"]))
    figure = _figure(10, 1.4 + 1.5 * max(1, len(panels)))
    grid = figure.subplots(max(1, len(panels)), sharex=True, squeeze=False)[:, 0]
    for axes, (label, lines) in zip(grid, panels, strict=False):
        if lines:
            _draw_steps({name: values[name] for name in lines}, edges, axes)
        else:
            _draw_sizes(values["mask_block_sizes"], edges, axes)
        axes.set_ylabel(label)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    if not panels:
        grid[0].text(0.5, 0.5, "nothing changes", transform=grid[0].transAxes, ha="center", va="center")
        grid[0].set_yticks([])

    first = objectives[0]
    words = [f"loss {first.loss}", f"{first.schedule} noise schedule"]
    words += ["complementary masks"] * first.complementary
    words += [] if "eps" in changing else [f"masking rates from {first.eps:g}"]
    if not changing & set(PROBABILITIES):
        words += [f"{LABELS[name][0]} in {100 * getattr(first, name):.3g}%" for name in used]
    if spans and "mask_block_sizes" not in changing:
        words.append(f"spans of {' or '.join(map(str, first.mask_block_sizes))} tokens")
    figure.suptitle(f"in every step: {', '.join(words)}", x=0.01, ha="left", fontsize=10)

    stride = -(-max_steps // (steps_per_epoch * MOST_EPOCHS))
    starts = range(0, max_steps, steps_per_epoch * stride)
    for axes in grid:
        for start in starts[1:]:
            axes.axvline(start, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
    top = grid[0].secondary_xaxis("top")
    top.set_xticks(starts, [f"epoch {1 + i * stride}" for i in range(len(starts))], fontsize=8, ha="left")
    grid[-1].set(xlim=(0, max_steps), xlabel="optimizer step")
    grid[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    grid[-1].xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    figure.align_ylabels()
    _save(figure, file)


def _draw_steps(lines: Mapping[str, list[float]], edges: list[int], axes: Any) -> None:
    """Lines that hold from one edge to the next; shares in percent, with a legend."""
    from matplotlib.ticker import PercentFormatter

    for (name, values), dashes in zip(lines.items(), DASHES, strict=False):
        label, colour = LABELS.get(name, (None, "0.2"))
        style = {"color": colour, "label": label, "linewidth": 2.5, "linestyle": (0, dashes)}
        axes.stairs(values, edges, baseline=None, **style)
    top = max(map(max, lines.values()))
    axes.set_ylim(-0.05 * top, 1.12 * top)
    if "eps" not in lines:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9, handlelength=3)


def _draw_sizes(values: list[tuple[int, ...]], edges: list[int], axes: Any) -> None:
    """A bar for each length of a span, over the steps that use it."""
    steps = zip(edges, edges[1:], values, strict=False)
    phases = [list(phase) for _, phase in groupby(steps, key=lambda step: step[2])]
    sizes = sorted({size for sizes in values for size in sizes})
    for row, size in enumerate(sizes):
        bars = [(p[0][0], p[-1][1] - p[0][0]) for p in phases if size in p[0][2]]
        colour = LABELS["block_masking_probability"][1]
        axes.broken_barh(bars, (row - 0.35, 0.7), color=colour, linewidth=0)
    axes.set_yticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_ylim(-0.6, len(sizes) - 0.4)


def _figure(width: float, height: float) -> Any:
    """A figure without pyplot, which would keep it and need a display backend; sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _save(figure: Any, file: Path) -> None:
    try:
        figure.savefig(file)
    except OSError as error:
        raise UnmaskError(f"{file} could not be written: {error.strerror}.") from error


def _shortened(text: str) -> str:
    """As much of a token as a cell has room for; a blank shows as ␣."""
    text = text.replace(" ", "␣").replace("⏹", "▪")  # which more fonts have
    return text if len(text) <= LETTERS else text[: LETTERS - 1] + "…"

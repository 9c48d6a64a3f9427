"""The curriculum as a picture: what every optimizer step of a run uses."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from unmask.diffusion.objective import PROBABILITIES, Curriculum, Objective
from unmask.errors import UnmaskError

POINTS = 4000  # steps drawn at most, evenly spaced
EPOCHS = 12  # epoch boundaries named at most
COLOURS = {
    "prefix_probability": "#0072b2",
    "truncate_probability": "#d55e00",
    "block_masking_probability": "#009e73",
    "source_share": "#cc79a7",
    "future_share": "#5b4db3",
}
DASHES = ((1, 0), (5, 2), (1, 1))  # so that equal lines show both
LABELS = {
    "prefix_probability": "prefix as context",
    "truncate_probability": "end cut off",
    "block_masking_probability": "masked in blocks",
    "source_share": "source never masked",
    "future_share": "later tokens visible",
}


def check_picture(file: Path) -> None:
    """Find out whether a picture can be written, before there is one.

    Raises:
        UnmaskError: a format that matplotlib does not write, or a place that cannot be written to.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if file.suffix.removeprefix(".").lower() not in known:
        raise UnmaskError(
            f"--curriculum: {file} must end in .png, .pdf or .svg; got {file.suffix or 'no ending'!r}."
        )
    if file.is_dir():
        raise UnmaskError(f"--curriculum: {file} is a folder; name a file in it.")
    if not file.absolute().parent.is_dir():
        raise UnmaskError(f"--curriculum: {file}: there is no folder {file.parent}; make it first.")
    if not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
        raise UnmaskError(f"--curriculum: {file} cannot be written to.")


class _Course(NamedTuple):
    """The objectives of the steps that are drawn; each holds from its edge to the next."""

    used: list[Objective]
    edges: list[int]

    def values(self, name: str) -> list[Any]:
        return [getattr(objective, name) for objective in self.used]

    def changes(self, name: str) -> bool:
        return len(set(self.values(name))) > 1


def draw_curriculum(curriculum: Curriculum, max_steps: int, steps_per_epoch: int, file: Path) -> None:
    """Plot what changes over a run against the optimizer step; what never changes is said in words.

    Args:
        max_steps: length of the run, in optimizer steps.
        steps_per_epoch: optimizer steps of an epoch; epochs are marked.
        file: see `check_picture`.

    Raises:
        UnmaskError: the file could not be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    count = min(max_steps, POINTS)
    steps = [index * max_steps // count for index in range(count)]
    course = _Course([curriculum.at(step, step // steps_per_epoch) for step in steps], [*steps, max_steps])

    panels: list[tuple[str, Callable[[Any], None]]] = []
    if any(map(course.changes, PROBABILITIES)):
        shown = [name for name in PROBABILITIES if any(course.values(name))]
        panels.append(("share of\nsequences", partial(_draw_shares, course, shown)))
    if any(course.values("block_masking_probability")) and course.changes("mask_block_sizes"):
        panels.append(("block size\n(tokens)", partial(_draw_sizes, course)))
    if shares := [name for name in ("source_share", "future_share") if course.changes(name)]:
        panels.append(("share of\ntokens", partial(_draw_shares, course, shares)))
    if course.changes("eps"):
        panels.append(("smallest\nmasking rate", partial(_draw_rate, course)))
    panels = panels or [("", _draw_nothing)]

    figure, grid = plt.subplots(
        len(panels),
        figsize=(10, 1.4 + 1.5 * len(panels)),
        dpi=120,
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    figure.suptitle(_constants(course), x=0.01, ha="left", fontsize=10)
    for axes, (label, draw) in zip(grid[:, 0], panels, strict=True):
        draw(axes)
        axes.set_ylabel(label)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    _mark_epochs(grid[:, 0], max_steps, steps_per_epoch)
    grid[-1, 0].set_xlim(0, max_steps)
    grid[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    grid[-1, 0].xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    grid[-1, 0].set_xlabel("optimizer step")
    figure.align_ylabels()
    try:
        figure.savefig(file)
    except OSError as error:
        raise UnmaskError(f"--curriculum: {file} could not be written: {error.strerror}.") from error
    finally:
        plt.close(figure)


def _draw_shares(course: _Course, names: list[str], axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    for name, dashes in zip(names, DASHES, strict=False):
        axes.stairs(
            course.values(name),
            course.edges,
            baseline=None,
            color=COLOURS[name],
            label=LABELS[name],
            linewidth=2.5,
            linestyle=(0, dashes),
        )
    top = max(max(course.values(name)) for name in names)
    axes.set_ylim(-0.05 * top, 1.12 * top)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9, handlelength=3)


def _draw_sizes(course: _Course, axes: Any) -> None:
    """A bar for each size, over the steps that draw it."""
    steps = zip(course.edges, course.edges[1:], course.values("mask_block_sizes"), strict=False)
    phases = [list(phase) for _, phase in groupby(steps, key=lambda step: step[2])]
    sizes = sorted({size for [(_, _, drawn), *_] in phases for size in drawn})
    for row, size in enumerate(sizes):
        spans = [(phase[0][0], phase[-1][1]) for phase in phases if size in phase[0][2]]
        bars = [(start, stop - start) for start, stop in spans]
        axes.broken_barh(bars, (row - 0.35, 0.7), color=COLOURS["block_masking_probability"], linewidth=0)
    axes.set_yticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_ylim(-0.6, len(sizes) - 0.4)


def _draw_rate(course: _Course, axes: Any) -> None:
    axes.stairs(course.values("eps"), course.edges, baseline=None, color="0.2", linewidth=2)
    axes.set_ylim(0, 1.12 * max(course.values("eps")))


def _draw_nothing(axes: Any) -> None:
    axes.text(0.5, 0.5, "every step is alike", transform=axes.transAxes, ha="center", va="center")
    axes.set_yticks([])


def _mark_epochs(panels: Any, max_steps: int, steps_per_epoch: int) -> None:
    stride = -(-max_steps // (steps_per_epoch * EPOCHS))
    starts = range(0, max_steps, steps_per_epoch * stride)
    for axes in panels:
        for start in starts[1:]:
            axes.axvline(start, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
    top = panels[0].secondary_xaxis("top")
    top.set_xticks(starts, [f"epoch {1 + index * stride}" for index in range(len(starts))], fontsize=8)
    for label in top.get_xticklabels():
        label.set_horizontalalignment("left")


def _constants(course: _Course) -> str:
    """What never changes, in words."""
    first = course.used[0]
    words = [f"loss {first.loss}", f"{first.schedule} noise schedule"]
    if first.complementary:
        words.append("complementary masks")
    if not course.changes("eps"):
        words.append(f"masking rates from {first.eps:g}")
    if not any(map(course.changes, PROBABILITIES)):
        words += [
            f"{LABELS[name]} in {100 * value:.3g}%"
            for name in PROBABILITIES
            if (value := getattr(first, name))
        ]
    if any(course.values("block_masking_probability")) and not course.changes("mask_block_sizes"):
        words.append(f"blocks of {_either(first.mask_block_sizes)} tokens")
    return f"in every step: {', '.join(words)}"


def _either(sizes: tuple[int, ...]) -> str:
    return " or ".join(filter(None, [", ".join(map(str, sizes[:-1])), str(sizes[-1])]))

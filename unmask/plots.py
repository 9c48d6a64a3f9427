"""The pictures: losses, losses by noise level, the curriculum, how answers were denoised, and what they cost.

Each function draws data into one file, whose suffix chooses the format (.png, .pdf, .svg).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from unmask.diffusion.objective import Curriculum, Objective
from unmask.errors import UnmaskError
from unmask.generation.text import Completion
from unmask.io import check_output_file, reason

BY_NOISE_LEVEL = "eval_by_t/"  # before the middle of a range of t: a held-out loss by noise level
MOST_STEPS = 4000  # of a curriculum drawn, evenly spaced
MOST_EPOCHS = 50  # marked
MOST_ANSWERS = 8  # in one picture
CELLS = 32  # in a row at most
PANELS = {  # of a curriculum: label -> fields of an objective and what they are
    "share of\nsequences": {
        "prefix_probability": "prefix as context",
        "truncate_probability": "end cut off",
        "block_masking_probability": "masked in spans",
    },
    "share of\ntokens": {"source_share": "source never masked", "future_share": "later tokens visible"},
    "smallest\nmasking rate": {"eps": "t"},
}


def check_picture(file: Path, option: str) -> None:
    """Check that a picture can be written, before the work that it shows.

    Raises:
        UnmaskError: names the option; another suffix, or a path that cannot be written.
    """
    if file.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UnmaskError(f"{option}: {file} must end in .png, .pdf or .svg.")
    check_output_file(file, option)


def draw_losses(log_history: Iterable[Mapping[str, float]], file: Path, unit: str = "nats per token") -> None:
    """Plot training and held-out loss against the optimizer step.

    Args:
        log_history: logs with "step" and "loss" (training) or "eval_loss" (held out); others are skipped.
        unit: of the training loss; the held-out loss is always in nats per token.
    """
    logs = list(log_history)
    curves = {"loss": (f"training, {unit}", "-"), "eval_loss": ("held out, nats per token", "o-")}
    _draw_curves(
        file,
        [(*how, [(log["step"], log[key]) for log in logs if key in log]) for key, how in curves.items()],
        xlabel="optimizer step",
        ylabel="loss",
    )


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
            curves.append((f"step {log['step']:,}", "o-", points))
    _draw_curves(
        file,
        [*curves[:1], *curves[1:][-1:]],
        xlabel="t, share of the sample that is masked",
        ylabel="nats per masked token, held out",
        xlim=(0, 1),
    )


def _draw_curves(file: Path, curves: list[tuple[str, str, list[tuple[float, float]]]], **axis: Any) -> None:
    """Draw (label, style, points) from zero, or with a logarithmic axis where the values differ 20-fold."""
    figure = _figure(8, 4.5)
    axes = figure.subplots()
    for label, style, points in curves:
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.5, markersize=4)
            axes.legend()
    values = [value for *_, points in curves for _, value in points if math.isfinite(value)]
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")  # or the second half of a run would look like zero
    else:
        axes.set_ylim(0, 1.05 * max([0.0, *values]) or 1.0)
    axes.set(**axis)
    axes.grid(alpha=0.3)
    _save(figure, file)


def draw_trace(file: Path, answers: Sequence[Completion], *, title: str, names: Sequence[str] = ()) -> None:
    """Draw a heat map of commit step by position, in reading order, one panel per answer.

    Raises:
        UnmaskError: more than `MOST_ANSWERS` answers, nothing to draw, or the file cannot be written.
    """
    if len(answers) > MOST_ANSWERS:
        raise UnmaskError(f"a picture shows {MOST_ANSWERS} answers at most; got {len(answers)}.")
    if not any(answer.ids for answer in answers):
        raise UnmaskError("the answer has no token to draw.")
    columns = min(CELLS, max(len(answer.ids) for answer in answers))
    rows = [max(1, math.ceil(len(answer.ids) / columns)) for answer in answers]
    figure = _figure(8, 0.3 * sum(rows) + 0.6 * len(answers) + 1)
    panels = figure.subplots(len(answers), 1, squeeze=False, gridspec_kw={"height_ratios": rows})[:, 0]
    last = max(answer.num_forwards for answer in answers)
    image: Any = None
    for index, (panel, answer, count) in enumerate(zip(panels, answers, rows, strict=True)):
        steps = [step + 1 for step in answer.commit_step]
        steps += [math.nan] * (count * columns - len(steps))
        grid = [steps[row * columns : (row + 1) * columns] for row in range(count)]
        image = panel.imshow(grid, cmap="viridis", vmin=1, vmax=last, aspect="auto")
        panel.set_yticks(range(count), [str(row * columns) for row in range(count)])
        name = f"{names[index]}: " if len(answers) > 1 and names else ""
        panel.set_title(name + answer.figures, fontsize=9, loc="left")
    figure.suptitle(f"{title}: the step that committed each token", fontsize=10, parse_math=False)
    figure.supylabel("position", fontsize=9)
    figure.colorbar(image, ax=list(panels), label="step", fraction=0.03)
    _save(figure, file)


def draw_curriculum(curriculum: Curriculum, max_steps: int, steps_per_epoch: int, file: Path) -> None:
    """Plot what every step of a run uses that is not a default; dotted lines are between epochs.

    Args:
        max_steps: length of the run, in optimizer steps.
        steps_per_epoch: optimizer steps of an epoch.

    Raises:
        UnmaskError: the file could not be written.
    """
    count = min(max_steps, MOST_STEPS)
    steps = [index * max_steps // count for index in range(count)]
    objectives = [curriculum.at(step, step // steps_per_epoch) for step in steps]
    panels: dict[str, dict[str, list[float]]] = {}
    for panel, fields in PANELS.items():
        for name, label in fields.items():
            values = [getattr(objective, name) for objective in objectives]
            if name == "eps" or set(values) != {getattr(Objective(), name)}:
                panels.setdefault(panel, {})[label] = values
    if any(objective.block_masking_probability for objective in objectives):
        for size in sorted({size for objective in objectives for size in objective.mask_block_sizes}):
            used = [size if size in objective.mask_block_sizes else math.nan for objective in objectives]
            panels.setdefault("spans\n(tokens)", {})[str(size)] = used

    figure = _figure(10, 1.4 + 1.5 * len(panels))
    grid = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    epochs = range(0, max_steps, steps_per_epoch * -(-max_steps // (steps_per_epoch * MOST_EPOCHS)))
    for axes, (panel, lines) in zip(grid, panels.items(), strict=True):
        for (label, values), style in zip(lines.items(), cycle(("-", "--", ":")), strict=False):
            axes.stairs(
                values, [*steps, max_steps], baseline=None, label=label, linewidth=2.5, linestyle=style
            )
        for epoch in epochs[1:]:
            axes.axvline(epoch, color="0.6", linewidth=0.8, linestyle=":")
        axes.set(ylabel=panel, xlim=(0, max_steps), ylim=(0, 1.1 * axes.dataLim.y1))
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    first = objectives[0]
    title = (
        f"loss {first.loss}, {first.schedule} noise schedule" + ", complementary masks" * first.complementary
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    grid[-1].set_xlabel("optimizer step")
    _save(figure, file)


def draw_sweep(tasks: Mapping[str, Mapping[str, Any]], file: Path, setting: str) -> None:
    """Plot accuracy against tokens per forward pass, a panel for each task and a curve for each model.

    Args:
        tasks: as `unmask.evaluation.sweep` writes them.
        setting: whose values are written at the points.
    """
    figure = _figure(7, 0.6 + 3.4 * len(tasks))
    grid = figure.subplots(len(tasks), squeeze=False)[:, 0]
    for axes, (task, found) in zip(grid, tasks.items(), strict=True):
        for curve in found["curves"]:
            points = curve["points"]
            x, y = ([point[name] for point in points] for name in ("tokens_per_forward", "score"))
            error = [point["stderr"] or 0 for point in points]
            label = f"{curve['model']}: AUP {curve['aup']:.1f}"
            axes.errorbar(x, y, yerr=error, fmt="o-", capsize=3, label=label)
            for point, at in zip(points, zip(x, y, strict=True), strict=True):
                text = str(point["value"])
                axes.annotate(text, at, fontsize=8, xytext=(4, 4), textcoords="offset points")
        axes.set(xlabel="tokens per forward pass", ylabel=found["metric"])
        axes.set_title(f"{task}, by {setting}", fontsize=10, loc="left", parse_math=False)
        axes.legend(frameon=False, fontsize=9)
    _save(figure, file)


def _figure(width: float, height: float) -> Any:
    """A figure without pyplot, which would keep it and need a display backend; sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _save(figure: Any, file: Path) -> None:
    try:
        figure.savefig(file)
    except OSError as error:
        raise UnmaskError(f"{file} could not be written: {reason(error)}.") from error

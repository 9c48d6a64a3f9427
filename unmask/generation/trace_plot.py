"""When each token of an answer was committed, as a picture: cells in reading order, coloured by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from unmask.errors import UnmaskError
from unmask.generation.complete import Completion
from unmask.generation.trace import token_texts

CELLS = 32  # in a row at most
LETTERS = 7  # of a token that fit into a cell of the widest kind
PANELS = 8  # answers in one picture at most


def draw_trace(
    file: Path,
    answers: Sequence[Completion],
    tokenizer: PreTrainedTokenizerBase,
    *,
    title: str,
    names: Sequence[str] = (),
) -> None:
    """Draw a heat map of commit step by position, one panel an answer.

    Raises:
        UnmaskError: more than `PANELS` answers, nothing to draw, or the file cannot be written.
    """
    if len(answers) > PANELS:
        raise UnmaskError(f"--trace: a picture holds {PANELS} answers at most; got {len(answers)}.")
    if not any(answer.ids for answer in answers):
        raise UnmaskError("--trace: the answer has no token to draw.")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    longest = max(len(answer.ids) for answer in answers)
    columns = min(CELLS, longest)
    rows = [max(1, math.ceil(len(answer.ids) / columns)) for answer in answers]
    texts = [[_short(text) for text in token_texts(answer.ids, tokenizer)] for answer in answers]
    letters = max(len(text) for each in texts for text in each)
    cell = 0.32 + 0.06 * max(0, letters - 3)  # inches
    height = max(2.2, sum(0.34 * count + 0.75 for count in rows) + 0.6)
    figure, axes = plt.subplots(
        len(answers),
        1,
        figsize=(max(6.0, columns * cell + 2.2), height),
        dpi=120,
        squeeze=False,
        layout="constrained",
        gridspec_kw={"height_ratios": rows},
    )
    last = max(max(answer.commit_step, default=0) for answer in answers) + 1
    top, image = max(2, last), None
    for panel, answer, shown, count in zip(axes[:, 0], answers, texts, rows, strict=True):
        grid = [[math.nan] * columns for _ in range(count)]
        for place, step in enumerate(answer.commit_step):
            grid[place // columns][place % columns] = step + 1
        image = panel.imshow(grid, cmap="viridis", vmin=1, vmax=top, aspect="auto")
        for place, (step, text) in enumerate(zip(answer.commit_step, shown, strict=True)):
            dark = step + 1 < 0.7 * top
            panel.text(
                place % columns,
                place // columns,
                text,
                ha="center",
                va="center",
                fontsize=8,
                family="monospace",
                color="white" if dark else "black",
                parse_math=False,
            )
        panel.set_xticks(range(0, columns, max(1, columns // 8)))
        panel.set_yticks(range(count), [str(row * columns) for row in range(count)])
        panel.tick_params(length=0, labelsize=8)
        panel.set_ylabel("position", fontsize=9)
        for side in panel.spines.values():
            side.set_visible(False)
    for panel, answer, index in zip(axes[:, 0], answers, range(len(answers)), strict=True):
        name = f"{names[index]}: " if len(answers) > 1 and names else ""
        panel.set_title(name + answer.figures, fontsize=9, loc="left", parse_math=False)
    figure.suptitle(f"{title}: the step that committed each token", fontsize=10, parse_math=False)
    assert image is not None
    bar = figure.colorbar(image, ax=list(axes[:, 0]), label="step", fraction=0.03)
    bar.locator = MaxNLocator(integer=True)
    bar.update_ticks()
    try:
        figure.savefig(file)
    except OSError as error:
        raise UnmaskError(f"--trace: {file} cannot be written: {error.strerror}.") from error
    finally:
        plt.close(figure)


def _short(text: str) -> str:
    """As much of a token as a cell holds; a blank shows as one."""
    text = text.replace(" ", "␣").replace("⏹", "▪")  # which more fonts have
    return text if len(text) <= LETTERS else text[: LETTERS - 1] + "…"

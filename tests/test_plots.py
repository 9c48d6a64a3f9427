"""The pictures: what is drawn, and files that cannot be written."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
from tiny import run_cli

from unmask.diffusion.objective import Curriculum, Objective
from unmask.errors import UnmaskError
from unmask.generation.text import Completion
from unmask.plots import check_picture, draw_curriculum, draw_losses, draw_noise_levels, draw_trace


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved."""
    saved: list[Any] = []
    savefig = matplotlib.figure.Figure.savefig

    def spy(self: Any, *args: Any, **kwargs: Any) -> None:
        saved.append(self)
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", spy)
    return saved


def curves(figure: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines
    }


HISTORY = [
    {"step": 0, "eval_loss": 6.0, "eval_by_t/0.95": 5.9, "eval_by_t/0.05": 5.0},
    {"step": 1, "loss": 5.0},
    {"step": 500, "loss": 4.0},
    {"step": 500, "eval_loss": 4.5, "eval_by_t/0.05": 3.0, "eval_by_t/0.95": 4.9},
    {"step": 500, "train_loss": 4.5},
    {"step": 1000, "eval_loss": 3.0, "eval_by_t/0.05": 1.0, "eval_by_t/0.95": 4.5},
]


def test_losses_are_those_logged(tmp_path: Path, figures: list[Any]) -> None:
    draw_losses(HISTORY, tmp_path / "loss.png", "by preset coda")  # only the held-out loss stays in nats
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert curves(figures[0]) == {
        "training, by preset coda": ([1, 500], [5.0, 4.0]),
        "held out, nats per token": ([0, 500, 1000], [6.0, 4.5, 3.0]),
    }
    assert figures[0].axes[0].get_ylim() == (0, pytest.approx(6.3))


@pytest.mark.parametrize(
    ("losses", "scale"),
    [([], "linear"), ([5.0], "linear"), ([40.0, 1.0], "log"), ([math.nan, math.inf, 1.0], "linear")],
)
def test_losses_of_any_size_have_a_scale(
    tmp_path: Path, figures: list[Any], losses: list[float], scale: str
) -> None:
    draw_losses([{"step": step, "loss": loss} for step, loss in enumerate(losses)], tmp_path / "loss.png")
    assert figures[0].axes[0].get_yscale() == scale


def test_noise_levels_show_the_first_and_the_last_evaluation(tmp_path: Path, figures: list[Any]) -> None:
    for history in (HISTORY, HISTORY[:2], []):
        draw_noise_levels(history, tmp_path / "loss_by_t.png")
    first = {"step 0": ([0.05, 0.95], [5.0, 5.9])}
    last = {"step 1,000": ([0.05, 0.95], [1.0, 4.5])}
    assert [curves(figure) for figure in figures] == [first | last, first, {}]


def test_each_cell_of_a_trace_has_the_colour_of_its_step(tmp_path: Path, figures: list[Any]) -> None:
    def answer(steps: list[int]) -> Completion:
        return Completion("", [1] * len(steps), steps, num_forwards=max(steps, default=0) + 1)

    steps = [3, 1, 2, 0] * 20
    draw_trace(tmp_path / "t.png", [answer(steps), answer([]), answer([0])], title="a $ b", names="123")
    shown = figures[0].axes[0].images[0].get_array()
    assert shown.shape == (3, 32) and shown.flatten()[:80].tolist() == [step + 1 for step in steps]
    with pytest.raises(UnmaskError, match="no token"):
        draw_trace(tmp_path / "t.png", [answer([])], title="t")
    with pytest.raises(UnmaskError, match="8 answers"):
        draw_trace(tmp_path / "t.png", [answer([0])] * 9, title="t")


def lines(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Label -> edges and values."""
    data = {line.get_label(): line.get_data() for line in axes.patches}
    return {label: (edges.tolist(), values.tolist()) for label, (values, edges, _) in data.items()}


@pytest.mark.parametrize("max_steps", [12, 100_000])
def test_a_curriculum_shows_what_each_step_uses(tmp_path: Path, figures: list[Any], max_steps: int) -> None:
    curriculum = Curriculum(
        noise_eps=(0.1, 0.01),
        prefix_probability=(0.1, 0.2, 0.4),
        block_masking_probability=(0.5,),
        mask_block_sizes=((2,), (4, 8)),
        schedule_steps=max_steps,
        source_steps=5,
    )
    epoch = max_steps // 4
    draw_curriculum(curriculum, max_steps, epoch, tmp_path / "c.svg")
    assert b"<svg" in (tmp_path / "c.svg").read_bytes()
    shares, tokens, rate, spans = map(lines, figures[0].axes)
    edges = shares["prefix as context"][0]
    assert len(edges) <= 4001 and (edges[0], edges[-1]) == (0, max_steps)
    used = [curriculum.at(step, step // epoch) for step in map(int, edges[:-1])]
    assert shares["prefix as context"][1] == [objective.prefix_probability for objective in used]
    assert set(shares["masked in spans"][1]) == {0.5} and "end cut off" not in shares
    assert tokens == {"source never masked": (edges, [objective.source_share for objective in used])}
    assert rate["t"][1] == [objective.eps for objective in used]
    for size in (2, 4, 8):
        drawn = [value == size for value in spans[str(size)][1]]
        assert drawn == [size in objective.mask_block_sizes for objective in used]
    assert [line.get_xdata()[0] for line in figures[0].axes[0].lines] == [epoch, 2 * epoch, 3 * epoch]


def test_a_curriculum_without_any_change_shows_the_rate(tmp_path: Path, figures: list[Any]) -> None:
    plain = Curriculum(objective=Objective(loss="coda", complementary=True))
    draw_curriculum(plain, 1, 7, tmp_path / "c.pdf")
    assert (tmp_path / "c.pdf").read_bytes().startswith(b"%PDF")
    assert [lines(axes) for axes in figures[0].axes] == [{"t": ([0, 1], [0.001])}]
    assert figures[0].get_suptitle() == "loss coda, linear noise schedule, complementary masks"
    draw_curriculum(plain, 1000, 1, tmp_path / "c.pdf")
    assert len(figures[1].axes[0].lines) == 49  # not every epoch is marked


def test_a_picture_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("c.png", "c.PDF", "c.svg"):
        check_picture(tmp_path / name, "--curriculum")
    (tmp_path / "folder.png").mkdir()
    for name, message in (
        ("c.txt", r"must end in \.png"),
        ("folder.png", "folder"),
        ("nowhere/c.png", "no folder .*nowhere"),
    ):
        with pytest.raises(UnmaskError, match=f"^--curriculum: .*{message}"):
            check_picture(tmp_path / name, "--curriculum")
    (tmp_path / "full.png").symlink_to("/dev/full")
    with pytest.raises(UnmaskError, match=r"full\.png .*No space left on device"):
        draw_curriculum(Curriculum(source_steps=2), 4, 2, tmp_path / "full.png")
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root, who may do anything
    with pytest.raises(UnmaskError, match=r"c\.png cannot be written"):
        check_picture(tmp_path / "c.png", "--curriculum")


RECIPE = """\
training_mode: pretrain
model: {tokenizer: bytes, config: {hidden_size: 8}, prefix_probability: [0.1, 0.2, 0.3, 0.4], loss: coda}
data: {dataset_name: text.txt, block_size: 16}
global_batch_size: 2
max_steps: 10
"""


def test_the_data_command_draws_the_steps_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: list[Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(RECIPE)
    Path("text.txt").write_text("x" * 16 * 7)  # 7 blocks and an end token: 4 steps an epoch
    said = run_cli("data", "run.yaml", "--curriculum", "c.png", "--show", "0")
    assert (said.code, said.err) == (0, "") and said.out.endswith("curriculum: c.png\n")
    assert "the run ends in epoch 3" in " ".join(said.out.split())
    assert [line.get_xdata()[0] for line in figures[0].axes[0].lines] == [4, 8]
    # Before the data is read.
    said = run_cli("data", "run.yaml", "data.dataset_name=gone.txt", "--curriculum", "c.jpe")
    assert said.code == 2 and said.err.startswith("error: --curriculum: c.jpe must end in .png")
    said = run_cli("data", "run.yaml", "model.block_masking_probability=1", "model.mask_block_sizes=[32]")
    assert said.code == 2 and "model.mask_block_sizes" in said.err

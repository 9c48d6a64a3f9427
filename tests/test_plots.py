"""The pictures: their contents, and files that cannot be written."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
from matplotlib.image import imread
from tiny import run_cli
from transformers import PreTrainedTokenizerBase

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


# Losses.

HISTORY = [
    {"step": 0, "eval_loss": 6.0, "eval_by_t/0.95": 5.9, "eval_by_t/0.05": 5.0},
    {"step": 1, "loss": 5.0},
    {"step": 500, "loss": 4.0},
    {"step": 500, "eval_loss": 4.5, "eval_by_t/0.05": 3.0, "eval_by_t/0.95": 4.9},
    {"step": 500, "train_loss": 4.5},
    {"step": 1000, "eval_loss": 3.0, "eval_by_t/0.05": 1.0, "eval_by_t/0.95": 4.5},
]


def test_losses_are_those_logged(tmp_path: Path, figures: list[Any]) -> None:
    draw_losses(HISTORY, tmp_path / "loss.png")
    draw_losses(HISTORY, tmp_path / "loss.png", "by preset coda")  # only the held-out loss stays in nats
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    held_out = ([0, 500, 1000], [6.0, 4.5, 3.0])
    for figure, unit in zip(figures, ("nats per token", "by preset coda"), strict=True):
        training = ([1, 500], [5.0, 4.0])
        assert curves(figure) == {f"training, {unit}": training, "held out, nats per token": held_out}
        assert figure.axes[0].get_ylim() == (0, pytest.approx(6.3))


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


# A trace.


def answer(text: str, steps: list[int]) -> Completion:
    return Completion(text, list(text.encode()), steps, num_forwards=max(steps, default=0) + 1)


def test_each_cell_has_the_colour_of_its_step(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, figures: list[Any]
) -> None:
    images = []
    for steps in ([0, 1, 2, 3] * 10, [3, 1, 2, 0] * 10):
        draw_trace(tmp_path / "t.png", [answer("$a_b" * 10, steps)], tokenizer, title="a $ title")
        images.append(imread(tmp_path / "t.png"))
        panel = figures[-1].axes[0]
        assert panel.images[0].get_array().flatten()[:40].tolist() == [step + 1 for step in steps]
        assert "".join(text.get_text() for text in panel.texts) == "$a_b" * 10
    assert images[0].shape == images[1].shape
    assert 0.02 < (images[0] != images[1]).any(axis=2).mean() < 0.6  # half of the cells differ


def test_answers_of_any_length_share_a_picture(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    answers = [answer("a" * 70, list(range(70))), answer("", []), answer("b", [0])]
    draw_trace(tmp_path / "t.png", answers, tokenizer, title="t", names=["1", "2", "3"])
    assert (tmp_path / "t.png").stat().st_size > 1000
    with pytest.raises(UnmaskError, match="no token"):
        draw_trace(tmp_path / "t.png", [answer("", [])], tokenizer, title="t")
    with pytest.raises(UnmaskError, match="8 answers"):
        draw_trace(tmp_path / "t.png", [answer("a", [0])] * 9, tokenizer, title="t")


# The curriculum.


def labels(figure: Any) -> list[str]:
    return [" ".join(axes.get_ylabel().split()) for axes in figure.axes]


def test_what_changes_has_a_panel_and_the_rest_is_said_in_words(tmp_path: Path, figures: list[Any]) -> None:
    changing = Curriculum(
        noise_eps=(0.1, 0.01),
        prefix_probability=(0.1, 0.2),
        block_masking_probability=(0.0, 0.3),
        mask_block_sizes=((2,), (2, 4)),
        schedule_steps=10,
        source_steps=5,
        attention_annealing_steps=4,
    )
    objective = Objective(loss="coda", complementary=True)
    partly = Curriculum(objective=objective, truncate_probability=(0.25,), source_steps=5)
    draw_curriculum(changing, 10, 4, tmp_path / "all.png")
    draw_curriculum(partly, 10, 4, tmp_path / "some.svg")
    draw_curriculum(Curriculum(), 1, 7, tmp_path / "none.pdf")
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "some.svg").read_bytes()
    assert (tmp_path / "none.pdf").read_bytes().startswith(b"%PDF")
    full, some, none = figures
    assert labels(full) == ["share of sequences", "span (tokens)", "share of tokens", "smallest masking rate"]
    assert full.get_suptitle() == "in every step: loss elbo, linear noise schedule"
    assert labels(some) == ["share of tokens"]
    assert some.get_suptitle() == (
        "in every step: loss coda, linear noise schedule, complementary masks, masking rates from 0.001,"
        " end cut off in 25%"
    )
    assert [text.get_text() for text in none.axes[0].texts] == ["nothing changes"]


@pytest.mark.parametrize("max_steps", [12, 100_000])
def test_lines_are_what_each_step_uses(tmp_path: Path, figures: list[Any], max_steps: int) -> None:
    curriculum = Curriculum(
        prefix_probability=(0.1, 0.2, 0.4),
        block_masking_probability=(0.5,),
        mask_block_sizes=((2,), (4, 8)),
        schedule_steps=max_steps,
    )
    epoch = max_steps // 4
    draw_curriculum(curriculum, max_steps, epoch, tmp_path / "c.png")
    shares, sizes = figures[0].axes
    prefix, spans = shares.patches
    values, edges, _ = prefix.get_data()
    assert len(values) <= 4000 and (edges[0], edges[-1]) == (0, max_steps)
    used = [curriculum.at(step, step // epoch) for step in map(int, edges[:-1])]
    assert values.tolist() == [objective.prefix_probability for objective in used]
    assert set(spans.get_data().values) == {0.5}
    assert [text.get_text() for text in sizes.get_yticklabels()] == ["2", "4", "8"]
    bars = [collection.get_datalim(sizes.transData).intervalx.tolist() for collection in sizes.collections]
    half = max_steps // 2
    assert bars == [[0, half], [half, max_steps], [half, max_steps]]
    top = shares.child_axes[0]
    assert [text.get_text() for text in top.get_xticklabels()] == [f"epoch {n}" for n in (1, 2, 3, 4)]
    assert list(top.get_xticks()) == [0, epoch, 2 * epoch, 3 * epoch]


def test_some_of_many_epochs_are_marked(tmp_path: Path, figures: list[Any]) -> None:
    draw_curriculum(Curriculum(source_steps=5), 1000, 1, tmp_path / "c.png")
    names = [text.get_text() for text in figures[0].axes[0].child_axes[0].get_xticklabels()]
    assert names[:3] == ["epoch 1", "epoch 85", "epoch 169"] and len(names) == 12


def test_a_picture_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("c.png", "c.PDF", "c.svg"):
        check_picture(tmp_path / name, "--curriculum")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "full.png").symlink_to("/dev/full")
    for name, message in (
        ("c.txt", "'.txt'"),
        ("c", "no suffix"),
        ("folder.png", "folder"),
        ("nowhere/c.png", "no folder .*nowhere"),
    ):
        with pytest.raises(UnmaskError, match=f"^--curriculum: .*{message}"):
            check_picture(tmp_path / name, "--curriculum")
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
    assert "the run ends in epoch 3, so that of 4 values" in " ".join(said.out.split())
    assert list(figures[0].axes[0].child_axes[0].get_xticks()) == [0, 4, 8]
    # Before the data is read.
    said = run_cli("data", "run.yaml", "data.dataset_name=gone.txt", "--curriculum", "c.jpe")
    assert said.code == 2 and said.err.startswith("error: --curriculum: c.jpe must end in .png")
    said = run_cli("data", "run.yaml", "model.block_masking_probability=1", "model.mask_block_sizes=[32]")
    assert said.code == 2 and "model.mask_block_sizes" in said.err

"""The picture of a curriculum: what it shows, and where it cannot be written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
from test_cli import run_cli

from unmask.diffusion.objective import Curriculum, Objective
from unmask.errors import UnmaskError
from unmask.training.curriculum_plot import check_picture, draw_curriculum


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved, for a look inside."""
    saved: list[Any] = []
    real = matplotlib.figure.Figure.savefig

    def savefig(self: Any, *args: Any, **kwargs: Any) -> None:
        saved.append(self)
        real(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return saved


def labels(figure: Any) -> list[str]:
    return [" ".join(axes.get_ylabel().split()) for axes in figure.axes]


def test_what_changes_has_a_panel_and_the_rest_is_said_in_words(tmp_path: Path, figures: list[Any]) -> None:
    curriculum = Curriculum(
        noise_eps=(0.1, 0.01),
        prefix_probability=(0.1, 0.2),
        block_masking_probability=(0.0, 0.3),
        mask_block_sizes=((2,), (2, 4)),
        schedule_steps=10,
        source_steps=5,
        attention_annealing_steps=4,
    )
    draw_curriculum(curriculum, 10, 4, tmp_path / "all.png")
    draw_curriculum(
        Curriculum(
            objective=Objective(loss="coda", complementary=True),
            truncate_probability=(0.25,),
            source_steps=5,
        ),
        10,
        4,
        tmp_path / "some.svg",
    )
    draw_curriculum(Curriculum(), 1, 7, tmp_path / "none.pdf")
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "some.svg").read_bytes()
    assert (tmp_path / "none.pdf").read_bytes().startswith(b"%PDF")
    full, some, none = figures
    assert labels(full) == [
        "share of sequences",
        "block size (tokens)",
        "share of tokens",
        "smallest masking rate",
    ]
    assert full.get_suptitle() == "in every step: loss elbo, linear noise schedule"
    assert labels(some) == ["share of tokens"]
    assert some.get_suptitle() == (
        "in every step: loss coda, linear noise schedule, complementary masks, masking rates from 0.001,"
        " end cut off in 25%"
    )
    assert [text.get_text() for text in none.axes[0].texts] == ["every step is alike"]


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
    prefix, blocks = shares.patches
    values, edges, _ = prefix.get_data()
    assert len(values) <= 4000 and (edges[0], edges[-1]) == (0, max_steps)
    used = [curriculum.at(step, step // epoch) for step in map(int, edges[:-1])]
    assert values.tolist() == [objective.prefix_probability for objective in used]
    assert set(blocks.get_data().values) == {0.5}
    assert [text.get_text() for text in sizes.get_yticklabels()] == ["2", "4", "8"]
    spans = [collection.get_datalim(sizes.transData).intervalx.tolist() for collection in sizes.collections]
    half = max_steps // 2
    assert spans == [[0, half], [half, max_steps], [half, max_steps]]
    top = shares.child_axes[0]
    names = [text.get_text() for text in top.get_xticklabels()]
    assert names == ["epoch 1", "epoch 2", "epoch 3", "epoch 4"]
    assert list(top.get_xticks()) == [0, epoch, 2 * epoch, 3 * epoch]


def test_many_epochs_are_marked_here_and_there(tmp_path: Path, figures: list[Any]) -> None:
    draw_curriculum(Curriculum(source_steps=5), 1000, 1, tmp_path / "c.png")
    names = [text.get_text() for text in figures[0].axes[0].child_axes[0].get_xticklabels()]
    assert names[:3] == ["epoch 1", "epoch 85", "epoch 169"] and len(names) == 12


def test_a_picture_that_cannot_be_written_is_refused_before(tmp_path: Path) -> None:
    for name in ("c.png", "c.PDF", "c.svg"):
        check_picture(tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    for name, message in (
        ("c.txt", r"c.txt must end in .png, .pdf or .svg; got '.txt'"),
        ("c", r"c must end in .png, .pdf or .svg; got 'no ending'"),
        ("folder.png", "folder.png is a folder"),
        ("nowhere/c.png", r"nowhere/c.png: there is no folder .*nowhere; make it first"),
    ):
        with pytest.raises(UnmaskError, match=f"^--curriculum: .*{message}"):
            check_picture(tmp_path / name)


def test_a_place_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root, who may do anything
    with pytest.raises(UnmaskError, match=r"c\.png cannot be written to"):
        check_picture(tmp_path / "c.png")


def test_a_full_disk_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "c.png").symlink_to("/dev/full")
    with pytest.raises(UnmaskError, match=r"c\.png could not be written: No space left on device"):
        draw_curriculum(Curriculum(source_steps=2), 4, 2, tmp_path / "c.png")


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
    assert "loss coda is no bound on the likelihood" in said.out
    assert "the run ends in epoch 3, so that of 4 values" in " ".join(said.out.split())
    assert Path("c.png").exists()
    top = figures[0].axes[0].child_axes[0]
    assert list(top.get_xticks()) == [0, 4, 8]
    # Before the data is read.
    said = run_cli("data", "run.yaml", "data.dataset_name=gone.txt", "--curriculum", "c.jpe")
    assert said.code == 2 and said.err.startswith("error: --curriculum: c.jpe must end in .png")
    said = run_cli("data", "run.yaml", "model.block_masking_probability=1", "model.mask_block_sizes=[32]")
    assert said.code == 2 and "blocks of 32 tokens are longer than any row" in said.err

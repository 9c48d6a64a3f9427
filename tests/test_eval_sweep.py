"""Accuracy against parallelism, and two evaluations compared."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from eval_tasks import write_tasks
from tiny import byte_model, run_cli
from transformers import PreTrainedTokenizerBase

from unmask.errors import UnmaskError
from unmask.evaluation.sweep import aup, compare


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Two checkpoints and tasks."""
    place = tmp_path_factory.mktemp("sweep")
    for name, seed in (("one", 0), ("other", 1)):
        byte_model(seed=seed).save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    write_tasks(place / "tasks")
    return place


def test_aup_is_that_of_the_paper() -> None:
    # A model that loses nothing has the area below its curve.
    assert aup([(1, 60.0), (2, 60.0), (5, 60.0)], 60.0) == pytest.approx(300)
    # Worked by hand: y_max = 80, W(78) = exp(-3 * 2 / 80).
    weight = math.exp(-3 * (1 - 78 / 80))
    expected = 2 * 80 + (4 - 2) * (78 * weight + 80) / 2
    assert aup([(4, 78.0), (2, 80.0)], 80.0) == pytest.approx(expected)
    # What loses more than five percent does not count, and another model's best weighs this one's down.
    assert aup([(2, 80.0), (4, 78.0), (9, 74.9)], 80.0) == pytest.approx(expected)
    assert aup([(2, 40.0), (4, 40.0)], 80.0) == pytest.approx(2 * 40 + 2 * 40 * math.exp(-1.5))
    assert aup([(3, 0.0)], 0.0) == 0


def evaluate_with(place: Path, *more: str | Path) -> str:
    said = run_cli("eval", *more, "--include-path", place / "tasks", "--draws", "4", "--max-draws", "4")
    assert said.code == 0, said.err
    return said.out


def test_a_sweep_draws_accuracy_against_tokens_per_forward_pass(place: Path) -> None:
    out = place / "swept"
    asked = (place / "one", place / "other", "--tasks", "tiny_write", "--out", out)
    printed = evaluate_with(place, *asked, "--sweep", "threshold=0.001,1.0")
    found = json.loads((out / "sweep.json").read_text())
    [curves] = [task["curves"] for task in found["tasks"].values()]
    assert [curve["model"] for curve in curves] == ["one", "other"]
    for curve in curves:
        fast, slow = curve["points"]
        assert fast["value"] == 0.001 and fast["tokens_per_forward"] > 2 > 1 >= slow["tokens_per_forward"] > 0
        alone = json.loads((out / curve["model"] / "threshold=1.0" / "results.json").read_text())
        assert alone["cost"]["tiny_write"]["tokens_per_forward"] == slow["tokens_per_forward"]
        assert alone["results"]["tiny_write"]["exact_match,first"] == slow["score"]
    assert (out / "sweep.png").stat().st_size > 5000 and "AUP" in printed
    again = evaluate_with(place, *asked, "--sweep", "threshold=0.001,1.0", "--resume")
    assert again == printed and json.loads((out / "sweep.json").read_text()) == found


@pytest.mark.parametrize(
    ("models", "values", "message"),
    [
        (["one"], "0.5,2", "threshold must be less than or equal to 1; got 2"),
        (["one", "other", "none"], "0.5", "none: no such tokenizer folder"),
    ],
)
def test_what_a_sweep_refuses_it_refuses_before_the_first_evaluation(
    place: Path, tmp_path: Path, models: list[str], values: str, message: str
) -> None:
    asked = (*(place / name for name in models), "--tasks", "tiny_write", "--include-path", place / "tasks")
    said = run_cli("eval", *asked, "--sweep", f"threshold={values}", "--out", tmp_path / "out")
    assert said.code == 2 and message in said.err
    assert not list(tmp_path.rglob("results.json"))


def test_a_comparison_is_paired(place: Path) -> None:
    for name in ("one", "other"):
        evaluate_with(place, place / name, "--tasks", "tiny_choose,tiny_text", "--out", place / f"of-{name}")
    differences = {one.metric: one for one in compare(place / "of-one", place / "of-other")}
    assert differences.keys() == {"acc", "acc_norm"}  # bits per byte are no mean over documents
    scores = [
        json.loads((place / f"of-{name}" / "results.json").read_text())["results"]["tiny_choose"]
        for name in ("one", "other")
    ]
    for metric, one in differences.items():
        assert (one.a, one.b) == tuple(score[f"{metric},none"] for score in scores)
        assert one.difference == pytest.approx(one.b - one.a) and one.low <= one.difference <= one.high
    same = compare(place / "of-one", place / "of-one")
    assert {(one.difference, one.low, one.high) for one in same} == {(0, 0, 0)}
    said = run_cli("eval", "--compare", place / "of-one", place / "of-other")
    assert (
        said.code == 0 and "95% interval" in said.out and f"{differences['acc'].difference:+.4f}" in said.out
    )


def write_samples(folder: Path, scores: list[int]) -> Path:
    """A folder of results with these scores."""
    folder.mkdir()
    (folder / "results.json").write_text('{"cost": {"a": {}}}')
    lines = [
        {"doc_id": number, "filter": "none", "metrics": ["acc"], "acc": score, "doc_hash": str(number)}
        for number, score in enumerate(scores)
    ]
    (folder / "samples_a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_pairs_narrow_the_interval(tmp_path: Path) -> None:
    """100 documents, 20 of which B alone gets right: the interval is that of the differences, by their variance."""
    right = [1] * 50 + [0] * 50
    a, b = write_samples(tmp_path / "a", right), write_samples(tmp_path / "b", [1] * 70 + [0] * 30)
    [found] = compare(a, b)
    error = math.sqrt(0.2 * 0.8 / 100)
    assert found.difference == pytest.approx(0.2)
    assert found.low == pytest.approx(0.2 - 1.96 * error, abs=0.015)
    assert found.high == pytest.approx(0.2 + 1.96 * error, abs=0.015)
    with pytest.raises(UnmaskError, match="evaluate both alike"):
        compare(a, write_samples(tmp_path / "c", right[:-1]))
    with pytest.raises(UnmaskError, match="nowhere has no finished evaluation of"):
        compare(a, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sweep", "treshold=0.5"], "--sweep: unknown setting 'treshold'; did you mean 'threshold'?"),
        (["--sweep", "threshold=0.5,half"], "--sweep: 'half' is not a value of threshold."),
        (["--sweep", "threshold=0.5,0.5"], "--sweep: give different values"),
        (["--sweep", "steps=2,4", "--steps", "3"], "--sweep: steps is also given by itself"),
        (["other"], "name a MODEL; several are for --sweep."),
    ],
    ids=str,
)
def test_bad_sweeps_are_one_line(place: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    said = run_cli("eval", place / "one", *arguments, "--tasks", "tiny_write", "--out", tmp_path)
    assert said.code == 2 and message in said.error


def test_a_sweep_of_a_task_without_answers_is_refused(place: Path, tmp_path: Path) -> None:
    asked = (
        "eval",
        place / "one",
        "--tasks",
        "tiny_text",
        "--out",
        tmp_path / "out",
        "--include-path",
        place / "tasks",
    )
    said = run_cli(*asked, "--sweep", "threshold=0.5,0.9", "--draws", "2", "--max-draws", "2")
    assert said.code == 2 and "--sweep: task tiny_text writes no answers" in said.err

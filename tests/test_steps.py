"""The batch of a step is a pure function of (seed, step)."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest
from tiny import run_recipe

from unmask import byte_tokenizer
from unmask.config import Recipe
from unmask.data.dataset import Unit, examples_of, load_data
from unmask.data.encode import Example


def described(unit: Unit) -> tuple[int, int, int]:
    """The sample ids of a row as one number, epoch, place."""
    return hash(tuple(example.sample_id for example in examples_of(unit.row))), unit.epoch, unit.place


def steps(recipe: Recipe, count: int, rank: int = 0, ranks: int = 1) -> list[list[tuple[int, int, int]]]:
    """The units of the first steps, as long as there are data."""
    source = load_data(recipe, byte_tokenizer()).steps(rank, ranks)
    return [
        [described(unit) for unit in units] for units in map(source.at, range(count)) if units is not None
    ]


def mixture(folder: Path, **changes: Any) -> Recipe:
    sources = []
    for name, count, weight in (("a", 30, 3.0), ("b", 10, 1.0)):
        lines = [{"prompt": f"{name}{n}", "completion": name * (n % 7 + 1)} for n in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        sources.append({"dataset_name": str(folder / f"{name}.jsonl"), "weight": weight})
    data = {"sources": sources, "block_size": 64, **changes.pop("data", {})}
    return run_recipe(folder, data=data, global_batch_size=8, **changes)


@pytest.mark.parametrize("kind", ["records", "packed", "mixture"])
def test_a_batch_depends_on_seed_and_step_alone(kind: str, tmp_path: Path) -> None:
    if kind == "mixture":
        recipe = mixture(tmp_path)
    else:
        recipe = run_recipe(tmp_path, global_batch_size=8, data__packing=kind == "packed")
    whole = steps(recipe, 9)
    assert whole == steps(recipe, 9)
    source = load_data(recipe, byte_tokenizer()).steps()
    for step in (7, 2):  # in any order
        assert [described(unit) for unit in source.at(step) or []] == whole[step]
    assert source.state_dict() == {}
    for ranks in (2, 4):
        parts = [steps(recipe, 9, rank, ranks) for rank in range(ranks)]
        for step, units in enumerate(whole):
            together = sorted((u for part in parts for u in part[step]), key=lambda unit: unit[2])
            assert together == units
    other = recipe.model_copy(update={"seed": recipe.seed + 1})
    assert steps(other, 9) != whole


def test_every_record_once_an_epoch_and_every_batch_full(tmp_path: Path) -> None:
    recipe = run_recipe(tmp_path, global_batch_size=5)  # 18 of 24 records are trained on
    units = [unit for step in steps(recipe, 18) for unit in step]
    assert len(units) == 90
    seen = Counter((sample, epoch) for sample, epoch, _ in units)
    assert set(seen.values()) == {1} and Counter(epoch for _, epoch in seen) == dict.fromkeys(range(5), 18)
    first, second = ([s for s, e, _ in units if e == epoch] for epoch in (0, 1))
    assert sorted(first) == sorted(second) and first != second


def test_shares_of_a_mixture_are_exact(tmp_path: Path) -> None:
    recipe = mixture(tmp_path)
    source = load_data(recipe, byte_tokenizer()).steps()
    rows = [unit.row for step in range(125) for unit in source.at(step) or []]
    assert Counter(cast(Example, row).source for row in rows) == {0: 750, 1: 250}
    assert [examples for examples, _ in source.counts()] == [750, 250]


def test_sources_end_as_they_are_told(tmp_path: Path) -> None:
    ended = mixture(tmp_path, data={"on_source_end": "stop"})
    assert len(steps(ended, 100)) == 100  # all sources start again
    limited = ended.model_dump()
    for source in limited["data"]["sources"]:
        source["epochs"] = 2
    limited["data"]["on_source_end"] = "repeat"
    units = [unit for step in steps(Recipe.model_validate(limited), 100) for unit in step]
    assert len(units) == 80 and set(Counter(unit[:2] for unit in units).values()) == {1}
    for endless in (0, 1):  # the other one leaves after its two epochs
        limited["data"]["sources"][endless]["epochs"], limited["data"]["sources"][1 - endless]["epochs"] = (
            None,
            2,
        )
        source = load_data(Recipe.model_validate(limited), byte_tokenizer()).steps()
        assert all(source.at(step) for step in range(40))
        assert source.counts()[1 - endless][0] == (20, 60)[endless]

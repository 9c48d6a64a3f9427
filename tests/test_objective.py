"""What an objective refuses; the curriculum against tables worked out by hand."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.diffusion.loss import PRESETS
from unmask.diffusion.objective import PROBABILITIES, Curriculum, LossPreset, Objective
from unmask.errors import UnmaskError


def test_defaults_are_the_plain_bound() -> None:
    plain = Objective()
    assert (plain.eps, plain.schedule, plain.loss, plain.source_share) == (1e-3, "linear", "elbo", 1)
    assert not any(getattr(plain, name) for name in (*PROBABILITIES, "mask_block_sizes", "complementary"))
    assert plain.future_share == 1 and PRESETS[plain.loss].is_bound
    assert set(get_args(LossPreset)) == set(PRESETS)
    assert {Curriculum().at(step, epoch) for step in (0, 1, 10**9) for epoch in (0, 7)} == {plain}


OBJECTIVES: list[tuple[dict[str, Any], str]] = [
    *(({name: value, "mask_block_sizes": (2,)}, name)
      for name in (*PROBABILITIES, "source_share", "future_share") for value in (-0.01, 1.01, float("nan"))),
    *(({"eps": value}, "eps") for value in (0, -0.1, 1, float("nan"))),
    ({"schedule": "cubic"}, "schedule"),
    ({"loss": "elob"}, "loss"),
    ({"prefix_probability": 0.6, "truncate_probability": 0.5}, "truncate_probability"),
    ({"block_masking_probability": 0.1}, "mask_block_sizes"),
    ({"block_masking_probability": 0.1, "mask_block_sizes": (2, 1)}, "mask_block_sizes"),
    ({"mask_block_sizes": (0,)}, "mask_block_sizes"),
    ({"complementary": True, "schedule": "cosine"}, "schedule"),
    ({"complementary": True, "loss": "diffullama"}, "loss"),
    ({"complementary": True, "eps": 0.5}, "eps"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "name"), OBJECTIVES)
def test_objectives_that_are_refused(values: dict[str, Any], name: str) -> None:
    # Past the type checks that the tests alone have.
    unchecked = object.__new__(Objective)
    for field in fields(Objective):
        object.__setattr__(unchecked, field.name, values.get(field.name, field.default))
    with pytest.raises(UnmaskError, match=f"^{name} must be"):
        inspect.unwrap(Objective.__post_init__)(unchecked)


CURRICULA: list[tuple[dict[str, Any], str]] = [
    ({"prefix_probability": (0.1, 1.1)}, "prefix_probability"),
    ({"truncate_probability": (-0.1,)}, "truncate_probability"),
    ({"prefix_probability": (0.1, 0.9), "truncate_probability": (0.1, 0.2)}, "truncate_probability"),
    ({"prefix_probability": (0.9,), "truncate_probability": (0.2,), "schedule_type": "linear"}, "truncate"),
    ({"noise_eps": (0.1, 0.0)}, "eps"),
    ({"block_masking_probability": (0.0, 0.1)}, "mask_block_sizes"),
    ({"block_masking_probability": (0.1,), "mask_block_sizes": ((2,), ())}, "mask_block_sizes"),
    ({"mask_block_sizes": ((2,), (2, 1)), "schedule_steps": 9}, "mask_block_sizes"),
    ({"objective": Objective(complementary=True), "noise_eps": (0.1, 0.5)}, "eps"),
]


@pytest.mark.parametrize(("settings", "name"), CURRICULA)
def test_what_makes_no_sense_in_any_step_is_refused_at_once(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(UnmaskError, match=f"^{name}"):
        Curriculum(**settings)


def test_edges_are_taken() -> None:
    edges: list[dict[str, Any]] = [
        {"eps": 1e-9},
        {"eps": 0.999},
        {"source_share": 0, "future_share": 0},
        {"truncate_probability": 1.0},
        {"mask_block_sizes": (2, 64)},  # sizes that a later step will use
        {"block_masking_probability": 1, "mask_block_sizes": (2,)},
        {"complementary": True, "eps": 0.499},
        {"schedule": "cosine", "eps": 0.5},
    ]
    for values in edges:
        Objective(**values)
    for n in range(101):  # 0.1 + 0.9 and the like never round to more than 1
        Objective(prefix_probability=n / 100, truncate_probability=(100 - n) / 100)


TABLE, LAST = (0.01, 0.05, 0.1, 0.15, 0.2), (0.2, 0.2)  # of CoDA's fine-tuning: from 1% to 20%
RISING: dict[str, Any] = {"schedule_type": "linear", "schedule_steps": 4}
SIZES = ((2,), (2, 4), (2, 4, 8))
PHASES: dict[str, Any] = {"block_masking_probability": (0.5,), "mask_block_sizes": SIZES}
BY_EPOCH: list[tuple[dict[str, Any], str, list[Any]]] = [
    ({"prefix_probability": TABLE}, "prefix_probability", [*TABLE, *LAST]),
    ({"truncate_probability": TABLE}, "truncate_probability", [*TABLE, *LAST]),
    ({**PHASES, "block_masking_probability": TABLE}, "block_masking_probability", [*TABLE, *LAST]),
    ({"noise_eps": (0.1, 0.001)}, "eps", [0.1, 0.001, 0.001]),
]
BY_STEP: list[tuple[dict[str, Any], str, list[Any]]] = [
    ({"prefix_probability": (0.4,), **RISING}, "prefix_probability", [0, 0.1, 0.2, 0.3, 0.4, 0.4]),
    ({"truncate_probability": (0.2,), **RISING}, "truncate_probability", [0, 0.05, 0.1, 0.15, 0.2, 0.2]),
    ({**PHASES, **RISING}, "block_masking_probability", [0, 0.125, 0.25, 0.375, 0.5, 0.5]),
    ({"noise_eps": (0.1,), **RISING}, "eps", [0.1, 0.1, 0.1]),
    ({"source_steps": 2}, "source_share", [0, 0.5, 1, 1]),
    ({"attention_annealing_steps": 4}, "future_share", [0, 0.25, 0.5, 0.75, 1, 1]),
    # Parts as equal as can be.
    ({**PHASES, "schedule_steps": 3}, "mask_block_sizes", [*SIZES, *SIZES[2:] * 5]),
    ({**PHASES, "schedule_steps": 9}, "mask_block_sizes", [phase for phase in SIZES for _ in range(3)]),
    ({**PHASES, "schedule_steps": 10}, "mask_block_sizes",
     [SIZES[0]] * 4 + [SIZES[1]] * 3 + [SIZES[2]] * 9),
]  # fmt: skip


def test_the_course_of_each_setting() -> None:
    for settings, name, expected in BY_EPOCH:
        for step in (0, 5, 10**6):
            found = [getattr(Curriculum(**settings).at(step, epoch), name) for epoch in range(len(expected))]
            assert found == expected
    for settings, name, expected in BY_STEP:
        for index, value in enumerate(expected):
            assert getattr(Curriculum(**settings).at(index, 0), name) == pytest.approx(value)


def test_what_never_changes_is_in_every_objective() -> None:
    for kept in (Objective(schedule="cosine", loss="llada"), Objective(complementary=True)):
        assert Curriculum(objective=kept, noise_eps=(0.2,)).at(5, 1) == replace(kept, eps=0.2)


table = st.lists(st.floats(0, 0.5), min_size=1, max_size=4).map(tuple)
settings = st.fixed_dictionaries(
    dict.fromkeys(PROBABILITIES, table)
    | dict.fromkeys(("source_steps", "attention_annealing_steps"), st.integers(0, 50))
    | {"schedule_type": st.sampled_from(["constant", "linear"]), "schedule_steps": st.integers(1, 50)}
)


@given(settings=settings, step=st.integers(0, 80), epoch=st.integers(0, 6))
def test_shares_only_grow_and_stay_in_range(settings: dict[str, Any], step: int, epoch: int) -> None:
    curriculum = Curriculum(**settings, mask_block_sizes=SIZES)
    now, later = curriculum.at(step, epoch), curriculum.at(step + 1, epoch)  # Objective checks its ranges
    for name in (*PROBABILITIES, "source_share", "future_share"):
        assert getattr(now, name) <= getattr(later, name)
    assert max(now.mask_block_sizes) <= max(later.mask_block_sizes)

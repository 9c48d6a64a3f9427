"""What an objective refuses; the curriculum against tables worked out by hand."""

from __future__ import annotations

import inspect
import pickle
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.diffusion.loss import PRESETS
from unmask.diffusion.objective import PROBABILITIES, Curriculum, LossPreset, Objective
from unmask.errors import UnmaskError


def test_defaults_are_the_plain_bound_and_do_not_change() -> None:
    plain = Objective()
    assert (plain.eps, plain.schedule, plain.loss, plain.source_share) == (1e-3, "linear", "elbo", 1)
    assert not any(getattr(plain, name) for name in (*PROBABILITIES, "mask_block_sizes", "complementary"))
    assert plain.future_share == 1 and PRESETS[plain.loss].is_bound
    with pytest.raises(FrozenInstanceError):
        plain.eps = 0.5  # type: ignore[misc]
    assert set(get_args(LossPreset)) == set(PRESETS)


REFUSED: list[tuple[dict[str, Any], str]] = [
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
    ({"complementary": True, "loss": "diffullama"}, "diffullama"),
    ({"complementary": True, "eps": 0.5}, "eps"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "name"), REFUSED, ids=lambda case: str(case)[:60])
def test_refused(values: dict[str, Any], name: str) -> None:
    # Past the type checks that the tests alone have.
    unchecked = object.__new__(Objective)
    for field in fields(Objective):
        object.__setattr__(unchecked, field.name, values.get(field.name, field.default))
    with pytest.raises(UnmaskError, match=name) as caught:
        inspect.unwrap(Objective.__post_init__)(unchecked)
    assert "\n" not in str(caught.value)


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


# The curriculum


def test_without_settings_every_step_is_the_plain_bound() -> None:
    assert {Curriculum().at(step, epoch) for step in (0, 1, 10**9) for epoch in (0, 7)} == {Objective()}


def test_tables_have_one_value_an_epoch_and_the_last_one_stays() -> None:
    """The table of CoDA's fine-tuning: prefix, truncation and blocks from 1%, 1%, 5% to 20%, 20%, 25%."""
    curriculum = Curriculum(
        noise_eps=(0.1, 0.001),
        prefix_probability=(0.01, 0.05, 0.1, 0.15, 0.2),
        truncate_probability=(0.01, 0.05, 0.1, 0.15, 0.2),
        block_masking_probability=(0.05, 0.1, 0.15, 0.2, 0.25),
        mask_block_sizes=((2, 4, 8),),
    )
    found = [curriculum.at(0, epoch) for epoch in range(7)]
    assert [o.prefix_probability for o in found] == [0.01, 0.05, 0.1, 0.15, 0.2, 0.2, 0.2]
    assert [o.truncate_probability for o in found] == [0.01, 0.05, 0.1, 0.15, 0.2, 0.2, 0.2]
    assert [o.block_masking_probability for o in found] == [0.05, 0.1, 0.15, 0.2, 0.25, 0.25, 0.25]
    assert [o.eps for o in found] == [0.1] + [0.001] * 6
    assert {curriculum.at(step, 2) for step in (0, 5, 10**6)} == {found[2]}  # by the epoch alone


def test_a_linear_schedule_rises_to_its_value_and_stays() -> None:
    curriculum = Curriculum(
        prefix_probability=(0.4,),
        truncate_probability=(0.2,),
        block_masking_probability=(1.0,),
        mask_block_sizes=((2,),),
        schedule_type="linear",
        schedule_steps=4,
    )
    found = [curriculum.at(step, 0) for step in range(6)]
    assert [o.prefix_probability for o in found] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4])
    assert [o.truncate_probability for o in found] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2, 0.2])
    assert [o.block_masking_probability for o in found] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert {o.eps for o in found} == {1e-3}


@pytest.mark.parametrize(
    ("steps", "lengths"),
    [(9, [3, 3, 3]), (10, [4, 3, 3]), (3, [1, 1, 1])],  # as equal as can be
)
def test_phases_take_equal_parts_and_the_last_one_stays(steps: int, lengths: list[int]) -> None:
    phases = ((2,), (2, 4), (2, 4, 8))
    curriculum = Curriculum(block_masking_probability=(0.5,), mask_block_sizes=phases, schedule_steps=steps)
    found = [curriculum.at(step, 0).mask_block_sizes for step in range(steps)]
    assert [found.count(phase) for phase in phases] == lengths and sorted(found, key=len) == found
    assert curriculum.at(steps, 0).mask_block_sizes == curriculum.at(10**6, 3).mask_block_sizes == (2, 4, 8)


def test_source_and_future_open_linearly() -> None:
    curriculum = Curriculum(source_steps=2, attention_annealing_steps=4)
    found = [curriculum.at(step, 0) for step in range(6)]
    assert [o.source_share for o in found] == [0, 0.5, 1, 1, 1, 1]
    assert [o.future_share for o in found] == [0, 0.25, 0.5, 0.75, 1, 1]


def test_what_never_changes_is_in_every_objective() -> None:
    kept = Objective(schedule="cosine", loss="llada")
    assert Curriculum(objective=kept, noise_eps=(0.2,)).at(5, 1) == replace(kept, eps=0.2)
    kept = Objective(complementary=True)
    assert Curriculum(objective=kept).at(5, 1) == kept


table = st.lists(st.floats(0, 0.5), min_size=1, max_size=4).map(tuple)


@given(
    prefix=table,
    truncate=table,
    blocks=table,
    kind=st.sampled_from(["constant", "linear"]),
    length=st.integers(1, 50),
    source=st.integers(0, 50),
    annealing=st.integers(0, 50),
    step=st.integers(0, 80),
    epoch=st.integers(0, 6),
)
def test_it_is_a_pure_function_of_the_step(
    prefix: Any,
    truncate: Any,
    blocks: Any,
    kind: Any,
    length: int,
    source: int,
    annealing: int,
    step: int,
    epoch: int,
) -> None:
    """A resumed run, which has asked for no earlier step, gets the same; no value leaves its range; the
    shares only grow."""
    curriculum = Curriculum(
        prefix_probability=prefix,
        truncate_probability=truncate,
        block_masking_probability=blocks,
        mask_block_sizes=((2,), (2, 4)),
        schedule_type=kind,
        schedule_steps=length,
        source_steps=source,
        attention_annealing_steps=annealing,
    )
    other = pickle.loads(pickle.dumps(curriculum))
    for earlier in range(step):
        curriculum.at(earlier, 0)
    now, later = curriculum.at(step, epoch), curriculum.at(step + 1, epoch)  # Objective checks its ranges
    assert now == other.at(step, epoch)
    for name in (*PROBABILITIES, "source_share", "future_share"):
        assert getattr(now, name) <= getattr(later, name)
    assert max(now.mask_block_sizes) <= max(later.mask_block_sizes)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"prefix_probability": (0.1, 1.1)}, "prefix_probability"),
        ({"truncate_probability": (-0.1,)}, "truncate_probability"),
        ({"prefix_probability": ()}, "prefix_probability"),
        ({"prefix_probability": (0.1, 0.9), "truncate_probability": (0.1, 0.2)}, "truncate_probability"),
        ({"prefix_probability": (0.9,), "truncate_probability": (0.2,), "schedule_type": "linear"}, "prefix"),
        ({"noise_eps": (0.1, 0.0)}, "eps"),
        ({"block_masking_probability": (0.0, 0.1)}, "mask_block_sizes"),
        ({"mask_block_sizes": ((2,), (2, 1)), "schedule_steps": 9}, "mask_block_sizes"),
        ({"mask_block_sizes": ((2,), ())}, "mask_block_sizes"),
        ({"mask_block_sizes": ((2, 8), (4,))}, "mask_block_sizes"),
        ({"schedule_steps": 0}, "schedule_steps"),
        ({"source_steps": -1}, "source_steps"),
        ({"attention_annealing_steps": -1}, "attention_annealing_steps"),
        ({"objective": Objective(complementary=True), "noise_eps": (0.1, 0.5)}, "eps"),
    ],
)
def test_what_makes_no_sense_in_any_step_is_refused_at_once(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(UnmaskError, match=name) as caught:
        Curriculum(**settings)
    assert "\n" not in str(caught.value)

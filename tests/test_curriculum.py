"""The curriculum against tables worked out by hand, and against what it must never be."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.diffusion.objective import PROBABILITIES, Curriculum, Objective
from unmask.errors import UnmaskError


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
    ("settings", "message"),
    [
        ({"prefix_probability": (0.1, 1.1)}, r"prefix_probability must be in \[0, 1\]; got 1.1"),
        ({"truncate_probability": (-0.1,)}, r"truncate_probability must be in \[0, 1\]; got -0.1"),
        ({"prefix_probability": ()}, "prefix_probability must have a value for at least one epoch"),
        (
            {"prefix_probability": (0.1, 0.2, 0.9), "truncate_probability": (0.1, 0.2)},
            r"must be at most 1.*got 0.9 \+ 0.2",
        ),
        (
            {"prefix_probability": (0.9,), "truncate_probability": (0.2,), "schedule_type": "linear"},
            r"must be at most 1.*got 0.9 \+ 0.2",
        ),
        ({"noise_eps": (0.1, 0.0)}, "eps must be above 0 and below 1: the loss divides .*; got 0.0"),
        ({"noise_eps": (1.0,)}, "eps must be above 0 and below 1"),
        ({"block_masking_probability": (0.0, 0.1)}, "block_masking_probability needs mask_block_sizes"),
        ({"mask_block_sizes": ((2,), (2, 1)), "schedule_steps": 9}, r"must be 2 or more; got \(2, 1\)"),
        ({"mask_block_sizes": ((2,), ())}, "at least one size in each phase"),
        ({"mask_block_sizes": ((2, 8), (4,))}, "must not be below that of the phase before"),
        ({"schedule_steps": 0}, "schedule_steps must be 1 or more; got 0"),
        ({"source_steps": -1}, "source_steps must be 0 or more; got -1"),
        ({"attention_annealing_steps": -1}, "attention_annealing_steps must be 0 or more; got -1"),
        (
            {"objective": Objective(complementary=True), "noise_eps": (0.1, 0.5)},
            r"eps must be below 0.5; got 0.5",
        ),
    ],
)
def test_what_makes_no_sense_in_any_step_is_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UnmaskError, match=message) as caught:
        Curriculum(**settings)
    assert "\n" not in str(caught.value)

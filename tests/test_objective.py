"""What an objective refuses, and what it takes."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, fields
from typing import Any, get_args

import pytest

from unmask.diffusion.loss import PRESETS
from unmask.diffusion.objective import LossPreset, Objective
from unmask.errors import UnmaskError


def test_defaults_are_the_plain_bound() -> None:
    plain = Objective()
    assert plain == Objective(
        eps=1e-3,
        schedule="linear",
        source_share=1.0,
        prefix_probability=0.0,
        truncate_probability=0.0,
        block_masking_probability=0.0,
        mask_block_sizes=(),
        complementary=False,
        loss="elbo",
        future_share=1.0,
    )
    assert PRESETS[plain.loss].is_bound


def test_an_objective_does_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        Objective().eps = 0.5  # type: ignore[misc]


SHARES = ("source_share", "future_share")
PROBABILITIES = ("prefix_probability", "truncate_probability", "block_masking_probability")
REFUSED: list[tuple[dict[str, Any], str]] = [
    *(
        ({name: value, "mask_block_sizes": (2,)}, rf"{name} must be in \[0, 1\]; got {value}\.")
        for name in SHARES + PROBABILITIES
        for value in (-0.01, 1.01, float("nan"), float("inf"))
    ),
    *(
        ({"eps": value}, rf"eps must be above 0 and below 1: the loss divides by rates.*; got {value}\.")
        for value in (0, 0.0, -0.1, 1, 1.5, float("nan"))
    ),
    ({"schedule": "cubic"}, r"schedule must be one of linear, cosine; got 'cubic'\."),
    ({"loss": "elob"}, r"loss must be one of elbo, llada, coda, diffullama, uniform, cart; got 'elob'\."),
    (
        {"prefix_probability": 0.6, "truncate_probability": 0.5},
        r"prefix_probability \+ truncate_probability must be at most 1, .*; got 0\.6 \+ 0\.5\.",
    ),
    (
        {"block_masking_probability": 0.1},
        r"block_masking_probability needs mask_block_sizes, such as \(2, 4, 8\)\.",
    ),
    (
        {"block_masking_probability": 0.1, "mask_block_sizes": (2, 1)},
        r"mask_block_sizes must be 2 or more; got \(2, 1\)\.",
    ),
    ({"mask_block_sizes": (0,)}, r"mask_block_sizes must be 2 or more; got \(0,\)\."),
    (
        {"complementary": True, "schedule": "cosine"},
        r"complementary masks need schedule 'linear': .* 'cosine' does not draw alike\.",
    ),
    (
        {"complementary": True, "loss": "diffullama"},
        "complementary masks contradict loss 'diffullama', which divides by the number of masked tokens",
    ),
    (
        {"complementary": True, "eps": 0.5},
        r"complementary masks draw t from \[eps, 1 - eps\]: eps must be below 0\.5; got 0\.5\.",
    ),
]


@pytest.mark.parametrize(("given", "error"), REFUSED, ids=lambda case: str(case)[:60])
def test_refused(given: dict[str, Any], error: str) -> None:
    # Past the type checks that the tests alone have.
    unchecked = object.__new__(Objective)
    for field in fields(Objective):
        object.__setattr__(unchecked, field.name, given.get(field.name, field.default))
    with pytest.raises(UnmaskError, match=error) as caught:
        inspect.unwrap(Objective.__post_init__)(unchecked)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {"eps": 1e-9},
        {"eps": 0.999},
        {"source_share": 0, "future_share": 0},
        {"prefix_probability": 1},
        {"truncate_probability": 1.0},
        {"prefix_probability": 0.7, "truncate_probability": 0.3},
        {"mask_block_sizes": (2, 64)},  # sizes that a later step will use
        {"block_masking_probability": 1, "mask_block_sizes": (2,)},
        {"complementary": True, "eps": 0.499},
        {"schedule": "cosine", "eps": 0.5},
    ],
    ids=str,
)
def test_edges_are_taken(given: dict[str, Any]) -> None:
    Objective(**given)


def test_prefix_and_cut_in_tenths_may_take_every_sample() -> None:
    # 0.1 + 0.9 and the like never round to more than 1.
    for n in range(101):
        Objective(prefix_probability=n / 100, truncate_probability=(100 - n) / 100)


def test_every_preset_has_a_name_here_and_a_formula_there() -> None:
    assert set(get_args(LossPreset)) == set(PRESETS)
    for name in get_args(LossPreset):
        Objective(loss=name)

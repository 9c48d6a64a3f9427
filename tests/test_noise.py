from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import assert_rate, assert_uniform, random_ids
from torch import Tensor

from unmask.diffusion import noise
from unmask.diffusion.noise import (
    Noised,
    document_strata,
    example_seeds,
    low_discrepancy,
    sample_t,
    transition,
)

MASK = 31
ROWS = 40_000
SEEDS = torch.arange(ROWS)  # the worst seeds there are: consecutive


def everywhere(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


# sample_t


@pytest.mark.parametrize("eps", [1e-3, 0.25])
@pytest.mark.parametrize("keyed", [True, False])
def test_times_are_uniform_from_eps_to_one(eps: float, keyed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    t = sample_t(ROWS, eps=eps, noise_seed=SEEDS if keyed else None, generator=generator)
    assert t.shape == (ROWS,)
    assert t.min() >= eps
    assert t.max() <= 1
    assert_uniform(((t - eps) / (1 - eps) * 100).long().clamp(max=99), 100)


def test_eps_is_a_thousandth_by_default() -> None:
    seed = torch.tensor([7])
    assert torch.equal(sample_t(1, noise_seed=seed), sample_t(1, eps=1e-3, noise_seed=seed))


@given(seed=st.integers(-(2**63), 2**63 - 1), eps=st.floats(1e-6, 0.999))
def test_times_stay_in_range(seed: int, eps: float) -> None:
    t = sample_t(1, eps=eps, noise_seed=torch.tensor([seed]))
    assert 0 < t.item() <= 1
    assert t.item() >= torch.tensor(eps).item()  # eps as float32 holds it


def test_times_without_seeds_follow_the_generator() -> None:
    torch.manual_seed(5)
    first = sample_t(4)
    torch.manual_seed(5)
    assert torch.equal(sample_t(4), first)
    assert not torch.equal(sample_t(4), first)
    ours = torch.Generator().manual_seed(5)
    before = torch.get_rng_state()
    assert torch.equal(sample_t(4, generator=ours), first)
    assert torch.equal(torch.get_rng_state(), before)


# transition: what it masks


@given(data=st.data())
def test_only_maskable_tokens_become_masks_and_the_rest_stays(data: st.DataObject) -> None:
    rows, length = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 6)))
    grid = st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=rows, max_size=rows)
    maskable = torch.tensor(data.draw(grid))
    x_0 = random_ids(rows, length, vocab=32, seed=data.draw(st.integers(0, 99)))  # mask tokens among them
    sigma = data.draw(st.floats(0, 1))
    kept = x_0.clone()
    noised = transition(x_0, sigma, maskable, MASK, noise_seed=torch.arange(rows))
    assert isinstance(noised, Noised)
    x_t, is_masked, t = noised
    assert torch.equal(x_0, kept)
    assert not (is_masked & ~maskable).any()
    assert torch.equal(x_t, torch.where(is_masked, MASK, x_0))
    assert (t == torch.tensor(sigma)).all()
    assert t.shape == x_0.shape


@pytest.mark.parametrize("seeded", [True, False])
def test_zero_masks_nothing_and_one_masks_everything(seeded: bool) -> None:
    x_0 = random_ids(ROWS, 2)
    seeds = SEEDS if seeded else None
    assert not transition(x_0, 0.0, everywhere(ROWS, 2), MASK, noise_seed=seeds).is_masked.any()
    assert transition(x_0, 1.0, everywhere(ROWS, 2), MASK, noise_seed=seeds).is_masked.all()
    assert transition(x_0, 1, everywhere(ROWS, 2), MASK, noise_seed=seeds).is_masked.all()


def test_zero_masks_nothing_even_at_the_smallest_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "keyed_uniform", lambda *_: torch.zeros(1, 2))
    x_0 = random_ids(1, 2)
    assert not transition(x_0, 0.0, everywhere(1, 2), MASK, noise_seed=SEEDS[:1]).is_masked.any()
    assert transition(x_0, 1e-30, everywhere(1, 2), MASK, noise_seed=SEEDS[:1]).is_masked.all()


def test_literal_mask_tokens_are_not_taken_for_masked() -> None:
    x_0 = torch.tensor([[MASK, MASK, 3, 4]])
    noised = transition(x_0, 1.0, torch.tensor([[False, True, True, False]]), MASK)
    assert noised.is_masked.tolist() == [[False, True, True, False]]
    assert noised.x_t.tolist() == [[MASK, MASK, MASK, 4]]


@pytest.mark.parametrize(
    "sigma",
    [0.5, torch.tensor(0.5), torch.full((3,), 0.5), torch.full((3, 1), 0.5), torch.full((3, 3), 0.5)],
    ids=["number", "scalar", "row", "column", "position"],
)
def test_sigma_of_every_shape(sigma: Any) -> None:
    # Batch and length are equal on purpose: a vector is one a row.
    seeds = torch.arange(3)
    x_0 = random_ids(3, 3)
    noised = transition(x_0, sigma, everywhere(3, 3), MASK, noise_seed=seeds)
    half = transition(x_0, 0.5, everywhere(3, 3), MASK, noise_seed=seeds)
    assert torch.equal(noised.is_masked, half.is_masked)
    assert torch.equal(noised.t, torch.full((3, 3), 0.5))


def test_a_vector_of_sigmas_is_one_a_row() -> None:
    sigma = torch.tensor([0.0, 1.0, 0.0])
    expected = [[False] * 3, [True] * 3, [False] * 3]
    assert transition(random_ids(3, 3), sigma, everywhere(3, 3), MASK).is_masked.tolist() == expected
    by_position = sigma.expand(3, 3)
    expected = [[False, True, False]] * 3
    assert transition(random_ids(3, 3), by_position, everywhere(3, 3), MASK).is_masked.tolist() == expected


def test_maskable_mask_of_another_shape() -> None:
    unchecked = inspect.unwrap(transition)  # past the shape checks that the tests alone have
    expected = r"maskable_mask must have shape \(batch, seq\) = \(2, 3\); got \(2, 4\)\."
    with pytest.raises(ValueError, match=expected):
        unchecked(random_ids(2, 3), 0.5, everywhere(2, 4), MASK)


# transition: how often


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("sigma", [0.001, 0.02, 0.3, 0.5, 0.97])
def test_each_position_and_each_pair_is_masked_at_its_rate(sigma: float, seeded: bool) -> None:
    maskable = everywhere(ROWS, 5)
    noised = transition(
        torch.zeros(ROWS, 5, dtype=torch.int64),
        sigma,
        maskable,
        MASK,
        noise_seed=SEEDS if seeded else None,
        generator=None if seeded else torch.Generator().manual_seed(1),
    )
    assert_rate(noised.is_masked, sigma)
    if sigma >= 0.02:  # pairs are too rare below for the normal approximation
        left, right = torch.combinations(torch.arange(5), 2).T
        assert_rate(noised.is_masked[:, left] & noised.is_masked[:, right], sigma**2)


def test_masks_are_independent_of_the_time_they_are_drawn_at() -> None:
    # Were one hash used for both, a row's mask would follow from its t.
    t = sample_t(ROWS, eps=0.5, noise_seed=SEEDS)
    masked = transition(
        torch.zeros(ROWS, 4, dtype=torch.int64), t, everywhere(ROWS, 4), MASK, noise_seed=SEEDS
    )
    assert_rate(masked.is_masked, 0.75)  # E[t] over [0.5, 1]
    both = masked.is_masked[:, :2].all(dim=1)
    assert_rate(both, (1 - 0.5**3) / 3 / 0.5)  # E[t^2]
    for low in (0.5, 0.6, 0.7, 0.8, 0.9):
        some = (t >= low) & (t < low + 0.1)
        assert_rate(masked.is_masked[some], t[some].double().mean())


# Keyed noise: the same wherever a sample stands


def noise_of(
    rows: list[list[int]], seeds: list[int], columns: list[list[int]], length: int
) -> list[list[bool]]:
    """Noise of ragged rows whose tokens stand in the given columns of a padded batch, read back ragged."""
    x_0 = torch.zeros(len(rows), length, dtype=torch.int64)
    is_token = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, (ids, where) in enumerate(zip(rows, columns, strict=True)):
        x_0[row, where] = torch.tensor(ids)
        is_token[row, where] = True
    positions = (is_token.cumsum(1) - 1).clamp(min=0)
    seed = torch.tensor(seeds)
    t = sample_t(len(rows), eps=0.4, noise_seed=seed)
    noised = transition(x_0, t, is_token, MASK, noise_seed=seed, positions=positions)
    assert not noised.is_masked[~is_token].any()
    return [noised.is_masked[row, where].tolist() for row, where in enumerate(columns)]


def test_noise_does_not_depend_on_padding_batch_order_or_batch_mates() -> None:
    rows = [list(range(9)), list(range(4)), list(range(6))]
    seeds = [11, 12, -5]
    right = [list(range(len(row))) for row in rows]
    alone = [
        noise_of([row], [seed], [where], len(row))[0]
        for row, seed, where in zip(rows, seeds, right, strict=True)
    ]
    assert any(any(row) for row in alone)
    assert not all(all(row) for row in alone)
    assert noise_of(rows, seeds, right, 9) == alone
    assert noise_of(rows, seeds, right, 14) == alone
    left = [[20 - len(row) + i for i in range(len(row))] for row in rows]
    assert noise_of(rows, seeds, left, 20) == alone
    middle = [[i + (3 if i > 1 else 1) for i in range(len(row))] for row in rows]
    assert noise_of(rows, seeds, middle, 12) == alone
    assert noise_of(rows[::-1], seeds[::-1], right[::-1], 9) == alone[::-1]
    assert noise_of([rows[0], rows[2]], [99, seeds[2]], [right[0], right[2]], 9)[1] == alone[2]


def test_positions_are_columns_by_default() -> None:
    x_0, seeds = random_ids(3, 8), torch.arange(3)
    columns = torch.arange(8).expand(3, 8)
    first = transition(x_0, 0.5, everywhere(3, 8), MASK, noise_seed=seeds)
    second = transition(x_0, 0.5, everywhere(3, 8), MASK, noise_seed=seeds, positions=columns)
    assert torch.equal(first.is_masked, second.is_masked)


def test_seeded_noise_neither_reads_nor_moves_a_generator() -> None:
    before = torch.get_rng_state()
    first = transition(random_ids(3, 8), 0.5, everywhere(3, 8), MASK, noise_seed=torch.arange(3))
    sample_t(3, noise_seed=torch.arange(3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(77)
    second = transition(random_ids(3, 8), 0.5, everywhere(3, 8), MASK, noise_seed=torch.arange(3))
    assert torch.equal(first.is_masked, second.is_masked)


def test_noise_without_seeds_follows_the_generator() -> None:
    def draw(generator: torch.Generator | None = None) -> Tensor:
        return transition(random_ids(3, 20), 0.5, everywhere(3, 20), MASK, generator=generator).is_masked

    torch.manual_seed(5)
    first = draw()
    assert not torch.equal(draw(), first)
    torch.manual_seed(5)
    assert torch.equal(draw(), first)
    assert torch.equal(draw(torch.Generator().manual_seed(5)), first)


def test_seeds_of_examples_differ_by_run_sample_and_epoch() -> None:
    samples = torch.arange(50)
    seeds = torch.cat([example_seeds(run, samples, epoch) for run in range(20) for epoch in range(-1, 20)])
    assert len(set(seeds.tolist())) == 20 * 21 * 50
    assert torch.equal(example_seeds(3, samples[7:8], 2), example_seeds(3, samples, 2)[7:8])
    t = sample_t(len(seeds), eps=1e-9, noise_seed=seeds)
    assert_uniform((t * 64).long().clamp(max=63), 64)


def test_samples_may_have_epochs_of_their_own() -> None:
    samples, epochs = torch.tensor([[4, 5], [6, -1]]), torch.tensor([[0, 2], [1, 7]])
    seeds = example_seeds(3, samples, epochs)
    for row in range(2):
        for column in range(2):
            sample, epoch = samples[row, column], int(epochs[row, column])
            assert seeds[row, column] == example_seeds(3, sample, epoch)


def test_documents_of_a_row_spread_its_stratum() -> None:
    rows = low_discrepancy(0, 0, torch.arange(4), total=4)
    table = document_strata(rows, 50)
    assert torch.equal(table[:, 0], rows)
    assert table.min() >= 0 and table.max() < 1
    for row in table:  # the gaps between multiples of a badly approximable number
        gaps = torch.cat([row, row.min()[None] + 1]).sort().values.diff()
        assert gaps.max() < 2.5 / 50
    # Each by itself is uniform, since the row's stratum is.
    many = torch.stack([low_discrepancy(0, step, torch.arange(4), total=4) for step in range(5000)])
    assert_uniform((document_strata(many.flatten(), 3)[:, 2] * 64).long(), 64)


def test_documents_of_a_row_do_not_share_rates_with_blocks_of_one_another() -> None:
    """Block b of a document takes its stratum shifted by b golden ratios."""
    [documents] = document_strata(torch.tensor([0.3]), 30).double()
    blocks = torch.arange(30).double() * (5**0.5 - 1) / 2
    rates = (documents[:, None] + blocks) % 1
    assert rates.flatten().sort().values.diff().min() > 1e-6

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unmask.generation.sampling import gumbel_noise, pick, suppress

VOCAB = 6
LOGITS = torch.tensor([1.5, 0.0, -1.0, 0.5, -3.0, 1.0], dtype=torch.float64)


def chi_square_p(counts: Tensor, probabilities: Tensor) -> float:
    """P-value of Pearson's test that the counts were drawn from the probabilities.

    Cells of fewer than five expected draws, for which the approximation is poor, count as one.
    """
    expected = counts.sum() * probabilities
    rare = expected < 5
    counts, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(float(len(counts) - 1), dtype=torch.float64)
    return torch.special.gammaincc(freedom / 2, statistic.double() / 2).item()


def draws(seeds: Tensor, position: int, step: int, temperature: float) -> Tensor:
    noise = gumbel_noise(seeds, torch.full_like(seeds, position), step, VOCAB)
    tokens, _ = pick(LOGITS.expand(len(seeds), -1), temperature, noise)
    return torch.bincount(tokens, minlength=VOCAB).double()


# The seeds are fixed, so these never fail by chance; with other seeds each would one time in a million.
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_gumbel_max_samples_the_softmax_at_that_temperature(temperature: float) -> None:
    counts = draws(torch.arange(20_000), 3, 1, temperature)
    assert chi_square_p(counts, torch.softmax(LOGITS / temperature, dim=0)) > 1e-6


def test_the_chi_square_test_sees_a_wrong_temperature() -> None:
    counts = draws(torch.arange(20_000), 3, 1, 0.9)
    assert chi_square_p(counts, torch.softmax(LOGITS, dim=0)) < 1e-6


@pytest.mark.parametrize("other", [{"step": 2}, {"position": 4}, {"shift": 1}])
def test_draws_of_other_steps_positions_and_seeds_are_independent(other: dict[str, int]) -> None:
    seeds = torch.arange(20_000)
    first = gumbel_noise(seeds, torch.full_like(seeds, 3), 1, VOCAB)
    seeds = seeds + other.get("shift", 0)
    position = torch.full_like(seeds, other.get("position", 3))
    second = gumbel_noise(seeds, position, other.get("step", 1), VOCAB)
    tokens = [pick(LOGITS.expand(len(seeds), -1), 1.0, noise)[0] for noise in (first, second)]
    p = torch.softmax(LOGITS, dim=0)
    joint = torch.bincount(tokens[0] * VOCAB + tokens[1], minlength=VOCAB**2).double()
    assert chi_square_p(joint, torch.outer(p, p).flatten()) > 1e-6


def test_gumbel_noise_depends_on_its_own_row_alone() -> None:
    seeds, positions = torch.tensor([5, 6, 7]), torch.tensor([1, 2, 3])
    together = gumbel_noise(seeds, positions, 4, VOCAB)
    alone = torch.cat([gumbel_noise(seeds[i : i + 1], positions[i : i + 1], 4, VOCAB) for i in range(3)])
    assert torch.equal(together, alone)
    # A larger vocabulary adds ids and leaves the draws of the others.
    assert torch.equal(together, gumbel_noise(seeds, positions, 4, VOCAB + 3)[:, :VOCAB])


def test_gumbel_noise_is_finite() -> None:
    noise = gumbel_noise(torch.arange(2000), torch.zeros(2000, dtype=torch.long), 0, 100)
    assert noise.isfinite().all()
    euler = 0.5772156649  # mean of the Gumbel distribution, variance pi^2 / 6
    assert abs(noise.double().mean().item() - euler) < 6 * math.pi / math.sqrt(6 * 200_000)


def test_without_noise_the_most_likely_token_is_taken() -> None:
    tokens, confidence = pick(LOGITS[None], 0.0, None)
    assert tokens.tolist() == [0]
    assert confidence.item() == pytest.approx(torch.softmax(LOGITS, dim=0)[0].item(), rel=1e-12)


def test_confidence_is_the_models_own_probability_whatever_the_temperature() -> None:
    seeds = torch.arange(50)
    noise = gumbel_noise(seeds, seeds, 0, VOCAB)
    tokens, confidence = pick(LOGITS.expand(50, -1), 5.0, noise)
    assert len(set(tokens.tolist())) > 3
    assert torch.allclose(confidence, torch.softmax(LOGITS, dim=0)[tokens], rtol=1e-12, atol=0)


def test_low_precision_logits_are_normalised_in_float32() -> None:
    logits = torch.tensor([[10.0, 9.0, 8.0]], dtype=torch.bfloat16)
    _, confidence = pick(logits, 0.0, None)
    assert confidence.dtype == torch.float32
    assert confidence.item() == pytest.approx(torch.softmax(logits.double(), dim=-1)[0, 0].item(), rel=1e-6)


def test_suppressed_ids_have_probability_zero_and_are_never_drawn() -> None:
    logits = suppress(LOGITS.expand(5000, -1), torch.tensor([0, 5]))
    p = torch.softmax(logits[0], dim=0)
    assert p[[0, 5]].tolist() == [0, 0]
    kept = LOGITS.clone()
    kept[[0, 5]] = -torch.inf
    assert torch.equal(p, torch.softmax(kept, dim=0))
    seeds = torch.arange(5000)
    for temperature in (0.1, 1.0, 100.0):
        tokens, _ = pick(logits, temperature, gumbel_noise(seeds, seeds, 0, VOCAB))
        assert not torch.isin(tokens, torch.tensor([0, 5])).any()


def test_suppress_leaves_its_argument_and_takes_an_empty_list() -> None:
    logits = LOGITS[None].clone()
    assert torch.equal(suppress(logits, torch.tensor([], dtype=torch.long)), logits)
    suppress(logits, torch.tensor([1]))
    assert torch.equal(logits[0], LOGITS)

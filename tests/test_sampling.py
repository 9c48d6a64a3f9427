"""From logits to tokens. The seeds are fixed, so chi-square tests never fail by chance; with other seeds each
would one time in a million."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import chi_square_p
from torch import Tensor

from unmask.generation.sampling import invert, keep_top_p, sample, suppress_, uniforms

VOCAB = 6
LOGITS = torch.tensor([1.5, 0.0, -1.0, 0.5, -3.0, 1.0], dtype=torch.float64)


def draws(count: int, temperature: float, **filters: Any) -> Tensor:
    seeds = torch.arange(count)
    uniform = uniforms(seeds, torch.full_like(seeds, 3), 1)
    tokens = sample(LOGITS.expand(count, -1), uniform, temperature, **filters).token
    return torch.bincount(tokens, minlength=VOCAB).double()


def test_the_softmax_at_that_temperature_is_sampled() -> None:
    for temperature in (0.5, 1.0, 2.0):
        assert chi_square_p(draws(20_000, temperature), torch.softmax(LOGITS / temperature, dim=0)) > 1e-6
    assert chi_square_p(draws(20_000, 0.9), torch.softmax(LOGITS, dim=0)) < 1e-6  # and the test could tell


@pytest.mark.parametrize("other", [{"step": 2}, {"position": 4}, {"shift": 1}])
def test_draws_of_other_steps_positions_and_seeds_are_independent(other: dict[str, int]) -> None:
    seeds = torch.arange(20_000)
    first = uniforms(seeds, torch.full_like(seeds, 3), 1)
    seeds = seeds + other.get("shift", 0)
    second = uniforms(seeds, torch.full_like(seeds, other.get("position", 3)), other.get("step", 1))
    tokens = [sample(LOGITS.expand(len(seeds), -1), uniform).token for uniform in (first, second)]
    p = torch.softmax(LOGITS, dim=0)
    joint = torch.bincount(tokens[0] * VOCAB + tokens[1], minlength=VOCAB**2).double()
    assert chi_square_p(joint, torch.outer(p, p).flatten()) > 1e-6


def test_the_ends_of_the_distribution_are_reached_and_nothing_beyond() -> None:
    """u = 0 takes the first token of any probability, the largest u below 1 the last."""
    logits = suppress_(LOGITS[None].clone(), torch.tensor([0, 5])).expand(2, -1)
    token = sample(logits, torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)).token
    assert token.tolist() == [1, 4]


@pytest.mark.parametrize("k", [2, 6, 9])
def test_top_k_samples_the_k_most_likely(k: int) -> None:
    logits = LOGITS.clone()
    logits[LOGITS.argsort(descending=True)[k:]] = -torch.inf
    counts = draws(5000, 1.5, top_k=k)
    assert chi_square_p(counts, torch.softmax(logits / 1.5, dim=0)) > 1e-6 and (counts > 0).sum() <= k


@pytest.mark.parametrize("p", [0.01, 0.4, 0.7, 0.95, 1.0])
def test_top_p_keeps_the_fewest_tokens_of_that_probability(p: float) -> None:
    """Against a loop: tokens are taken until their probability reaches p."""
    probability, taken, total = torch.softmax(LOGITS, dim=0), set(), 0.0
    for token in LOGITS.argsort(descending=True).tolist():
        if total < p:
            taken.add(token)
            total += probability[token].item()
    kept = keep_top_p(LOGITS[None], p)[0] > -torch.inf
    assert set(kept.nonzero()[:, 0].tolist()) == taken
    assert {int(i) for i in draws(5000, 1.0, top_p=p).nonzero()[:, 0]} <= taken
    # After the temperature: at a high one more tokens are needed for the same probability.
    assert (draws(3000, 5.0, top_p=0.6) > 0).sum() > (draws(3000, 0.5, top_p=0.6) > 0).sum()


def test_the_figures_are_the_models_own_whatever_the_temperature_and_the_filters() -> None:
    p = torch.softmax(LOGITS, dim=0)
    greedy = sample(LOGITS[None])
    assert greedy.token.tolist() == [0] and greedy.confidence.item() == pytest.approx(p[0].item(), rel=1e-12)
    seeds = torch.arange(50)
    sampled = sample(LOGITS.expand(50, -1), uniforms(seeds, seeds, 0), 5.0, top_k=5)
    assert len(set(sampled.token.tolist())) > 3
    entropy = -sum(x * math.log(x) for x in p.tolist())
    torch.testing.assert_close(sampled.confidence, p[sampled.token])
    torch.testing.assert_close(sampled.margin, (p[0] - p[5]).expand(50))
    torch.testing.assert_close(sampled.entropy, torch.full((50,), entropy, dtype=torch.float64))
    # Changed logits decide the token alone.
    changed = LOGITS.clone()[None]
    changed[0, 2] = 9.0
    other = sample(changed, raw=LOGITS[None])
    assert other.token.item() == 2 and other.confidence.item() == pytest.approx(p[2].item(), rel=1e-12)


def test_low_precision_logits_are_normalised_in_float32() -> None:
    logits = torch.tensor([[10.0, 9.0, 8.0]], dtype=torch.bfloat16)
    confidence = sample(logits).confidence
    assert confidence.dtype == torch.float32
    assert confidence.item() == pytest.approx(torch.softmax(logits.double(), dim=-1)[0, 0].item(), rel=1e-6)


def test_suppressed_ids_have_probability_zero() -> None:
    original = LOGITS.expand(3, -1).clone()
    logits = suppress_(original.clone(), torch.tensor([0, 5, 9]))  # one beyond the vocabulary
    assert torch.equal(original[0], LOGITS) and logits[0, [0, 5]].tolist() == [-torch.inf] * 2
    assert torch.equal(logits[:, 1:5], original[:, 1:5])
    p = torch.softmax(LOGITS[1:5], dim=0)  # what has no probability adds no entropy
    assert sample(logits).entropy[0].item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-12)


@pytest.mark.parametrize("size", [5, 64, 700, 3000])
def test_drawing_by_groups_is_the_inverse_of_the_distribution_function(size: int) -> None:
    make = torch.Generator().manual_seed(size)
    weight = torch.rand(40, size, generator=make, dtype=torch.float64).masked_fill(
        torch.rand(40, size, generator=make) < 0.5, 0.0
    )
    weight[:, size // 2] = 1.0
    uniform = torch.rand(40, generator=make, dtype=torch.float64)
    uniform[:2] = torch.tensor([0.0, 1 - 2.0**-53])
    for row, (weights, u) in enumerate(zip(weight, uniform, strict=True)):
        until = weights.cumsum(dim=0)
        expected = int((until <= u * until[-1]).sum())
        expected = min(expected, int(weights.nonzero()[-1]))
        assert invert(weight, uniform)[row] == expected


@pytest.mark.parametrize("values", [3, 10_000])
def test_top_p_of_a_large_vocabulary_with_equal_logits(values: int) -> None:
    """Against sorting all of it: of equal logits those of the lower ids are kept, in any batch."""
    logits = torch.randint(0, values, (6, 4000), generator=torch.Generator().manual_seed(1)).double() / values
    logits[3] *= 40
    for p in (0.05, 0.5, 0.99):
        ordered, index = logits.sort(dim=-1, descending=True, stable=True)
        probability = torch.softmax(ordered, dim=-1)
        before = probability.cumsum(dim=-1) - probability
        expected = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, index, before < p)
        kept = keep_top_p(logits, p) > -torch.inf
        assert torch.equal(kept, expected)
        assert torch.equal(keep_top_p(logits[3:4], p)[0] > -torch.inf, kept[3])

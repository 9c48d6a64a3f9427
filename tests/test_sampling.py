from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import chi_square_p
from torch import Tensor

from unmask.generation.sampling import keep_top_p, sample, suppress, uniforms

VOCAB = 6
LOGITS = torch.tensor([1.5, 0.0, -1.0, 0.5, -3.0, 1.0], dtype=torch.float64)


def draws(seeds: Tensor, position: int, step: int, temperature: float, **filters: Any) -> Tensor:
    uniform = uniforms(seeds, torch.full_like(seeds, position), step)
    tokens = sample(LOGITS.expand(len(seeds), -1), uniform, temperature, **filters).token
    return torch.bincount(tokens, minlength=VOCAB).double()


# The seeds are fixed, so these never fail by chance; with other seeds each would one time in a million.
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_softmax_at_that_temperature_is_sampled(temperature: float) -> None:
    counts = draws(torch.arange(20_000), 3, 1, temperature)
    assert chi_square_p(counts, torch.softmax(LOGITS / temperature, dim=0)) > 1e-6


def test_the_chi_square_test_sees_a_wrong_temperature() -> None:
    counts = draws(torch.arange(20_000), 3, 1, 0.9)
    assert chi_square_p(counts, torch.softmax(LOGITS, dim=0)) < 1e-6


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


def test_a_draw_depends_on_its_own_row_alone() -> None:
    seeds, positions = torch.tensor([5, 6, 7]), torch.tensor([1, 2, 3])
    together = uniforms(seeds, positions, 4)
    alone = torch.cat([uniforms(seeds[i : i + 1], positions[i : i + 1], 4) for i in range(3)])
    assert torch.equal(together, alone)
    assert torch.equal(together, uniforms(seeds, positions, torch.tensor([4, 4, 4])))


def test_the_ends_of_the_distribution_are_reached_and_nothing_beyond() -> None:
    """u = 0 takes the first token of any probability, the largest u below 1 the last."""
    logits = suppress(LOGITS[None], torch.tensor([0, 5])).expand(2, -1)
    token = sample(logits, torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)).token
    assert token.tolist() == [1, 4]


@pytest.mark.parametrize("k", [1, 2, 4, 6, 9])
def test_top_k_samples_the_k_most_likely(k: int) -> None:
    kept = LOGITS.clone()
    kept[LOGITS.argsort(descending=True)[k:]] = -torch.inf
    counts = draws(torch.arange(5000), 3, 1, 1.5, top_k=k)
    assert chi_square_p(counts, torch.softmax(kept / 1.5, dim=0)) > 1e-6 or k == 1
    assert (counts > 0).sum() <= k


@pytest.mark.parametrize("p", [0.01, 0.4, 0.7, 0.95, 1.0])
def test_top_p_keeps_the_fewest_tokens_of_that_probability(p: float) -> None:
    """Against a loop: tokens are taken until their probability reaches p."""
    probability = torch.softmax(LOGITS, dim=0)
    taken, total = set(), 0.0
    for token in LOGITS.argsort(descending=True).tolist():
        if total < p:
            taken.add(token)
            total += probability[token].item()
    kept = keep_top_p(LOGITS[None], p)[0]
    assert {i for i in range(VOCAB) if kept[i] > -torch.inf} == taken
    counts = draws(torch.arange(5000), 3, 1, 1.0, top_p=p)
    assert {int(i) for i in counts.nonzero()[:, 0]} <= taken


def test_filters_come_after_the_temperature() -> None:
    """At a high temperature more tokens are needed for the same probability."""
    low, high = (draws(torch.arange(3000), 3, 1, heat, top_p=0.6) for heat in (0.5, 5.0))
    assert (high > 0).sum() > (low > 0).sum()


def test_without_noise_the_most_likely_token_is_taken() -> None:
    drawn = sample(LOGITS[None])
    assert drawn.token.tolist() == [0]
    assert drawn.confidence.item() == pytest.approx(torch.softmax(LOGITS, dim=0)[0].item(), rel=1e-12)


def test_what_the_model_is_sure_of_does_not_change_with_temperature_and_filters() -> None:
    seeds = torch.arange(50)
    logits = LOGITS.expand(50, -1)
    drawn = sample(logits, uniforms(seeds, seeds, 0), 5.0, top_k=5)
    p = torch.softmax(LOGITS, dim=0)
    assert len(set(drawn.token.tolist())) > 3
    assert torch.allclose(drawn.confidence, p[drawn.token], rtol=1e-12, atol=0)
    assert torch.allclose(drawn.margin, (p[0] - p[5]).expand(50), rtol=1e-12, atol=0)
    entropy = -sum(x * math.log(x) for x in p.tolist())
    assert torch.allclose(drawn.entropy, torch.full((50,), entropy, dtype=torch.float64), rtol=1e-12, atol=0)


def test_changed_logits_decide_the_token_and_raw_ones_the_confidence() -> None:
    changed = LOGITS.clone()[None]
    changed[0, 2] = 9.0
    drawn = sample(changed, raw=LOGITS[None])
    assert drawn.token.item() == 2
    assert drawn.confidence.item() == pytest.approx(torch.softmax(LOGITS, dim=0)[2].item(), rel=1e-12)


def test_a_token_of_no_probability_adds_no_entropy() -> None:
    drawn = sample(suppress(LOGITS[None], torch.tensor([0, 1, 2])))
    p = torch.softmax(LOGITS[3:], dim=0)
    assert drawn.entropy.item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-12)


def test_low_precision_logits_are_normalised_in_float32() -> None:
    logits = torch.tensor([[10.0, 9.0, 8.0]], dtype=torch.bfloat16)
    confidence = sample(logits).confidence
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
        tokens = sample(logits, uniforms(seeds, seeds, 0), temperature).token
        assert not torch.isin(tokens, torch.tensor([0, 5])).any()


def test_suppress_leaves_its_argument_and_takes_an_empty_list() -> None:
    logits = LOGITS[None].clone()
    assert torch.equal(suppress(logits, torch.tensor([], dtype=torch.long)), logits)
    suppress(logits, torch.tensor([1]))
    assert torch.equal(logits[0], LOGITS)

"""The bound against enumeration: toy conditionals in float64, every order and every set in plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import permutations, product
from typing import Any

import numpy as np
import pytest
import torch
from tiny import assert_rate, assert_uniform, random_ids, tiny_model, tiny_stock_model
from torch import Tensor
from training_step import noise_of

from unmask.diffusion.corrupt import example_seeds
from unmask.diffusion.likelihood import (
    Likelihood,
    Plan,
    SampledChains,
    SampledSets,
    Score,
    estimate,
    exact_masks,
    likelihood,
    paired_stderr,
    plan_passes,
    rank_in_group,
    subset_size,
)
from unmask.errors import UnmaskError

V = 3


class Toy:
    """Arbitrary conditionals: -log p(x_i | everything else) looked up in a table of random numbers."""

    def __init__(self, length: int, seed: int = 0, blocks: Sequence[int] | None = None):
        self.length = length
        self.blocks = list(blocks or [0] * length)
        generator = torch.Generator().manual_seed(seed)
        logits = 2 * torch.randn((V + 1) ** length, length, V, generator=generator, dtype=torch.float64)
        self.table = -logits.log_softmax(dim=-1)
        self.calls: list[tuple[int, ...]] = []

    def nll(self, ids: Sequence[int], masked: Sequence[bool], i: int) -> float:
        """Of token i: it sees what is not masked of its own block, and all of earlier blocks."""
        code = 0
        for j in range(self.length):
            hidden = self.blocks[j] > self.blocks[i] or (self.blocks[j] == self.blocks[i] and masked[j])
            code = code * (V + 1) + (V if hidden else int(ids[j]))
        return self.table[code, i, ids[i]].item()

    def __call__(self, ids: Tensor, is_masked: Tensor, is_token: Tensor, source: Tensor) -> Tensor:
        self.calls.append(tuple(ids.shape))
        assert not (is_masked & (source | ~is_token)).any()
        out = []
        for row, masked, token in zip(ids, is_masked, is_token, strict=True):
            x, m = row[token].tolist(), masked[token].tolist()
            x, m = x + [0] * (self.length - len(x)), m + [False] * (self.length - len(m))
            out += [self.nll(x, m, i) for i in range(self.length) if m[i]]
        return torch.tensor(out, dtype=torch.float64)

    def chain(self, ids: Sequence[int], order: Sequence[int]) -> list[float]:
        """-log p of each token when those of `order` are decoded in this order, the rest being known."""
        masked = [i in order for i in range(self.length)]
        nll = [0.0] * self.length
        for i in order:
            nll[i] = self.nll(ids, masked, i)
            masked[i] = False
        return nll

    def chains(self, ids: Sequence[int], where: Sequence[int] | None = None) -> np.ndarray:
        """The chain of every order, block after block: (orders, length)."""
        where = range(self.length) if where is None else where
        groups = [[i for i in where if self.blocks[i] == b] for b in sorted({self.blocks[i] for i in where})]
        return np.array(
            [
                np.sum([self.chain(ids, order) for order in orders], axis=0)
                for orders in product(*[list(permutations(group)) for group in groups])
            ]
        )


def score(toy: Any, ids: Tensor, source: Tensor | None = None, **settings: Any) -> Likelihood:
    """`estimate` on rows without padding."""
    is_token = settings.pop("is_token", torch.ones_like(ids, dtype=torch.bool))
    source = torch.zeros_like(is_token) if source is None else source
    blocks = getattr(toy, "blocks", [0])
    block = torch.zeros_like(ids) if len(set(blocks)) == 1 else torch.tensor([blocks] * len(ids))
    given: dict[str, Any] = {
        "estimator": "exact_k",
        "num_samples": 64,
        "seed": 0,
        "eps": 1e-3,
        "batch_size": 16,
        **settings,
    }
    return estimate(toy, ids, is_token, source, block, **given)


def values_of(plan: Plan, toy: Toy, ids: list[int], where: list[int], at_once: int = 7) -> Tensor:
    """Go through a plan's passes and add its weighted nlls up: (draws, N)."""
    values = torch.zeros(plan.num_draws, len(where), dtype=torch.float64)
    for start in range(0, plan.num_passes, at_once):
        passes = plan.passes(torch.arange(start, min(plan.num_passes, start + at_once)))
        for mask, weight, draw in zip(passes.is_masked, passes.weight, passes.draw, strict=True):
            masked = [i in where and bool(mask[where.index(i)]) for i in range(toy.length)]
            for place, i in enumerate(where):
                if masked[i]:
                    values[draw, place] += weight[place] * toy.nll(ids, masked, i)
    return values


IDS = [2, 0, 1, 1]
BLOCK = torch.zeros(4, dtype=torch.long)
ORDERS = torch.tensor(list(permutations(range(4))))


# Each estimator, its randomness enumerated, against the mean over all orders.


def test_all_sets_give_the_mean_over_all_orders_and_the_exact_likelihood() -> None:
    toy = Toy(4)
    chains = toy.chains(IDS)
    found = score(toy, torch.tensor([IDS]), estimator="chain")
    np.testing.assert_allclose(found.token_nll[0], chains.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.nll, chains.sum(axis=1).mean(), rtol=1e-12)
    exact = -math.log(np.exp(-chains.sum(axis=1)).mean())
    assert found.mixture_nll is not None
    np.testing.assert_allclose(found.mixture_nll, exact, rtol=1e-12)
    assert (found.stderr.tolist(), found.num_forwards) == ([0.0], 15)
    assert exact < found.nll.item() - 0.01  # a bound, and with these conditionals no equality


def test_exactly_k_over_all_sizes_and_orders_is_the_mean_over_all_orders() -> None:
    toy = Toy(4)
    rank = ORDERS.repeat(4, 1)
    k = torch.arange(1, 5).repeat_interleave(24)[:, None].expand(-1, 4)
    plan = SampledSets(rank < k, 4 / k.double())
    per_token = plan.finish(values_of(plan, toy, IDS, [0, 1, 2, 3]))[0]
    np.testing.assert_allclose(per_token, toy.chains(IDS).mean(axis=0), rtol=1e-12)


def test_the_chain_over_all_orders() -> None:
    toy = Toy(4)
    plan = SampledChains(BLOCK, ORDERS)
    values = values_of(plan, toy, IDS, [0, 1, 2, 3])
    chains = toy.chains(IDS)
    np.testing.assert_allclose(sorted(values.sum(dim=1)), sorted(chains.sum(axis=1)), rtol=1e-12)
    per_token, stderr = plan.finish(values)
    np.testing.assert_allclose(per_token, chains.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(stderr, chains.sum(axis=1).std(ddof=1) / math.sqrt(24))
    np.testing.assert_allclose(plan.mixture(values), -math.log(np.exp(-chains.sum(axis=1)).mean()))
    assert plan.num_passes == 24 * 4


def continuous_mean(toy: Toy, ids: list[int], eps: float) -> float:
    """The expectation of the continuous estimator: all sets at the nodes of a quadrature that is exact
    for the polynomial in t that it is."""
    n = len(ids)
    nodes, weights = np.polynomial.legendre.leggauss(n)
    total = 0.0
    for node, weight in zip(nodes, weights, strict=True):
        t = eps + (1 - eps) * (node + 1) / 2
        sets = torch.tensor(list(product([False, True], repeat=n)))
        plan = SampledSets(sets, torch.full(sets.shape, 1 / t, dtype=torch.float64))
        assert plan.num_passes == 2**n - 1  # the empty set needs no forward
        sums = values_of(plan, toy, ids, list(range(n))).sum(dim=1).numpy()
        k = sets.sum(dim=1).numpy()
        total += weight / 2 * float((t**k * (1 - t) ** (n - k) * sums).sum())
    return total


def test_continuous_goes_to_the_bound_as_eps_goes_to_0() -> None:
    toy = Toy(4)
    bound = toy.chains(IDS).sum(axis=1).mean()
    gaps = [abs(continuous_mean(toy, IDS, eps) - bound) for eps in (1e-1, 1e-2, 1e-3, 1e-9)]
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3]
    np.testing.assert_allclose([gaps[1] / gaps[2], gaps[3] + 1], [10, 1], rtol=0.05)  # O(eps)


@pytest.mark.parametrize("length", [2, 3, 4])
def test_never_below_the_exact_likelihood_and_equal_where_orders_agree(length: int) -> None:
    for seed in range(2):
        toy = Toy(length, seed)
        for ids in product(range(V), repeat=length):
            found = score(toy, torch.tensor([ids]), estimator="chain")
            assert found.mixture_nll is not None
            assert found.nll.item() >= found.mixture_nll.item()
    # Independent tokens: every order gives the same product.
    toy.table[:] = toy.table[:1]
    found = score(toy, torch.tensor([ids]), estimator="chain")
    assert found.mixture_nll is not None
    np.testing.assert_allclose(found.nll, found.mixture_nll, rtol=1e-12)


def test_exact_probabilities_sum_to_one() -> None:
    ids = torch.tensor(list(product(range(V), repeat=3)))
    found = score(Toy(3), ids, estimator="chain")
    assert found.mixture_nll is not None
    np.testing.assert_allclose((-found.mixture_nll).exp().sum(), 1, rtol=1e-12)
    assert (-found.nll).exp().sum() < 0.99


# The draws.


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 33, 1000])
@pytest.mark.parametrize("strata", [1, 2, 5, 32])
def test_every_k_is_equally_likely(size: int, strata: int) -> None:
    # k rises with u, so its first u tells the number of u it has; here u is an integer below strata * 2^40.
    scale = 2**40

    def k_of(u: int) -> int:
        stratum, bits = divmod(u, scale)
        return int(subset_size(torch.tensor(size), torch.tensor(bits), stratum, strata))

    first = [math.ceil(Fraction(k * strata * scale, size)) for k in range(size + 1)]
    for k in range(1, size + 1) if size < 100 else (1, 2, 499, 500, 501, 999, 1000):
        assert k_of(first[k - 1]) == k == k_of(first[k] - 1)
        assert abs(Fraction(first[k] - first[k - 1], strata * scale) - Fraction(1, size)) < Fraction(1, 2**39)


def plan_of(block: list[int], key: int, estimator: Any, num_samples: int, eps: float = 1e-3) -> Plan:
    return plan_passes(key, torch.arange(len(block)), torch.tensor(block), estimator, num_samples, eps)


@pytest.mark.parametrize("size", [5, 6])
def test_draws_have_the_right_sizes_and_sets(size: int) -> None:
    masks = [plan_of([0] * size, key, "exact_k", 4).passes(torch.arange(4)).is_masked for key in range(2000)]
    is_masked = torch.stack(masks)  # (keys, draws, tokens)
    k = is_masked.sum(dim=2)
    assert_uniform(k - 1, size)
    assert (k[:, :2] <= (size + 1) // 2).all() and (k[:, 2:] > size // 2).all()  # two strata
    assert (k[:, 0] != k[:, 1]).any()
    for count in range(1, size):
        assert_rate(is_masked[k == count], count / size)  # each token as often


def test_continuous_masks_each_token_at_its_rate() -> None:
    plans = [plan_of([0, 0, 0, 1, 1, 1], key, "continuous", 2, 0.2) for key in range(3000)]
    passes = [plan.passes(torch.arange(plan.num_passes)) for plan in plans if plan.num_passes == 2]
    assert len(passes) > 2500  # a draw that masks nothing has no pass
    t = 1 / torch.stack([some.weight for some in passes])
    is_masked = torch.stack([some.is_masked for some in passes])
    assert (t[..., :1] == t[..., :3]).all() and (t[..., 2] != t[..., 3]).all()  # one t a block
    assert_uniform(((t[..., ::3] - 0.2) / 0.8 * 10).long(), 10)
    for low in (0.2, 0.5, 0.8):
        near = (t >= low) & (t < low + 0.1)
        assert_rate(is_masked[near], low + 0.05)


def test_ranks_are_those_within_the_block() -> None:
    block = torch.tensor([0, 0, 0, 1, 2, 2])
    number = torch.randint(-9, 9, (50, 6)).double() + torch.rand(50, 6)
    number = (number * 1e6).long()
    expected = [
        [sum(row[j] < row[i] for j in range(6) if block[j] == block[i]) for i in range(6)]
        for row in number.tolist()
    ]
    group = torch.arange(50)[:, None] * 3 + block
    rank, size = rank_in_group(number.flatten(), group.flatten())
    assert rank.view(50, 6).tolist() == expected
    assert size.view(50, 6).unique(dim=0).tolist() == [[3, 3, 3, 1, 2, 2]]


# Sampling.


def many(toy: Toy, ids: Tensor, seeds: int, **settings: Any) -> tuple[Tensor, Tensor]:
    found = [score(toy, ids, seed=seed, **settings) for seed in range(seeds)]
    return torch.stack([f.nll for f in found])[:, 0], torch.stack([f.stderr for f in found])[:, 0]


class Fast(Toy):
    """A toy of two words whose nlls are looked up for a whole batch."""

    def __init__(self, length: int):
        self.length, self.blocks, self.calls = length, [0] * length, []
        generator = torch.Generator().manual_seed(1)
        self.table = -torch.randn(3**length, length, 2, generator=generator).double().log_softmax(dim=-1)
        self.power = 3 ** torch.arange(length - 1, -1, -1)

    def nll(self, ids: Sequence[int], masked: Sequence[bool], i: int) -> float:
        x, m = torch.tensor([ids]), torch.tensor([masked])
        return self(x, m, torch.ones_like(m), torch.zeros_like(m))[sum(masked[:i])].item()

    def __call__(self, ids: Tensor, is_masked: Tensor, is_token: Tensor, source: Tensor) -> Tensor:
        code = (torch.where(is_masked, 2, ids) * self.power).sum(dim=1)
        return self.table[code].gather(2, ids[..., None])[..., 0][is_masked]


@pytest.mark.parametrize(("estimator", "num_samples"), [("exact_k", 128), ("chain", 16), ("continuous", 128)])
def test_estimates_are_unbiased_with_the_standard_error_they_state(estimator: str, num_samples: int) -> None:
    toy, ids, count = Fast(8), [0, 1, 1, 0, 1, 0, 0, 1], 400
    expected = score(toy, torch.tensor([ids]), estimator="chain").nll.item()  # enumerated, see above
    if estimator == "continuous":
        expected = continuous_mean(toy, ids, 0.05)
    settings = {"estimator": estimator, "num_samples": num_samples, "eps": 0.05, "batch_size": 128}
    nll, stderr = many(toy, torch.tensor([ids]), count, **settings)
    # Five standard errors of the mean: a false alarm in 1.7 million.
    assert (nll.mean() - expected).abs() < 5 * nll.std() / math.sqrt(count)
    # The mean of the squared error stated is the variance seen. With 400 draws its relative standard error
    # is sqrt(2 / 399) = 7.1% for a normal estimate; 5 of them.
    ratio = (stderr.square().mean() / nll.var()).item()
    assert 1 - 0.36 < ratio < 1 + 0.36
    # Each is in its own units: z-scores have variance 1, or n / (n - 2) with n degrees of freedom. The error
    # rests on the draws that mask few tokens, of which there are some 16. 0.5 is about 5 standard errors.
    z = (nll - expected) / stderr
    assert abs(z.var().item() - 1.1) < 0.5


def test_strata_lower_the_error() -> None:
    def nll(ids: Tensor, is_masked: Tensor, is_token: Tensor, source: Tensor) -> Tensor:
        return is_masked.sum(dim=1, keepdim=True).expand(ids.shape)[is_masked].double()

    # All that varies is k: the estimate is the mean of 7 k, whose variance without strata is 49 * 4 / 32.
    found = []
    for seed in range(100):
        ids = torch.zeros(1, 7, dtype=torch.long)
        found.append(score(nll, ids, seed=seed, num_samples=32))
    estimates = torch.stack([one.nll for one in found])
    assert estimates.mean() == pytest.approx(28, abs=0.5)
    assert estimates.var() < 0.1 * 49 * 4 / 32


def test_more_samples_and_other_seeds() -> None:
    toy, ids = Fast(7), torch.tensor([[0, 1, 1, 0, 1, 0, 0]])
    few, more = (score(toy, ids, num_samples=count) for count in (8, 120))
    assert more.stderr < few.stderr and (few.num_forwards, more.num_forwards) == (8, 120)
    again, other = score(toy, ids, num_samples=8), score(toy, ids, num_samples=8, seed=1)
    assert torch.equal(again.nll, few.nll) and not torch.equal(other.nll, few.nll)


def test_pairs_give_the_standard_error_of_the_mean() -> None:
    # By hand: pairs (1, 3) and (10, 10): variances of the pair means 1 and 0, mean of two.
    assert paired_stderr(torch.tensor([1.0, 3.0, 10.0, 10.0])) == pytest.approx(0.5)


# Nothing depends on what else is in the batch.

ESTIMATORS = ("exact_k", "continuous", "chain")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_batch_size_padding_and_mates_change_nothing(estimator: str) -> None:
    toy = Toy(5)
    rows = [[0, 1, 2, 2, 1], [1, 1, 0], [2], [0, 2, 1, 0, 1]]
    sources = [[1, 0, 0, 0, 0], [0, 0, 0], [0], [0, 0, 0, 0, 0]]
    settings: dict[str, Any] = {"estimator": estimator, "num_samples": 4}
    alone = [
        score(toy, torch.tensor([ids]), torch.tensor([source]).bool(), **settings)
        for ids, source in zip(rows, sources, strict=True)
    ]
    assert alone[0].num_tokens.tolist() == [4] and alone[0].token_nll[0, 0] == 0
    for side, width, batch_size, order in (
        ("right", 5, 3, [0, 1, 2, 3]),
        ("left", 9, 1, [3, 2, 1, 0]),
        ("both", 8, 64, [2, 0, 3, 1]),
    ):
        ids = torch.full((4, width), 7)
        is_token, source = torch.zeros(2, 4, width, dtype=torch.bool)
        for row, index in enumerate(order):
            size = len(rows[index])
            start = {"right": 0, "left": width - size, "both": 2}[side]
            columns = torch.arange(start, start + size)
            if side == "both":  # padding in the middle, too
                columns += torch.arange(size) >= 2
            ids[row, columns] = torch.tensor(rows[index])
            is_token[row, columns] = True
            source[row, columns] = torch.tensor(sources[index]).bool()
        found = score(toy, ids, source, is_token=is_token, batch_size=batch_size, **settings)
        for row, index in enumerate(order):
            one = alone[index]
            assert torch.equal(found.token_nll[row][is_token[row]], one.token_nll[0])
            assert not found.token_nll[row][~is_token[row]].any()
            assert (found.nll[row], found.stderr[row]) == (one.nll[0], one.stderr[0])
            assert found.record_key[row] == one.record_key[0]
        assert found.num_forwards == sum(one.num_forwards for one in alone)


def test_other_records_get_other_masks() -> None:
    ids = torch.tensor([[0, 1, 2], [1, 0, 2], [0, 1, 2]])
    source = torch.tensor([[0, 0, 0], [0, 0, 0], [1, 0, 0]]).bool()
    assert len(set(score(Toy(3), ids, source).record_key.tolist())) == 3


def test_batches_are_full_and_hold_several_records() -> None:
    toy = Toy(3)
    ids = random_ids(7, 3, vocab=V)
    told: list[float] = []
    found = score(toy, ids, batch_size=10, advance=told.append)
    assert [rows for rows, _ in toy.calls] == [10, 10, 10, 10, 9]
    assert found.num_forwards == 49 and sum(told) == pytest.approx(7)


# Blocks.


@pytest.mark.parametrize("estimator", ["exact_k", "chain"])
@pytest.mark.parametrize(
    ("blocks", "forwards"),
    [([0, 1, 2, 3, 4], 1), ([0, 0, 0, 1, 1], 7), ([0, 0, 1, 1, 2], 3), ([0, 0, 0, 0, 0], 31)],
)
def test_blocks_are_scored_at_once(blocks: list[int], forwards: int, estimator: str) -> None:
    toy = Toy(5, blocks=blocks)
    ids = [1, 2, 0, 0, 2]
    chains = toy.chains(ids)
    found = score(toy, torch.tensor([ids]), estimator=estimator)
    np.testing.assert_allclose(found.token_nll[0], chains.mean(axis=0), rtol=1e-12)
    assert (found.num_forwards, found.stderr.item()) == (forwards, 0)
    if estimator == "chain":
        assert found.mixture_nll is not None
        exact = -math.log(np.exp(-chains.sum(axis=1)).mean())
        np.testing.assert_allclose(found.mixture_nll, exact, rtol=1e-12)
    if forwards == 1:  # one order alone: the bound is the autoregressive likelihood
        assert len(chains) == 1


@pytest.mark.parametrize(("estimator", "num_samples"), [("exact_k", 4), ("continuous", 8), ("chain", 2)])
def test_sampled_blocks_are_unbiased(estimator: str, num_samples: int) -> None:
    toy = Toy(5, blocks=[0, 0, 0, 1, 1])
    ids, count = [1, 2, 0, 0, 2], 300
    expected = toy.chains(ids).sum(axis=1).mean()
    settings = {"estimator": estimator, "num_samples": num_samples, "eps": 1e-6}
    nll, stderr = many(toy, torch.tensor([ids]), count, **settings)
    assert (nll.mean() - expected).abs() < 5 * nll.std() / math.sqrt(count)
    # 0.5 is 6 standard errors of the ratio for a normal estimate, 4 for the heavier tails of 1/t.
    assert abs((stderr.square().mean() / nll.var()).item() - 1) < 0.5


def test_a_prompt_is_given() -> None:
    toy = Toy(4)
    for ids in ([2, 0, 1, 1], [2, 1, 1, 1]):
        source = torch.tensor([[False, True, False, True]])
        found = score(toy, torch.tensor([ids]), source)
        expected = toy.chains(ids, [0, 2]).mean(axis=0)
        np.testing.assert_allclose(found.token_nll[0], expected, rtol=1e-12)
        assert (found.num_forwards, found.num_tokens.item()) == (3, 2)


# The result.


def test_nothing_to_score_is_zero_and_no_nan() -> None:
    told: list[float] = []
    found = score(
        Toy(3),
        torch.tensor([[1, 2, 0], [0, 0, 0]]),
        torch.tensor([[True, True, True], [False, False, False]]),
        is_token=torch.tensor([[True, True, True], [False, False, False]]),
        advance=told.append,
    )
    assert found.nll.tolist() == found.stderr.tolist() == found.num_tokens.tolist() == [0, 0]
    assert found.perplexity().value.tolist() == [1, 1] and found.num_forwards == 0 and sum(told) == 2
    assert found.bits_per_byte(torch.tensor([0, 3])).value.tolist() == [0, 0]
    assert score(Toy(3), torch.zeros(0, 3, dtype=torch.long)).total().nll == 0


def test_units() -> None:
    one = Score(torch.tensor(6.0), torch.tensor(0.6), torch.tensor(3))
    assert one.nats_per_token() == (2.0, pytest.approx(0.2))
    assert one.perplexity() == (pytest.approx(math.exp(2)), pytest.approx(0.2 * math.exp(2)))
    assert one.bits_per_byte(torch.tensor(4)) == (
        pytest.approx(1.5 / math.log(2)),
        pytest.approx(0.15 / math.log(2)),
    )
    assert one.bits_per_byte(torch.tensor(0)).value == math.inf


def test_total_adds_errors_of_equal_records_and_squares_of_others() -> None:
    toy = Fast(7)
    ids = torch.tensor([[0, 1, 1, 0, 1, 0, 0], [1] * 7, [0, 1, 1, 0, 1, 0, 0]])
    found = score(toy, ids, num_samples=8)
    a, b, c = found.stderr.tolist()
    assert a == c
    total = found.total()
    assert total.stderr.item() == pytest.approx(math.hypot(2 * a, b))
    assert total.nll == found.nll.sum() and total.num_tokens == 21


# Real models.


def enumerated(model: Any, ids: list[int], where: list[int]) -> float:
    """The bound by all orders, from the logits of `forward`."""
    model.eval()
    seen: dict[tuple[int, ...], Tensor] = {}

    def log_p(masked: tuple[int, ...]) -> Tensor:
        if masked not in seen:
            x_t = torch.tensor([ids])
            x_t[0, list(masked)] = model.config.mask_token_id
            seen[masked] = model(x_t).logits[0].log_softmax(dim=-1).detach()
        return seen[masked]

    totals = []
    for order in permutations(where):
        total = 0.0
        for step, i in enumerate(order):
            total -= log_p(tuple(sorted(order[step:])))[i, ids[i]].item()
        totals.append(total)
    return sum(totals) / len(totals)


@pytest.mark.parametrize("logit_shift", [False, True])
def test_model_is_scored_within_its_error_and_left_as_it_was(logit_shift: bool) -> None:
    model = tiny_model(logit_shift=logit_shift).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    ids = random_ids(1, 8)
    source = torch.tensor([[True, True, True, False, False, False, False, False]])
    batch = {"input_ids": ids, "src_mask": source, "instruction_lengths": torch.tensor([3])}
    exact = likelihood(model, batch, estimator="chain")
    sampled = {name: likelihood(model, batch, estimator=name, num_samples=30) for name in ("exact_k",)}
    sampled["continuous"] = likelihood(model, batch, estimator="continuous", num_samples=200, eps=1e-6)
    sampled["chain"] = likelihood(model, batch, estimator="chain", num_samples=6)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    expected = enumerated(model, ids[0].tolist(), [3, 4, 5, 6, 7])
    assert exact.nll.item() == pytest.approx(expected, rel=1e-9) and exact.stderr == 0
    assert exact.mixture_nll is not None and exact.mixture_nll.item() < expected
    for name, found in sampled.items():
        assert 0 < found.stderr < 2, name
        assert abs(found.nll.item() - expected) < 4 * found.stderr, name
        assert (found.mixture_nll is not None) == (name == "chain")


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("settings", [{}, {"attention": "block_causal", "block_length": 3}])
def test_padding_and_mates_change_no_score_of_a_model(estimator: Any, settings: dict[str, Any]) -> None:
    model = tiny_model(logit_shift=True, **settings)
    ids = random_ids(3, 9)
    source = torch.arange(9)[None] < torch.tensor([[2], [0], [3]])
    common: dict[str, Any] = {"estimator": estimator, "num_samples": 6}
    together = likelihood(model, {"input_ids": ids, "src_mask": source}, batch_size=5, **common)
    for row in range(3):
        padded = torch.zeros(1, 14, dtype=torch.long)
        mask, src = torch.zeros_like(padded), torch.ones_like(padded)
        place = slice(5, 14) if row == 1 else slice(2, 11)
        padded[0, place], mask[0, place], src[0, place] = ids[row], 1, source[row].long()
        batch = {"input_ids": padded, "attention_mask": mask, "src_mask": src}
        alone = likelihood(model, batch, **common)
        torch.testing.assert_close(alone.token_nll[0, place], together.token_nll[row])
        torch.testing.assert_close(alone.stderr[0], together.stderr[row])
        assert alone.num_tokens == together.num_tokens[row]


def test_blocks_of_one_token_give_the_autoregressive_likelihood() -> None:
    model = tiny_model(attention="block_causal", block_length=1, logit_shift=True)
    ids = random_ids(2, 7)
    source = torch.tensor([[True] * 3 + [False] * 4, [True] + [False] * 6])
    found = likelihood(model, {"input_ids": ids, "src_mask": source})
    stock = tiny_stock_model()
    stock.load_state_dict(model.state_dict())
    nll = -stock(ids).logits[:, :-1].log_softmax(dim=-1).gather(2, ids[:, 1:, None])[..., 0].detach()
    expected = torch.where(source[:, 1:], 0, nll)
    torch.testing.assert_close(found.token_nll[:, 1:], expected)
    assert found.num_forwards == 2 and not found.stderr.any()


def test_one_block_of_the_whole_text_gives_the_plain_bound() -> None:
    plain = tiny_model(logit_shift=False)
    blocks = tiny_model(logit_shift=False, attention="block_causal", block_length=6)
    ids = random_ids(1, 6)
    a, b = (likelihood(model, {"input_ids": ids}) for model in (plain, blocks))
    torch.testing.assert_close(a.token_nll, b.token_nll)
    assert a.num_forwards == b.num_forwards == 63


# The masks of the held-out loss.


def masks(count: int, seed: int, size: int = 6, ids: Tensor | None = None, **fields: Any) -> tuple[Any, Any]:
    """The masks of `count` samples, one token of source and `size` others each."""
    sample_ids = torch.arange(count) if ids is None else ids
    source = (torch.arange(size + 1) < 1).expand(count, -1)
    batch: dict[str, Any] = {"src_mask": source, "training_mode": "sft"}
    seeds = example_seeds(seed, sample_ids, -1)
    noised = noise_of(tiny_model(**fields), random_ids(count, size + 1), noise_seed=seeds, **batch)
    return exact_masks(noised, sample_ids, seed), noised


def test_shares_are_spread_evenly_over_the_samples() -> None:
    found, _ = masks(60, seed=3)
    assert found.is_masked.sum(dim=1).equal(found.k[:, 1])
    assert (found.size[:, 1:] == 6).all() and not found.is_masked[:, 0].any()
    assert (found.k[:, 1].bincount()[1:] - 10).abs().max() <= 2  # each k ten times, but for the ends


def test_over_sample_ids_each_number_and_each_set_is_equally_likely() -> None:
    ids = torch.randint(0, 2**39, (900,), generator=torch.Generator().manual_seed(0))
    found, _ = masks(900, seed=0, size=3, ids=ids)
    sets = found.is_masked[:, 1:].long() @ torch.tensor([1, 2, 4])
    # k = 1, 2, 3 with a third each; the sets of one or two tokens with a ninth each.
    expected = torch.tensor([0, 1, 1, 1, 1, 1, 1, 3]) * 100.0
    statistic = ((sets.bincount(minlength=8) - expected) ** 2 / expected.clamp(min=1)).sum()
    assert statistic < 35  # chi-square of 6 degrees of freedom, 1 in 200,000


def test_blocks_of_a_sample_have_shares_of_their_own() -> None:
    found, noised = masks(40, seed=1, attention="block_causal", block_length=3)
    for block in noised.block[0, 1:].unique():
        inside = (noised.block[0] == block) & (torch.arange(7) > 0)
        k = found.k[:, inside]
        assert (found.size[:, inside] == 3).all() and found.is_masked[:, inside].sum(dim=1).equal(k[:, 0])
        assert (k[:, 0].bincount()[1:] - 40 / 3).abs().max() <= 3
    assert (found.k[:, 1] != found.k[:, 4]).any()


# Bad input.


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"estimator": "exact"}, "estimator"),
        ({"num_samples": 3}, "num_samples"),
        ({"num_samples": 0}, "num_samples"),
        ({"seed": 2**63}, "seed"),
        ({"eps": 0.1}, "eps"),
        ({"estimator": "continuous", "eps": 0.0}, "eps"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(UnmaskError, match=f"^{name} "):
        likelihood(tiny_model(), {"input_ids": random_ids(1, 4)}, **settings)


@pytest.mark.parametrize(
    ("batch", "name"),
    [
        ({"labels": 1}, "input_ids"),
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, "input_ids"),
        ({"input_ids": random_ids(2, 3), "src_mask": torch.zeros(2, 4)}, "src_mask"),
        ({"input_ids": random_ids(1, 3), "segment_ids": torch.zeros(1, 3)}, "segment_ids"),
    ],
)
def test_batches_that_cannot_be(batch: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        likelihood(tiny_model(), batch)

"""The bound against enumeration: toy conditionals in float64, every order and every set in plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import permutations, product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import assert_rate, assert_uniform, chi_square_p, random_ids, tiny_model, tiny_stock_model
from torch import Tensor
from training_step import noise_of

from unmask.diffusion.corrupt import example_seeds
from unmask.diffusion.likelihood import (
    ESTIMATORS,
    Likelihood,
    Plan,
    Score,
    exact_masks,
    exactly_k,
    likelihood,
    plan_passes,
    sampled_chains,
    sampled_sets,
)
from unmask.errors import UnmaskError
from unmask.model.denoiser import MaskedDiffusionMixin

V = 3


class Toy(torch.nn.Module):
    """Arbitrary conditionals of a text of V words: -log p(x_i | everything else), from a random table."""

    prepare, device = MaskedDiffusionMixin.prepare, torch.device("cpu")

    def __init__(self, length: int, seed: int = 0, block_length: int | None = None, words: int = V):
        super().__init__()
        self.length, self.words = length, words
        self.blocks = [i // (block_length or length) for i in range(length)]
        attention = "block_causal" if block_length else "bidirectional"
        self.config = SimpleNamespace(vocab_size=9, mask_token_id=8, noise_eps=0.05, is_causal=False)
        vars(self.config).update(attention=attention, block_length=block_length, block_anchor="response")
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn((words + 1) ** length, length, words, generator=generator, dtype=torch.float64)
        self.table = -(2 * logits).log_softmax(dim=-1)
        self.power = (words + 1) ** torch.arange(length - 1, -1, -1)
        self.calls: list[tuple[int, ...]] = []

    def nll(self, ids: Sequence[int], masked: Sequence[bool], i: int) -> float:
        """Of token i: it sees what is not masked of its own block, and all of earlier blocks."""
        x, m = torch.tensor([ids]), torch.tensor([masked])
        return self.masked_nll(x, m, torch.ones_like(m), torch.zeros_like(m))[sum(masked[:i])].item()

    def masked_nll(self, ids: Tensor, is_masked: Tensor, is_token: Tensor, source: Tensor) -> Tensor:
        self.calls.append(tuple(ids.shape))
        assert not (is_masked & (source | ~is_token)).any()
        short = self.length - ids.shape[1]  # a shorter text is followed by zeros
        x = torch.nn.functional.pad(ids.masked_fill(~is_token, 0), (0, short))
        m = torch.nn.functional.pad(is_masked, (0, short))
        block = torch.tensor(self.blocks)
        hidden = (block > block[:, None]) | ((block == block[:, None]) & m[:, None])  # (rows, i, others)
        code = (torch.where(hidden, self.words, x[:, None]) * self.power).sum(dim=2)
        return self.table[code, torch.arange(self.length), x][m]

    def chains(self, ids: Sequence[int], where: Sequence[int] | None = None) -> np.ndarray:
        """-log p of each token under every order, block after block, the rest being known: (orders, length)."""
        where = range(self.length) if where is None else where
        groups = [[i for i in where if self.blocks[i] == b] for b in sorted({self.blocks[i] for i in where})]
        found = []
        for orders in product(*[list(permutations(group)) for group in groups]):
            nll = [0.0] * self.length
            for order in orders:
                for step, i in enumerate(order):
                    nll[i] = self.nll(ids, [j in order[step:] for j in range(self.length)], i)
            found.append(nll)
        return np.array(found)


def score(toy: Toy, ids: Any, source: Tensor | None = None, **settings: Any) -> Likelihood:
    """`likelihood` on rows that have no padding unless `is_token` says so."""
    masks = {"src_mask": source, "attention_mask": settings.pop("is_token", None)}
    return likelihood(toy, {"input_ids": torch.as_tensor(ids), **masks}, **settings)


def values_of(plan: Plan, toy: Toy, ids: list[int]) -> Tensor:
    """Go through a plan's passes and add its weighted nlls up: (draws, N)."""
    values = torch.zeros(plan.num_draws, len(ids), dtype=torch.float64)
    for draw, (mask, weight) in zip(plan.draw.tolist(), plan.passes, strict=True):
        for i in mask.nonzero()[:, 0].tolist():
            values[draw, i] += weight[i] * toy.nll(ids, mask.tolist(), i)
    return values


IDS = [2, 0, 1, 1]
ORDERS = torch.tensor(list(permutations(range(4))))


# Each estimator, its randomness enumerated, against the mean over all orders.


@pytest.mark.parametrize("estimator", ["exact_k", "chain"])
@pytest.mark.parametrize(("block_length", "forwards"), [(None, 31), (1, 1), (3, 7), (2, 3), (5, 31)])
def test_all_sets_give_the_mean_over_all_orders_and_the_exact_likelihood(
    block_length: int | None, forwards: int, estimator: str
) -> None:
    toy, ids = Toy(5, block_length=block_length), [1, 2, 0, 0, 2]
    chains = toy.chains(ids)
    found = score(toy, [ids], estimator=estimator)
    np.testing.assert_allclose(found.token_nll[0], chains.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.nll, chains.sum(axis=1).mean(), rtol=1e-12)
    assert (found.stderr.tolist(), found.num_forwards) == ([0.0], forwards)
    if estimator == "chain":
        exact = -math.log(np.exp(-chains.sum(axis=1)).mean())
        assert found.mixture_nll is not None
        np.testing.assert_allclose(found.mixture_nll, exact, rtol=1e-12)
        # A bound, and with these conditionals no equality, unless there is one order alone.
        assert len(chains) == 1 if forwards == 1 else exact < found.nll.item() - 0.01


def test_sampled_sets_and_chains_over_all_sizes_and_orders() -> None:
    toy = Toy(4)
    chains = toy.chains(IDS)
    k = torch.arange(1, 5).repeat_interleave(24)[:, None].expand(-1, 4)
    plan = sampled_sets(ORDERS.repeat(4, 1) < k, 4 / k.double())
    np.testing.assert_allclose(plan.finish(values_of(plan, toy, IDS))[0], chains.mean(axis=0), rtol=1e-12)

    plan, sums = sampled_chains(torch.zeros(4, dtype=torch.long), ORDERS), chains.sum(axis=1)
    assert len(plan.draw) == 24 * 4
    values = values_of(plan, toy, IDS)
    np.testing.assert_allclose(sorted(values.sum(dim=1)), sorted(sums), rtol=1e-12)
    per_token, stderr, mixture = plan.finish(values)
    np.testing.assert_allclose(per_token, chains.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(stderr, sums.std(ddof=1) / math.sqrt(24))
    np.testing.assert_allclose(mixture, -math.log(np.exp(-sums).mean()))


def continuous_mean(toy: Toy, ids: list[int], eps: float) -> float:
    """The expectation of the continuous estimator: all sets at the nodes of a quadrature that is exact
    for the polynomial in t that it is."""
    n = len(ids)
    sets = torch.tensor(list(product([False, True], repeat=n)))
    plan = sampled_sets(sets, torch.ones(sets.shape, dtype=torch.float64))
    assert len(plan.draw) == 2**n - 1  # the empty set needs no forward pass
    sums, k = values_of(plan, toy, ids).sum(dim=1).numpy(), sets.sum(dim=1).numpy()
    total = 0.0
    for node, weight in zip(*np.polynomial.legendre.leggauss(n), strict=True):
        t = eps + (1 - eps) * (node + 1) / 2
        total += weight / 2 * float((t**k * (1 - t) ** (n - k) * sums / t).sum())
    return total


def test_continuous_goes_to_the_bound_as_eps_goes_to_0() -> None:
    toy = Toy(4)
    bound = toy.chains(IDS).sum(axis=1).mean()
    gaps = [abs(continuous_mean(toy, IDS, eps) - bound) for eps in (1e-1, 1e-2, 1e-3, 1e-9)]
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3]
    np.testing.assert_allclose([gaps[1] / gaps[2], gaps[3] + 1], [10, 1], rtol=0.05)  # O(eps)


@pytest.mark.parametrize("length", [2, 3, 4])
def test_never_below_the_exact_likelihood_which_sums_to_one(length: int) -> None:
    ids = list(product(range(V), repeat=length))
    for seed in range(2):
        toy = Toy(length, seed)
        found = score(toy, ids, estimator="chain")
        assert found.mixture_nll is not None
        assert (found.nll >= found.mixture_nll).all()
        np.testing.assert_allclose((-found.mixture_nll).exp().sum(), 1, rtol=1e-12)
        assert (-found.nll).exp().sum() < 0.99
    # Independent tokens: every order gives the same product.
    toy.table[:] = toy.table[:1]
    found = score(toy, ids, estimator="chain")
    assert found.mixture_nll is not None
    np.testing.assert_allclose(found.nll, found.mixture_nll, rtol=1e-12)


# The draws.


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 33, 1000])
@pytest.mark.parametrize("strata", [1, 2, 5, 32])
def test_every_k_is_equally_likely(size: int, strata: int) -> None:
    # k rises with u, so its first u tells the number of u it has; here u is an integer below strata * 2^40.
    scale, group = 2**40, torch.zeros(size, dtype=torch.long)

    def k_of(u: int) -> int:
        stratum, bits = divmod(u, scale)
        masks = exactly_k(torch.arange(size), group, torch.full_like(group, bits), stratum, strata)
        assert masks.is_masked.sum() == masks.k[0]
        return int(masks.k[0])

    first = [math.ceil(Fraction(k * strata * scale, size)) for k in range(size + 1)]
    for k in range(1, size + 1) if size < 100 else (1, 2, 499, 500, 501, 999, 1000):
        assert k_of(first[k - 1]) == k == k_of(first[k] - 1)
        assert abs(Fraction(first[k] - first[k - 1], strata * scale) - Fraction(1, size)) < Fraction(1, 2**39)


def draws_of_blocks(
    count: int, size: int, estimator: str, num_samples: int, eps: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """(is_masked, weight), (draws, blocks, tokens), of a record of many blocks, drawn independently."""
    block = torch.arange(count).repeat_interleave(size)
    plan = plan_passes(7, torch.arange(len(block)), block, estimator, num_samples, eps)
    is_masked, weight = (torch.stack(one) for one in zip(*plan.passes, strict=True))
    return is_masked.view(num_samples, count, size), weight.view(num_samples, count, size)


@pytest.mark.parametrize("size", [5, 6])
def test_draws_have_the_right_sizes_and_sets(size: int) -> None:
    is_masked, _ = draws_of_blocks(2000, size, "exact_k", 4)
    k = is_masked.sum(dim=2)
    assert_uniform(k - 1, size)
    assert (k[:2] <= (size + 1) // 2).all() and (k[2:] > size // 2).all()  # two strata
    assert (k[0] != k[1]).any()
    for count in range(1, size):
        assert_rate(is_masked[k == count], count / size)  # each token as often


def test_continuous_masks_each_token_at_its_rate() -> None:
    is_masked, weight = draws_of_blocks(6000, 3, "continuous", 2, 0.2)
    t = 1 / weight
    assert (t == t[..., :1]).all() and (t[:, 1:] != t[:, :-1]).all()  # one t a block
    assert_uniform(((t[..., 0] - 0.2) / 0.8 * 10).long(), 10)
    for low in (0.2, 0.5, 0.8):
        near = (t >= low) & (t < low + 0.1)
        assert_rate(is_masked[near], low + 0.05)


# Sampling.


@pytest.mark.parametrize(
    ("estimator", "num_samples", "block_length", "tolerance"),
    [
        # The relative standard error of a variance from `count` = 400 or 300 draws is sqrt(2 / count) for a
        # normal estimate: five of them; heavier tails of few samples and of 1/t: some more.
        *((name, samples, None, 0.36) for name, samples in (("exact_k", 128), ("chain", 16), ("continuous", 128))),
        *((name, samples, 3, 0.5) for name, samples in (("exact_k", 4), ("chain", 2), ("continuous", 8))),
    ],
)  # fmt: skip
def test_estimates_are_unbiased_with_the_standard_error_they_state(
    estimator: str, num_samples: int, block_length: int | None, tolerance: float
) -> None:
    if block_length is None:
        toy, ids, count, eps = Toy(8, 1, words=2), [0, 1, 1, 0, 1, 0, 0, 1], 400, 0.05
    else:
        toy, ids, count, eps = Toy(5, block_length=block_length), [1, 2, 0, 0, 2], 300, 1e-6
    expected = score(toy, [ids], estimator="chain", num_samples=64).nll.item()  # enumerated, see above
    settings: dict[str, Any] = {"estimator": estimator, "num_samples": num_samples, "batch_size": 128}
    if estimator == "continuous":
        settings["eps"] = eps
        expected = continuous_mean(toy, ids, eps) if block_length is None else expected
    found = [score(toy, [ids], seed=seed, **settings) for seed in range(count)]
    nll, stderr = torch.cat([one.nll for one in found]), torch.cat([one.stderr for one in found])
    # Five standard errors of the mean: a false alarm in 1.7 million.
    assert (nll.mean() - expected).abs() < 5 * nll.std() / math.sqrt(count)
    # The mean of the squared error stated is the variance seen.
    assert abs((stderr.square().mean() / nll.var()).item() - 1) < tolerance
    if block_length is None:
        # Each is in its own units: z-scores have variance 1, or n / (n - 2) with n degrees of freedom. The
        # error rests on the draws that mask few tokens, of which there are some 16. 0.5 is about 5 standard
        # errors.
        assert abs(((nll - expected) / stderr).var().item() - 1.1) < 0.5


# Nothing depends on what else is in the batch.


BLOCKS: dict[str, Any] = {"attention": "block_causal", "block_length": 2}
SCORED: dict[str, Callable[[], Any]] = {
    "toy": lambda: Toy(5),
    "model": lambda: tiny_model(logit_shift=True),
    "blocks": lambda: tiny_model(logit_shift=True, **BLOCKS),
}


@pytest.mark.parametrize("kind", SCORED)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_batch_size_padding_and_mates_change_nothing(estimator: str, kind: str) -> None:
    model = SCORED[kind]()
    rows = [[0, 1, 2, 2, 1], [1, 1, 0], [2], [0, 2, 1, 0, 1]]
    sources = [[1, 0, 0, 0, 0], [0, 0, 0], [0], [1, 1, 0, 0, 0]]
    settings: dict[str, Any] = {"estimator": estimator, "num_samples": 4}
    alone = [
        score(model, [ids], torch.tensor([source]), **settings)
        for ids, source in zip(rows, sources, strict=True)
    ]
    assert alone[0].num_tokens.tolist() == [4] and alone[0].token_nll[0, 0] == 0
    exact: dict[str, Any] = {"rtol": 0, "atol": 0} if kind == "toy" else {}
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
        found = score(model, ids, source, is_token=is_token, batch_size=batch_size, **settings)
        for row, index in enumerate(order):
            one = alone[index]
            torch.testing.assert_close(found.token_nll[row][is_token[row]], one.token_nll[0], **exact)
            torch.testing.assert_close(found.nll[row], one.nll[0], **exact)
            torch.testing.assert_close(found.stderr[row], one.stderr[0], **exact)
            assert not found.token_nll[row][~is_token[row]].any()
            assert (found.record_key[row], found.num_tokens[row]) == (one.record_key[0], one.num_tokens[0])
        assert found.num_forwards == sum(one.num_forwards for one in alone)


def test_batches_are_full_and_have_several_records() -> None:
    toy = Toy(3)
    told: list[float] = []
    found = score(toy, random_ids(7, 3, vocab=V), batch_size=10, advance=told.append)
    assert [rows for rows, _ in toy.calls] == [10, 10, 10, 10, 9]
    assert found.num_forwards == 49 and sum(told) == pytest.approx(7)


def test_a_prompt_is_given() -> None:
    toy = Toy(4)
    for ids in ([2, 0, 1, 1], [2, 1, 1, 1]):
        found = score(toy, [ids], torch.tensor([[False, True, False, True]]))
        expected = toy.chains(ids, [0, 2]).mean(axis=0)
        np.testing.assert_allclose(found.token_nll[0], expected, rtol=1e-12)
        assert (found.num_forwards, found.num_tokens.item()) == (3, 2)


# The result.


def test_nothing_to_score_is_zero_and_no_nan() -> None:
    told: list[float] = []
    is_token = torch.tensor([[True] * 3, [False] * 3])
    found = score(Toy(3), [[1, 2, 0], [0, 0, 0]], is_token, is_token=is_token, advance=told.append)
    assert found.nll.tolist() == found.stderr.tolist() == found.num_tokens.tolist() == [0, 0]
    assert found.perplexity().value.tolist() == [1, 1] and found.num_forwards == 0 and sum(told) == 2
    assert found.bits_per_byte(torch.tensor([0, 3])).value.tolist() == [0, 0]


def test_units() -> None:
    one = Score(torch.tensor(6.0), torch.tensor(0.6), torch.tensor(3))
    assert one.nats_per_token() == (2.0, pytest.approx(0.2))
    assert one.perplexity() == (pytest.approx(math.exp(2)), pytest.approx(0.2 * math.exp(2)))
    bits = (pytest.approx(1.5 / math.log(2)), pytest.approx(0.15 / math.log(2)))
    assert one.bits_per_byte(torch.tensor(4)) == bits
    assert one.bits_per_byte(torch.tensor(0)).value == math.inf
    # Pairs (1, 3) and (10, 10): variances of the pair means 1 and 0, mean of two.
    values = torch.tensor([[1.0], [3.0], [10.0], [10.0]])
    assert sampled_sets(values > 0, values).finish(values)[1] == pytest.approx(0.5)


def test_total_adds_errors_of_equal_records_and_squares_of_others() -> None:
    ids = [[0, 1, 1, 0, 1, 0, 0], [1] * 7, [0, 1, 1, 0, 1, 0, 0]]
    found = score(Toy(7, 1, words=2), ids, num_samples=8)
    a, b, c = found.stderr.tolist()
    assert a == c
    total = found.total()
    assert total.stderr.item() == pytest.approx(math.hypot(2 * a, b))
    assert total.nll == found.nll.sum() and total.num_tokens == 21


# Real models.


@torch.no_grad()
def enumerated(model: Any, ids: list[int], where: list[int]) -> float:
    """The bound by all orders, from the logits of `forward`."""
    orders = list(permutations(where))
    steps = [(tuple(sorted(order[n:])), i) for order in orders for n, i in enumerate(order)]
    log_p: dict[tuple[int, ...], Tensor] = {}
    for masked, _ in steps:
        if masked not in log_p:
            x_t = torch.tensor([ids])
            x_t[0, list(masked)] = model.config.mask_token_id
            log_p[masked] = model.eval()(x_t).logits[0].log_softmax(dim=-1)
    return -sum(log_p[masked][i, ids[i]].item() for masked, i in steps) / len(orders)


@pytest.mark.parametrize("logit_shift", [False, True])
def test_model_is_scored_and_left_as_it_was(logit_shift: bool) -> None:
    model = tiny_model(logit_shift=logit_shift).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    ids = random_ids(1, 8)
    source = torch.tensor([[True, True, True, False, False, False, False, False]])
    batch = {"input_ids": ids, "src_mask": source, "instruction_lengths": torch.tensor([3])}
    exact = likelihood(model, batch, estimator="chain")
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    expected = enumerated(model, ids[0].tolist(), [3, 4, 5, 6, 7])
    assert exact.nll.item() == pytest.approx(expected, rel=1e-9) and exact.stderr == 0
    assert exact.mixture_nll is not None and exact.mixture_nll.item() < expected


def test_blocks_of_one_token_give_the_autoregressive_likelihood() -> None:
    model = tiny_model(attention="block_causal", block_length=1, logit_shift=True)
    ids = random_ids(2, 7)
    source = torch.tensor([[True] * 3 + [False] * 4, [True] + [False] * 6])
    found = likelihood(model, {"input_ids": ids, "src_mask": source})
    stock = tiny_stock_model()
    stock.load_state_dict(model.state_dict())
    nll = -stock(ids).logits[:, :-1].log_softmax(dim=-1).gather(2, ids[:, 1:, None])[..., 0].detach()
    torch.testing.assert_close(found.token_nll[:, 1:], torch.where(source[:, 1:], 0, nll))
    assert found.num_forwards == 2 and not found.stderr.any()


def test_one_block_of_the_whole_text_gives_the_plain_bound() -> None:
    plain = tiny_model(logit_shift=False)
    blocks = tiny_model(logit_shift=False, attention="block_causal", block_length=6)
    a, b = (likelihood(model, {"input_ids": random_ids(1, 6)}) for model in (plain, blocks))
    torch.testing.assert_close(a.token_nll, b.token_nll)
    assert a.num_forwards == b.num_forwards == 63


# The masks of the held-out loss.


def masks(count: int, seed: int, size: int = 6, ids: Tensor | None = None, **fields: Any) -> tuple[Any, Any]:
    """The masks of `count` samples, one token of source and `size` others each."""
    sample_ids = torch.arange(count) if ids is None else ids
    batch: dict[str, Any] = {
        "src_mask": (torch.arange(size + 1) < 1).expand(count, -1),
        "training_mode": "sft",
    }
    batch |= {"noise_seed": example_seeds(seed, sample_ids, -1)}
    noised = noise_of(tiny_model(**fields), random_ids(count, size + 1), **batch)
    return exact_masks(noised, sample_ids, seed), noised


@pytest.mark.parametrize("fields", [{}, BLOCKS], ids=["whole", "blocks"])
def test_shares_are_spread_evenly_over_the_samples(fields: dict[str, Any]) -> None:
    found, noised = masks(60, seed=3, **fields)
    blocks = torch.zeros(7) if noised.block is None else noised.block[0]
    assert not found.is_masked[:, 0].any()
    for block in blocks[1:].unique():  # each has its own shares
        inside = (blocks == block) & (torch.arange(7) > 0)
        size, k = int(inside.sum()), found.k[:, inside]
        assert (found.size[:, inside] == size).all() and found.is_masked[:, inside].sum(dim=1).equal(k[:, 0])
        assert (k[:, 0].bincount()[1:] - 60 / size).abs().max() <= 3  # each k as often, but for the ends
    assert (found.k[:, 1] != found.k[:, 4]).any() == (noised.block is not None)


def test_over_sample_ids_each_number_and_each_set_is_equally_likely() -> None:
    ids = torch.randint(0, 2**39, (900,), generator=torch.Generator().manual_seed(0))
    found, _ = masks(900, seed=0, size=3, ids=ids)
    sets = found.is_masked[:, 1:].long() @ torch.tensor([1, 2, 4])
    # k = 1, 2, 3 with a third each; the sets of one or two tokens with a ninth each.
    assert chi_square_p(sets.bincount(minlength=8), torch.tensor([0, 1, 1, 1, 1, 1, 1, 3]) / 9) > 1e-6


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
        ({"batch": {"input_ids": torch.zeros(3, dtype=torch.long)}}, "input_ids"),
        ({"batch": {"input_ids": random_ids(2, 3), "src_mask": torch.zeros(2, 4)}}, "src_mask"),
        ({"batch": {"input_ids": random_ids(1, 3), "segment_ids": torch.zeros(1, 3)}}, "segment_ids"),
    ],
)
def test_refused(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError if "batch" in settings else UnmaskError, match=name):
        likelihood(tiny_model(), **{"batch": {"input_ids": random_ids(1, 4)}, **settings})

"""The loss against enumeration: every mask of a short text, in float64, with no sampling in between.

Symbols: S a set of masked positions of the L supervised ones, nll[S][i] = -log p(x[i] | x with S masked).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain, combinations, permutations
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_model
from torch import Tensor

from unmask.diffusion.attention import Layout
from unmask.diffusion.loss import token_nll
from unmask.diffusion.noise import Drawn, Noised
from unmask.model import denoiser

VOCAB, MASK = 5, 4  # four tokens and the mask
TEXT = torch.tensor([[2, 0, 3, 1]])
CASES = {  # name: (source positions, logit_shift)
    "no source": ((), False),
    "prompt": ((0,), False),
    "source in the middle": ((1,), False),
    "shifted": ((0,), True),
}
every_case = pytest.mark.parametrize(("source", "shift"), CASES.values(), ids=CASES)


class Oracle:
    """All conditionals of a model on one text, found by denoising the text under each mask."""

    def __init__(self, source: tuple[int, ...], shift: bool, seed: int = 0):
        self.model = tiny_model(
            vocab_size=VOCAB, mask_token_id=MASK, logit_shift=shift, seed=seed, eos_token_id=None
        ).eval()
        self.where = [i for i in range(TEXT.shape[1]) if i not in source]
        self.src_mask = torch.tensor([[i in source for i in range(TEXT.shape[1])]])
        self.nll = {masked: self.conditionals(masked) for masked in subsets(self.where)}

    def conditionals(self, masked: tuple[int, ...]) -> dict[int, Tensor]:
        x_t = TEXT.clone()
        x_t[0, list(masked)] = MASK
        log_p = self.model(x_t).logits[0].log_softmax(dim=-1)
        return {i: -log_p[i, TEXT[0, i]] for i in masked}

    def bound_at(self, t: float) -> Tensor:
        """The bound's integrand: E over masks of 1/t * sum of nll, in nats per supervised token."""
        length = len(self.where)
        terms = [
            t ** len(masked) * (1 - t) ** (length - len(masked)) / t * total(nll.values())
            for masked, nll in self.nll.items()
            if masked
        ]
        return total(terms) / length

    def forward_at(self, t: float, masked: tuple[int, ...]) -> Tensor:
        """The loss that `forward` computes when the draw gives this time and this mask."""

        def drawn(
            x_0: Tensor, layout: Layout, maskable: Tensor, mask_token_id: int, *_: Any, **__: Any
        ) -> Drawn:
            is_masked = torch.zeros_like(maskable)
            is_masked[0, list(masked)] = True
            assert not (is_masked & ~maskable).any()
            rate = torch.full(x_0.shape, t, dtype=torch.float64)
            noised = Noised(torch.where(is_masked, mask_token_id, x_0), is_masked, rate)
            return Drawn(noised, maskable, layout, torch.zeros_like(x_0), None)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(denoiser, "draw", drawn)
            return self.model(TEXT, labels=TEXT, src_mask=self.src_mask, training_mode="sft").loss

    def expected_forward(self, t: float) -> Tensor:
        length = len(self.where)
        return total(
            t ** len(masked) * (1 - t) ** (length - len(masked)) * self.forward_at(t, masked)
            for masked in self.nll
        )


def total(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()


def subsets(items: list[int]) -> list[tuple[int, ...]]:
    return list(chain.from_iterable(combinations(items, size) for size in range(len(items) + 1)))


def gauss(low: float, high: float, nodes: int) -> list[tuple[float, float]]:
    """Nodes and weights of an integral from low to high; exact for polynomials below degree 2 * nodes."""
    x, weight = np.polynomial.legendre.leggauss(nodes)
    return [(low + (high - low) * (a + 1) / 2, w * (high - low) / 2) for a, w in zip(x, weight, strict=True)]


# Parts


@pytest.mark.parametrize("shape", [(0,), (4,), (2, 3)])
def test_token_nll_is_minus_log_softmax_at_the_target(shape: tuple[int, ...]) -> None:
    logits = 5 * torch.randn(*shape, 7, dtype=torch.float64)
    targets = torch.randint(7, shape)
    expected = -logits.log_softmax(dim=-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(token_nll(logits, targets), expected, rtol=0, atol=1e-12)


def test_token_nll_of_half_precision_is_computed_in_float32() -> None:
    logits = (20 * torch.randn(50, 300)).to(torch.bfloat16)
    targets = torch.randint(300, (50,))
    nll = token_nll(logits, targets)
    assert nll.dtype == torch.float32
    exact = token_nll(logits.double(), targets)
    torch.testing.assert_close(nll.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("divisor", [None, 0, 5])
def test_nothing_masked_is_zero_with_a_zero_gradient(divisor: int | None) -> None:
    model = tiny_model()
    ids = torch.tensor([[3, 4, 5]])
    source = torch.ones_like(ids, dtype=torch.bool)
    loss = model(ids, src_mask=source, training_mode="sft", divisor=divisor, return_logits=False).loss
    loss.backward()
    assert loss.item() == 0
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


# The whole, enumerated


@every_case
def test_expected_loss_of_forward_is_the_enumerated_bound(source: tuple[int, ...], shift: bool) -> None:
    oracle = Oracle(source, shift)
    for t in (0.001, 0.3, 0.8, 1.0):
        expected = oracle.bound_at(t)
        assert 0.5 < expected < 50
        torch.testing.assert_close(oracle.expected_forward(t), expected, rtol=1e-12, atol=0)


def test_expected_gradient_of_forward_is_that_of_the_enumerated_bound() -> None:
    oracle = Oracle((1,), True)
    parameters = list(oracle.model.parameters())
    expected = torch.autograd.grad(oracle.bound_at(0.4), parameters)
    found = torch.autograd.grad(oracle.expected_forward(0.4), parameters)
    assert sum(g.abs().sum() for g in expected) > 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@every_case
@torch.no_grad()
def test_three_forms_of_the_bound_agree_and_lie_above_the_likelihood(
    source: tuple[int, ...], shift: bool
) -> None:
    oracle = Oracle(source, shift)
    where, length = oracle.where, len(oracle.where)
    # 1. Continuous time: the integrand is a polynomial of degree length - 1 in t, so this is exact.
    continuous = torch.stack([w * oracle.expected_forward(t) for t, w in gauss(0, 1, length)]).sum()
    # 2. Exactly k masks, k uniform: (length / k) * sum of nll, averaged over the sets of that size.
    sizes = [
        torch.stack([total(oracle.nll[s].values()) * length / k for s in combinations(where, k)]).mean()
        for k in range(1, length + 1)
    ]
    exactly_k = torch.stack(sizes).mean() / length
    # 3. The any-order chain: reveal one token after the other, averaged over all orders.
    chains = []
    for order in permutations(where):
        masked = [tuple(sorted(order[i:])) for i in range(length)]
        chains.append(total(oracle.nll[s][i] for s, i in zip(masked, order, strict=True)))
    any_order = torch.stack(chains).mean() / length
    torch.testing.assert_close(continuous, exactly_k, rtol=1e-12, atol=0)
    torch.testing.assert_close(exactly_k, any_order, rtol=1e-12, atol=0)
    # The model's own likelihood: the mean over orders of the chain's probability (Jensen's inequality).
    exact = -(torch.stack(chains).neg().logsumexp(0) - math.log(math.factorial(length))) / length
    assert continuous > exact + 1e-3


@every_case
@torch.no_grad()
def test_the_mean_over_draws_is_the_bound(source: tuple[int, ...], shift: bool) -> None:
    # Nothing replaced here: forward draws its own noise, and the mean must be the integral over
    # [eps, 1]. Within five standard errors, which are enumerated too: a false alarm in 1.7 million.
    oracle, eps, rows = Oracle(source, shift), 0.05, 20_000
    oracle.model.config.noise_eps = eps
    text, src_mask = TEXT.expand(rows, -1), oracle.src_mask.expand(rows, -1)
    loss = oracle.model(
        text,
        labels=text,
        src_mask=src_mask,
        training_mode="sft",
        noise_seed=torch.arange(rows),
        return_logits=False,
    ).loss
    length = len(oracle.where)
    first = second = 0.0
    for t, w in gauss(eps, 1, 40):
        for masked, nll in oracle.nll.items():
            weight = w / (1 - eps) * t ** len(masked) * (1 - t) ** (length - len(masked))
            value = sum(v.item() for v in nll.values()) / t / length
            first, second = first + weight * value, second + weight * value**2
    error = math.sqrt((second - first**2) / rows)
    assert error < 0.03 * first
    assert abs(loss.item() - first) < 5 * error


# One normaliser


def test_micro_batches_add_up_to_the_large_batch() -> None:
    model = tiny_model()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(31, (6, 9), generator=generator)
    src_mask = torch.rand(6, 9, generator=generator) < 0.6  # rows differ in how much they supervise
    seeds = torch.arange(6)

    def step(rows: slice, count: Tensor | None) -> Tensor:
        return model(
            ids[rows],
            src_mask=src_mask[rows],
            training_mode="sft",
            noise_seed=seeds[rows],
            divisor=count,
        ).loss

    whole = step(slice(0, 6), None)
    gradients = torch.autograd.grad(whole, list(model.parameters()))
    count = (~src_mask).sum()
    cuts = (slice(0, 1), slice(1, 3), slice(3, 6))
    parts = torch.stack([step(rows, count) for rows in cuts])
    torch.testing.assert_close(parts.sum(), whole, rtol=1e-12, atol=0)
    for one, other in zip(torch.autograd.grad(parts.sum(), list(model.parameters())), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    # The mean of separately normalised micro-batches is another number: that was the mistake.
    assert abs(torch.stack([step(rows, None) for rows in cuts]).mean() - whole) > 1e-3

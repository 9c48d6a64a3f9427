"""The loss against enumeration: every mask of a short text, in float64, with no sampling in between.

Symbols: S a set of masked positions of the L supervised ones, nll[S][i] = -log p(x[i] | x with S masked).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import chain, combinations, groupby, permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import random_ids, tiny_model
from torch import Tensor
from training_step import loss_of, noise_of, prepared

from unmask.diffusion.attention import row_layout
from unmask.diffusion.corrupt import ForwardInputs, corrupt, low_discrepancy, masking_rate
from unmask.diffusion.loss import PRESETS, context_weight, loss_divisor, token_nll
from unmask.diffusion.objective import Objective

MATH_PAGE = (Path(__file__).parents[1] / "docs" / "math.md").read_text(encoding="utf-8")
VOCAB, MASK = 5, 4  # four tokens and the mask
TEXT = torch.tensor([[2, 0, 3, 1]])
CASES = {  # name: (source positions, logit_shift)
    "no source": ((), False),
    "prompt": ((0,), False),
    "source in the middle": ((1,), False),
    "shifted": ((0,), True),
}
ELBO = Objective()
every_case = pytest.mark.parametrize(("source", "shift"), CASES.values(), ids=CASES)


class Oracle:
    """All conditionals of a model on one text, found by denoising the text under each mask."""

    def __init__(self, source: tuple[int, ...], shift: bool = False, text: Tensor = TEXT, model: Any = None):
        self.text = text
        self.model = model or tiny_model(
            vocab_size=VOCAB, mask_token_id=MASK, logit_shift=shift, eos_token_id=None
        )
        self.model.eval()
        self.where = [i for i in range(text.shape[1]) if i not in source]
        self.src_mask = torch.tensor([[i in source for i in range(text.shape[1])]])
        self.nll = {masked: self.conditionals(masked) for masked in subsets(self.where)}

    def conditionals(self, masked: tuple[int, ...]) -> dict[int, Tensor]:
        x_t = self.text.clone()
        x_t[0, list(masked)] = MASK
        log_p = self.model(x_t).logits[0].log_softmax(dim=-1)
        return {i: -log_p[i, self.text[0, i]] for i in masked}

    def bound_at(self, t: float) -> Tensor:
        """The bound's integrand: E over masks of 1/t * sum of nll, in nats per supervised token."""
        length = len(self.where)
        terms = [
            t ** len(masked) * (1 - t) ** (length - len(masked)) / t * total(nll.values())
            for masked, nll in self.nll.items()
            if masked
        ]
        return total(terms) / length

    def bound(self, low: float = 0, high: float = 1) -> Tensor:
        """The mean of the integrand, a polynomial of degree len(where) - 1, over times from low to high."""
        nodes = gauss(low, high, len(self.where))
        return total(w * self.bound_at(t) for t, w in nodes) / (high - low)

    def exact(self, cells: list[tuple[int, ...]] | None = None) -> tuple[Tensor, Tensor]:
        """Any-order chains that reveal one cell (one token) after the other, per supervised token.

        Returns -log of their mean probability, which is the model's likelihood, and their mean nll.
        """
        cells = [(i,) for i in self.where] if cells is None else cells
        chains = []
        for order in permutations(cells):
            hidden = [tuple(sorted(chain.from_iterable(order[n:]))) for n in range(len(order))]
            chains.append(total(self.nll[s][i] for s, cell in zip(hidden, order, strict=True) for i in cell))
        nll = torch.stack(chains)
        likelihood = -(nll.neg().logsumexp(0) - math.log(len(nll)))
        return likelihood / len(self.where), nll.mean() / len(self.where)

    def expected_loss(
        self, t: float, objective: Objective = ELBO, cells: Sequence[tuple[int, ...]] | None = None
    ) -> Tensor:
        """The model's loss at a rate, over all masks of its cells (its tokens)."""
        cells, terms = [(i,) for i in self.where] if cells is None else cells, []
        for on in product([False, True], repeat=len(cells)):
            masked = tuple(i for cell, yes in zip(cells, on, strict=True) if yes for i in cell)
            loss = loss_under(self.model, self.text, self.src_mask, [masked], [t], objective)
            terms.append(t ** sum(on) * (1 - t) ** (len(on) - sum(on)) * loss)
        return total(terms)

    def mean_loss(
        self, objective: Objective, nodes: int, cells: Sequence[tuple[int, ...]] | None = None
    ) -> Tensor:
        """The model's loss over all masks and rates."""
        s, weight = zip(*gauss(0, 1, nodes), strict=True)
        rates = masking_rate(torch.tensor(s, dtype=torch.float64), objective).tolist()
        losses = [self.expected_loss(t, objective, cells) for t in rates]
        return total(w * loss for w, loss in zip(weight, losses, strict=True))


def loss_under(
    model: Any,
    text: Tensor,
    src_mask: Tensor,
    masks: Sequence[tuple[int, ...]],
    times: Sequence[float],
    objective: Objective,
    mask: int = MASK,
) -> Tensor:
    """The loss under one mask and one rate a row: noise is data."""
    inputs, noised, _ = prepared(model, text, src_mask=src_mask, training_mode="sft", objective=objective)
    is_masked = torch.zeros_like(noised.is_masked)
    for row, columns in enumerate(masks):
        is_masked[row, list(columns)] = True
    assert not (is_masked & ~noised.maskable).any()
    t = torch.tensor(times, dtype=torch.float64)[:, None].expand(text.shape)
    noised = noised._replace(x_t=torch.where(is_masked, mask, text), is_masked=is_masked, t=t)
    return model.diffusion_loss(inputs, noised, objective)


def total(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()


def subsets(items: list[int]) -> list[tuple[int, ...]]:
    return list(chain.from_iterable(combinations(items, size) for size in range(len(items) + 1)))


def gauss(low: float, high: float, nodes: int) -> list[tuple[float, float]]:
    """Nodes and weights of an integral from low to high; exact for polynomials below degree 2 * nodes."""
    x, weight = np.polynomial.legendre.leggauss(nodes)
    return [(low + (high - low) * (a + 1) / 2, w * (high - low) / 2) for a, w in zip(x, weight, strict=True)]


@pytest.mark.parametrize("shape", [(0,), (4,), (2, 3)])
def test_token_nll_is_minus_log_softmax_at_the_target_in_float32_or_wider(shape: tuple[int, ...]) -> None:
    logits = 5 * torch.randn(*shape, 7, dtype=torch.float64)
    targets = torch.randint(7, shape)
    expected = -logits.log_softmax(dim=-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(token_nll(logits, targets), expected, rtol=0, atol=1e-12)
    half = logits.to(torch.bfloat16)
    nll = token_nll(half, targets)
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll.double(), token_nll(half.double(), targets), rtol=1e-5, atol=1e-5)


# The whole, enumerated


def assert_same_gradient(oracle: Oracle, found: Tensor, expected: Tensor, rtol: float, atol: float) -> None:
    parameters = list(oracle.model.parameters())
    wanted = torch.autograd.grad(expected, parameters, retain_graph=True)
    assert sum(g.abs().sum() for g in wanted) > 1
    torch.testing.assert_close(torch.autograd.grad(found, parameters), wanted, rtol=rtol, atol=atol)


@every_case
def test_expected_loss_and_gradient_are_those_of_the_enumerated_bound(
    source: tuple[int, ...], shift: bool
) -> None:
    oracle = Oracle(source, shift)
    for t in (0.001, 0.3, 0.8, 1.0):
        expected = oracle.bound_at(t)
        assert 0.5 < expected < 50
        torch.testing.assert_close(oracle.expected_loss(t), expected, rtol=1e-12, atol=0)
    assert_same_gradient(oracle, oracle.expected_loss(0.4), oracle.bound_at(0.4), 1e-9, 1e-12)


@every_case
@torch.no_grad()
def test_three_forms_of_the_bound_agree_and_lie_above_the_likelihood(
    source: tuple[int, ...], shift: bool
) -> None:
    oracle = Oracle(source, shift)
    where, length = oracle.where, len(oracle.where)
    # 1. Continuous time: the integrand is a polynomial of degree length - 1 in t, so this is exact.
    continuous = torch.stack([w * oracle.expected_loss(t) for t, w in gauss(0, 1, length)]).sum()
    # 2. Exactly k masks, k uniform: (length / k) * sum of nll, averaged over the sets of that size.
    sizes = [
        torch.stack([total(oracle.nll[s].values()) * length / k for s in combinations(where, k)]).mean()
        for k in range(1, length + 1)
    ]
    exactly_k = torch.stack(sizes).mean() / length
    # 3. The any-order chain: reveal one token after the other, averaged over all orders; and the model's own
    # likelihood, the mean over orders of the chain's probability (Jensen's inequality).
    exact, any_order = oracle.exact()
    torch.testing.assert_close(continuous, exactly_k, rtol=1e-12, atol=0)
    torch.testing.assert_close(exactly_k, any_order, rtol=1e-12, atol=0)
    assert continuous > exact + 1e-3


@every_case
@torch.no_grad()
def test_the_mean_over_draws_is_the_bound(source: tuple[int, ...], shift: bool) -> None:
    # Nothing replaced here: forward draws its own noise, and the mean must be the integral over
    # [eps, 1]. Within five standard errors, which are enumerated too: a false alarm in 1.7 million.
    oracle, eps, rows = Oracle(source, shift), 0.05, 10_000
    oracle.model.config.noise_eps = eps
    text, src_mask = TEXT.expand(rows, -1), oracle.src_mask.expand(rows, -1)
    seeds = torch.arange(rows)
    loss = loss_of(oracle.model, text, src_mask=src_mask, training_mode="sft", noise_seed=seeds)
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


# Schedules, complementary masks and the smallest rate

KINDS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {"schedule": "cosine"},
    "complementary": {"complementary": True},
}


def bound_drawn(oracle: Oracle, kind: str, eps: float) -> Tensor:
    """The integral of the bound over the rates that are drawn, over the share of s that is drawn."""
    if kind == "complementary":
        return oracle.bound(eps, 1 - eps)
    bound = oracle.bound(eps, 1)
    return bound if kind == "linear" else bound * (1 - eps) / (1 - math.asin(eps) / (math.pi / 2))


@every_case
@pytest.mark.parametrize("kind", KINDS)
def test_mean_loss_and_gradient_over_all_masks_and_rates(
    kind: str, source: tuple[int, ...], shift: bool
) -> None:
    oracle = Oracle(source, shift)
    found = oracle.mean_loss(Objective(eps=0.1, **KINDS[kind]), 12 if kind == "cosine" else 4)
    expected = bound_drawn(oracle, kind, 0.1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    # Stock RMSNorm computes in float32 whatever the model's dtype.
    assert_same_gradient(oracle, found, expected, 1e-5, 1e-6)


@every_case
@torch.no_grad()
def test_bias_of_the_smallest_rate_is_of_its_size(source: tuple[int, ...], shift: bool) -> None:
    # With f(t) the integrand: the mean over [eps, 1] is bound + eps (bound - f(0)) + O(eps^2), where
    # f(0) is the mean nll of each token given all others; under cosine eps (2 bound / pi - f(0)).
    oracle, eps = Oracle(source, shift), 1e-3
    bound, at_zero = oracle.bound(), total(oracle.nll[(i,)][i] for i in oracle.where) / len(oracle.where)
    for kind, share, most in (("linear", 1.0, 4e-4), ("cosine", 2 / math.pi, 8e-4)):
        bias = eps * (share * bound - at_zero)
        assert abs(bias) < most * bound  # as docs/math.md says
        torch.testing.assert_close(bound_drawn(oracle, kind, eps) - bound, bias, rtol=0, atol=20 * eps**2)


@torch.no_grad()
def test_the_bound_is_tight_where_the_order_does_not_matter() -> None:
    # One supervised token: there is one order.
    one = Oracle((0, 1, 3))
    torch.testing.assert_close(one.bound(), one.exact()[0], rtol=1e-12, atol=0)
    # A model whose attention is cut: every token's distribution is its own.
    cut = tiny_model(vocab_size=VOCAB, mask_token_id=MASK, eos_token_id=None)
    for layer in cut.model.layers:
        layer.self_attn.o_proj.weight.zero_()
    oracle = Oracle((0,), model=cut)
    assert oracle.exact()[0] > 0.5
    torch.testing.assert_close(oracle.bound(), oracle.exact()[0], rtol=1e-12, atol=0)


@torch.no_grad()
def test_masks_in_cells_bound_the_likelihood_of_revealing_whole_cells() -> None:
    oracle, objective = Oracle((0,), text=torch.tensor([[2, 0, 3, 1, 0]])), Objective(eps=1e-12)
    likelihoods, bounds = [], []
    for size, phase in ((2, 0), (2, 1), (3, 0), (3, 1), (3, 2)):
        cells = [tuple(cell) for _, cell in groupby(oracle.where, key=lambda i: (i + phase) // size)]
        found, (exact, mean) = oracle.mean_loss(objective, 3, cells), oracle.exact(cells)
        # The mean over orders of the cells, all tokens of a cell at once and each by itself.
        torch.testing.assert_close(found, mean, rtol=1e-9, atol=0)
        assert found > exact + 1e-6
        likelihoods += [exact] * (6 // size)  # sizes, and phases of a size, are equally likely
        bounds += [found] * (6 // size)
    # The process that draws size and phase too is a mixture, which is likelier still than its mean.
    count = len(oracle.where)
    mixture = -((-count * torch.stack(likelihoods)).logsumexp(0) - math.log(len(likelihoods))) / count
    assert torch.stack(bounds).mean() > mixture + 1e-3
    # Another process than that of single tokens, with another likelihood.
    assert abs(mixture - oracle.exact()[0]) > 1e-3
    # One cell over the whole response is exact.
    whole = [tuple(oracle.where)]
    torch.testing.assert_close(
        oracle.mean_loss(objective, 3, whole), oracle.exact(whole)[0], rtol=1e-9, atol=0
    )


# CART


COLUMN = st.tuples(st.sampled_from(["token", "token", "padding", "next"]), st.booleans())


@given(columns=st.lists(COLUMN, min_size=1, max_size=14), p=st.sampled_from([0.1, 0.6]))
def test_context_weight_told_pair_by_pair(columns: list[tuple[str, bool]], p: float) -> None:
    kinds, masks = zip(*columns, strict=True)
    documents = torch.tensor([kind == "next" for kind in kinds]).cumsum(0)
    is_token = torch.tensor([kind != "padding" for kind in kinds])
    is_masked = torch.tensor(masks) & is_token
    # Next to another row, which must not matter.
    both = row_layout(torch.stack([is_token, torch.ones_like(is_token)]), documents.expand(2, -1))
    found = context_weight(torch.stack([is_masked, is_token]), both, p)[0]
    place = is_token.cumsum(0)  # distance counts tokens: padding is left out
    for n in is_token.nonzero()[:, 0].tolist():
        seen = is_token & ~is_masked & (documents == documents[n]) & (torch.arange(len(columns)) != n)
        distance = (place - place[n]).abs()[seen].double()
        assert found[n].item() == pytest.approx((0.5 * p * (1 - p) ** (distance - 1)).sum().item(), abs=1e-6)


def test_context_weight_sums_over_a_long_row() -> None:
    # Far beyond the reach at which terms are left out; in the middle the two sides make 1/2 each.
    is_masked = (torch.arange(1001) == 500)[None]
    weight = context_weight(is_masked, row_layout(torch.ones_like(is_masked)))
    assert weight[0, [0, 500]].tolist() == pytest.approx([0.5, 1.0], abs=1e-6)


# Two routes: a document alone, and in any batch

EVERYTHING: dict[str, Any] = {
    "eps": 0.05,
    "source_share": 0.5,
    "prefix_probability": 0.4,
    "truncate_probability": 0.4,
    "block_masking_probability": 0.5,
    "mask_block_sizes": (2, 3),
    "future_share": 0.6,
}
SAMPLES = ["ssrrrrrr", "srrr", "ssrrisrrr", "r", "rrrrrr", "ss"]  # s source, r response, i ignored label
SAMPLE_SEEDS = torch.tensor([14, 31, 33, 7, 10, 3])
SAMPLE_STRATA = torch.tensor([0.1, 0.75, 0.4, 0.9, 0.6, 0.3])


def batch_of(rows: list[list[int]], before: int, inside: int, width: int, packed: bool) -> dict[str, Any]:
    """Samples laid out in rows with `before` columns of padding before each and `inside` after its first."""
    shape, most = (len(rows), width), max(len(row) for row in rows)
    garbage = torch.Generator().manual_seed(before + 10 * inside + 100 * width)
    ids, labels, segments = torch.randint(32, (3, *shape), generator=garbage)
    is_token, source = torch.zeros(shape), torch.rand(shape, generator=garbage) < 0.5
    seeds = torch.randint(2**60, (len(rows), most), generator=garbage)
    strata = torch.rand((len(rows), most), generator=garbage)
    for row, samples in enumerate(rows):
        column = 0
        for place, sample in enumerate(samples):
            word = SAMPLES[sample]
            column += before
            where = [column + i + (inside if i else 0) for i in range(len(word))]
            column = where[-1] + 1
            ids[row, where] = labels[row, where] = random_ids(len(word), seed=sample)
            labels[row, [where[i] for i, letter in enumerate(word) if letter == "i"]] = -100
            is_token[row, where] = 1
            source[row, where] = torch.tensor([letter == "s" for letter in word])
            segments[row, where] = 20 + place
            seeds[row, place], strata[row, place] = SAMPLE_SEEDS[sample], SAMPLE_STRATA[sample]
    keys: dict[str, Any] = {"noise_seed": seeds[:, 0], "strata": strata[:, 0]}
    if packed:
        keys = {"noise_seed": seeds, "strata": strata, "segment_ids": segments}
    masks = {"attention_mask": is_token, "src_mask": source, "training_mode": "sft"}
    return {"input_ids": ids, "labels": labels, **masks, **keys}


ONE_BY_ONE = [[n] for n in range(6)]
ARRANGEMENTS: dict[str, list[dict[str, Any]]] = {
    "padding on the right": [batch_of(ONE_BY_ONE, 0, 0, 12, False)],
    "padding on the left and inside": [batch_of(ONE_BY_ONE, 2, 3, 14, False)],
    "another order": [batch_of(ONE_BY_ONE[::-1], 0, 0, 9, False)],
    "micro-batches": [batch_of([[4], [1]], 0, 0, 9, False), batch_of([[5], [0], [3], [2]], 1, 0, 11, False)],
    "packed": [batch_of([[0, 5, 1], [2, 4, 3]], 0, 0, 16, True)],
    "packed with padding between": [batch_of([[3, 2], [0, 5], [4, 1]], 2, 1, 20, True)],
    "packed micro-batches": [batch_of([[4, 3, 0, 1]], 1, 0, 30, True), batch_of([[2, 5]], 0, 0, 11, True)],
}


def test_the_samples_have_every_corruption() -> None:
    model, batch = tiny_model(), batch_of(ONE_BY_ONE, 0, 0, 9, False)
    single = noise_of(model, **batch, objective=Objective(**{**EVERYTHING, "block_masking_probability": 0}))
    drawn = noise_of(model, **batch, objective=Objective(**EVERYTHING))
    is_token, source, left = batch["attention_mask"] == 1, batch["src_mask"], drawn.layout.is_token
    response = left & ~source & (batch["labels"] != -100)
    in_cells = (single.is_masked != drawn.is_masked).any(dim=1)
    for some in (drawn.maskable & source, response & ~drawn.maskable, is_token & ~left, in_cells):
        assert some.any() and not some.all()


@pytest.mark.parametrize(("preset", "shift", "attention"), [
    *((preset, shift, "sdpa") for preset in PRESETS for shift in (False, True)), ("elbo", True, "eager")
])  # fmt: skip
def test_loss_and_gradient_do_not_depend_on_the_batch(preset: Any, shift: bool, attention: str) -> None:
    model = tiny_model(logit_shift=shift)
    model.set_attn_implementation(attention)
    # Complementary masks where t is linear, and the other schedule; strata, or keyed rates: by turns.
    by_turns = {"complementary": True} if shift and preset != "diffullama" else {"schedule": "cosine"}
    objective = Objective(**{**EVERYTHING, "loss": preset, **by_turns})

    def step(batches: list[dict[str, Any]]) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        given = [{**batch, "strata": None if shift else batch["strata"]} for batch in batches]
        drawn = [noise_of(model, **batch, objective=objective) for batch in given]
        divisor = torch.stack([loss_divisor(noised, objective) for noised in drawn]).sum()
        losses = [loss_of(model, **batch, objective=objective, divisor=divisor) for batch in given]
        loss = torch.stack(losses).sum()
        return loss.detach(), torch.autograd.grad(loss, list(model.parameters())), divisor

    loss, gradient, divisor = step([batch_of([[n]], 0, 0, len(SAMPLES[n]), False) for n in range(6)])
    assert loss > 0.05 and divisor > 1
    for name, batches in ARRANGEMENTS.items():
        found = step(batches)
        assert found[2] == divisor, name
        torch.testing.assert_close(found[0], loss, rtol=1e-9, atol=0, msg=lambda m: f"{name}: {m}")  # noqa: B023
        torch.testing.assert_close(found[1], gradient, rtol=1e-9, atol=2e-8)


@pytest.mark.parametrize("shift", [False, True], ids=["unshifted", "shifted"])
@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_cut_off_is_not_attended(packed: bool, share: float, shift: bool) -> None:
    # Two documents of eight tokens, all of them tokens: the padding is the cut's alone.
    model, ids = tiny_model(logit_shift=shift), random_ids(2, 8)
    batch: dict[str, Any] = {"noise_seed": torch.tensor([31, 33])}
    if packed:
        ids = ids.view(1, 16)
        batch = {"noise_seed": batch["noise_seed"][None], "segment_ids": torch.arange(16)[None] // 8}
    objective = Objective(eps=0.3, truncate_probability=1, future_share=share)
    drawn = noise_of(model, ids, objective=objective, **batch)
    cut = ~drawn.layout.is_token
    assert cut.view(2, 8).any(dim=1).all() and drawn.is_masked.any()
    expected = loss_of(model, ids, objective=objective, **batch)
    other = torch.where(cut, (ids + 7) % 31, ids)
    assert torch.equal(loss_of(model, other, objective=objective, **batch), expected)
    # As if it had been padding from the start, and the rest had been drawn as it was.
    whole = Objective(eps=0.3, future_share=share)
    padded = loss_of(model, ids, attention_mask=~cut, objective=whole, **batch)
    torch.testing.assert_close(expected, padded, rtol=1e-9, atol=0)


# The presets

PRESET_TEXTS = ((torch.tensor([[1, 3, 0, 2, 1]]), (0, 1, 2)), (torch.tensor([[2, 0, 3, 1, 0]]), (0,)))
"""Two rows of five tokens and their source positions: prompts of 3 and 1, responses of 2 and 4 tokens."""

Masks = tuple[tuple[int, ...], ...]


@cache
def preset_oracles() -> list[Oracle]:
    with torch.no_grad():
        return [Oracle(source, False, text=text) for text, source in PRESET_TEXTS]


def plain_loss(preset: str, masks: Masks, times: tuple[float, ...]) -> float:
    """A preset's loss of the two rows under one mask and one rate each, told in loops."""
    oracles, summed = preset_oracles(), 0.0
    supervised = [len(oracle.where) for oracle in oracles]
    for oracle, masked, t, count in zip(oracles, masks, times, supervised, strict=True):
        for i, nll in oracle.nll[masked].items():
            context = [j for j in range(5) if j not in masked and j != i]
            near = 0.5 * sum(0.1 * 0.9 ** (abs(i - j) - 1) for j in context)
            weight = {"llada": 1 / t / count, "uniform": 1.0, "cart": near}.get(preset, 1 / t)
            summed += weight * nll.item()
    divisors = {"llada": 2, "coda": 10, "diffullama": max(1, sum(len(masked) for masked in masks))}
    return summed / divisors.get(preset, sum(supervised))


def expected_preset(preset: str, eps: float = 1e-3) -> float:
    """Its mean over all masks of the two rows and both their rates, uniform on [eps, 1]."""
    first, second = preset_oracles()
    value = 0.0
    for (t, w), (u, v) in product(gauss(eps, 1, 3), repeat=2):  # polynomials of degree 2 and 4 at most
        for a, b in product(first.nll, second.nll):
            p = t ** len(a) * (1 - t) ** (2 - len(a)) * u ** len(b) * (1 - u) ** (4 - len(b))
            value += w * v / (1 - eps) ** 2 * p * plain_loss(preset, (a, b), (t, u))
    return value


@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_each_preset_is_computed_under_every_mask(preset: Any) -> None:
    oracles, times = preset_oracles(), (0.3, 0.8)
    text = torch.cat([oracle.text for oracle in oracles])
    src_mask = torch.cat([oracle.src_mask for oracle in oracles])
    for masks in product(*(oracle.nll for oracle in oracles)):
        found = loss_under(oracles[0].model, text, src_mask, masks, times, Objective(loss=preset))
        tolerance = 1e-6 if preset == "cart" else 1e-9  # its weights are float32
        assert found.item() == pytest.approx(plain_loss(preset, masks, times), rel=tolerance)


COLUMNS = {  # published in, weight of a masked token, divided by, estimates
    "elbo": ("MDLM 2406.07524 eq. 10; MD4 2406.04329", "1/t", "supervised tokens",
             "negative ELBO per token"),
    "llada": ("LLaDA 2502.09992 eq. 5 and its SFT code", "1/t / its sample's supervised tokens", "samples",
              "mean over samples of the negative ELBO per token"),
    "coda": ("CoDA 2510.03270, its code", "1/t", "all tokens, prompts too",
             "negative ELBO per token times the supervised share"),
    "diffullama": ("DiffuLLaMA 2410.17891, its code", "1/t", "masked tokens, at least 1",
                   "with many samples 2 / (1 + eps) times the negative ELBO per token"),
    "uniform": ("MaskGIT 2202.04200 sec. 3.1", "1", "supervised tokens",
                "integral of t f(t), where that of f is the negative ELBO per token"),
    "cart": ("Dream 2508.15487 sec. 3.3", "1/2 sum of p (1-p)^(d-1) over unmasked at distance d, p = 0.1",
             "supervised tokens", "nll where much context is near"),
}  # fmt: skip


def preset_table() -> list[str]:
    """The rows of the table in docs/math.md."""
    exact = [oracle.exact()[0].item() for oracle in preset_oracles()]
    per_token, per_sample = (2 * exact[0] + 4 * exact[1]) / 6, sum(exact) / 2
    rows = []
    for preset, words in COLUMNS.items():
        value = expected_preset(preset)
        likelihood = per_sample if preset == "llada" else per_token
        bound = "yes" if PRESETS[preset].is_bound else "no"
        cells = [f"`{preset}`", *words, bound, f"{value:.3f}", f"{value / likelihood:.3f}"]
        rows.append("| " + " | ".join(cells) + " |")
    rows.append(f"{per_token:.3f} nats per supervised token ({per_sample:.3f} as the mean over the two")
    return rows


def test_the_table_of_presets_is_what_the_oracle_finds() -> None:
    for row in preset_table():
        assert row in MATH_PAGE


def test_presets_are_what_they_say_they_estimate() -> None:
    first, second = preset_oracles()
    eps = 1e-3
    bounds = [oracle.bound(eps, 1).item() for oracle in (first, second)]
    exact = [oracle.exact()[0].item() for oracle in (first, second)]
    per_token = (2 * bounds[0] + 4 * bounds[1]) / 6
    assert expected_preset("elbo") == pytest.approx(per_token, rel=1e-9)
    assert expected_preset("llada") == pytest.approx(sum(bounds) / 2, rel=1e-9)
    assert expected_preset("coda") == pytest.approx(0.6 * per_token, rel=1e-9)
    half = sum(w * t * (2 * first.bound_at(t) + 4 * second.bound_at(t)).item() for t, w in gauss(eps, 1, 4))
    assert expected_preset("uniform") == pytest.approx(half / 6 / (1 - eps), rel=1e-9)
    # The two that call themselves bounds lie above the likelihood they bound.
    assert {name for name, preset in PRESETS.items() if preset.is_bound} == {"elbo", "llada"}
    assert expected_preset("elbo") > (2 * exact[0] + 4 * exact[1]) / 6 + 1e-3
    assert expected_preset("llada") > sum(exact) / 2 + 1e-3
    # The others have no fixed side: where the model is sure, they lie below.
    assert expected_preset("coda") < (2 * exact[0] + 4 * exact[1]) / 6
    assert expected_preset("diffullama") > 1.3 * per_token


def test_a_sample_with_one_supervised_token_counts_like_any_other_under_llada() -> None:
    # And one with none not at all: with all masked, the loss is the mean of their mean nll / t.
    model, ids, t = tiny_model(), random_ids(3, 4), 0.5
    src_mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    loss = loss_under(model, ids, src_mask, [(3,), (1, 2, 3), ()], [t] * 3, Objective(loss="llada"), mask=31)
    log_p = model.eval()(ids.masked_fill(~src_mask, 31)).logits.log_softmax(dim=-1)
    nll = -log_p.gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(loss, (nll[0, 3] + nll[1, 1:].mean()) / 2 / t, rtol=1e-9, atol=0)


def test_masked_tokens_as_the_divisor_double_the_bound_as_samples_grow() -> None:
    # The ratio of two means: the bound over E[t] = (1 + eps) / 2.
    oracle, eps, rows = preset_oracles()[1], 0.2, 20_000
    given: dict[str, Any] = {"noise_seed": torch.arange(rows), "training_mode": "sft"}
    given["src_mask"] = oracle.src_mask.expand(rows, -1)
    objective = Objective(eps=eps, loss="diffullama")
    with torch.no_grad():
        loss = loss_of(oracle.model, oracle.text.expand(rows, -1), objective=objective, **given)
    assert loss.item() == pytest.approx(2 / (1 + eps) * oracle.bound(eps, 1).item(), rel=0.02)


# Low-discrepancy rates

CHAIN_TEXT, CHAIN_WORDS, CHAIN_DECAY = (0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2), 8, 0.9
"""A text of 12 tokens from a chain of 8 words: `P(same word d tokens on) = 1/8 + 7/8 * 0.9^d`."""


def chain_nll() -> Tensor:
    """Sum of the nll of the masked tokens under every mask, by the chain's own posterior; bit i = token i."""

    def p(i: int | None, j: int | None) -> float:
        """Probability of token j given token i, of what is known."""
        if i is None or j is None:
            return 1 / CHAIN_WORDS if j is not None else 1.0
        return 1 / CHAIN_WORDS + ((CHAIN_TEXT[i] == CHAIN_TEXT[j]) - 1 / CHAIN_WORDS) * CHAIN_DECAY ** (j - i)

    length = len(CHAIN_TEXT)
    sums = torch.zeros(2**length, dtype=torch.float64)
    for mask in range(2**length):
        seen = [i for i in range(length) if not mask >> i & 1]
        for i in (i for i in range(length) if mask >> i & 1):
            left = max((j for j in seen if j < i), default=None)
            right = min((j for j in seen if j > i), default=None)
            sums[mask] -= math.log(p(left, i) * p(i, right) / p(left, right))
    return sums


def test_even_rates_lower_the_variance_of_the_loss() -> None:
    # 16 samples a step. The variance of a step's loss, by enumeration and quadrature: the part within a
    # rate stays, that between the rates all but vanishes.
    length, samples, eps = len(CHAIN_TEXT), 16, 1e-3
    sums = chain_nll()
    size = torch.tensor([mask.bit_count() for mask in range(2**length)], dtype=torch.float64)

    def moments(s: Tensor) -> tuple[Tensor, Tensor]:
        t = (eps + (1 - eps) * s)[:, None]
        p, loss = t**size * (1 - t) ** (length - size), sums / t / length
        return (p * loss).sum(dim=1), (p * loss**2).sum(dim=1)

    s, w = torch.tensor(gauss(0, 1, 60), dtype=torch.float64).T
    mean, square = moments(s)
    bound = (w * mean).sum()
    independent = ((w * square).sum() - bound**2) / samples
    shifts, v = torch.tensor(gauss(0, 1, 12), dtype=torch.float64).T
    means = torch.stack([moments((torch.arange(samples) + u) / samples)[0].mean() for u in shifts])
    even = (w * (square - mean**2)).sum() / samples + (v * (means - bound) ** 2).sum()
    ratio = (even / independent).item()

    # The same from the draws themselves.
    steps, rows = 2000, 2000 * samples
    strata = torch.cat([low_discrepancy(5, step, torch.arange(samples), samples) for step in range(steps)])
    layout = row_layout(torch.ones(rows, length, dtype=torch.bool))
    ids = torch.tensor([CHAIN_TEXT]).expand(rows, -1)
    inputs = ForwardInputs(ids, ids, layout, layout.is_token, None, MASK, None, False, False)
    variances = []
    for uniforms in (strata, None):
        drawn = corrupt(inputs, Objective(eps=eps), torch.arange(rows), uniforms)
        mask = (drawn.is_masked.long() << torch.arange(length)).sum(dim=1)
        losses = (sums[mask] / drawn.t[:, 0] / length).view(steps, samples).mean(dim=1)
        assert abs(losses.mean() - bound) < 5 * losses.std() / steps**0.5
        variances.append(losses.var().item())
    found = variances[0] / variances[1]
    assert found < 0.85
    assert found == pytest.approx(ratio, rel=0.25)
    assert f"{ratio:.2f} times the variance" in MATH_PAGE

from __future__ import annotations

import inspect
import math
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import assert_rate, assert_uniform, random_ids
from torch import Tensor

from unmask.diffusion import corrupt as module
from unmask.diffusion.attention import row_layout
from unmask.diffusion.corrupt import (
    ForwardInputs,
    Noised,
    corrupt,
    document_strata,
    example_seeds,
    low_discrepancy,
    masking_rate,
    transition,
)
from unmask.diffusion.objective import Objective
from unmask.diffusion.rng import STREAM_MASK

MASK = 31
ROWS = 20_000
SEEDS = torch.arange(ROWS)  # the worst seeds there are: consecutive


def everywhere(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


# transition


@given(data=st.data())
def test_only_maskable_tokens_become_masks_and_the_rest_stays(data: st.DataObject) -> None:
    rows, length = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 6)))
    grid = st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=rows, max_size=rows)
    maskable = torch.tensor(data.draw(grid))
    x_0 = random_ids(rows, length, vocab=32, seed=data.draw(st.integers(0, 99)))  # mask tokens among them
    sigma = data.draw(st.floats(0, 1) | st.sampled_from([0, 1]))
    kept = x_0.clone()
    seeds = torch.arange(rows) if data.draw(st.booleans()) else None
    noised = transition(x_0, sigma, maskable, MASK, noise_seed=seeds)
    assert torch.equal(x_0, kept)
    assert not (noised.is_masked & ~maskable).any()
    assert torch.equal(noised.x_t, torch.where(noised.is_masked, MASK, x_0))
    assert torch.equal(noised.t, torch.full(x_0.shape, float(sigma)))
    if sigma in (0, 1):
        assert torch.equal(noised.is_masked, maskable & (sigma == 1))


def test_sigma_of_every_shape_and_a_mask_of_another() -> None:
    # Batch and length are equal on purpose: a vector is one a row.
    x_0, each = random_ids(3, 3), torch.tensor([0.0, 0.5, 1.0])
    whole = transition(x_0, each[:, None].expand(3, 3), everywhere(3, 3), MASK, noise_seed=torch.arange(3))
    for sigma in (each, each[:, None]):
        noised = transition(x_0, sigma, everywhere(3, 3), MASK, noise_seed=torch.arange(3))
        assert torch.equal(noised.is_masked, whole.is_masked) and torch.equal(noised.t, whole.t)
    unchecked = inspect.unwrap(transition)  # past the shape checks that the tests alone have
    with pytest.raises(ValueError, match="maskable_mask"):
        unchecked(random_ids(2, 3), 0.5, everywhere(2, 4), MASK)


@pytest.mark.parametrize("seeds", [SEEDS, None], ids=["seeded", "unseeded"])
@pytest.mark.parametrize("sigma", [0.02, 0.5, 0.97])
def test_each_position_and_each_pair_is_masked_at_its_rate(sigma: float, seeds: Tensor | None) -> None:
    noised = transition(random_ids(ROWS, 5), sigma, everywhere(ROWS, 5), MASK, noise_seed=seeds)
    assert_rate(noised.is_masked, sigma)
    left, right = torch.combinations(torch.arange(5), 2).T
    assert_rate(noised.is_masked[:, left] & noised.is_masked[:, right], sigma**2)


# Seeds and strata


def test_seeds_of_examples_differ_by_run_sample_and_epoch() -> None:
    samples = torch.arange(50)
    seeds = torch.cat([example_seeds(run, samples, epoch) for run in range(20) for epoch in range(-1, 20)])
    assert len(set(seeds.tolist())) == 20 * 21 * 50
    assert torch.equal(example_seeds(3, samples[7:8], 2), example_seeds(3, samples, 2)[7:8])


def test_documents_of_a_row_spread_its_stratum_and_share_no_rate_with_blocks() -> None:
    rows = low_discrepancy(0, 0, torch.arange(4), total=4)
    table = document_strata(rows, 50)
    assert torch.equal(table[:, 0], rows)
    assert table.min() >= 0 and table.max() < 1
    for row in table:  # the gaps between multiples of a badly approximable number
        gaps = torch.cat([row, row.min()[None] + 1]).sort().values.diff()
        assert gaps.max() < 2.5 / 50
    # Block b of a document takes its stratum shifted by b golden ratios.
    rates = (table[0, :30, None].double() + torch.arange(30).double() * (5**0.5 - 1) / 2) % 1
    assert rates.flatten().sort().values.diff().min() > 1e-6


def test_strata_are_spread_evenly_over_a_step() -> None:
    for total in (1, 3, 16, 1000):
        points = low_discrepancy(3, 7, torch.arange(total), total)
        assert points.min() >= 0
        assert points.max() < 1
        ordered = points.double().sort().values
        gaps = torch.cat([ordered.diff(), ordered[:1] + 1 - ordered[-1:]])
        # Every interval of length 1 / total, wherever it begins, holds one point.
        torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / total), rtol=0, atol=2e-7)
    # They depend on run, step and place alone.
    whole, some = low_discrepancy(3, 7, torch.arange(12), 12), torch.tensor([[5, 11], [0, 4]])
    assert torch.equal(low_discrepancy(3, 7, some, 12), whole[some])
    for run, step in ((3, 8), (4, 7)):
        assert not torch.equal(low_discrepancy(run, step, torch.arange(12), 12), whole)


def test_each_place_and_each_document_of_a_place_is_uniform_over_the_steps() -> None:
    steps = torch.stack([low_discrepancy(1, step, torch.tensor([0, 5, 6]), 7) for step in range(2000)])
    for points in steps.T:
        for document in document_strata(points, 3).T:
            assert_uniform((document * 40).long(), 40)


# corrupt: the corruptions. A row is written as a word: r response, s source, i ignored label, _ padding;
# a second word, if any, says which document each column belongs to.

MIXED = "_ssrrrrrirrr_sr__"
WORDS: dict[str, tuple[str, str | None]] = {
    "edges": ("rrrrrr", None),
    "prompt and padding": (MIXED, None),
    "shorter than a cell": ("ssr_rs", None),
    "packed": ("_srrrr_rssrrisr_rr_", "9000009111111119229"),
}
CORRUPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "S1": {"prefix_probability": 0.4},
    "S2": {"truncate_probability": 0.4},
    "S3": {"block_masking_probability": 1.0, "mask_block_sizes": (2, 3, 8)},
    "S3 in half": {"block_masking_probability": 0.5, "mask_block_sizes": (4,)},
    "source": {"source_share": 0.5},
    "cosine": {"schedule": "cosine"},
    "complementary": {"complementary": True, "eps": 0.1},
}
ALL: dict[str, Any] = {
    "prefix_probability": 0.3,
    "truncate_probability": 0.4,
    "block_masking_probability": 0.6,
    "mask_block_sizes": (2, 3, 8),
    "source_share": 0.5,
}
CORRUPTIONS["all, cosine"] = {**ALL, "schedule": "cosine"}
CORRUPTIONS["all, complementary"] = {**ALL, "complementary": True, "eps": 0.1}


def flags(word: str, kinds: str, rows: int) -> Tensor:
    return torch.tensor([letter in kinds for letter in word]).expand(rows, -1)


def draw_word(
    word: str, documents: str | None, objective: Objective, *, rows: int = ROWS, **given: Any
) -> tuple[Noised, ForwardInputs]:
    """Corrupt the same row many times, each with its own seeds."""
    ids = random_ids(1, len(word), vocab=32).expand(rows, -1)
    numbers = None if documents is None else torch.tensor([int(d) for d in documents]).expand(rows, -1)
    assert documents is None or len(documents) == len(word)
    seeds = SEEDS[:rows] if documents is None else torch.arange(3 * rows).view(rows, 3)
    layout = row_layout(flags(word, "rsi", rows), numbers)
    response, source = flags(word, "r", rows), flags(word, "s", rows)
    block_length = given.pop("block_length", None)
    inputs = ForwardInputs(
        ids, ids, layout, response, source, MASK, block_length, True, documents is not None
    )
    return corrupt(inputs, objective, **{"noise_seed": seeds, **given}), inputs


def assert_masked_at_the_recorded_rate(drawn: Noised) -> None:
    """Each column that is maskable somewhere is masked at the recorded rate, within 5 standard errors."""
    is_masked, maskable, t = drawn.is_masked, drawn.maskable, drawn.t.double()
    assert not (is_masked & ~maskable).any()
    surplus = torch.where(maskable, is_masked.double() - t, 0).sum(dim=0)
    variance = torch.where(maskable, t * (1 - t), 0).sum(dim=0)
    often = maskable.any(dim=0)
    assert (variance[often] > 100).all()  # enough for a normal approximation
    error = (surplus / variance.sqrt())[often].abs().max()
    assert error < 5, f"off by {error:.1f} standard errors"


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("row", WORDS)
def test_every_corruption_masks_each_maskable_position_at_the_recorded_rate(row: str, name: str) -> None:
    # False alarms: 1 in 1.7 million for each column (normal approximation).
    objective = Objective(**CORRUPTIONS[name])
    word, documents = WORDS[row]
    opened = "rs" if objective.source_share < 1 else "r"
    drawn, inputs = draw_word(word, documents, objective)
    two = [drawn, drawn.complement(inputs)] if objective.complementary else [drawn]
    for one in two:
        assert torch.equal(one.x_t, torch.where(one.is_masked, MASK, inputs.input_ids))
        assert not (one.maskable & ~flags(word, opened, ROWS)).any()
        assert not (one.maskable & ~one.layout.is_token).any()  # padding, cut off or not
        assert_masked_at_the_recorded_rate(one)
        # In each quarter of the rates too: the masks know nothing of t but that they are below it.
        for low in (0.0, 0.25, 0.5, 0.75):
            some = (one.t >= low) & (one.t <= low + 0.25)
            part = one._replace(maskable=one.maskable & some, is_masked=one.is_masked & some)
            assert_masked_at_the_recorded_rate(part)
    # And at a rate that is known beforehand, which the draw must record.
    for s in (0.02, 0.6):
        at, _ = draw_word(word, documents, objective, strata=torch.full((ROWS,), s))
        assert (at.t == masking_rate(torch.tensor(s), objective)).all()
        assert_masked_at_the_recorded_rate(at)


def test_one_t_a_document() -> None:
    drawn, _ = draw_word(*WORDS["packed"], Objective(eps=0.1))
    t, document = drawn.t, drawn.layout.document
    for number in range(3):
        of_one = torch.where(document == number, t, torch.nan)
        first = of_one.nan_to_num(9).min(dim=1).values
        assert torch.equal(first, of_one.nan_to_num(-9).max(dim=1).values)
        assert_uniform(((first - 0.1) / 0.9 * 50).long().clamp(max=49), 50)


# S1 and S2


@pytest.mark.parametrize("word", ["rrrrrr", "_ssrrrrsrirr_", "rr", "srsrs"])
def test_prefix_and_cut_happen_as_often_as_said_and_with_uniform_lengths(word: str) -> None:
    # Seen from outside: a prefix leaves the last maskable tokens, a cut the first ones and padding.
    objective = Objective(prefix_probability=0.3, truncate_probability=0.45)
    drawn, _ = draw_word(word, None, objective)
    where = [i for i, letter in enumerate(word) if letter == "r"]
    number = len(where)
    before = flags(word, "rsi", ROWS)
    kept = drawn.maskable[:, where]
    count = kept.sum(dim=1)
    assert (count >= 1).all()
    is_prefixed = (count < number) & kept[:, -1]
    is_cut = (count < number) & kept[:, 0]
    assert not (is_prefixed & is_cut).any()
    assert torch.equal(is_prefixed | is_cut, count < number)
    assert_rate(is_prefixed, 0.3)
    assert_rate(is_cut, 0.45)
    if number > 2:
        assert_uniform(number - count[is_prefixed] - 1, number - 1)  # length of the prefix: 1 .. m - 1
        assert_uniform(count[is_cut] - 1, number - 1)  # length of what stays: 1 .. m - 1
    for row in torch.cat([is_prefixed.nonzero()[:40, 0], is_cut.nonzero()[:40, 0]]).tolist():
        left = int(count[row])
        expected = where[-left:] if is_prefixed[row] else where[:left]
        assert drawn.maskable[row].nonzero()[:, 0].tolist() == expected
        # What is cut off, source and ignored tokens among it, is padding; a prefix pads nothing.
        last = len(word) if is_prefixed[row] else where[left - 1]
        tokens = [i for i in range(len(word)) if before[row, i] and i <= last]
        assert drawn.layout.is_token[row].nonzero()[:, 0].tolist() == tokens
    # Positions and documents stay what they were.
    assert torch.equal(drawn.layout.position, row_layout(before).position)


@pytest.mark.parametrize("word", ["r", "sr_", "ss_", "_"])
@pytest.mark.parametrize("kind", ["prefix_probability", "truncate_probability"])
def test_documents_with_one_maskable_token_are_left_alone(word: str, kind: str) -> None:
    certain: dict[str, Any] = {kind: 1.0}
    drawn, _ = draw_word(word, None, Objective(**certain), rows=500)
    assert torch.equal(drawn.maskable, flags(word, "r", 500))
    assert torch.equal(drawn.layout.is_token, flags(word, "rsi", 500))


def test_documents_of_a_row_are_cut_independently() -> None:
    objective = Objective(prefix_probability=0.3, truncate_probability=0.5)
    drawn, _ = draw_word("rrrrrrrr", "00001111", objective)
    prefixed = (~drawn.maskable & drawn.layout.is_token).view(ROWS, 2, 4).any(dim=2)
    cut = (~drawn.layout.is_token).view(ROWS, 2, 4).any(dim=2)
    assert_rate(prefixed, 0.3)
    assert_rate(cut, 0.5)
    assert_rate(cut[:, 0] & prefixed[:, 1], 0.15)
    assert_rate(cut.all(dim=1), 0.25)
    # Neither is tied to the document's rate.
    t = drawn.t.view(ROWS, 2, 4)[:, :, 0]
    assert_uniform((t[cut] * 20).long().clamp(max=19), 20)


@pytest.mark.parametrize(
    ("share", "opened"),
    [
        (0.0, [0, 1, 4, 6, 7, 9, 10]),
        (0.3, [1, 4, 6, 7, 9, 10]),
        (0.6, [6, 7, 10]),
        (0.99, [7, 10]),
        (1.0, []),
    ],
)
def test_the_leading_share_of_a_documents_source_stays_context(share: float, opened: list[int]) -> None:
    # Five source tokens in the first document, two in the second: 0.3 keeps one of the five, none of two.
    word, documents = "ssrrsrss_ssr", "000000009111"
    drawn, _ = draw_word(word, documents, Objective(source_share=share), rows=1)
    response = [i for i, letter in enumerate(word) if letter == "r"]
    assert drawn.maskable[0].nonzero()[:, 0].tolist() == sorted(response + opened)
    _, inputs = draw_word(word, documents, Objective(), rows=1)  # without source it opens nothing
    without = corrupt(inputs._replace(source=None), Objective(source_share=share), SEEDS[:1])
    assert torch.equal(without.maskable, inputs.maskable)


# S3: cells


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("row", WORDS)
def test_cells_mask_each_position_at_exactly_t_whatever_size_and_phase(
    row: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The proof, on the code itself: for a given size and phase, let every cell's uniform be below t or
    # not, in all ways; add up the probabilities of those ways in which a position is masked.
    word, documents = WORDS[row]
    probability, units = 0.375, (len(word) - 2) // size + 2
    states = torch.tensor(list(product([False, True], repeat=units)))
    weight = torch.where(states, probability, 1 - probability).double().prod(dim=1)
    objective = Objective(block_masking_probability=1, mask_block_sizes=(size,))
    for phase in range(size):

        def below(limit: Any, seed: Tensor, stream: int, key: int) -> Tensor:
            return torch.full_like(seed, {1: 0, 2: phase}[key])  # noqa: B023

        def uniform(seed: Tensor, stream: int, *keys: Any) -> Tensor:
            if stream == STREAM_MASK:
                return torch.where(states.gather(1, keys[0]), 0.0, 0.99)
            return torch.zeros(seed.shape)

        with monkeypatch.context() as patch:
            patch.setattr(module, "keyed_below", below)
            patch.setattr(module, "keyed_uniform", uniform)
            rate = (probability - objective.eps) / (1 - objective.eps)
            strata = torch.full((len(states),), rate)
            drawn, _ = draw_word(word, documents, objective, rows=len(states), strata=strata)
        is_masked, maskable = drawn.is_masked, drawn.maskable
        torch.testing.assert_close(drawn.t, torch.full_like(drawn.t, probability))
        assert torch.equal(maskable, flags(word, "r", len(states)))
        rates = (weight[:, None] * is_masked).sum(dim=0)
        torch.testing.assert_close(rates, probability * maskable[0].double(), rtol=0, atol=1e-12)
        # A cell is masked as a whole or not at all.
        cell = (drawn.layout.position[0] + phase) // size
        for left, right in product(maskable[0].nonzero()[:, 0].tolist(), repeat=2):
            together = torch.equal(is_masked[:, left], is_masked[:, right])
            assert together == bool(cell[left] == cell[right])


def test_share_sizes_and_phases_of_documents_in_cells() -> None:
    # Found from the masks alone. Two documents of 128 tokens a row at t = 1/2: a grid of cells fits masks of 64
    # tokens that were not made by it with a probability below 1e-4 (they have some 9 cells of 7).
    rows, sizes, length = 4000, (4, 7), 128
    objective = Objective(
        eps=1e-6,
        prefix_probability=0.2,
        truncate_probability=0.2,
        block_masking_probability=0.3,
        mask_block_sizes=sizes,
    )
    word, documents = "r" * 2 * length, "0" * length + "1" * length
    half = torch.full((rows, 2), 0.5)
    seeds = torch.arange(2 * rows).view(rows, 2)
    drawn, _ = draw_word(word, documents, objective, rows=rows, noise_seed=seeds, strata=half)
    is_masked, maskable, is_token = (
        x.view(2 * rows, length) for x in (drawn.is_masked, drawn.maskable, drawn.layout.is_token)
    )
    changes = (is_masked[:, 1:] != is_masked[:, :-1]) & maskable[:, 1:] & maskable[:, :-1]
    column, clear = torch.arange(1, length), maskable.sum(dim=1) >= 64
    fits = {
        (size, phase): clear & ~changes[:, (column + phase) % size != 0].any(dim=1)
        for size in sizes
        for phase in range(size)
    }
    in_cells = torch.stack(list(fits.values())).any(dim=0)
    # Drawn apart from S1 and S2, and of each document for itself.
    cut, prefixed = ~is_token[:, -1], ~maskable[:, 0]
    for some in (cut, prefixed, ~cut & ~prefixed):
        assert (some & clear).sum() > 700
        assert_rate(in_cells[some & clear], 0.3)
    both = clear.view(rows, 2).all(dim=1)
    assert_rate(in_cells.view(rows, 2)[both].all(dim=1), 0.09)
    chosen = torch.cat([torch.full((int(fit.sum()),), sizes.index(size)) for (size, _), fit in fits.items()])
    assert_uniform(chosen, 2)
    for size in sizes:
        some = [torch.full((int(fits[size, phase].sum()),), phase) for phase in range(size)]
        assert_uniform(torch.cat(some), size)


# Rates


@pytest.mark.parametrize("eps", [1e-6, 1e-3, 0.2])
def test_rates_of_the_schedules(eps: float) -> None:
    s = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(masking_rate(s, Objective(eps=eps)), eps + (1 - eps) * s)
    both = masking_rate(s, Objective(eps=eps, complementary=True))
    torch.testing.assert_close(both, eps + (1 - 2 * eps) * s)
    cosine = masking_rate(s, Objective(eps=eps, schedule="cosine"))
    # s' = asin(t) / (pi / 2) runs evenly from that of eps to 1.
    angle = torch.asin(cosine) / (math.pi / 2)
    first = math.asin(eps) / (math.pi / 2)
    torch.testing.assert_close(angle, first + (1 - first) * s, rtol=0, atol=1e-6)
    for schedule in ("linear", "cosine"):
        least, most = masking_rate(torch.tensor([0, 1 - 2**-24]), Objective(eps=eps, schedule=schedule))
        assert torch.tensor(eps) <= least < most <= 1  # eps as float32 holds it


# Strata


def test_strata_take_the_place_of_the_uniforms() -> None:
    strata = low_discrepancy(0, 0, torch.arange(ROWS), ROWS)
    drawn, _ = draw_word("srr", None, Objective(schedule="cosine"), strata=strata)
    assert torch.equal(drawn.t, masking_rate(strata, Objective(schedule="cosine"))[:, None].expand(ROWS, 3))
    assert_masked_at_the_recorded_rate(drawn)
    by_document = low_discrepancy(0, 0, torch.arange(3 * 500), 3 * 500).view(500, 3)
    drawn, _ = draw_word("rrr__rr", "0019912", Objective(), rows=500, strata=by_document)
    rates = masking_rate(by_document, Objective())
    assert torch.equal(drawn.t[:, [0, 1, 2, 5, 6]], rates[:, [0, 0, 1, 1, 2]])


@pytest.mark.parametrize("stratified", [True, False])
def test_rates_of_blocks_are_uniform(stratified: bool) -> None:
    strata = low_discrepancy(0, 0, torch.arange(ROWS), ROWS) if stratified else None
    word = "ssrrrrrrr"
    drawn, _ = draw_word(word, None, Objective(eps=1e-6), strata=strata, block_length=2)
    assert drawn.block is not None
    t = drawn.t
    assert drawn.block[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    for first in (2, 4, 6):
        assert torch.equal(t[:, first], t[:, first + 1])
        assert not torch.equal(t[:, first], t[:, first + 2])
    for column in (2, 4, 6, 8):
        assert_uniform((t[:, column] * 50).long().clamp(max=49), 50)
        if stratified:  # each block's strata are as even as the step's
            gaps = t[:, column].double().sort().values.diff()
            assert gaps.max() < 1.02 / ROWS
    assert_masked_at_the_recorded_rate(drawn)


# Seeds


def test_draws_without_seeds_follow_the_generator_and_those_with_seeds_do_not_touch_it() -> None:
    def draw(**seeds: Any) -> Noised:
        return draw_word("rrrr", "0011", Objective(), rows=50, **seeds)[0]

    torch.manual_seed(3)
    first, again = draw(noise_seed=None), draw(noise_seed=None)
    torch.manual_seed(3)
    assert torch.equal(draw(noise_seed=None).is_masked, first.is_masked)
    assert not torch.equal(first.is_masked, again.is_masked)
    t = first.t  # one a document
    assert torch.equal(t[:, 0], t[:, 1]) and torch.equal(t[:, 2], t[:, 3])
    assert (t[:, 0] != t[:, 2]).all()
    before, keyed = torch.get_rng_state(), draw()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(77)
    assert torch.equal(draw().is_masked, keyed.is_masked)


# Complementary masks


@pytest.mark.parametrize("row", WORDS)
def test_a_draw_and_its_complement_mask_each_maskable_token_once(row: str) -> None:
    objective = Objective(**ALL, complementary=True, eps=0.2)
    drawn, inputs = draw_word(*WORDS[row], objective, rows=2000)
    other = drawn.complement(inputs)
    assert torch.equal(drawn.is_masked ^ other.is_masked, drawn.maskable)
    assert not (drawn.is_masked & other.is_masked).any()
    torch.testing.assert_close(drawn.t + other.t, torch.ones_like(drawn.t))
    assert drawn.t.min() >= 0.2
    assert drawn.t.max() <= 0.8
    assert torch.equal(other.x_t, torch.where(other.is_masked, MASK, inputs.input_ids))
    for mine, its in ((drawn.layout, other.layout), (drawn.maskable, other.maskable)):
        assert mine is its


def test_documents_of_a_row_with_one_seed_are_noised_independently() -> None:
    # Two documents of the same length and positions, one seed a row.
    rows = 4000
    drawn, _ = draw_word("rrrrrr", "000111", Objective(), rows=rows, noise_seed=SEEDS[:rows])
    # The correlation of independent uniforms has standard deviation 1 / sqrt(rows): five of them.
    assert abs(torch.corrcoef(drawn.t[:, [0, 3]].T)[0, 1]) < 5 / rows**0.5
    alone, _ = draw_word("rrr", None, Objective(), rows=rows)
    assert torch.equal(alone.is_masked, drawn.is_masked[:, :3])

"""From logits to tokens. The seeds are fixed, so chi-square tests never fail by chance; with other seeds each
would one time in a million."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import chi_square_p
from torch import Tensor

from unmask.generation import sampling
from unmask.generation.sampling import (
    FIGURES,
    Group,
    Logits,
    Sampled,
    draw,
    invert,
    keep_top_p,
    suppress_,
    uniforms,
)

VOCAB = 6
LOGITS = torch.tensor([1.5, 0.0, -1.0, 0.5, -3.0, 1.0], dtype=torch.float64)


def sample(
    logits: Tensor, uniform: Tensor | None = None, temperature: float = 1.0, **settings: Any
) -> Sampled:
    """Draw one token of each row; without uniforms the most likely."""
    rows = torch.arange(len(logits))
    temperature = 0.0 if uniform is None else temperature
    return draw(Logits.of(logits), [Group(rows, rows, temperature=temperature, **settings)], uniform)


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
    raised = torch.tensor([0.0, 0, 9, 0, 0, 0], dtype=torch.float64)
    other = sample(LOGITS[None], process=lambda index, logits: logits + raised)
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


def table(count: int, vocab: int, seed: int = 0) -> Tensor:
    """Peaked logits, with ties within and between pieces of the vocabulary."""
    make = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, vocab, generator=make) * 4
    for row in range(0, count, 3):
        tied = torch.randint(0, vocab, (3,), generator=make)
        logits[row, tied] = logits[row].max() + 0.5
    return logits


def plain(logits: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """All probabilities of a group's positions, in float64; the most likely tokens; the margins."""
    own = logits[group.source].double()
    if group.unconditional is not None:
        own += group.guidance_scale * (own - logits[group.unconditional].double())
    if group.forbidden is not None:
        own[:, group.forbidden[group.forbidden < own.shape[1]]] = -torch.inf
    p = torch.softmax(own, dim=-1)
    first, second = p.topk(2, dim=-1).values.unbind(dim=-1)
    return p, (p == first[:, None]).long().argmax(dim=-1), first - second


def shift_ids(index: Tensor, logits: Tensor) -> Tensor:
    """A logits processor: token i is as likely as token i - 1 was."""
    return logits.roll(1, dims=-1)


def groups_of(count: int, vocab: int) -> list[Group]:
    """Positions dealt out, in no order, to groups of every kind."""
    end = torch.arange(vocab - 50, vocab + 5)
    kinds: list[dict[str, Any]] = [
        {"forbidden": end},
        {"forbidden": torch.tensor([3, vocab - 1, 0, vocab // 2])},
        {"figures": frozenset({"confidence"}), "forbidden": end},
        {"temperature": 1.0, "forbidden": end},
        {"temperature": 0.3, "figures": frozenset({"margin"})},
        {"temperature": 0.8, "top_k": 5},
        {"temperature": 2.0, "top_p": 0.7, "forbidden": end},
        {"process": shift_ids, "forbidden": end},
        {"process": shift_ids, "temperature": 1e-6},
        {"guidance_scale": 1.5},
        {"guidance_scale": 0.5, "temperature": 0.01, "figures": frozenset()},
    ]
    kind = torch.arange(count) * 7 % len(kinds)
    groups = []
    for number, settings in enumerate(kinds):
        index = (kind == number).nonzero()[:, 0]
        source = count - 1 - index
        unconditional = count + source if "guidance_scale" in settings else None
        groups.append(Group(index, source, unconditional=unconditional, **settings))
    return groups


@pytest.mark.parametrize("count", [0, 1, 5, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_mixture_of_groups_is_drawn_as_from_all_logits(count: int, dtype: torch.dtype) -> None:
    vocab = 9000  # pieces of 4096, 4096 and 808
    logits, groups = table(2 * count, vocab).to(dtype), groups_of(count, vocab)
    uniform = uniforms(torch.arange(count), torch.arange(count), 0)
    drawn = draw(Logits.of(logits), groups, uniform)
    assert drawn.valid.all() and [len(field) for field in drawn] == [count] * 5
    for group in groups:
        index, found = group.index, Sampled(*(field[group.index] for field in drawn))
        p, token, margin = plain(logits, group)
        if group.temperature in (0, 1e-6):
            chosen = found.token if group.process is None else (found.token - 1) % vocab
            assert (p.gather(1, chosen[:, None])[:, 0] > p.amax(dim=1) * (1 - 1e-5)).all()
            if group.temperature == 0 and group.unconditional is None:  # guidance rounds: ties may be decided
                assert torch.equal(chosen, token)
        elif group.top_k or group.top_p:
            scaled = torch.softmax(p.log() / group.temperature, dim=-1)
            if group.top_k:
                scaled[scaled < scaled.topk(5, dim=-1).values[:, -1:]] = 0
            else:
                scaled[keep_top_p(scaled.log(), 0.7) == -torch.inf] = 0
            assert torch.equal(found.token, invert(scaled, uniform[index]))
        assert (p.gather(1, found.token[:, None]) > 0).all() or group.process is not None
        entropy = -torch.special.xlogy(p, p).sum(dim=-1)
        own = {"confidence": p.gather(1, found.token[:, None])[:, 0], "margin": margin, "entropy": entropy}
        for name in FIGURES:
            expected = own[name] if name in group.figures else torch.zeros_like(margin)
            actual = getattr(found, name)
            assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(actual.double(), expected, rtol=3e-5, atol=3e-6)


def test_a_position_is_drawn_alike_whatever_is_drawn_with_it() -> None:
    count, vocab = 120, 9000
    logits, groups = Logits.of(table(2 * count, vocab)), groups_of(count, vocab)
    uniform = uniforms(torch.arange(count), torch.arange(count), 0)
    together = draw(logits, groups, uniform)
    for group in groups:
        for number in range(0, len(group.index), 4):
            one = group.part(number, number + 1)
            alone = draw(logits, [one._replace(index=torch.zeros(1, dtype=torch.long))], uniform[one.index])
            for field, other in zip(together, alone, strict=True):
                assert torch.equal(field[one.index], other)
    shuffled = draw(logits, groups[::-1], uniform)
    assert all(torch.equal(field, other) for field, other in zip(together, shuffled, strict=True))


@pytest.mark.parametrize("piece", [1, 2, 4])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_sample_by_pieces_is_one_of_the_softmax(
    piece: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "_PIECE", piece)
    count, forbidden = 20_000, torch.tensor([1])
    every, none = torch.arange(count), torch.zeros(count, dtype=torch.long)
    group = Group(every, none, temperature=temperature, forbidden=forbidden)
    drawn = draw(Logits.of(LOGITS[None]), [group], uniforms(every, none, 0))
    logits = suppress_(LOGITS.clone(), forbidden)
    counts = torch.bincount(drawn.token, minlength=VOCAB).double()
    assert chi_square_p(counts, torch.softmax(logits / temperature, dim=0)) > 1e-6
    torch.testing.assert_close(drawn.confidence, torch.softmax(logits, dim=0)[drawn.token])
    assert len(set(drawn.token.tolist())) == 5
    ends = draw(Logits.of(LOGITS[None]), [group.part(0, 2)], torch.tensor([0.0, 1 - 2.0**-53]).double())
    assert ends.token.tolist() == [0, 5]


def test_only_what_is_not_drawn_from_whole_rows_is_asked_for_by_pieces() -> None:
    logits, widths = table(6, 9000), []

    def take(positions: Tensor) -> Any:
        def columns(first: int, last: int) -> Tensor:
            widths.append((len(positions), last - first))
            return logits[positions, first:last]

        return columns

    listed, index = Logits((6, 9000), logits.dtype, logits.device, take, most=4), torch.arange(6)
    draw(listed, [Group(index, index)])
    assert widths == [(4, 4096), (4, 4096), (4, 808), (2, 4096), (2, 4096), (2, 808)]
    widths.clear()
    draw(listed, [Group(index, index, temperature=1.0, top_k=3)], torch.rand(6, dtype=torch.float64))
    assert widths == [(4, 9000), (2, 9000)]


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}, {"process": shift_ids}]
)
def test_logits_that_are_not_finite_spoil_their_own_row_alone(settings: dict[str, Any]) -> None:
    good, index = table(6, 9000), torch.arange(6)
    bad = good.clone()
    bad[1, 4], bad[2, 8999], bad[4] = torch.nan, torch.inf, -torch.inf
    bad[5, :4097] = -torch.inf  # which is allowed: so many tokens have no probability
    uniform = torch.rand(6, dtype=torch.float64)
    drawn = draw(Logits.of(bad), [Group(index, index, **settings)], uniform)
    assert drawn.valid.tolist() == [True, False, False, True, False, True]
    assert drawn.token.min() >= 0 and drawn.token.max() < 9000 and drawn.token[5] >= 4097
    expected = draw(Logits.of(good), [Group(index, index, **settings)], uniform)
    for field, other in zip(drawn, expected, strict=True):
        assert torch.equal(field[[0, 3]], other[[0, 3]])
    nothing = Group(index, index, forbidden=torch.arange(9000), **settings)
    assert not draw(Logits.of(good), [nothing], uniform).valid.any()
    if "temperature" in settings:  # which no float32 divided by it fits
        cold = Group(index, index, **{**settings, "temperature": 1e-39})
        assert not draw(Logits.of(good), [cold], uniform).valid.any()

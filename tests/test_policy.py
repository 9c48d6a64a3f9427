from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import assert_rate, chi_square_p

from unmask.errors import UnmaskError
from unmask.generation.policy import (
    RANKED,
    REMASK,
    Proposal,
    ancestral,
    entropy_bound,
    factor,
    most_confident,
    ranked,
    remask,
    share_steps,
    threshold,
)


@given(canvas=st.integers(1, 200), data=st.data())
@settings(max_examples=100)
def test_steps_are_shared_out_over_the_blocks_in_proportion(canvas: int, data: st.DataObject) -> None:
    block_length = data.draw(st.integers(1, canvas))
    sizes = [min(block_length, canvas - start) for start in range(0, canvas, block_length)]
    steps = data.draw(st.integers(len(sizes), canvas))
    shares = share_steps(steps, sizes)
    assert len(shares) == len(sizes) and sum(shares) == steps
    for share, size in zip(shares, sizes, strict=True):
        assert 1 <= share <= size and abs(share - steps * size / canvas) < 1
    with pytest.raises(UnmaskError, match="steps"):
        share_steps(len(sizes) - 1, sizes)


def test_ties_go_to_the_leftmost_and_counts_may_differ_between_rows() -> None:
    wide = torch.arange(5000)[None] % 3 / 3  # long enough for a sort that does not keep order to show
    chosen = most_confident(wide, torch.ones(1, 5000, dtype=torch.bool), 700)
    assert chosen[0].nonzero()[:, 0].tolist() == list(range(2, 2100, 3))
    chosen = most_confident(
        wide[:, :3].expand(3, -1), wide[:, :3].expand(3, -1) >= 0, torch.tensor([0, 1, 5])
    )
    assert chosen.tolist() == [[False] * 3, [False, False, True], [True] * 3]


# Policies against plain loops over one row.


def test_a_candidate_comes_before_other_positions_whatever_its_score() -> None:
    score, candidates = torch.full((1, 3), -torch.inf), torch.tensor([[False, True, True]])
    assert most_confident(score, candidates, 1).tolist() == [[False, True, False]]


def random_proposal(rows: int = 40, length: int = 9, seed: int = 0, **fields: Any) -> Proposal:
    """A proposal in which all is random: positions masked, committed, or not of the block."""
    make = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 3, (rows, length), generator=make)
    kind[:, 0] = 0
    p = torch.rand(rows, length, generator=make)
    values: dict[str, Any] = {
        "candidates": kind == 0,
        "token": torch.randint(0, 9, (rows, length), generator=make),
        "confidence": p,
        "margin": p * torch.rand(rows, length, generator=make),
        "entropy": -p.log() * torch.rand(rows, length, generator=make),
        "committed": kind == 1,
        "quota": torch.randint(1, 4, (rows,), generator=make),
        "share": torch.ones(rows, dtype=torch.long),
        "step": torch.randint(0, 4, (rows,), generator=make),
        "steps": torch.full((rows,), 6),
        "seed": torch.arange(rows) * 977,
        "position": torch.arange(length).expand(rows, -1),
    }
    return Proposal(**{**values, **fields})


NOTHING = lambda n, p, entropies: False  # noqa: E731
# (policy, key of a position by p, margin, entropy and index, lowest first; whether the n best fit together, by
# the probability of the last and the entropies of all)
LOOPS: list[tuple[Any, Callable[..., float], Callable[..., bool]]] = [
    (partial(ranked, score=RANKED["maskgit_plus"]), lambda p, m, h, i: -p, NOTHING),
    (partial(ranked, score=RANKED["topk_margin"]), lambda p, m, h, i: -m, NOTHING),
    (partial(ranked, score=RANKED["entropy"]), lambda p, m, h, i: h, NOTHING),
    (partial(ranked, score=RANKED["left_to_right"]), lambda p, m, h, i: i, NOTHING),
    *((partial(threshold, threshold=x), lambda p, *_: -p, lambda n, p, hs, x=x: p >= x) for x in (0.2, 0.95)),
    *(
        (partial(factor, factor=x), lambda p, *_: -p, lambda n, p, hs, x=x: (n + 1) * (1 - p) < x)
        for x in (0.3, 1.0, 2.5)
    ),
    *(
        (
            partial(entropy_bound, entropy_bound=x),
            lambda p, m, h, i: h,
            lambda n, p, hs, x=x: sum(hs[:-1]) <= x,
        )
        for x in (0.0, 0.2, 1.0, 100.0)
    ),
]


@pytest.mark.parametrize(("policy", "key", "fits"), LOOPS, ids=map(str, range(len(LOOPS))))
def test_a_policy_takes_the_best_that_fit_or_its_quota(
    policy: Any, key: Callable[..., float], fits: Callable[..., bool]
) -> None:
    proposal = random_proposal()
    figures = torch.stack([proposal.confidence, proposal.margin, proposal.entropy], dim=-1).tolist()
    expected = []
    for row, candidates in enumerate(proposal.candidates):
        open_ = [(*figures[row][index], index) for index in candidates.nonzero()[:, 0].tolist()]
        best = sorted(open_, key=lambda one: key(*one))
        counts = [
            n for n in range(1, len(best) + 1) if fits(n, best[n - 1][0], [h for _, _, h, _ in best[:n]])
        ]
        expected.append(sorted(index for *_, index in best[: max([int(proposal.quota[row]), *counts])]))
    assert [row.nonzero()[:, 0].tolist() for row in policy(proposal)] == expected


def test_the_order_at_a_temperature_is_drawn_without_replacement() -> None:
    """Of two candidates the first is taken with the probability of a softmax; Gumbel's trick against that."""
    n = 8000
    proposal = random_proposal(
        n,
        3,
        candidates=torch.tensor([[True, False, True]]).expand(n, -1),
        confidence=torch.tensor([[0.9, 0.5, 0.7]]).expand(n, -1),
        quota=torch.ones(n, dtype=torch.long),
    )
    taken = ranked(proposal, RANKED["maskgit_plus"], alg_temp=0.5)
    assert not taken[:, 1].any() and (taken.sum(dim=1) == 1).all()
    assert_rate(taken[:, 0], torch.softmax(torch.tensor([0.9, 0.7]) / 0.5, dim=0)[0].item())
    assert ranked(proposal, RANKED["maskgit_plus"], alg_temp=1e-4)[:, 0].all()


def test_random_order_is_one_order_and_uniform() -> None:
    n = 6000
    every = random_proposal(
        n, 3, candidates=torch.ones(n, 3, dtype=torch.bool), quota=torch.ones(n, dtype=torch.long)
    )
    first = ranked(every, RANKED["random"])
    assert torch.equal(first, ranked(every._replace(step=every.step + 1), RANKED["random"]))
    assert_rate(first, 1 / 3)


def test_the_ancestral_sampler_gives_every_token_an_even_step() -> None:
    """The step of a token is uniform, and steps at which nothing would happen do not exist."""
    n, length, steps = 4000, 3, 4
    left, forwards = torch.ones(n, length, dtype=torch.bool), torch.zeros(n, dtype=torch.long)
    every = random_proposal(n, length, steps=torch.full((n,), steps))
    while left.any():
        now = ancestral(every._replace(candidates=left))
        assert (now.any(dim=1) == left.any(dim=1)).all()
        forwards += now.any(dim=1)
        left = left & ~now
    # Distinct values of three uniform draws from four steps: exact by enumeration.
    counts = Counter(len({*draw}) for draw in product(range(steps), repeat=length))
    found = torch.bincount(forwards, minlength=4)[1:].double()
    exact = torch.tensor([counts[k] for k in (1, 2, 3)]).double() / steps**length
    assert chi_square_p(found, exact) > 1e-6


@pytest.mark.parametrize("kind", REMASK)
@pytest.mark.parametrize("eta", [0.2, 1.0])
def test_remasking_leaves_the_share_of_masked_tokens_as_it_is(kind: str, eta: float) -> None:
    """The marginals: after step k of N the expected share committed is k / N, with and without remasking."""
    n, length, steps = 3000, 8, 6
    state = random_proposal(n, length, steps=torch.full((n,), steps))
    confidence = torch.rand(n, length, generator=torch.Generator().manual_seed(3))
    committed = torch.zeros(n, length, dtype=torch.bool)
    again = 0
    for step in range(steps):
        at = torch.full((n,), step)
        proposal = state._replace(candidates=~committed, committed=committed, confidence=confidence, step=at)
        move = remask(proposal, kind, eta)
        assert move.remask is not None
        assert not (move.remask & ~committed).any() and not (move.commit & committed).any()
        again += int(move.remask.sum())
        committed = (committed | move.commit) & ~move.remask
        share = committed.double().mean().item()
        # The mean of n * length draws, of which those of a row depend on one another a little.
        assert abs(share - (step + 1) / steps) < 6 * 0.5 / (n * length) ** 0.5
    assert committed.all() and again > 0


def test_remasking_by_confidence_takes_the_less_sure() -> None:
    n = 4000
    state = random_proposal(n, 4)._replace(
        candidates=torch.tensor([[True, True, False, False]]).expand(n, -1),
        committed=torch.tensor([[False, False, True, True]]).expand(n, -1),
        confidence=torch.tensor([[0.0, 0.0, 0.99, 0.01]]).expand(n, -1),
        step=torch.full((n,), 3),
    )
    shares = remask(state, "remdm_confidence", 0.5).remask
    assert shares is not None
    sure, doubtful = shares.double().mean(dim=0)[2:].tolist()
    assert doubtful / sure == pytest.approx(math.exp(0.98), rel=0.15)

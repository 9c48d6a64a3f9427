"""Which positions to commit at a step: published policies, each a pure function of a draft.

A policy looks at what the model would write everywhere and says where to write it. `Ranked` policies commit
as many tokens as the schedule asks for; the adaptive ones as many as they dare, and never fewer than the
schedule needs to end in time; all of them commit at least one token of each row. `Remask` alone may commit
none at a step, and mask tokens again.

Shapes: R rows, L columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmask.diffusion.rng import STREAM_COMMIT, STREAM_REMASK, keyed_below, keyed_uniform
from unmask.errors import UnmaskError


class Draft(NamedTuple):
    """What the model would write at each position, and where the row stands."""

    candidates: Bool[Tensor, "R L"]
    """Masked positions of the active block that may be committed; the other fields mean nothing elsewhere,
    but for `confidence`."""
    token: Int[Tensor, "R L"]
    confidence: Float[Tensor, "R L"]
    """The model's probability of the token; at committed positions what it was then."""
    margin: Float[Tensor, "R L"]
    entropy: Float[Tensor, "R L"]
    """Nats."""
    committed: Bool[Tensor, "R L"]
    """Positions of the active block that hold a token of the model."""
    quota: Int[Tensor, "R"]
    """Tokens to commit now so that the block ends in time; 1 or more."""
    step: Int[Tensor, "R"]
    """Step of the row within the block, from 0."""
    steps: Int[Tensor, "R"]
    """Steps of the block."""
    seed: Int[Tensor, "R"]
    position: Int[Tensor, "R L"]
    """Index of each token in its row, padding left out: the key of its noise."""


class Move(NamedTuple):
    """What a policy decides."""

    commit: Bool[Tensor, "R L"]
    remask: Bool[Tensor, "R L"] | None = None
    """Committed positions to mask again."""


Policy = Callable[[Draft], Bool[Tensor, "R L"]]
"""Positions to commit, among `draft.candidates`."""


def most_confident(
    score: Float[Tensor, "R L"], candidates: Bool[Tensor, "R L"], count: Int[Tensor, "R"] | int
) -> Bool[Tensor, "R L"]:
    """Select the `count` candidates of each row with the highest score (fewer where there are fewer).

    Ties go to the leftmost position.
    """
    limit = torch.as_tensor(count, device=score.device).reshape(-1, 1)
    return (_rank(score, candidates) < limit) & candidates


def _rank(score: Tensor, candidates: Tensor) -> Int[Tensor, "R L"]:
    """Place of each candidate by its score, the highest first; others come after all of them."""
    order = torch.where(candidates, score, -torch.inf).argsort(dim=1, descending=True, stable=True)
    columns = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, columns)


@dataclass(frozen=True)
class Ranked:
    """Commit as many tokens as the schedule asks for, the highest score first.

    Attributes:
        score: of every position; higher is sooner.
        alg_temp: 0 = in strict order; above it the order is drawn without replacement from
            softmax(score / alg_temp) (Dream, arXiv:2508.15487, and MaskGIT's annealed choice, 2202.04200).
    """

    score: Callable[[Draft], Float[Tensor, "R L"]]
    alg_temp: float = 0.0

    def __call__(self, draft: Draft) -> Bool[Tensor, "R L"]:
        score = self.score(draft)
        if self.alg_temp > 0:
            uniform = keyed_uniform(
                draft.seed[:, None], STREAM_COMMIT, draft.position, draft.step[:, None]
            ).clamp(min=1e-30)
            score = score / self.alg_temp - torch.log(-torch.log(uniform))
        return most_confident(score, draft.candidates, draft.quota)


def random_order(draft: Draft) -> Float[Tensor, "R L"]:
    """Score positions by a draw that depends on seed and position alone."""
    return keyed_uniform(draft.seed[:, None], STREAM_COMMIT, draft.position)


def ancestral(draft: Draft) -> Bool[Tensor, "R L"]:
    """Commit each token at a step of its own, drawn evenly among the block's, whatever the model says.

    This is the reverse process itself on a grid of `steps` times (Sahoo et al., MDLM, arXiv:2406.07524,
    sec. 3.2.2, and Dream's `origin`): under the linear schedule a token that is masked at time t stays so
    until s with probability s / t, so its step is uniform. Drawn beforehand, the steps at which nothing
    happens are skipped exactly.
    """
    when = keyed_below(draft.steps[:, None], draft.seed[:, None], STREAM_COMMIT, draft.position)
    when = torch.where(draft.candidates, when, torch.iinfo(torch.long).max)
    return draft.candidates & (when == when.amin(dim=1, keepdim=True))


@dataclass(frozen=True)
class Threshold:
    """Commit every token of probability `threshold` or more (Fast-dLLM, arXiv:2505.22618, sec. 3.3)."""

    threshold: float

    def __call__(self, draft: Draft) -> Bool[Tensor, "R L"]:
        sure = draft.candidates & (draft.confidence >= self.threshold)
        return sure | most_confident(draft.confidence, draft.candidates, draft.quota)


@dataclass(frozen=True)
class Factor:
    """Commit the n surest tokens, n the largest with (n + 1)(1 - c_n) < factor, c_n the n-th probability.

    Fast-dLLM, arXiv:2505.22618, sec. 3.3: the more at once, the surer each.
    """

    factor: float

    def __call__(self, draft: Draft) -> Bool[Tensor, "R L"]:
        rank = _rank(draft.confidence, draft.candidates)
        fits = draft.candidates & ((rank + 2) * (1 - draft.confidence) < self.factor)
        # (n + 1)(1 - c_n) grows with n: what fits stands before what does not.
        return fits | most_confident(draft.confidence, draft.candidates, draft.quota)


@dataclass(frozen=True)
class EntropyBound:
    """Commit the k tokens of least entropy, k the largest whose entropies but the largest sum to `bound`.

    That sum bounds the mutual information of the tokens committed together, the error of drawing each by
    itself (Ben-Hamu et al., EB-Sampler, arXiv:2505.24857, sec. 4).

    Attributes:
        bound: nats.
    """

    bound: float

    def __call__(self, draft: Draft) -> Bool[Tensor, "R L"]:
        rank = _rank(-draft.entropy, draft.candidates)
        entropy = torch.where(draft.candidates, draft.entropy, 0.0)
        ordered = torch.zeros_like(entropy).scatter_(1, rank, entropy)
        before = ordered.cumsum(dim=1) - ordered  # in ascending order: all but the largest
        fits = draft.candidates & (before.gather(1, rank) <= self.bound)
        return fits | most_confident(-draft.entropy, draft.candidates, draft.quota)


@dataclass(frozen=True)
class Remask:
    """The ancestral sampler that also masks committed tokens again, so that mistakes can be mended.

    Wang et al., ReMDM, arXiv:2503.00307, sec. 3 and 4: from t to s a committed token is masked with
    probability sigma and a masked one committed with (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), which
    leaves the share of masked tokens at every time what it is without remasking. alpha is the share
    committed: step / steps, before and after.

    Attributes:
        kind: "cap" = sigma is `eta` at most; "rescale" = `eta` times the largest sigma there is;
            "confidence" = the same in the mean over the row's committed tokens, of which the less sure ones
            are masked more often, in proportion to softmax(-confidence).
        eta: strength, in (0, 1].
    """

    kind: str
    eta: float

    def __call__(self, draft: Draft) -> Move:
        dtype = torch.float64
        before = (draft.step.to(dtype) / draft.steps)[:, None]
        after = ((draft.step + 1).to(dtype) / draft.steps)[:, None]
        largest = ((1 - after) / before.clamp(min=1e-12)).clamp(max=1.0)
        sigma = largest.clamp(max=self.eta) if self.kind == "cap" else self.eta * largest
        rate = (after - (1 - sigma) * before) / (1 - before)
        if self.kind == "confidence":
            weight = torch.exp(-draft.confidence.to(dtype)) * draft.committed
            sigma = _probabilities(weight, sigma * draft.committed.sum(dim=1, keepdim=True))
        key = (draft.seed[:, None], STREAM_REMASK, draft.position, draft.step[:, None])
        uniform = keyed_uniform(*key)
        commit = draft.candidates & ((uniform < rate) | (draft.step + 1 == draft.steps)[:, None])
        return Move(commit, draft.committed & (uniform < sigma))


def _probabilities(weight: Float[Tensor, "R L"], total: Float[Tensor, "R 1"]) -> Float[Tensor, "R L"]:
    """Scale weights to probabilities that sum to `total`; what would be above 1 is 1."""
    ordered = weight.sort(dim=1, descending=True).values
    certain = torch.arange(weight.shape[1], device=weight.device)  # how many are 1
    rest = ordered.flip(1).cumsum(dim=1).flip(1)
    scale = (total - certain).clamp(min=0) / rest.clamp(min=1e-300)
    first = (scale * ordered <= 1).long().argmax(dim=1, keepdim=True)
    return (weight * scale.gather(1, first)).clamp(max=1.0)


RANKED: dict[str, Callable[[Draft], Float[Tensor, "R L"]]] = {
    "maskgit_plus": lambda draft: draft.confidence,
    "topk_margin": lambda draft: draft.margin,
    "entropy": lambda draft: -draft.entropy,
    "left_to_right": lambda draft: -draft.position.to(draft.confidence.dtype),
    "random": random_order,
}
"""Scores of the ranked policies, under the names that Dream gave them (arXiv:2508.15487)."""
ADAPTIVE = {"threshold": Threshold, "factor": Factor, "entropy_bound": EntropyBound}
REMASK = {"remdm_cap": "cap", "remdm_rescale": "rescale", "remdm_confidence": "confidence"}
POLICIES = (*RANKED, "origin", *ADAPTIVE, *REMASK)


def share_steps(steps: int, sizes: list[int]) -> list[int]:
    """Share `steps` out over blocks of these sizes, in proportion to their tokens, at least one each.

    Raises:
        UnmaskError: fewer steps than blocks.
    """
    if steps < len(sizes):
        raise UnmaskError(f"steps must be at least {len(sizes)}, one for each block; got {steps}.")
    ends, total, done = [0], sum(sizes), 0
    for size in sizes:
        done += size
        ends.append(steps * done // total)
    shares = [end - start for start, end in pairwise(ends)]
    for empty in (index for index, share in enumerate(shares) if share == 0):
        shares[shares.index(max(shares))] -= 1
        shares[empty] = 1
    return shares

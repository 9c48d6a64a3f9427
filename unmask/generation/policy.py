"""Which positions to commit at a step: published policies, each a pure function of a proposal.

`ranked` policies commit as many tokens as the schedule asks for. The adaptive ones (`threshold`, `factor`,
`entropy_bound`) commit as many as the model is confident of, and never fewer than the schedule needs. All of
them commit at least one token of each row. `remask` alone may commit none at a step, and masks tokens again.

Shapes: R rows, L columns.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmask.diffusion.rng import STREAM_COMMIT, STREAM_REMASK, keyed_below, keyed_uniform
from unmask.errors import UnmaskError


class Proposal(NamedTuple):
    """What the model would write at each candidate, and the progress of each row."""

    candidates: Bool[Tensor, "R L"]
    """True = a masked position of the current block: may be committed."""
    token: Int[Tensor, "R L"]
    """What the model would write."""
    confidence: Float[Tensor, "R L"]
    """The model's probability of the token; if committed, as it was then."""
    margin: Float[Tensor, "R L"]
    """That probability minus the next."""
    entropy: Float[Tensor, "R L"]
    """Entropy of the distribution, in nats."""
    committed: Bool[Tensor, "R L"]
    """True = a position of the current block that has a token of the model."""
    quota: Int[Tensor, "R"]
    """Tokens to commit now so that the block ends in time; 1 or more."""
    share: Int[Tensor, "R"]
    """Tokens that the schedule gives to this step, however many were committed before."""
    step: Int[Tensor, "R"]
    """Denoising step of the row within the block, from 0."""
    steps: Int[Tensor, "R"]
    """Denoising steps of the block."""
    seed: Int[Tensor, "R"]
    """Key of the row's noise, with `position`."""
    position: Int[Tensor, "R L"]
    """Index of each token in its row without padding."""


class Decision(NamedTuple):
    """What a policy decides; True = do it."""

    commit: Bool[Tensor, "R L"]
    """Candidates to commit."""
    remask: Bool[Tensor, "R L"] | None = None
    """Committed positions to mask again."""


Policy = Callable[[Proposal], "Bool[Tensor, 'R L'] | Decision"]
"""Proposal -> positions to commit among `candidates`, or a `Decision`."""
Score = Callable[[Proposal], Float[Tensor, "R L"]]


def most_confident(
    score: Float[Tensor, "R L"], candidates: Bool[Tensor, "R L"], count: Int[Tensor, "R"] | int
) -> Bool[Tensor, "R L"]:
    """Select the `count` candidates of each row with the highest score; ties go to the leftmost."""
    limit = torch.as_tensor(count, device=score.device).reshape(-1, 1)
    return (_rank(score, candidates) < limit) & candidates


def _rank(score: Tensor, candidates: Tensor) -> Int[Tensor, "R L"]:
    """Rank of each candidate by its score, 0 = the highest; other positions come after all of them."""
    score = score.clamp(min=torch.finfo(score.dtype).min)  # also above other positions where it is -inf
    order = torch.where(candidates, score, -torch.inf).argsort(dim=1, descending=True, stable=True)
    columns = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, columns)


def ranked(proposal: Proposal, score: Score, alg_temp: float = 0.0) -> Bool[Tensor, "R L"]:
    """Commit as many tokens as the schedule asks for, the highest score first.

    With `alg_temp` above 0 the order is drawn without replacement from softmax(score / alg_temp) (Dream,
    arXiv:2508.15487, and MaskGIT's annealed choice, 2202.04200), by Gumbel's trick.
    """
    values = score(proposal)
    if alg_temp > 0:
        key = (proposal.seed[:, None], STREAM_COMMIT, proposal.position, proposal.step[:, None])
        gumbel = -torch.log(-torch.log(keyed_uniform(*key).clamp(min=1e-30)))
        values = values / alg_temp + gumbel
    return most_confident(values, proposal.candidates, proposal.quota)


def ancestral(proposal: Proposal) -> Bool[Tensor, "R L"]:
    """Commit each token at a uniformly random step of the block, independent of the model's confidence.

    This is the reverse process on a grid of `steps` times (Sahoo et al., MDLM, arXiv:2406.07524, sec. 3.2.2,
    and Dream's `origin`): under the linear schedule a token that is masked at time t stays masked until s
    with probability s / t, so its step is uniform. The steps are drawn beforehand, so that those that would
    commit nothing are skipped exactly.
    """
    step = keyed_below(proposal.steps[:, None], proposal.seed[:, None], STREAM_COMMIT, proposal.position)
    step = torch.where(proposal.candidates, step, torch.iinfo(torch.long).max)
    return proposal.candidates & (step == step.amin(dim=1, keepdim=True))


def threshold(proposal: Proposal, threshold: float) -> Bool[Tensor, "R L"]:
    """Commit every token of probability `threshold` or more (Fast-dLLM, arXiv:2505.22618, sec. 3.3).

    With `steps` at least the most confident ones that the schedule gives to each step (SDAR's dynamic policy,
    arXiv:2510.06303); by default that is one.
    """
    confident = proposal.candidates & (proposal.confidence >= threshold)
    floor = torch.maximum(proposal.quota, proposal.share)
    return confident | most_confident(proposal.confidence, proposal.candidates, floor)


def factor(proposal: Proposal, factor: float) -> Bool[Tensor, "R L"]:
    """Commit the n most confident tokens, n the largest with (n + 1)(1 - c_n) < factor.

    c_n is the n-th highest probability: the more tokens at once, the more confident each has to be
    (Fast-dLLM, arXiv:2505.22618, sec. 3.3).
    """
    rank = _rank(proposal.confidence, proposal.candidates)
    # (n + 1)(1 - c_n) grows with n, so those that fit come first.
    fits = proposal.candidates & ((rank + 2) * (1 - proposal.confidence) < factor)
    return fits | most_confident(proposal.confidence, proposal.candidates, proposal.quota)


def entropy_bound(proposal: Proposal, entropy_bound: float) -> Bool[Tensor, "R L"]:
    """Commit the most tokens of least entropy whose entropies but the largest sum to the bound, in nats.

    That sum bounds the mutual information of the tokens committed together, the error of drawing them
    independently (Ben-Hamu et al., EB-Sampler, arXiv:2505.24857, sec. 4).
    """
    rank = _rank(-proposal.entropy, proposal.candidates)
    entropy = torch.where(proposal.candidates, proposal.entropy, 0.0)
    ordered = torch.zeros_like(entropy).scatter_(1, rank, entropy)
    before = ordered.cumsum(dim=1) - ordered  # in ascending order: all but the largest
    fits = proposal.candidates & (before.gather(1, rank) <= entropy_bound)
    return fits | most_confident(-proposal.entropy, proposal.candidates, proposal.quota)


def remask(proposal: Proposal, kind: str, eta: float) -> Decision:
    """The ancestral sampler that also masks committed tokens again, so that errors can be corrected.

    Wang et al., ReMDM, arXiv:2503.00307, sec. 3 and 4: from t to s a committed token is masked with
    probability sigma and a masked one committed with (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), which
    leaves the expected share of masked tokens unchanged. alpha is the share committed, step / steps.

    Kinds: "remdm_cap" = sigma is at most `eta`; "remdm_rescale" = `eta` times the largest possible sigma;
    "remdm_confidence" = as "remdm_rescale" in the mean over the row's committed tokens, each in proportion to
    softmax(-confidence).
    """
    dtype = torch.float64
    before = (proposal.step.to(dtype) / proposal.steps)[:, None]
    after = ((proposal.step + 1).to(dtype) / proposal.steps)[:, None]
    largest = ((1 - after) / before.clamp(min=1e-12)).clamp(max=1.0)
    sigma = largest.clamp(max=eta) if kind == "remdm_cap" else eta * largest
    rate = (after - (1 - sigma) * before) / (1 - before)
    if kind == "remdm_confidence":
        weight = torch.exp(-proposal.confidence.to(dtype)) * proposal.committed
        sigma = _probabilities(weight, sigma * proposal.committed.sum(dim=1, keepdim=True))
    key = (proposal.seed[:, None], STREAM_REMASK, proposal.position, proposal.step[:, None])
    uniform = keyed_uniform(*key)
    commit = proposal.candidates & ((uniform < rate) | (proposal.step + 1 == proposal.steps)[:, None])
    return Decision(commit, proposal.committed & (uniform < sigma))


def _probabilities(weight: Float[Tensor, "R L"], total: Float[Tensor, "R 1"]) -> Float[Tensor, "R L"]:
    """Scale weights to probabilities that sum to `total`; what would be above 1 is 1."""
    ordered = weight.sort(dim=1, descending=True).values
    ones = torch.arange(weight.shape[1], device=weight.device)  # number of probabilities that are 1
    rest = ordered.flip(1).cumsum(dim=1).flip(1)
    scale = (total - ones).clamp(min=0) / rest.clamp(min=1e-300)
    first = (scale * ordered <= 1).long().argmax(dim=1, keepdim=True)
    return (weight * scale.gather(1, first)).clamp(max=1.0)


def with_ends_last(proposal: Proposal, ends: Int[Tensor, "E"]) -> Proposal:
    """Let end tokens seem the least likely to the policy, so that it commits them when nothing else is left."""
    end = torch.isin(proposal.token, ends) & proposal.candidates
    return proposal._replace(
        confidence=proposal.confidence.masked_fill(end, -1.0),
        margin=proposal.margin.masked_fill(end, -1.0),
        entropy=proposal.entropy.masked_fill(end, torch.inf),
    )


RANKED: dict[str, Score] = {
    "maskgit_plus": lambda proposal: proposal.confidence,
    "topk_margin": lambda proposal: proposal.margin,
    "entropy": lambda proposal: -proposal.entropy,
    "left_to_right": lambda proposal: -proposal.position.to(proposal.confidence.dtype),
    "random": lambda proposal: keyed_uniform(proposal.seed[:, None], STREAM_COMMIT, proposal.position),
}
"""Scores of the ranked policies, under the names that Dream gave them (arXiv:2508.15487)."""
ADAPTIVE: dict[str, Callable[..., Tensor]] = {
    "threshold": threshold,
    "factor": factor,
    "entropy_bound": entropy_bound,
}
REMASK = ("remdm_cap", "remdm_rescale", "remdm_confidence")
POLICIES = (*RANKED, "origin", *ADAPTIVE, *REMASK)
FIGURES = {
    **dict.fromkeys(("maskgit_plus", "threshold", "factor", "remdm_confidence"), "confidence"),
    "topk_margin": "margin",
    **dict.fromkeys(("entropy", "entropy_bound"), "entropy"),
}
"""What a policy asks of the model besides its tokens; nothing if it is not named."""


def share_steps(steps: int, sizes: list[int]) -> list[int]:
    """Divide `steps` over blocks of these sizes, in proportion to their tokens, at least one each.

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

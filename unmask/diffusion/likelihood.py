"""Upper bounds on -log p of a text under a masked-diffusion model, with their standard errors.

    -log p(x) <= E_order [ sum_j -log p(x[o_j] | x[o_1], ..., x[o_j-1]) ]                      (the bound)

for the N maskable tokens of a record, decoded one at a time in a uniformly random order, given its source
tokens: the negative ELBO of the diffusion model (Hoogeboom et al., arXiv:2110.02037). Three estimators:

    exact_k     k uniform on 1..N, a uniformly random set of k tokens masked: N/k * sum of their nll
                (Nie et al., LLaDA, arXiv:2502.09992, eq. 6). Unbiased.
    continuous  t uniform on [eps, 1], each token masked with probability t: 1/t * sum of their nll. It is
                what the training loss estimates, and differs from the bound by O(eps).
    chain       the sum above for whole random orders, N forward passes each. Unbiased; for short texts.

Where all 2^N - 1 sets of masked tokens take no more forward passes, they are enumerated: the bound is then
exact. Under block-causal attention every block is a text by itself, given the blocks before it. All randomness
is a hash of the seed and the record's own tokens; sums are in float64. `docs/math.md` derives it.

Shapes: R records, L columns, N maskable tokens of a record, S draws, P passes of a record, M tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmask.diffusion.attention import per_position
from unmask.diffusion.corrupt import Noised
from unmask.diffusion.rng import GOLDEN, STREAM_MASK, STREAM_SCORE, STREAM_STRATA, STREAM_TIME, keyed_hash
from unmask.errors import UnmaskError

ESTIMATORS = ("exact_k", "continuous", "chain")

_SIZE_BITS = 40  # of the uniforms that subset sizes are made of: each k has probability 1/N to 2^-39
_SILVER = 0x6A09E667F3BCC909  # 2^64 (sqrt(2) - 1), for the blocks of a sample


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: Float[Tensor, "*R"]
    stderr: Float[Tensor, "*R"]


@dataclass(frozen=True)
class Score:
    """Upper bounds on -log p, in nats, one a record or one in all."""

    nll: Float[Tensor, "*R"]
    """The bound of each record given its source tokens, in nats; 0 where nothing is scored."""
    stderr: Float[Tensor, "*R"]
    """Standard error of `nll`, from sampling masks, in nats."""
    num_tokens: Int[Tensor, "*R"]
    """Tokens scored: neither source nor padding."""

    def nats_per_token(self) -> Estimate:
        """`nll` over the tokens scored."""
        count = self.num_tokens.clamp(min=1)
        return Estimate(self.nll / count, self.stderr / count)

    def perplexity(self) -> Estimate:
        """exp(nats per token), with the standard error to first order."""
        mean, stderr = self.nats_per_token()
        return Estimate(mean.exp(), mean.exp() * stderr)

    def bits_per_byte(self, num_bytes: Int[Tensor, "*R"]) -> Estimate:
        """`nll` in bits over the UTF-8 bytes of the tokens scored; infinite for no bytes."""
        bits = math.log(2) * num_bytes
        return Estimate(*(torch.where(nats == 0, 0.0, nats / bits) for nats in (self.nll, self.stderr)))


@dataclass(frozen=True)
class Likelihood(Score):
    """What `likelihood` found out about each record; tensors are on the CPU, floats in float64."""

    token_nll: Float[Tensor, "R L"]
    """What each token contributes to `nll`, in nats, averaged over what may be known when it is decoded; 0
    where nothing is scored."""
    mixture_nll: Float[Tensor, "R"] | None
    """With "chain": -log of the mean probability over the orders. It is at most `nll`, and bounds -log p from
    above in expectation (Burda et al., arXiv:1509.00519); where all sets are enumerated it is the exact
    -log p of the model that decodes in a random order."""
    draw_nll: Float[Tensor, "R S"]
    """The bound of each draw, of which `nll` is the mean: draws 2i and 2i + 1 are of one stratum. Where all sets
    are enumerated every entry is `nll`. The difference of two records with one key has the standard error that
    `error_of_pairs` finds for the difference of their rows."""
    passes: Int[Tensor, "R"]
    """Forward passes of each record."""
    record_key: Int[Tensor, "R"]
    """What the masks of each record are drawn from: equal records are masked alike, so their errors add up."""

    @property
    def num_forwards(self) -> int:
        """Sequences that went through the model."""
        return int(self.passes.sum())

    def total(self) -> Score:
        """The sum over the records, with the standard error of independent estimates."""
        return total(self.nll, self.stderr, self.num_tokens, self.record_key)


def total(
    nll: Float[Tensor, "R"],
    stderr: Float[Tensor, "R"],
    num_tokens: Int[Tensor, "R"],
    record_key: Int[Tensor, "R"],
) -> Score:
    """Add up the fields of one `Likelihood`, or of several put end to end."""
    _, group = record_key.unique(return_inverse=True)
    error = torch.zeros_like(stderr).index_add_(0, group, stderr)
    return Score(nll.sum(), error.square().sum().sqrt(), num_tokens.sum())


# Exactly-k masking, of the held-out loss and of the estimator "exact_k".


class Masks(NamedTuple):
    """k of the n maskable tokens of each sample, or of each block of it."""

    is_masked: Bool[Tensor, "*L"]
    size: Int[Tensor, "*L"]
    """n of the token's sample or block; 0 where nothing can be masked."""
    k: Int[Tensor, "*L"]
    """How many of them are masked."""


def exactly_k(
    number: Int[Tensor, "*M"],
    group: Int[Tensor, "*M"],
    bits: Int[Tensor, "*M"],
    stratum: Int[Tensor, "..."] | int = 0,
    strata: int = 1,
) -> Masks:
    """Mask the k tokens of each group with the smallest of their random numbers.

    k = 1 + floor(size * u) with u = (stratum + (bits mod 2^40) / 2^40) / strata, in integers alone: over all
    strata and uniform bits each k in 1..size is equally likely, to 2^-39. Rounding in floating point would
    not do: half to even draws even counts more often than odd ones.

    Args:
        bits: random integers, equal within a group.
    """
    rank, size = rank_in_group(number, group)
    k = 1 + (size * stratum + (size * (bits & (2**_SIZE_BITS - 1)) >> _SIZE_BITS)) // strata
    return Masks(rank < k, size, k)


def rank_in_group(
    number: Int[Tensor, "*M"], group: Int[Tensor, "*M"]
) -> tuple[Int[Tensor, "*M"], Int[Tensor, "*M"]]:
    """Rank each number among those of its group, from 0, and count the group."""
    _, flat, sizes = group.flatten().unique(return_inverse=True, return_counts=True)
    order = number.flatten().argsort()
    order = order[flat[order].argsort(stable=True)]
    start = (sizes.cumsum(dim=0) - sizes)[flat[order]]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - start
    return rank.view(number.shape), sizes[flat].view(number.shape)


def exact_masks(noised: Noised, sample_ids: Int[Tensor, "..."], seed: int) -> Masks:
    """Mask k of the n maskable tokens of each sample, or of each block of it, for the held-out loss.

    The shares k/n are spread evenly over the samples: they follow a low-discrepancy sequence in the sample's
    number. Both are functions of (seed, sample id, noise seed) alone.

    Args:
        noised: says what is maskable, and has each document's noise seed, from which the tokens are chosen.
        sample_ids: of rows (B,) or of their documents (B, D).
        seed: of the run: where in its cycle the sequence of shares starts.
    """
    layout, maskable = noised.layout, noised.maskable
    block = torch.zeros_like(layout.document) if noised.block is None else noised.block
    row, length = torch.arange(len(maskable), device=maskable.device)[:, None], maskable.shape[1]
    group = torch.where(maskable, (row * length + layout.document) * length + block, -1)
    number = keyed_hash(noised.seed, STREAM_MASK, layout.position)
    start = keyed_hash(torch.tensor(seed, device=maskable.device), STREAM_STRATA)
    bits = (per_position(layout, sample_ids) * GOLDEN + block * _SILVER + start) >> (64 - _SIZE_BITS)
    masks = exactly_k(number, group, bits)
    return Masks(masks.is_masked & maskable, masks.size * maskable, masks.k * maskable)


# The estimators: which passes a record takes, and what their nlls amount to.


class Plan(NamedTuple):
    """The forward passes that one record takes, and what their nlls amount to."""

    draw: Int[Tensor, "P"]
    """Draw that each pass is a part of."""
    num_draws: int
    passes: Iterable[tuple[Tensor, Tensor]]
    """is_masked (N,) and the weight of each masked token's nll (N,) of each pass."""
    finish: Callable[[Tensor], tuple[Tensor, float, float]]
    """Weighted nlls of each draw (S, N) -> nll of each token (N,), standard error of their sum, mixture nll."""


def sampled_sets(is_masked: Bool[Tensor, "S N"], weight: Float[Tensor, "S N"]) -> Plan:
    """Mask a set of tokens in each draw, in pairs of one stratum: one pass a draw, none for an empty set."""
    drawn = is_masked.any(dim=1).nonzero()[:, 0]

    def finish(values: Tensor) -> tuple[Tensor, float, float]:
        return values.mean(dim=0), error_of_pairs(values.sum(dim=1)).item(), math.nan

    return Plan(drawn, len(weight), zip(is_masked[drawn], weight[drawn], strict=True), finish)


def error_of_pairs(draws: Float[Tensor, "*R S"]) -> Float[Tensor, "*R"]:
    """Standard error of the mean of draws, each two of which are of one stratum.

    (a - b)^2 / 4 estimates the variance of a pair's mean without bias, whatever its stratum's mean is.
    """
    a, b = draws.unflatten(-1, (-1, 2)).unbind(dim=-1)
    return (a - b).square().sum(dim=-1).sqrt() / draws.shape[-1]


def sampled_chains(block: Int[Tensor, "N"], rank: Int[Tensor, "S N"]) -> Plan:
    """Decode the tokens of each block one at a time, in the order of `rank`, all blocks at once."""
    step = torch.arange(int(rank.max()) + 1)[:, None]
    passes = (one for row in rank for one in zip(row >= step, (row == step).double(), strict=True))

    def finish(values: Tensor) -> tuple[Tensor, float, float]:
        stderr = values.sum(dim=1).std().item() / math.sqrt(len(values))
        blocks = values.new_zeros(len(values), int(block.max()) + 1).index_add_(1, block, values)
        mixture = (math.log(len(values)) - torch.logsumexp(-blocks, dim=0)).sum().item()
        return values.mean(dim=0), stderr, mixture

    return Plan(torch.arange(len(rank)).repeat_interleave(len(step)), len(rank), passes, finish)


def all_sets(block: Int[Tensor, "N"]) -> Plan:
    """Mask every non-empty set of tokens of each block, once: draw s masks those at the bits of s + 1."""
    index, size = rank_in_group(torch.arange(len(block)), block)
    longest, blocks = int(size.max()), int(block.max()) + 1
    sets = torch.arange(1, 2**longest)[:, None]
    bits = sets >> torch.arange(longest) & 1
    # Blocks that are shorter than the longest have no token at its higher bits, and fewer sets.
    is_masked = bits[:, index].bool() & (sets < 2**size)
    weight = torch.ones(is_masked.shape, dtype=torch.float64)

    def finish(values: Tensor) -> tuple[Tensor, float, float]:
        # A set of k is what is masked at some step of a random order with probability 1 / C(n, k), and each
        # of its tokens is then decoded with probability 1 / k.
        comb = torch.tensor([[math.comb(n, k) for k in range(longest + 1)] for n in range(longest + 1)])
        k = bits.sum(dim=1, keepdim=True)
        share = is_masked / (k * comb[size, k]).clamp(min=1).double()
        return (values * share).sum(dim=0), 0.0, mixture(values)

    def mixture(values: Tensor) -> float:
        """-log p of the model that decodes in a uniformly random order, by dynamic programming over sets:
        p(set) is the mean over its tokens of p(token | set masked) * p(set without it)."""
        nll = values.new_zeros(len(values), longest, blocks)
        nll[:, index, block] = values
        log_p = values.new_zeros(len(values) + 1, blocks)
        for row, has in enumerate(bits.bool()):
            members = has.nonzero()[:, 0]
            rest = log_p[row + 1 - 2**members] - nll[row, members]
            log_p[row + 1] = torch.logsumexp(rest, dim=0) - math.log(len(members))
        whole = torch.zeros(blocks, dtype=torch.long).index_copy(0, block, 2**size - 1)
        return -log_p[whole, torch.arange(blocks)].sum().item()

    return Plan(torch.arange(len(sets)), len(sets), zip(is_masked, weight, strict=True), finish)


def plan_passes(
    key: int, index: Int[Tensor, "N"], block: Int[Tensor, "N"], estimator: str, num_samples: int, eps: float
) -> Plan:
    """Draw the masks of one record: the passes that its estimator takes.

    Args:
        key: hash that all its randomness is a function of.
        index: position within the record of each of its maskable tokens.
        block: their blocks, from 0 without gaps.
    """
    longest = int(block.bincount().max())
    most = num_samples * longest if estimator == "chain" else num_samples
    if estimator != "continuous" and longest < 62 and 2**longest - 1 <= most:
        return all_sets(block)
    draw, seed = torch.arange(num_samples)[:, None], torch.tensor(key)
    of_token = keyed_hash(seed, STREAM_MASK, draw, index)  # (S, N)
    of_block = keyed_hash(seed, STREAM_TIME, draw, block)
    stratum, strata = draw // 2, num_samples // 2
    if estimator == "continuous":
        t = eps + (1 - eps) * (stratum + _uniform(of_block)) / strata
        return sampled_sets(_uniform(of_token) < t, 1 / t)
    group = draw * (int(block.max()) + 1) + block
    if estimator == "chain":
        return sampled_chains(block, rank_in_group(of_token, group)[0])
    masks = exactly_k(of_token, group, of_block, stratum, strata)
    return sampled_sets(masks.is_masked, masks.size / masks.k.double())


def _uniform(hashed: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The low 53 bits of a hash as a float64 in [0, 1)."""
    return (hashed & (2**53 - 1)).double() * 2.0**-53


def likelihood(
    model: Any,
    batch: Mapping[str, Any],
    *,
    estimator: str = "exact_k",
    num_samples: int = 64,
    seed: int = 0,
    eps: float | None = None,
    batch_size: int = 16,
    record_key: Int[Tensor, "R"] | None = None,
    advance: Callable[[float], object] | None = None,
) -> Likelihood:
    """Estimate an upper bound on -log p of each record of a batch, in nats, with its standard error.

    Args:
        model: a diffusion model; it is scored in eval mode and left in the mode it was in.
        batch: input_ids (R, L); optionally attention_mask (R, L), 1 = token, and src_mask (R, L),
            True = prompt: given, never masked. Without src_mask all tokens are scored.
        estimator: "exact_k", "continuous" or "chain"; see the head of this module.
        num_samples: draws a record, an even number: forward passes of "exact_k" and "continuous", orders of
            "chain". The standard error falls with its square root, or faster.
        seed: what the masks are drawn from, with the record's own tokens.
        eps: smallest t of "continuous", in (0, 1); that of the model's training by default.
        batch_size: sequences in one forward pass; it changes no result.
        record_key: what the masks of each record are drawn from, instead of `seed` and its own tokens. Records
            with one key are masked alike wherever they have the same positions (common random numbers), so
            that their difference has a smaller error than either.
        advance: told after each forward pass how many records it amounts to, a fraction.

    Raises:
        UnmaskError: an unknown estimator or a setting out of range.
        ValueError: packed rows, or masks of another shape; see `prepare`.

    Examples:
        >>> unmask.likelihood(model, batch).total().nats_per_token()  # doctest: +SKIP
        Estimate(value=tensor(1.0347, dtype=torch.float64), stderr=tensor(0.0121, dtype=torch.float64))
    """
    check_settings(estimator, num_samples, seed, eps, batch_size)
    eps = float(model.config.noise_eps) if eps is None else eps
    advance = advance or (lambda records: None)
    if batch.get("segment_ids") is not None:
        raise ValueError("likelihood scores one record a row; got packed rows (segment_ids).")
    names = ("input_ids", "attention_mask", "src_mask")
    given = {name: batch[name].cpu() for name in names if batch.get(name) is not None}
    inputs = model.prepare(**given, training_mode="sft" if "src_mask" in given else "pretrain")
    ids = inputs.input_ids
    is_token, maskable = inputs.layout.is_token, inputs.maskable
    block = inputs.block_index(inputs.layout, maskable)
    block = torch.zeros_like(ids) if block is None else block
    # Tokens first, in order: the model is shown no column that is padding in every record.
    columns = is_token.long().argsort(dim=1, descending=True, stable=True)
    ids, is_token, maskable, block = (x.gather(1, columns) for x in (ids, is_token, maskable, block))
    source, lengths, position = is_token & ~maskable, is_token.sum(dim=1), torch.arange(ids.shape[1])
    each = keyed_hash(seed, STREAM_SCORE, position, ids, source.long())
    keys = keyed_hash(torch.where(is_token, each, 0).sum(dim=1), lengths)
    keys = keys if record_key is None else record_key
    draw_nll = torch.zeros(len(keys), num_samples, dtype=torch.float64)
    passes = torch.zeros_like(keys)
    token_nll = torch.zeros(ids.shape, dtype=torch.float64)
    nll, stderr, mixture = torch.zeros(3, len(keys), dtype=torch.float64)
    begun: dict[int, tuple[Plan, list[Tensor]]] = {}  # plans of records, with the weighted nlls of each pass

    def all_passes() -> Iterator[tuple[int, Tensor, Tensor]]:
        """(row, is_masked, weight); rows of like length go together, for the least padding."""
        for row in lengths.argsort(stable=True).tolist():
            index = maskable[row].nonzero()[:, 0]
            if not len(index):
                advance(1.0)
                continue
            blocks = block[row, index].unique(return_inverse=True)[1]
            plan = plan_passes(int(keys[row]), index, blocks, estimator, num_samples, eps)
            begun[row] = plan, []
            if not len(plan.draw):
                advance(1.0)
            yield from ((row, *one) for one in plan.passes)

    todo = all_passes()
    with _eval_mode(model):
        while some := list(islice(todo, batch_size)):
            of_pass, is_masked, weight = zip(*some, strict=True)
            rows = torch.tensor(of_pass)
            width = int(lengths[rows].max())
            shown, tokens, given, free = (x[rows, :width] for x in (ids, is_token, source, maskable))
            masked = torch.zeros_like(free).masked_scatter(free, torch.cat(is_masked))
            found = model.masked_nll(*(x.to(model.device) for x in (shown, masked, tokens, given)))
            table = torch.zeros(masked.shape, dtype=torch.float64)
            table[masked] = found.double().cpu()
            weighted = table[free] * torch.cat(weight)
            for row, of_tokens in zip(of_pass, weighted.split(list(map(len, weight))), strict=True):
                plan, parts = begun[row]
                parts.append(of_tokens)
                advance(1 / len(plan.draw))
                if len(parts) == len(plan.draw):
                    values = torch.zeros(plan.num_draws, len(of_tokens), dtype=torch.float64)
                    values.index_add_(0, plan.draw, torch.stack(parts))
                    per_token, stderr[row], mixture[row] = plan.finish(values)
                    token_nll[row, maskable[row]], nll[row] = per_token, per_token.sum()
                    enumerated = plan.num_draws != num_samples or stderr[row] == 0
                    draw_nll[row] = nll[row] if enumerated else values.sum(dim=1)
                    passes[row] = len(plan.draw)
                    del begun[row]
    token_nll = torch.zeros_like(token_nll).scatter(1, columns, token_nll)
    mixture_nll = mixture if estimator == "chain" else None
    return Likelihood(nll, stderr, maskable.sum(dim=1), token_nll, mixture_nll, draw_nll, passes, keys)


@contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    """Evaluate without gradients, and leave each module in the mode it was in."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in was_training:
            module.training = True


def check_settings(
    estimator: str, num_samples: int, seed: int, eps: float | None = None, batch_size: int = 1
) -> None:
    """Refuse settings of `likelihood` that cannot be used.

    Raises:
        UnmaskError: names the setting, what it must be and what it was.
    """
    rate = eps is None or (estimator == "continuous" and 0 < eps < 1)
    for name, value, fits, expected in (
        ("estimator", estimator, estimator in ESTIMATORS, f"one of {', '.join(ESTIMATORS)}"),
        ("num_samples", num_samples, num_samples >= 2 and num_samples % 2 == 0, "even, and at least 2"),
        ("seed", seed, -(2**63) <= seed < 2**63, "an integer of at most 64 bits"),
        ("eps", eps, rate, "in (0, 1), and is for estimator 'continuous' alone"),
        ("batch_size", batch_size, batch_size >= 1, "at least 1 sequence"),
    ):
        if not fits:
            raise UnmaskError(f"{name} must be {expected}; got {value!r}.")

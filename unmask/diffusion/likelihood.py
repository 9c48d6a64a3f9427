"""Upper bounds on -log p of a text under a masked-diffusion model, with their standard errors.

The N maskable tokens of a record are decoded one at a time in a uniformly random order, each given all
that is known by then; what is never masked (a prompt) is known from the start, and so is N. By Jensen

    -log p(x) <= E_order [ sum_j -log p(x[o_j] | x[o_1], ..., x[o_j-1]) ]                      (the bound)

which is the negative ELBO of the diffusion model too (Hoogeboom et al., arXiv:2110.02037). The three
estimators differ in how they sample it:

    exact_k     k uniform on 1..N, a uniformly random set of k tokens masked: N/k * sum of their nll
                (Nie et al., LLaDA, arXiv:2502.09992, eq. 6). Unbiased.
    continuous  t uniform on [eps, 1], each token masked with probability t: 1/t * sum of their nll. It is
                what the training loss estimates; leaving out t < eps makes it differ from the bound by
                O(eps).
    chain       the sum above for whole random orders, N forwards each. Unbiased; for short texts.

The first two are stratified: n draws lie in n / 2 strata of k or t, two independent ones in each, which
give an unbiased variance. Where all 2^N - 1 sets of masked tokens take no more forwards than sampling would,
"exact_k" and "chain" go through them instead: the bound is then exact, with standard error 0.

Under block-causal attention the chain rule over blocks comes first: every block is a text of its own, given
the blocks before it, and one forward masks something in all of them. With blocks of one token that is one
forward and the likelihood of the autoregressive model. A bidirectional model has one block a record.

All randomness is a hash of the seed and the record's own tokens, so a score depends neither on the batch,
nor on padding, nor on the record's place. Everything is summed in float64.

Shapes: R records, L columns, N maskable tokens of a record, S draws, P passes through the model, C blocks,
B rows and M masked tokens of one forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmask.diffusion.attention import block_index, row_layout
from unmask.diffusion.corrupt import Noised
from unmask.diffusion.rng import (
    GOLDEN,
    STREAM_MASK,
    STREAM_SCORE,
    STREAM_STRATA,
    STREAM_TIME,
    keyed_hash,
)
from unmask.errors import UnmaskError

ESTIMATORS = ("exact_k", "continuous", "chain")

# (ids, is_masked, is_token, source), all (B, L) -> -log p of the masked tokens (M,), row by row.
MaskedNLL = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

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
        """`nll` in bits over the UTF-8 bytes that the tokens scored stand for; infinite for no bytes."""
        bits = math.log(2) * num_bytes
        return Estimate(
            torch.where(self.nll == 0, 0.0, self.nll / bits),
            torch.where(self.stderr == 0, 0.0, self.stderr / bits),
        )


@dataclass(frozen=True)
class Likelihood(Score):
    """What `likelihood` found out about each record; tensors are on the CPU, floats in float64."""

    token_nll: Float[Tensor, "R L"]
    """What each token contributes to `nll`, in nats; 0 where nothing is scored. A token's share depends on
    what happens to be known when it is decoded, averaged over all that can be."""
    mixture_nll: Float[Tensor, "R"] | None
    """With "chain": -log of the mean probability over the orders, where `nll` is the mean of -log. It is at
    most `nll`, and bounds -log p from above in expectation (Burda et al., arXiv:1509.00519); where all sets
    are enumerated it is the exact -log p of the model that decodes in a random order."""
    num_forwards: int
    """Sequences that went through the model."""
    record_key: Int[Tensor, "R"]
    """Hash of each record: equal records are masked alike, so their errors add up and do not cancel."""

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


def likelihood(
    model: Any,
    batch: Mapping[str, Any],
    *,
    estimator: str = "exact_k",
    num_samples: int = 64,
    seed: int = 0,
    eps: float | None = None,
    batch_size: int = 16,
    advance: Callable[[float], None] | None = None,
) -> Likelihood:
    """Estimate an upper bound on -log p of each record of a batch, in nats, with its standard error.

    Args:
        model: a diffusion model; it is scored in eval mode and left in the mode it was in.
        batch: input_ids (R, L); optionally attention_mask (R, L), 1 = token, and src_mask (R, L),
            True = prompt: given, never masked. Without src_mask all tokens are scored. As the
            collators return it; other keys are not looked at.
        estimator: "exact_k", "continuous" or "chain"; see the head of this module.
        num_samples: draws a record, an even number: forwards of "exact_k" and "continuous", orders
            of "chain". The standard error falls with its square root, or faster.
        seed: what the masks are drawn from, with the record's own tokens.
        eps: smallest t of "continuous", in (0, 1); that of the model's training by default.
        batch_size: sequences in one forward; it changes no result.
        advance: told after each forward how many records it amounts to, a fraction.

    Raises:
        UnmaskError: an unknown estimator or a setting out of range.
        ValueError: a batch without input_ids, of packed rows, or with masks of another shape.

    >>> unmask.likelihood(model, batch).total().nats_per_token()  # doctest: +SKIP
    Estimate(value=tensor(1.0347, dtype=torch.float64), stderr=tensor(0.0121, dtype=torch.float64))
    """
    check_settings(estimator, num_samples, seed, eps, batch_size)
    input_ids, is_token, source = _read_batch(batch)
    block = torch.zeros_like(input_ids)
    if model.config.attention == "block_causal":
        block = block_index(row_layout(is_token), is_token & ~source, model.config.block_length)
    if eps is None:
        eps = float(model.config.noise_eps)

    def masked_nll(ids: Tensor, is_masked: Tensor, is_token: Tensor, source: Tensor) -> Tensor:
        tensors = [tensor.to(model.device) for tensor in (ids, is_masked, is_token, source)]
        return model.masked_nll(*tensors)

    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        return estimate(
            masked_nll,
            input_ids,
            is_token,
            source,
            block,
            estimator=estimator,
            num_samples=num_samples,
            seed=seed,
            eps=eps,
            batch_size=batch_size,
            advance=advance,
        )
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
    if estimator not in ESTIMATORS:
        raise UnmaskError(f"estimator must be one of {', '.join(ESTIMATORS)}; got {estimator!r}.")
    if num_samples < 2 or num_samples % 2:
        raise UnmaskError(
            f"num_samples must be an even number of at least 2 (draws come in pairs); got {num_samples}."
        )
    if not -(2**63) <= seed < 2**63:
        raise UnmaskError(f"seed must be an integer of at most 64 bits; got {seed}.")
    if eps is not None and estimator != "continuous":
        raise UnmaskError(f"eps has an effect with estimator 'continuous' alone; got it with {estimator!r}.")
    if eps is not None and not 0 < eps < 1:
        raise UnmaskError(f"eps must be in (0, 1), the smallest masking rate t; got {eps}.")
    if batch_size < 1:
        raise UnmaskError(f"batch_size must be at least 1 sequence; got {batch_size}.")


def _read_batch(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, is_token, source) on the CPU; padding is no source."""
    if "input_ids" not in batch:
        raise ValueError(
            f"batch must hold input_ids (records, columns); got {', '.join(batch) or 'nothing'}."
        )
    ids = batch["input_ids"].cpu()
    if ids.dim() != 2:
        raise ValueError(f"input_ids must have shape (records, columns); got {tuple(ids.shape)}.")
    if batch.get("segment_ids") is not None:
        raise ValueError("likelihood scores one record a row; got packed rows (segment_ids).")
    masks = []
    for name, default in (("attention_mask", 1), ("src_mask", 0)):
        mask = batch.get(name)
        mask = torch.full_like(ids, default) if mask is None else mask.cpu()
        if mask.shape != ids.shape:
            expected, got = tuple(ids.shape), tuple(mask.shape)
            raise ValueError(f"{name} must have shape (records, columns) = {expected}; got {got}.")
        masks.append(mask.bool())
    is_token, source = masks
    return ids, is_token, source & is_token


# Exactly-k masking, of the held-out loss and of the estimator "exact_k".


class Masks(NamedTuple):
    """k of the n maskable tokens of each sample, or of each block of it."""

    is_masked: Bool[Tensor, "B L"]
    size: Int[Tensor, "B L"]
    """n of the token's sample or block; 0 where nothing can be masked."""
    k: Int[Tensor, "B L"]
    """How many of them are masked."""


def exact_masks(noised: Noised, sample_ids: Int[Tensor, "..."], seed: int) -> Masks:
    """Mask k of the n maskable tokens of each sample, or of each block of it, for the held-out loss.

    The shares k/n are spread evenly over the samples: they follow a low-discrepancy sequence in the sample's
    number. Both are functions of (seed, sample id, noise seed) alone.

    Args:
        noised: says what is maskable, and has each document's noise seed, from which the tokens are chosen.
        sample_ids: of rows (B,) or of their documents (B, D).
        seed: of the run: where in its cycle the sequence of shares starts.
    """
    maskable = noised.maskable
    row, column = maskable.nonzero(as_tuple=True)
    document = noised.layout.document[row, column]
    block = torch.zeros_like(document) if noised.block is None else noised.block[row, column]
    length = maskable.shape[1]
    number = keyed_hash(noised.seed[row, column], STREAM_MASK, noised.layout.position[row, column])
    rank, size = rank_in_group(number, (row * length + document) * length + block)
    ids = sample_ids[row] if sample_ids.dim() == 1 else sample_ids[row, document]
    start = keyed_hash(torch.tensor(seed, device=ids.device), STREAM_STRATA)
    k = subset_size(size, (ids * GOLDEN + block * _SILVER + start) >> (64 - _SIZE_BITS))
    table = torch.zeros((3, *maskable.shape), dtype=torch.long, device=maskable.device)
    table[:, row, column] = torch.stack([rank < k, size, k])
    return Masks(table[0].bool(), table[1], table[2])


def rank_in_group(
    number: Int[Tensor, "M"], group: Int[Tensor, "M"]
) -> tuple[Int[Tensor, "M"], Int[Tensor, "M"]]:
    """Rank each number among those of its group, from 0, and count the group."""
    _, group, sizes = group.unique(return_inverse=True, return_counts=True)
    order = number.argsort()
    order = order[group[order].argsort(stable=True)]
    start = (sizes.cumsum(dim=0) - sizes)[group[order]]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - start
    return rank, sizes[group]


def subset_size(
    size: Int[Tensor, "..."], bits: Int[Tensor, "..."], stratum: Int[Tensor, "..."] | int = 0, strata: int = 1
) -> Int[Tensor, "..."]:
    """Compute k = 1 + floor(size * u) for u = (stratum + (bits mod 2^40) / 2^40) / strata, in integers alone.

    Over all strata and uniform bits each k in 1..size is equally likely, to 2^-39. Rounding in floating
    point would not do: half to even draws even counts more often than odd ones.
    """
    return 1 + (size * stratum + (size * (bits & (2**_SIZE_BITS - 1)) >> _SIZE_BITS)) // strata


# The estimators. The passes of a record and what becomes of their nlls; its randomness comes from outside,
# so that tests can enumerate every outcome.


class Passes(NamedTuple):
    """Some of a record's passes through the model."""

    is_masked: Bool[Tensor, "P N"]
    weight: Float[Tensor, "P N"]
    """Factor of each masked token's nll."""
    draw: Int[Tensor, "P"]
    """The draw that the pass belongs to: its weighted nlls are added up there."""


class SampledSets:
    """A set of tokens in each draw, in pairs of one stratum: one pass a draw, none for an empty set."""

    def __init__(self, is_masked: Bool[Tensor, "S N"], weight: Float[Tensor, "S N"]):
        self.is_masked, self.weight = is_masked, weight
        self.draw = is_masked.any(dim=1).nonzero()[:, 0]
        self.num_passes, self.num_draws = len(self.draw), len(is_masked)

    def passes(self, number: Int[Tensor, "P"]) -> Passes:
        draw = self.draw[number]
        return Passes(self.is_masked[draw], self.weight[draw], draw)

    def finish(self, values: Float[Tensor, "S N"]) -> tuple[Float[Tensor, "N"], float]:
        return values.mean(dim=0), paired_stderr(values.sum(dim=1))


class SampledChains:
    """The tokens of each block one at a time, in the order of `rank`, all blocks at once."""

    def __init__(self, block: Int[Tensor, "N"], rank: Int[Tensor, "S N"]):
        self.block, self.rank, self.steps = block, rank, int(rank.max()) + 1
        self.num_passes, self.num_draws = len(rank) * self.steps, len(rank)

    def passes(self, number: Int[Tensor, "P"]) -> Passes:
        draw, step = number // self.steps, (number % self.steps)[:, None]
        rank = self.rank[draw]
        return Passes(rank >= step, (rank == step).double(), draw)

    def finish(self, values: Float[Tensor, "S N"]) -> tuple[Float[Tensor, "N"], float]:
        return values.mean(dim=0), values.sum(dim=1).std().item() / math.sqrt(len(values))

    def mixture(self, values: Float[Tensor, "S N"]) -> float:
        """-log of the mean probability over the orders, block by block."""
        blocks = values.new_zeros(len(values), int(self.block.max()) + 1).index_add_(1, self.block, values)
        return (math.log(len(values)) - torch.logsumexp(-blocks, dim=0)).sum().item()


class AllSets:
    """Every non-empty set of tokens of each block, once: pass p masks those at the bits of p + 1."""

    def __init__(self, block: Int[Tensor, "N"]):
        self.block = block
        self.index, self.size = rank_in_group(torch.arange(len(block)), block)
        self.longest = int(self.size.max())
        self.num_passes = self.num_draws = 2**self.longest - 1

    def passes(self, number: Int[Tensor, "P"]) -> Passes:
        is_masked = self._holds(number + 1)
        return Passes(is_masked, torch.ones_like(is_masked).double(), number)

    def _holds(self, sets: Int[Tensor, "P"]) -> Bool[Tensor, "P N"]:
        """Whether each set, as bits, is one of the token's block and holds it."""
        return ((sets[:, None] >> self.index) & 1).bool() & (sets[:, None] >> self.size == 0)

    def finish(self, values: Float[Tensor, "S N"]) -> tuple[Float[Tensor, "N"], float]:
        # A set of k is what is masked at some step of a random order with probability 1 / C(n, k), and each
        # of its tokens is then decoded with probability 1 / k.
        sets = torch.arange(1, len(values) + 1)
        k = torch.tensor([number.bit_count() for number in sets.tolist()])[:, None]
        upto = range(self.longest + 1)
        comb = torch.tensor([[math.comb(n, k) for k in upto] for n in upto])
        weight = self._holds(sets) / (k * comb[self.size, k]).clamp(min=1).double()
        return (values * weight).sum(dim=0), 0.0

    def mixture(self, values: Float[Tensor, "S N"]) -> float:
        """-log p of the model that decodes in a uniformly random order, by dynamic programming over sets:
        p(set) is the mean over its tokens of p(token | set masked) * p(set without it)."""
        blocks = int(self.block.max()) + 1
        nll = values.new_zeros(len(values), self.longest, blocks)
        nll[:, self.index, self.block] = values
        log_p = values.new_zeros(len(values) + 1, blocks)
        for number in range(1, len(values) + 1):
            members = [bit for bit in range(self.longest) if number >> bit & 1]
            rest = log_p[[number ^ (1 << bit) for bit in members]]
            ways = torch.logsumexp(rest - nll[number - 1, members], dim=0)
            log_p[number] = ways - math.log(len(members))
        # Shorter blocks have fewer sets: those beyond theirs are not read.
        whole = torch.zeros(blocks, dtype=torch.long).index_copy(0, self.block, 2**self.size - 1)
        return -log_p[whole, torch.arange(blocks)].sum().item()


Plan = SampledSets | SampledChains | AllSets


def plan_passes(
    key: int, index: Int[Tensor, "N"], block: Int[Tensor, "N"], estimator: str, num_samples: int, eps: float
) -> Plan:
    """Draw the masks of one record: the passes that its estimator takes.

    Args:
        key: hash that all its randomness is a function of.
        index: position within the record of each of its maskable tokens.
        block: their blocks, from 0 without gaps.
    """
    size = block.bincount()[block]
    longest = int(size.max())
    forwards = num_samples * longest if estimator == "chain" else num_samples
    if estimator != "continuous" and longest < 62 and 2**longest - 1 <= forwards:
        return AllSets(block)
    draw, seed = torch.arange(num_samples)[:, None], torch.tensor(key)
    of_token = keyed_hash(seed, STREAM_MASK, draw, index)  # (S, N)
    of_block = keyed_hash(seed, STREAM_TIME, draw, block)
    stratum, strata = draw // 2, num_samples // 2
    if estimator == "continuous":
        t = eps + (1 - eps) * (stratum + _uniform(of_block)) / strata
        return SampledSets(_uniform(of_token) < t, 1 / t)
    group = draw * (int(block.max()) + 1) + block
    rank = rank_in_group(of_token.flatten(), group.flatten())[0].view(of_token.shape)
    if estimator == "chain":
        return SampledChains(block, rank)
    k = subset_size(size, of_block, stratum, strata)
    return SampledSets(rank < k, size / k.double())


def paired_stderr(draws: Float[Tensor, "S"]) -> float:
    """Standard error of the mean of draws of which 2h and 2h + 1 are independent and of one stratum.

    (a - b)^2 / 4 estimates the variance of a pair's mean without bias, whatever the stratum's mean is.
    """
    pairs = draws.reshape(-1, 2)
    return ((pairs[:, 0] - pairs[:, 1]).square().sum().sqrt() / 2 / len(pairs)).item()


def _uniform(hashed: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The low 53 bits of a hash as a float64 in [0, 1)."""
    return (hashed & (2**53 - 1)).double() * 2.0**-53


# All records: passes put together into batches.


class _Record(NamedTuple):
    """One record without its padding, N of its n tokens maskable."""

    ids: Int[Tensor, "n"]
    source: Bool[Tensor, "n"]
    index: Int[Tensor, "N"]
    plan: Plan


@torch.no_grad()
def estimate(
    masked_nll: MaskedNLL,
    input_ids: Int[Tensor, "R L"],
    is_token: Bool[Tensor, "R L"],
    source: Bool[Tensor, "R L"],
    block: Int[Tensor, "R L"],
    *,
    estimator: str,
    num_samples: int,
    seed: int,
    eps: float,
    batch_size: int,
    advance: Callable[[float], None] | None = None,
) -> Likelihood:
    """Do what `likelihood` does with any function that knows the nll of masked tokens.

    Args:
        masked_nll: from (ids, is_masked, is_token, source), each (B, L), to -log p of each masked token
            (M,) in row-major order. It must mask the ids itself.
        is_token: True = token, False = padding, which may be anywhere.
        source: True = given, never masked.
        block: block of each token within its record, rising from left to right; all 0 for one block.
    """
    each = keyed_hash(seed, STREAM_SCORE, row_layout(is_token).position, input_ids, source.long())
    keys = keyed_hash(torch.where(is_token, each, 0).sum(dim=1), is_token.sum(dim=1))
    nll = torch.zeros(len(keys), dtype=torch.float64)
    stderr, mixture = torch.zeros_like(nll), torch.zeros_like(nll)
    token_nll = torch.zeros(input_ids.shape, dtype=torch.float64)
    maskable = is_token & ~source
    advance = advance or (lambda records: None)

    def records() -> Iterator[tuple[int, _Record]]:
        # Rows of like length go together, for the least padding.
        for row in is_token.sum(dim=1).argsort(stable=True).tolist():
            index = (~source[row, is_token[row]]).nonzero()[:, 0]
            if not len(index):
                advance(1.0)
                continue
            blocks = block[row, maskable[row]].unique(return_inverse=True)[1]
            plan = plan_passes(int(keys[row]), index, blocks, estimator, num_samples, eps)
            if plan.num_passes:
                yield row, _Record(input_ids[row, is_token[row]], source[row, is_token[row]], index, plan)
            else:
                advance(1.0)

    num_forwards = 0
    values: dict[int, Tensor] = {}  # of the records begun: (draws, N)
    for parts in _batches(records(), batch_size):
        passes = [record.plan.passes(number) for _, record, number in parts]
        found = masked_nll(*_collate([record for _, record, _ in parts], passes)).double().cpu()
        of_part = found.split([int(p.is_masked.sum()) for p in passes])
        for (row, record, number), part, at_masked in zip(parts, passes, of_part, strict=True):
            weighted = torch.zeros(part.is_masked.shape, dtype=torch.float64)
            weighted[part.is_masked] = at_masked * part.weight[part.is_masked]
            plan = record.plan
            values.setdefault(row, weighted.new_zeros(plan.num_draws, weighted.shape[1]))
            values[row].index_add_(0, part.draw, weighted)
            num_forwards += len(number)
            if number[-1] == plan.num_passes - 1:
                draws = values.pop(row)
                per_token, stderr[row] = plan.finish(draws)
                token_nll[row, maskable[row]] = per_token
                nll[row] = per_token.sum()
                if estimator == "chain" and not isinstance(plan, SampledSets):
                    mixture[row] = plan.mixture(draws)
            advance(len(number) / plan.num_passes)
    mixture_nll = mixture if estimator == "chain" else None
    return Likelihood(nll, stderr, maskable.sum(dim=1), token_nll, mixture_nll, num_forwards, keys)


def _batches(
    records: Iterable[tuple[int, _Record]], batch_size: int
) -> Iterator[list[tuple[int, _Record, Tensor]]]:
    """Cut the passes of all records into batches of `batch_size`, over the bounds of records."""
    batch: list[tuple[int, _Record, Tensor]] = []
    room = batch_size
    for row, record in records:
        start = 0
        while start < record.plan.num_passes:
            stop = min(record.plan.num_passes, start + room)
            batch.append((row, record, torch.arange(start, stop)))
            room -= stop - start
            start = stop
            if room == 0:
                yield batch
                batch, room = [], batch_size
    if batch:
        yield batch


def _collate(records: list[_Record], passes: list[Passes]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pad the passes of several records on the right: (ids, is_masked, is_token, source)."""
    shape = (sum(len(part.draw) for part in passes), max(len(record.ids) for record in records))
    ids = torch.zeros(shape, dtype=torch.long)
    is_masked, is_token, source = (torch.zeros(shape, dtype=torch.bool) for _ in range(3))
    start = 0
    for record, part in zip(records, passes, strict=True):
        rows, width = slice(start, start + len(part.draw)), len(record.ids)
        ids[rows, :width] = record.ids
        is_token[rows, :width] = True
        source[rows, :width] = record.source
        is_masked[rows, record.index] = part.is_masked
        start = rows.stop
    return ids, is_masked, is_token, source

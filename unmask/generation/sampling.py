"""From logits to a token and the model's confidence in it.

`draw` reads the vocabulary in pieces that stay in a processor's cache: where the most likely token or a sample
of the whole distribution is asked for, the logits of all ids never exist at once. Filters, guidance and logits
processors see whole rows, a few at a time. What is drawn at a position is a function of its own logits and
uniform, whatever is drawn together with it.

Shapes: M positions of the result, S positions of `Logits`, V vocabulary; m positions worked on together, c ids
of a piece, N pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from unmask.diffusion.rng import STREAM_SAMPLE, keyed_double
from unmask.errors import UnmaskError

_CACHED = 2**19  # logits that are worked on together: 2 MiB
_GROUP = 64  # ids
_LEAST = -1e30  # in the place of minus infinity, times 0
_PIECE = 4096  # ids of a piece on a CPU; measured: 1024 to 4096 are equally fast, more is slower
_LARGE_PIECE = 2**18  # elsewhere: the vocabulary at once, since each further piece waits for the device
_POSITIONS = 256  # worked on together
_WHOLE_ROWS = 2**24  # logits of whole rows that exist at one time: 64 MiB
FIGURES = ("confidence", "margin", "entropy")


class Sampled(NamedTuple):
    """A token for each position, with the model's own figures: before temperature and filters."""

    token: Int[Tensor, "M"]
    confidence: Float[Tensor, "M"]  # probability of the token
    margin: Float[Tensor, "M"]  # probability of the most likely token minus that of the second
    entropy: Float[Tensor, "M"]  # nats
    # False = the logits are NaN or infinite, or allow no token: the other fields mean nothing.
    valid: Bool[Tensor, "M"]


Columns = Callable[[int, int], Tensor]
"""(first, last) -> logits (m, last - first) of a range of ids, valid until the next call; may be changed."""


@dataclass(frozen=True)
class Logits:
    """The logits of some positions, computed when they are asked for; see `unmask.model.head.head_logits`."""

    shape: tuple[int, int]  # positions, vocabulary
    dtype: torch.dtype
    device: torch.device
    take: Callable[[Int[Tensor, "m"]], Columns]
    most: int = _POSITIONS  # positions to take at once

    @classmethod
    def of(cls, table: Float[Tensor, "S V"]) -> Logits:
        """Wrap logits that exist already."""

        def take(positions: Tensor) -> Columns:
            return lambda first, last: table[:, first:last].index_select(0, positions)

        return cls((table.shape[0], table.shape[1]), table.dtype, table.device, take)


class Group(NamedTuple):
    """Positions that share settings."""

    index: Int[Tensor, "m"]  # positions of the result
    source: Int[Tensor, "m"]  # the same positions among those of `Logits`
    temperature: float = 0.0  # 0 = the most likely token
    top_k: int | None = None
    top_p: float | None = None
    # Ids of probability 0; those beyond the vocabulary are ignored. On the CPU, or each step waits for the device.
    forbidden: Int[Tensor, "K"] | None = None
    # (index, logits (m, V)) -> other logits: the token is drawn from those, the figures are the model's own.
    process: Callable[[Tensor, Tensor], Tensor] | None = None
    # The same positions with a masked prompt: with their logits u, logits become c + guidance_scale (c - u).
    unconditional: Int[Tensor, "m"] | None = None
    guidance_scale: float = 0.0
    figures: frozenset[str] = frozenset(FIGURES)  # those asked for; others are 0

    @property
    def by_pieces(self) -> bool:
        """True where no whole row of logits is needed."""
        plain = self.process is None and self.unconditional is None
        return plain and (self.temperature == 0 or (self.top_k is None and self.top_p is None))

    def part(self, start: int, stop: int) -> Group:
        """Take some of the positions."""
        other = self.unconditional
        return self._replace(
            index=self.index[start:stop],
            source=self.source[start:stop],
            unconditional=None if other is None else other[start:stop],
        )


@torch.no_grad()
def draw(logits: Logits, groups: Sequence[Group], uniform: Float64[Tensor, "M"] | None = None) -> Sampled:
    """Choose a token for each position of some groups, and compute the figures that each group asks for.

    Without a temperature it is the most likely token, of equal ones that of the lowest id. With a temperature
    it is a sample of softmax(logits / temperature) among the tokens that the filters keep.

    Args:
        groups: together they have each position of the result once.
        uniform: in [0, 1), used where the temperature is above 0.
    """
    count, wide = sum(len(group.index) for group in groups), _wide(logits.dtype)
    token = torch.zeros(count, dtype=torch.long, device=logits.device)
    confidence, margin, entropy = torch.zeros(len(FIGURES), count, dtype=wide, device=logits.device)
    drawn = Sampled(token, confidence, margin, entropy, torch.zeros_like(token, dtype=torch.bool))
    # The temperatures above 0 last, where a sample is drawn.
    by_pieces = sorted((group for group in groups if group.by_pieces), key=lambda group: group.temperature)
    for part in _parts(by_pieces, logits.most):
        columns = logits.take(torch.cat([group.source for group in part]))
        _write(drawn, part, _scan(columns, _edges(logits), part, uniform, wide))
    rows = max(1, min(logits.most, _WHOLE_ROWS // logits.shape[1]))
    for group in groups:
        if not group.by_pieces:
            for part in _parts([group], rows):
                _write(drawn, part, _draw_from_rows(logits, part[0], uniform))
    return drawn


class _Scan(NamedTuple):
    """What is known of some positions once all ids were seen."""

    token: Int[Tensor, "m"]
    logit: Float[Tensor, "m"]  # of the token
    best: Float[Tensor, "m"]  # the highest logit
    total: Float64[Tensor, "m"]  # sum of exp(logit - best)
    margin: Float64[Tensor, "m"]
    entropy: Float64[Tensor, "m"]
    valid: Bool[Tensor, "m"]


def _write(drawn: Sampled, groups: Sequence[Group], scan: _Scan) -> None:
    """Write the results of some groups where they belong."""
    confidence = (scan.logit - scan.best).double().exp() / scan.total
    start = 0
    for group in groups:
        part = slice(start, start := start + len(group.index))
        drawn.token[group.index], drawn.valid[group.index] = scan.token[part], scan.valid[part]
        figures = (confidence, scan.margin, scan.entropy)
        for name, target, figure in zip(FIGURES, drawn[1:4], figures, strict=True):
            if name in group.figures:
                target[group.index] = figure[part].to(target.dtype)


def _parts(groups: Sequence[Group], most: int) -> Iterator[list[Group]]:
    """Divide groups into lists of at most so many positions."""
    part: list[Group] = []
    room = most
    for group in groups:
        start, stop = 0, len(group.index)
        while start < stop:
            part.append(taken := group.part(start, start + room))
            start, room = start + len(taken.index), room - len(taken.index)
            if room == 0:
                yield part
                part, room = [], most
    if part:
        yield part


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _edges(logits: Logits) -> list[int]:
    """Where pieces of the vocabulary begin, and its end: the same for any positions."""
    size = logits.shape[1]
    return [*range(0, size, _PIECE if logits.device.type == "cpu" else _LARGE_PIECE), size]


def _fills(groups: Sequence[Group], edges: list[int]) -> list[list[tuple[slice, Tensor]]]:
    """For each piece: rows, and the columns of the piece that are forbidden there."""
    fills: list[list[tuple[slice, Tensor]]] = [[] for _ in edges[1:]]
    spans: list[tuple[int, int, Tensor | None]] = []
    for group in groups:
        start = spans[-1][1] if spans else 0
        stop = start + len(group.index)
        if spans and spans[-1][2] is group.forbidden:
            spans[-1] = spans[-1][0], stop, group.forbidden
        else:
            spans.append((start, stop, group.forbidden))
    for start, stop, forbidden in spans:
        if forbidden is None:
            continue
        ids = forbidden.sort().values
        bounds = torch.searchsorted(ids, torch.tensor(edges, device=ids.device)).tolist()
        for number, (first, last) in enumerate(pairwise(bounds)):
            if first < last:
                columns = (ids[first:last] - edges[number]).to(groups[0].index.device, non_blocking=True)
                fills[number].append((slice(start, stop), columns))
    return fills


class _Kept:
    """For each position the piece of its logits that its token is in."""

    def __init__(self, piece: Float[Tensor, "m c"]):
        self.logits = piece.clone()
        self.number = torch.zeros(len(piece), dtype=torch.long, device=piece.device)

    def replace(self, which: Bool[Tensor, "m"], piece: Float[Tensor, "m c"], number: int) -> None:
        """Keep another piece at some positions; the last piece may be shorter."""
        rows = which.nonzero()[:, 0]
        if len(rows):
            width = piece.shape[1]
            self.logits[rows, :width] = piece[rows]
            self.logits[rows, width:] = -torch.inf
            self.number[rows] = number


class _Choice:
    """Draws a piece, as the pieces come one after another, with one uniform for each position.

    A piece replaces the one drawn before with the probability that it has among all pieces so far (Chao,
    Biometrika 69(3), 1982). Where the uniform lies within the part of [0, 1) that decided is the next uniform.
    """

    def __init__(self, uniform: Float64[Tensor, "m"]):
        self.uniform = uniform
        self.scale, self.weight = torch.full_like(uniform, _LEAST), torch.zeros_like(uniform)

    def next(self, peak: Float[Tensor, "m"], total: Float[Tensor, "m"]) -> Bool[Tensor, "m"]:
        """Whether the next piece is drawn, given its highest logit and its sum of exp(logit - that)."""
        scale = torch.maximum(self.scale, peak.double())
        before = self.weight * (self.scale - scale).exp()
        own = torch.where(peak > _LEAST, total.double() * (peak - scale).exp(), 0.0)
        self.scale, self.weight = scale, before + own
        inside = self.uniform * self.weight - before
        drawn = (own > 0) & (inside >= 0)
        uniform = torch.where(drawn, inside / own, self.uniform * self.weight / before)
        self.uniform = torch.where(drawn | (before > 0), uniform, self.uniform).clamp(max=1 - 2.0**-53)
        return drawn


def _scan(
    columns: Columns,
    edges: list[int],
    groups: Sequence[Group],
    uniform: Float64[Tensor, "M"] | None,
    wide: torch.dtype,
) -> _Scan:
    """Go through the vocabulary once, for groups that need no whole rows; temperatures above 0 come last.

    Of each piece the highest logit is needed, and for the figures the sum of exp(logit - that), which the
    softmax of the piece tells: the probability of its most likely token is 1 divided by the sum.
    """
    device = groups[0].index.device
    sizes = [len(group.index) for group in groups]
    count = sum(sizes)
    asked = frozenset().union(*(group.figures for group in groups))
    temperatures = [group.temperature for group, size in zip(groups, sizes, strict=True) for _ in range(size)]
    greedy = temperatures.count(0)
    likely = count if "margin" in asked else greedy  # positions whose most likely token is needed
    temperature = torch.tensor(temperatures[greedy:], dtype=wide, device=device)[:, None]
    choice = None
    if greedy < count:
        assert uniform is not None
        choice = _Choice(uniform[torch.cat([group.index for group in groups])[greedy:]])
    scaled = not asked or any(each != 1 for each in temperatures[greedy:])

    fills = _fills(groups, edges)
    peaks = torch.empty(count, len(edges) - 1, dtype=wide, device=device)
    sums, spread = torch.ones_like(peaks), torch.zeros_like(peaks)
    buffers = [peaks.new_empty(count * edges[1]) for _ in range(3)]
    top = drawn = None
    best = peaks.new_full((likely,), -torch.inf)
    for number, (first, last) in enumerate(pairwise(edges)):
        x, shape = columns(first, last), (count, last - first)
        p, work, converted = (buffer[: count * (last - first)].view(shape) for buffer in buffers)
        if x.dtype != wide:
            x = converted.copy_(x)
        for rows, ids in fills[number]:
            x[rows].index_fill_(1, ids, -torch.inf)
        peaks[:, number] = peak = x.amax(dim=1)
        if asked:
            sums[:, number] = torch.softmax(x, dim=1, out=p).amax(dim=1).reciprocal_()
        if "entropy" in asked:
            below = torch.sub(x, peak[:, None], out=work).clamp_(min=_LEAST)
            spread[:, number] = below.mul_(p).sum(dim=1)
        if likely:
            if top is None:
                top = _Kept(x[:likely])
            else:
                top.replace(peak[:likely] > best, x[:likely], number)
            best = torch.maximum(best, peak[:likely])
        if choice is not None:
            total = sums[greedy:, number]
            if scaled:
                logits = torch.div(x[greedy:], temperature, out=work[greedy:])
                total = torch.softmax(logits, dim=1, out=p[greedy:]).amax(dim=1).reciprocal_()
            is_drawn = choice.next(peak[greedy:] / temperature[:, 0], total)
            if drawn is None:
                drawn = _Kept(x[greedy:])
            else:
                drawn.replace(is_drawn, x[greedy:], number)

    best = peaks.amax(dim=1)
    below = (peaks - best[:, None]).clamp(min=_LEAST).double()
    possible = peaks > -torch.inf
    weight = torch.where(possible, sums.double() * below.exp(), 0.0)
    total = weight.sum(dim=1)
    valid, margin = best.isfinite(), torch.zeros_like(total)
    token, logit = best.new_zeros(count, dtype=torch.long), best.clone()
    if top is not None:
        column = top.logits.argmax(dim=1, keepdim=True)
        token[:likely] = top.number * edges[1] + column[:, 0]
        if "margin" in asked:
            elsewhere = peaks.scatter(1, top.number[:, None], -torch.inf).amax(dim=1)
            second = torch.maximum(top.logits.scatter_(1, column, -torch.inf).amax(dim=1), elsewhere)
            margin = (1 - (second - best).double().exp()) / total
    if choice is not None and drawn is not None:
        logits = drawn.logits / temperature
        column = invert((logits - logits.amax(dim=1, keepdim=True)).exp_(), choice.uniform)
        token[greedy:] = drawn.number * edges[1] + column
        logit[greedy:] = drawn.logits.gather(1, column[:, None])[:, 0]
        valid[greedy:] &= choice.scale.isfinite()  # logits divided by next to nothing are infinite
    entropy = total.log() - torch.where(possible, weight * (spread + below), 0.0).sum(dim=1) / total
    return _Scan(token, logit, best, total, margin, entropy, valid)


def _draw_from_rows(logits: Logits, group: Group, uniform: Float64[Tensor, "M"] | None) -> _Scan:
    """Draw where whole rows are needed: for filters, guidance and logits processors."""
    size, wide = logits.shape[1], _wide(logits.dtype)
    conditional = logits.take(group.source)(0, size)
    masked = None if group.unconditional is None else logits.take(group.unconditional)(0, size)
    # In rows that stay in a core's cache, so that memory is read once and not by each operation.
    rows = len(conditional) if conditional.is_cuda else max(1, _CACHED // size)
    scans = []
    for start in range(0, len(conditional), rows):
        part = group.part(start, start + rows)
        own = conditional[start : start + rows].to(wide)
        if masked is not None:
            own = own + group.guidance_scale * (own - masked[start : start + rows].to(wide))
        if group.forbidden is not None:
            suppress_(own, group.forbidden)
        scans.append(_draw_from_whole(own, part, uniform))
    return _Scan(*(torch.cat(field) for field in zip(*scans, strict=True)))


def _draw_from_whole(own: Float[Tensor, "m V"], group: Group, uniform: Tensor | None) -> _Scan:
    """Draw from logits that exist and allow what is allowed."""
    plain = Group(group.index, group.source, figures=group.figures)
    scan = _scan(lambda first, last: own, [0, own.shape[1]], [plain], None, own.dtype)
    if group.process is None and group.temperature == 0:
        return scan
    changed = own if group.process is None else group.process(group.index, own.clone()).to(own.dtype)
    if group.temperature == 0:
        allowed, token = changed.max(dim=1)
    else:
        assert uniform is not None
        changed = changed / group.temperature
        if group.top_k is not None:
            changed = keep_top_k(changed, group.top_k)
        if group.top_p is not None:
            changed = keep_top_p(changed, group.top_p)
        allowed = changed.amax(dim=1)
        token = invert((changed - allowed[:, None]).exp_(), uniform[group.index])
    logit = own.gather(1, token[:, None])[:, 0]
    return scan._replace(token=token, logit=logit, valid=scan.valid & allowed.isfinite())


def invert(weight: Float[Tensor, "M V"], uniform: Float[Tensor, "M"]) -> Int[Tensor, "M"]:
    """Draw an id in proportion to its weight, by inverting the distribution function in float64.

    First a group of ids, by the sums of groups, then an id of the group.
    """
    groups = F.pad(weight, (0, -weight.shape[-1] % _GROUP)).unflatten(-1, (-1, _GROUP))
    sums = groups.sum(dim=-1).double()
    until = sums.cumsum(dim=-1)
    target = uniform[:, None] * until[:, -1:]
    group = _first_above(until, target, sums)
    inside = groups.gather(1, group[..., None].expand(-1, -1, _GROUP))[:, 0].double()
    target = target - (until - sums).gather(1, group)
    return (group * _GROUP + _first_above(inside.cumsum(dim=-1), target, inside))[:, 0]


def _first_above(until: Tensor, target: Float[Tensor, "M 1"], weight: Tensor) -> Int[Tensor, "M 1"]:
    """The first place where the sum is above the target, or the last with a weight if rounding leaves none."""
    places = torch.arange(weight.shape[-1], device=weight.device)
    last = torch.where(weight > 0, places, 0).amax(dim=-1, keepdim=True)
    return torch.searchsorted(until, target, right=True).minimum(last)


def uniforms(
    seed: Int[Tensor, "M"], position: Int[Tensor, "M"], step: Int[Tensor, "M"] | int
) -> Float[Tensor, "M"]:
    """Draw one uniform in [0, 1) for each token, a function of (seed, position, step)."""
    return keyed_double(seed, STREAM_SAMPLE, position, step)


def suppress_(logits: Float[Tensor, "*rows V"], ids: Int[Tensor, "K"]) -> Float[Tensor, "*rows V"]:
    """Give the listed ids probability 0, in place; those beyond the vocabulary are ignored."""
    ids = ids[ids < logits.shape[-1]].to(logits.device, non_blocking=True)
    return logits.index_fill_(-1, ids, -torch.inf)


def keep_top_k(logits: Float[Tensor, "M V"], k: int) -> Float[Tensor, "M V"]:
    """Give all but the k most likely tokens probability 0; ties with the k-th stay."""
    if k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k, dim=-1).values[:, -1:], -torch.inf)


def keep_top_p(logits: Float[Tensor, "M V"], p: float) -> Float[Tensor, "M V"]:
    """Keep the fewest most likely tokens whose probabilities reach p (Holtzman et al., arXiv:1904.09751)."""
    normaliser, size = logits.logsumexp(dim=-1, keepdim=True), 128
    least, count = torch.empty_like(normaliser), torch.empty_like(normaliser, dtype=torch.long)
    tied = torch.zeros_like(count, dtype=torch.bool)
    rows = torch.arange(len(logits), device=logits.device)
    while len(rows):  # the most likely tokens alone are sorted, as many as each row needs
        size = min(8 * size, logits.shape[-1])
        top = (logits if len(rows) == len(logits) else logits[rows]).topk(size, dim=-1).values
        probability = (top - normaliser[rows]).exp()
        before = probability.cumsum(dim=-1) - probability
        needed = (before < p).sum(dim=-1, keepdim=True).clamp(min=1)  # none are of NaN
        least[rows], count[rows] = top.gather(-1, needed - 1), needed
        following = top.gather(-1, needed.clamp(max=size - 1))
        tied[rows] = (following == least[rows]) & (needed < size)
        rows = rows[(needed == size)[:, 0]] if size < logits.shape[-1] else rows[:0]
    keep = logits >= least
    if len(rows := tied.nonzero()[:, 0]):  # of equal logits those of the lower ids
        above = logits[rows] > least[rows]
        room = count[rows] - above.count_nonzero(dim=-1)[:, None]
        equal = keep[rows] & ~above
        keep[rows] = above | (equal & (equal.cumsum(dim=-1) <= room))
    return torch.where(keep, logits, -torch.inf)


def as_functions(setting: str, functions: Any) -> list[Any]:
    """Return logits processors or stopping criteria as a list; they may be one, a list or None.

    Raises:
        UnmaskError: names the setting; something that cannot be called.
    """
    listed = [] if functions is None else functions if isinstance(functions, list | tuple) else [functions]
    for function in listed:
        if not callable(function):
            raise UnmaskError(f"{setting} must be functions; got {type(function).__name__}.")
    return list(listed)

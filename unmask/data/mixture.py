"""In which order a run sees its rows: pure functions of the seed and of numbers, the same on every machine."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import ceil, inf, lcm

import numpy as np

from unmask.errors import UnmaskError

ORDER, DRAW, WINDOW = 0, 1, 3  # what a keyed hash is for
ROUND = 1000  # draws in which a mixture's shares are exact, unless fewer will do
ROUNDS = 1 << 20  # the same, of the rarest source


class Draws:
    """Which source draw n of a run is from, and how many draws it has had before: a pure function of n.

    Draws come in rounds in which each source has its quota, in a shuffled order. A round ends early where a
    source has had its epochs, or is through and makes all without a limit begin anew (`stop`).

    Args:
        sizes: rows of each source.
        weights: in proportion to which sources are drawn.
        epochs: passes over each, after which it leaves; None = no limit.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        epochs: Sequence[int | None],
        *,
        seed: int = 0,
        stop: bool = False,
    ) -> None:
        self.sizes, self.weights, self.epochs = sizes, weights, epochs
        self.seed, self.stop = seed, stop and len(sizes) > 1
        # Stretches of rounds with the same quotas: first draw, draws of each source before it, quotas.
        self.stretches: list[tuple[int, list[int], dict[int, int]]] = []
        self.ends: list[float] = []
        self._add(0, [0] * len(sizes))

    def locate(self, n: int) -> tuple[int, int] | None:
        """Return the source of draw n, and its draws before; None after the last one."""
        while n >= self.ends[-1]:
            self._add(int(self.ends[-1]), self.after)
        start, counts, quotas = self.stretches[bisect_right(self.ends, n)]
        if not quotas:
            return None
        number, at = divmod(n - start, sum(quotas.values()))
        order = shuffled_round(self.seed, start, number, tuple(quotas.items()))
        source = int(order[at])
        return source, counts[source] + number * quotas[source] + int((order[:at] == source).sum())

    def _add(self, start: int, counts: list[int]) -> None:
        """Add the rounds in which no source reaches its limit, or the one that ends where the first does."""
        limits: dict[int, float] = {}
        for source, (size, epochs) in enumerate(zip(self.sizes, self.epochs, strict=True)):
            if epochs is not None:
                limits[source] = epochs * size
            else:
                limits[source] = (counts[source] // size + 1) * size if self.stop else inf
        left = {source: limit - counts[source] for source, limit in limits.items() if counts[source] < limit}
        quotas = draw_quotas({source: self.weights[source] for source in left})
        self.stretches.append((start, counts, quotas))
        ends = {source: int(n) for source, n in left.items() if n < inf}
        whole = min(((n - 1) // quotas[source] for source, n in ends.items()), default=inf)
        if whole == inf:
            self.ends.append(inf)
            return
        if whole:
            self.ends.append(start + int(whole) * sum(quotas.values()))
            self.after = [n + int(whole) * quotas.get(source, 0) for source, n in enumerate(counts)]
            return
        order = shuffled_round(self.seed, start, 0, tuple(quotas.items()))
        ends = {s: int(np.flatnonzero(order == s)[n - 1]) + 1 for s, n in ends.items() if n <= quotas[s]}
        end = min(ends.values())
        self.after = (np.array(counts) + np.bincount(order[:end], minlength=len(counts))).tolist()
        if self.stop and self.epochs[min(ends, key=lambda source: ends[source])] is None:
            for source, size in enumerate(self.sizes):
                if self.epochs[source] is None:
                    self.after[source] = -(-self.after[source] // size) * size
        self.ends.append(start + end)


def draw_quotas(weights: dict[int, float]) -> dict[int, int]:
    """Draws of each source in a round: exact where a round of `ROUND` allows it, else by largest remainder."""
    exact = {source: Fraction(weight).limit_denominator(10**6) for source, weight in weights.items()}
    shares = {source: weight / sum(exact.values()) for source, weight in exact.items()}
    size = lcm(*(share.denominator for share in shares.values()))
    if size > ROUND:
        size = max(ROUND, ceil(1 / min(shares.values())))
        if size > ROUNDS:
            raise UnmaskError(
                f"data.sources: a weight is less than a {ROUNDS:,}th of all; remove the source."
            )
    quotas = {source: int(share * size) for source, share in shares.items()}
    rest = sorted(quotas, key=lambda source: quotas[source] - shares[source] * size)
    for source in rest[: size - sum(quotas.values())]:
        quotas[source] += 1
    return quotas


@lru_cache(maxsize=64)
def shuffled_round(seed: int, start: int, number: int, quotas: tuple[tuple[int, int], ...]) -> np.ndarray:
    """The sources of a round's draws, in a shuffled order."""
    sources = np.repeat([source for source, _ in quotas], [quota for _, quota in quotas])
    return sources[np.argsort(keyed(seed, DRAW, start, number, np.arange(len(sources))), kind="stable")]


@lru_cache(maxsize=16)
def permutation(seed: int, source: int, epoch: int, size: int) -> np.ndarray:
    """Shuffle range(size) for one pass over a source: a function of the arguments on every machine."""
    return np.argsort(keyed(seed, ORDER, source, epoch, np.arange(size)), kind="stable")


def keyed(seed: int, *keys: int | np.ndarray) -> np.ndarray:
    """Hash a seed and further integers, broadcast together, to 64 random bits each (SplitMix64, folded)."""
    golden = np.uint64(0x9E3779B97F4A7C15)

    def mix(x: np.ndarray) -> np.ndarray:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    state = mix(np.asarray([seed % 2**64], dtype=np.uint64) + golden)
    for key in keys:
        state = mix((state ^ np.asarray(key, dtype=np.uint64)) + golden)
    return state

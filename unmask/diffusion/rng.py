"""Uniform random numbers that are a pure function of (seed, keys): counter-based randomness.

A generator with a state makes the noise of a sample depend on everything drawn before it. Here every number
is a hash of integers, so a sample is corrupted the same in any batch, under any padding, on any number of
processes, on every device and after every restart.

The hash is the finaliser of SplitMix64 (Steele, Lea & Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014), folded over the keys, in int64 operations that wrap around alike on every device.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Streams keep draws for different purposes independent of one another under the same seed.
STREAM_SEED, STREAM_TIME, STREAM_MASK, STREAM_SAMPLE, STREAM_COMMIT, STREAM_ATTENTION = range(6)
STREAM_CUT, STREAM_CELLS, STREAM_STRATA, STREAM_SCORE, STREAM_REMASK = range(6, 11)

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio, as a signed 64-bit integer
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's own is arithmetic on int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def keyed_hash(seed: Int[Tensor, "..."] | int, *keys: Int[Tensor, "..."] | int) -> Int[Tensor, "..."]:
    """Hash a seed and further integer keys, broadcast together, to int64 with all 64 bits random."""
    device = next((k.device for k in (seed, *keys) if isinstance(k, Tensor)), None)
    state = _mix(torch.as_tensor(seed, dtype=torch.int64, device=device) + GOLDEN)
    for key in keys:
        # The key enters unmixed: were both sides mixed alike, (a, b) and (b, a) would hash to the same.
        state = _mix((state ^ torch.as_tensor(key, dtype=torch.int64, device=device)) + GOLDEN)
    return state


def keyed_uniform(seed: Int[Tensor, "..."] | int, *keys: Int[Tensor, "..."] | int) -> Float[Tensor, "..."]:
    """Draw float32 uniforms in [0, 1) as a pure function of the seed and the keys, broadcast together.

    They have 24 significant bits at every magnitude, so P(u < t) equals t to one part in 2^24.
    """
    bits = _shift_right(keyed_hash(seed, *keys), 11)  # 53 random bits
    uniform = bits.to(torch.float32) * 2.0**-53
    return uniform.clamp(max=1.0 - 2.0**-24)  # rounding to nearest may have reached 1


def keyed_double(seed: Int[Tensor, "..."] | int, *keys: Int[Tensor, "..."] | int) -> Float[Tensor, "..."]:
    """Draw float64 uniforms in [0, 1) with 53 bits, for inverting a distribution function with a tail."""
    return _shift_right(keyed_hash(seed, *keys), 11).double() * 2.0**-53


def keyed_below(
    below: Int[Tensor, "..."] | int, seed: Int[Tensor, "..."] | int, *keys: Int[Tensor, "..."] | int
) -> Int[Tensor, "..."]:
    """Draw integers in [0, below), 0 where that is empty; each has probability 1 / below to 2^-31."""
    return (_shift_right(keyed_hash(seed, *keys), 33) * torch.as_tensor(below).clamp(min=0)) >> 31

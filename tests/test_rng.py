from __future__ import annotations

from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tiny import assert_uniform

from unmask.diffusion import rng
from unmask.diffusion.rng import STREAM_MASK, STREAM_TIME, keyed_hash, keyed_uniform

INT64 = st.integers(-(2**63), 2**63 - 1)
WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(x: int) -> int:
    """The finaliser of SplitMix64 on Python's own integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


@given(seed=INT64, keys=st.lists(INT64, max_size=4))
def test_hash_is_splitmix64_on_unbounded_integers(seed: int, keys: list[int]) -> None:
    state = mix((seed + GOLDEN) & WORD)
    for key in keys:
        state = mix(((state ^ (key & WORD)) + GOLDEN) & WORD)
    assert int(keyed_hash(seed, *keys).item()) & WORD == state


def test_values_never_change() -> None:
    # SplitMix64 seeded with 0, as its reference implementation prints it.
    assert int(keyed_hash(0).item()) & WORD == 0xE220A8397B1DCDAF
    # A change here changes the noise of every run ever started: no resumed run would continue.
    assert keyed_hash(torch.tensor([0, 1]), 2, 3).tolist() == [-3450021587346987872, -3426316478316322125]
    assert keyed_uniform(0, 1, 2).item() == 0.36693644523620605


@given(bits=INT64)
@example(bits=0)
@example(bits=-1)  # all ones: rounding to nearest must not reach 1
@example(bits=2**63 - 1)
def test_uniform_is_the_hash_read_as_a_fraction(bits: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rng, "keyed_hash", lambda seed, *keys: torch.tensor(bits))
        found = keyed_uniform(0)
    exact = (bits & WORD) / 2**64
    assert found.dtype == torch.float32
    assert 0 <= found.item() < 1
    # Rounded to float32, after 11 bits were cut off.
    assert abs(found.item() - exact) <= exact * 2**-24 + 2**-53


N = 1 << 16
INDEX = torch.arange(N)
PAIRS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {  # seed and keys of two uniforms
    "neighbouring positions": ((3, 2, INDEX), (3, 2, INDEX + 1)),
    "neighbouring seeds": ((INDEX, 2, 5), (INDEX + 1, 2, 5)),
    "streams": ((INDEX, STREAM_TIME), (INDEX, STREAM_MASK)),
    "time and the mask at 0": ((INDEX, STREAM_TIME), (INDEX, STREAM_MASK, 0)),
    "swapped keys": ((0, INDEX, 7), (0, 7, INDEX)),
    "seed and key swapped": ((INDEX, 7), (7, INDEX)),
    "opposite seeds": ((INDEX, 2), (-INDEX - 1, 2)),
    "high bits": ((INDEX << 48, 2), ((INDEX << 48) + 1, 2)),
    "seeds a golden ratio apart": ((INDEX, 2, 5), (INDEX + rng.GOLDEN, 2, 5)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_are_uniform_and_independent(name: str) -> None:
    first, second = (keyed_uniform(*keys) for keys in PAIRS[name])
    assert_uniform((first * 16).long() * 16 + (second * 16).long(), 256)


@pytest.mark.parametrize("bit", [0, 1, 31, 32, 62, 63])
def test_one_bit_of_the_seed_changes_half_of_the_hash(bit: int) -> None:
    flipped = keyed_hash(INDEX ^ (-(2**63) if bit == 63 else 1 << bit), 2, 5)
    changed = keyed_hash(INDEX, 2, 5) ^ flipped
    for place in range(64):
        assert_uniform((changed >> place) & 1, 2)


def test_keys_broadcast() -> None:
    grid = keyed_uniform(torch.tensor([[4], [-9]]), 2, torch.arange(3))
    assert grid.tolist() == [[keyed_uniform(seed, 2, i).item() for i in range(3)] for seed in (4, -9)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_on_the_accelerator() -> None:
    seeds = keyed_hash(INDEX[:, None], torch.arange(8))
    assert torch.equal(keyed_uniform(seeds.cuda(), INDEX[:8].cuda()).cpu(), keyed_uniform(seeds, INDEX[:8]))


def test_shapes_are_checked_in_tests() -> None:
    # That the hook in conftest.py is in force: a float is no seed.
    with pytest.raises(jaxtyping.TypeCheckError):
        keyed_uniform(torch.tensor(0.5))

"""Randomness as arithmetic: every draw is a function of what it is for, and nothing needs to be saved or seeded.

The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): a keyed bijection of
a 128-bit counter. Here the key is (seed, purpose and attempt) and the counter (number of the draw, three coordinates),
so that two draws share bits only if they are the same draw. It is written out, not taken from a library, because the
bits must stay the same when libraries change.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_ROUNDS = 10


class Purpose(IntEnum):
    """What a draw is for; the coordinates it is keyed by are in the comment. Numbers are never reused."""

    ORDER = 1  # pass
    CROP = 2  # pass, index
    REPLACE = 3  # pass, index
    DEPTH = 4  # step, slot; one draw a block
    DROPOUT = 5  # step, slot; one draw a feature
    PICTURE = 6  # for grids and reports


def philox(counter: tuple[NDArray[np.uint64], ...], key: tuple[int, int]) -> tuple[NDArray[np.uint64], ...]:
    """Four 32-bit words, held in uint64 arrays, for each counter of four such words."""
    c0, c1, c2, c3 = counter
    k0, k1 = np.uint64(key[0]), np.uint64(key[1])
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ k0, p1 & _LOW, (p0 >> _HALF) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def bits(
    seed: int, purpose: Purpose, a: ArrayLike, b: ArrayLike = 0, c: ArrayLike = 0, *, n: int = 1, attempt: int = 0
) -> NDArray[np.uint64]:
    """N 32-bit words for each triple of coordinates: the shape of a, b and c broadcast together, + (n,), as uint64.

    Args:
        seed: of the run, in [0, 2^32).
        purpose: what the words are for.
        a, b, c: coordinates in [0, 2^32), numbers or arrays.
        n: words for each.
        attempt: counts roll-backs, so that a repeated step draws anew.

    Raises:
        ValueError: the seed is out of range.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"a seed must be in [0, 2^32), not {seed}")
    a, b, c = np.broadcast_arrays(*(np.asarray(v, np.uint64)[..., None] for v in (a, b, c)))
    block = np.arange(-(-n // 4), dtype=np.uint64)
    shape = np.broadcast_shapes(a.shape, block.shape)
    words = philox(tuple(np.broadcast_to(v, shape) for v in (block, a, b, c)), (seed, int(purpose) | attempt << 8))
    return np.stack(words, -1).reshape(*shape[:-1], -1)[..., :n]


def uniform(
    seed: int, purpose: Purpose, a: ArrayLike, b: ArrayLike = 0, c: ArrayLike = 0, *, n: int = 1, attempt: int = 0
) -> NDArray[np.float32]:
    """As `bits`, but numbers in [0, 1) on a grid of 2^-24, which float32 holds exactly."""
    words = bits(seed, purpose, a, b, c, n=n, attempt=attempt)
    return (words >> np.uint64(8)).astype(np.float32) * np.float32(2**-24)


def permutation(seed: int, pass_number: int, n: int) -> NDArray[np.int64]:
    """The order of n samples in a pass over the data: sorted by 64 random bits each."""
    words = bits(seed, Purpose.ORDER, pass_number, np.arange(n), n=2)
    return np.argsort(words[:, 0] << _HALF | words[:, 1], kind="stable")

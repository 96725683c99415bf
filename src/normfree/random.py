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
_LN2, _HALF_PI = 0.6931471805599453, 1.5707963267948966


class Purpose(IntEnum):
    """What a draw is for; the coordinates it is keyed by are in the comment. Numbers are never reused."""

    ORDER = 1  # pass
    CROP = 2  # pass, index
    REPLACE = 3  # pass, index
    DEPTH = 4  # step, slot; one draw a block
    DROPOUT = 5  # step, slot; one draw a feature
    PICTURE = 6  # for grids and reports
    MIX = 7  # step, slot
    AUGMENT = 8  # step, slot, layer


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
    return np.stack(words, -1).reshape(*shape[:-1], 4 * len(block))[..., :n]


def uniform(
    seed: int, purpose: Purpose, a: ArrayLike, b: ArrayLike = 0, c: ArrayLike = 0, *, n: int = 1, attempt: int = 0
) -> NDArray[np.float32]:
    """As `bits`, but numbers in [0, 1) on a grid of 2^-24, which float32 holds exactly."""
    words = bits(seed, purpose, a, b, c, n=n, attempt=attempt)
    return (words >> np.uint64(8)).astype(np.float32) * np.float32(2**-24)


BETA_WORDS = 4  # a draw of `beta` uses


def beta(words: NDArray[np.uint64], alpha: float) -> NDArray[np.float64]:
    """Draws of Beta(alpha, alpha): words (..., 4) of `bits` -> (..., 2), x and 1 - x, each to 1e-12 of itself.

    Bailey's (1994) polar form of Student's t with 2 alpha degrees of freedom, t^2 = 2 alpha (u^(-1/alpha) - 1) cos^2,
    and x = (1 + t / sqrt(2 alpha + t^2)) / 2 (Devroye 1996, "Random variate generation in one line of code"): exact for
    any alpha, without rejection. Both ends keep their small numbers: at alpha 0.2, x or 1 - x is below 1e-7 in one draw
    of 24. Nothing but + - * /, square roots and powers of 2 is computed, which IEEE 754 fixes to the last bit: numpy's
    own logarithm, exponential and sine differ between processors.

    Raises:
        ValueError: alpha is not a positive number.
    """
    if not 0.0 < alpha < float("inf"):
        raise ValueError(f"alpha of a beta distribution must be positive and finite, not {alpha}")
    # v = u^(1/alpha), q = v t^2 / (2 alpha); of a uniform angle sine and cosine are distributed alike
    v, rest = _exp(np.maximum(_log(_open_uniform(words[..., 0], words[..., 1])) / alpha, -700.0))
    q = rest * np.square(_sine_of_turn(_open_uniform(words[..., 2], words[..., 3])))
    p = v + q
    small = 0.5 * v / (p + np.sqrt(p * q))  # (1 - |t| / sqrt(2 alpha + t^2)) / 2 without its cancellation
    low = (words[..., 3] & np.uint64(1)).astype(bool)  # the sign of t: the uniform number has not used this bit
    return np.stack([np.where(low, small, 1.0 - small), np.where(low, 1.0 - small, small)], -1)


def _open_uniform(high: NDArray[np.uint64], low: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Middles of 2^52 equal parts of (0, 1): neither 0 nor 1 comes up. The lower 12 bits of `low` are not used."""
    words = high << np.uint64(20) | low >> np.uint64(12)
    return (words.astype(np.float64) + 0.5) * 2.0**-52


def _log(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The logarithm of x > 0, to 1e-15 of itself."""
    m, e = np.frexp(x)
    small = m < 0.7071067811865476
    m, e = np.where(small, 2.0 * m, m), e - small
    s = (m - 1.0) / (m + 1.0)  # log m = 2 artanh s = 2 (s + s^3 / 3 + s^5 / 5 ..), |s| < 0.172
    series = np.zeros_like(s)
    for k in range(25, 0, -2):
        series = series * (s * s) + 1.0 / k
    return e * _LN2 + 2.0 * s * series


def _exp(x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The exponential of x in [-700, 0], and 1 minus it, each to 1e-13 of itself."""
    e = np.rint(x / _LN2)
    r = x - e * _LN2
    series = np.ones_like(r)
    for k in range(16, 1, -1):
        series = 1.0 + r / k * series
    less = r * series  # exp(r) - 1
    power = np.ldexp(1.0 + less, e.astype(np.int32))
    return power, np.where(e == 0.0, -less, 1.0 - power)


def _sine_of_turn(v: NDArray[np.float64]) -> NDArray[np.float64]:
    """sin(pi v / 2) for v in (0, 1), to 1e-15 of itself."""
    x = v * _HALF_PI
    series = np.ones_like(x)
    for k in range(26, 0, -2):
        series = 1.0 - x * x / (k * (k + 1)) * series
    return x * series


def permutation(seed: int, pass_number: int, n: int) -> NDArray[np.int64]:
    """The order of n samples in a pass over the data: sorted by 64 random bits each."""
    words = bits(seed, Purpose.ORDER, pass_number, np.arange(n), n=2)
    return np.argsort(words[:, 0] << _HALF | words[:, 1], kind="stable")

"""The generator is Philox4x32-10 to the bit, and every draw is a function of what it is for and of nothing else."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal, localcontext
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from normfree.random import BETA_WORDS, Purpose, beta, bits, permutation, philox, uniform

CALM = settings(deadline=None)  # a busy machine is no failure
WORD = st.integers(0, 2**32 - 1)
SMALL = st.integers(0, 50)


def philox_by_hand(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Figure 2 and section 4.3 of Salmon et al. 2011 on Python's integers, one counter at a time."""
    x0, x1, x2, x3 = counter
    for r in range(10):
        k0, k1 = ((k + r * w) % 2**32 for k, w in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True))
        (high0, low0), (high1, low1) = divmod(x0 * 0xD2511F53, 2**32), divmod(x2 * 0xCD9E8D57, 2**32)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
    return x0, x1, x2, x3


def philox_of_one(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    words = philox(tuple(np.array([c], np.uint64) for c in counter), key)
    return tuple(int(w[0]) for w in words)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    """The three known answers for philox4x32-10 in kat_vectors of Random123 1.14."""
    k0, k1 = (int(k, 16) for k in key.split())
    words = philox_of_one(tuple(int(c, 16) for c in counter.split()), (k0, k1))
    assert " ".join(f"{w:08x}" for w in words) == expected


@CALM
@given(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD))
def test_philox_equals_the_paper_by_hand(counter: tuple[int, int, int, int], key: tuple[int, int]) -> None:
    """The vectorized generator equals the one written with Python's integers, for any counter and key."""
    assert philox_of_one(counter, key) == philox_by_hand(counter, key)


@CALM
@given(WORD, st.sampled_from(Purpose), WORD, WORD, WORD, st.integers(1, 13), st.integers(0, 1000))
def test_bits_are_philox_of_the_coordinates(
    seed: int, purpose: Purpose, a: int, b: int, c: int, n: int, attempt: int
) -> None:
    """The layout is fixed: counter (block, a, b, c), key (seed, purpose + 256 attempt), words in order."""
    blocks = [philox_by_hand((block, a, b, c), (seed, purpose + 256 * attempt)) for block in range(4)]
    expected = [word for block in blocks for word in block][:n]
    assert bits(seed, purpose, a, b, c, n=n, attempt=attempt).tolist() == expected


@CALM
@given(WORD, st.lists(st.tuples(SMALL, SMALL, SMALL), min_size=1, max_size=20), st.integers(1, 9))
def test_a_draw_does_not_depend_on_the_others_of_its_call(
    seed: int, coordinates: list[tuple[int, int, int]], n: int
) -> None:
    """Asking for many coordinates at once gives each the words that it has when asked for alone."""
    together = bits(seed, Purpose.CROP, *np.array(coordinates).T, n=n)
    alone = [bits(seed, Purpose.CROP, *c, n=n).tolist() for c in coordinates]
    assert together.tolist() == alone


@CALM
@given(st.integers(1, 20), st.integers(1, 20))
def test_fewer_words_are_the_first_of_more(n: int, more: int) -> None:
    """The first n words do not depend on how many are asked for."""
    assert bits(3, Purpose.DEPTH, 1, 2, n=n).tolist() == bits(3, Purpose.DEPTH, 1, 2, n=n + more)[:n].tolist()


def test_coordinates_broadcast() -> None:
    """A column of steps and a row of slots give a table, each entry that of its pair."""
    table = bits(1, Purpose.DROPOUT, np.arange(3)[:, None], np.arange(5), n=6)
    assert table.shape == (3, 5, 6)
    for step, slot in product(range(3), range(5)):
        assert table[step, slot].tolist() == bits(1, Purpose.DROPOUT, step, slot, n=6).tolist()


def test_whatever_differs_gives_other_words() -> None:
    """64 bits never agree between two draws of different seed, purpose, attempt or coordinates."""
    few = (0, 1, 2**32 - 1)
    keys = list(product(few, Purpose, (0, 1, 2), few, few, few))
    words = [tuple(bits(s, p, a, b, c, n=2, attempt=t).tolist()) for s, p, t, a, b, c in keys]
    assert len(set(words)) == len(keys) == 3 * len(Purpose) * 3 * 27


def test_purposes_keep_their_numbers() -> None:
    """A purpose's number is part of every draw: it may be added to, not changed."""
    frozen = {"ORDER": 1, "CROP": 2, "REPLACE": 3, "DEPTH": 4, "DROPOUT": 5, "PICTURE": 6, "MIX": 7, "AUGMENT": 8}
    assert frozen.items() <= {p.name: p.value for p in Purpose}.items()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    """A seed that does not fit 32 bits is an error, not another seed."""
    with pytest.raises(ValueError, match=r"seed must be in \[0, 2\^32\)"):
        bits(seed, Purpose.ORDER, 0)


@CALM
@given(WORD, WORD, WORD, st.integers(1, 30))
def test_uniform_is_the_upper_24_bits(seed: int, a: int, b: int, n: int) -> None:
    """Uniform numbers are float32 multiples of 2^-24 in [0, 1): the upper 24 bits of each word, exactly."""
    numbers = uniform(seed, Purpose.CROP, a, b, n=n)
    assert numbers.dtype == np.float32
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    assert (numbers.astype(np.float64) * 2**24).tolist() == [
        w >> 8 for w in bits(seed, Purpose.CROP, a, b, n=n).tolist()
    ]


@pytest.fixture(scope="module")
def many() -> NDArray[np.float64]:
    """A table of 2^18 uniform numbers: 65,536 coordinates with 4 draws each."""
    return uniform(5, Purpose.CROP, 0, np.arange(2**16), n=4).astype(np.float64)


def test_uniform_has_its_moments(many: NDArray[np.float64]) -> None:
    """Mean 1/2 and variance 1/12, within five standard errors."""
    n = many.size
    assert abs(many.mean() - 1 / 2) < 5 * np.sqrt(1 / 12 / n)
    assert abs(many.var() - 1 / 12) < 5 * np.sqrt(1 / 180 / n)  # Var (U - 1/2)^2 = 1/80 - 1/144 = 1/180


def test_uniform_fills_its_bins_evenly(many: NDArray[np.float64]) -> None:
    """Chi-square over 256 bins lies within five standard deviations of its mean: neither uneven nor too even."""
    counts = np.bincount((many.ravel() * 256).astype(int), minlength=256)
    expected = many.size / 256
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi2 - 255) < 5 * np.sqrt(2 * 255)


def test_neighbours_are_uncorrelated(many: NDArray[np.float64]) -> None:
    """The draws of one coordinate, and those of neighbouring coordinates, do not correlate (five standard errors)."""
    limit = 5 / np.sqrt(len(many))
    for i, j in ((0, 1), (1, 2), (0, 3)):
        assert abs(np.corrcoef(many[:, i], many[:, j])[0, 1]) < limit
    assert abs(np.corrcoef(many[:-1, 0], many[1:, 0])[0, 1]) < limit


def test_each_bit_is_fair() -> None:
    """Each of the 32 bits of a word is set half of the time, within five standard errors."""
    words = bits(11, Purpose.DEPTH, np.arange(2**14), n=4).ravel()
    share = (words[:, None] >> np.arange(32, dtype=np.uint64) & np.uint64(1)).mean(0)
    assert np.abs(share - 0.5).max() < 5 * 0.5 / np.sqrt(words.size)


@CALM
@given(WORD, SMALL, st.integers(1, 200))
def test_permutation_is_the_order_of_64_bit_keys(seed: int, pass_number: int, n: int) -> None:
    """A permutation of n is range(n) sorted by the two words of (ORDER, pass, index): nothing is missing or twice."""
    words = [philox_by_hand((0, pass_number, i, 0), (seed, Purpose.ORDER)) for i in range(n)]
    expected = sorted(range(n), key=lambda i: words[i][0] * 2**32 + words[i][1])
    found = permutation(seed, pass_number, n)
    assert found.tolist() == expected
    assert sorted(found.tolist()) == list(range(n))


def test_passes_and_seeds_have_orders_of_their_own() -> None:
    """No two of 20 passes under 5 seeds share an order of 30 samples."""
    orders = {tuple(permutation(seed, p, 30).tolist()) for seed, p in product(range(5), range(20))}
    assert len(orders) == 100


def test_every_order_is_equally_likely() -> None:
    """Over 4,800 passes the 24 orders of four samples come equally often (chi-square, five standard deviations)."""
    counts = Counter(tuple(permutation(0, p, 4).tolist()) for p in range(4800))
    chi2 = sum((n - 200) ** 2 / 200 for n in counts.values())
    assert len(counts) == 24
    assert abs(chi2 - 23) < 5 * np.sqrt(2 * 23)


def beta_cdf(x: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """P(X < x), x <= 1/2, of Beta(alpha, alpha), by quadrature.

    With s = t^alpha the integral of t^(alpha-1) (1-t)^(alpha-1) is that of (1 - s^(1/alpha))^(alpha-1) / alpha, which
    is smooth; the half of it is known by symmetry.
    """
    nodes, weights = np.polynomial.legendre.leggauss(200)

    def integral(end: NDArray[np.float64]) -> NDArray[np.float64]:
        top = end[:, None] ** alpha
        values = (1 - (top * (nodes + 1) / 2) ** (1 / alpha)) ** (alpha - 1)
        return np.asarray(top[:, 0] * (values @ weights))

    return 0.5 * integral(x) / integral(np.array([0.5]))


def beta_draws(alpha: float, n: int = 20_000) -> NDArray[np.float64]:
    return beta(bits(7, Purpose.MIX, 1, np.arange(n), n=BETA_WORDS), alpha)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 1.0, 3.0, 50.0])
def test_beta_is_beta(alpha: float) -> None:
    """Both halves follow the distribution function (Kolmogorov-Smirnov, p > 0.001), and are equally likely."""
    draws = beta_draws(alpha)
    for ours in draws.T:
        half = np.sort(ours[ours <= 0.5])
        expected, n = 2 * beta_cdf(half, alpha), len(half)
        gap = max(np.abs(expected - np.arange(n) / n).max(), np.abs(expected - np.arange(1, n + 1) / n).max())
        assert gap < 1.95 / np.sqrt(n)
        assert abs(n / len(ours) - 0.5) < 4 * 0.5 / np.sqrt(len(ours))


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0, 3.0])
def test_beta_has_its_moments(alpha: float) -> None:
    """The mean is 1/2 and the second moment about it 1 / (4 (2 alpha + 1)), within five standard errors."""
    x = beta_draws(alpha)[:, 0] - 0.5
    variance = 1 / (4 * (2 * alpha + 1))
    fourth = 3 / (16 * (2 * alpha + 1) * (2 * alpha + 3))
    assert abs(x.mean()) < 5 * np.sqrt(variance / len(x))
    assert abs((x**2).mean() - variance) < 5 * np.sqrt((fourth - variance**2) / len(x))


def test_the_ends_of_beta_keep_their_small_numbers() -> None:
    """At alpha 0.2 each share is below 1e-12 in 0.21 % of draws, also where the other one rounds to 1."""
    draws, limit = beta_draws(0.2, 200_000), 1e-12
    expected = beta_cdf(np.array([limit]), 0.2)[0]
    for small in draws.T:
        count = (small < limit).sum()
        assert abs(count / len(draws) - expected) < 5 * np.sqrt(expected / len(draws))
        assert len(np.unique(small[small < limit])) == count
        assert small.min() > 0.0
    assert (draws.sum(1) == 1.0).all()


@CALM
@given(st.tuples(WORD, WORD, WORD, WORD), st.sampled_from([0.01, 0.2, 1.0, 7.5]))
def test_beta_is_its_formula(words: tuple[int, int, int, int], alpha: float) -> None:
    """Each draw is (1 +- |t| / sqrt(2 alpha + t^2)) / 2 with Bailey's t, here with the decimals of Python."""
    u, v = (Decimal((words[i] * 2**20 + words[i + 1] // 2**12) * 2 + 1) / 2**53 for i in (0, 2))
    with localcontext() as context:
        context.prec = 60
        power = (u.ln() / Decimal(alpha)).exp()
        t2 = (1 / power - 1) * sine(v * PI / 2) ** 2  # over 2 alpha
        small = 1 / ((1 + t2) + (t2 * (1 + t2)).sqrt()) / 2
        expected = (small, 1 - small) if words[3] % 2 else (1 - small, small)
    found = beta(np.array(words, np.uint64), alpha)
    for a, b in zip(found.tolist(), expected, strict=True):
        assert abs(Decimal(a) - b) <= max(b * Decimal("1e-12"), Decimal("1e-270"))


PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494")


def sine(x: Decimal) -> Decimal:
    term, total = x, x
    for k in range(2, 60, 2):
        term *= -x * x / (k * (k + 1))
        total += term
    return total


def test_beta_keeps_its_bits() -> None:
    """Frozen, so that another processor, numpy or edit that changes a draw is noticed."""
    expected = ["0x1.215f39258f08bp-5", "0x1.02c7c9ce8f77bp-11", "0x1.da3291c627914p-1", "0x1.be1e95b0a19a8p-2"]
    assert [x.hex() for x in beta_draws(0.2, 4)[:, 0].tolist()] == expected


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("inf"), float("nan")])
def test_an_alpha_that_is_no_positive_number_is_refused(alpha: float) -> None:
    """Rather than draws that are not numbers."""
    with pytest.raises(ValueError, match="alpha of a beta distribution must be positive"):
        beta(np.zeros(4, np.uint64), alpha)

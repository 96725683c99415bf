"""The stream of samples is a function of the position: whole passes, in any batches, asked for in any order."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from normfree.data.order import samples_at
from normfree.random import permutation

CALM = settings(deadline=None)  # a busy machine is no failure
SEED = st.integers(0, 2**32 - 1)
COUNT = st.integers(1, 60)


@CALM
@given(SEED, COUNT, st.integers(0, 30))
def test_every_pass_is_a_permutation(seed: int, n: int, pass_number: int) -> None:
    """The n positions of a pass have every sample once, in the order of `permutation`."""
    passes, indices = samples_at(np.arange(pass_number * n, (pass_number + 1) * n), n, seed)
    assert passes.tolist() == [pass_number] * n
    assert sorted(indices.tolist()) == list(range(n))
    assert indices.tolist() == permutation(seed, pass_number, n).tolist()


@CALM
@given(SEED, COUNT, st.integers(1, 200), st.integers(1, 300))
def test_batches_do_not_matter(seed: int, n: int, batch_size: int, total: int) -> None:
    """Cut into batches of any size, also of many passes, the stream is the same position by position."""
    whole = samples_at(np.arange(total), n, seed)
    parts = [samples_at(np.arange(s, min(s + batch_size, total)), n, seed) for s in range(0, total, batch_size)]
    for part, expected in zip(zip(*parts, strict=True), whole, strict=True):
        assert np.concatenate(part).tolist() == expected.tolist()


@CALM
@given(SEED, COUNT, st.lists(st.integers(0, 500), min_size=1, max_size=40))
def test_positions_do_not_depend_on_each_other(seed: int, n: int, positions: list[int]) -> None:
    """Positions in any order, with repeats, give each the sample that it gives alone."""
    passes, indices = samples_at(np.array(positions), n, seed)
    alone = [samples_at(np.array([p]), n, seed) for p in positions]
    assert passes.tolist() == [int(p[0]) for p, _ in alone] == [p // n for p in positions]
    assert indices.tolist() == [int(i[0]) for _, i in alone]


def test_passes_differ() -> None:
    """Ten passes over 50 samples have ten orders."""
    _, indices = samples_at(np.arange(500), 50, 0)
    assert len({tuple(order) for order in indices.reshape(10, 50).tolist()}) == 10


def test_seeds_differ() -> None:
    """Another seed is another stream."""
    streams = {tuple(samples_at(np.arange(50), 50, seed)[1].tolist()) for seed in range(10)}
    assert len(streams) == 10


def test_what_is_returned_can_be_written_to() -> None:
    """Writing to the result, as the loader does for broken images, leaves the stream and the positions as they are."""
    positions = np.arange(10)
    passes, indices = samples_at(positions, 10, 0)
    before = indices.tolist()
    passes += 7
    indices[:] = -1
    assert positions.tolist() == list(range(10))
    assert samples_at(positions, 10, 0)[1].tolist() == before


def test_far_positions_are_as_quick_as_near_ones() -> None:
    """A run that resumes after a billion samples starts with the right one: nothing is played back."""
    n, far = 1000, 10**12
    passes, indices = samples_at(np.arange(far, far + n), n, 4)
    assert set(passes.tolist()) == {far // n}
    assert sorted(indices.tolist()) == list(range(n))

"""Which sample stands at which place of the endless stream of training images."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from normfree import random

_cached_permutation = lru_cache(maxsize=2)(random.permutation)  # a batch touches two passes at most, save tiny sets


def samples_at(positions: NDArray[np.int64], n: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(pass, index) of each position, for a source of n samples.

    Position p is in pass p // n; each pass is a new permutation. Batches follow one another without regard to where a
    pass ends, so that every sample comes equally often for any batch size.
    """
    passes, offsets = np.divmod(positions, n)
    indices = np.empty_like(positions)
    for p in np.unique(passes):
        here = passes == p
        indices[here] = _cached_permutation(seed, int(p), n)[offsets[here]]
    return passes, indices

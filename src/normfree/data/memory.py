"""Memory for pixels is kept between images: else the system clears fresh pages for each, at the price of a resize."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_BLOCK = 2**25 - 2**16  # bytes: just under 32 MiB, the most that glibc's threshold follows


@lru_cache(maxsize=1)
def keep_memory() -> None:
    """From now on freed blocks of up to 32 MiB stay with this process.

    glibc gives large blocks back to the system when they are freed, until it has seen one of their size freed once.
    Nothing is written to the block, so that it costs nothing; other allocators are not affected.
    """
    np.empty(_BLOCK, np.uint8)

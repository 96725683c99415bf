"""Lists that took long to make, kept between runs: arrays under a key, with a proof that they still hold.

A list is used only where its proof is what the caller finds now: the caller stats what the list was made from. A file
that is missing, broken or of another time is no error; it is made anew.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, numpy

from normfree.data.sources.names import Names
from normfree.files import cache_folder, write_atomic

_DIGEST = 16  # bytes of a hash
_FORMAT = "1"  # of what is kept; another one is made anew
_SETTLED = 2 * 10**9  # nanoseconds; of coarse clocks of file systems

Arrays = dict[str, NDArray[Any]]


def stamp(path: str | Path) -> tuple[int, int, int, int, int]:
    """Another one as soon as a file was written or replaced, or an entry of a folder came or went.

    (device, inode, size, time of content, time of change); the last cannot be set back by any program.
    """
    s = os.stat(path)
    return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns


def settled(stamps: NDArray[np.int64]) -> bool:
    """Whether (N, 5) stamps are old enough that a later change would alter them, however coarse the clock is."""
    return bool(np.all(stamps[:, 3:] < time.time_ns() - _SETTLED))


def load(kind: str, key: str) -> Arrays | None:
    """The arrays that were kept under a key, or None."""
    try:
        content = _path(kind, key).read_bytes()
        digest, content = content[:_DIGEST], content[_DIGEST:]
        return numpy.load(content) if digest == _hash(content) else None
    except (OSError, ValueError, KeyError, SafetensorError):
        return None


def keep(kind: str, key: str, arrays: Arrays) -> None:
    """Keep arrays under a key, if the cache can be written."""
    content = numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    path = _path(kind, key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, _hash(content) + content)
    except OSError:
        return  # a home that cannot be written costs time, and nothing else


def pack_names(label: str, names: Names) -> Arrays:
    """Names as arrays, to be kept."""
    return {label: np.frombuffer(names.buffer, np.uint8), f"{label}_ends": names.ends}


def unpack_names(label: str, arrays: Arrays) -> Names:
    """Raises KeyError or ValueError where the arrays are not what `pack_names` made."""
    return Names.of(arrays[label].astype(np.uint8, casting="safe").tobytes(), arrays[f"{label}_ends"])


def _path(kind: str, key: str) -> Path:
    name = _hash(os.fsencode(f"{_FORMAT}\0{kind}\0{key}")).hex()
    return cache_folder() / "lists" / f"{kind}-{name}"


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST).digest()

"""Millions of strings in one buffer: no Python object per string, so that workers share it and memory stays flat."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

_CHUNK = 1 << 16  # strings that are handled at once


class Names:
    """A list of strings, kept as the bytes that a file system has for them."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        buffer, ends = bytearray(), array("q")
        for name in names:
            buffer += os.fsencode(name)
            ends.append(len(buffer))
        self.buffer = bytes(buffer)
        self.ends = np.array(ends, np.int64)  # (N,) where each string ends in the buffer

    @classmethod
    def of(cls, buffer: bytes, ends: NDArray[np.int64]) -> Names:
        """From what another one keeps.

        Raises:
            ValueError: the ends do not fit the buffer.
        """
        if len(buffer) != (ends[-1] if len(ends) else 0) or np.any(np.diff(ends, prepend=0) < 0):
            raise ValueError("the ends of the names do not fit their buffer")
        names = cls()
        names.buffer, names.ends = buffer, ends
        return names

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self.ends):
            raise IndexError(index)
        start = self.ends[index - 1] if index > 0 else 0
        return os.fsdecode(self.buffer[start : self.ends[index]])

    def __iter__(self) -> Iterator[str]:
        return map(os.fsdecode, self.encoded())

    def encoded(self) -> Iterator[bytes]:
        """The strings as bytes, in order."""
        start = 0
        for first in range(0, len(self.ends), _CHUNK):
            for end in self.ends[first : first + _CHUNK].tolist():
                yield self.buffer[start:end]
                start = end

    def take(self, indices: NDArray[np.int64]) -> Names:
        """These strings only, in this order."""
        lengths = np.diff(self.ends, prepend=0)[indices]
        starts = self.ends[indices] - lengths
        source, parts = np.frombuffer(self.buffer, np.uint8), []
        for first in range(0, len(indices), _CHUNK):
            length, start = lengths[first : first + _CHUNK], starts[first : first + _CHUNK]
            # byte j of a string is at its start + j: steps of 1, but for a jump where a string begins
            places = np.arange(length.sum()) + np.repeat(start - (np.cumsum(length) - length), length)
            parts.append(source[places].tobytes())
        return Names.of(b"".join(parts), np.cumsum(lengths, dtype=np.int64))


class NamesBuilder:
    """A list of strings that grows."""

    def __init__(self) -> None:
        self._buffer, self._ends = bytearray(), array("q")

    def __len__(self) -> int:
        return len(self._ends)

    def append(self, name: bytes) -> None:
        """Add one at the end."""
        self._buffer += name
        self._ends.append(len(self._buffer))

    def done(self) -> Names:
        """The list."""
        return Names.of(bytes(self._buffer), np.array(self._ends, np.int64))


def joined(parts: Iterable[Names]) -> Names:
    """The strings of several lists, one list after another."""
    parts = list(parts)
    starts = np.cumsum([0, *(len(p.buffer) for p in parts)])
    ends = [p.ends + start for p, start in zip(parts, starts[:-1], strict=True)]
    return Names.of(b"".join(p.buffer for p in parts), np.concatenate([np.zeros(0, np.int64), *ends]))

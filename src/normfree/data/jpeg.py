"""Quick decoding of ordinary JPEGs: libjpeg-turbo by way of simplejpeg, where that is installed.

It gives the pixels that Pillow gives, in three quarters of the time. It takes less than Pillow: at the slightest
damage, and for anything out of the ordinary, `decode_jpeg` says None, and Pillow decides. So files are good or bad, and
have the pixels that they have, with simplejpeg as without it.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from normfree.data.memory import keep_memory

SCALES = (1, 2, 4, 8)  # to 1 / scale of both sides, at which a JPEG can be decoded with less work
SMALLEST = 64  # pixels of the short side, under which decoding at a scale is left
_APP1, _SCAN = 0xE1, 0xDA
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, with Huffman codes
# tables of quantization, Huffman codes and restarts; application data; comments
_PASSED = frozenset((0xDB, 0xC4, 0xDD, *range(0xE0, 0xF0), 0xFE))


class JpegHeader(NamedTuple):
    """What an ordinary JPEG says of itself before its first scan."""

    width: int  # as stored, before EXIF turns it
    height: int
    metadata: bool  # whether there is an APP1 segment, that is EXIF or XMP, which may turn the picture


def read_header(content: bytes) -> JpegHeader | None:
    """The header of a JPEG of 8 bits, grey or with 3 colours, Huffman-coded; None of anything else, or if damaged."""
    if content[:2] != b"\xff\xd8":
        return None
    at, end, size, metadata = 2, len(content) - 4, None, False
    while at < end and content[at] == 0xFF:
        marker, length = content[at + 1], content[at + 2] << 8 | content[at + 3]
        if marker == _SCAN:
            return JpegHeader(*size, metadata) if size else None
        if marker in _FRAMES and size is None:
            size = _frame_size(content[at + 4 : at + 2 + length])
            if size is None:
                return None
        elif marker not in _PASSED:
            return None
        metadata |= marker == _APP1
        at += 2 + length
    return None


def decode_jpeg(content: bytes, header: JpegHeader, scale: int = 1) -> NDArray[np.uint8] | None:
    """(H, W, 3) RGB, not turned; None where simplejpeg is missing or finds the least fault in the file.

    Args:
        content: the file.
        header: what `read_header` found in it.
        scale: of `SCALES`; both sides are divided by it and rounded up.
    """
    simplejpeg = _simplejpeg()
    if simplejpeg is None:
        return None
    height, width = -(-header.height // scale), -(-header.width // scale)
    options = {"min_height": height, "min_width": width} if scale > 1 else {}
    keep_memory()
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(content, strict=True, **options)
    except (ValueError, RuntimeError):
        return None
    return pixels if pixels.shape == (height, width, 3) else None


def _frame_size(frame: bytes) -> tuple[int, int] | None:
    """(width, height) from a frame header without its length: bits, height, width, components, 3 bytes for each."""
    if len(frame) < 6 or frame[0] != 8 or frame[5] not in (1, 3) or len(frame) != 6 + 3 * frame[5]:
        return None
    height, width = frame[1] << 8 | frame[2], frame[3] << 8 | frame[4]
    return (width, height) if width and height else None  # a height of 0 is given later in the file


@lru_cache(maxsize=1)
def _simplejpeg() -> ModuleType | None:
    try:
        return importlib.import_module("simplejpeg")
    except (ImportError, OSError, RuntimeError):  # also where a library that it needs does not fit
        return None

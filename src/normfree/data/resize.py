"""Bicubic resizing without antialiasing, as TensorFlow does it, to the last bit: for evaluation as published.

Each output pixel is a weighted sum of 4 input pixels a side, however far the image is reduced. The weights are Keys'
cubic with a = -0.5, taken from a table of 1,024 steps a pixel; those beyond the edge are dropped and the others scaled
to sum to 1. Rows first, then columns, in float32. What comes out is not clipped: it may leave [0, 255].
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
_STEPS = 1024
_A = -0.5


def resize_bicubic(image: NDArray[np.uint8] | Floats, height: int, width: int) -> Floats:
    """(H, W, C) -> (height, width, C), float32, equal to tf.image.resize(method="bicubic", antialias=False)."""
    out = _resize_axis(image.astype(np.float32, copy=False), 0, height)
    return _resize_axis(out, 1, width)


def _resize_axis(x: Floats, axis: int, size: int) -> Floats:
    indices, weights = _taps(x.shape[axis], size)
    shape = [1, 1, 1]
    shape[axis] = size
    out: Floats = x.take(indices[0], axis) * weights[0].reshape(shape)
    for index, weight in zip(indices[1:], weights[1:], strict=True):
        out += x.take(index, axis) * weight.reshape(shape)
    return out


@lru_cache(maxsize=256)
def _taps(n_in: int, n_out: int) -> tuple[NDArray[np.int64], Floats]:
    """For each of 4 taps, the input pixel of every output pixel and its weight: (4, n_out) each."""
    f32 = np.float32
    position = (np.arange(n_out, dtype=f32) + f32(0.5)) * (f32(n_in) / f32(n_out)) - f32(0.5)
    base = np.floor(position)
    step = np.rint((position - base) * f32(_STEPS)).astype(np.int64)  # half to even
    near, far = _cubic()
    weights = np.stack([far[step], near[step], near[_STEPS - step], far[_STEPS - step]])
    indices = base.astype(np.int64) + np.arange(-1, 3)[:, None]
    weights = np.where((indices >= 0) & (indices < n_in), weights, f32(0))
    total = ((weights[0] + weights[1]) + weights[2]) + weights[3]
    return indices.clip(0, n_in - 1), weights * (f32(1) / total)


@lru_cache(maxsize=1)
def _cubic() -> tuple[Floats, Floats]:
    """The kernel at distances x and 1 + x, for x from 0 to 1 in steps of 1 / 1024."""
    x = np.arange(_STEPS + 1) / _STEPS
    y = x + 1.0
    near = ((_A + 2) * x - (_A + 3)) * x * x + 1
    far = ((_A * y - 5 * _A) * y + 8 * _A) * y - 4 * _A
    return near.astype(np.float32), far.astype(np.float32)

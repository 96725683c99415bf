"""Bicubic resizing: without antialiasing as TensorFlow, to the last bit or quickly; with antialiasing as Pillow.

Without antialiasing each output pixel is a weighted sum of 4 input pixels a side, however far the image is reduced. The
weights are Keys' cubic with a = -0.5, taken from a table of 1,024 steps a pixel; those beyond the edge are dropped and
the others scaled to sum to 1. Rows first, then columns, in float32. The sums are not clipped: they may leave [0, 255].

A row of the result is a sum of 4 weighted rows of the image, which is what torch's embedding_bag computes, quicker than
anything else on a CPU. It fuses products into sums, which costs equality in the last bits; where that matters they are
made one by one. For columns the image is turned.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag, interpolate

from normfree.data.memory import keep_memory

Pixels = NDArray[np.uint8]  # (H, W, 3)
Floats = NDArray[np.float32]
Range = tuple[int, int]
_STEPS = 1024
_A = -0.5


class _Taps(NamedTuple):
    """For every output pixel along an axis its 4 input pixels and their weights."""

    indices: Tensor  # (4, n) int64
    weights: Tensor  # (4, n) float32


def resize_bicubic(
    image: Pixels | Floats, height: int, width: int, rows: Range | None = None, columns: Range | None = None
) -> Floats:
    """(H, W, C) -> (height, width, C), float32, equal to tf.image.resize(method="bicubic", antialias=False).

    With `rows` and `columns`, from and to, only that part of the result is computed.
    """
    down = _taps(image.shape[0], height, rows or (0, height))
    across = _taps(image.shape[1], width, columns or (0, width))
    return turned(_resize(image, down, across, _exact_sums))


def quick_bicubic(image: Pixels, size: int, flip: bool = False, whole: bool = True) -> NDArray[Any]:
    """(H, W, C) -> (size, size, C): as `resize_bicubic` but for the last bits.

    Args:
        image: the pixels.
        size: of both sides.
        flip: mirror left and right.
        whole: to uint8, clipped and rounded to the nearest; else to float16 as it is.
    """
    down, across = _taps(image.shape[0], size, (0, size)), _taps(image.shape[1], size, (0, size))
    out = _resize(image, down, _Taps(*(t.flip(1) for t in across)) if flip else across, _sums)
    return turned(_whole(out) if whole else torch.from_numpy(out).half().numpy())  # torch is 20 times as quick as NumPy


def antialiased(image: Pixels, height: int, width: int, flip: bool = False) -> Pixels:
    """(H, W, C) -> (height, width, C): bicubic with antialiasing, by torch's kernel of whole numbers; maybe mirrored.

    Equal to Pillow's to one level, but for one pixel in some thousands where one side grows and the other shrinks much.
    """
    if image.shape[:2] == (height, width):
        return mirrored(image) if flip else image.copy()
    planes = _tensor(image).permute(2, 0, 1)[None]
    out = interpolate(planes, (height, width), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
    return mirrored(out) if flip else _by_channel(out)


def mirrored(image: Pixels) -> Pixels:
    """Left and right exchanged; a copy."""
    return _by_channel(image[:, ::-1])


def turned(image: NDArray[Any]) -> NDArray[Any]:
    """(H, W, C) -> (W, H, C), a copy."""
    return _by_channel(image.transpose(1, 0, 2))


def _by_channel(image: NDArray[Any]) -> NDArray[Any]:
    """A contiguous copy, made channel by channel: quicker than NumPy moves pixels of 3 bytes out of order."""
    out = np.empty(image.shape, image.dtype)
    for k in range(image.shape[2]):
        out[..., k] = image[..., k]
    return out


def _whole(image: Floats) -> Pixels:
    np.clip(image, 0, 255, out=image)
    image += np.float32(0.5)
    return image.astype(np.uint8)


def _resize(image: Pixels | Floats, down: _Taps, across: _Taps, sums: Callable[[Tensor, _Taps], Tensor]) -> Floats:
    """(H, W, C) -> (width, height, C), turned."""
    keep_memory()
    image, down = _needed(image, down, 0)
    image, across = _needed(image, across, 1)
    return _rows(turned(_rows(image.astype(np.float32, order="C"), down, sums)), across, sums)


def _rows(image: Floats, taps: _Taps, sums: Callable[[Tensor, _Taps], Tensor]) -> Floats:
    """(H, W, C) -> (n, W, C) by the taps of n rows."""
    table = torch.from_numpy(image).view(image.shape[0], -1)
    out: Floats = sums(table, taps).view(-1, *image.shape[1:]).numpy()
    return out


def _sums(table: Tensor, taps: _Taps) -> Tensor:
    """(rows, m), taps of n rows -> (n, m)."""
    return embedding_bag(taps.indices.T, table, per_sample_weights=taps.weights.T, mode="sum")


def _exact_sums(table: Tensor, taps: _Taps) -> Tensor:
    """As `_sums`; every product and every sum is rounded, in the order of the taps."""
    terms = (table.index_select(0, index).mul_(weight[:, None]) for index, weight in zip(*taps, strict=True))
    out = next(terms)
    for term in terms:
        out += term
    return out


def _needed(image: Any, taps: _Taps, axis: int) -> tuple[Any, _Taps]:
    """Where the image is reduced by more than 4, the rows (or columns) that have a weight; else all."""
    if image.shape[axis] <= taps.indices.numel():
        return image, taps
    indices = torch.arange(taps.indices.numel()).view(4, -1)
    return image.take(taps.indices.numpy().ravel(), axis), _Taps(indices, taps.weights)


def _tensor(image: Pixels) -> Tensor:
    # torch warns of read-only arrays, and refuses those that run backwards
    return torch.from_numpy(image if image.flags.writeable and min(image.strides) > 0 else image.copy())


@lru_cache(maxsize=1024)
def _taps(n_in: int, n_out: int, part: Range) -> _Taps:
    """Of the pixels in `part`, from and to, of n_out."""
    f32 = np.float32
    position = (np.arange(*part, dtype=f32) + f32(0.5)) * (f32(n_in) / f32(n_out)) - f32(0.5)
    base = np.floor(position)
    step = np.rint((position - base) * f32(_STEPS)).astype(np.int64)  # half to even
    near, far = _cubic()
    weights = np.stack([far[step], near[step], near[_STEPS - step], far[_STEPS - step]])
    indices = base.astype(np.int64) + np.arange(-1, 3)[:, None]
    weights = np.where((indices >= 0) & (indices < n_in), weights, f32(0))
    total = ((weights[0] + weights[1]) + weights[2]) + weights[3]
    scaled = weights * (f32(1) / total)
    return _Taps(torch.from_numpy(indices.clip(0, n_in - 1)), torch.from_numpy(scaled))


@lru_cache(maxsize=1)
def _cubic() -> tuple[Floats, Floats]:
    """The kernel at distances x and 1 + x, for x from 0 to 1 in steps of 1 / 1024."""
    x = np.arange(_STEPS + 1) / _STEPS
    y = x + 1.0
    near = ((_A + 2) * x - (_A + 3)) * x * x + 1
    far = ((_A * y - 5 * _A) * y + 8 * _A) * y - 4 * _A
    return near.astype(np.float32), far.astype(np.float32)

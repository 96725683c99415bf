"""Operations of AutoAugment and RandAugment on pixels, equal to those of the NFNet authors' TensorFlow code.

x is uint8 (N, H, W, 3), contiguous; each function gives another of the same shape, or x itself where nothing changes.
Strengths are those of the operation (degrees, bits, a factor), one for the whole batch. What TensorFlow computes in
float32 is computed in float32 here, in the same order and without fused multiply-adds, and cut off, not rounded: so the
results are equal on every pixel and every device. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FILL = 128  # grey, where no pixel of the image is
Matrix = tuple[float, float, float, float, float, float]


def autocontrast(x: Tensor) -> Tensor:
    """Each channel stretched so that it reaches from 0 to 255; one of a single value stays."""
    low, high = (_over_pixels(x, kind).float()[..., None] for kind in ("min", "max"))  # (N, 3, 1)
    # a tensor over a tensor: with a Python number torch multiplies by the reciprocal
    scale = torch.full_like(low, 255.0) / (high - low).clamp_(min=1.0)
    values = torch.arange(256, dtype=torch.float32, device=x.device)
    table = ((values * scale).add_(-low * scale)).clamp_(0.0, 255.0)
    return _look_up_channels(x, torch.where(high > low, table, values).to(torch.uint8))


def equalize(x: Tensor) -> Tensor:
    """Each channel with its cumulative histogram made straight; one of few values, whose step is 0, stays."""
    counts = _histogram(x)
    below = counts.cumsum(-1) - counts  # pixels that are darker than each value
    step = (below * (counts > 0)).amax(-1, keepdim=True) // 255  # all pixels but those of the brightest value
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255)
    same = torch.arange(256, device=x.device)
    return _look_up_channels(x, torch.where(step > 0, table, same).to(torch.uint8))


def invert(x: Tensor) -> Tensor:
    """255 - x."""
    return x.bitwise_not()


def posterize(x: Tensor, bits: int) -> Tensor:
    """The upper bits kept. As TensorFlow shifts by 0 to 7 places, 0 bits are 1; more than 8 wrap, and are 1 too."""
    shift = min((8 - bits) % 256, 7)
    return x.bitwise_and(0xFF >> shift << shift)


def solarize(x: Tensor, threshold: int) -> Tensor:
    """Inverted from the threshold on; the threshold is a uint8, so that 256 is 0 and all is inverted."""
    if threshold % 256 == 0:
        return invert(x)
    return _look_up(x, _solarize_table(threshold % 256, x.device))


def solarize_add(x: Tensor, amount: int) -> Tensor:
    """Values below 128 raised by the amount, up to 255."""
    return _look_up(x, _solarize_add_table(amount, x.device))


def brightness(x: Tensor, factor: float) -> Tensor:
    """Between black (0) and the image (1), or beyond."""
    return x if factor == 1.0 else _look_up(x, _blend_table(0, factor, x.device))


def contrast(x: Tensor, factor: float) -> Tensor:
    """Between a grey and the image, or beyond.

    The grey would be the mean, but the authors' code has the mean of the histogram's counts: pixels / 256, up to 255.
    """
    grey = min(x.shape[1] * x.shape[2] // 256, 255)
    return x if factor == 1.0 else _look_up(x, _blend_table(grey, factor, x.device))


def color(x: Tensor, factor: float) -> Tensor:
    """Between the grey image and the image, or beyond."""
    if factor == 1.0:
        return x
    planes = torch.empty((3, *x.shape[:3]), dtype=torch.float32, device=x.device).copy_(x.movedim(-1, 0))
    out = torch.empty_like(x)
    out.movedim(-1, 0).copy_(_blend(_grey(planes), planes, factor))
    return out


def sharpness(x: Tensor, factor: float) -> Tensor:
    """Between the smoothed image and the image, or beyond; the outermost pixels stay."""
    if factor == 1.0 or min(x.shape[1:3]) < 3:
        return x
    values = x.reshape(-1).float()
    row = 3 * x.shape[2]
    inner = slice(row + 3, len(values) - row - 3)  # every pixel with eight neighbours, and some that are put back
    out = x.clone()
    out.view(-1)[inner] = _blend(_smooth(values, row), values[inner], factor)
    out[:, :: x.shape[1] - 1] = x[:, :: x.shape[1] - 1]
    out[:, :, :: x.shape[2] - 1] = x[:, :, :: x.shape[2] - 1]
    return out


def cutout(x: Tensor, half: int, centers: NDArray[np.int64]) -> Tensor:
    """A square of side 2 half, as far as it is inside the image, filled; centers (N, 2) are y, x in pixels."""
    out = x.clone()
    for image, (cy, cx) in zip(out, centers.tolist(), strict=True):
        image[max(0, cy - half) : cy + half, max(0, cx - half) : cx + half].fill_(FILL)
    return out


def rotate(x: Tensor, degrees: float) -> Tensor:
    """Turned about the middle; positive is what the authors' code calls so."""
    return _transform(x, _rotation(degrees, x.shape[1], x.shape[2]))


def shear_x(x: Tensor, level: float) -> Tensor:
    """Output pixel (y, x) is input pixel (y, x + level y)."""
    return _transform(x, (1.0, level, 0.0, 0.0, 1.0, 0.0))


def shear_y(x: Tensor, level: float) -> Tensor:
    """Output pixel (y, x) is input pixel (y + level x, x)."""
    return _transform(x, (1.0, 0.0, 0.0, level, 1.0, 0.0))


def translate_x(x: Tensor, pixels: float) -> Tensor:
    """Output pixel (y, x) is input pixel (y, x + pixels)."""
    return _translate(x, 2, pixels)


def translate_y(x: Tensor, pixels: float) -> Tensor:
    """Output pixel (y, x) is input pixel (y + pixels, x)."""
    return _translate(x, 1, pixels)


# ---- tables of 256 values


def _look_up(x: Tensor, table: Tensor) -> Tensor:
    return table.index_select(0, x.reshape(-1).int()).view(x.shape)


def _look_up_channels(x: Tensor, tables: Tensor) -> Tensor:
    """As _look_up, with the tables (N, 3, 256) of each image's channels."""
    return tables.view(-1).index_select(0, _channel_values(x).view(-1)).view(x.shape)


def _channel_values(x: Tensor) -> Tensor:
    """Values numbered apart for each image's channels: x + 256 (3 n + c), int32 (N, H, W 3)."""
    n, height, width, _ = x.shape
    first = torch.arange(0, 768 * n, 256, dtype=torch.int32, device=x.device).view(n, 1, 3)
    return x.view(n, height, -1).int().add_(first.repeat(1, 1, width))


def _histogram(x: Tensor) -> Tensor:
    """(N, 3, 256) int32."""
    counts = torch.zeros(768 * len(x), dtype=torch.int32, device=x.device)
    values = _channel_values(x).view(-1).long()
    return counts.scatter_add_(0, values, counts.new_ones(1).expand_as(values)).view(len(x), 3, 256)


def _over_pixels(x: Tensor, kind: str) -> Tensor:
    """Least or greatest value of each channel, (N, 3): over rows first, which is quick as they are contiguous."""
    n, height, width, _ = x.shape
    reduce = torch.amin if kind == "min" else torch.amax
    return reduce(reduce(x.view(n, height, width * 3), 1).view(n, width, 3), 1)


@lru_cache(maxsize=64)
def _solarize_table(threshold: int, device: torch.device) -> Tensor:
    v = np.arange(256)
    return _moved(np.where(v < threshold, v, 255 - v).astype(np.uint8), device)


@lru_cache(maxsize=64)
def _solarize_add_table(amount: int, device: torch.device) -> Tensor:
    v = np.arange(256)
    return _moved(np.where(v < 128, (v + amount).clip(0, 255), v).astype(np.uint8), device)


@lru_cache(maxsize=64)
def _blend_table(grey: int, factor: float, device: torch.device) -> Tensor:
    v = np.arange(256, dtype=np.float32)
    mixed = np.float32(grey) + np.float32(factor) * (v - np.float32(grey))
    return _moved(mixed.clip(0, 255).astype(np.uint8), device)


def _moved(array: NDArray[np.uint8] | NDArray[np.int32], device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


# ---- pairs of images


def _blend(zero: Tensor, one: Tensor, factor: float) -> Tensor:
    """uint8 of zero + factor (one - zero), of float32 whole numbers, clipped to [0, 255] and cut off."""
    mixed = (one - zero).mul_(factor).add_(zero).clamp_(0.0, 255.0)
    return mixed.to(torch.int16).to(torch.uint8)  # by way of int16, which is three times as fast


def _grey(planes: Tensor) -> Tensor:
    """(3, ..) float32 in 0..255 -> (..), whole numbers: ITU-R BT.601 in four digits, as in TensorFlow."""
    red, green, blue = (planes * (1 / 255)).unbind(0)
    luma = red.mul_(0.2989).add_(green.mul_(0.5870)).add_(blue.mul_(0.1140))
    return luma.mul_(255.5).floor_()


def _smooth(values: Tensor, row: int) -> Tensor:
    """Mean of the 3 x 3 neighbours with 5 in the middle, cut off: flat (P,) -> (P - 2 row - 6,), whole numbers.

    A flat array: what is a neighbour to the pixels at the edge is not, and the caller puts them back.
    """
    light, heavy = values * float(np.float32(1) / np.float32(13)), values * float(np.float32(5) / np.float32(13))
    size = len(values) - 2 * row - 6
    starts = [y * row + x for y in range(3) for x in (0, 3, 6)]
    taps = [(heavy if i == 4 else light)[start : start + size] for i, start in enumerate(starts)]
    total = taps[0] + taps[1]
    for tap in taps[2:]:  # in reading order, one by one, as TensorFlow adds
        total.add_(tap)
    return total.floor_()


# ---- geometry: each output pixel is the nearest input pixel, or FILL


def _translate(x: Tensor, axis: int, pixels: float) -> Tensor:
    whole = np.float32(pixels)
    if whole != np.rint(whole):
        return _transform(x, (1.0, 0.0, pixels, 0.0, 1.0, 0.0) if axis == 2 else (1.0, 0.0, 0.0, 0.0, 1.0, pixels))
    size, by = x.shape[axis], int(whole)
    out, length = torch.full_like(x, FILL), max(0, size - abs(by))
    out.narrow(axis, min(max(0, -by), size), length).copy_(x.narrow(axis, min(max(0, by), size), length))
    return out


def _transform(x: Tensor, matrix: Matrix) -> Tensor:
    n, height, width, _ = x.shape
    source = _source_pixels(matrix, height, width, x.device)
    pixels = torch.cat([x.view(n, -1, 3), x.new_full((n, 1, 3), FILL)], 1)
    return pixels.index_select(1, source).view(x.shape)


def _rotation(degrees: float, height: int, width: int) -> Matrix:
    f32 = np.float32
    angle = f32(degrees) * f32(math.pi / 180)
    cos, sin = f32(math.cos(angle)), f32(math.sin(angle))
    right, bottom = f32(width - 1), f32(height - 1)
    x = (right - (cos * right - sin * bottom)) / f32(2)
    y = (bottom - (sin * right + cos * bottom)) / f32(2)
    return float(cos), float(-sin), float(x), float(sin), float(cos), float(y)


@lru_cache(maxsize=32)  # a policy has fewer; 4 bytes a pixel each
def _source_pixels(matrix: Matrix, height: int, width: int, device: torch.device) -> Tensor:
    """For each output pixel the number of the input pixel, H W for none: int32 (H W,).

    The matrix leads from output to input: x' = m0 x + m1 y + m2, y' = m3 x + m4 y + m5, in float32 from left to right.
    """
    m = np.array(matrix, np.float32)
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    column = _half_away(m[0] * x + m[1] * y + m[2])
    line = _half_away(m[3] * x + m[4] * y + m[5])
    inside = (column >= 0) & (column < width) & (line >= 0) & (line < height)
    return _moved(np.where(inside, line * width + column, height * width).astype(np.int32).ravel(), device)


def _half_away(numbers: NDArray[np.float32]) -> NDArray[np.float64]:
    """Rounded to whole numbers, halves away from zero."""
    exact = numbers.astype(np.float64)
    return np.copysign(np.floor(np.abs(exact) + 0.5), exact)

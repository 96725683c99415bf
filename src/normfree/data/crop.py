"""Crops: from an image of any size to a square, for training and for evaluation.

Boxes are (left, top, right, bottom) in pixels of the image. Resizing is Pillow's bicubic, antialiased, to uint8; or for
evaluation as published TensorFlow's, not antialiased, to float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from normfree.config import EVAL_CROPS, TRAIN_CROPS, UserError
from normfree.data.resize import resize_bicubic

Pixels = NDArray[np.uint8]  # (H, W, 3)
_TRIES = 10
DRAWS = 1 + 4 * _TRIES  # uniform numbers that a training crop may use


@dataclass(frozen=True)
class Preprocessing:
    """How images are prepared for evaluation; stored with the weights, so that every command agrees.

    crop: "center" takes the centred square of size / (size + margin) of the short side and resizes it;
        "squash" resizes both sides to size + margin, whatever the aspect, and cuts the centre (A.1 of the paper);
        "pad" resizes the long side to size - 2 margin and puts the image in the middle of black.
    antialias: False takes pixels as the authors' evaluation did, in float32 and unclipped; not for "pad".
    """

    size: int
    crop: str
    margin: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    antialias: bool = True

    def __post_init__(self) -> None:
        if not self.antialias and self.crop == "pad":
            raise UserError('the crop "pad" is always antialiased')
        if self.crop not in EVAL_CROPS:
            raise UserError(f"unknown crop {self.crop!r}; choose from {', '.join(EVAL_CROPS)}")
        if not all(math.isfinite(v) for v in (*self.mean, *self.std)) or min(self.std) <= 0:
            raise UserError(f"mean and std must be finite and std positive, not {self.mean} and {self.std}")
        if self.size < 1 or self.margin < 0 or (self.crop == "pad" and 2 * self.margin >= self.size):
            raise UserError(f"size {self.size} with margin {self.margin} leaves no pixels")

    def __call__(self, image: Pixels) -> Pixels | NDArray[np.float32]:
        """(H, W, 3) -> (size, size, 3): uint8, or float32 in the same range where nothing is antialiased."""
        return self.pixels(image) if self.antialias else self._published(image)

    def pixels(self, image: Pixels) -> Pixels:
        """The same crop, antialiased, in uint8."""
        if self.crop == "pad":
            return _pad(image, self.size, self.size - 2 * self.margin)
        if self.crop == "squash":
            whole = _resize(image, (0, 0, image.shape[1], image.shape[0]), self.size + self.margin)
            start = self.margin // 2
            return whole[start : start + self.size, start : start + self.size]
        return _resize(image, _center_box(image, self.size / (self.size + self.margin)), self.size)

    def _published(self, image: Pixels) -> NDArray[np.float32]:
        """As the authors' input pipeline: of an odd margin the larger half is cut off at the top and left."""
        size, whole = self.size, self.size + self.margin
        if self.crop == "squash":
            start = (self.margin + 1) // 2
            return resize_bicubic(image, whole, whole)[start : start + size, start : start + size]
        height, width = image.shape[:2]
        side = max(1, min(height, width) * size // whole)
        top, left = (height - side + 1) // 2, (width - side + 1) // 2
        return resize_bicubic(image[top : top + side, left : left + side], size, size)

    def normalize(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 or float (N, 3, H, W) -> (x / 255 - mean) / std on the same device, in float32 and then `dtype`."""
        mean = torch.tensor(self.mean, device=images.device).mul_(255)[:, None, None]
        std = torch.tensor(self.std, device=images.device).mul_(255)[:, None, None]
        return images.float().sub(mean).div_(std).to(dtype)


@dataclass(frozen=True)
class TrainCrop:
    """A random crop. kind "box": a part of the image, area and aspect random, resized (Szegedy et al. 2016b).

    kind "shift": the evaluation image, moved by up to `shift` pixels, zoomed by up to the factor 1 +- `zoom` and turned
    by up to `rotate` degrees, black where nothing is; for images in which everything matters, such as characters.
    """

    kind: str
    size: int
    min_area: float
    shift: int
    zoom: float
    rotate: float
    flip: bool
    still: Preprocessing  # of the same size

    def __post_init__(self) -> None:
        if self.kind not in TRAIN_CROPS:
            raise UserError(f"unknown crop {self.kind!r}; choose from {', '.join(TRAIN_CROPS)}")
        if self.still.size != self.size:
            raise UserError(f"the evaluation image has {self.still.size} px, the training crop {self.size}")

    def __call__(self, image: Pixels, draws: NDArray[np.float32]) -> Pixels:
        """(H, W, 3), uniform numbers (DRAWS,) -> (size, size, 3)."""
        flip, numbers = self.flip and draws[0] < 0.5, draws[1:]
        if self.kind == "shift":
            out = self._moved(self.still.pixels(image), numbers)
        else:
            box = distorted_box(image.shape[1], image.shape[0], self.min_area, numbers)
            out = _resize(image, box, self.size)
        return np.ascontiguousarray(out[:, ::-1]) if flip else out

    def _moved(self, image: Pixels, draws: NDArray[np.float32]) -> Pixels:
        dx, dy = (math.floor(d * (2 * self.shift + 1)) - self.shift for d in draws[:2].tolist())
        zoom, turn = (2.0 * d - 1.0 for d in draws[2:4].tolist())
        # output pixel p shows image pixel  middle + scale * R * (p - middle) + (dx, dy);  outside is black
        middle, scale, angle = self.size / 2, 1.0 + self.zoom * zoom, math.radians(self.rotate * turn)
        c, s = scale * math.cos(angle), scale * math.sin(angle)
        affine = (c, -s, middle + dx - (c - s) * middle, s, c, middle + dy - (s + c) * middle)
        side = (self.size, self.size)
        return np.asarray(
            Image.fromarray(image).transform(side, Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
        )


def distorted_box(width: int, height: int, min_area: float, draws: NDArray[np.float32]) -> tuple[int, int, int, int]:
    """A random box of whole pixels: area from [min_area, 1] of the image, aspect from [3/4, 4/3], ten tries.

    Where none fits, the largest centred square.
    """
    for u_area, u_aspect, u_x, u_y in draws[: 4 * _TRIES].reshape(-1, 4).tolist():
        area = (min_area + (1.0 - min_area) * u_area) * width * height
        aspect = 3 / 4 + (4 / 3 - 3 / 4) * u_aspect
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(u_x * (width - w + 1)), int(u_y * (height - h + 1))
            return x, y, x + w, y + h
    side = min(width, height)
    x, y = (width - side) // 2, (height - side) // 2
    return x, y, x + side, y + side


def _center_box(image: Pixels, share: float) -> tuple[float, float, float, float]:
    height, width = image.shape[:2]
    side = min(height, width) * share
    x, y = (width - side) / 2, (height - side) / 2
    return x, y, x + side, y + side


def _resize(image: Pixels, box: tuple[float, float, float, float], size: int) -> Pixels:
    if tuple(box) == (0, 0, size, size) and image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=box))


def _pad(image: Pixels, size: int, inner: int) -> Pixels:
    height, width = image.shape[:2]
    scale = inner / max(height, width)
    w, h = max(1, round(width * scale)), max(1, round(height * scale))
    if (w, h) != (width, height):
        image = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC))
    out = np.zeros((size, size, 3), np.uint8)
    y, x = (size - h) // 2, (size - w) // 2
    out[y : y + h, x : x + w] = image
    return out

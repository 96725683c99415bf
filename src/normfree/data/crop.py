"""Crops: from an image of any size, or its file, to a square, for training and for evaluation.

An image is cut to whole pixels first and then resized, so that nothing outside the box shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from normfree.config import EVAL_CROPS, TRAIN_CROPS, UserError
from normfree.data import boxes
from normfree.data.boxes import Box, centred_box, distorted_box
from normfree.data.decode import decode, image_size
from normfree.data.jpeg import SCALES
from normfree.data.resize import antialiased, mirrored, quick_bicubic, resize_bicubic

Pixels = NDArray[np.uint8]  # (H, W, 3)
DRAWS = 1 + boxes.DRAWS  # uniform numbers that a training crop may use
PIXELS = ("uint8", "float16")


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

    def __call__(self, image: Pixels | bytes) -> Pixels | NDArray[np.float32]:
        """(H, W, 3), or a file -> (size, size, 3): uint8, or float32 in the same range where nothing is antialiased.

        Raises:
            BadImage: the file cannot be decoded.
        """
        return self.pixels(image) if self.antialias else self._published(image)

    def pixels(self, image: Pixels | bytes) -> Pixels:
        """The same crop, antialiased, in uint8."""
        image = _decoded(image)
        if self.crop == "pad":
            return _pad(image, self.size, self.size - 2 * self.margin)
        if self.crop == "squash":
            whole = antialiased(image, self.size + self.margin, self.size + self.margin)
            start = self.margin // 2
            return whole[start : start + self.size, start : start + self.size]
        return antialiased(self._centre(image), self.size, self.size)

    def _published(self, image: Pixels | bytes) -> NDArray[np.float32]:
        """As the authors' input pipeline: of an odd margin the larger half is cut off at the top and left."""
        image = _decoded(image)
        if self.crop == "squash":
            whole, start = self.size + self.margin, (self.margin + 1) // 2
            part = (start, start + self.size)
            return resize_bicubic(image, whole, whole, part, part)
        return resize_bicubic(self._centre(image), self.size, self.size)

    def _centre(self, image: Pixels) -> Pixels:
        return _cut(image, centred_box(image.shape[1], image.shape[0], self.size, self.margin))

    def normalize(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 or float (N, 3, H, W) -> (x / 255 - mean) / std on the same device, in float32 and then `dtype`."""
        mean = torch.tensor(self.mean, device=images.device).mul_(255)[:, None, None]
        std = torch.tensor(self.std, device=images.device).mul_(255)[:, None, None]
        return images.float().sub(mean).div_(std).to(dtype)


@dataclass(frozen=True)
class TrainCrop:
    """A random crop.

    kind: "box" takes a random part of the image and resizes it (Szegedy et al. 2016b, drawn as the authors draw it);
        "shift" the evaluation image, moved by up to `shift` pixels, zoomed by up to the factor 1 +- `zoom` and turned
        by up to `rotate` degrees, black where nothing is; for images in which everything matters, such as characters.
    min_area: of a box, as a part of the image; at least `min_covered` is taken in any case.
    antialias: of a box; False is the paper's.
    pixels: "uint8", rounded and clipped, or "float16", neither, as the authors mix them; only for boxes.
    scaled: JPEGs are decoded at 1/2, 1/4 or 1/8 of their size where the box stays as large as the crop: quicker for
        large photos, and not the paper's pixels.
    margin: where no box is found, the centred square of size / (size + margin) of the short side is taken.
    """

    kind: str
    size: int
    min_area: float
    shift: int
    zoom: float
    rotate: float
    flip: bool
    still: Preprocessing  # of the same size
    antialias: bool = True
    pixels: str = "uint8"
    scaled: bool = False
    min_covered: float = 0.1
    margin: int = 32

    def __post_init__(self) -> None:
        if self.kind not in TRAIN_CROPS:
            raise UserError(f"unknown crop {self.kind!r}; choose from {', '.join(TRAIN_CROPS)}")
        if self.pixels not in PIXELS:
            raise UserError(f"unknown pixels {self.pixels!r}; choose from {', '.join(PIXELS)}")
        if self.still.size != self.size:
            raise UserError(f"the evaluation image has {self.still.size} px, the training crop {self.size}")
        if self.kind == "shift" and (self.pixels != "uint8" or not self.antialias):
            raise UserError('the crop "shift" is always antialiased and of uint8')
        if self.pixels != "uint8" and self.antialias:
            raise UserError('pixels of float16 are not antialiased: set antialias to False, or pixels to "uint8"')

    def __call__(self, image: Pixels | bytes, draws: NDArray[np.float32]) -> NDArray[Any]:
        """(H, W, 3), or a file; uniform numbers (DRAWS,) -> (size, size, 3) uint8, or float16 where `pixels` says so.

        Raises:
            BadImage: the file cannot be decoded.
        """
        flip, numbers = bool(self.flip and draws[0] < 0.5), draws[1:]
        if self.kind == "shift":
            moved = self._moved(self.still.pixels(image), numbers)
            return mirrored(moved) if flip else moved
        part = self._part(image, numbers)
        if self.antialias:
            return antialiased(part, self.size, self.size, flip)
        return quick_bicubic(part, self.size, flip, whole=self.pixels == "uint8")

    def _part(self, image: Pixels | bytes, draws: NDArray[np.float32]) -> Pixels:
        if not isinstance(image, bytes):
            return _cut(image, self._box(image.shape[1], image.shape[0], draws))
        if not self.scaled:
            return self._part(_decoded(image), draws)
        width, height = image_size(image)
        box = self._box(width, height, draws)
        shorter = min(box[2] - box[0], box[3] - box[1])
        pixels = decode(image, max(s for s in SCALES if s == 1 or shorter >= s * self.size))
        return _cut(pixels, _box_on(pixels, box, width, height))

    def _box(self, width: int, height: int, draws: NDArray[np.float32]) -> Box:
        box = distorted_box(width, height, self.min_area, draws, self.min_covered)
        return box or centred_box(width, height, self.size, self.margin)

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


def _decoded(image: Pixels | bytes) -> Pixels:
    return decode(image) if isinstance(image, bytes) else image


def _cut(image: Pixels, box: Box) -> Pixels:
    left, top, right, bottom = box
    return image[top:bottom, left:right]


def _box_on(image: Pixels, box: Box, width: int, height: int) -> Box:
    """The box of an image of width x height on the same image decoded at a scale, to the nearest pixels."""
    x, y = image.shape[1] / width, image.shape[0] / height
    left, top = round(box[0] * x), round(box[1] * y)
    return left, top, max(left + 1, round(box[2] * x)), max(top + 1, round(box[3] * y))


def _pad(image: Pixels, size: int, inner: int) -> Pixels:
    height, width = image.shape[:2]
    scale = inner / max(height, width)
    w, h = max(1, round(width * scale)), max(1, round(height * scale))
    out = np.zeros((size, size, 3), np.uint8)
    y, x = (size - h) // 2, (size - w) // 2
    out[y : y + h, x : x + w] = antialiased(image, h, w)
    return out

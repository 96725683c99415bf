"""A procedural set of photo-like JPEGs, so that a first training run needs no download.

Six classes are one large shape on a cluttered ground, six are a texture that fills the frame. Colours, light,
blur, noise and compression are drawn from the same distributions for every class, so that only form tells the classes
apart: a linear model on the pixels fails, and a small convolutional network succeeds.

Each picture has a random stream of its own, keyed by (seed, split, class, index): it is the same picture however many
others are made, and in whatever order. The bytes may still change with the version of NumPy or of Pillow.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

Rng = np.random.Generator
Array = npt.NDArray[np.floating[Any]]
Points = tuple[Array, Array]  # x and y of every pixel, origin in the centre, the picture's short side being 1
Form = Callable[[Rng, Points], Array]  # signed distance of every pixel from the form's edge, negative inside

SPLITS = ("train", "val")
LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)
MINIMUM_CONTRAST = 0.38  # in luminance, between a form and its ground: less is lost in clutter and noise
CLUTTER = 0.18  # how far clutter may leave the ground's colour: under half the contrast, so it never reads as a form


def _pose(rng: Rng, points: Points, shift: float, turn: float = math.pi) -> Points:
    """Move, rotate and slightly foreshorten the plane."""
    x, y = points[0] - rng.uniform(-shift, shift), points[1] - rng.uniform(-shift, shift)
    lean, turn = rng.uniform(-math.pi, math.pi), rng.uniform(-turn, turn)
    stretch = rng.uniform(0.0, 0.16) * (math.cos(lean) * x + math.sin(lean) * y)
    x, y = x + stretch * math.cos(lean), y + stretch * math.sin(lean)
    return math.cos(turn) * x + math.sin(turn) * y, math.cos(turn) * y - math.sin(turn) * x


def _place_shape(rng: Rng, points: Points, low: float = 0.29, high: float = 0.42) -> tuple[Points, float]:
    """Pose the plane for one shape and choose its radius; the shape stays (almost) whole inside the central square."""
    radius = rng.uniform(low, high)
    return _pose(rng, points, shift=0.6 * (0.5 - radius)), radius


def _regular_star(points: Points, tips: int, outer: float, inner: float) -> Array:
    """Star with `tips` points; a regular polygon when inner = outer * cos(pi / tips)."""
    x, y = points
    sector = math.pi / tips
    # All edges are mirror images of one, so fold the plane into half a sector and measure to that edge alone.
    angle = abs(np.arctan2(y, x) % (2 * sector) - sector)
    reach = np.hypot(x, y)
    along, across = reach * np.cos(sector - angle), reach * np.sin(sector - angle)
    edge_x, edge_y = inner * math.cos(sector) - outer, inner * math.sin(sector)
    return ((along - outer) * edge_y - across * edge_x) / math.hypot(edge_x, edge_y)


def _fill_or_outline(rng: Rng, distance: Array, radius: float) -> Array:
    if rng.random() < 0.65:
        return distance
    half = radius * rng.uniform(0.075, 0.1)
    return abs(distance + half) - half


def _bands(coordinate: Array, pitch: float, duty: float = 0.5) -> Array:
    """Parallel bands across one coordinate, each `duty` of a pitch wide."""
    return _cell(coordinate, pitch) - 0.5 * duty * pitch


def _cell(coordinate: Array, pitch: float) -> Array:
    """Distance from the middle of the cell that each point of a repeating row of cells falls in."""
    return abs(coordinate % pitch - 0.5 * pitch)


def _circle(rng: Rng, points: Points) -> Array:
    # Always filled: an outlined circle would be a ring.
    (x, y), radius = _place_shape(rng, points, 0.24, 0.38)
    return np.hypot(x, y) - radius


def _ring(rng: Rng, points: Points) -> Array:
    (x, y), radius = _place_shape(rng, points, 0.27, 0.4)
    half = radius * rng.uniform(0.12, 0.24)
    return abs(np.hypot(x, y) - radius + half) - half


def _triangle(rng: Rng, points: Points) -> Array:
    points, radius = _place_shape(rng, points, 0.32, 0.44)
    return _fill_or_outline(rng, _regular_star(points, 3, radius, 0.5 * radius), radius)


def _square(rng: Rng, points: Points) -> Array:
    points, radius = _place_shape(rng, points)
    return _fill_or_outline(rng, _regular_star(points, 4, radius, math.sqrt(0.5) * radius), radius)


def _star(rng: Rng, points: Points) -> Array:
    points, radius = _place_shape(rng, points, 0.32, 0.44)
    return _fill_or_outline(rng, _regular_star(points, 5, radius, rng.uniform(0.38, 0.48) * radius), radius)


def _cross(rng: Rng, points: Points) -> Array:
    (x, y), radius = _place_shape(rng, points)
    width = radius * rng.uniform(0.26, 0.36)
    x, y = abs(x), abs(y)
    return _fill_or_outline(rng, np.maximum(np.maximum(x, y) - radius, np.minimum(x, y) - width), radius)


def _stripes(rng: Rng, points: Points) -> Array:
    x, _ = _pose(rng, points, shift=0.5)
    return _bands(x, rng.uniform(0.13, 0.25), rng.uniform(0.35, 0.65))


def _checkerboard(rng: Rng, points: Points) -> Array:
    x, y = _pose(rng, points, shift=0.5)
    pitch = rng.uniform(0.24, 0.4)
    column, row = _bands(x, pitch), _bands(y, pitch)
    return np.maximum(np.minimum(column, row), -np.maximum(column, row))


def _dots(rng: Rng, points: Points) -> Array:
    x, y = _pose(rng, points, shift=0.5)
    pitch = rng.uniform(0.16, 0.26)
    x = _stagger(x, y, pitch, pitch) if rng.random() < 0.5 else x
    return np.hypot(_cell(x, pitch), _cell(y, pitch)) - pitch * rng.uniform(0.25, 0.33)


def _bricks(rng: Rng, points: Points) -> Array:
    x, y = _pose(rng, points, shift=0.5, turn=0.5)
    height = rng.uniform(0.15, 0.23)
    width = height * rng.uniform(1.9, 2.4)
    x = _stagger(x, y, width, height)
    inside: Array = np.maximum(_cell(x, width) - 0.5 * width, _cell(y, height) - 0.5 * height)
    return inside + height * rng.uniform(0.08, 0.12)


def _stagger(x: Array, y: Array, width: float, height: float) -> Array:
    """Shift every other row by half a cell."""
    return x + 0.5 * width * (y // height % 2)


def _waves(rng: Rng, points: Points) -> Array:
    x, y = _pose(rng, points, shift=0.5)
    frequency = 2 * math.pi / rng.uniform(0.32, 0.5)
    slope = rng.uniform(1.1, 1.6)
    height = y + slope / frequency * np.sin(frequency * x)
    # The vertical distance to a slanted band is longer than the true one.
    excess: Array = np.hypot(1, slope * np.cos(frequency * x))
    return _bands(height, rng.uniform(0.17, 0.26)) / excess


def _rays(rng: Rng, points: Points) -> Array:
    x, y = _pose(rng, points, shift=0.1)
    sector = 2 * math.pi / int(rng.integers(6, 12))
    return _bands(np.arctan2(y, x) + math.pi, sector) * np.hypot(x, y)


CLASSES: dict[str, Form] = {
    "bricks": _bricks,
    "checkerboard": _checkerboard,
    "circle": _circle,
    "cross": _cross,
    "dots": _dots,
    "rays": _rays,
    "ring": _ring,
    "square": _square,
    "star": _star,
    "stripes": _stripes,
    "triangle": _triangle,
    "waves": _waves,
}


def _choose_size(rng: Rng) -> tuple[int, int]:
    short = int(rng.integers(120, 181))
    if rng.random() < 0.12:
        return short, short
    long = round(short * rng.uniform(1.2, 1.4))
    return (long, short) if rng.random() < 0.6 else (short, long)


def _pixel_points(width: int, height: int) -> Points:
    short = min(width, height)
    down, across = np.mgrid[:height, :width].astype(np.float32)
    return (across + 0.5 - 0.5 * width) / short, (down + 0.5 - 0.5 * height) / short


def _choose_colours(rng: Rng) -> tuple[Array, Array]:
    """Two colours, in random order, that stay apart in a grey picture too."""
    while True:
        first, second = rng.uniform(0.06, 0.94, (2, 3)).astype(np.float32)
        if abs(float((first - second) @ LUMINANCE)) >= MINIMUM_CONTRAST:
            return first, second


def _smooth_noise(rng: Rng, shape: tuple[int, int], cells: int) -> Array:
    """Noise with about `cells` bumps across the picture."""
    coarse = Image.fromarray(rng.standard_normal((cells + 1, cells + 1), dtype=np.float32))
    return np.asarray(coarse.resize(shape[::-1], Image.Resampling.BICUBIC), np.float32)


def _surface(rng: Rng, shape: tuple[int, int], colour: Array) -> Array:
    """A material of one colour: broad mottling, grain, and a slow drift of hue."""
    cells = int(rng.integers(12, 48))
    mottle = _smooth_noise(rng, shape, 4) + rng.uniform(0.2, 1.0) * _smooth_noise(rng, shape, cells)
    tint = rng.uniform(-0.7, 0.7, 3).astype(np.float32)
    change: Array = mottle[..., None] + _smooth_noise(rng, shape, 2)[..., None] * tint
    return colour + rng.uniform(0.025, 0.055) * change


def _clutter(rng: Rng, ground: Array, colour: Array) -> Array:
    """Irregular patches and open scrawls, out of focus: nothing straight, closed or repeating, as forms are."""
    shape = ground.shape[0], ground.shape[1]
    patches = _smooth_noise(rng, shape, 6) + 0.5 * _smooth_noise(rng, shape, 20) > 0.6
    picture = _to_image(ground + patches[..., None] * rng.uniform(-CLUTTER, CLUTTER, 3).astype(np.float32))
    pen = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(4, 13))):
        shade = 255 * np.clip(colour + rng.uniform(-CLUTTER, CLUTTER, 3), 0, 1)
        pen.line(_scrawl(rng, shape), fill=tuple(shade.astype(int).tolist()), width=int(rng.integers(2, 7)))
    return _from_image(picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.6, 2.0))))


def _scrawl(rng: Rng, shape: tuple[int, int]) -> list[tuple[float, float]]:
    """A wandering line."""
    heading = rng.uniform(-math.pi, math.pi) + np.cumsum(rng.normal(0.0, 0.45, 14))
    step = 0.035 * min(shape)
    x = rng.uniform(0, shape[1]) + np.cumsum(step * np.cos(heading))
    y = rng.uniform(0, shape[0]) + np.cumsum(step * np.sin(heading))
    return list(zip(x.tolist(), y.tolist(), strict=True))


def _cast_shadow(rng: Rng, ground: Array, mask: Array) -> Array:
    """Darken the ground beside the form, as if it lay a little above."""
    if rng.random() < 0.5:
        return ground
    blurred = _from_image(_to_image(mask).filter(ImageFilter.GaussianBlur(rng.uniform(1.0, 3.0))))
    shadow = np.roll(blurred, rng.integers(-4, 5, 2).tolist(), (0, 1))
    return ground * (1 - rng.uniform(0.15, 0.4) * shadow[..., None])


def _light(rng: Rng, points: Points) -> Array:
    """Brightness falling off towards one side and towards the corners."""
    x, y = points
    angle, slope = rng.uniform(-math.pi, math.pi), rng.uniform(0.0, 0.5)
    side = 1 + slope * (math.cos(angle) * x + math.sin(angle) * y)
    return rng.uniform(0.85, 1.1) * side * (1 - rng.uniform(0.0, 0.3) * (x * x + y * y))


def _to_image(values: Array) -> Image.Image:
    return Image.fromarray((255 * np.clip(values, 0, 1) + 0.5).astype(np.uint8))


def _from_image(image: Image.Image) -> Array:
    return np.asarray(image, np.float32) / 255


def draw(name: str, rng: Rng) -> Image.Image:
    """Draw one picture of class `name`."""
    width, height = _choose_size(rng)
    points = _pixel_points(width, height)
    ground_colour, form_colour = _choose_colours(rng)
    ground = _clutter(rng, _surface(rng, (height, width), ground_colour), ground_colour)
    form = _surface(rng, (height, width), form_colour)
    mask = np.clip(0.5 - CLASSES[name](rng, points) * min(width, height), 0, 1)
    scene = _cast_shadow(rng, ground, mask)
    scene = (scene + (form - scene) * mask[..., None]) * _light(rng, points)[..., None]
    scene = _from_image(_to_image(scene).filter(ImageFilter.GaussianBlur(rng.uniform(0.0, 1.0))))
    return _to_image(scene + rng.uniform(0.005, 0.03) * rng.standard_normal(scene.shape, dtype=np.float32))


def _stream(seed: int, split: str, name: str, index: int) -> Rng:
    """The random stream of one picture; names enter by checksum, as their places in a table may change."""
    entropy = [seed, zlib.crc32(split.encode()), zlib.crc32(name.encode()), index]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


def write_sample(root: Path, *, per_class: int = 200, validation_per_class: int = 50, seed: int = 0) -> list[str]:
    """Write root/train/<class>/<nnnn>.jpg and root/val/<class>/<nnnn>.jpg, and return the names of the classes.

    Raises FileExistsError, before anything is written, when root/train or root/val exists.
    """
    for split in SPLITS:
        if (root / split).exists():
            raise FileExistsError(f"{root / split} exists already: choose another folder, or remove it first")
    for split, count in zip(SPLITS, (per_class, validation_per_class), strict=True):
        for name in CLASSES:
            _write_class(root, split, name, count, seed)
    return list(CLASSES)


def _write_class(root: Path, split: str, name: str, count: int, seed: int) -> None:
    folder = root / split / name
    folder.mkdir(parents=True)
    for index in range(count):
        rng = _stream(seed, split, name, index)
        draw(name, rng).save(folder / f"{index:04d}.jpg", quality=int(rng.integers(80, 96)))

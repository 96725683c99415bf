"""Crops lie where the formulas say, to the pixel; random boxes are TensorFlow's; files and arrays give the same."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file

from normfree.config import EVAL_CROPS, TRAIN_CROPS, UserError
from normfree.data.boxes import Box, centred_box, distorted_box
from normfree.data.crop import DRAWS, Preprocessing, TrainCrop
from normfree.data.decode import BadImage, decode
from normfree.data.resize import _cubic, quick_bicubic, resize_bicubic
from normfree.random import Purpose, uniform

Pixels = NDArray[np.uint8]
CALM = settings(deadline=None, max_examples=60)  # a busy machine is no failure
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = [(1, 1), (1, 90), (90, 1), (37, 53), (53, 37), (64, 64), (101, 100)]  # (height, width)
SEED, SIDE = st.integers(0, 2**32 - 1), st.integers(1, 300)
SHAPE = st.tuples(st.integers(1, 60), st.integers(1, 60), st.just(3))
FIXTURES = Path(__file__).parent / "fixtures"
TENSORFLOW = load_file(FIXTURES / "tensorflow_crops.safetensors")  # made by fixtures/make_crops_fixture.py
AUTHORS = load_file(FIXTURES / "authors_eval.safetensors")
ALMOST_ONE = float(np.nextafter(np.float32(1), np.float32(0)))


def noise(height: int, width: int) -> Pixels:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def preprocessing(size: int, crop: str = "pad", margin: int = 0) -> Preprocessing:
    return Preprocessing(size, crop, margin, MEAN, STD)


def shifting(size: int, **changes: Any) -> TrainCrop:
    """A "shift" crop that does nothing but what is given."""
    settings: dict[str, Any] = {"min_area": 1.0, "shift": 0, "zoom": 0.0, "rotate": 0.0, "flip": False}
    return TrainCrop("shift", size, **{**settings, "still": preprocessing(size), **changes})


def boxing(size: int, min_area: float = 0.08, flip: bool = False, **changes: Any) -> TrainCrop:
    return TrainCrop("box", size, min_area, 0, 0.0, 0.0, flip, preprocessing(size), **changes)


def scene(height: int, width: int) -> Pixels:
    """Waves, a few sharp edges and a little noise: much as in a photo, so that levels are not far from their mean."""
    y, x = np.mgrid[:height, :width] / 40
    waves = np.stack([127 + 90 * np.sin(a * y + b * x) for a, b in ((1, 2), (2, -1), (-1.5, 0.5))], -1)
    waves[height // 4 : height // 2, width // 3 : width // 2] = (250, 5, 120)
    return np.clip(waves + np.random.default_rng(5).normal(0, 3, waves.shape), 0, 255).astype(np.uint8)


def encode(image: Pixels, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, form, **options)
    return out.getvalue()


def draws(*numbers: float) -> NDArray[np.float32]:
    """The given numbers, the first of which decides the flip, and then halves."""
    return np.array([*numbers, *[0.5] * (DRAWS - len(numbers))], np.float32)


def random_draws(seed: int, n: int) -> NDArray[np.float32]:
    return uniform(seed, Purpose.PICTURE, 0, np.arange(n), n=DRAWS)


def cut(image: Pixels, box: Box) -> Pixels:
    left, top, right, bottom = box
    return image[top:bottom, left:right]


# distorted_box


@CALM
@given(SIDE, SIDE, st.floats(0.01, 1.0), SEED)
def test_boxes_are_inside_and_within_their_bounds(width: int, height: int, min_area: float, seed: int) -> None:
    """A box of any image is inside it, is not all of it, and has an area and an aspect within bounds."""
    for numbers in random_draws(seed, 5):
        box = distorted_box(width, height, min_area, numbers[1:])
        if box is None:
            continue
        x0, y0, x1, y1 = box
        w, h = x1 - x0, y1 - y0
        assert all(type(v) is int for v in box)
        assert 0 <= x0 < x1 <= width
        assert 0 <= y0 < y1 <= height
        assert max(min_area, 0.1) * width * height <= w * h < width * height
        assert (w - 0.5) / h <= 4 / 3 + 1e-6
        assert (w + 0.5) / h >= 3 / 4 - 1e-6


def test_a_box_by_hand() -> None:
    """Aspect 25/24 in 100 x 80: heights from 25 to 80, of which the 29th is taken; a quarter and three quarters off."""
    assert (round(math.sqrt(640 * 24 / 25)), round(math.sqrt(8000 * 24 / 25))) == (25, 88)
    h = 25 + int(0.5 * (80 - 25 + 1))
    w = round(h * 25 / 24)
    x, y = int(0.75 * (100 - w)), int(0.25 * (80 - h))
    assert distorted_box(100, 80, 0.08, draws(0.5, 0.5, 0.25, 0.75)) == (x, y, x + w, y + h) == (33, 6, 88, 59)


def test_a_box_that_covers_too_little_is_drawn_again() -> None:
    """The smallest boxes of 0.08 are under 0.1 of the image: the next four numbers count, if that is not allowed."""
    fitting = (0.5, 0.5, 0.2, 0.7)
    box = distorted_box(60, 100, 0.08, draws(*fitting))
    assert distorted_box(60, 100, 0.08, draws(0.5, 0.0, 0.0, 0.0, *fitting)) == box
    small = distorted_box(60, 100, 0.08, draws(0.5, 0.0, 0.0, 0.0, *fitting), min_covered=0.0)
    assert small is not None
    assert small != box
    assert 0.08 <= (small[2] * small[3]) / 6000 < 0.1


@pytest.mark.parametrize(("width", "height"), [(500, 10), (10, 500), (1, 300), (3, 1), (1, 1)])
def test_extreme_aspects_have_no_box(width: int, height: int) -> None:
    """Where no box of the smallest area fits, there is none; nor where it is the whole image."""
    assert {distorted_box(width, height, 1.0, numbers[1:]) for numbers in random_draws(0, 200)} == {None}


def test_the_last_row_and_column_are_never_reached() -> None:
    """As in TensorFlow: draws at the ends of their range leave one pixel at the edges of the image."""
    low = distorted_box(50, 40, 0.1, draws(0.5, 0.3, 0, 0))
    high = distorted_box(50, 40, 0.1, draws(0.5, 0.3, ALMOST_ONE, ALMOST_ONE))
    assert low is not None
    assert low[:2] == (0, 0)
    assert high is not None
    assert high[2:] == (49, 39)


MEASURES: list[Callable[[NDArray[Any]], NDArray[Any]]] = [  # of boxes (n, 4)
    lambda b: b[:, 0],
    lambda b: b[:, 1],
    lambda b: b[:, 2],
    lambda b: b[:, 3],
    lambda b: b[:, 2] - b[:, 0],
    lambda b: b[:, 3] - b[:, 1],
    lambda b: (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]),
    lambda b: (b[:, 2] - b[:, 0]) / (b[:, 3] - b[:, 1]),
]


def ks(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The two-sample statistic of Kolmogorov and Smirnov, times sqrt(n m / (n + m)): over 2.2 once in 8,000."""
    values = np.unique(np.concatenate([a, b]))
    shares = [np.searchsorted(np.sort(v), values, "right") / len(v) for v in (a, b)]
    return float(np.abs(shares[0] - shares[1]).max() * math.sqrt(len(a) * len(b) / (len(a) + len(b))))


@pytest.mark.parametrize("case", sorted(TENSORFLOW))
def test_boxes_are_distributed_as_tensorflows(case: str) -> None:
    """Sides, places, areas and aspects of 3,000 boxes of TensorFlow and 8,000 of ours are of one distribution, and as
    many are not found.
    """
    _, shape, min_area = case.split("/")
    height, width = map(int, shape.split("x"))
    theirs, whole = TENSORFLOW[case].astype(int), (0, 0, width, height)
    found = [distorted_box(width, height, float(min_area), d[1:]) or whole for d in random_draws(1, 8000)]
    ours = np.array(found)
    missed = [float((boxes == whole).all(-1).mean()) for boxes in (theirs, ours)]
    share = (3 * missed[0] + 8 * missed[1]) / 11
    assert abs(missed[0] - missed[1]) <= 5 * math.sqrt(share * (1 - share) * (1 / 3000 + 1 / 8000))
    for measure in MEASURES:
        assert ks(measure(theirs), measure(ours)) < 2.2


# resizing without antialiasing


def plainly_resized(image: NDArray[Any], size: tuple[int, int]) -> NDArray[np.float32]:
    """The rule of TensorFlow in float32, tap by tap, without any thought for speed."""
    f32, out = np.float32, image.astype(np.float32)
    near, far = _cubic()
    for axis, n_out in enumerate(size):
        n_in = out.shape[axis]
        position = (np.arange(n_out, dtype=f32) + f32(0.5)) * (f32(n_in) / f32(n_out)) - f32(0.5)
        base = np.floor(position).astype(int)
        step = np.rint((position - np.floor(position)) * f32(1024)).astype(int)
        weights = np.stack([far[step], near[step], near[1024 - step], far[1024 - step]])
        indices = base + np.arange(-1, 3)[:, None]
        weights = np.where((indices >= 0) & (indices < n_in), weights, f32(0))
        weights = weights * (f32(1) / (((weights[0] + weights[1]) + weights[2]) + weights[3]))
        rows = np.moveaxis(out, axis, -1)
        terms = [rows[..., i.clip(0, n_in - 1)] * w for i, w in zip(indices, weights, strict=True)]
        out = np.moveaxis(((terms[0] + terms[1]) + terms[2]) + terms[3], -1, axis)
    return out


@pytest.mark.parametrize("shape", [(1, 1), (7, 90), (90, 7), (37, 53), (32, 32), (900, 50), (50, 900), (400, 401)])
@pytest.mark.parametrize("size", [(32, 32), (1, 5), (60, 17)])
def test_resizing_is_exact(shape: tuple[int, int], size: tuple[int, int]) -> None:
    """Up, down and far down, where only pixels with a weight are touched: equal to the plain rule to the last bit."""
    image = noise(*shape)
    assert np.array_equal(resize_bicubic(image, *size), plainly_resized(image, size))


@CALM
@given(st.integers(1, 80), st.integers(1, 80), st.integers(2, 60), st.data())
def test_a_part_of_a_resized_image(height: int, width: int, size: int, data: st.DataObject) -> None:
    """Rows and columns that are asked for are those of the whole, to the last bit."""
    ends = st.tuples(st.integers(0, size - 1), st.integers(1, size)).filter(lambda r: r[0] < r[1])
    rows, columns = data.draw(ends), data.draw(ends)
    image = noise(height, width)
    part = resize_bicubic(image, size, size, rows, columns)
    assert np.array_equal(part, resize_bicubic(image, size, size)[slice(*rows), slice(*columns)])


@CALM
@given(SIDE, SIDE, st.integers(1, 60), st.booleans())
def test_quick_resizing_is_rounded_to_the_nearest(height: int, width: int, size: int, flip: bool) -> None:
    """Of TensorFlow's numbers, clipped; and mirrored. Unclipped it is the nearest float16."""
    image = noise(height, width)
    expected = resize_bicubic(image, size, size)[:, :: -1 if flip else 1]
    found = quick_bicubic(image, size, flip)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    assert np.abs(found - np.clip(expected, 0, 255)).max() <= 0.501
    unclipped = quick_bicubic(image, size, flip, whole=False)
    assert unclipped.dtype == np.float16
    assert np.abs(unclipped - expected).max() <= 0.126  # half a step of float16 at 256 to 511


# TrainCrop


@CALM
@given(
    arrays.arrays(np.uint8, SHAPE),
    st.integers(1, 40),
    st.integers(0, 6),
    st.sampled_from(EVAL_CROPS),
    arrays.arrays(np.float32, DRAWS, elements=st.floats(0, ALMOST_ONE, width=32)),
)
def test_without_randomness_the_evaluation_image(
    image: Pixels, size: int, margin: int, crop: str, numbers: NDArray[np.float32]
) -> None:
    """With no shift, zoom and turn, whatever is drawn gives the evaluation image to the bit."""
    assume(crop != "pad" or 2 * margin < size)
    still = preprocessing(size, crop, margin)
    assert np.array_equal(shifting(size, still=still)(image, numbers), still(image))


@pytest.mark.parametrize("size", [16, 17])
def test_a_shift_moves_by_whole_pixels(size: int) -> None:
    """Draws on the grid of 2 shift + 1 steps move the window by exactly dx and dy; outside is black."""
    image, shift = noise(size, size), 3
    wide = np.pad(image, ((shift, shift), (shift, shift), (0, 0)))
    crop = shifting(size, shift=shift)
    for dx in range(-shift, shift + 1):
        for dy in range(-shift, shift + 1):
            u, v = ((d + shift + 0.5) / (2 * shift + 1) for d in (dx, dy))
            expected = wide[shift + dy : shift + dy + size, shift + dx : shift + dx + size]
            assert np.array_equal(crop(image, draws(0.9, u, v)), expected)


def test_a_shift_beyond_the_image_is_black() -> None:
    """Nothing repeats and nothing wraps."""
    image = np.full((9, 9, 3), 200, np.uint8)
    assert shifting(9, shift=9)(image, draws(0.9, 0.0, 0.5)).max() == 0


def test_every_shift_is_equally_likely() -> None:
    """Each of the 7 x 7 moves of a shift of 3 comes equally often (chi-square, five standard deviations)."""
    rows, columns = np.mgrid[0:16, 0:16].astype(np.uint8)
    image = np.stack([rows, columns, columns], -1)
    crop = shifting(16, shift=3)
    seen = np.array([crop(image, numbers)[8, 8, :2] for numbers in random_draws(2, 4900)]).astype(int) - 8
    counts = np.zeros((7, 7))
    np.add.at(counts, (seen[:, 0] + 3, seen[:, 1] + 3), 1)
    assert abs(((counts - 100) ** 2 / 100).sum() - 48) < 5 * math.sqrt(2 * 48)


@pytest.mark.parametrize(("u", "scale"), [(0.0, 0.75), (0.25, 0.875), (0.5, 1.0), (ALMOST_ONE, 1.25)])
def test_zoom_is_about_the_middle(u: float, scale: float) -> None:
    """Output pixel c of a ramp shows the place middle + scale (c + 1/2 - middle), with scale in 1 -+ zoom."""
    size = 32
    ramp = np.repeat((20 + 6 * np.arange(size))[None, :, None], size, 0).repeat(3, 2).astype(np.uint8)
    found = shifting(size, zoom=0.25)(ramp, draws(0.9, 0.5, 0.5, u))
    shown = size / 2 + scale * (np.arange(size) + 0.5 - size / 2) - 0.5
    inner = (shown > 1) & (shown < size - 2)
    assert inner.sum() >= 24
    tall = slice(6, 26)  # rows that are inside at every zoom
    assert np.abs(found[tall, inner, 0] - (20 + 6 * shown[inner])).max() <= 1.5


@pytest.mark.parametrize("size", [16, 17])
def test_a_quarter_turn(size: int) -> None:
    """The end of `rotate`, set to 90 degrees, is a quarter turn clockwise, exactly in place."""
    image = noise(size, size)
    found = shifting(size, rotate=90.0)(image, draws(0.9, 0.5, 0.5, 0.5, 0.0))
    assert np.abs(found.astype(int) - np.rot90(image, -1)).max() <= 1


def test_a_shift_is_not_zoomed() -> None:
    """Zoomed by 1/2 and shifted by 4, the middle of the output is 4 pixels of the image further."""
    ramp = np.repeat((20 + 6 * np.arange(32))[None, :, None], 32, 0).repeat(3, 2).astype(np.uint8)
    found = shifting(32, zoom=0.5, shift=4)(ramp, draws(0.9, ALMOST_ONE, 0.5, 0.0))
    shown = 16 + 4 + 0.5 * (np.arange(32) + 0.5 - 16) - 0.5
    assert np.abs(found[16, :, 0] - (20 + 6 * shown)).max() <= 1.5


@pytest.mark.parametrize("make", [boxing, shifting])
def test_flip(make: Callable[..., TrainCrop]) -> None:
    """A first draw below 1/2 mirrors left and right, if asked for; others do not; the result is contiguous."""
    image = noise(20, 20)
    rest = (0.3, 0.4, 0.5, 0.6)
    plain = make(20)(image, draws(0.1, *rest))
    assert not np.array_equal(plain, plain[:, ::-1])
    flipped, kept = make(20, flip=True)(image, draws(0.49, *rest)), make(20, flip=True)(image, draws(0.5, *rest))
    assert np.array_equal(flipped, plain[:, ::-1])
    assert np.array_equal(kept, plain)
    assert flipped.flags.c_contiguous
    assert kept.flags.c_contiguous


def within_a_level(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """But for rare pixels whose sums on the way were clipped."""
    difference = np.abs(a.astype(int) - b)
    return bool((difference > 1).mean() < 0.002 and difference.max() <= 8)


def test_a_box_crop_is_the_box_cut_out_and_resized() -> None:
    """The "box" crop is Pillow's bicubic resize of the box of the same numbers, cut out first."""
    image = scene(90, 70)
    for numbers in random_draws(3, 30):
        part = cut(image, distorted_box(70, 90, 0.08, numbers[1:]) or centred_box(70, 90, 33, 32))
        expected = np.asarray(Image.fromarray(part).resize((33, 33), Image.Resampling.BICUBIC))
        assert within_a_level(boxing(33)(image, numbers), expected)


@pytest.mark.parametrize("pixels", ["uint8", "float16"])
def test_a_box_crop_without_antialiasing(pixels: str) -> None:
    """It is TensorFlow's resize of the box: rounded and clipped, or unclipped to the precision of float16."""
    image, crop = noise(90, 70), boxing(33, antialias=False, pixels=pixels)
    for numbers in random_draws(4, 10):
        part = cut(image, distorted_box(70, 90, 0.08, numbers[1:]) or centred_box(70, 90, 33, 32))
        found, expected = crop(image, numbers), plainly_resized(part, (33, 33))
        assert found.dtype == pixels
        if pixels == "uint8":
            assert np.abs(found - np.clip(np.rint(expected), 0, 255)).max() <= 1
        else:
            assert np.abs(found - expected).max() <= 0.126
            assert expected.min() < 0


@pytest.mark.parametrize("size", [32, 48])
def test_without_a_box_the_authors_centre_is_taken(size: int) -> None:
    """Where all tries fail, the crop is the authors' centred evaluation crop, rounded; its margin can be set."""
    crop = boxing(size, min_area=1.0, antialias=False)
    for key in [k for k in AUTHORS if k.startswith(f"crop_resize/{size}/")]:
        image = AUTHORS[f"images/{key.rsplit('/', 1)[1]}"]
        expected = np.clip(np.rint(AUTHORS[key]), 0, 255)
        assert np.abs(crop(image, draws(0.9)) - expected).max() <= 1
    image = noise(60, 90)
    other = boxing(size, min_area=1.0, antialias=False, margin=8)(image, draws(0.9))
    assert np.array_equal(other, quick_bicubic(cut(image, centred_box(90, 60, size, 8)), size))


@pytest.mark.parametrize("kind", TRAIN_CROPS)
@pytest.mark.parametrize("options", [{}, {"flip": True}, {"antialias": False}, {"scaled": True}])
def test_files_and_arrays_give_the_same_crop(kind: str, options: dict[str, Any]) -> None:
    """A crop of a file is the crop of its pixels."""
    if kind == "shift":
        options = {k: v for k, v in options.items() if k == "flip"}
    crop = (boxing if kind == "box" else shifting)(32, **options)
    image = noise(80, 70)
    for numbers in random_draws(5, 4):
        assert np.array_equal(crop(encode(image, "PNG"), numbers), crop(image, numbers))


@pytest.mark.parametrize("crop", EVAL_CROPS)
@pytest.mark.parametrize("antialias", [True, False])
def test_files_and_arrays_give_the_same_evaluation_image(crop: str, antialias: bool) -> None:
    """So with the evaluation image."""
    if crop != "pad" or antialias:
        prepare = Preprocessing(32, crop, 4, MEAN, STD, antialias)
        image = noise(80, 70)
        assert np.array_equal(prepare(encode(image, "PNG")), prepare(image))


@pytest.mark.parametrize("read", [preprocessing(8, "center"), boxing(8), boxing(8, scaled=True), shifting(8)])
def test_a_broken_file_is_a_bad_image(read: Any) -> None:
    """Crops of files raise what decoding raises."""
    content = encode(noise(70, 70), "JPEG")[:-20]
    with pytest.raises(BadImage):
        read(content) if isinstance(read, Preprocessing) else read(content, draws(0.9))


def test_photos_can_be_decoded_at_a_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `scaled` a JPEG is decoded at the smallest scale at which the box has the size of the crop, and shows the
    same; other formats and small boxes are decoded whole.
    """
    scales: list[int] = []

    def spy(content: bytes, scale: int = 1) -> Pixels:
        scales.append(scale)
        return decode(content, scale)

    monkeypatch.setattr("normfree.data.crop.decode", spy)
    image = scene(301, 403)
    photo = encode(image, "JPEG", quality=95)
    for numbers in random_draws(6, 12):
        box = distorted_box(403, 301, 0.08, numbers[1:])
        assert box is not None
        shorter = min(box[2] - box[0], box[3] - box[1])
        plain, quick = (boxing(24, scaled=s)(photo, numbers).astype(int) for s in (False, True))
        assert scales[-2:] == [1, max(s for s in (1, 2, 4, 8) if s * 24 <= shorter)]
        assert np.abs(plain - quick).mean() < 12  # half a pixel aside; another part differs by 60
        whole, asked = (boxing(24, scaled=s)(encode(image, "PNG"), numbers) for s in (False, True))
        assert np.array_equal(whole, asked)
    assert {4, 8} <= set(scales)
    boxing(200, scaled=True)(photo, numbers)
    assert scales[-1] == 1


def test_read_only_images_are_taken() -> None:
    """Images that cannot be written to, as those of a file in memory, are neither warned of nor touched."""
    image = noise(40, 40)
    image.flags.writeable = False
    for read in (boxing(16), boxing(16, antialias=False), shifting(16)):
        assert read(image, draws(0.9)).shape == (16, 16, 3)
    assert preprocessing(16, "center")(image).flags.writeable


@CALM
@given(SHAPE, st.integers(1, 40), st.sampled_from(TRAIN_CROPS), SEED)
def test_training_crops_have_their_shape_and_leave_the_image(
    shape: tuple[int, int, int], size: int, kind: str, seed: int
) -> None:
    """Any crop of any image is (size, size, 3) uint8, and the image is not written to."""
    image = noise(shape[0], shape[1])
    before = image.copy()
    crop = TrainCrop(kind, size, 0.08, size // 4, 0.1, 10.0, True, preprocessing(size))
    for numbers in random_draws(seed, 3):
        found = crop(image, numbers)
        assert found.shape == (size, size, 3)
        assert found.dtype == np.uint8
    assert np.array_equal(image, before)


def test_views_are_taken() -> None:
    """Arrays that run backwards, or are turned, or skip, are as good as others."""
    image = noise(50, 40)
    for view in (image[::-1], image[:, ::-1], image.transpose(1, 0, 2), np.rot90(image), image[::2, ::3]):
        plain = np.ascontiguousarray(view)
        for read in (boxing(16, flip=True), boxing(16, antialias=False), shifting(16)):
            assert np.array_equal(read(view, draws(0.1, 0.3)), read(plain, draws(0.1, 0.3)))
        for crop in ("center", "squash"):
            prepare = Preprocessing(16, crop, 4, MEAN, STD, antialias=False)
            assert np.array_equal(prepare(view), prepare(plain))


# Preprocessing


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize(("size", "margin"), [(32, 0), (32, 5), (31, 4), (64, 32)])
def test_center_is_a_square_of_the_short_side(shape: tuple[int, int], size: int, margin: int) -> None:
    """ "center" is the centred square of size / (size + margin) of the short side, cut to whole pixels and resized."""
    image = noise(*shape)
    height, width = shape
    side = max(1, min(shape) * size // (size + margin))
    box = centred_box(width, height, size, margin)
    assert (box[2] - box[0], box[3] - box[1]) == (side, side)
    assert 0 <= 2 * box[0] - (width - side) <= 1
    assert 0 <= 2 * box[1] - (height - side) <= 1
    expected = np.asarray(Image.fromarray(cut(image, box)).resize((size, size), Image.Resampling.BICUBIC))
    assert within_a_level(preprocessing(size, "center", margin)(image), expected)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize(("size", "margin"), [(32, 0), (32, 5), (31, 4)])
def test_squash_is_a_resize_and_a_cut(shape: tuple[int, int], size: int, margin: int) -> None:
    """ "squash" is Pillow's resize of both sides to size + margin, whose centre is cut out."""
    image, start = scene(*shape), margin // 2
    whole = Image.fromarray(image).resize((size + margin, size + margin), Image.Resampling.BICUBIC)
    expected = np.asarray(whole.crop((start, start, start + size, start + size)))
    assert within_a_level(preprocessing(size, "squash", margin)(image), expected)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize(("size", "margin"), [(32, 0), (32, 5), (31, 4), (100, 1)])
def test_pad_is_the_whole_image_on_black(shape: tuple[int, int], size: int, margin: int) -> None:
    """ "pad" is Pillow's resize of the whole image to the inner square, aspect kept, pasted in the middle of black."""
    image = noise(*shape)
    h, w = (max(1, round(side * (size - 2 * margin) / max(shape))) for side in shape)
    expected = Image.new("RGB", (size, size))
    resized = Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC)
    expected.paste(resized, ((size - w) // 2, (size - h) // 2))
    assert within_a_level(preprocessing(size, "pad", margin)(image), np.asarray(expected))


@pytest.mark.parametrize(("crop", "left", "right"), [("center", 12.0, 108.0), ("squash", 6.0, 114.0)])
def test_where_a_crop_lies(crop: str, left: float, right: float) -> None:
    """On a ramp of 120 x 96 pixels the output shows exactly the columns between left and right: no offset of half."""
    ramp = np.repeat((2 * np.arange(120))[None, :, None], 96, 0).repeat(3, 2).astype(np.uint8)
    size, margin = {"center": (96, 0), "squash": (54, 6)}[crop]
    found = preprocessing(size, crop, margin)(ramp)
    shown = left + (np.arange(size) + 0.5) * (right - left) / size - 0.5
    assert np.abs(found[:, 2:-2, 0] - 2 * shown[2:-2]).max() <= 1


def test_digits_are_padded_untouched() -> None:
    """28 x 28 in 32 with a border of 2 keeps every pixel, and the border is black."""
    image = noise(28, 28)
    found = preprocessing(32, "pad", 2)(image)
    assert np.array_equal(found[2:30, 2:30], image)
    found = found.copy()
    found[2:30, 2:30] = 0
    assert not found.any()


@pytest.mark.parametrize("crop", EVAL_CROPS)
def test_an_image_of_the_right_size_is_untouched(crop: str) -> None:
    """Without a margin, an image that has the size already comes back as it is."""
    image = noise(24, 24)
    assert np.array_equal(preprocessing(24, crop)(image), image)


@CALM
@given(SHAPE, st.integers(1, 50), st.integers(0, 20), st.sampled_from(EVAL_CROPS))
def test_every_image_becomes_a_square(shape: tuple[int, int, int], size: int, margin: int, crop: str) -> None:
    """Any image gives (size, size, 3) uint8; one of a single colour keeps it, but for the borders of "pad"."""
    assume(crop != "pad" or 2 * margin < size)
    found = preprocessing(size, crop, margin)(np.full(shape, 77, np.uint8))
    assert found.shape == (size, size, 3)
    assert found.dtype == np.uint8
    assert set(np.unique(found).tolist()) <= ({0, 77} if crop == "pad" else {77})
    assert (found == 77).any()


@given(arrays.arrays(np.uint8, (2, 3, 5, 4)))
@CALM
def test_normalize_is_its_formula(images: NDArray[np.uint8]) -> None:
    """(x / 255 - mean) / std by channel, within 2e-6 of float64; the images are left as they are."""
    given_images = torch.from_numpy(images.copy())
    found = preprocessing(4).normalize(given_images)
    mean, std = np.array(MEAN)[:, None, None], np.array(STD)[:, None, None]
    assert found.dtype == torch.float32
    assert np.abs(found.numpy() - (images / 255.0 - mean) / std).max() < 2e-6
    assert np.array_equal(given_images.numpy(), images)


def test_normalize_rounds_once() -> None:
    """Another type is the float32 result, rounded."""
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    prepare = preprocessing(16)
    assert torch.equal(prepare.normalize(images, torch.bfloat16), prepare.normalize(images).bfloat16())


def test_normalize_keeps_channels_last() -> None:
    """Images that are channels last in memory stay so."""
    images = torch.from_numpy(noise(6, 6)[None]).permute(0, 3, 1, 2)
    assert preprocessing(6).normalize(images).is_contiguous(memory_format=torch.channels_last)


# bad arguments


@pytest.mark.parametrize(
    ("size", "crop", "margin", "cause"),
    [
        (32, "centre", 0, "unknown crop 'centre'; choose from center, squash, pad"),
        (0, "center", 0, "size 0 with margin 0 leaves no pixels"),
        (32, "squash", -1, "size 32 with margin -1 leaves no pixels"),
        (32, "pad", 16, "size 32 with margin 16 leaves no pixels"),
    ],
)
def test_impossible_preprocessing_is_refused(size: int, crop: str, margin: int, cause: str) -> None:
    """A preprocessing that cannot be is refused when it is made, with the cause."""
    with pytest.raises(UserError) as refusal:
        preprocessing(size, crop, margin)
    assert str(refusal.value) == cause


def test_an_unknown_training_crop_is_refused() -> None:
    """Its name is repeated with the choices."""
    with pytest.raises(UserError, match="unknown crop 'random'; choose from box, shift"):
        TrainCrop("random", 32, 0.1, 0, 0.0, 0.0, False, preprocessing(32))


def test_an_evaluation_image_of_another_size_is_refused() -> None:
    """The "shift" crop of a still image of another size would be out of place."""
    with pytest.raises(UserError):
        shifting(32, still=preprocessing(28))


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda: boxing(32, pixels="float32"), "unknown pixels 'float32'; choose from uint8, float16"),
        (lambda: boxing(32, pixels="float16"), "pixels of float16 are not antialiased"),
        (lambda: shifting(32, antialias=False), 'the crop "shift" is always antialiased'),
        (lambda: shifting(32, pixels="float16"), 'the crop "shift" is always antialiased'),
    ],
)
def test_options_that_do_not_fit_are_refused(make: Callable[[], TrainCrop], cause: str) -> None:
    """Nothing that is set is silently ignored."""
    with pytest.raises(UserError, match=cause):
        make()

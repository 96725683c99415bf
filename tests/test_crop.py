"""Crops lie where the formulas say, to the pixel; training crops without randomness are the evaluation image."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from PIL import Image

from normfree.config import EVAL_CROPS, TRAIN_CROPS, UserError
from normfree.data.crop import DRAWS, Preprocessing, TrainCrop, distorted_box
from normfree.random import Purpose, uniform

Pixels = NDArray[np.uint8]
CALM = settings(deadline=None, max_examples=60)  # a busy machine is no failure
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = [(1, 1), (1, 90), (90, 1), (37, 53), (53, 37), (64, 64), (101, 100)]  # (height, width)
SEED, SIDE = st.integers(0, 2**32 - 1), st.integers(1, 300)
SHAPE = st.tuples(st.integers(1, 60), st.integers(1, 60), st.just(3))
ALMOST_ONE = float(np.nextafter(np.float32(1), np.float32(0)))


def noise(height: int, width: int) -> Pixels:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def preprocessing(size: int, crop: str = "pad", margin: int = 0) -> Preprocessing:
    return Preprocessing(size, crop, margin, MEAN, STD)


def shifting(size: int, **changes: Any) -> TrainCrop:
    """A "shift" crop that does nothing but what is given."""
    settings: dict[str, Any] = {"min_area": 1.0, "shift": 0, "zoom": 0.0, "rotate": 0.0, "flip": False}
    return TrainCrop("shift", size, **{**settings, "still": preprocessing(size), **changes})


def boxing(size: int, min_area: float = 0.08, flip: bool = False) -> TrainCrop:
    return TrainCrop("box", size, min_area, 0, 0.0, 0.0, flip, preprocessing(size))


def draws(*numbers: float) -> NDArray[np.float32]:
    """The given numbers, the first of which decides the flip, and then halves."""
    return np.array([*numbers, *[0.5] * (DRAWS - len(numbers))], np.float32)


def random_draws(seed: int, n: int) -> NDArray[np.float32]:
    return uniform(seed, Purpose.PICTURE, 0, np.arange(n), n=DRAWS)


def centred_square(width: int, height: int) -> tuple[int, int, int, int]:
    side = min(width, height)
    x, y = (width - side) // 2, (height - side) // 2
    return x, y, x + side, y + side


# distorted_box


@CALM
@given(SIDE, SIDE, st.floats(0.01, 1.0), SEED)
def test_boxes_are_inside_and_within_their_bounds(width: int, height: int, min_area: float, seed: int) -> None:
    """A box of any image is inside it, and has an area and an aspect within bounds up to the rounding of its sides."""
    for numbers in random_draws(seed, 5):
        box = distorted_box(width, height, min_area, numbers[1:])
        x0, y0, x1, y1 = box
        w, h = x1 - x0, y1 - y0
        assert all(type(v) is int for v in box)
        assert 0 <= x0 < x1 <= width
        assert 0 <= y0 < y1 <= height
        if box != centred_square(width, height):
            assert (w + 0.5) * (h + 0.5) >= min_area * width * height
            assert (w - 0.5) * (h - 0.5) <= width * height
            assert (w - 0.5) / (h + 0.5) <= 4 / 3
            assert (w + 0.5) / (h - 0.5) >= 3 / 4


def test_a_box_by_hand() -> None:
    """Area 0.54 of 100 x 80, aspect 25/24: sides of 67 and 64, a quarter and three quarters of the way."""
    area, aspect = (0.08 + 0.92 * 0.5) * 8000, 3 / 4 + 7 / 12 / 2
    assert (round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))) == (67, 64)
    x, y = int(0.25 * (100 - 67 + 1)), int(0.75 * (80 - 64 + 1))
    assert distorted_box(100, 80, 0.08, draws(0.5, 0.5, 0.25, 0.75)) == (x, y, x + 67, y + 64) == (8, 12, 75, 76)


def test_a_box_that_does_not_fit_is_drawn_again() -> None:
    """The second four numbers count where the first give a box wider than the image."""
    fitting = (0.1, 0.5, 0.2, 0.7)
    assert distorted_box(60, 100, 0.08, draws(0.9, 1.0, 0.0, 0.0, *fitting)) == distorted_box(
        60, 100, 0.08, draws(*fitting)
    )


@pytest.mark.parametrize(("width", "height"), [(500, 10), (10, 500), (1, 300), (3, 1)])
def test_extreme_aspects_fall_back_to_the_centred_square(width: int, height: int) -> None:
    """Where no box of the whole area fits, all draws end at the largest centred square."""
    boxes = {distorted_box(width, height, 1.0, numbers[1:]) for numbers in random_draws(0, 200)}
    assert boxes == {centred_square(width, height)}


def test_the_last_pixels_can_be_reached() -> None:
    """Draws at the ends of their range put the box at the edges of the image, not beyond."""
    low, high = (
        distorted_box(50, 40, 0.1, draws(0, 0.5, 0, 0)),
        distorted_box(50, 40, 0.1, draws(0, 0.5, ALMOST_ONE, ALMOST_ONE)),
    )
    assert low[:2] == (0, 0)
    assert high[2:] == (50, 40)


def test_boxes_cover_their_distribution() -> None:
    """Areas below 0.7, which always fit a square image, are uniform, aspects too, and every pixel is covered."""
    side, n = 300, 6000
    boxes = np.array([distorted_box(side, side, 0.1, numbers[1:]) for numbers in random_draws(1, n)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, aspect = w * h / side**2, w / h
    small = area < 0.7
    for values, low, high in ((area, 0.1, 0.7), (aspect, 3 / 4, 4 / 3)):
        counts, _ = np.histogram(values[small], bins=8, range=(low, high))
        expected = small.sum() / 8
        assert ((counts - expected) ** 2 / expected).sum() < 7 + 5 * math.sqrt(14)
    assert area.max() > 0.95
    for axis in (0, 1):
        assert boxes[:, axis].min() == 0
        assert boxes[:, axis + 2].max() == side


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


def test_a_box_crop_is_the_box_resized() -> None:
    """The "box" crop is Pillow's bicubic resize of the box of the same numbers, as if cut out but for its edge."""
    image = noise(90, 70)
    for numbers in random_draws(3, 10):
        box = distorted_box(70, 90, 0.08, numbers[1:])
        found = boxing(33)(image, numbers)
        resized = Image.fromarray(image).resize((33, 33), Image.Resampling.BICUBIC, box)
        assert np.array_equal(found, np.asarray(resized))
        cut = Image.fromarray(image).crop(box).resize((33, 33), Image.Resampling.BICUBIC)
        edge = 1 + 2 * 33 // min(box[2] - box[0], box[3] - box[1])  # where the filter sees beyond the box
        inner = slice(edge + 1, -edge - 1)
        assert np.array_equal(found[inner, inner], np.asarray(cut)[inner, inner])


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


# Preprocessing


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize(("size", "margin"), [(32, 0), (32, 5), (31, 4), (64, 32)])
def test_center_is_a_box_of_the_short_side(shape: tuple[int, int], size: int, margin: int) -> None:
    """ "center" is the centred square of size / (size + margin) of the short side, resized by Pillow."""
    image = noise(*shape)
    height, width = shape
    half = min(shape) * size / (size + margin) / 2
    box = (width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half)
    expected = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box))
    assert np.abs(preprocessing(size, "center", margin)(image).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize(("size", "margin"), [(32, 0), (32, 5), (31, 4)])
def test_squash_is_a_resize_and_a_cut(shape: tuple[int, int], size: int, margin: int) -> None:
    """ "squash" is Pillow's resize of both sides to size + margin, whose centre is cut out."""
    image, start = noise(*shape), margin // 2
    whole = Image.fromarray(image).resize((size + margin, size + margin), Image.Resampling.BICUBIC)
    expected = np.asarray(whole.crop((start, start, start + size, start + size)))
    assert np.array_equal(preprocessing(size, "squash", margin)(image), expected)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize(("size", "margin"), [(32, 0), (32, 5), (31, 4), (100, 1)])
def test_pad_is_the_whole_image_on_black(shape: tuple[int, int], size: int, margin: int) -> None:
    """ "pad" is Pillow's resize of the whole image to the inner square, aspect kept, pasted in the middle of black."""
    image = noise(*shape)
    h, w = (max(1, round(side * (size - 2 * margin) / max(shape))) for side in shape)
    expected = Image.new("RGB", (size, size))
    resized = Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC)
    expected.paste(resized, ((size - w) // 2, (size - h) // 2))
    assert np.array_equal(preprocessing(size, "pad", margin)(image), np.asarray(expected))


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

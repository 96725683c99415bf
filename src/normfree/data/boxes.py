"""Where a crop lies: boxes of whole pixels, (left, top, right, bottom).

The random box is that of TensorFlow's sample_distorted_bounding_box, which the authors' input pipeline draws. Its
height is uniform, not its area; it never touches the right or the lower edge unless it spans the image; and it may not
be found, upon which the authors take the centred square of their evaluation.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Box = tuple[int, int, int, int]
TRIES = 10
DRAWS = 4 * TRIES  # uniform numbers that a random box may use
ASPECTS = (3 / 4, 4 / 3)


def distorted_box(
    width: int, height: int, min_area: float, draws: NDArray[np.float32], min_covered: float = 0.1
) -> Box | None:
    """A random part of an image of this size, or None if ten tries give none, or if it is the whole image.

    Each try takes four uniform numbers. The aspect (width / height) is uniform in [3/4, 4/3], the height among those
    whole numbers that, with a width of round(aspect * height), give an area from `min_area` to 1 of the image. A box of
    under `min_covered` of the image is drawn again; so the smallest part is the larger of the two.
    """
    whole = width * height
    for u_aspect, u_height, u_top, u_left in draws[:DRAWS].reshape(-1, 4).tolist():
        aspect = ASPECTS[0] + (ASPECTS[1] - ASPECTS[0]) * u_aspect
        w, h = _sides(width, height, aspect, min_area * whole, u_height)
        fits = 0 < w <= width and 0 < h <= height and min_area * whole <= w * h <= whole
        if fits and w * h >= min_covered * whole:
            left, top = int(u_left * (width - w)), int(u_top * (height - h))
            return None if w * h == whole else (left, top, left + w, top + h)
    return None


def _sides(width: int, height: int, aspect: float, smallest: float, u: float) -> tuple[int, int]:
    """Width and height of one try; where rounding makes the area too small, of the next height, if it fits or not."""
    high = round(math.sqrt(width * height / aspect))
    if round(high * aspect) > width:
        high = int((width + 0.5) / aspect)
    high = min(high, height)
    low = min(round(math.sqrt(smallest / aspect)), high)
    h = low + int(u * (high - low + 1))
    if round(h * aspect) * h < smallest:
        h += 1
    return round(h * aspect), h


def centred_box(width: int, height: int, size: int, margin: int) -> Box:
    """The square in the middle with size / (size + margin) of the short side.

    Of an odd rest the larger half is cut off at the top and left, as the authors' input pipeline does.
    """
    side = max(1, min(width, height) * size // (size + margin))
    left, top = (width - side + 1) // 2, (height - side + 1) // 2
    return left, top, left + side, top + side

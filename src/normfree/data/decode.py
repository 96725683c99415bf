"""Bytes to pixels, or a named error: one function, and the only place where image files are opened."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from normfree.config import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 100_000_000  # a phone's largest panorama; checked on the header, before anything is decoded


_TURNS = {  # EXIF orientation (tag 0x0112): what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(UserError):
    """The bytes are no image that we read; the message is the reason, without the name of the file."""


def image_size(content: bytes) -> tuple[int, int]:
    """(width, height) from the header, as it will be displayed.

    Raises:
        BadImage: not an image of `FORMATS`, or larger than `MAX_PIXELS`.
    """
    with _as_bad_image("header"):
        image = _open(content)
        # Pillow turns a TIFF itself when it loads it, and announces its size as turned
        turned = image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8)
        return (image.height, image.width) if turned else image.size


def decode(content: bytes) -> NDArray[np.uint8]:
    """(H, W, 3) RGB, turned as EXIF says, transparency over white, the first frame of an animation.

    Raises:
        BadImage: not an image of `FORMATS`, larger than `MAX_PIXELS`, or broken; truncated files are broken.
    """
    with _as_bad_image("header"):
        image = _open(content)
    with _as_bad_image(str(image.format)):
        image.load()
        orientation = _orientation(image)
        rgb = _to_rgb(image)
        return np.array(rgb.transpose(_TURNS[orientation]) if orientation in _TURNS else rgb)


@contextmanager
def _as_bad_image(what: str) -> Iterator[None]:
    """Pillow warns on odd files, and its plug-ins raise anything from OSError to struct.error on broken ones."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(f"not an image of a known format ({', '.join(FORMATS)})") from None
    except Exception as e:
        raise BadImage(f"broken {what}: {str(e) or type(e).__name__}") from e


def _open(content: bytes) -> Image.Image:
    if not content:
        raise BadImage("the file is empty")
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"{image.width}x{image.height} is over the limit of {MAX_PIXELS // 10**6} million pixels")
    if image.width * image.height == 0:
        raise BadImage(f"{image.width}x{image.height} has no pixels")
    return image


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1, upright, where EXIF is missing or damaged."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":  # 16 bits: Pillow's own conversion clips at 255
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise BadImage("pixels of 32 bits have no known range")
        grey = (pixels >> 8).astype(np.uint8)
        grey[pixels == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "F":
        raise BadImage("pixels of floating point have no known range")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

"""Bytes to pixels, or a named error: one function, and the only place where image files are opened."""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 100_000_000  # a phone's largest panorama; checked on the header, before anything is decoded


class BadImage(Exception):
    """The bytes are no image that we read; the message is the reason, without the name of the file."""


def image_size(content: bytes) -> tuple[int, int]:
    """(width, height) from the header, as it will be displayed.

    Raises:
        BadImage: not an image of `FORMATS`, or larger than `MAX_PIXELS`.
    """
    image = _open(content)
    turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF orientation: a quarter turn
    return (image.height, image.width) if turned else image.size


def decode(content: bytes) -> NDArray[np.uint8]:
    """(H, W, 3) RGB, turned as EXIF says, transparency over white, the first frame of an animation.

    Raises:
        BadImage: not an image of `FORMATS`, larger than `MAX_PIXELS`, or broken; truncated files are broken.
    """
    image = _open(content)
    try:
        image.load()
        return np.array(_to_rgb(ImageOps.exif_transpose(image)))
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        IndexError,
        KeyError,
        TypeError,
        Image.DecompressionBombError,
    ) as e:
        raise BadImage(f"broken {image.format}: {_reason(e)}") from e
    except Exception as e:  # Pillow's plug-ins raise struct.error, zlib.error and more on hostile files
        raise BadImage(f"broken {image.format}: {type(e).__name__}: {_reason(e)}") from e


def _open(content: bytes) -> Image.Image:
    if not content:
        raise BadImage("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns from half of its own pixel cap; ours is checked below
            image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError as e:
        raise BadImage(f"not an image of a known format ({', '.join(FORMATS)})") from e
    except Exception as e:
        raise BadImage(f"broken header: {_reason(e)}") from e
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"{image.width}x{image.height} is over the limit of {MAX_PIXELS // 10**6} million pixels")
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":  # 16 bits: Pillow's own conversion clips at 255
        pixels = np.asarray(image).astype(np.int64)
        image = Image.fromarray((pixels.clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _reason(e: BaseException) -> str:
    return str(e).splitlines()[0] if str(e) else type(e).__name__

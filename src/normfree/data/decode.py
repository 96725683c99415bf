"""Bytes to pixels, or a named error: the only place where image files are opened."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from normfree.config import UserError
from normfree.data.jpeg import SCALES, SMALLEST, JpegHeader, decode_jpeg, read_header

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 100_000_000  # a phone's largest panorama; checked on the header, before anything is decoded
MAX_SIDE = 65_535  # as JPEG has it
# pixels times scans of a JPEG, each of which goes through all of the picture: some ten seconds of a core
_MAX_WORK = 10_000_000_000
_MAX_TILE = 1 << 24  # pixels of a tile of a TIFF, where its picture has not a quarter of them
_SCAN, _LEAST_SCAN = b"\xff\xda", 10  # a scan's marker, which pixels never look like; bytes of the shortest scan
_TILE_SIDES = (322, 323)  # tags of a TIFF


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
    header = read_header(content)
    if header and not header.metadata:
        _check_jpeg(content, header.width, header.height)
        return header.width, header.height
    with _as_bad_image("header"):
        image = _open(content)
        # Pillow turns a TIFF itself when it loads it, and announces its size as turned
        turned = image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8)
        return (image.height, image.width) if turned else image.size


def decode(content: bytes, scale: int = 1) -> NDArray[np.uint8]:
    """(H, W, 3) RGB, turned as EXIF says, transparency over white, the first frame of an animation.

    Args:
        content: the file.
        scale: 1, 2, 4 or 8. JPEGs whose sides all have 64 pixels or more are decoded to 1 / scale of both sides,
            rounded up, which costs less; of others nothing changes.

    Raises:
        BadImage: not an image of `FORMATS`, larger than `MAX_PIXELS` or `MAX_SIDE`, asking for far more work than an
            image of its size, or broken; truncated files are broken.
    """
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {SCALES}, not {scale}")
    header = read_header(content)
    pixels = _decode_ordinary(content, header, scale) if header else None
    return _decode_any(content, scale) if pixels is None else pixels


def _decode_ordinary(content: bytes, header: JpegHeader, scale: int) -> NDArray[np.uint8] | None:
    _check_jpeg(content, header.width, header.height)
    orientation = 1
    if header.metadata:
        with _as_bad_image("header"):
            orientation = _orientation(_open(content))
    pixels = decode_jpeg(content, header, _scale_of(header.width, header.height, scale))
    if pixels is None or orientation not in _TURNS:
        return pixels
    return np.array(Image.fromarray(pixels).transpose(_TURNS[orientation]))


def _decode_any(content: bytes, scale: int) -> NDArray[np.uint8]:
    with _as_bad_image("header"):
        image = _open(content)
    with _as_bad_image(str(image.format)):
        scale = _scale_of(*image.size, scale)
        if scale > 1:
            image.draft(None, (image.width // scale, image.height // scale))  # for JPEGs; others ignore it
        image.load()
        orientation = _orientation(image)
        rgb = _to_rgb(image)
        return np.array(rgb.transpose(_TURNS[orientation]) if orientation in _TURNS else rgb)


def _scale_of(width: int, height: int, scale: int) -> int:
    return scale if min(width, height) >= SMALLEST else 1


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
    if image.format in ("JPEG", "MPO"):
        _check_jpeg(content, image.width, image.height)
    else:
        _check_size(image.width, image.height)
    if image.format == "TIFF":
        _check_tile(image)
    return image


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width}x{height} is over the limit of {MAX_PIXELS // 10**6} million pixels")
    if max(width, height) > MAX_SIDE:
        raise BadImage(f"{width}x{height} is over the limit of {MAX_SIDE} pixels a side")
    if width * height == 0:
        raise BadImage(f"{width}x{height} has no pixels")


def _check_jpeg(content: bytes, width: int, height: int) -> None:
    """The size, and that there are not thousands of scans."""
    _check_size(width, height)
    if len(content) // _LEAST_SCAN * width * height <= _MAX_WORK:  # it cannot have so many, which need not be counted
        return
    if (scans := content.count(_SCAN)) * width * height > _MAX_WORK:
        raise BadImage(f"{scans} scans of {width}x{height} are over the limit of {_MAX_WORK // 10**9} thousand million")


def _check_tile(image: Image.Image) -> None:
    """A tile is decoded whole, however little of it the picture covers."""
    tags = getattr(image, "tag_v2", {})
    width, height = (tags.get(tag, 1) for tag in _TILE_SIDES)
    if width * height > max(_MAX_TILE, 4 * image.width * image.height):
        raise BadImage(f"a tile of {width}x{height} is over the limit for {image.width}x{image.height}")


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

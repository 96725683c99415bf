"""Image files that are odd and whole: each decodes to the picture that it was made from."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

Pixels = NDArray[np.uint8]
Odd = tuple[Callable[[], bytes], Callable[[], Pixels], int]  # (file, picture, how far a level may be off)


@lru_cache
def picture(rows: int = 3, columns: int = 4, side: int = 16) -> Pixels:
    """(H, W, 3): a colour a block, none like another, so that no turn of it is itself."""
    count = rows * columns
    levels = np.stack([np.linspace(30, 220, count), np.linspace(200, 40, count), np.arange(count) * 17 % 190 + 20], -1)
    return levels.astype(np.uint8).reshape(rows, columns, 3).repeat(side, 0).repeat(side, 1)


def image() -> Image.Image:
    return Image.fromarray(picture())


def encode(source: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    source.save(buffer, form, **options)
    return buffer.getvalue()


def _encoder(source: Callable[[], Image.Image], form: str, **options: Any) -> Callable[[], bytes]:
    return lambda: encode(source(), form, **options)


# PNG


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def png(width: int, height: int, colour: int, depth: int, rows: bytes, extra: bytes = b"", interlace: int = 0) -> bytes:
    """rows have a byte of their filter before each."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))
    return png_of(head, extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND"))


def with_chunks(*chunks: bytes, at: bytes = b"IDAT") -> bytes:
    """The picture as PNG, with more chunks before the first of a kind."""
    content = encode(image(), "PNG")
    place = content.index(at) - 4
    return content[:place] + b"".join(chunks) + content[place:]


def split_png() -> bytes:
    """The picture's pixels in chunks of 7 bytes, with empty ones between."""
    content = encode(image(), "PNG")
    place = content.index(b"IDAT") - 4
    (length,) = struct.unpack(">I", content[place : place + 4])
    data = content[place + 8 : place + 8 + length]
    parts = [chunk(b"IDAT", data[i : i + 7]) + chunk(b"IDAT") for i in range(0, len(data), 7)]
    return content[:place] + b"".join(parts) + chunk(b"IEND")


def interlaced_png() -> bytes:
    """8 x 8 of one colour, in Adam7's seven passes."""
    sides = ((1, 1), (1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4))
    rows = b"".join((b"\0" + bytes((10, 200, 90)) * width) * height for width, height in sides)
    return png(8, 8, 2, 8, rows, interlace=1)


# TIFF

_WIDTHS = {1: "B", 2: "B", 3: "H", 4: "I", 16: "Q"}
Tag = tuple[int, int, list[int]]  # (number, type, values)


def tiff_of(tags: list[Tag], data: bytes, order: str = "<", big: bool = False) -> bytes:
    """A TIFF with one directory, and data behind it; a value -1 stands for where that begins."""
    head, entry, room = (16, 20, 8) if big else (8, 12, 4)
    directory = head + (8 if big else 2) + entry * len(tags) + room
    sizes = [len(values) * struct.calcsize(_WIDTHS[kind]) for _, kind, values in tags]
    outside = sum(size for size in sizes if size > room)
    place, start, entries, extra = directory, directory + outside, b"", b""
    for (number, kind, values), size in zip(sorted(tags), _sizes(tags), strict=True):
        values = [start - v - 1 if v < 0 else v for v in values]  # -1 is the start, -2 one byte on
        packed = struct.pack(f"{order}{len(values)}{_WIDTHS[kind]}", *values)
        if size > room:
            extra += packed
            packed, place = struct.pack(order + ("Q" if big else "I"), place), place + size
        entries += struct.pack(order + ("HHQ" if big else "HHI"), number, kind, len(values)) + packed.ljust(room, b"\0")
    mark = b"II" if order == "<" else b"MM"
    if big:
        first = mark + struct.pack(order + "HHHQ", 43, 8, 0, head) + struct.pack(order + "Q", len(tags))
    else:
        first = mark + struct.pack(order + "HI", 42, head) + struct.pack(order + "H", len(tags))
    return first + entries + bytes(room) + extra + data


def _sizes(tags: list[Tag]) -> list[int]:
    return [len(values) * struct.calcsize(_WIDTHS[kind]) for _, kind, values in sorted(tags)]


def plain_tags(width: int, height: int, **changes: list[int]) -> list[Tag]:
    """Of an uncompressed RGB TIFF in one strip; changes by the tags' numbers, as t259=[5]; [] leaves one out."""
    tags: dict[int, tuple[int, list[int]]] = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [8, 8, 8]),
        259: (3, [1]),
        262: (3, [2]),
        273: (4, [-1]),
        277: (3, [3]),
        278: (4, [height]),
        279: (4, [width * height * 3]),
    }
    for name, values in changes.items():
        number = int(name[1:])
        tags[number] = (tags.get(number, (4, []))[0], values)
    return [(number, kind, values) for number, (kind, values) in tags.items() if values]


def tiff(order: str = "<", big: bool = False, **changes: list[int]) -> bytes:
    pixels = picture()
    return tiff_of(plain_tags(pixels.shape[1], pixels.shape[0], **changes), pixels.tobytes(), order, big)


def tiled_tiff() -> bytes:
    """The picture in tiles of 16 x 16."""
    tiles = picture().reshape(3, 16, 4, 16, 3).swapaxes(1, 2).tobytes()
    places = [-1 - 768 * i for i in range(12)]
    tags = {"t273": [], "t278": [], "t279": [], "t322": [16], "t323": [16], "t324": places, "t325": [768] * 12}
    return tiff_of(plain_tags(64, 48, **tags), tiles)


def planes_tiff() -> bytes:
    """Each colour in a strip of its own."""
    planes = picture().transpose(2, 0, 1).tobytes()
    size = 64 * 48
    tags = plain_tags(64, 48, t273=[-1 - size * i for i in range(3)], t279=[size] * 3, t284=[2])
    return tiff_of(tags, planes)


# JPEG


def jpeg(**options: Any) -> bytes:
    return encode(image(), "JPEG", quality=95, subsampling=0, **options)


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def with_segments(*segments: bytes) -> bytes:
    """The picture as JPEG, with more before its tables."""
    return b"\xff\xd8" + b"".join(segments) + jpeg()[2:]


def exif(orientation: int, order: str = "<", kind: int = 3) -> bytes:
    """A directory that has the orientation alone."""
    return tiff_of([(0x0112, kind, [orientation])], b"", order)


def oriented(orientation: int) -> bytes:
    return with_segments(segment(0xE1, b"Exif\0\0" + exif(orientation)))


def turned(orientation: int, pixels: Pixels) -> Pixels:
    """What a viewer shows of stored pixels, after the table of the EXIF standard."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)  # stored rows are shown as columns
    left_right = orientation in (2, 3, 6, 7)
    up_down = orientation in (3, 4, 7, 8)
    return pixels[:: -1 if up_down else 1, :: -1 if left_right else 1]


# others


def bmp(bits: int, rows: bytes, width: int, height: int, compression: int = 0, palette: bytes = b"") -> bytes:
    start = 54 + len(palette)
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(rows), 0, 0, len(palette) // 4, 0)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + head + palette + rows


def gif_with(extension: bytes) -> bytes:
    """The picture's palette as GIF, with blocks before its frame."""
    content = encode(image().quantize(16), "GIF")
    place = content.index(b"\x2c\0\0\0\0")
    return content[:place] + extension + content[place:]


def grey() -> Pixels:
    return np.asarray(image().convert("L"))


def _three(levels: NDArray[Any]) -> Pixels:
    return np.repeat(np.asarray(levels, np.uint8)[..., None], 3, axis=-1)


def _bars() -> NDArray[np.bool_]:
    bars: NDArray[np.bool_] = np.arange(48 * 64).reshape(48, 64) // 16 % 2 == 0
    return bars


def _rgba() -> Image.Image:
    out = image().convert("RGBA")
    out.putalpha(Image.fromarray(np.where(_bars(), 255, 0).astype(np.uint8)))
    return out


def _over_white() -> Pixels:
    return np.where(_bars()[..., None], picture(), np.uint8(255))


def _frames(form: str, **options: Any) -> bytes:
    return encode(image(), form, save_all=True, append_images=[image().rotate(180)], **options)


def whole() -> dict[str, Odd]:
    """File, picture and tolerance of each, by name."""
    same, text = picture, PngImagePlugin.PngInfo()
    text.add_text("Comment", "\x1b[31m\0" * 20)
    table: dict[str, Odd] = {}
    exact: dict[str, Callable[[], bytes]] = {
        **{f"plain {form}": _encoder(image, form) for form in ("PNG", "BMP", "TIFF")},
        "plain WEBP": lambda: encode(image(), "WEBP", lossless=True),
        "PNG with a text of control characters": lambda: encode(image(), "PNG", pnginfo=text),
        "PNG with bytes behind its end": lambda: encode(image(), "PNG") + b"#!/bin/sh\n",
        "PNG with an unknown chunk": lambda: with_chunks(chunk(b"evIL", b"import os")),
        "PNG with 5,000 unknown chunks": lambda: with_chunks(*[chunk(b"evIL")] * 5000),
        "PNG in chunks of 7 bytes": split_png,
        "PNG with a gamma of 0": lambda: with_chunks(chunk(b"gAMA", bytes(4))),
        "PNG with a broken time": lambda: with_chunks(chunk(b"tIME", b"\xff" * 7)),
        "PNG with a broken EXIF": lambda: with_chunks(chunk(b"eXIf", b"II*\0\xff\xff\xff\xff")),
        "PNG with an EXIF of garbage": lambda: with_chunks(chunk(b"eXIf", b"\x80\x04cos\nsystem\n")),
        "PNG with a profile of garbage": lambda: with_chunks(chunk(b"iCCP", b"x\0\0" + zlib.compress(b"import os"))),
        "PNG of two frames": lambda: _frames("PNG"),
        "TIFF of two pages": lambda: _frames("TIFF"),
        "TIFF in tiles": tiled_tiff,
        "TIFF in planes": planes_tiff,
        "TIFF big-endian": lambda: tiff(">"),
        "TIFF of 64 bits": lambda: tiff(big=True),
        "TIFF of three widths": lambda: tiff(t256=[64, 65, 66]),
        "TIFF without rows of a strip": lambda: tiff(t278=[]),
        "TIFF with unknown tags": lambda: tiff(t65000=[7], t65001=[1, 2, 3]),
        "TIFF of an unknown orientation": lambda: tiff(t274=[99]),
        **{
            f"TIFF in {kind}": _encoder(image, "TIFF", compression=kind)
            for kind in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd", "lzma")
        },
        "BMP from the top": lambda: bmp(24, picture()[..., ::-1].tobytes(), 64, -48),
        "WebP of two frames": lambda: _frames("WEBP", lossless=True),
        "WebP with EXIF of garbage": lambda: encode(image(), "WEBP", lossless=True, exif=b"Exif\0\0garbage"),
    }
    table |= {name: (make, same, 0) for name, make in exact.items()}
    table |= {f"PNG of orientation {n}": (_with_exif("PNG", n), _turned(n), 0) for n in (3, 6)}
    table |= {f"WebP of orientation {n}": (_with_exif("WEBP", n), _turned(n), 0) for n in (4, 8)}
    table |= {f"TIFF of orientation {n}": (partial(tiff, t274=[n]), _turned(n), 0) for n in range(1, 9)}
    return table | _shades() | _transparent() | _gifs() | _jpegs() | _extreme()


def _with_exif(form: str, orientation: int) -> Callable[[], bytes]:
    return lambda: encode(image(), form, lossless=True, exif=b"Exif\0\0" + exif(orientation))


def _turned(orientation: int) -> Callable[[], Pixels]:
    return lambda: turned(orientation, picture())


def _shades() -> dict[str, Odd]:
    """Modes without colour, or with few."""
    deep = np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 21
    bars = _three(np.where(_bars(), 255, 0))
    flat = np.broadcast_to(np.array((10, 200, 90), np.uint8), (8, 8, 3))
    palette = image().quantize(16)

    def shown() -> Pixels:
        return np.asarray(palette.convert("RGB"))

    def colours() -> bytes:
        rows = np.concatenate([np.zeros((48, 1), ">u2"), picture().astype(">u2").reshape(48, -1) * 257], 1)
        return b"".join(bytes(1) + row[1:].tobytes() for row in rows)

    table: dict[str, Odd] = {
        **{
            f"grey {form}": (_encoder(lambda: Image.fromarray(grey()), form), lambda: _three(grey()), 0)
            for form in ("PNG", "BMP", "TIFF", "GIF")
        },
        **{
            f"one bit {form}": (_encoder(lambda: Image.fromarray(_bars()), form), lambda: bars, 0)
            for form in ("PNG", "BMP", "TIFF", "GIF")
        },
        **{f"palette {form}": (_encoder(lambda: palette, form), shown, 0) for form in ("PNG", "BMP", "TIFF", "GIF")},
        "one bit TIFF in group 4": (
            lambda: encode(Image.fromarray(_bars()), "TIFF", compression="group4"),
            lambda: bars,
            0,
        ),
        "PNG palette of 4 bits": (lambda: encode(palette, "PNG", bits=4), shown, 0),
        "PNG grey of 16 bits": (lambda: encode(Image.fromarray(deep), "PNG"), lambda: _three(deep >> 8), 0),
        "TIFF grey of 16 bits": (lambda: encode(Image.fromarray(deep), "TIFF"), lambda: _three(deep >> 8), 0),
        "PNG colours of 16 bits": (lambda: png(64, 48, 2, 16, colours()), picture, 0),
        "PNG in seven passes": (interlaced_png, lambda: flat, 0),
        "TIFF of four inks": (
            lambda: encode(Image.fromarray(255 - picture()).convert("RGB").convert("CMYK"), "TIFF"),
            lambda: 255 - picture(),
            1,
        ),
    }
    return table


def _transparent() -> dict[str, Odd]:
    """What can be seen through is white."""
    half = _three(np.where(_bars(), grey(), 255))

    def grey_alpha() -> Image.Image:
        return Image.merge("LA", (Image.fromarray(grey()), Image.fromarray(np.where(_bars(), 255, 0).astype(np.uint8))))

    def palette() -> bytes:
        return encode(Image.fromarray(np.where(_bars(), 1, 0).astype(np.uint8), "L"), "PNG", transparency=0)

    return {
        **{f"{form} with alpha": (_encoder(_rgba, form), _over_white, 0) for form in ("PNG", "TIFF")},
        "WebP with alpha": (lambda: encode(_rgba(), "WEBP", lossless=True, exact=True), _over_white, 0),
        "PNG grey with alpha": (lambda: encode(grey_alpha(), "PNG"), lambda: half, 0),
        "PNG with a transparent shade": (palette, lambda: _three(np.where(_bars(), 1, 255)), 0),
        "PNG all transparent": (
            lambda: encode(Image.new("RGBA", (5, 4), (1, 2, 3, 0)), "PNG"),
            lambda: np.full((4, 5, 3), 255, np.uint8),
            0,
        ),
    }


def _gifs() -> dict[str, Odd]:
    def shown() -> Pixels:
        return np.asarray(image().quantize(16).convert("RGB"))

    comment = b"\x21\xfe" + (b"\xff" + b"c" * 255) * 200 + b"\0"
    frames = [image().quantize(16), image().rotate(180).quantize(16)]
    return {
        "GIF of two frames": (lambda: encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), shown, 0),
        "GIF with 100 comments": (lambda: gif_with(comment * 100), shown, 0),
        "GIF with an unknown extension": (lambda: gif_with(b"\x21\x99\x03abc\0"), shown, 0),
        "GIF that asks for 65,535 rounds": (lambda: gif_with(b"\x21\xff\x0bNETSCAPE2.0\x03\x01\xff\xff\0"), shown, 0),
        "GIF with bytes behind its end": (lambda: encode(frames[0], "GIF") + b"<?php", shown, 0),
    }


def _jpegs() -> dict[str, Odd]:
    """As lossy as they are, every block is its colour."""
    inks = Image.fromarray(255 - picture()).convert("CMYK")
    files: dict[str, Callable[[], bytes]] = {
        "plain JPEG": jpeg,
        "JPEG progressive": lambda: jpeg(progressive=True),
        "JPEG with restarts": lambda: jpeg(restart_marker_blocks=1),
        "JPEG of RGB": lambda: jpeg(keep_rgb=True),
        "JPEG of its own tables": lambda: jpeg(optimize=True),
        "JPEG with bytes behind its end": lambda: jpeg() + b"\0" * 1000 + b"PK\3\4",
        "JPEG twice": lambda: jpeg() * 2,
        "JPEG with stuffing before markers": lambda: b"\xff\xd8\xff\xff\xff" + jpeg()[3:],
        "JPEG with 300 comments": lambda: with_segments(*[segment(0xFE, b"$(touch marker)")] * 300),
        "JPEG with a segment of length 0": lambda: b"\xff\xd8\xff\xe0\0\0" + jpeg()[2:],
        "JPEG with an empty comment": lambda: with_segments(segment(0xFE, b"")),
        "JPEG with a profile in pieces": lambda: with_segments(segment(0xE2, b"ICC_PROFILE\0\x01\xff" + b"x" * 99)),
        "JPEG with a Photoshop block": lambda: with_segments(
            segment(0xED, b"Photoshop 3.0\x008BIM\xff\xff" + b"\xff" * 9)
        ),
        "JPEG of two pictures": lambda: _frames("MPO", quality=95, subsampling=0),
        "JPEG that says of two pictures": lambda: with_segments(segment(0xE2, b"MPF\0II*\0\x08\0\0\0")),
        "JPEG with EXIF of garbage": lambda: with_segments(segment(0xE1, b"Exif\0\0\x80\x04cos\nsystem\n")),
        "JPEG with EXIF cut off": lambda: with_segments(segment(0xE1, b"Exif\0\0" + exif(6)[:11])),
        "JPEG with EXIF that leads away": lambda: with_segments(segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\x7f")),
        "JPEG with EXIF in a circle": lambda: with_segments(segment(0xE1, b"Exif\0\0" + exif(1)[:-4] + b"\x08\0\0\0")),
        "JPEG with 60,000 tags": lambda: with_segments(
            segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\x60\xea" + b"\x01" * 65000)
        ),
        "JPEG with XMP that expands": lambda: with_segments(segment(0xE1, _laughs())),
        **{f"JPEG of orientation {n}": partial(oriented, n) for n in (0, 9, 255, 65535)},
        "JPEG of an orientation in text": lambda: with_segments(segment(0xE1, b"Exif\0\0" + exif(0x5A, kind=2))),
    }
    table: dict[str, Odd] = {name: (make, picture, 10) for name, make in files.items()}
    table |= {f"JPEG of orientation {n}": (partial(oriented, n), _turned(n), 10) for n in range(1, 9)}
    table |= {
        "JPEG of four inks": (lambda: encode(inks, "JPEG", quality=95, subsampling=0), lambda: 255 - picture(), 14),
        "JPEG grey": (lambda: encode(Image.fromarray(grey()), "JPEG", quality=95), lambda: _three(grey()), 10),
        "JPEG of coarse colours": (lambda: encode(image(), "JPEG", quality=95, subsampling=2), picture, 60),
    }
    return table


def _laughs() -> bytes:
    """Entities of entities, a thousand million of them."""
    lines = [f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10)]
    text = f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY l0 "ha">{"".join(lines)}]><x>&l9;</x>'
    return b"http://ns.adobe.com/xap/1.0/\0" + text.encode()


def _extreme() -> dict[str, Odd]:
    """One pixel, or one row of them."""
    dot = np.array([[[200, 100, 50]]], np.uint8)
    table: dict[str, Odd] = {
        f"one pixel {form}": (_encoder(lambda: Image.fromarray(dot), form, lossless=True), lambda: dot, 0)
        for form in ("PNG", "BMP", "TIFF", "WEBP")
    }
    for form, shape in (("JPEG", (1, 65500)), ("JPEG", (65500, 1)), ("PNG", (1, 65535)), ("PNG", (65535, 1))):
        flat = np.full((*shape, 3), 120, np.uint8)
        table[f"{form} of {shape[1]} x {shape[0]}"] = (partial(_encoded, flat, form), partial(np.copy, flat), 2)
    return table


def _encoded(pixels: Pixels, form: str) -> bytes:
    return encode(Image.fromarray(pixels), form)

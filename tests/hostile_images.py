"""Image files that are broken or hostile, cut or flipped; those that are odd and whole are in `odd_images`."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from hostile import Case, made, written
from normfree.data.decode import BadImage, decode, image_size
from normfree.data.sources import read_file
from odd_images import (
    Pixels,
    bmp,
    chunk,
    encode,
    exif,
    image,
    jpeg,
    plain_tags,
    png,
    png_of,
    segment,
    tiff,
    tiff_of,
    whole,
    with_chunks,
    with_segments,
)

Made = Callable[[], bytes]


def read_image(path: Path) -> Pixels:
    """As for training and evaluation, at every scale, with and without its size asked for first.

    Raises:
        BadImage: it is not an image. AssertionError: its size is not that of its pixels, or a scale says otherwise.
    """
    content = read_file(path)
    found = [_pixels(content, scale) for scale in (1, 8)]
    assert (found[0] is None) == (found[1] is None), "a scale says otherwise"
    try:
        size = image_size(content)
    except BadImage:
        assert found[0] is None, "it has pixels and no size"
        raise
    pixels = decode(content)
    assert size == pixels.shape[1::-1], "its size is another"
    return pixels


def _pixels(content: bytes, scale: int) -> Pixels | None:
    try:
        return decode(content, scale)
    except BadImage:
        return None


def cases() -> Iterator[Case]:
    for name, (make, shown, off) in whole().items():
        yield Case("image", name, made(make), read_image, None, right=partial(_is, shown, off))
    for words, table in REFUSED.items():
        for name, make in table.items():
            yield Case("image", name, made(make), read_image, BadImage, words)
    for name, (make, shape) in FILLED.items():
        yield Case("image", name, made(make), read_image, None, right=partial(_has_shape, shape))
    for name, content in _damaged():
        yield Case("image", name, written(content), read_image, BadImage, damaged=True)


def _is(shown: Callable[[], Pixels], off: int, found: Pixels) -> bool:
    wanted = shown()
    return found.shape == wanted.shape and int(np.abs(found.astype(int) - wanted).max()) <= off


def _has_shape(shape: tuple[int, ...], found: Pixels) -> bool:
    return found.shape == shape


# what is no image at all


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("../../evil.py", "import os")
    return buffer.getvalue()


_OTHERS: dict[str, Made] = {
    "one byte": lambda: b"\xff",
    "a page of HTML": lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "a script": lambda: b"#!/bin/sh\ntouch marker\n",
    "a pickle": lambda: b"cos\nsystem\n(S'touch marker'\ntR.",
    "a pointer of Git LFS": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n",
    "a drawing": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    "PostScript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(marker) (w) file\n%%EOF\n",
    "a PDF": lambda: b"%PDF-1.7\n1 0 obj\n<< /JavaScript 1 >>\n%%EOF",
    "a zip": _zip,
    "a program": lambda: b"\x7fELF\x02\x01\x01" + bytes(57),
    "zeros": lambda: bytes(4096),
    "ones": lambda: b"\xff" * 4096,
    "an HEIC": lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99),
    "an AVIF": lambda: b"\0\0\0\x20ftypavif\0\0\0\0avifmif1" + bytes(99),
    "a JPEG XL": lambda: b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99),
    "an icon": lambda: encode(image(), "ICO"),
    "a PPM": lambda: encode(image(), "PPM"),
    "a TGA": lambda: encode(image(), "TGA"),
    "a PCX": lambda: encode(image(), "PCX"),
    "a DDS": lambda: encode(image(), "DDS"),
    "a Photoshop file": lambda: b"8BPS\0\x01" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(99),
    "a TIFF of 64 bits, big-endian": lambda: tiff(">", big=True),
    "an XBM": lambda: b"#define x_width 8\n#define x_height 1\nstatic char x_bits[] = {0xff};\n",
    "a FITS": lambda: b"SIMPLE  =                    T".ljust(2880),
}

# bombs


def _huge_png(width: int, height: int) -> bytes:
    """Of one bit, all its rows there."""
    squeeze, row = zlib.compressobj(9), bytes(1 + -(-width // 8))
    data = b"".join(squeeze.compress(row * 100) for _ in range(height // 100)) + squeeze.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return png_of(head, chunk(b"IDAT", data), chunk(b"IEND"))


def _resized_jpeg(width: int, height: int) -> bytes:
    content = bytearray(jpeg())
    place = content.index(b"\xff\xc0")
    content[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def _resized_gif(width: int, height: int) -> bytes:
    content = bytearray(encode(image().quantize(4), "GIF"))
    place = content.index(b"\x2c\0\0\0\0")
    content[place + 5 : place + 9] = struct.pack("<HH", width, height)
    return bytes(content)


def _resized_webp(width: int, height: int) -> bytes:
    frames = [image(), image().rotate(180)]
    content = bytearray(encode(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    place = content.index(b"VP8X") + 12
    content[place : place + 6] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(content)


def _many_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again: each goes through all of the picture."""
    content = encode(Image.new("L", (side, side), 99), "JPEG", progressive=True)
    return content[:-2] + content[content.rindex(b"\xff\xda") : -2] * scans + content[-2:]


def _tile(width: int, height: int, compression: int) -> bytes:
    """One tile, far larger than the picture."""
    changes = {"t273": [], "t278": [], "t279": [], "t322": [width], "t323": [height], "t324": [-1], "t325": [24]}
    tags = plain_tags(9, 9, t258=[8], t262=[1], t277=[1], t259=[compression], **changes)
    return tiff_of(tags, b"\x80\x00\x20\x50\x38\x24\x16\x0d" * 9)


def _text_bomb(kind: bytes, head: bytes, size: int, times: int = 1) -> bytes:
    squeezed = zlib.compress(bytes(size), 9)
    return with_chunks(*[chunk(kind, head + squeezed)] * times)


_LIMIT: dict[str, Made] = {
    "a PNG of one bit, 13,000 x 13,000": lambda: _huge_png(13000, 13000),
    "a PNG of one bit, 10,100 x 10,000": lambda: _huge_png(10100, 10000),
    "a JPEG of 65,535 x 65,535": lambda: _resized_jpeg(65535, 65535),
    "a JPEG of 20,000 x 10,000": lambda: _resized_jpeg(20000, 10000),
    "a GIF with a frame of 65,535 x 65,535": lambda: _resized_gif(65535, 65535),
    "a GIF with a frame of 20,000 x 6,000": lambda: _resized_gif(20000, 6000),
    "a WebP of 16,383 x 16,383": lambda: _resized_webp(16383, 16383),
    "a WebP of 12,000 x 9,000": lambda: _resized_webp(12000, 9000),
    "a TIFF of 60,000 x 60,000": lambda: tiff(t256=[60000], t257=[60000]),
    "a TIFF of 4,294,967,295 x 1": lambda: tiff(t256=[2**32 - 1], t257=[1]),
    "a BMP of 2,147,483,647 x 1": lambda: bmp(24, bytes(12), 2**31 - 1, 1),
    "a BMP of 30,000 x -30,000": lambda: bmp(24, bytes(12), 30000, -30000),
    "a PNG of 2,147,483,647 x 2,147,483,647": lambda: png(2**31 - 1, 2**31 - 1, 2, 8, bytes(9)),
    "a PNG of 1,000,000 x 1": lambda: png(10**6, 1, 0, 8, bytes(10**6 + 1)),
    "a PNG of 1 x 65,536": lambda: png(1, 65536, 0, 8, bytes(2 * 65536)),
    "a BMP of 90,000,000 x 1 that skips rows": lambda: bmp(8, b"\0\x02\xff\xff" * 9, 9 * 10**7, 1, 1, bytes(1024)),
    "a progressive JPEG of 3,000 scans": lambda: _many_scans(2000, 3000),
    "a TIFF with a tile of 46,000 x 46,000": lambda: _tile(46000, 46000, 5),
    "a TIFF with a tile of 30,000 x 20,000": lambda: _tile(30000, 20000, 8),
    "a TIFF with a tile of 2^31 x 1": lambda: _tile(2**31, 1, 32773),
}
_BROKEN_PNG: dict[str, Made] = {
    "PNG with a text of 10 MB": lambda: _text_bomb(b"zTXt", b"Comment\0\0", 10**7),
    "PNG with 66 texts of 1 MB": lambda: _text_bomb(b"zTXt", b"Comment\0\0", 1 << 20, 66),
    "PNG with a profile of 10 MB": lambda: _text_bomb(b"iCCP", b"x\0\0", 10**7),
    "PNG with a translated text of 10 MB": lambda: _text_bomb(b"iTXt", b"C\0\x01\0\0\0", 10**7),
    "PNG with a chunk of 4 GiB": lambda: with_chunks(b"\xff\xff\xff\xfftEXtabc"),
    "PNG with a wrong sum": lambda: with_chunks(chunk(b"gAMA", bytes(4))[:-1] + b"x"),
    "PNG with a chunk of no name": lambda: with_chunks(chunk(b"\0\0\0\0")),
    "PNG without a header": lambda: png_of(chunk(b"IDAT", zlib.compress(bytes(9))), chunk(b"IEND")),
    "PNG with half a header": lambda: png_of(chunk(b"IHDR", bytes(7)), chunk(b"IEND")),
    "PNG of the signature alone": png_of,
    "PNG without pixels": lambda: png_of(chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 2, 0, 0, 0)), chunk(b"IEND")),
    "PNG whose pixels are not packed": lambda: png_of(
        chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 2, 0, 0, 0)), chunk(b"IDAT", bytes(400)), chunk(b"IEND")
    ),
    "PNG with an unknown filter": lambda: png(9, 9, 2, 8, b"\x09" + bytes(28 * 9 - 1)),
    "PNG of an unknown depth": lambda: png(9, 9, 2, 5, bytes(400)),
    "PNG of an unknown kind of colour": lambda: png(9, 9, 5, 8, bytes(400)),
    "PNG of an unknown filter method": lambda: png_of(
        chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 2, 0, 7, 0)), chunk(b"IDAT", zlib.compress(bytes(400)))
    ),
    "PNG of 0 x 9": lambda: png(0, 9, 2, 8, bytes(9)),
    "PNG of 9 x 0": lambda: png(9, 0, 2, 8, b""),
}
_BROKEN_TIFF: dict[str, Made] = {
    "TIFF without a directory": lambda: b"II*\0\0\0\0\0",
    "TIFF that leads behind its end": lambda: b"II*\0\xff\xff\xff\x7f" + bytes(99),
    "TIFF that leads to itself": lambda: b"II*\0\0\0\0\0" + bytes(99),
    "TIFF of no tags": lambda: tiff_of([], b""),
    "TIFF of 9,000 tags, all of the whole file": lambda: (
        b"II*\0\x08\0\0\0\x28\x23" + b"".join(struct.pack("<HHII", i, 1, 108_000, 8) for i in range(9000))
    ),
    "TIFF without a width": lambda: tiff(t256=[]),
    "TIFF of a width of 0": lambda: tiff(t256=[0]),
    "TIFF of 3 bits": lambda: tiff(t258=[3, 3, 3]),
    "TIFF of 64 bits a number": lambda: tiff(t258=[64, 64, 64]),
    "TIFF of 65,535 colours": lambda: tiff(t277=[65535]),
    "TIFF of an unknown compression": lambda: tiff(t259=[4711]),
    "TIFF of an unknown colour space": lambda: tiff(t262=[4711]),
    "TIFF whose strip is behind its end": lambda: tiff(t273=[2**31]),
    "TIFF whose strip is at 2^32 - 1": lambda: tiff(t273=[2**32 - 1]),
    "TIFF without strips": lambda: tiff(t273=[]),
    "TIFF with a tile of 0 x 0": lambda: _tile(0, 0, 1),
    "TIFF of LZW that is none": lambda: tiff(t259=[5]),
    "TIFF of deflate that is none": lambda: tiff(t259=[8]),
    "TIFF of JPEG that is none": lambda: tiff(t259=[7]),
    "TIFF of old JPEG": lambda: tiff(t259=[6]),
    "TIFF of floats": lambda: encode(Image.new("F", (9, 9)), "TIFF"),
    "TIFF of 32 bits": lambda: encode(Image.fromarray(np.full((9, 9), 1 << 20, np.int32)), "TIFF"),
}
_ANY: dict[str, Made] = {
    "JPEG of two bytes": lambda: b"\xff\xd8",
    "JPEG without a frame": lambda: b"\xff\xd8" + segment(0xDA, b"\x01\x01\0\0\x3f\0") + b"\0\xff\xd9",
    "JPEG of a frame alone": lambda: b"\xff\xd8" + segment(0xC0, b"\x08\0\x09\0\x09\x01\x01\x11\0") + b"\xff\xd9",
    "JPEG of no components": lambda: b"\xff\xd8" + segment(0xC0, b"\x08\0\x09\0\x09\0") + b"\xff\xd9",
    "JPEG of 2 components": lambda: b"\xff\xd8" + segment(0xC0, b"\x08\0\x09\0\x09\x02" + b"\x01\x11\0" * 2),
    "JPEG of 255 components": lambda: b"\xff\xd8" + segment(0xC0, b"\x08\0\x09\0\x09\xff" + b"\x01\x11\0" * 255),
    "JPEG of 12 bits": lambda: jpeg().replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
    "JPEG without loss": lambda: jpeg().replace(b"\xff\xc0", b"\xff\xc3"),
    "JPEG of a hierarchy": lambda: jpeg().replace(b"\xff\xc0", b"\xff\xc5"),
    "JPEG of arithmetic codes that are none": lambda: jpeg().replace(b"\xff\xc0", b"\xff\xc9")[:400] + b"\xff\xd9",
    "JPEG whose samples are 0 x 0": lambda: jpeg().replace(b"\x03\x01\x11\0", b"\x03\x01\0\0"),
    "JPEG whose samples are 15 x 15": lambda: jpeg().replace(b"\x03\x01\x11\0", b"\x03\x01\xff\0"),
    "JPEG of a table that is not there": lambda: jpeg().replace(b"\x03\x01\x11\0", b"\x03\x01\x11\x03"),
    "JPEG of 0 x 9": lambda: _resized_jpeg(0, 9),
    "JPEG of 9 x 0": lambda: _resized_jpeg(9, 0),
    "JPEG with a segment longer than it": lambda: b"\xff\xd8\xff\xe0\xff\xff" + jpeg()[2:200],
    "JPEG of codes that overflow": lambda: with_segments(segment(0xC4, b"\0" + b"\xff" * 16 + bytes(255))),
    "JPEG with a cut EXIF and nothing else": lambda: b"\xff\xd8" + segment(0xE1, b"Exif\0\0" + exif(6)),
    "GIF of the signature alone": lambda: b"GIF89a",
    "GIF without a frame": lambda: b"GIF89a\x09\0\x09\0\0\0\0\x3b",
    "GIF of 0 x 0": lambda: _resized_gif(0, 0),
    "GIF with codes of 12 bits": lambda: _lzw(12),
    "GIF with codes of 255 bits": lambda: _lzw(255),
    "GIF that ends in an extension": lambda: b"GIF89a\x09\0\x09\0\0\0\0\x21\xfe\xff" + b"c" * 9,
    "GIF of comments without end": lambda: b"GIF89a\x09\0\x09\0\0\0\0" + (b"\x21\xfe\xff" + b"c" * 255 + b"\0") * 5000,
    "BMP of the signature alone": lambda: b"BM",
    "BMP of 3 bits": lambda: bmp(3, bytes(999), 9, 9),
    "BMP of 0 bits": lambda: bmp(0, bytes(999), 9, 9),
    "BMP of 0 x 9": lambda: bmp(24, bytes(999), 0, 9),
    "BMP of -9 x 9": lambda: bmp(24, bytes(999), -9, 9),
    "BMP of a JPEG": lambda: bmp(24, jpeg(), 9, 9, compression=4),
    "BMP of an unknown compression": lambda: bmp(24, bytes(999), 9, 9, compression=4711),
    "BMP with a row too few": lambda: bmp(24, bytes(27 * 8), 9, 9),
    "BMP with a header of 4 GiB": lambda: b"BM" + bytes(12) + b"\xff\xff\xff\xff" + bytes(99),
    "BMP whose pixels are behind its end": lambda: bmp(24, bytes(999), 9, 9).replace(
        b"\x36\0\0\0", b"\xff\xff\xff\x7f", 1
    ),
    "BMP whose runs end early": lambda: bmp(8, b"\x03\x01", 9, 9, 1, bytes(1024)),
    "WebP of its first 12 bytes": lambda: encode(image(), "WEBP")[:12],
    "WebP without pixels": lambda: b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(10),
    "WebP of garbage": lambda: b"RIFF\x20\0\0\0WEBPVP8 \x14\0\0\0" + b"\xff" * 20,
    "WebP of garbage without loss": lambda: b"RIFF\x20\0\0\0WEBPVP8L\x14\0\0\0" + b"\xff" * 20,
    "WebP that is a WAVE": lambda: b"RIFF\x20\0\0\0WAVEfmt \x14\0\0\0" + b"\xff" * 20,
}


def _lzw(bits: int) -> bytes:
    content = bytearray(encode(image().quantize(4), "GIF"))
    content[content.index(b"\x2c\0\0\0\0") + 10] = bits
    return bytes(content)


REFUSED: dict[str, dict[str, Made]] = {
    "the file is empty": {"nothing": lambda: b""},
    "not an image of a known format": _OTHERS,
    "limit": _LIMIT,
    "": {**_BROKEN_PNG, **_BROKEN_TIFF, **_ANY},
}

# What the decoders fill up with black or grey without a word, as every viewer does: it cannot be told from a whole file
# without unpacking it twice.
FILLED: dict[str, tuple[Made, tuple[int, ...]]] = {
    "PNG with a row too few": (lambda: png(9, 9, 2, 8, bytes(28) * 8), (9, 9, 3)),
    "JPEG taller than its data": (lambda: _resized_jpeg(64, 400), (400, 64, 3)),
    "TIFF of fax that is none": (lambda: tiff(t259=[4], t258=[1], t277=[1], t262=[0]), (48, 64, 3)),
}

# damage


def _damaged() -> Iterator[tuple[str, bytes]]:
    """Each format cut at its header, in its middle and before its end; and with a byte of its header turned over."""
    pixels = np.random.default_rng(3).integers(0, 256, (40, 50, 3), np.uint8)
    noise = Image.fromarray(pixels)
    files = {
        "JPEG": encode(noise, "JPEG"),
        "progressive JPEG": encode(noise, "JPEG", progressive=True),
        "JPEG of four inks": encode(noise.convert("CMYK"), "JPEG"),
        "PNG": encode(noise, "PNG"),
        "PNG of a palette": encode(noise.quantize(64), "PNG"),
        "WebP": encode(noise, "WEBP"),
        "WebP without loss": encode(noise, "WEBP", lossless=True),
        "WebP of frames": encode(noise, "WEBP", save_all=True, append_images=[image().resize((50, 40))]),
        "GIF": encode(noise.quantize(64), "GIF"),
        "BMP": encode(noise, "BMP"),
        "TIFF in LZW": encode(noise, "TIFF", compression="tiff_lzw"),
        "TIFF in deflate": encode(noise, "TIFF", compression="tiff_adobe_deflate"),
    }
    for name, content in files.items():
        size = len(content)
        for part, length in {
            "header": 20,
            "first tenth": size // 10,
            "middle": size // 2,
            "end": size * 9 // 10,
        }.items():
            yield f"{name} cut in its {part}", content[:length]
        for place in (0, 1):
            yield f"{name} with byte {place} turned over", _turned_over(content, place)


def _turned_over(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]

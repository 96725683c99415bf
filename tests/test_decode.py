"""Any bytes become (H, W, 3) uint8 or one BadImage with its reason: formats, modes, orientation, and hostile files."""

from __future__ import annotations

import io
import os
import struct
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from PIL import Image, ImageFile

from normfree.data import jpeg
from normfree.data.decode import EXTENSIONS, FORMATS, MAX_PIXELS, BadImage, decode, image_size
from normfree.data.sources import FolderSource, Names

Pixels = NDArray[np.uint8]
CALM = settings(deadline=None, max_examples=50)  # a busy machine is no failure
SIGNATURES = [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0"]
LOSSLESS: dict[str, dict[str, Any]] = {"PNG": {}, "BMP": {}, "TIFF": {}, "WEBP": {"lossless": True}}
# what a viewer shows of the stored rows and columns: EXIF 2.3, tag 0x0112
ORIENT: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def blocks(rows: int = 3, columns: int = 4, side: int = 16) -> Pixels:
    """Blocks of random colours: JPEG keeps them well, and every turn shows."""
    colours = np.random.default_rng(0).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    return np.kron(colours, np.ones((side, side, 1), np.uint8))


def png(width: int, height: int, colour_type: int, depth: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG from its parts, for what Pillow does not write; each row starts with its filter, 0."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def gif(width: int, height: int, frame: int = 1) -> bytes:
    """A screen of the given size with a square frame of one white pixel, or none."""
    screen = struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\xff\xff\xff\0\0\0"
    return b"GIF89a" + screen + b"," + struct.pack("<HHHHB", 0, 0, frame, frame, 0) + b"\x02\x02D\x01\0;"


def resized_jpeg(width: int, height: int) -> bytes:
    """A small JPEG whose header says that it is of another size."""
    content = bytearray(encode(Image.fromarray(blocks()), "JPEG"))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def over_white(colour: NDArray[Any], alpha: NDArray[Any]) -> NDArray[np.float64]:
    share = alpha[..., None] / 255.0
    return np.asarray(colour * share + 255.0 * (1.0 - share))


def worst(a: NDArray[Any], b: NDArray[Any]) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())


def reason(content: bytes) -> str:
    """Why decode refuses; one line."""
    with pytest.raises(BadImage) as refusal:
        decode(content)
    assert len(str(refusal.value).splitlines()) == 1
    return str(refusal.value)


# formats


@CALM
@given(
    arrays.arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20), st.just(3))),
    st.sampled_from(sorted(LOSSLESS)),
)
def test_lossless_formats_are_exact(pixels: Pixels, form: str) -> None:
    """PNG, BMP, TIFF and lossless WebP give back every pixel of any picture."""
    found = decode(encode(Image.fromarray(pixels), form, **LOSSLESS[form]))
    assert found.dtype == np.uint8
    assert np.array_equal(found, pixels)


@CALM
@given(
    arrays.arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20)), elements=st.integers(0, 3)),
    arrays.arrays(np.uint8, (4, 3)),
    st.sampled_from(["GIF", "PNG", "BMP", "TIFF"]),
)
def test_palettes_are_exact(indices: Pixels, palette: Pixels, form: str) -> None:
    """A picture with a palette gives the colours of its palette."""
    image = Image.fromarray(indices)
    image.putpalette(palette.tobytes())
    assert np.array_equal(decode(encode(image, form)), palette[indices])


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_compressed_tiff_is_exact(compression: str) -> None:
    """The compressions of TIFF that lose nothing give back every pixel."""
    assert np.array_equal(decode(encode(Image.fromarray(blocks()), "TIFF", compression=compression)), blocks())


@pytest.mark.parametrize(
    ("form", "options"),
    [("JPEG", {"subsampling": 0}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("TIFF", {"compression": "jpeg"})],
)
def test_lossy_formats_are_close(form: str, options: dict[str, Any]) -> None:
    """Lossy formats at quality 95 stay close: within 2 levels on average, 5 where colour has half the resolution."""
    limit = 5 if form == "WEBP" or "progressive" in options else 2
    found = decode(encode(Image.fromarray(blocks()), form, quality=95, **options))
    assert found.dtype == np.uint8
    assert found.shape == blocks().shape
    assert np.abs(found.astype(int) - blocks()).mean() < limit


def test_the_tests_know_every_format() -> None:
    """The formats that are admitted are those that are tested here, and each has an extension."""
    assert set(FORMATS) == {*LOSSLESS, "GIF", "JPEG"}
    registered = Image.registered_extensions()
    assert {registered[e] for e in EXTENSIONS} == set(FORMATS)


@pytest.mark.parametrize("form", FORMATS)
def test_one_pixel(form: str) -> None:
    """The smallest picture there is decodes in every format."""
    found = decode(encode(Image.new("RGB", (1, 1), (128, 128, 128)), form))
    assert found.shape == (1, 1, 3)
    assert worst(found, np.full((1, 1, 3), 128)) <= 1


@pytest.mark.parametrize("form", ["PPM", "ICO", "TGA", "JPEG2000", "EPS", "PDF"])
def test_other_formats_are_refused(form: str) -> None:
    """What Pillow could read, and what would start a program, is refused with the list of formats."""
    image = Image.fromarray(blocks())
    assert reason(encode(image, form)) == f"not an image of a known format ({', '.join(FORMATS)})"


# modes


def test_cmyk_jpeg() -> None:
    """A CMYK JPEG becomes RGB by (255 - ink) (255 - black) / 255."""
    ink = np.kron(np.random.default_rng(1).integers(0, 256, (3, 3, 4), dtype=np.uint8), np.ones((16, 16, 1), np.uint8))
    content = encode(Image.fromarray(ink, "CMYK"), "JPEG", quality=100)
    expected = (255.0 - ink[..., :3]) * (255.0 - ink[..., 3:]) / 255.0
    assert worst(decode(content), expected) <= 6


def shades() -> NDArray[np.uint16]:
    return np.linspace(0, 65535, 1000).round().astype(np.uint16).reshape(20, 50)


def test_16_bit_grey_png_is_scaled() -> None:
    """16 bits are scaled to 8, not clipped: black stays black, white white, all between within one level."""
    found = decode(encode(Image.fromarray(shades()), "PNG"))
    assert (found.min(), found.max()) == (0, 255)
    assert worst(found, np.repeat(shades()[..., None] / 257.0, 3, -1)) <= 1


@pytest.mark.parametrize(("mode", "order"), [("I;16", "<u2"), ("I;16B", ">u2")])
def test_16_bit_tiff_of_either_byte_order_is_scaled(mode: str, order: str) -> None:
    """So are the two byte orders of TIFF."""
    content = encode(Image.frombytes(mode, (50, 20), shades().astype(order).tobytes()), "TIFF")
    assert content[:2] == (b"II" if mode == "I;16" else b"MM")
    assert worst(decode(content), np.repeat(shades()[..., None] / 257.0, 3, -1)) <= 1


def test_16_bit_colour_png_is_scaled() -> None:
    """So is 16-bit colour."""
    row = shades()[0, :48]
    found = decode(png(16, 1, 2, 16, b"\0" + row.astype(">u2").tobytes()))
    assert worst(found.ravel(), row / 257.0) <= 1


@pytest.mark.parametrize("depth", [8, 16])
def test_a_transparent_shade_of_grey_is_white(depth: int) -> None:
    """A grey PNG whose black is declared transparent shows white there, with 16 bits as with 8."""
    row = np.array([0, 100, 255]) * (257 if depth == 16 else 1)
    rows = b"\0" + row.astype(">u2" if depth == 16 else np.uint8).tobytes()
    found = decode(png(3, 1, 0, depth, rows, chunk(b"tRNS", b"\0\0")))
    assert found[0, :, 0].tolist() == [255, 100, 255]


@pytest.mark.parametrize("table", [1, b"\xff\0\x80"])
def test_palette_with_transparency(table: int | bytes) -> None:
    """Palette entries that are transparent, one or each by its degree, lie over white."""
    palette = np.array([[10, 20, 30], [200, 0, 0], [0, 100, 0]], np.uint8)
    alpha = np.array([255, 0, 255] if isinstance(table, int) else list(table))
    image = Image.fromarray(np.array([[0, 1, 2], [2, 1, 0]], np.uint8))
    image.putpalette(palette.tobytes())
    found = decode(encode(image, "PNG", transparency=table))
    assert worst(found, over_white(palette, alpha)[np.array([[0, 1, 2], [2, 1, 0]])]) <= 1


@CALM
@given(
    arrays.arrays(np.uint8, st.tuples(st.integers(1, 8), st.integers(1, 8), st.just(4))),
    st.sampled_from(["PNG", "TIFF"]),
)
def test_rgba_lies_over_white(pixels: Pixels, form: str) -> None:
    """RGBA is composed over white, within one level of the formula."""
    found = decode(encode(Image.fromarray(pixels), form))
    assert worst(found, over_white(pixels[..., :3], pixels[..., 3])) <= 1


def test_grey_with_alpha_lies_over_white() -> None:
    """So is grey with alpha."""
    pixels = np.stack(np.meshgrid(np.arange(0, 256, 5), np.arange(0, 256, 5)), -1).astype(np.uint8)
    found = decode(encode(Image.fromarray(pixels, "LA"), "PNG"))
    assert worst(found, over_white(np.repeat(pixels[..., :1], 3, -1), pixels[..., 1])) <= 1


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "GIF"])
def test_one_bit(form: str) -> None:
    """One bit is black or white, 0 or 255."""
    pattern = np.random.default_rng(2).integers(0, 2, (9, 13)).astype(bool)
    found = decode(encode(Image.fromarray(pattern), form))
    assert np.array_equal(found, np.repeat(pattern[..., None], 3, -1) * np.uint8(255))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_grey_has_three_equal_channels(form: str) -> None:
    """A grey picture comes as RGB with equal channels."""
    found = decode(encode(Image.fromarray(blocks()[..., 0]), form))
    assert found.shape == blocks().shape
    assert np.ptp(found, axis=-1).max() <= (2 if form == "WEBP" else 0)  # WebP stores colour


# orientation


def oriented(form: str, orientation: int) -> tuple[bytes, Pixels]:
    """(a file, what a viewer shows)."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if form == "JPEG" else LOSSLESS[form]
    shown = ORIENT[orientation](blocks())
    return encode(Image.fromarray(blocks()), form, exif=exif, **options), shown


@pytest.mark.parametrize("orientation", ORIENT)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(form: str, orientation: int) -> None:
    """All eight orientations are undone, once, in every format that has them."""
    content, shown = oriented(form, orientation)
    found = decode(content)
    assert found.shape == shown.shape
    assert np.abs(found.astype(int) - shown).mean() <= (5 if form == "JPEG" else 0)  # another turn differs by 80


@pytest.mark.parametrize("orientation", ORIENT)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_image_size_is_that_of_the_decoded_picture(form: str, orientation: int) -> None:
    """`image_size` gives (width, height) as displayed."""
    content, shown = oriented(form, orientation)
    assert image_size(content) == (shown.shape[1], shown.shape[0])


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_an_orientation_that_does_not_exist_changes_nothing(orientation: int) -> None:
    """Other numbers than 1 to 8 leave the picture as it is."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decode(encode(Image.fromarray(blocks()), "PNG", exif=exif)), blocks())


# several pictures in a file


@pytest.mark.parametrize(
    ("form", "options"),
    [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("MPO", {"quality": 95})],
)
def test_the_first_of_several_pictures(form: str, options: dict[str, Any]) -> None:
    """Of an animation, of a TIFF of several pages and of a phone's MPO the first picture is taken."""
    first, second = Image.new("RGB", (16, 16), (200, 100, 0)), Image.new("RGB", (16, 16), (0, 0, 255))
    content = encode(first, form, save_all=True, append_images=[second], **options)
    assert worst(decode(content), np.asarray(first)) <= (2 if form == "MPO" else 0)


def test_a_transparent_animation_lies_over_white() -> None:
    """The transparent pixels of a GIF are white."""
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8))
    image.putpalette([9, 9, 9, 200, 0, 0])
    content = encode(image, "GIF", transparency=0, save_all=True, append_images=[image.rotate(90)])
    assert decode(content)[..., 1].tolist() == [[255, 0], [0, 255]]


# broken and hostile files


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_cut_anywhere_is_broken(progressive: bool) -> None:
    """A JPEG that lacks its end, be it two bytes, is refused, at every length: half pictures are not trained on."""
    content = encode(Image.fromarray(blocks()), "JPEG", quality=80, progressive=progressive)
    for length in range(len(content)):
        with pytest.raises(BadImage):
            decode(content[:length])


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_a_file_cut_anywhere_is_broken_or_whole(form: str) -> None:
    """Cut anywhere, the other formats are refused, unless all pixels were there (PNG and GIF end in bytes of none)."""
    content = encode(Image.fromarray(blocks()), form)
    whole, refused = decode(content), 0
    cuts = range(0, len(content), max(1, len(content) // 500))
    for length in cuts:
        try:
            found = decode(content[:length])
        except BadImage:
            refused += 1
        else:
            assert np.array_equal(found, whole)
    assert len(cuts) - 30 <= refused <= len(cuts)  # a PNG ends in checksums and IEND, without pixels


def test_zero_bytes() -> None:
    """An empty file is named as such."""
    assert reason(b"") == "the file is empty"


@pytest.mark.parametrize(
    "content",
    [b"hello\n", b"\0" * 5000, b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\xff\xd8", b"GIF89a", b"BM", b"RIFF"],
)
def test_other_bytes(content: bytes) -> None:
    """Text, zeros and bare signatures are no images."""
    assert "\n" not in reason(content)


@CALM
@given(st.binary(max_size=200), st.sampled_from(SIGNATURES))
def test_random_bytes(content: bytes, signature: bytes) -> None:
    """Random bytes behind any signature never raise anything but BadImage."""
    assert attempt(decode, signature + content)[0] == ""


def refuse(*_args: Any, **_options: Any) -> Any:
    raise AssertionError("something was decoded")


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_a_bomb_is_refused_by_its_header(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few KB that would be 13000 x 13000 pixels are refused before any is decoded, with the size and the limit."""
    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    monkeypatch.setattr("normfree.data.decode.decode_jpeg", refuse)
    bomb = encode(Image.new("1", (13000, 13000)), "PNG") if form == "PNG" else resized_jpeg(13000, 13000)
    assert len(bomb) < 30_000
    for read in (decode, image_size):
        with pytest.raises(BadImage, match="13000x13000 is over the limit of 100 million pixels"):
            read(bomb)


def test_the_limit_is_exact() -> None:
    """The largest picture within the limit is admitted, one more row is not; Pillow's own warning is not heard."""
    assert MAX_PIXELS == 10_000 * 10_000
    assert image_size(gif(10_000, 10_000)) == (10_000, 10_000)
    with pytest.raises(BadImage, match="10000x10001 is over the limit"):
        image_size(gif(10_000, 10_001))
    assert decode(gif(3, 2)).shape == (2, 3, 3)


@pytest.mark.parametrize("size", [(65535, 65535), (20_000, 10_000)])
def test_beyond_pillows_own_limit(size: tuple[int, int]) -> None:
    """Where Pillow itself refuses, the error is still a BadImage of one line."""
    assert reason(gif(*size))


def test_a_picture_without_pixels_is_refused() -> None:
    """No width or no height is not a picture of shape (0, W, 3)."""
    bmp = bytearray(encode(Image.fromarray(blocks()), "BMP"))
    bmp[18:22] = bytes(4)
    for content in (png(0, 5, 2, 8, b""), png(5, 0, 2, 8, b""), gif(0, 0, frame=0), bytes(bmp)):
        assert reason(content)


@pytest.mark.parametrize("damage", ["text longer than the file", "other signature"])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_neither_warns_nor_matters(form: str, damage: str) -> None:
    """A picture whose pixels are whole and whose EXIF is damaged decodes as ever, and nothing is said."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 1, "a description"
    good = exif.tobytes()
    entry = good.index(b"\x01\x0e\x00\x02")  # tag 0x010E, type ASCII; then count and offset
    long = good[: entry + 4] + b"\0\0\xff\xff" + good[entry + 8 :]
    damaged = long if damage == "text longer than the file" else good.replace(b"MM\0*", b"MM\0?")
    assert damaged != good
    options = {"dpi": (72, 72)} if form == "JPEG" else LOSSLESS[form]  # else EXIF is looked at when a JPEG is opened
    with_good, with_damaged = (encode(Image.fromarray(blocks()), form, exif=e, **options) for e in (good, damaged))
    for read in (decode, image_size):
        assert attempt(read, with_damaged) == ("", [])
    assert np.array_equal(decode(with_damaged), decode(with_good))


# ordinary JPEGs, which simplejpeg decodes where it is installed

needs_simplejpeg = pytest.mark.skipif(jpeg._simplejpeg() is None, reason="simplejpeg is not installed")


@pytest.fixture
def without_simplejpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jpeg, "_simplejpeg", lambda: None)


def jpegs() -> dict[str, bytes]:
    """Ordinary ones, of every kind that cameras and programs write, with sides that fill no whole block."""
    picture = Image.fromarray(np.random.default_rng(7).integers(0, 256, (23, 31, 3), dtype=np.uint8)).resize((75, 69))
    options: dict[str, dict[str, Any]] = {
        "4:4:4": {"subsampling": 0},
        "4:2:2": {"subsampling": 1},
        "4:2:0": {"subsampling": 2, "quality": 90},
        "low": {"quality": 5},
        "progressive": {"progressive": True},
        "optimized": {"optimize": True, "quality": 100},
        "restarts": {"restart_marker_blocks": 3},
        "rgb": {"keep_rgb": True},
        "comment": {"comment": b"text", "icc_profile": b"\0" * 300},
    }
    files = {name: encode(picture, "JPEG", **o) for name, o in options.items()}
    files |= {f"grey {p}": encode(picture.convert("L"), "JPEG", progressive=p) for p in (False, True)}
    return files | {"mpo": encode(picture, "MPO", save_all=True, append_images=[picture])}


def decoded(content: bytes, scale: int = 1) -> Pixels | str:
    try:
        return decode(content, scale)
    except BadImage as e:
        return str(e)


def same(a: Pixels | str, b: Pixels | str) -> bool:
    if isinstance(a, str) or isinstance(b, str):
        return isinstance(a, str) and isinstance(b, str) and a == b
    return np.array_equal(a, b)


@needs_simplejpeg
@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_ordinary_jpegs_have_pillows_pixels(scale: int) -> None:
    """Whole and at every scale, simplejpeg takes every ordinary JPEG, and gives what Pillow gives, to the bit."""
    for name, content in jpegs().items():
        header = jpeg.read_header(content)
        assert header is not None, name
        found = jpeg.decode_jpeg(content, header, scale)
        assert found is not None, name
        image = Image.open(io.BytesIO(content))
        image.draft(None, (75 // scale, 69 // scale))
        assert np.array_equal(found, np.asarray(image.convert("RGB"))), name
        assert found.shape == (-(-69 // scale), -(-75 // scale), 3)


@needs_simplejpeg
@pytest.mark.parametrize("kind", [*jpegs(), "turned", "cmyk"])
def test_damaged_jpegs_fare_as_with_pillow(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes flipped, changed, cut out and put in: with simplejpeg as without it a file is good or bad, for the same
    reason, and has the same pixels. Some of each are seen.
    """
    exif = Image.Exif()
    exif[0x0112] = 8
    picture = Image.fromarray(blocks())
    more = {"turned": encode(picture, "JPEG", exif=exif), "cmyk": encode(picture.convert("CMYK"), "JPEG")}
    rng = np.random.default_rng(22)
    files = [mutated((jpegs() | more)[kind], rng) for _ in range(150)]
    quick = [decoded(content) for content in files]
    monkeypatch.setattr(jpeg, "_simplejpeg", lambda: None)
    slow = [decoded(content) for content in files]
    assert [k for k, (a, b) in enumerate(zip(quick, slow, strict=True)) if not same(a, b)] == []
    good = sum(not isinstance(outcome, str) for outcome in quick)
    assert 0 < good < len(files)


@needs_simplejpeg
@pytest.mark.parametrize("progressive", [False, True])
def test_simplejpeg_takes_no_cut_file(progressive: bool) -> None:
    """Truncated anywhere, even by two bytes, it is not decoded, silently or otherwise."""
    content = encode(Image.fromarray(blocks()), "JPEG", progressive=progressive)
    header = jpeg.read_header(content)
    assert header is not None
    assert jpeg.decode_jpeg(content, header) is not None
    for length in range(len(content)):
        assert jpeg.decode_jpeg(content[:length], header) is None


def test_extraordinary_jpegs_are_left_to_pillow() -> None:
    """CMYK, 12 bits, arithmetic codes, lossless, no height, two frames, no frame, other files: no header is read."""
    content = encode(Image.fromarray(blocks()), "JPEG")
    frame = content.index(b"\xff\xc0")
    whole = content[frame : frame + 19]
    changed = {
        "12 bits": content[: frame + 4] + b"\x0c" + content[frame + 5 :],
        "arithmetic": content.replace(b"\xff\xc0", b"\xff\xc9", 1),
        "lossless": content.replace(b"\xff\xc0", b"\xff\xc3", 1),
        "hierarchical": content.replace(b"\xff\xc0", b"\xff\xc5", 1),
        "no height": content[: frame + 5] + b"\0\0" + content[frame + 7 :],
        "two frames": content[:frame] + whole + content[frame:],
        "no frame": content[:frame] + content[frame + 19 :],
        "filling": content[:frame] + b"\xff" + content[frame:],
        "cmyk": encode(Image.fromarray(blocks()).convert("CMYK"), "JPEG"),
        "png": encode(Image.fromarray(blocks()), "PNG"),
        "nothing": b"",
        "two bytes": b"\xff\xd8",
    }
    assert content[frame : frame + 4] == b"\xff\xc0\x00\x11"
    assert jpeg.read_header(content) == (64, 48, False)
    assert {name: jpeg.read_header(c) for name, c in changed.items()} == dict.fromkeys(changed)
    for damaged in changed.values():
        assert attempt(decode, damaged)[0] == ""


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("simplejpeg", [True, False])
def test_decoding_at_a_scale(form: str, scale: int, simplejpeg: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A JPEG comes at a part of its size, rounded up, turned as it should be, and looks the same; others come whole."""
    if not simplejpeg:
        monkeypatch.setattr(jpeg, "_simplejpeg", lambda: None)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(blocks(side=27))  # 108 x 81
    content = encode(picture, form, exif=exif)
    found, whole = decode(content, scale), decode(content)
    assert whole.shape == (108, 81, 3)
    if form == "JPEG":
        assert found.shape == (-(-108 // scale), -(-81 // scale), 3)
        small = picture.transpose(Image.Transpose.ROTATE_270).resize(found.shape[1::-1], Image.Resampling.BOX)
        assert np.abs(found.astype(int) - np.asarray(small)).mean() < 20  # another turn differs by 80
    else:
        assert np.array_equal(found, whole)


def test_small_images_are_not_scaled() -> None:
    """Of under 64 pixels a side every image comes whole; there are no other scales than 1, 2, 4 and 8."""
    content = encode(Image.fromarray(blocks()), "JPEG")
    assert np.array_equal(decode(content, 8), decode(content))
    with pytest.raises(ValueError, match="scale must be one of"):
        decode(content, 3)


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError])
def test_simplejpeg_may_be_missing_or_unfit(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """If it cannot be imported, Pillow decodes."""

    class Finder:
        @staticmethod
        def find_spec(name: str, *_rest: Any) -> None:
            if name == "simplejpeg":
                raise error("a library is missing")

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    monkeypatch.delitem(sys.modules, "simplejpeg", raising=False)
    jpeg._simplejpeg.cache_clear()
    try:
        assert jpeg._simplejpeg() is None
        assert decode(encode(Image.fromarray(blocks()), "JPEG")).shape == blocks().shape
    finally:
        jpeg._simplejpeg.cache_clear()


# the fuzz loop


def specimens() -> dict[str, bytes]:
    """Small files of every format and of many kinds."""
    colour = Image.fromarray(blocks(side=4))
    grey16 = Image.fromarray(shades()[:5, :6])
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x8769] = 6, "text", {0x9003: "2020:01:01 00:00:00"}
    palette = colour.quantize(8)
    return {
        **{form: encode(colour, form) for form in FORMATS},
        **{f"{form} exif": encode(colour, form, exif=exif) for form in ("JPEG", "PNG", "WEBP")},
        "progressive": encode(colour, "JPEG", progressive=True),
        "cmyk": encode(colour.convert("CMYK"), "JPEG"),
        "mpo": encode(colour, "MPO", save_all=True, append_images=[colour]),
        "png palette": encode(palette, "PNG", transparency=2),
        "png alpha": encode(colour.convert("RGBA"), "PNG"),
        "png 16": encode(grey16, "PNG"),
        "tiff 16": encode(grey16, "TIFF"),
        "tiff lzw": encode(colour, "TIFF", compression="tiff_lzw"),
        "gif frames": encode(palette, "GIF", save_all=True, append_images=[palette.rotate(90)]),
        "bmp one bit": encode(colour.convert("1"), "BMP"),
        "webp lossless": encode(colour.convert("RGBA"), "WEBP", lossless=True),
    }


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Bytes changed anywhere, or near the front, a piece cut out, or a piece put in."""
    out, at = bytearray(content), int(rng.integers(len(content)))
    match int(rng.integers(4)):
        case 0:
            for i in rng.integers(len(out), size=rng.integers(1, 6)):
                out[i] = rng.integers(256)
        case 1:
            for i in rng.integers(min(len(out), 160), size=rng.integers(1, 4)):
                out[i] = rng.choice([0, 1, 127, 128, 255])
        case 2:
            del out[at : at + int(rng.integers(1, 20))]
        case _:
            out[at:at] = rng.bytes(int(rng.integers(1, 20)))
    return bytes(out)


def mutants(per_specimen: int) -> Iterator[tuple[str, bytes]]:
    rng = np.random.default_rng(20)
    for name, content in specimens().items():
        for k in range(per_specimen):
            yield f"{name} {k}", mutated(content, rng)


def attempt(read: Callable[[bytes], Any], content: bytes) -> tuple[str, list[str]]:
    """(what is wrong with the outcome, or nothing; the warnings that were heard)."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            found = read(content)
            fine = not isinstance(found, np.ndarray) or (found.dtype == np.uint8 and found.shape[2:] == (3,))
            wrong = "" if fine and min(np.shape(found), default=1) > 0 else f"gives {np.shape(found)}"
        except BadImage as e:
            wrong = "" if len(str(e).splitlines()) == 1 else f"reason {e!s:r}"
        except Exception as e:
            wrong = f"raises {type(e).__name__}: {e}"
    return wrong, [str(w.message) for w in heard]


@pytest.mark.usefixtures("without_simplejpeg")
def test_fuzzed_files_decode_or_are_bad_without_simplejpeg() -> None:
    """So where Pillow decodes everything."""
    outcomes = {name: attempt(decode, content)[0] for name, content in mutants(30)}
    assert {name: wrong for name, wrong in outcomes.items() if wrong} == {}


def test_fuzzed_files_decode_or_are_bad() -> None:
    """Of damaged files of every kind each gives (H, W, 3) uint8 or BadImage with one line; some give each."""
    outcomes = {name: attempt(decode, content)[0] for name, content in mutants(100)}
    assert len(outcomes) >= 1500
    assert {name: wrong for name, wrong in outcomes.items() if wrong} == {}


def test_fuzzed_files_never_warn() -> None:
    """Damaged files do not make decode or image_size warn: a reason is given once, with the file's name."""
    heard = {name: [*attempt(decode, c)[1], *attempt(image_size, c)[1]] for name, c in mutants(100)}
    assert {name: said for name, said in heard.items() if said} == {}


def test_fuzzed_files_have_a_size_or_are_bad() -> None:
    """`image_size` gives a size or raises BadImage as well."""
    outcomes = {name: attempt(image_size, content)[0] for name, content in mutants(100)}
    assert {name: wrong for name, wrong in outcomes.items() if wrong} == {}


# files


def folder_of(root: Path, *names: str) -> FolderSource:
    return FolderSource(root, Names(names), np.zeros(len(names), np.int64), ("a",))


def test_a_wrong_extension_does_not_matter(tmp_path: Path) -> None:
    """A PNG named .jpg and a JPEG named .png are read for what they are."""
    (tmp_path / "a.jpg").write_bytes(encode(Image.fromarray(blocks()), "PNG"))
    (tmp_path / "b.png").write_bytes(encode(Image.fromarray(blocks()), "JPEG"))
    source = folder_of(tmp_path, "a.jpg", "b.png")
    assert np.array_equal(source.read(0), blocks())
    assert source.read(1).shape == blocks().shape


def test_paths_that_cannot_be_read_are_bad_images(tmp_path: Path) -> None:
    """A folder named x.jpg, a file that has gone and a dangling link are BadImage with the system's reason."""
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    source = folder_of(tmp_path, "folder.jpg", "gone.jpg", "dangling.jpg")
    for index, cause in enumerate(["Is a directory", "No such file or directory", "No such file or directory"]):
        with pytest.raises(BadImage, match=f"^cannot be read: {cause}$"):
            source.read(index)


@pytest.fixture
def open_folder_of_all() -> Iterator[Path]:
    """A folder that every user may enter, unlike tmp_path."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_a_file_without_permission_is_a_bad_image(open_folder_of_all: Path) -> None:
    """A file that this user may not read is a BadImage; read as a user that is not root."""
    file = open_folder_of_all / "x.jpg"
    file.write_bytes(encode(Image.fromarray(blocks()), "JPEG"))
    source = folder_of(open_folder_of_all, "x.jpg")
    assert source.read(0).shape == blocks().shape
    file.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(BadImage, match=r"^cannot be read: Permission denied$"):
            source.read(0)
    finally:
        os.seteuid(user)

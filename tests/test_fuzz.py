"""Fuzzers: inputs made by rules from a seed, as many as the budget says, broken in their bytes and in their grammar.

Whatever comes out, a reader gives what it gives for whole inputs or raises its named error with one short line; nothing
else escapes, and nothing hangs or takes much memory. Another seed: FUZZ_SEED=7 pytest -m slow tests/test_fuzz.py.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

import hostile_checkpoints
import hostile_configs
from hostile import Case, verdicts, written
from hostile_images import read_image
from hostile_tars import BLOCK, PLAIN, pax, read_shard, record, tar
from normfree.config import Run, UserError, from_dict
from normfree.data.decode import BadImage
from normfree.files import parse_json
from normfree.models.unpickle import read_haiku
from normfree.models.weights import read_tensors, read_weights
from normfree.train.checkpoint import load_checkpoint
from odd_images import encode, exif, image, oriented, tiled_tiff
from test_weights import infected, torch_bytes

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")  # of fork, from Python 3.12 on

SEED = int(os.environ.get("FUZZ_SEED", "0"))
ODD = (
    b"\0",
    b"\x01",
    b"\x7f",
    b"\x80",
    b"\xff",
    b"\xff\xff\xff\xff",
    b"\0\0\0\x80",
    b"\xff\xff\xff\x7f",
    b"../",
    b"\n",
)


class Draws:
    """What a fuzzer asks for, from one seed."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def below(self, n: int) -> int:
        return int(self._rng.integers(n))

    def of(self, items: Sequence[Any]) -> Any:
        return items[self.below(len(items))]

    def bytes(self, most: int) -> bytes:
        return self._rng.bytes(self.below(most + 1))


def mutated(content: bytes, draw: Draws) -> bytes:
    """One to three changes: a bit, an odd value, a piece out, in, twice, or elsewhere; or all of it cut."""
    out = bytearray(content)
    for _ in range(1 + draw.below(3)):
        at, length = draw.below(len(out) + 1), 1 + draw.below(24)
        match draw.below(7):
            case 0 if at < len(out):
                out[at] ^= 1 << draw.below(8)
            case 1:
                odd = draw.of(ODD)
                out[at : at + len(odd)] = odd
            case 2:
                del out[at : at + length]
            case 3:
                out[at:at] = draw.bytes(24)
            case 4:
                out[at:at] = out[at : at + length]
            case 5:
                piece, to = bytes(out[at : at + length]), draw.below(len(out) + 1)
                out[to : to + len(piece)] = piece
            case _:
                del out[max(at, len(out) // 2) :]
    return bytes(out)


# values, for JSON


def value(draw: Draws, depth: int = 0) -> Any:
    """Of any type; what is odd more often than what is not."""
    plain: list[Any] = [None, True, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")]
    texts = [
        "",
        "a",
        "../x",
        "/etc/passwd",
        "os.system",
        "__class__",
        "\0",
        "\ud800",
        "\x1b[2J\n",
        "9" * 50,
        "x" * 5000,
    ]
    match draw.below(6 if depth < 4 else 4):
        case 0 | 1:
            return draw.of(plain)
        case 2 | 3:
            return draw.of(texts)
        case 4:
            return [value(draw, depth + 1) for _ in range(draw.below(4))]
        case _:
            return {draw.of([*texts, "size", "step", "name"]): value(draw, depth + 1) for _ in range(draw.below(4))}


def changed(tree: Any, draw: Draws) -> Any:
    """A value with something in it replaced, removed, added or renamed, at any depth."""
    if isinstance(tree, dict) and tree and draw.below(4):
        name = draw.of(list(tree))
        return {**tree, name: changed(tree[name], draw)}
    if isinstance(tree, list) and tree and draw.below(3):
        at = draw.below(len(tree))
        return [*tree[:at], changed(tree[at], draw), *tree[at + 1 :]]
    if isinstance(tree, dict) and tree:
        name, rest = draw.of(list(tree)), dict(tree)
        moved = rest.pop(name)
        return draw.of([rest, {**rest, name + "x": moved}, {**tree, "x": value(draw)}, {**tree, name: value(draw)}])
    return value(draw)


def text_of(tree: Any, draw: Draws) -> bytes:
    """As JSON; sometimes with a name twice, nested further, in another encoding, or with its bytes changed."""
    content = json.dumps(tree).encode()
    match draw.below(8):
        case 0:
            return content.replace(b"{", b'{"a": 1, "a": 2, ', 1)
        case 1:
            return b"[" * draw.below(3000) + content
        case 2:
            return content.decode().encode(draw.of(["utf-8-sig", "utf-16", "utf-32"]))
        case 3 | 4:
            return mutated(content, draw)
        case _:
            return content


# one maker of inputs for each reader


@lru_cache
def _images() -> tuple[bytes, ...]:
    palette, colour = image().quantize(8), image()
    options: dict[str, dict[str, Any]] = {
        "JPEG": {"progressive": True},
        "PNG": {"exif": b"Exif\0\0" + exif(6)},
        "WEBP": {"lossless": True, "save_all": True, "append_images": [colour.rotate(180)]},
        "TIFF": {"compression": "tiff_lzw"},
        "BMP": {},
        "MPO": {"save_all": True, "append_images": [colour]},
    }
    files = [encode(colour, form, **more) for form, more in options.items()]
    return *files, oriented(5), tiled_tiff(), encode(palette, "GIF", save_all=True, append_images=[palette.rotate(180)])


def an_image(draw: Draws) -> bytes:
    """A file with its bytes changed, more often near its header."""
    content: bytes = draw.of(_images())
    head = draw.of([60, 200, 700, len(content)])
    return mutated(content[:head], draw) + content[head:]


def a_tar(draw: Draws) -> bytes:
    """Members with fields of their headers replaced and the sums made right, or with their bytes changed."""
    members = [draw.of([*PLAIN, _a_pax(draw)]) for _ in range(1 + draw.below(4))]
    content = bytearray(tar(*(_lying(m, draw) if draw.below(2) else m for m in members)))
    return mutated(bytes(content), draw) if draw.below(4) == 0 else bytes(content)


def _a_pax(draw: Draws) -> bytes:
    records = [
        record(draw.of(["path", "size", "GNU.sparse.major", "x"]), draw.of(["z.jpg", "../z", "7", "-1", "9" * 30]))
    ]
    return pax(
        *(mutated(r, draw) if draw.below(3) == 0 else r for r in records), kind=draw.of([b"x", b"g", b"L", b"K"])
    )


def _lying(member: bytes, draw: Draws) -> bytes:
    """A header whose name, size, kind, magic or prefix is another, with the right sum."""
    block = bytearray(member[:BLOCK])
    at, length = draw.of([(0, 100), (124, 12), (124, 12), (156, 1), (156, 1), (257, 8), (345, 155)])
    odd = draw.of(
        [b"\0" * length, b"\xff" * length, b"\x80" + bytes(length - 1), b"77777777777\0", b"/../x.jpg\0", b"gLSxK5"]
    )
    block[at : at + length] = (draw.of([odd, draw.bytes(length)]) + bytes(block[at : at + length]))[:length]
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + member[BLOCK:]


_OPERATIONS = tuple(op.code.encode("latin-1") for op in pickletools.opcodes)


@lru_cache
def _pickles() -> tuple[bytes, ...]:
    tree = {"a": {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(2)}}
    whole = [pickle.dumps(tree, protocol) for protocol in (2, 3, 4, 5)]
    return *whole, infected(b"}", protocol=4)[-400:], *(c[2:] for c in whole[:2])


def a_pickle(draw: Draws) -> bytes:
    """A pickle with operations replaced, left out, put in or repeated; or one of operations alone."""
    if draw.below(5) == 0:
        return b"\x80\x04" + b"".join(draw.of(_OPERATIONS) + draw.bytes(5) for _ in range(draw.below(40))) + b"."
    content = draw.of(_pickles())
    places = [place for _, _, place in _operations(content)]
    out = bytearray(content)
    for _ in range(1 + draw.below(3)):
        at = draw.of(places) if places else draw.below(len(out))
        match draw.below(4):
            case 0:
                out[at : at + 1] = draw.of(_OPERATIONS)
            case 1:
                out[at:at] = draw.of(_OPERATIONS) + draw.bytes(4)
            case 2:
                del out[at : at + 1 + draw.below(9)]
            case _:
                out[at:at] = out[at : at + 1 + draw.below(30)] * draw.below(5)
    return mutated(bytes(out), draw) if draw.below(4) == 0 else bytes(out)


def _operations(content: bytes) -> list[tuple[Any, Any, int]]:
    try:
        return [(op, argument, place or 0) for op, argument, place in pickletools.genops(content)]
    except ValueError:
        return []


@lru_cache
def _torch() -> tuple[bytes, bytes]:
    state = {"fc.weight": torch.zeros(3, 2), "fc.bias": torch.ones(3)}
    legacy = io.BytesIO()
    torch.save(state, legacy, _use_new_zipfile_serialization=False)
    return torch_bytes(state), legacy.getvalue()


def a_torch_file(draw: Draws) -> bytes:
    """Bytes changed, more often in the pickle."""
    content = draw.of(_torch())
    at = draw.below(max(1, content.find(b"torch._utils") + 300))
    return content[:at] + mutated(content[at:], draw) if draw.below(2) else mutated(content, draw)


def a_config(draw: Draws) -> bytes:
    tree = hostile_configs.plain()
    for _ in range(1 + draw.below(2)):
        tree = changed(tree, draw)
    return text_of(tree, draw)


@lru_cache
def _header() -> Any:
    entries = {n: {"dtype": "F32", "shape": [2, 3], "data_offsets": [24 * i, 24 * i + 24]} for i, n in enumerate("ab")}
    return {"__metadata__": {"normfree": '{"config": {}}'}, **entries}


def a_safetensors(draw: Draws) -> bytes:
    """A header of other values, types and lengths; or the bytes of a whole file changed."""
    if draw.below(3) == 0:
        return mutated(save({"a": torch.zeros(2, 3), "b": torch.ones(4)}, {"normfree": "{}"}), draw)
    header = text_of(changed(_header(), draw) if draw.below(3) else _header(), draw)
    length = draw.of([None, None, None, 0, 8, 2**40, 2**63, 2**64 - 1])
    return hostile_checkpoints.tensors(header, draw.bytes(60) if draw.below(3) == 0 else bytes(48), length)


def a_manifest(draw: Draws) -> bytes:
    """That of a whole checkpoint, mostly changed."""
    entries = json.loads(hostile_checkpoints.saved()["step-00000002/manifest.json"])
    return text_of(changed(entries, draw) if draw.below(4) else entries, draw)


def read_config(path: Path) -> Any:
    try:
        tree = parse_json(path.read_bytes())
    except ValueError as e:
        raise UserError(str(e)) from e
    return from_dict(Run, tree)


def _weights(path: Path) -> Any:
    return read_weights(path)[0]


def _manifest(content: bytes) -> Callable[[Path], Path]:
    """The manifest of the newer of two checkpoints."""

    def put(folder: Path) -> Path:
        hostile_checkpoints.save_two(folder)
        (folder / "step-00000002" / "manifest.json").write_bytes(content)
        return folder

    return put


Maker = Callable[[Draws], bytes]
Fuzzer = tuple[Maker, Callable[[Path], Any], type[Exception], int]
FUZZERS: dict[str, Fuzzer] = {  # maker, reader, its error, and how many: a second or two of them
    "decoder": (an_image, read_image, BadImage, 400),
    "tar index": (a_tar, read_shard, UserError, 400),
    "unpickler": (a_pickle, read_haiku, UserError, 1000),
    "torch file": (a_torch_file, read_tensors, UserError, 400),
    "config": (a_config, read_config, UserError, 800),
    "safetensors header": (a_safetensors, _weights, UserError, 800),
    "checkpoint manifest": (a_manifest, load_checkpoint, UserError, 300),
}
LONG = 20  # times as many with -m slow


def _either(maker: Maker, reader: Callable[[Path], Any], error: type[Exception], number: int, name: str) -> Case:
    """One input, which may be refused with its error or read."""

    def read(path: Path) -> Any:
        try:
            return reader(path)
        except error as e:
            if len(str(e)) > 2000 or not str(e).isprintable():
                raise RuntimeError("the message is not one short line") from e
            return None

    content = maker(Draws(SEED * 10**9 + number))
    return Case(name, str(number), _putting(name, content), read, None)


def _putting(name: str, content: bytes) -> Callable[[Path], Path]:
    return _manifest(content) if name == "checkpoint manifest" else written(content, "a.tar")


def _run(name: str, count: int) -> dict[str, str]:
    maker, reader, error, _ = FUZZERS[name]
    found: dict[str, str] = {}
    for first in range(0, count, 2000):
        numbers = range(first, min(first + 2000, count))
        found |= verdicts([_either(maker, reader, error, number, name) for number in numbers])
    return found


@pytest.mark.parametrize("name", FUZZERS)
def test_fuzz(name: str) -> None:
    """A few seconds of each, the same at every time."""
    assert _run(name, FUZZERS[name][3]) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", FUZZERS)
def test_fuzz_for_a_minute(name: str) -> None:
    """Many more."""
    assert _run(name, LONG * FUZZERS[name][3]) == {}


@pytest.mark.parametrize("name", FUZZERS)
def test_fuzzers_reach_both_ends(name: str) -> None:
    """Of the inputs some are read and many refused, for many reasons: else nothing would be tried."""
    ends = list(_ends(name, 100))
    assert 0 < ends.count("") < len(ends)
    assert len(set(ends)) > 5


def _ends(name: str, count: int) -> Iterator[str]:
    """The message, or nothing where the input is read."""
    maker, reader, error, _ = FUZZERS[name]
    for number in range(count):
        with tempfile.TemporaryDirectory() as folder:
            path = _putting(name, maker(Draws(number)))(Path(folder))
            try:
                found = reader(path)
                rejected = getattr(found, "rejected", [])
                yield "".join(rejected)
            except error as e:
                yield str(e).replace(str(path), "")

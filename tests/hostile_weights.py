"""Weight files that would execute something, unpack to gigabytes, or hold what is no weights.

The pickles' payloads, each of which does its work when pickle itself loads it, are those of `test_weights`, as are
arrays, headers and configurations that lie.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from hostile import Case, made, written
from hostile_checkpoints import HEADERS
from normfree.config import UserError
from normfree.models import create_model
from normfree.models.network import Network
from normfree.models.weights import describe, load_model, load_weights, read_tensors
from test_weights import (
    ARRAYS,
    CODES,
    CONTAINERS,
    KEYS,
    LIVE,
    TORCH_FILES,
    Call,
    as_legacy,
    as_zip,
    called,
    dumped,
    infected,
    named,
    text,
    torch_bytes,
)

Made = Callable[[], bytes]


@lru_cache
def _model() -> Network:
    return create_model("nfnet_tiny", num_classes=3)


def read_weights_file(path: Path) -> str:
    """Loads a file into a model, as `load_weights` and as a file that says its model itself.

    Raises:
        UserError: both refuse it. AssertionError: a refused file has changed the model.
    """
    before = _model().fc.weight.clone()
    refusals = []
    reads: tuple[Callable[[], object], ...] = (lambda: load_weights(_model(), path), lambda: load_model(path))
    for read in reads:
        try:
            return str(read())
        except UserError as e:
            refusals.append(e)
    assert torch.equal(before, _model().fc.weight), "a refused file has changed the model"
    raise refusals[0]


def cases() -> Iterator[Case]:
    for name, live in LIVE.items():
        for container in ("authors", "zip"):
            put = _live(live, CONTAINERS[container])
            yield Case("pickle", f"{name} in {container}", put, read_weights_file)
    keys, codes = ({n: c for n, c in table.items() if "million" not in n} for table in (KEYS, CODES))  # of seconds each
    for name, payload in ARRAYS.items():
        yield Case("pickle", f"array: {name}", written(infected(payload, protocol=4)), read_tensors)
    arrays = dumped(np.zeros((64, 10), np.float32))
    for name, key in keys.items():
        yield Case("pickle", f"name: {name}", written(infected(arrays, key=key, protocol=4)), read_weights_file)
    for name, code in codes.items():
        content = infected(called(named("numpy", "dtype"), code), protocol=4)
        yield Case("pickle", f"code of a type: {name}", written(content), read_tensors)
    for name, bomb in _BOMBS.items():
        for container, content in {"zip": as_zip(bomb), "legacy": as_legacy(bomb), "authors": bomb}.items():
            yield Case("pickle", f"{name} in {container}", written(content), read_weights_file)
    for name, of_state in TORCH_FILES.items():
        if name != "bomb":  # 100 MB will do, below
            yield Case("torch file", name, made(partial(_of_state, of_state)), read_weights_file)
    for name, make in _ZIPS.items():
        yield Case("torch file", name, made(make), read_weights_file)
    for name, content in HEADERS.items():
        yield Case("safetensors", name, written(content), read_weights_file)
    for name, make in {**_TENSORS, **_OTHERS}.items():
        yield Case("safetensors" if name in _TENSORS else "no weights", name, made(make), read_weights_file)
    for name, put in _PLACES.items():
        yield Case("no weights", name, put, read_weights_file)
    yield Case("safetensors", "weights as they are saved", made(_whole), read_weights_file, None)
    yield Case("torch file", "weights as they are saved", made(_pth), read_weights_file, None)
    for kind, whole in {"safetensors": _whole, "torch file": _pth}.items():
        for part in (0.0, 0.001, 0.1, 0.5, 0.999):
            yield Case(kind, f"cut after {part:.1%}", _cut(whole, part), read_weights_file, damaged=True)


def _of_state(make: Callable[[dict[str, Any]], bytes]) -> bytes:
    return make(_model().state_dict())


def _live(payload: Callable[[Path], bytes], around: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    return lambda folder: written(around(infected(payload(folder.parent / "marker"), protocol=2)))(folder)


def _cut(make: Made, part: float) -> Callable[[Path], Path]:
    def put(folder: Path) -> Path:
        content = make()
        return written(content[: int(len(content) * part)])(folder)

    return put


# programs that make values without end

_TWICE = b"q\x01h\x01\x86"  # a pair of the value with itself
_LIST_TWICE = b"q\x01]q\x02(h\x01h\x01e"  # a list of it, twice
_CALL = named("collections", "OrderedDict")
_BOMBS: dict[str, bytes] = {
    "a name of 2^60 parts": b"\x80\x02})" + _TWICE * 60 + b"K\x01s.",
    "a name 100,000 deep": b"\x80\x02})" + b"\x85" * 10**5 + b"K\x01s.",
    "a function of 2^60 parts": b"\x80\x02)" + _TWICE * 60 + b")R.",
    "arguments of 2^60 parts": b"\x80\x02" + _CALL + b")" + _TWICE * 60 + b"\x85R.",
    "a storage of 2^60 parts": b"\x80\x02)" + _TWICE * 60 + b"\x85Q.",
    "a storage of lists of 2^60 parts": b"\x80\x02]" + _LIST_TWICE * 60 + b"\x85Q.",
    "a state of 2^60 parts": b"\x80\x02" + _CALL + b")R)" + _TWICE * 60 + b"b.",
    "a class of 2^60 parts": b"\x80\x02)" + _TWICE * 60 + b")\x81.",
    "a list of 2^60 parts": b"\x80\x02]" + _LIST_TWICE * 60 + b".",
    "a list in itself": b"\x80\x02]q\x01h\x01a.",
    "a dict in itself": b"\x80\x02}q\x01" + text("a") + b"h\x01s.",
    "100,000 marks": b"\x80\x02" + b"(" * 10**5 + b".",
    "100,000 values": b"\x80\x02" + b"N" * 10**5 + b".",
    "a memo that is not there": b"\x80\x02h\x07.",
    "pops of nothing": b"\x80\x02" + b"0" * 99 + b".",
    "no end": b"\x80\x02N",
    "a tuple of nothing": b"\x80\x02tttt.",
    "a text of 4 GiB": b"\x80\x02X\xff\xff\xff\xffabc.",
    "a bytearray of 2^62": b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b".",
    "10,000 calls of a set": b"\x80\x02" + (named("builtins", "set") + b"]\x85R0") * 10_000 + b"N.",
}


# zips


def _zip(members: dict[str, bytes], packing: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", packing) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


@lru_cache
def _pth() -> bytes:
    return torch_bytes(_model().state_dict())


def _repacked(change: Callable[[str, bytes], tuple[str, bytes]], packing: int = zipfile.ZIP_STORED) -> bytes:
    with zipfile.ZipFile(io.BytesIO(_pth())) as archive:
        return _zip(dict(change(n, archive.read(n)) for n in archive.namelist()), packing)


def _shared() -> bytes:
    """A thousand members in the place of one."""
    content = bytearray(_zip({"archive/data.pkl": b"N.", "archive/data/0": bytes(1 << 16)}))
    end = content.index(b"PK\x05\x06")
    start = content.index(b"PK\x01\x02")
    entries = bytes(content[start:end])
    last = entries[entries.rindex(b"PK\x01\x02") :]
    many = entries + b"".join(last.replace(b"data/0", b"data/%s" % c) for c in (b"1", b"2", b"3")) * 300
    count = 2 + 900
    return bytes(content[:start]) + many + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, len(many), start, 0)


def _evil_pickle() -> bytes:
    return pickle.dumps(Call(os.system, "touch marker"), 2)


_ZIPS: dict[str, Made] = {
    "names that lead up": lambda: _repacked(lambda n, c: (f"../../{n}", c)),
    "names that are absolute": lambda: _repacked(lambda n, c: (f"/etc/{n}", c)),
    "a pickle and code": lambda: _zip({"archive/data.pkl": _evil_pickle(), "archive/code/evil.py": b"import os"}),
    "code of a script": lambda: _zip({"archive/constants.pkl": _evil_pickle(), "archive/data.pkl": b"N."}),
    "a pickle in a folder of its own": lambda: _zip({"data.pkl": _evil_pickle()}),
    "two archives in one": lambda: _zip({"a/data.pkl": b"\x80\x02}.", "b/data.pkl": _evil_pickle()}),
    "deflated weights": lambda: _repacked(lambda n, c: (n, c), zipfile.ZIP_DEFLATED),
    "100 MB of zeros in 100 KB": lambda: _zip({"a/data.pkl": bytes(10**8)}, zipfile.ZIP_DEFLATED),
    "zeros in LZMA": lambda: _zip({"a/data.pkl": bytes(10**7)}, zipfile.ZIP_LZMA),
    "members that share their bytes": _shared,
    "no members": lambda: _zip({}),
    "10,000 members": lambda: _zip({f"a/{i}": b"" for i in range(10_000)}),
    "the start of a zip": lambda: b"PK\3\4",
    "a zip's end alone": lambda: b"PK\3\4" + b"PK\5\6" + bytes(18),
    "arrays of numpy": lambda: _npz(np.zeros(3)),
    "arrays of objects of numpy": lambda: _npz(np.array([Call(os.system, "touch marker")], object)),
    "a Word document": lambda: _zip({"[Content_Types].xml": b"<x/>", "word/document.xml": b"<x/>"}),
    "a wheel": lambda: _zip({"evil/__init__.py": b"import os", "evil.dist-info/METADATA": b"Name: evil"}),
    "NaN among the weights": lambda: torch_bytes(_spoilt(float("nan"))),
    "infinity among the weights": lambda: torch_bytes(_spoilt(float("inf"))),
    "another network": lambda: torch_bytes(create_model("nfnet_tiny", in_chans=1).state_dict()),
}


def _npz(array: Any) -> bytes:
    out = io.BytesIO()
    np.savez(out, w=array, allow_pickle=True)
    return out.getvalue()


def _spoilt(value: float) -> dict[str, torch.Tensor]:
    state = {n: t.clone() for n, t in _model().state_dict().items()}
    state["fc.weight"][1, 2] = value
    return state


# safetensors whose header is fine


@lru_cache
def _whole() -> bytes:
    return save(dict(_model().state_dict()), {"normfree": json.dumps(describe(_model()))})


def _about(**changes: Any) -> Made:
    """Of ours, with other words in the header; those of the configuration too."""

    def make() -> bytes:
        about = describe(_model())
        about["config"] = {**about["config"], **changes.pop("config", {})}
        return save(dict(_model().state_dict()), {"normfree": json.dumps({**about, **changes})})

    return make


def _header(content: str) -> Made:
    return lambda: save(dict(_model().state_dict()), {"normfree": content})


_TENSORS: dict[str, Made] = {
    "NaN among ours": lambda: save(_spoilt(float("nan")), {"normfree": json.dumps(describe(_model()))}),
    "infinity among ours": lambda: save(_spoilt(float("-inf")), {"normfree": json.dumps(describe(_model()))}),
    "no tensors": lambda: save({}),
    "one tensor": lambda: save({"w": torch.zeros(3)}),
    "a tensor of 0 dimensions": lambda: save({"fc.weight": torch.tensor(1.0)}),
    "tensors of no numbers": lambda: save({n: torch.zeros(0) for n in _model().state_dict()}),
    "tensors of whole numbers": lambda: save({n: t.long() for n, t in _model().state_dict().items()}),
    "a name of 1 MB": lambda: save({"x" * (1 << 20): torch.zeros(1)}),
    "names with escapes": lambda: save({"\x1b[2J\n\0": torch.zeros(1)}),
    "10,000 tensors": lambda: save({f"{i}": torch.zeros(1) for i in range(10_000)}),
    "a block that is missing": lambda: save({n: t for n, t in _model().state_dict().items() if "blocks.1." not in n}),
    "widths of 10^9": _about(config={"widths": [10**9] * 4}),
    "depths of 10^9": _about(config={"depths": [10**9] * 4}),
    "a width below 0": _about(config={"widths": [-1] * 4}),
    "classes of 10^12": _about(config={"num_classes": 10**12}),
    "an unknown activation": _about(config={"activation": "os.system"}),
    "an unknown field": _about(config={"_target_": "os.system"}),
    "an alpha that is text": _about(config={"alpha": "0.2"}),
    "folded, it says": _about(folded=True),
    "our header, NaN": _header('{"config": NaN}'),
    "our header, of a name twice": _header('{"config": {}, "config": {}}'),
    "our header, nested without end": _header("[" * 100_000),
}
_OTHERS: dict[str, Made] = {
    "a page of HTML": lambda: b"<!DOCTYPE html><html><head><title>Access denied</title></head></html>",
    "an answer in JSON": lambda: b'{"error": "Repository not found"}',
    "a pointer of Git LFS": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n",
    "a script": lambda: b"#!/usr/bin/env python\nimport os\nos.system('touch marker')\n",
    "a program": lambda: b"\x7fELF" + bytes(999),
    "an image": lambda: b"\xff\xd8\xff\xe0" + bytes(999),
    "a tar": lambda: b"weights".ljust(512, b"\0") + bytes(1024),
    "something compressed": lambda: b"\x1f\x8b\x08" + bytes(99),
    "HDF5": lambda: b"\x89HDF\r\n\x1a\n" + bytes(999),
    "GGUF": lambda: b"GGUF\x03\0\0\0" + b"\xff" * 99,
    "ONNX": lambda: b"\x08\x07\x12\x07pytorch" + bytes(99),
    "an array of numpy": lambda: b"\x93NUMPY\x01\0" + b"\xff" * 99,
    "a checkpoint of TensorFlow": lambda: b"\x57\xfb\x80\x8b\x24\x75\x47\xdb" * 9,
    "a pickle of protocol 0": lambda: b"cos\nsystem\n(S'touch marker'\ntR.",
    "a pickle of protocol 1": lambda: pickle.dumps(Call(os.system, "touch marker"), 1),
    "spaces": lambda: b" " * 999,
    "one byte": lambda: b"\x80",
    "two bytes": lambda: b"\x80\x02",
}


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "weights.safetensors")
    return folder / "weights.safetensors"


def _link(to: str) -> Callable[[Path], Path]:
    def put(folder: Path) -> Path:
        (folder / "weights").symlink_to(to)
        return folder / "weights"

    return put


_PLACES: dict[str, Callable[[Path], Path]] = {
    "a folder": lambda folder: folder,
    "no file": lambda folder: folder / "gone.npz",
    "a pipe": _pipe,
    "a link to itself": _link("weights"),
    "a link to nothing": _link("gone"),
    "a link to zeros": _link("/dev/zero"),
    "a link to nothing at all": _link("/dev/null"),
}

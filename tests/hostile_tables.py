"""Parquet and Arrow files that are broken, or whose columns are not what they should be."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from hostile import Case, made, written
from normfree.config import UserError
from normfree.data.decode import BadImage
from normfree.data.sources import open_data
from normfree.data.sources.tables import open_tables
from odd_images import jpeg


def read_table(path: Path) -> tuple[int, tuple[str, ...]]:
    """(images that can be read, classes)."""
    source = open_tables(path.parent, [path])
    good = 0
    for i in range(len(source)):
        try:
            good += len(source.read(i)) > 0
        except BadImage:
            continue
    return good, source.classes


def cases() -> Iterator[Case]:
    for ending, whole in (("parquet", _parquet), ("arrow", _arrow)):
        for words, table in _COLUMNS.items():
            for name, columns in table.items():
                yield Case(ending, name, _put(ending, whole, columns), read_table, UserError, words)
        for name, garbage in _GARBAGE.items():
            yield Case(ending, name, written(garbage, f"a.{ending}"), read_table, UserError, "is broken, or no")
        for name, (columns, good) in _FINE.items():
            yield Case(ending, name, _put(ending, whole, columns), read_table, None, right=_reads(good))
        for part in (0.1, 0.5, 0.9):
            yield Case(ending, f"cut after {part:.0%}", _cut(ending, whole, part), read_table, UserError, damaged=True)
    for name, content in _LYING.items():
        yield Case("arrow", name, made(content, "a.arrow"), read_table, UserError, "is broken")
    for name, (file, text) in _SAVED.items():
        yield Case("saved set", name, _saved(file, text), _opened, UserError)


def _opened(path: Path) -> int:
    return len(open_data(str(path), 0.5)[0])


def _put(ending: str, make: Callable[[Any], bytes], columns: Callable[[], Any]) -> Callable[[Path], Path]:
    return made(lambda: make(columns()), f"a.{ending}")


def _cut(ending: str, make: Callable[[Any], bytes], part: float) -> Callable[[Path], Path]:
    def put(folder: Path) -> Path:
        content = make(_rows())
        return written(content[: int(len(content) * part)], f"a.{ending}")(folder)

    return put


def _reads(good: int) -> Callable[[tuple[int, tuple[str, ...]]], bool]:
    return lambda found: found[0] == good


def _parquet(table: Any) -> bytes:
    pq = import_module("pyarrow.parquet")
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=2)
    return out.getvalue()


def _arrow(table: Any) -> bytes:
    pa = import_module("pyarrow")
    out = io.BytesIO()
    with pa.ipc.new_stream(out, table.schema) as stream:
        stream.write_table(table)
    return out.getvalue()


@lru_cache
def _picture() -> bytes:
    return jpeg()


def _table(**columns: Any) -> Any:
    pa = import_module("pyarrow")
    return pa.table(columns)


def _rows(image: Any = None, label: Any = (0, 1, 0, 1)) -> Any:
    """Four images, and labels as given."""
    return _table(image=[_picture()] * 4 if image is None else image, label=label)


def _named(names: list[str], columns: list[Any]) -> Any:
    pa = import_module("pyarrow")
    return pa.Table.from_arrays([pa.array(c) for c in columns], names=names)


def _with_metadata(features: Any) -> Any:
    text = features if isinstance(features, bytes) else json.dumps({"info": {"features": features}}).encode()
    return _rows().replace_schema_metadata({b"huggingface": text})


def _dictionary() -> Any:
    pa = import_module("pyarrow")
    return _table(image=pa.array([_picture()] * 4).dictionary_encode(), label=[0, 1, 0, 1])


_COLUMNS: dict[str, dict[str, Callable[[], Any]]] = {
    "no column of images": {
        "no column": _table,
        "no images": lambda: _table(label=[0, 1]),
        "images of another name": lambda: _table(imgae=[b"-"], label=[0]),
        "1,000 other columns": lambda: _table(**{f"x{i}": [0] for i in range(300)}),
    },
    "no column of labels": {
        "no labels": lambda: _table(image=[b"-"]),
        "labels of another name": lambda: _table(image=[b"-"], lable=[0]),
    },
    "not the bytes of images": {
        "images of text": lambda: _rows(["http://127.0.0.1/x.jpg"] * 4),
        "images of numbers": lambda: _rows([1, 2, 3, 4]),
        "images of lists": lambda: _rows([[1], [2], [3], [4]]),
        "images of nothing": lambda: _rows([None] * 4),
        "images of paths alone": lambda: _rows([{"path": "/etc/passwd"}] * 4),
        "images of a dictionary": _dictionary,
    },
    "has no rows": {"no rows": lambda: _rows().slice(0, 0)},
    "label": {
        "a label of nothing": lambda: _rows(label=[0, None, 0, 1]),
        "labels of nothing": lambda: _rows(label=[None] * 4),
        "labels of halves": lambda: _rows(label=[0.5, 1.5, 0.5, 1.5]),
        "labels of bytes": lambda: _rows(label=[b"a", b"b", b"a", b"b"]),
        "labels of truth": lambda: _rows(label=[True, False, True, False]),
        "labels of objects": lambda: _rows(label=[{"a": 1}] * 4),
        "labels of lists of lists": lambda: _rows(label=[[[0]], [[1]], [[0]], [[1]]]),
        "labels of lists of objects": lambda: _rows(label=[[{"a": 1}]] * 4),
        "labels of lists of nothing": lambda: _rows(label=[[None], [0], [1], [0]]),
        "a label below 0": lambda: _rows(label=[0, 1, -1, 0]),
        "a label of 2^62": lambda: _rows(label=[0, 1, 2**62, 0]),
    },
    "twice": {
        "two columns of images": lambda: _named(["image", "image", "label"], [[b"-"], [b"-"], [0]]),
        "two columns of labels": lambda: _named(["image", "label", "label"], [[b"-"], [0], [1]]),
    },
}
_FINE: dict[str, tuple[Callable[[], Any], int]] = {
    "four images": (_rows, 4),
    "an image that is garbage": (lambda: _rows([_picture(), b"\x80\x04cos\nsystem\n.", b"", _picture()]), 2),
    "an image that is nothing": (lambda: _rows([_picture(), None, None, _picture()]), 2),
    "paths that lead away": (
        lambda: _rows([{"bytes": _picture(), "path": p} for p in ("/etc/passwd", "../../x", "\x1b[2J", "http://x")]),
        4,
    ),
    "a path without bytes": (lambda: _rows([{"bytes": None, "path": "/etc/passwd"}] * 4), 0),
    "bytes of text": (lambda: _rows([{"bytes": "x", "path": "y"}] * 4), 0),
    "labels that are code": (lambda: _rows(label=["__import__('os')", "b", "$(touch marker)", "b"]), 4),
    "metadata of garbage": (lambda: _with_metadata(b"\xff\xfe"), 4),
    "metadata nested without end": (lambda: _with_metadata(b"[" * 100_000), 4),
    "metadata that names a class to import": (lambda: _with_metadata({"label": {"_type": "os.system"}}), 4),
    "metadata whose names are a number": (lambda: _with_metadata({"label": {"names": 3}}), 4),
    "metadata whose names come twice": (lambda: _with_metadata({"label": {"names": ["a", "a"]}}), 4),
    "metadata that is a list": (lambda: _with_metadata([1, 2]), 4),
    "metadata of a feature that is text": (lambda: _with_metadata({"label": "names"}), 4),
    "further columns": (lambda: _rows().append_column("pickle", [[b"\x80\x04."] * 4]), 4),
}
_GARBAGE: dict[str, bytes] = {
    "nothing": b"",
    "four letters": b"PAR1",
    "four letters often": b"PAR1" * 9,
    "a footer of 2 GiB": b"PAR1" + bytes(20) + struct.pack("<I", 2**31 - 1) + b"PAR1",
    "a footer of 4 GiB": b"PAR1" + bytes(20) + struct.pack("<I", 2**32 - 1) + b"PAR1",
    "a footer of ones": b"PAR1" + b"\xff" * 200 + struct.pack("<I", 200) + b"PAR1",
    "a footer that is encrypted": b"PARE" + bytes(200) + struct.pack("<I", 200) + b"PARE",
    "a message of 2 GiB": b"\xff\xff\xff\xff" + struct.pack("<I", 2**31 - 1) + bytes(99),
    "a message of -1": b"\xff\xff\xff\xff\xff\xff\xff\xff" + bytes(99),
    "a message of ones": b"\xff\xff\xff\xff" + struct.pack("<I", 64) + b"\xff" * 64,
    "zeros and ones": bytes(100) + b"\xff" * 100,
    "ones": b"\xff" * 1000,
    "a page of HTML": b"<!DOCTYPE html>" * 20,
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\n" * 3,
    "a pickle": b"\x80\x04cos\nsystem\n(S'touch marker'\ntR.",
}


# Arrow's buffers, whose offsets are used as they are


def _offsets(*values: int) -> Callable[[], bytes]:
    """The offsets of the images' bytes replaced; those of four images of 700 bytes, 32 bits each."""

    def make() -> bytes:
        size = len(_picture())
        old = struct.pack("<5i", *(size * i for i in range(5)))
        content = _arrow(_rows())
        assert content.count(old) == 1
        return content.replace(old, struct.pack("<5i", *values))

    return make


_LYING: dict[str, Callable[[], bytes]] = {
    "images that begin far behind the end": _offsets(0, 2**30, 2**30 + 9, 2**30 + 10, 2**30 + 20),
    "images that begin before the start": _offsets(-(2**30), -(2**29), 0, 5, 9),
    "images that end before they begin": _offsets(900, 800, 700, 600, 500),
    "an image of 2 GiB": _offsets(0, 2**31 - 1, 2**31 - 1, 2**31 - 1, 2**31 - 1),
    "images that go up and down": _offsets(0, 900, 100, 900, 1000),
}


# data sets that were saved


def _saved(file: str, content: bytes) -> Callable[[Path], Path]:
    def put(folder: Path) -> Path:
        (folder / file).write_bytes(content)
        (folder / "evil.arrow").write_bytes(b"-")
        return folder

    return put


_SAVED: dict[str, tuple[str, bytes]] = {
    "a state that is empty": ("state.json", b""),
    "a state that is a list": ("state.json", b"[]"),
    "a state nested without end": ("state.json", b"[" * 100_000),
    "a state of no files": ("state.json", b"{}"),
    "a state of files above": ("state.json", b'{"_data_files": [{"filename": "../x.arrow"}]}'),
    "a state of the system's files": ("state.json", b'{"_data_files": [{"filename": "/etc/passwd"}]}'),
    "a state of files that are numbers": ("state.json", b'{"_data_files": [{"filename": 1}]}'),
    "a state of files that are not there": ("state.json", b'{"_data_files": [{"filename": "gone.arrow"}]}'),
    "a state of files that are none": ("state.json", b'{"_data_files": [{"filename": "evil.arrow"}]}'),
    "a state of a name with a zero": ("state.json", b'{"_data_files": [{"filename": "a\\u0000.arrow"}]}'),
    "splits above": ("dataset_dict.json", b'{"splits": ["../train"]}'),
    "splits of numbers": ("dataset_dict.json", b'{"splits": [1]}'),
    "splits that are not there": ("dataset_dict.json", b'{"splits": ["train"]}'),
    "splits of none": ("dataset_dict.json", b'{"splits": []}'),
    "splits of no JSON": ("dataset_dict.json", b"\xff"),
}

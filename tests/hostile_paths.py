"""What may lie where an image or a class is expected: folders, pipes, links, devices, odd names, no permission."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from hostile import Case
from hostile_images import read_image
from normfree.config import UserError
from normfree.data.decode import BadImage
from normfree.data.sources import open_data, read_file
from odd_images import encode, image, jpeg, picture

Put = Callable[[Path], object]


def cases() -> Iterator[Case]:
    for words, table in _NO_FILES.items():
        for name, put in table.items():
            yield Case("path", name, _named("x.jpg", put), read_file, BadImage, words)
    for name, file in _NAMES.items():
        yield Case("path", name, _named(file, lambda path: path.write_bytes(jpeg())), read_image, None)
    for suffix, form in {".jpg": "PNG", ".png": "JPEG", ".gif": "BMP", ".bmp": "TIFF", ".tiff": "GIF"}.items():
        yield Case("path", f"{form} named {suffix}", _named(f"x{suffix}", _encoded(form)), read_image, None)
    for words, folders in _NO_SETS.items():
        for name, put in folders.items():
            yield Case("folder", name, _folder(put), _read_all, UserError, words)
    yield Case("folder", "with folders below folders without end", _folder(_deep), _read_all, OSError, "name too long")
    for name, put in _SETS.items():
        yield Case("folder", name, _folder(put), _read_all, None, right=lambda found: found == ["a", "b"])


def _named(name: str, put: Put) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        put(folder / name)
        return folder / name

    return make


def _encoded(form: str) -> Put:
    return lambda path: path.write_bytes(encode(image(), form))


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(path))


def _circle(path: Path) -> None:
    path.symlink_to(path.with_name("y.jpg"))
    path.with_name("y.jpg").symlink_to(path)


def _large(path: Path) -> None:
    path.touch()
    os.truncate(path, (1 << 30) + 1)


_NO_FILES: dict[str, dict[str, Put]] = {
    "cannot be read": {
        "a folder": lambda path: path.mkdir(),
        "nothing": lambda _path: None,
        "a link to nothing": lambda path: path.symlink_to("gone.jpg"),
        "a link to itself": lambda path: path.symlink_to(path),
        "two links in a circle": _circle,
        "a link to a folder": lambda path: path.symlink_to(path.parent),
        "a link through a file": lambda path: path.symlink_to("/etc/hostname/x.jpg"),
        "a socket": _socket,
    },
    "not a regular file": {
        "a pipe": os.mkfifo,
        "a link to a device of zeros": lambda path: path.symlink_to("/dev/zero"),
        "a link to a device of nothing": lambda path: path.symlink_to("/dev/null"),
        "a link to a terminal": lambda path: path.symlink_to("/dev/ptmx"),
    },
    "over the limit": {"a file of 1 GiB with holes": _large},
}
_NAMES = {
    "a name with line breaks": "a\nb\r.jpg",
    "a name with an escape": "\x1b[2J.jpg",
    "a name that is no text": os.fsdecode(b"\xff\xfe.jpg"),
    "a name of 255 bytes": "x" * 251 + ".jpg",
    "a name like an option": "--help.jpg",
    "a name like a command": "$(touch marker);`id`|x.jpg",
    "a name like a pipe": "|touch marker.jpg",
    "a name with quotes": "'\"\\.jpg",
    "a name of blanks": " .jpg",
    "a name in both directions": "\u202egpj.exe.jpg",
    "a name without an ending": "image",
    "a name like an address": "https:.jpg",
}


# folders of classes


def _read_all(root: Path) -> list[str]:
    """The classes whose images can all be read."""
    train, val = open_data(str(root), 0.5)
    for source in (train, val):
        for i in range(len(source)):
            assert source.read(i).shape == picture().shape
    return list(train.classes)


def _folder(put: Put) -> Callable[[Path], Path]:
    """Classes a and b of two images each, and what is put among them."""

    def make(folder: Path) -> Path:
        for name in ("a/0.jpg", "a/1.jpg", "b/0.jpg", "b/1.jpg"):
            (folder / "set" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "set" / name).write_bytes(jpeg())
        put(folder / "set")
        return folder / "set"

    return make


def _remove(folder: Path) -> None:
    shutil.rmtree(folder)


def _validation_only(root: Path) -> None:
    (root / "val").mkdir()
    for name in ("a", "b"):
        (root / name).rename(root / "val" / name)


def _without_folders(root: Path) -> None:
    for name in ("a", "b"):
        _remove(root / name)


def _archive(name: str) -> Put:
    def put(root: Path) -> None:
        _without_folders(root)
        (root / name).write_bytes(b"\x1f\x8b" + bytes(99))

    return put


def _file(name: str, content: bytes = b"") -> Put:
    def put(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)

    return put


def _links(root: Path) -> None:
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "self").symlink_to(root / "a")
    (root / "b" / "aside").symlink_to(root / "a")


def _deep(root: Path) -> None:
    """Further down than a path may be long."""
    here = os.open(root / "a", os.O_RDONLY)
    for _ in range(60):
        os.mkdir("d" * 80, dir_fd=here)
        inner = os.open("d" * 80, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)


def _table(name: str, text: str | bytes) -> Put:
    content = text.encode() if isinstance(text, str) else text

    def put(root: Path) -> None:
        for folder in ("a", "b"):
            for file in (root / folder).iterdir():
                file.rename(root / f"{folder}{file.name}")
            (root / folder).rmdir()
        (root / name).write_bytes(content)

    return put


def _csv(*rows: str) -> Put:
    return _table("labels.csv", "\n".join(("file,label", *rows)))


_ROWS = ("a0.jpg,a", "a1.jpg,a", "b0.jpg,b", "b1.jpg,b")
_SETS: dict[str, Put] = {
    "with links in circles": _links,
    "beside a hidden pipe": lambda root: os.mkfifo(root / ".hidden"),
    "beside a pipe": lambda root: os.mkfifo(root / "a" / "pipe"),
    "beside a script": _file("a/run.py", b"import os; os.system('touch marker')"),
    "beside a pickle": _file("a/x.pkl", b"cos\nsystem\n(S'touch marker'\ntR."),
    "beside a compiled module": _file("a/x.pyd", b"MZ" * 99),
    "beside weights": _file("a/x.pth", b"PK\3\4"),
    "beside conftest and sitecustomize": _file("sitecustomize.py", b"open('marker', 'w')"),
    "beside a folder of hidden images": _file(".thumbnails/x.jpg", b"-"),
    "beside a resource fork": _file("a/._0.jpg", b"-"),
    "beside a Thumbs.db": _file("a/Thumbs.db", b"-"),
    "with a table of four rows": _csv(*_ROWS),
    "with a table behind a byte order mark": _table("labels.csv", "\ufefffile,label\n" + "\n".join(_ROWS)),
    "with a table of Windows' lines": _table("labels.csv", "file,label\r\n" + "\r\n".join(_ROWS) + "\r\n"),
    "with a table and other columns": _table("labels.csv", "file,label,x\n" + "\n".join(f"{r},=cmd()" for r in _ROWS)),
}

_NO_SETS: dict[str, dict[str, Put]] = {
    "has no images": {
        "with an empty class": lambda root: (root / "c").mkdir(),
        "with a class of texts": _file("c/x.txt", b"-"),
        "with a class of hidden images": _file("c/.x.jpg", b"-"),
    },
    "no 'train'": {"without training images": _validation_only},
    "not UTF-8": {"with a table that is no text": _table("labels.csv", b"file,label\n\xff.jpg,a\n")},
    "no column of labels": {
        "with a table of one column": _table("labels.csv", "file\na0.jpg\n"),
        "with a table of other columns": _table("labels.csv", "file,lable\na0.jpg,a\n"),
        "with a table of 10,000 columns": _table("labels.csv", "file," + "x," * 10000 + "\n" + "a0.jpg," + "," * 10000),
    },
    "labels.csv": {
        "with an empty table": _table("labels.csv", ""),
        "with a table of a header": _table("labels.csv", "file,label\n"),
        "with a table of zeros": _table("labels.csv", bytes(999)),
        "with a quote that never ends": _csv('"a0.jpg,a'),
        "with a field of 1 MB": _csv("a0.jpg," + "x" * (1 << 20)),
        "with a row too short": _csv("a0.jpg"),
        "with a row too long": _csv("a0.jpg,a,b"),
        "with a file that is not there": _csv(*_ROWS, "a2.jpg,a"),
        "with a file of two rows": _csv(*_ROWS, "a0.jpg,b"),
        "with a file above the folder": _csv(*_ROWS, "../x.jpg,a"),
        "with a file above by a detour": _csv(*_ROWS, "a/../../x.jpg,a"),
        "with a file of the system": _csv(*_ROWS, "/etc/passwd,a"),
        "with a file of zeros in its name": _csv(*_ROWS, "a0\0.jpg,a"),
        "with a file without a label": _csv(*_ROWS, "a0.jpg,"),
        "with a label without a file": _csv(*_ROWS, ",a"),
    },
    "labels.jsonl": {
        "with lines that are no JSON": _table("labels.jsonl", "{'file': 'a0.jpg'}\n"),
        "with lines nested without end": _table("labels.jsonl", "[" * 100_000),
        "with lines that are lists": _table("labels.jsonl", '["a0.jpg", "a"]\n'),
        "with a file that is a number": _table("labels.jsonl", '{"file": 1, "label": "a"}\n'),
        "with a label that is an object": _table("labels.jsonl", '{"file": "a0.jpg", "label": {"__class__": "os"}}\n'),
        "with a label that is a list": _table("labels.jsonl", '{"file": "a0.jpg", "label": ["a", "b"]}\n'),
        "with a label that is true": _table("labels.jsonl", '{"file": "a0.jpg", "label": true}\n'),
        "with a label that is no number": _table("labels.jsonl", '{"file": "a0.jpg", "label": NaN}\n'),
        "with a label of 5,000 digits": _table("labels.jsonl", '{"file": "a0.jpg", "label": ' + "9" * 5000 + "}\n"),
        "with labels that are objects": _table("labels.jsonl", '{"file": "a0.jpg", "labels": [{}]}\n'),
    },
    "one class only": {"with one class": lambda root: _remove(root / "b")},
    "one image only": {"with a class of one image": lambda root: (root / "b" / "0.jpg").unlink()},
    "is missing": {"that is not there": _remove},
    "no class folders": {"of files alone": _without_folders},
    "is compressed": {
        "with a compressed archive": _archive("x.tar.gz"),
        "with a zip": _archive("x.zip"),
    },
}

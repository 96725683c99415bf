"""Tar shards that lie, leave their folder, or hold what is no image."""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from hostile import Case, made, written
from normfree.config import UserError
from normfree.data.decode import BadImage
from normfree.data.sources.shards import open_shards
from odd_images import jpeg

BLOCK = 512


def read_shard(path: Path) -> tuple[list[str], list[str], tuple[str, ...]]:
    """(names of the samples, names left out, classes); every sample is an image or a BadImage."""
    source = open_shards(path.parent, [path])
    for i in range(len(source)):
        try:
            source.read(i)
        except BadImage:
            continue
    return [source.name(i) for i in range(len(source))], source.ignored, source.classes


def cases() -> Iterator[Case]:
    for words, table in _BROKEN.items():
        for name, make in table.items():
            yield Case("tar", name, made(make, "a.tar"), read_shard, UserError, words)
    for name, (make, left) in _LEFT_OUT.items():
        yield Case("tar", name, made(make, "a.tar"), read_shard, None, right=_leaves(left))
    for words, texts in _CLASSES.items():
        for name, (file, text) in texts.items():
            yield Case("class names", name, _with_classes(file, text), read_shard, UserError, words)
    whole = tar(*PLAIN)
    for length in (1, 100, 512, 700, 1100, 1500, len(whole) // 2):
        yield Case("tar", f"cut at byte {length}", written(whole[:length], "a.tar"), read_shard, damaged=True)
    for place in (0, 60, 100, 124, 148, 156):
        flipped = whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :]
        yield Case("tar", f"byte {place} turned over", written(flipped, "a.tar"), read_shard, damaged=True)


def _leaves(left: int) -> Callable[[tuple[list[str], list[str], tuple[str, ...]]], bool]:
    """Whether the two samples are found and so many other members are left out."""
    return lambda found: (found[0][:2], len(found[1]), found[2]) == (["x.jpg", "y.jpg"], left, ("0", "1"))


# writing


def header(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape")


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE) -> bytes:
    return header(name, kind, len(content)) + content + bytes(-len(content) % BLOCK)


def patched(offset: int, value: bytes, name: str = "z.jpg") -> bytes:
    """A header with other bytes at a place, and the right sum."""
    block = bytearray(header(name))
    block[offset : offset + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def tar(*members: bytes, end: bytes = bytes(2 * BLOCK)) -> bytes:
    return b"".join(members) + end


def record(key: str, value: str) -> bytes:
    """Of a pax header."""
    rest = f" {key}={value}\n".encode(errors="surrogateescape")
    length = len(rest) + 1
    while len(str(length)) + len(rest) != length:
        length += 1
    return str(length).encode() + rest


def pax(*records: bytes, kind: bytes = b"x") -> bytes:
    return member("pax", b"".join(records), kind)


def sample(key: str, label: str = "0") -> bytes:
    return member(f"{key}.jpg", jpeg()) + member(f"{key}.cls", label.encode())


PLAIN = (sample("x", "0"), sample("y", "1"))


def _with(*members: bytes) -> Callable[[], bytes]:
    """After the two samples."""
    return lambda: tar(*PLAIN, *members)


def _lone(*members: bytes) -> Callable[[], bytes]:
    return lambda: tar(*members)


# what is refused

_BROKEN: dict[str, dict[str, Callable[[], bytes]]] = {
    "no end mark": {
        "an empty file": lambda: b"",
        "one byte": lambda: b"-",
        "without an end mark": lambda: tar(*PLAIN, end=b""),
        "100 zeros": lambda: bytes(100),
    },
    "the tar shards have no images": {
        "an end mark alone": tar,
        "folders alone": _lone(member("a/", kind=b"5"), member("b/", kind=b"5")),
        "scripts alone": _lone(member("setup.py", b"import os"), member("x.sh", b"touch marker")),
    },
    "not a tar file": {
        "a compressed tar": lambda: gzip.compress(tar(*PLAIN)),
        "a zip": lambda: b"PK\3\4" * 300,
        "a page of HTML": lambda: b"<html>" * 200,
        "a pointer of Git LFS": lambda: b"version https://git-lfs.github.com/spec/v1\n".ljust(600),
        "a pickle named .tar": lambda: b"\x80\x04cos\nsystem\n".ljust(600, b"N"),
        "ones": lambda: b"\xff" * 2000,
        "a wrong sum": _lone(header("a.jpg")[:-1] + b"x"),
        "a cpio archive": lambda: b"070701" * 200,
        "an ar archive": lambda: b"!<arch>\n".ljust(700),
    },
    "cut off": {
        "a member of 2^60 bytes": _with(header("z.jpg", size=2**60)),
        "a member of 2^80 bytes": _with(patched(124, b"\x80" + (2**80).to_bytes(11, "big"))),
        "a member past the end": _with(header("z.jpg", size=5000)),
        "a pax header of 2^60 bytes": _with(header("z", b"x", 2**60)),
        "a global header of 2^60 bytes": _with(header("z", b"g", 2**60)),
        "a long name of 2^60 bytes": _with(header("z", b"L", 2**60)),
        "a long link of 2^60 bytes": _with(header("z", b"K", 2**60)),
        "a pax size of 2^60": _with(pax(record("size", str(2**60))), header("z.jpg")),
        "a file with holes past the end": _with(header("z.jpg", b"S", 2**40)),
    },
    "no number for its size": {
        "a size below 0": _with(patched(124, b"\xff" * 12)),
        "a size with a sign": _with(patched(124, b"-0000000777\0")),
        "a size with an underscore": _with(patched(124, b"0000_000777\0")),
        "a size in hexadecimal": _with(patched(124, b"0x0000000ff\0")),
        "a size of letters": _with(patched(124, b"import os;;;")),
        "a pax size below 0": _with(pax(record("size", "-1")), header("z.jpg")),
        "a pax size of 100 digits": _with(pax(record("size", "9" * 100)), header("z.jpg")),
        "a pax size in other digits": _with(pax(record("size", "\u0663")), header("z.jpg")),
    },
    "over the limit": {"a long name of 2 MB": _with(member("z", bytes(2 << 20), b"L"), header("z.jpg"))},
    "a pax header is broken": {
        "a pax record longer than it": _with(member("p", b"999 path=a\n", b"x"), header("z.jpg")),
        "a pax record of no length": _with(member("p", b"0 path=a\n", b"x"), header("z.jpg")),
        "a pax record of a negative length": _with(member("p", b"-9 path=a\n", b"x"), header("z.jpg")),
        "a pax record without a length": _with(member("p", b"path=a\n", b"x"), header("z.jpg")),
        "a pax record of 10,000 digits": _with(member("p", b"9" * 10_000 + b" path=a\n", b"x"), header("z.jpg")),
        "a pax header of zeros": _with(member("p", bytes(99), b"x"), header("z.jpg")),
        "a pax header of one space": _with(member("p", b" ", b"x"), header("z.jpg")),
    },
    "behind its end mark": {
        "two tars joined": lambda: tar(*PLAIN) + tar(sample("z")),
        "a zero block in the middle": lambda: tar(PLAIN[0], bytes(BLOCK), PLAIN[1]),
        "a script behind the end": lambda: tar(*PLAIN) + b"#!/bin/sh\n",
        "2 MB of zeros behind the end": lambda: tar(*PLAIN, end=bytes(2 << 20)),
    },
    "the same key": {
        "an image twice": _with(member("x.jpg", jpeg())),
        "two images of one key": _with(member("x.png", jpeg())),
        "an image twice by another path": _with(member("./x.jpg", jpeg())),
    },
    "label": {
        "a label of 2 MB": _with(member("z.jpg"), member("z.cls", bytes(2 << 20))),
        "a label of 300 digits": _with(member("z.jpg"), member("z.cls", b"9" * 300)),
        "a label with a zero": _with(member("z.jpg"), member("z.cls", b"1\x002")),
        "a label beyond all classes": _with(member("z.jpg"), member("z.cls", b"1152921504606846976")),
        "a label below 0": _with(member("z.jpg"), member("z.cls", b"-1")),
        "a label that is a command": _with(member("z.jpg"), member("z.cls", b"pipe:touch marker")),
        "a label that is a script": _with(member("z.jpg"), member("z.cls", b"__import__('os').system('touch marker')")),
        "a label in other digits": _with(member("z.jpg"), member("z.cls", "\u0661".encode())),
        "a label that is a list": _with(member("z.jpg"), member("z.json", b'{"label": [1]}')),
        "a label that is true": _with(member("z.jpg"), member("z.json", b'{"label": true}')),
        "a label that is half": _with(member("z.jpg"), member("z.json", b'{"label": 0.5}')),
        "a label beyond all numbers": _with(member("z.jpg"), member("z.json", b'{"label": 1e999}')),
        "no labels": _lone(member("x.jpg", jpeg())),
    },
    "is not JSON": {
        "a label nested without end": _with(member("z.jpg"), member("z.json", b"[" * 100_000)),
        "a label that is no text": _with(member("z.jpg"), member("z.json", b"\xff\xfe\x00")),
        "a label that is a pickle": _with(member("z.jpg"), member("z.json", b"\x80\x04cos\nsystem\n")),
        "a label of 5,000 digits": _with(member("z.jpg"), member("z.json", b'{"label": ' + b"9" * 5000 + b"}")),
    },
}

# what is left out, with the number of members that are listed as such


def _link(name: str, kind: bytes, to: str) -> tuple[Callable[[], bytes], int]:
    return _with(header(name, kind, link=to), member(name.rpartition(".")[0] + ".cls", b"0")), 2


def _old(names: int) -> bytes:
    """As writers of the seventies: no magic word, no owner."""
    block = bytearray(header("z.txt"))
    block[257:265] = bytes(8)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) * names


def _holes() -> bytes:
    info = tarfile.TarInfo("z.jpg")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**50)}
    return info.tobuf(tarfile.PAX_FORMAT)


_LEFT_OUT: dict[str, tuple[Callable[[], bytes], int]] = {
    "two samples": (_with(), 0),
    "an absolute name": (_with(member("/etc/cron.d/z.jpg", jpeg())), 1),
    "a name that leads up": (_with(member("../../z.jpg", jpeg())), 1),
    "a name that leads up later": (_with(member("a/../../z.jpg", jpeg())), 1),
    "a name that leads up on Windows": (_with(member("..\\..\\z.jpg", jpeg())), 1),
    "a name that is ..": (_with(member("..", jpeg())), 1),
    "a name of a network": (_with(member("\\\\host\\share\\z.jpg", jpeg())), 1),
    "a pax name that leads up": (_with(pax(record("path", "../z.jpg")), member("z.jpg", jpeg())), 1),
    "a pax name that is absolute": (_with(pax(record("path", "/z.jpg")), member("z.jpg", jpeg())), 1),
    "a long name that leads up": (_with(member("L", b"../" * 99 + b"z.jpg\0", b"L"), member("z.jpg", jpeg())), 1),
    "a name with a zero in it": (_with(pax(record("path", "z.jpg\0.py")), member("z.jpg", jpeg())), 1),
    "an empty name": (_with(member("", jpeg())), 1),
    "a link out of the folder": _link("z.jpg", tarfile.SYMTYPE, "/etc/passwd"),
    "a link to itself": _link("z.jpg", tarfile.SYMTYPE, "z.jpg"),
    "a hard link": _link("z.jpg", tarfile.LNKTYPE, "x.jpg"),
    "a hard link out of the folder": _link("z.jpg", tarfile.LNKTYPE, "../../etc/shadow"),
    "a device": _link("z.jpg", tarfile.BLKTYPE, ""),
    "a terminal": _link("z.jpg", tarfile.CHRTYPE, ""),
    "a pipe": _link("z.jpg", tarfile.FIFOTYPE, ""),
    "a file with holes": (_with(header("z.jpg", b"S")), 1),
    "a file with holes of pax": (_with(_holes()), 1),
    "a member of an unknown kind": (_with(header("z.jpg", b"Z")), 1),
    "a volume's label": (_with(header("z.jpg", b"V")), 1),
    "a member of several volumes": (_with(header("z.jpg", b"M")), 1),
    "old headers": (_with(_old(3)), 3),
    "a script": (_with(member("z.py", b"open('marker', 'w')")), 1),
    "a pickle": (_with(member("z.pkl", b"cos\nsystem\n(S'touch marker'\ntR.")), 1),
    "a pickle beside an image": (_with(member("x.pyd", b"cos\nsystem\n(S'touch marker'\ntR.")), 1),
    "weights": (_with(member("x.pth", b"PK\3\4")), 1),
    "arrays of objects": (_with(member("x.npy", b"\x93NUMPY")), 1),
    "a tar in a tar": (_with(member("z.tar", tar(*PLAIN))), 1),
    "a module beside an image": (_with(member("x.so", b"\x7fELF")), 1),
    "a name of 10,000 bytes": (_with(member("L", b"d/" * 5000 + b"z.py\0", b"L"), member("z.py")), 1),
    "a name that is no text": (_with(member(b"\xff\xfe.py".decode(errors="surrogateescape"))), 1),
    "a name with line breaks": (_with(member("a\nb\r\x1b[2J.py")), 1),
    "a pax header of 150,000 records": (_with(pax(*[record("a", "")] * 150_000), member("z.py")), 1),
    "a pax header of foreign words": (_with(pax(record("SCHILY.xattr.security.capability", "x")), member("z.py")), 1),
    "a pax charset": (_with(pax(record("hdrcharset", "BINARY")), member("z.py")), 1),
    "a global pax header": (_with(pax(record("path", "../evil.jpg"), kind=b"g"), member("z.py")), 1),
    "a pax header behind the last member": (_with(pax(record("path", "z.jpg"))), 0),
    "1,000 long names for one member": (_with(*[member("L", b"z.py\0", b"L")] * 1000, member("y.py")), 1),
    "a hidden image": (_with(member(".z.jpg", jpeg())), 0),
    "10,000 folders": (_with(*[member("a/", kind=b"5")] * 10_000), 0),
    "a label without an image": (_with(member("q.cls", b"0")), 1),
    "a label that comes twice": (_with(member("x.cls", b"0")), 0),
    "a sample without a label": (_with(member("q.jpg", jpeg())), 1),
    "an image of garbage": (_with(member("z.jpg", b"\xff\xd8" * 99), member("z.cls", b"0")), 0),
    "an empty image": (_with(member("z.jpg"), member("z.cls", b"0")), 0),
    "an image named by another's ending": (_with(member("z.png", jpeg()), member("z.cls", b"0")), 0),
    "endings in capitals": (_with(member("z.JPEG", jpeg()), member("z.CLS", b"0")), 0),
}


# names of classes beside a shard


def _with_classes(file: str, content: bytes) -> Callable[[Path], Path]:
    def put(folder: Path) -> Path:
        (folder / file).write_bytes(content)
        return written(tar(*PLAIN), "a.tar")(folder)

    return put


def _numbers(count: int) -> str:
    return "\n".join(f"{i:x}" for i in range(count))


_CLASSES: dict[str, dict[str, tuple[str, bytes]]] = {
    "comes twice": {
        "100,000 names, the last twice": ("classes.txt", (_numbers(100_000) + f"\n{99_999:x}").encode()),
        "one name twice": ("classes.txt", b"ant\nant\n"),
        "one name twice in JSON": ("classes.json", b'["ant", "ant"]'),
    },
    "without a name": {
        "an empty name": ("classes.json", b'["ant", ""]'),
        "an empty file": ("classes.txt", b""),
        "a line of blanks": ("classes.txt", b"ant\n  \nbee\n"),
    },
    "cannot be read": {
        "names that are no text": ("classes.txt", b"\xff\xfe\xfd"),
        "names that are no JSON": ("classes.json", b"['ant', 'bee']"),
        "names nested without end": ("classes.json", b"[" * 100_000),
        "names that are numbers": ("classes.json", b"[1, 2]"),
        "names that are one text": ("classes.json", b'"ab"'),
        "numbers from 1": ("classes.json", b'{"1": "ant", "2": "bee"}'),
        "numbers with a gap": ("classes.json", b'{"0": "ant", "2": "bee"}'),
        "names that are null": ("classes.json", b"null"),
    },
    "has 1 classes": {"too few": ("classes.txt", b"ant\n")},
}

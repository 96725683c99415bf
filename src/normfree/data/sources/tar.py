"""What is in a tar file, from its headers alone: names, places and sizes, with nothing unpacked or followed.

The format is POSIX ustar with pax and GNU long names. Everything that a header says is checked against the file's size
before it is used, so that no header makes us read or hold more than the file has.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple
from zlib import crc32

from normfree.config import UserError

BLOCK = 512
_MAX_EXTRA = 1 << 20  # bytes of a pax header or a long name
_MAX_END = 1 << 20  # bytes of zeros behind the end mark; writers fill up their last record

_REGULAR = (b"\x00", b"0", b"7")
_WITHOUT_DATA = b"123456"  # links, devices, folders, pipes
_OCTAL = re.compile(rb"[0-7]*")  # int() would take signs and underscores
_ZEROS = bytes(BLOCK)


class Member(NamedTuple):
    """One entry of a tar file."""

    name: bytes
    offset: int  # of its content
    size: int
    kind: str  # "file", "folder", or "other": a link, a device, a file with holes
    check: int  # CRC-32 of the header block, which stands right before the content
    start: bytes  # of the content, at most 512 bytes


class BrokenTar(UserError):
    """The file is no whole tar file; the message says why, without its name."""


def members(file: int) -> Iterator[Member]:
    """The entries of the tar file that a file descriptor has open, in order.

    Raises:
        BrokenTar: not a tar file, damaged, or cut off.
    """
    end, at, extra = os.fstat(file).st_size, 0, _Extra()
    while True:
        block = os.pread(file, 2 * BLOCK, at)
        header = block[:BLOCK]
        if header == _ZEROS:
            return _check_end(file, at, end)
        if len(header) < BLOCK:
            raise BrokenTar(f"cut off at byte {end}: it has no end mark")
        _check_sum(header, at)
        kind, size = header[156:157], _number(header[124:136], at)
        if extra.size is not None and kind in _REGULAR:
            size = extra.size
        stored = 0 if kind in _WITHOUT_DATA else size
        if at + BLOCK + stored > end:
            raise BrokenTar(f"cut off: the entry at byte {at} ends at {at + BLOCK + stored}, the file at {end}")
        if kind in b"xgLK":
            extra.read(kind, _extra(file, at, size))
        else:
            name = extra.name or _name(header)
            start = block[BLOCK : BLOCK + stored]
            yield Member(name, at + BLOCK, size, _kind(kind, name, extra.holes), crc32(header), start)
            extra = _Extra()
        at += BLOCK + -(-stored // BLOCK) * BLOCK


@dataclass
class _Extra:
    """What headers before an entry say about it."""

    name: bytes | None = None
    size: int | None = None
    holes: bool = False

    def read(self, kind: bytes, content: bytes) -> None:
        if kind == b"L":
            self.name = content.rstrip(b"\0")
        elif kind == b"x":
            self._read_pax(content)

    def _read_pax(self, content: bytes) -> None:
        for key, value in _records(content):
            if key == b"path":
                self.name = value.rstrip(b"\0")
            elif key == b"size":
                if not value.isdigit() or len(value) > 19:
                    raise BrokenTar("a pax header has no number for its size")
                self.size = int(value)
            elif key.startswith(b"GNU.sparse"):
                self.holes = True


def _records(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Key and value of each record of a pax header: "LENGTH KEY=VALUE" and a line's end, all of that LENGTH bytes."""
    at = 0
    while at < len(content):  # places and not slices of the rest: there may be a hundred thousand
        blank = content.find(b" ", at, at + 8)
        digits = content[at : max(blank, at)]
        if not digits.isdigit() or not len(digits) + 1 < int(digits) <= len(content) - at:
            raise BrokenTar("a pax header is broken")
        end = at + int(digits)
        key, _, value = content[blank + 1 : end - 1].partition(b"=")
        yield key, value
        at = end


def _kind(kind: bytes, name: bytes, holes: bool) -> str:
    if kind == b"5" or name.endswith(b"/"):
        return "folder"
    return "file" if kind in _REGULAR and not holes else "other"


def _extra(file: int, at: int, size: int) -> bytes:
    if size > _MAX_EXTRA:
        raise BrokenTar(f"the header at byte {at} is {size} bytes long, over the limit of {_MAX_EXTRA}")
    return os.pread(file, size, at + BLOCK)


def _name(header: bytes) -> bytes:
    name, prefix = header[:100].split(b"\0", 1)[0], header[345:500].split(b"\0", 1)[0]
    return prefix + b"/" + name if header[257:263] == b"ustar\0" and prefix else name


def _check_sum(header: bytes, at: int) -> None:
    """The sum of all bytes, those of the sum itself taken as blanks."""
    if _octal(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * 32:
        raise BrokenTar(f"not a tar file, or damaged: the header at byte {at} has the wrong sum")


def _number(field: bytes, at: int) -> int:
    """Octal digits, or where the first bit is set the bytes of a number."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    size = _octal(field)
    if size is None:
        raise BrokenTar(f"damaged: the header at byte {at} has no number for its size")
    return size


def _octal(field: bytes) -> int | None:
    digits = field.strip(b" \0")
    return int(digits or b"0", 8) if _OCTAL.fullmatch(digits) else None


def _check_end(file: int, at: int, end: int) -> None:
    rest = end - at
    if rest > _MAX_END or os.pread(file, rest, at).strip(b"\0"):
        raise BrokenTar(f"it goes on behind its end mark at byte {at}; were several tar files joined?")

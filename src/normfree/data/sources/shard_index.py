"""Where the samples of tar shards are: found from the headers once, and anew when a shard changes."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from normfree.config import UserError
from normfree.data.decode import EXTENSIONS
from normfree.data.sources import cache
from normfree.data.sources.names import Names, NamesBuilder, joined
from normfree.data.sources.tar import BLOCK, BrokenTar, Member, members

CACHED_FROM = 10_000  # samples; fewer are indexed in a moment

_READERS = 8  # shards that are read at once: what takes time is waiting for the disk
_MOST_MEMBERS = 4_000_000  # of one shard
_MOST_LABEL = 1 << 20  # bytes of a .cls or .json
_IMAGES = tuple(e.encode() for e in EXTENSIONS)
_COMPANIONS = (b"txt", b"text", b"json", b"cls")  # may stand beside an image without being counted


@dataclass
class Index:
    """The samples of one shard or of many, in order."""

    names: Names  # of the images' members
    labels: Names  # as written; "" where there is none
    table: NDArray[np.int64]  # (N, 4): shard, offset, size, CRC-32 of the header
    ignored: Names  # members that are not used


def index_shards(shards: Sequence[Path]) -> tuple[Index, NDArray[np.int64]]:
    """The index of shards, and the stamps (shards, 5) that they had before they were read.

    Raises:
        UserError: a shard cannot be read or is broken.
    """
    try:
        stamps = np.array([cache.stamp(path) for path in shards], np.int64)
    except OSError as e:
        raise UserError(f"{e.filename} cannot be read: {e.strerror}") from e
    key = "\0".join(str(path.resolve()) for path in shards)
    if (kept := _load(key, stamps)) is not None:
        return kept, stamps
    with ThreadPoolExecutor(min(_READERS, len(shards))) as pool:
        parts = list(pool.map(index_shard, shards))
    for number, part in enumerate(parts):
        part.table[:, 0] = number
    found = Index(
        joined(p.names for p in parts),
        joined(p.labels for p in parts),
        np.concatenate([p.table for p in parts]),
        joined(p.ignored for p in parts),
    )
    if len(found.names) >= CACHED_FROM and cache.settled(stamps):
        _keep(key, stamps, found)
    return found, stamps


def index_shard(path: Path) -> Index:
    """The samples of one shard.

    Raises:
        UserError: it cannot be read, is broken, or has a key twice.
    """
    scan = _Scan(path)
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from e
    try:
        for count, member in enumerate(members(file)):
            if count == _MOST_MEMBERS:
                raise BrokenTar(f"it has more than {_MOST_MEMBERS:,} members; write more and smaller shards")
            scan.add(member, file)
    except BrokenTar as e:
        raise UserError(f"{path}: {e}") from e
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from e
    finally:
        os.close(file)
    return scan.done()


class _Scan:
    """Collects the samples of a shard."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.images, self.ignored = NamesBuilder(), NamesBuilder()
        self.table = array("q")
        self.places: dict[bytes, int] = {}  # of keys: which image
        self.labels: dict[bytes, tuple[bytes, bytes]] = {}  # of keys: the label and where it stands
        self.companions: list[tuple[bytes, bytes]] = []  # (key, name)

    def add(self, member: Member, file: int) -> None:
        name = member.name[2:] if member.name.startswith(b"./") else member.name
        if member.kind == "folder":
            return
        if member.kind == "other" or _leaves(name):
            self._ignore(name)
            return
        folder, _, base = name.rpartition(b"/")
        if base.startswith(b"."):
            return  # hidden, as in a folder
        stem, _, ending = base.partition(b".")
        self._add_file(name, folder + b"/" + stem, ending.lower(), member, file)

    def _add_file(self, name: bytes, key: bytes, ending: bytes, member: Member, file: int) -> None:
        if b"." + ending in _IMAGES:
            self._add_image(name, key, member)
        elif ending.endswith(_IMAGES):  # further dots: no sample of WebDataset's, but one of a class folder
            self._add_image(name, name, member)
        elif ending == b"cls":
            self.labels[key] = (self._content(member, file).strip(), name)
        elif ending == b"json" and (label := self._json_label(self._content(member, file), name)) is not None:
            self.labels.setdefault(key, (label, name))  # a .cls goes before
        elif ending in _COMPANIONS:
            self.companions.append((key, name))
        else:
            self._ignore(name)

    def _add_image(self, name: bytes, key: bytes, member: Member) -> None:
        if key in self.places:
            raise BrokenTar(f"{os.fsdecode(name)!r} and another image have the same key")
        self.places[key] = len(self.images)
        self.images.append(name)
        self.table.extend((0, member.offset, member.size, member.check))

    def _ignore(self, name: bytes) -> None:
        self.ignored.append(os.fsencode(self.path.name) + b"/" + name)

    def _content(self, member: Member, file: int) -> bytes:
        if member.size <= len(member.start):
            return member.start[: member.size]
        if member.size > _MOST_LABEL:
            raise BrokenTar(f"the label {os.fsdecode(member.name)!r} is {member.size} bytes long")
        return os.pread(file, member.size, member.offset)

    def _json_label(self, content: bytes, name: bytes) -> bytes | None:
        """The label in a JSON object, or None."""
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            raise BrokenTar(f"{os.fsdecode(name)!r} is not JSON") from None
        label = next((value[k] for k in ("label", "cls") if k in value), None) if isinstance(value, dict) else None
        if label is None:
            return None
        if isinstance(label, bool) or not isinstance(label, (int, str)):
            raise BrokenTar(f"{os.fsdecode(name)!r} has a label that is neither a whole number nor a name")
        return str(label).strip().encode(errors="backslashreplace")

    def done(self) -> Index:
        labels, names = NamesBuilder(), self.images.done()
        for key in self.places:  # in the order of the images
            label, _ = self.labels.pop(key, (b"", b""))
            if len(label) > 200 or b"\0" in label:
                raise UserError(f"{self.path}: the label of {os.fsdecode(key)!r} is no label")
            labels.append(label)
        for name in [n for _, n in self.labels.values()] + [n for k, n in self.companions if k not in self.places]:
            self._ignore(name)
        table = np.array(self.table, np.int64).reshape(-1, 4)
        return Index(names, labels.done(), table, self.ignored.done())


def _leaves(name: bytes) -> bool:
    """Whether a name leads out of a folder. Nothing is ever written by these names; whoever made them meant no good."""
    return name.startswith((b"/", b"\\")) or b".." in name.replace(b"\\", b"/").split(b"/") or b"\0" in name


def _load(key: str, stamps: NDArray[np.int64]) -> Index | None:
    arrays = cache.load("shards", key)
    if arrays is None:
        return None
    try:
        if not np.array_equal(arrays["stamps"], stamps):
            return None
        names, labels, ignored = (cache.unpack_names(n, arrays) for n in ("names", "labels", "ignored"))
        table = arrays["table"]
        fits = table.shape == (len(names), 4) and table.dtype == np.int64 and len(labels) == len(names)
        return Index(names, labels, table, ignored) if fits and _inside(table, stamps[:, 2]) else None
    except (KeyError, ValueError, TypeError):
        return None


def _inside(table: NDArray[np.int64], sizes: NDArray[np.int64]) -> bool:
    """Whether every sample lies in its shard."""
    shard, offset, size, _ = table.T
    if np.any(shard < 0) or np.any(shard >= len(sizes)) or np.any(offset < BLOCK) or np.any(size < 0):
        return False
    return bool(np.all(offset <= sizes[shard]) and np.all(size <= sizes[shard] - offset))


def _keep(key: str, stamps: NDArray[np.int64], found: Index) -> None:
    lists = {"names": found.names, "labels": found.labels, "ignored": found.ignored}
    packed = {name: array for label, names in lists.items() for name, array in cache.pack_names(label, names).items()}
    cache.keep("shards", key, {"stamps": stamps, "table": found.table, **packed})

"""Tar shards in the WebDataset layout, read by random access: never unpacked, and nothing in them is ever run.

KEY.jpg (or another ending that we decode) is an image and KEY.cls its label: a whole number, or a name. In place of
KEY.cls there may be KEY.json with "label". KEY is the path up to the first dot of the file's name. Shards without any
label may hold class folders instead: CLASS/IMAGE.jpg. Names of the classes are in classes.txt (one a line) or
classes.json (a list, or an object by number) beside the shards or one folder up; else they are the numbers.

Samples stand in the order of the sorted shards, and in each as stored. So shards that were written in the order of a
folder (by class, then by name, as `write_shards` does) give the same training run as the folder.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from normfree.config import UserError
from normfree.data.decode import BadImage
from normfree.data.sources import cache
from normfree.data.sources.class_names import read_classes, sorted_classes
from normfree.data.sources.names import Names, joined
from normfree.data.sources.protocol import Readable
from normfree.data.sources.shard_index import Index, index_shards
from normfree.data.sources.tar import BLOCK


@dataclass
class ShardSource(Readable):
    """Images in tar files. Each read is one pread, from a file that each process opens for itself."""

    root: Path
    shards: tuple[Path, ...]
    stamps: NDArray[np.int64]  # (shards, 5), what `cache.stamp` said when they were indexed
    names: Names  # of the members; with their shard's before, where a name comes twice
    table: NDArray[np.int64]  # (N, 4): shard, offset, size, CRC-32 of the header
    labels: NDArray[Any]
    classes: tuple[str, ...]
    left_out: Names
    held_out: bool = False

    @property
    def place(self) -> str:
        return f"{len(self.shards):,} tar shard{'s' * (len(self.shards) > 1)} in {self.root}"

    @property
    def ignored(self) -> list[str]:
        return list(self.left_out)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return self.names[index]

    def content(self, index: int) -> bytes:
        shard, offset, size, check = self.table[index].tolist()
        path = self.shards[shard]
        try:
            file = _open(str(path), tuple(self.stamps[shard, :4].tolist()))
            data = os.pread(file.number, size + BLOCK, offset - BLOCK)
        except OSError as e:
            raise BadImage(f"{path} cannot be read: {e.strerror or e}") from e
        if len(data) != size + BLOCK or crc32(data[:BLOCK]) != check:
            raise BadImage(f"{path} is not what it was when it was listed")
        return data[BLOCK:]

    def subset(self, indices: NDArray[np.int64]) -> ShardSource:
        names, table = self.names.take(indices), self.table[indices]
        return replace(self, names=names, table=table, labels=self.labels[indices])


class _File:
    """A file descriptor that is closed when nobody has it any more."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@lru_cache(maxsize=64)  # open files of a process; after a fork both sides may go on, since pread keeps no place
def _open(path: str, expected: tuple[int, ...]) -> _File:
    if cache.stamp(path)[:4] != expected:
        raise BadImage(f"{path} was replaced since it was listed")
    return _File(path)


def open_shards(root: Path, shards: Sequence[Path]) -> ShardSource:
    """The samples of some shards.

    Raises:
        UserError: a shard is broken, a key comes twice in one, there is no label, or a label is none of the classes.
    """
    shards = tuple(sorted(shards))
    found, stamps = index_shards(shards)
    samples, left_out = _usable(root, shards, found)
    classes_file, known = read_classes((shards[0].parent, shards[0].parent.parent, root))
    labels, classes = _labels(root, samples, known, classes_file)
    return ShardSource(root, shards, stamps, samples.names, samples.table, labels, classes, left_out)


class _Samples(NamedTuple):
    names: Names
    table: NDArray[np.int64]
    texts: list[str]  # of the labels


def _usable(root: Path, shards: tuple[Path, ...], found: Index) -> tuple[_Samples, Names]:
    """The samples that have a label, and the names of what is left out."""
    if not len(found.names):
        raise UserError(f"{root}: the tar shards have no images")
    texts = list(found.labels)
    if any(texts):
        usable = np.array([bool(text) for text in texts])
    else:
        texts, usable = [_folder_of(name) for name in found.names], np.ones(len(texts), bool)
        if not all(texts):
            example = found.names[texts.index("")]
            raise UserError(f"{root}: the tar shards have no labels; {example!r} needs a .cls, or a class folder")
    names = _unique(found.names, found.table[:, 0], shards)
    kept, dropped = np.flatnonzero(usable), np.flatnonzero(~usable)
    samples = _Samples(names.take(kept), found.table[kept], [texts[i] for i in kept])
    return samples, joined([found.ignored, names.take(dropped)])


def _folder_of(name: str) -> str:
    return name.split("/", 1)[0] if "/" in name else ""


def _unique(names: Names, shard: NDArray[np.int64], shards: tuple[Path, ...]) -> Names:
    """The names, with their shard's before where any name comes twice."""
    hashes = np.array([hash(name) for name in names.encoded()], np.int64)
    if len(np.unique(hashes)) == len(hashes):
        return names
    return Names(f"{shards[s].name}/{name}" for s, name in zip(shard.tolist(), names, strict=True))


def _labels(
    root: Path, samples: _Samples, known: tuple[str, ...], file: Path | None
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """(labels, classes) from the texts of the labels."""
    texts = samples.texts
    distinct = set(texts)
    numbers = sorted(t for t in distinct if t.removeprefix("-").isdecimal() and t.isascii())
    if numbers and len(numbers) < len(distinct):
        odd = min(distinct - set(numbers))
        raise UserError(f"{root}: the label of {samples.names[texts.index(odd)]!r} is {odd!r}, others are numbers")
    index = sorted_classes(distinct, known, bool(numbers))
    wrong = next((t for t in sorted(distinct) if t not in index.place), None)
    if wrong is not None:
        of = f"; {file} has {len(known):,} classes" if file else f"; without a classes.txt they go to {index.limit - 1}"
        raise UserError(f"{root}: the label of {samples.names[texts.index(wrong)]!r} is {wrong!r}{of}")
    return np.array([index.place[t] for t in texts], np.int64), index.classes

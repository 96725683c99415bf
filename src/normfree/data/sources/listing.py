"""The files below a folder, quickly and in a fixed order, with the stamps that tell later whether any came or went."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from normfree.data.decode import EXTENSIONS
from normfree.data.sources import cache
from normfree.data.sources.names import Names, NamesBuilder

CACHED_FROM = 50_000  # images; fewer are listed in a moment


@dataclass
class Listing:
    """The images of some folders below a root."""

    names: Names  # of the images, relative to the root; sorted in each folder, folders after files
    counts: NDArray[np.int64]  # images of each of the folders that were asked for
    ignored: Names  # files that are no images by their name


@dataclass
class _Walk:
    """What one walk collects."""

    images: NamesBuilder = field(default_factory=NamesBuilder)
    others: NamesBuilder = field(default_factory=NamesBuilder)
    folders: NamesBuilder = field(default_factory=NamesBuilder)  # every folder that was read, and its stamp
    stamps: list[tuple[int, ...]] = field(default_factory=list)


def list_images(root: Path, folders: list[str]) -> Listing:
    """The images at any depth below ROOT/FOLDER for each folder; hidden files and folders are left out.

    A long list is kept between runs, with the stamps of all folders that it was read from: it is used again while no
    entry of any of them came, went or was renamed.

    Raises:
        OSError: a folder cannot be read.
    """
    key = "\0".join([str(root.resolve()), *folders])
    if (kept := _load(key)) is not None:
        return kept
    walk, counts = _Walk(), []
    start = {_identity(root), *(_identity(root / f) for f in folders)}
    for folder in folders:
        before = len(walk.images)
        _walk(f"{root}{os.sep}", folder, set(start), walk)
        counts.append(len(walk.images) - before)
    found = Listing(walk.images.done(), np.array(counts, np.int64), walk.others.done())
    if len(found.names) >= CACHED_FROM:
        _keep(key, found, walk)
    return found


def _walk(root: str, top: str, seen: set[tuple[int, int]], into: _Walk) -> None:
    """`root` ends in a separator, `top` is relative to it."""
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        into.folders.append(os.fsencode(root + folder))
        into.stamps.append(cache.stamp(root + folder))  # before it is read: a change in between makes it another one
        files, folders = _entries(root + folder)
        for name in files:
            kind = into.images if is_image_name(name) else into.others
            kind.append(os.fsencode(f"{folder}{os.sep}{name}"))
        inside = [f"{folder}{os.sep}{f}" for f in folders]
        waiting += reversed([f for f in inside if _is_new(_identity(root + f), seen)])


def _entries(folder: str) -> tuple[list[str], list[str]]:
    """(files, folders) in a folder, sorted, without the hidden ones; a link is what it leads to."""
    files: list[str] = []
    folders: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                (folders if _is_folder(entry) else files).append(entry.name)
    return sorted(files), sorted(folders)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself: a file, which cannot be read when it is due
        return False


def _is_new(identity: tuple[int, int], seen: set[tuple[int, int]]) -> bool:
    """Whether a folder was not met before; now it was."""
    new = identity not in seen
    seen.add(identity)
    return new


def _load(key: str) -> Listing | None:
    arrays = cache.load("folder", key)
    if arrays is None:
        return None
    try:
        stamps = arrays["stamps"].tolist()
        folders = cache.unpack_names("folders", arrays)
        if len(stamps) != len(folders) or any(list(cache.stamp(f)) != s for f, s in zip(folders, stamps, strict=True)):
            return None
        names, counts = cache.unpack_names("names", arrays), arrays["counts"]
        fits = counts.dtype == np.int64 and counts.sum() == len(names)
        return Listing(names, counts, cache.unpack_names("ignored", arrays)) if fits else None
    except (OSError, KeyError, ValueError, TypeError):
        return None


def _keep(key: str, found: Listing, walk: _Walk) -> None:
    stamps = np.array(walk.stamps, np.int64)
    if not cache.settled(stamps):
        return
    folders = walk.folders.done()
    lists = {"names": found.names, "ignored": found.ignored, "folders": folders}
    packed = {name: array for label, names in lists.items() for name, array in cache.pack_names(label, names).items()}
    cache.keep("folder", key, {"stamps": stamps, "counts": found.counts, **packed})


def is_image_name(name: str) -> bool:
    """Whether a file is an image by its name."""
    return name.lower().endswith(EXTENSIONS)


def files_below(top: Path, seen: set[tuple[int, int]] | None = None) -> Iterator[str]:
    """Paths of the files below a folder, sorted in each; hidden files and folders are left out.

    No folder comes twice, where links lead in circles, and none that is in `seen`, which grows by what is met.

    Raises:
        OSError: a folder cannot be read.
    """
    seen = {_identity(top)} if seen is None else seen
    waiting = [str(top)]
    while waiting:
        folder = waiting.pop()
        files, folders = _entries(folder)
        yield from (os.path.join(folder, f) for f in files)
        inside = [os.path.join(folder, f) for f in folders]
        waiting += reversed([f for f in inside if _is_new(_identity(f), seen)])


def folders_in(root: Path) -> list[str]:
    """Names of the folders inside, sorted, without the hidden ones."""
    return _entries(str(root))[1]


def files_in(root: Path) -> list[str]:
    """Names of the files inside, sorted, without the hidden ones."""
    return _entries(str(root))[0]


def _identity(path: str | Path) -> tuple[int, int]:
    """The same for every name of a file or folder."""
    status = os.stat(path)
    return status.st_dev, status.st_ino

"""Image files below a folder, one folder a class."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normfree.config import UserError
from normfree.data.decode import BadImage
from normfree.data.sources.listing import folders_in, list_images
from normfree.data.sources.names import Names
from normfree.data.sources.protocol import Readable
from normfree.files import open_plain

MAX_BYTES = 1 << 30  # of a file that is read whole; the largest image that is decoded has less in any format
LAYOUT = "expected ROOT/CLASS/IMAGES, or ROOT/train/CLASS/IMAGES and ROOT/val/CLASS/IMAGES"


@dataclass
class FolderSource(Readable):
    """Files below a root. Each read opens the file anew."""

    root: Path
    names: Names  # relative to the root
    labels: NDArray[Any]
    classes: tuple[str, ...]
    ignored: list[str] = field(default_factory=list)  # files that are not used, as `name` has them
    prefix: str = ""  # of names in reports: "train/" below a root with train/ and val/
    found: str = "class folders"  # where the labels are from
    held_out: bool = False

    @property
    def place(self) -> str:
        return f"{self.found} in {self.root}"

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return self.prefix + self.names[index]

    def content(self, index: int) -> bytes:
        return read_file(self.root / self.names[index])

    def subset(self, indices: NDArray[np.int64]) -> FolderSource:
        return replace(self, names=self.names.take(indices), labels=self.labels[indices])


def read_file(path: Path) -> bytes:
    """The content of a file. Raises BadImage, so that one unreadable file is counted like a broken one.

    A pipe or a device has no end, and is not waited for.
    """
    try:
        with open_plain(path) as f:
            size = os.fstat(f.fileno()).st_size
            if size > MAX_BYTES:
                raise BadImage(f"{size:,} bytes are over the limit of {MAX_BYTES >> 20} MiB")
            return f.read()
    except OSError as e:
        raise BadImage(f"cannot be read: {e.strerror or e}") from e


def open_folder(root: Path, single_class: bool = False, prefix: str = "") -> FolderSource:
    """ROOT/CLASS/IMAGES, images at any depth below the class; hidden files and folders are ignored.

    Sorted by class, then as `list_images` has them.

    Raises:
        UserError: no folder, no classes, a class without images, or one class only where two are needed.
    """
    check_folder(root)
    classes = folders_in(root)
    if not classes:
        raise UserError(f"{root} has no class folders; {LAYOUT}")
    found = list_images(root, classes)
    if not found.counts.all():
        empty = classes[int(np.argmin(found.counts))]
        raise UserError(f"class {empty!r} has no images ({root / empty}); remove the folder or fill it")
    if len(classes) == 1 and not single_class:
        raise UserError(f"{root} has one class only, {classes[0]!r}; training needs at least two")
    labels = np.repeat(np.arange(len(classes)), found.counts)
    return FolderSource(root, found.names, labels, tuple(classes), [prefix + n for n in found.ignored], prefix)


def check_folder(root: Path) -> None:
    """Raises UserError where a path is no folder."""
    if not root.is_dir():
        raise UserError(f"{root} is {'not a folder' if root.exists() else 'missing'}; {LAYOUT}")

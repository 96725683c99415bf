"""Small sets of images in every form, written without the code that reads them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

Entry = tuple[str, bytes]
Sample = tuple[str, bytes, int]  # (path, encoded image, label)


def jpeg(seed: int, side: int = 9) -> bytes:
    """A small image of noise."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side + 1, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def samples(classes: tuple[str, ...] = ("ant", "bee", "cat"), per_class: int = 5) -> list[Sample]:
    """Images in the order of a folder: by class, then by name."""
    return [
        (f"{name}/{i:03d}.jpg", jpeg(100 * label + i), label)
        for label, name in enumerate(classes)
        for i in range(per_class + label)
    ]


def write_folder(root: Path, images: list[Sample]) -> Path:
    """ROOT/CLASS/IMAGES."""
    for name, content, _ in images:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_tar(path: Path, entries: list[Entry | tarfile.TarInfo], kind: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar file of plain files, or of headers without content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind, errors="surrogateescape") as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
                continue
            info = tarfile.TarInfo(entry[0])
            info.size = len(entry[1])
            tar.addfile(info, io.BytesIO(entry[1]))
    return path


def webdataset(images: list[Sample]) -> list[Entry | tarfile.TarInfo]:
    """KEY.jpg and KEY.cls of each."""
    return [
        entry
        for name, content, label in images
        for entry in ((name, content), (name.removesuffix(".jpg") + ".cls", str(label).encode()))
    ]

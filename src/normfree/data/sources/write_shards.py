"""Any source as tar shards: the quickest form to read at random from a disk or a network file system."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from normfree.config import UserError
from normfree.data.sources.listing import is_image_name
from normfree.data.sources.protocol import Source, several_labels
from normfree.files import write_atomic

_MAGIC = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp"), (b"II*\0", "tif"))


def write_shards(source: Source, folder: Path, stem: str = "train", images_per_shard: int = 1000) -> list[Path]:
    """Write FOLDER/STEM-000000.tar and so on, in the source's order, and classes.json; returns the shards' paths.

    Contents are copied as they are; pixels become PNG. KEY is the image's name without its ending, further dots as "_".

    Raises:
        UserError: an image may have several labels, which shards have no form for; or two images would have one key.
        BadImage: an image cannot be read.
        FileExistsError: a shard is there already.
    """
    if several_labels(source):
        raise UserError("tar shards have one label an image, these images have several")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "classes.json", (json.dumps(source.classes) + "\n").encode())
    paths, keys = [], set()
    for number, first in enumerate(range(0, len(source), images_per_shard)):
        path = folder / f"{stem}-{number:06d}.tar"
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        if path.exists():
            raise FileExistsError(f"{path} exists already")
        try:
            with tarfile.open(beside, "x", format=tarfile.PAX_FORMAT) as shard:
                for index in range(first, min(first + images_per_shard, len(source))):
                    keys.add(_add(shard, source, index))
                    if len(keys) <= index:
                        raise UserError(f"{source.name(index)!r} and another image would have the same key")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
        paths.append(path)
    return paths


def _add(shard: tarfile.TarFile, source: Source, index: int) -> str:
    """Add one sample; returns its key."""
    content = _encoded(source.content(index))
    path, _, base = source.name(index).rpartition("/")
    stem, ending = os.path.splitext(base) if is_image_name(base) else (base, f".{_ending(content)}")
    key = f"{path}/{stem.replace('.', '_')}".lstrip("/")
    for name, data in ((key + ending, content), (f"{key}.cls", str(int(source.labels[index])).encode())):
        info = tarfile.TarInfo(name)
        info.size = len(data)
        shard.addfile(info, io.BytesIO(data))
    return key


def _encoded(content: bytes | NDArray[np.uint8]) -> bytes:
    if isinstance(content, bytes):
        return content
    buffer = io.BytesIO()
    Image.fromarray(content).save(buffer, "PNG")
    return buffer.getvalue()


def _ending(content: bytes) -> str:
    return next((ending for magic, ending in _MAGIC if content.startswith(magic)), "webp")

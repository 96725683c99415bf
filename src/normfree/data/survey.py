"""What each image of a set is, found by reading every one of them once: its hashes, size and format, or its fault."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from normfree.config import UserError
from normfree.data.decode import EXTENSIONS, BadImage, decode
from normfree.data.loader import LoaderStalled, Loading, start_loader, worker_options
from normfree.data.sources import Source

# 42 bytes an image, whatever its name: a set of millions fits, and hashes compare as numbers
RECORD = np.dtype(
    [
        ("file", "<u8", 2),  # 128 bits of BLAKE2 of the file
        ("pixels", "<u8", 2),  # and of its shape and pixels
        ("width", "<i4"),
        ("height", "<i4"),
        ("format", "u1"),  # index into `FORMATS`
        ("misnamed", "?"),  # whether its name tells another one
    ]
)
FORMATS = ("broken", "JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "pixels")
_OF_ENDING = {".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF"}  # others are called as their format
# how files begin; a WEBP has its length between the two words
_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG", "PNG"),
    (b"RIFF", "WEBP"),
    (b"BM", "BMP"),
    (b"GIF8", "GIF"),
    (b"II", "TIFF"),
    (b"MM", "TIFF"),
)
_BATCH = 64  # images that a process reads for one answer


class Survey(NamedTuple):
    """Records of the images of all sources, one source after another, and the fault of each that cannot be read."""

    records: NDArray[Any]  # (N,) of `RECORD`; zeros where an image is broken
    broken: dict[int, str]  # reason by index into `records`

    @property
    def readable(self) -> NDArray[np.bool_]:
        """(N,) whether each could be decoded."""
        good: NDArray[np.bool_] = self.records["format"] != FORMATS.index("broken")
        return good


def survey(sources: Sequence[Source], workers: int, progress: Callable[[int, int], None] | None = None) -> Survey:
    """Read and decode every image of the sources once.

    Args:
        sources: of the images.
        workers: processes that read; 0 reads in this one. They are deaf to signals and end with this process.
        progress: is called with (images read, of them broken) now and then.

    Raises:
        UserError: a process died.
    """
    readings = _Readings(sources)
    found = Survey(np.zeros(readings.images, RECORD), {})
    reasons: dict[str, str] = {}  # each kept once, however many images have it
    done = 0
    for records, bad in _answers(readings, min(workers, len(readings))):
        found.records[done : done + len(records)] = records
        found.broken.update((i, reasons.setdefault(reason, reason)) for i, reason in bad)
        done += len(records)
        if progress is not None:
            progress(done, len(found.broken))
    return found


_Answer = tuple[NDArray[Any], list[tuple[int, str]]]


def _answers(readings: _Readings, workers: int) -> Iterator[_Answer]:
    if not workers:
        yield from (readings[b] for b in range(len(readings)))
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more processes than cores: as was asked for
        batches: Iterator[Any] = start_loader(DataLoader(readings, batch_size=None, **worker_options(Loading(workers))))
    try:
        yield from batches
    except LoaderStalled as e:
        raise UserError(str(e).replace("--data.workers", "--workers")) from e


class _Readings(Dataset[_Answer]):
    """Item b: the records of the b-th `_BATCH` images of all sources, and (index, reason) of those that are broken."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self.starts = np.cumsum([0, *map(len, self.sources)])
        self.images = int(self.starts[-1])

    def __len__(self) -> int:
        return math.ceil(self.images / _BATCH)

    def __getitem__(self, b: int) -> _Answer:
        indices = range(b * _BATCH, min((b + 1) * _BATCH, self.images))
        records, bad = np.zeros(len(indices), RECORD), []
        for slot, index in enumerate(indices):
            half = int(np.searchsorted(self.starts, index, "right")) - 1
            try:
                records[slot] = _record(self.sources[half], index - int(self.starts[half]))
            except BadImage as e:
                bad.append((index, str(e)))
        return records, bad


def _record(source: Source, index: int) -> tuple[Any, ...]:
    content = source.content(index)
    pixels = decode(content) if isinstance(content, bytes) else content
    height, width = pixels.shape[:2]
    of_pixels = _hash(f"{width}x{height}:".encode(), np.ascontiguousarray(pixels).data)
    if not isinstance(content, bytes):
        return of_pixels, of_pixels, width, height, FORMATS.index("pixels"), False
    name, told = file_format(content), format_of(source.name(index))
    return _hash(content), of_pixels, width, height, FORMATS.index(name), told not in (name, None)


def _hash(*parts: bytes | memoryview) -> NDArray[np.uint64]:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return np.frombuffer(digest.digest(), "<u8")


def file_format(content: bytes) -> str:
    """The format of a file that could be decoded, by how it begins."""
    return next(name for begin, name in _MAGIC if content.startswith(begin))


def format_of(name: str) -> str | None:
    """The format that a file's name tells, or None where it tells none."""
    ending = os.path.splitext(name)[1].lower()
    return _OF_ENDING.get(ending, ending[1:].upper()) if ending in EXTENSIONS else None

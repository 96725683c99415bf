"""What a source of images is, and what is said about one."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from normfree.config import UserError
from normfree.data.decode import decode


class Source(Protocol):
    """Images by index, with what is known about each. The order of the indices is the order of what is stored."""

    classes: tuple[str, ...]
    labels: NDArray[Any]
    """(N,) int64, indices into `classes`; (N, classes) bool where an image may have several labels or none."""
    held_out: bool
    """Whether these are images that `split` held out of a set without validation images of its own."""

    @property
    def place(self) -> str:
        """Where the images are, for people: "4 tar shards in DIR"."""

    @property
    def ignored(self) -> list[str]:
        """Names of what lies there and is not used."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """A name for reports: the path, relative to the root."""

    def content(self, index: int) -> bytes | NDArray[np.uint8]:
        """The encoded file, or its pixels (H, W, 3) where they are known. Raises BadImage with the reason."""

    def read(self, index: int) -> NDArray[np.uint8]:
        """The pixels, (H, W, 3). Raises BadImage with the reason."""

    def subset(self, indices: NDArray[np.int64]) -> Source:
        """The same source with these samples only, in this order."""


class Readable:
    """What sources of files and of pixels share: the pixels, from whatever `content` gives."""

    def content(self, index: int) -> bytes | NDArray[np.uint8]:
        raise NotImplementedError

    def read(self, index: int) -> NDArray[np.uint8]:
        content = self.content(index)
        return decode(content) if isinstance(content, bytes) else content


S = TypeVar("S", bound=Source)


def describe(source: Source) -> str:
    """One line: how many images of how many classes, and where; and how many files are left out."""
    counts = f"{_count(len(source), 'image')} in {_count(len(source.classes), 'class', 'classes')}"
    kind = " (several labels each)" if several_labels(source) else ""
    ignored = f"; {_count(len(source.ignored), 'file')} left out" if source.ignored else ""
    return f"{counts}{kind}: {source.place}{ignored}"


def _count(n: int, one: str, many: str = "") -> str:
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def several_labels(source: Source) -> bool:
    """Whether an image may have several labels."""
    return source.labels.ndim == 2


def with_classes(source: S, classes: tuple[str, ...]) -> S:
    """The source with labels that index the given classes.

    Raises:
        UserError: the source has other classes; near ones are suggested.
    """
    place = {name: i for i, name in enumerate(classes)}
    unknown = [c for c in source.classes if c not in place]
    if unknown:
        near = difflib.get_close_matches(unknown[0], classes, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(classes[:12])}"
        hint += " .." if len(classes) > 12 and not near else ""
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        where = getattr(source, "root", source.place)
        raise UserError(f"{where}: class {unknown[0]!r}{more} is not one that was trained; {hint}")
    index = np.array([place[c] for c in source.classes], np.int64)
    if several_labels(source):
        labels = np.zeros((len(source), len(classes)), bool)
        labels[:, index] = source.labels
    else:
        labels = index[source.labels]
    return dataclasses.replace(source, labels=labels, classes=classes)  # type: ignore[type-var]  # all are dataclasses

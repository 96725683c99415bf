"""What is wrong with a set of images: broken files, the same image twice, on both sides or under two labels, and names.

What counts as a problem: a set that cannot be opened for training, images that cannot be read, the same image for
training and for validation (a leak), the same image with different labels (a conflict), and classes that validation
has and training has not. The rest is said, and is no problem.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normfree.config import UserError
from normfree.data.near_names import near_names
from normfree.data.sources import halves_of, open_data, open_part
from normfree.data.sources.protocol import Source, several_labels, with_classes
from normfree.data.survey import FORMATS, Survey, survey

SPLITS = ("train", "validation")
FEW = 10  # training images of a class, under which it is said to have few; or under a tenth of the median


@dataclass(frozen=True)
class Split:
    """One side of a set."""

    images: int
    broken: int
    classes: int  # that have images here
    place: str
    held_out: bool  # from training images, since there are none for validation


@dataclass(frozen=True)
class Image:
    """Where an image is: its path below the root, and what it is labelled as."""

    path: str
    split: str
    classes: list[str]


@dataclass(frozen=True)
class Broken(Image):
    """An image that cannot be read."""

    reason: str


@dataclass(frozen=True)
class WrongName(Image):
    """An image that is read, and whose name tells another format."""

    format: str


@dataclass(frozen=True)
class Copies:
    """Images that are the same."""

    same: str  # "file", or "pixels" where the files differ
    leak: bool  # on both sides
    conflict: bool  # with different labels
    images: list[Image]


@dataclass(frozen=True)
class Spread:
    """The least, the median and the most of some numbers."""

    min: float
    median: float
    max: float


@dataclass(frozen=True)
class Balance:
    """Training images by class."""

    smallest: str
    largest: str
    images: Spread
    few: list[str]  # classes with few, the fewest first


@dataclass(frozen=True)
class Sizes:
    """Of the images that can be read, in pixels, as displayed."""

    width: Spread
    height: Spread
    aspect: Spread  # width / height
    short_side: dict[str, int]  # images whose shorter side is from .. to, "128-255"


@dataclass(frozen=True)
class Report:
    """What `check` found; `as_dict` is what the command prints as JSON."""

    root: str
    errors: list[str]  # why it cannot be trained on as it is
    splits: dict[str, Split]
    classes: dict[str, dict[str, int]]  # images by class and split
    balance: Balance | None
    sizes: Sizes | None
    formats: dict[str, int]
    broken: list[Broken]
    copies: list[Copies]
    only_in_train: list[str]  # classes without images for validation, where there are others
    only_in_validation: list[str]
    without_images: list[str]
    near_names: list[tuple[str, str]]  # classes that differ by case, spaces or a plural
    wrong_names: list[WrongName]
    ignored: list[str]

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        bad_copies = any(c.leak or c.conflict for c in self.copies)
        return not (self.errors or self.broken or bad_copies or self.only_in_validation)

    def as_dict(self) -> dict[str, Any]:
        """Plain containers."""
        return {"ok": self.ok, **dataclasses.asdict(self)}


def check(
    root: str, validation: float = 0.2, workers: int = 0, progress: Callable[[int, int, int], None] | None = None
) -> Report:
    """Read every image of a set once, and say what it is like and what is wrong with it.

    Args:
        root: whatever `open_data` takes.
        validation: share that is held out where there are no images for validation.
        workers: processes that read; 0 reads in this one.
        progress: is called with (images read, of them broken, images in all) now and then.

    Raises:
        UserError: a process that reads died. What is wrong with the set is in the report.
    """
    sides, errors = _open(root, validation)
    total = sum(map(len, sides.values()))
    tell = None if progress is None else lambda done, broken: progress(done, broken, total)
    found = survey(list(sides.values()), workers, tell)
    return _Finder(sides, found).report(root, errors)


def _open(root: str, validation: float) -> tuple[dict[str, Source], list[str]]:
    """The sides that are there, with the same classes, and what speaks against training on them."""
    try:
        return dict(zip(SPLITS, open_data(root, validation), strict=True)), []
    except (UserError, OSError) as e:
        errors = [_line(e)]
    try:  # each side by itself, since one may have classes that the other has not, or too few
        sides = {
            split: open_part(part, single_class=True)
            for split, part in zip(SPLITS, halves_of(root), strict=True)
            if part is not None
        }
    except (UserError, OSError) as e:
        return {}, list(dict.fromkeys([*errors, _line(e)]))
    classes = tuple(dict.fromkeys(name for source in sides.values() for name in source.classes))
    return {split: with_classes(source, classes) for split, source in sides.items()}, errors


def _line(error: UserError | OSError) -> str:
    if isinstance(error, UserError):
        return str(error)
    where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
    return str(UserError(f"{where}{error.strerror or error}"))


class _Finder:
    """Makes a report of what was read. Images are numbered through all sides, as in the survey."""

    def __init__(self, sides: dict[str, Source], found: Survey) -> None:
        self.sides, self.sources, self.found = sides, list(sides.values()), found
        self.starts = np.cumsum([0, *map(len, self.sources)])
        self.classes = self.sources[0].classes if self.sources else ()
        self.counts = {split: _by_class(source) for split, source in sides.items()}

    def report(self, root: str, errors: list[str]) -> Report:
        """Everything."""
        none = np.zeros(len(self.classes), np.int64)
        train, val = (self.counts.get(split, none) for split in SPLITS)
        every = self.found.records
        records = every[self.found.readable]
        formats = np.bincount(records["format"], minlength=len(FORMATS)).tolist()
        both = all(split in self.sides for split in SPLITS)
        return Report(
            root=root,
            errors=errors,
            splits={split: self._split(split) for split in self.sides},
            classes={
                name: {split: int(counts[i]) for split, counts in self.counts.items()}
                for i, name in enumerate(self.classes)
            },
            balance=_balance(self.classes, self.counts["train"]) if "train" in self.counts else None,
            sizes=_sizes(records) if len(records) else None,
            formats={name: n for name, n in zip(FORMATS, formats, strict=True) if n},
            broken=[Broken(*self._where(i), reason) for i, reason in sorted(self.found.broken.items())],
            copies=[self._copies(group) for group in _equal(self.found)],
            only_in_train=self._named((train > 0) & (val == 0)) if both else [],
            only_in_validation=self._named((train == 0) & (val > 0)) if both else [],
            without_images=self._named((train == 0) & (val == 0)),
            near_names=near_names(self.classes),
            wrong_names=[
                WrongName(*self._where(i), FORMATS[every["format"][i]])
                for i in np.flatnonzero(every["misnamed"]).tolist()
            ],
            ignored=list(dict.fromkeys(name for source in self.sources for name in source.ignored)),
        )

    def _split(self, split: str) -> Split:
        source, place = self.sides[split], list(self.sides).index(split)
        begin, end = self.starts[place : place + 2].tolist()
        broken = int(np.count_nonzero(~self.found.readable[begin:end]))
        classes = int(np.count_nonzero(self.counts[split]))
        return Split(len(source), broken, classes, source.place, source.held_out)

    def _named(self, chosen: NDArray[np.bool_]) -> list[str]:
        return [self.classes[i] for i in np.flatnonzero(chosen)]

    def _place(self, index: int) -> tuple[int, int]:
        """(number of the side, index in it)."""
        side = int(np.searchsorted(self.starts, index, "right")) - 1
        return side, index - int(self.starts[side])

    def _where(self, index: int) -> tuple[str, str, list[str]]:
        """What an `Image` is made of."""
        side, i = self._place(index)
        source = self.sources[side]
        label = source.labels[i]
        numbers = np.flatnonzero(label).tolist() if several_labels(source) else [int(label)]
        return source.name(i), list(self.sides)[side], [self.classes[n] for n in numbers]

    def _copies(self, group: NDArray[np.int64]) -> Copies:
        images = [Image(*self._where(i)) for i in group.tolist()]
        files = self.found.records["file"][group]
        return Copies(
            same="file" if (files == files[0]).all() else "pixels",
            leak=len({image.split for image in images}) > 1,
            conflict=any(image.classes != images[0].classes for image in images),
            images=images,
        )


def _by_class(source: Source) -> NDArray[np.int64]:
    if several_labels(source):
        counts: NDArray[np.int64] = source.labels.sum(0, dtype=np.int64)
        return counts
    return np.bincount(source.labels, minlength=len(source.classes))


def _spread(numbers: NDArray[Any]) -> Spread:
    return Spread(float(numbers.min()), float(np.median(numbers)), float(numbers.max()))


def _balance(classes: Sequence[str], counts: NDArray[np.int64]) -> Balance:
    images = _spread(counts)
    order = np.argsort(counts, kind="stable")
    few = [classes[i] for i in order if counts[i] < max(FEW, images.median / 10)]
    return Balance(classes[order[0]], classes[int(np.argmax(counts))], images, few)


def _sizes(records: NDArray[Any]) -> Sizes:
    width, height = records["width"], records["height"]
    powers = np.bincount(np.frexp(np.minimum(width, height))[1] - 1)  # exact: the exponent of 2
    bins = {f"{2**p}-{2 ** (p + 1) - 1}": n for p, n in enumerate(powers.tolist()) if n}
    return Sizes(_spread(width), _spread(height), _spread(width / height), bins)


def _equal(found: Survey) -> Iterator[NDArray[np.int64]]:
    """Indices of the readable images whose pixels are the same, two or more at a time, by their first."""
    readable = np.flatnonzero(found.readable)
    pixels = found.records["pixels"][readable]
    order = np.lexsort((readable, pixels[:, 1], pixels[:, 0]))
    new = np.ones(len(order), bool)
    new[1:] = (pixels[order[1:]] != pixels[order[:-1]]).any(1)
    begins = np.flatnonzero(new)
    ends = np.append(begins[1:], len(order))
    several = ends - begins > 1
    groups = [readable[order[b:e]] for b, e in zip(begins[several], ends[several], strict=True)]
    return iter(sorted(groups, key=lambda group: int(group[0])))

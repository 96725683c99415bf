"""Where images come from: what is at a path becomes a source of training images and one of validation images.

A path may be: an image folder, one folder a class; image files with a table of labels (CSV, TSV, JSONL); ImageNet's
validation files as published; tar shards in the WebDataset layout; parquet files, or a data set saved by the package
`datasets`; "hf:NAME", one from the Hugging Face Hub; "digits", the bundled ones. The same images in the same order
are the same training data in each of these forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from normfree.config import UserError
from normfree.data.sources.arrays import ArraySource, SyntheticSource, digits
from normfree.data.sources.folder import LAYOUT, FolderSource, open_folder, read_file
from normfree.data.sources.holdout import fingerprint, split
from normfree.data.sources.imagenet import open_validation_folder
from normfree.data.sources.labels import open_labelled
from normfree.data.sources.layout import (
    TRAIN_NAMES,
    VALIDATION_NAMES,
    Halves,
    Part,
    find_halves,
    hub_halves,
    training_folder,
    without_training,
)
from normfree.data.sources.listing import files_below, is_image_name
from normfree.data.sources.names import Names
from normfree.data.sources.protocol import Source, describe, several_labels, with_classes
from normfree.data.sources.shards import ShardSource, open_shards
from normfree.data.sources.tables import TableSource, open_tables
from normfree.data.sources.write_shards import write_shards

__all__ = [
    "TRAIN_NAMES",
    "VALIDATION_NAMES",
    "ArraySource",
    "FolderSource",
    "Names",
    "ShardSource",
    "Source",
    "SyntheticSource",
    "TableSource",
    "describe",
    "digits",
    "files_below",
    "fingerprint",
    "is_image_name",
    "open_data",
    "open_folder",
    "open_held_out",
    "open_validation",
    "read_file",
    "several_labels",
    "split",
    "training_folder",
    "with_classes",
    "write_shards",
]


def open_data(root: str, validation: float) -> tuple[Source, Source]:
    """(train, validation) of what is at a path; a set without validation images is split. `describe` says what it is.

    Raises:
        UserError: says what is wrong with it and what is expected.
    """
    if root == "digits":
        return split(digits(), validation)
    train_part, val_part = halves_of(root)
    if train_part is None:
        raise without_training(Path(root).expanduser())
    train = _open(train_part)
    if val_part is None:
        return split(train, validation)
    return train, with_classes(_open(val_part, single_class=True), train.classes)


def open_validation(root: str, classes: tuple[str, ...]) -> Source:
    """What to evaluate on, at a path: its validation images if it has any, else all of it.

    Labels index the given classes or, where no names are given, the source's own.
    """
    train_part, val_part = halves_of(root)
    part = val_part or train_part
    if part is None:
        raise UserError(f"{root} has no images; {LAYOUT}")
    found = _open(part, single_class=True)
    return with_classes(found, classes) if classes else found


def open_held_out(root: str, names: Sequence[str], classes: tuple[str, ...]) -> Source:
    """The samples of these names (`source.names`) among the training images at a path.

    Raises:
        UserError: one is not there any more, or leads elsewhere.
    """
    part = halves_of(root)[0]
    if part is None:
        raise UserError(f"{root} has no training images any more, of which some were held out for validation")
    names = [name.removeprefix(part.prefix) for name in names]
    if part.kind == "folder":  # as many files as there are names need not be listed
        labels = np.array([_class_of(name, classes) for name in names], np.int64)
        return FolderSource(part.path, Names(names), labels, classes, prefix=part.prefix, held_out=True)
    source = with_classes(_open(part), classes)
    place = {name: i for i, name in enumerate(getattr(source, "names", ()))}
    missing = next((name for name in names if name not in place), None)
    if missing is not None:
        raise UserError(f"{root} has no {missing!r}, which was held out for validation")
    found = source.subset(np.array([place[name] for name in names], np.int64))
    found.held_out = True
    return found


def _class_of(name: str, classes: tuple[str, ...]) -> int:
    """The class of CLASS/IMAGE. The name is from a file, and must not lead out of its class."""
    top, *rest = Path(name).parts or ("",)
    if top not in classes or not rest or ".." in rest:
        raise UserError(f"{name[:200]!r} was held out for validation and is none of the images of the classes trained")
    return classes.index(top)


def halves_of(root: str) -> Halves:
    """Where the training and the validation images at a path are, and of which kind; None for one that is not there."""
    return hub_halves(root.removeprefix("hf:")) if root.startswith("hf:") else find_halves(Path(root).expanduser())


def _open(part: Part, single_class: bool = False) -> Source:
    source = open_part(part, single_class)
    if len(source.classes) == 1 and not single_class and not several_labels(source):
        raise UserError(f"{part.path} has one class only, {source.classes[0]!r}; training needs at least two")
    return source


def open_part(part: Part, single_class: bool) -> Source:
    if part.kind == "shards":
        return open_shards(part.path, part.files)
    if part.kind == "tables":
        return open_tables(part.path, part.files)
    if part.kind == "labels":
        return open_labelled(part.files[0], part.prefix)
    if part.kind == "imagenet":
        return open_validation_folder(part.path, part.prefix)
    return open_folder(part.path, single_class, part.prefix)

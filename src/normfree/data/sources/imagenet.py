"""ImageNet's validation images as they are published: 50,000 files without class folders, and their labels apart."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np

from normfree.config import UserError
from normfree.data.sources.folder import FolderSource
from normfree.data.sources.listing import files_in
from normfree.data.sources.names import Names

_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.jpe?g", re.IGNORECASE)
_SYNSET = re.compile(r"n\d{8}")
_IMAGES = 50_000

SOLUTION = "LOC_val_solution.csv"  # ImageId,PredictionString: name of an image, and its synset before its boxes
SYNSETS = ("imagenet_2012_validation_synset_labels.txt", "validation_synset_labels.txt")  # a synset a line, in order
# an id a line
GROUND_TRUTH = ("ILSVRC2012_validation_ground_truth.txt", "ILSVRC2015_clsloc_validation_ground_truth.txt")
IDS = ("map_clsloc.txt", "ILSVRC2012_synset_ids.txt")  # lines with a synset and its id, as "n02119789 1 kit_fox"


def is_validation_folder(root: Path) -> bool:
    """Whether a folder has ImageNet's validation images without class folders."""
    return any(_IMAGE.fullmatch(name) for name in files_in(root))


def open_validation_folder(root: Path, prefix: str = "") -> FolderSource:
    """ILSVRC2012_val_00000001.JPEG and so on; classes are the synsets ("n01440764"), sorted.

    The labels are from the first of `SOLUTION`, `SYNSETS`, and `GROUND_TRUTH` with `IDS` that lies in the folder,
    beside it, or in a folder data/ there. The ground truth's ids are numbers of their own: they follow no order of the
    synsets, so that without a table of ids they cannot be used.

    Raises:
        UserError: no such file, or it does not have the image's label; says which file to put where.
    """
    files = files_in(root)
    images = [name for name in files if _IMAGE.fullmatch(name)]
    numbers = [int(match[1]) for name in images if (match := _IMAGE.fullmatch(name))]
    path, synsets = _synsets(root)
    unknown = [name for name, number in zip(images, numbers, strict=True) if number not in synsets]
    if unknown:
        raise UserError(f"{path} has no label of {unknown[0]}{_more(unknown)}; copy it again")
    of_images = [synsets[number] for number in numbers]
    classes = sorted(set(of_images))
    place = {synset: i for i, synset in enumerate(classes)}
    labels = np.array([place[s] for s in of_images], np.int64)
    ignored = [prefix + name for name in files if not _IMAGE.fullmatch(name) and name != path.name]
    return FolderSource(root, Names(images), labels, tuple(classes), ignored, prefix, f"labels of {path.name}, images")


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _synsets(root: Path) -> tuple[Path, dict[int, str]]:
    """(file, synset by number of the image)."""
    if path := _find(root, (SOLUTION,)):
        return path, _solution(path)
    if path := _find(root, SYNSETS):
        return path, dict(enumerate(_column(path, _SYNSET), 1))
    truth, ids = _find(root, GROUND_TRUTH), _find(root, IDS)
    if truth and ids:
        synset_of = _ids(ids)
        numbers = [int(line) for line in _column(truth, re.compile(r"\d{1,4}"))]
        missing = [n for n in numbers if n not in synset_of]
        if missing:
            raise UserError(f"{ids} has no synset of id {missing[0]}, which {truth.name} has")
        return truth, {i: synset_of[n] for i, n in enumerate(numbers, 1)}
    if truth:
        why, wanted = f"{truth.name} has ids, which say nothing without a table", f"{IDS[0]} of the development kit"
    else:
        why, wanted = "ImageNet's validation images lie without class folders or labels", f"{SOLUTION} or {SYNSETS[0]}"
    raise UserError(f"{root}: {why}; put {wanted} into {(truth or root).parent}, or move the images to ROOT/CLASS/")


def _find(root: Path, names: tuple[str, ...]) -> Path | None:
    folders = (root, root.parent, root / "data", root.parent / "data")
    return next((folder / name for folder in folders for name in names if (folder / name).is_file()), None)


def _lines(path: Path) -> list[str]:
    try:
        content = path.read_bytes()[: 64 << 20]
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}") from e
    return content.decode(errors="replace").splitlines()


def _column(path: Path, pattern: re.Pattern[str]) -> list[str]:
    """The lines, each of which must be as the pattern says; one for each of the 50,000 images."""
    lines = [line.strip() for line in _lines(path)]
    wrong = next((i for i, line in enumerate(lines) if not pattern.fullmatch(line)), None)
    if wrong is not None:
        raise UserError(f"{path}, line {wrong + 1}: {lines[wrong][:40]!r} is no label")
    if len(lines) != _IMAGES:
        raise UserError(f"{path} has {len(lines):,} lines where {_IMAGES:,} belong; copy it again")
    return lines


def _solution(path: Path) -> dict[int, str]:
    found = {}
    for row in csv.reader(_lines(path)):
        image = _IMAGE.fullmatch(f"{row[0]}.JPEG") if len(row) > 1 else None
        synset = _SYNSET.match(row[1]) if image else None
        if image and synset:
            found[int(image[1])] = synset[0]
    return found


def _ids(path: Path) -> dict[int, str]:
    found = {}
    for line in _lines(path):
        words = line.split()[:2]
        synset = next((w for w in words if _SYNSET.fullmatch(w)), None)
        number = next((w for w in words if re.fullmatch(r"\d{1,4}", w)), None)
        if synset and number:
            found[int(number)] = synset
    return found

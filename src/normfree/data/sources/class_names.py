"""Names of classes in a file beside the images: classes.txt, one a line, or classes.json."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from normfree.config import UserError

_MOST_NUMBERED = 100_000  # classes, where only numbers are known: a stray label must not make millions
_LIMIT = 64 << 20  # bytes of a file


class Classes(NamedTuple):
    """The classes, the place of each label as it is written, and the first number that is none."""

    classes: tuple[str, ...]
    place: Mapping[str, int]
    limit: int


def sorted_classes(labels: Iterable[str], known: tuple[str, ...], numbered: bool) -> Classes:
    """Classes of a set whose labels are written so; a label without a place is none of them.

    Numbers index the known names, or where there are none are names themselves, from 0 to the largest. Names are one of
    the known ones, or where there are none all that occur, sorted.
    """
    labels = list(labels)
    if not numbered:
        classes = known or tuple(sorted(labels))
        return Classes(classes, {name: i for i, name in enumerate(classes)}, len(classes))
    limit = len(known) or _MOST_NUMBERED
    place = {text: int(text) for text in labels if len(text) < 12 and 0 <= int(text) < limit}
    return Classes(known or tuple(map(str, range(max(place.values(), default=-1) + 1))), place, limit)


def read_classes(folders: Sequence[Path]) -> tuple[Path | None, tuple[str, ...]]:
    """(file, names) of the first classes.txt or classes.json in the folders; (None, ()) without one.

    Raises:
        UserError: the file cannot be read, or names a class twice.
    """
    paths = [folder / name for folder in folders for name in ("classes.txt", "classes.json")]
    path = next((p for p in paths if p.is_file()), None)
    if path is None:
        return None, ()
    try:
        content = path.read_bytes()[:_LIMIT].decode("utf-8-sig")
        names = _from_json(json.loads(content)) if path.suffix == ".json" else content.strip().split("\n")
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} cannot be read: {e}") from e
    names = [name.strip() for name in names]
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None or not all(names):
        raise UserError(f"{path}: class {twice!r} comes twice" if twice else f"{path} has a class without a name")
    return path, tuple(names)


def _from_json(value: Any) -> list[str]:
    """Names of a list, or of an object whose keys are 0, 1, 2, .."""
    if isinstance(value, dict):
        if sorted(value) != sorted(map(str, range(len(value)))):
            raise ValueError("the keys are not the numbers from 0 on")
        value = [value[str(i)] for i in range(len(value))]
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError("not a list of names")
    return value

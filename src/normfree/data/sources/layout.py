"""What lies at a path: which kind of images, and which of them are for training and for validation."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from normfree.config import UserError
from normfree.data.sources import hub
from normfree.data.sources.folder import LAYOUT, check_folder
from normfree.data.sources.imagenet import is_validation_folder
from normfree.data.sources.labels import find_table, is_label_table
from normfree.data.sources.listing import files_in, folders_in, is_image_name
from normfree.data.sources.tables import PARQUET

TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("val", "valid", "validation")

_HALF = re.compile(r"(?:^|[-_.])(train|training|val|valid|validation|test)(?=[-_.\d])", re.IGNORECASE)
_PACKED = {".tar": "shards", PARQUET: "tables"}
_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz", ".zip")


@dataclass(frozen=True)
class Part:
    """Where the images of one half are."""

    kind: str  # "folder", "labels", "imagenet", "shards", "tables"
    path: Path  # their folder
    files: tuple[Path, ...] = ()  # shards, tables, or the table of labels
    prefix: str = ""  # of names in reports


Halves = tuple[Part | None, Part | None]  # (training, validation)


def find_halves(root: Path) -> Halves:
    """What to train on and what to validate on, at a path; None where it has no such half.

    Raises:
        UserError: there is nothing, or a folder's name is nearly that of a half: taken for a class, it would be learnt.
    """
    if root.is_file() and root.suffix in _PACKED:
        return Part(_PACKED[root.suffix], root.parent, (root,)), None
    check_folder(root)
    if hub.is_saved(root):
        return _saved(root)
    if packed := _packed(root) or (_packed(root / "data") if (root / "data").is_dir() else []):
        return _packed_halves(packed)
    if halves := _labelled_halves(root):
        return halves
    train, val = folder_halves(root)
    if train is None and val is None:
        return _part(root), None
    return tuple(_part(root / n, f"{n}/") if n else None for n in (train, val))  # type: ignore[return-value]  # two


def hub_halves(name: str) -> Halves:
    """What the data set NAME of the Hugging Face Hub has for training and for validation."""
    files = hub.fetch(name)
    train, val = (next((s for s in files if s.lower() in names), None) for names in (TRAIN_NAMES, VALIDATION_NAMES))
    if train is None:
        raise UserError(f"hf:{name} has no split 'train'; it has {', '.join(files)}")
    root = Path(f"hf:{name}")
    return Part("tables", root, files[train]), Part("tables", root, files[val]) if val else None


def training_folder(root: Path) -> Path:
    """Where the class folders of the training images are: ROOT/train, or ROOT itself."""
    check_folder(root)
    return root / (folder_halves(root)[0] or "")


def without_training(root: Path) -> UserError:
    """What is wrong with a path that has validation images and no training images."""
    inside = folders_in(root) if root.is_dir() else []
    val = next((n for n in inside if n.lower() in VALIDATION_NAMES), None)
    near = _nearest(TRAIN_NAMES, [n for n in inside if n != val])
    hint = f"rename {near!r} to 'train'?" if near else LAYOUT
    return UserError(f"{root} has {f'a folder {val!r}' if val else 'validation images'} and no 'train'; {hint}")


def _part(path: Path, prefix: str = "") -> Part:
    """A folder that is one half, or has no halves."""
    if hub.is_saved(path):
        return _saved_part(path)
    if packed := _packed(path):
        return Part(_PACKED[packed[0].suffix], path, tuple(packed))
    tables = [find_table(path, stem) for stem in ("labels", "metadata")] + [find_table(path.parent, path.name)]
    flat = not folders_in(path)  # then a table that is none of labels is opened, to say what is wrong with it
    if table := next((t for t in tables if t and (flat or is_label_table(t))), None):
        return Part("labels", path, (table,), prefix)
    if flat and is_validation_folder(path):
        return Part("imagenet", path, prefix=prefix)
    return Part("folder", path, prefix=prefix)


def _packed(folder: Path) -> list[Path]:
    """The tar shards in a folder, or else its parquet files, sorted."""
    files = files_in(folder)
    for ending in _PACKED:
        found = [folder / name for name in files if name.endswith(ending)]
        beside = [n for n in folders_in(folder) if any(map(is_image_name, files_in(folder / n)))] if found else []
        if beside:
            raise UserError(
                f"{folder} has both {found[0].name} and folders of images, such as {beside[0]!r}; name the one that is "
                "meant, or move the other"
            )
        if found:
            return found
    compressed = next((name for name in files if name.lower().endswith(_COMPRESSED)), None)
    if compressed and not folders_in(folder):
        raise UserError(f"{folder / compressed} is compressed, so it cannot be read at random; make it a plain .tar")
    return []


def _packed_halves(files: list[Path]) -> Halves:
    """Files by the half that their names tell; where none tells, all are for training."""
    kind, folder = _PACKED[files[0].suffix], files[0].parent
    names = [next((m[1].lower() for m in [_HALF.search(f.name)] if m), "") for f in files]
    train = tuple(f for f, n in zip(files, names, strict=True) if n in TRAIN_NAMES)
    val = tuple(f for f, n in zip(files, names, strict=True) if n in VALIDATION_NAMES)
    if not train and not val:
        train = tuple(f for f, n in zip(files, names, strict=True) if n != "test") or tuple(files)
    return Part(kind, folder, train) if train else None, Part(kind, folder, val) if val else None


def _saved(root: Path) -> Halves:
    if (root / hub.STATE).is_file():
        return _saved_part(root), None
    splits = hub.saved_splits(root)
    train, val = (next((s for s in splits if s.lower() in names), None) for names in (TRAIN_NAMES, VALIDATION_NAMES))
    if train is None:
        raise UserError(f"{root} has no split 'train'; it has {', '.join(splits)}")
    return _saved_part(root / train), _saved_part(root / val) if val else None


def _saved_part(path: Path) -> Part:
    return Part("tables", path, hub.saved_files(path))


def _labelled_halves(root: Path) -> Halves | None:
    """Halves that tables of labels in the root tell: train.csv and val.csv, or labels.csv for all."""
    stems = (TRAIN_NAMES, VALIDATION_NAMES)
    train, val = (next((t for n in names if (t := find_table(root, n)) and is_label_table(t)), None) for names in stems)
    if train is None:
        return None
    part = Part("labels", root, (train,))
    if val is not None:
        return part, replace(part, files=(val,))
    folder = folder_halves(root)[1]
    return part, _part(root / folder, f"{folder}/") if folder else None


def folder_halves(root: Path) -> tuple[str | None, str | None]:
    """Names of the folders of training and validation images; (None, None) where the root has the classes itself.

    Raises:
        UserError: a name is nearly one of those: taken for a class, it would be learnt.
    """
    inside = folders_in(root)
    train = next((n for n in inside if n.lower() in TRAIN_NAMES), None)
    val = next((n for n in inside if n.lower() in VALIDATION_NAMES), None)
    if train and val:
        return train, val
    filled = [n for n in inside if _is_half(root / n)]  # a class may be called "train": it has no folders in it
    train, val = (n if n in filled else None for n in (train, val))
    others = [n for n in filled if n not in (train, val)]
    like_train, like_val = (_nearest(names, others) for names in (TRAIN_NAMES, VALIDATION_NAMES))
    if like_val and (train or like_train):
        raise UserError(f"{root} has a folder {train or like_train!r} and no 'val'; rename {like_val!r} to 'val'?")
    return train, val


def _is_half(folder: Path) -> bool:
    """Whether a folder can be one half: a class has images, and nothing else."""
    return bool(folders_in(folder)) or _part(folder).kind != "folder"


def _nearest(names: Sequence[str], among: Sequence[str]) -> str | None:
    """The first of `among` that is nearly one of the names."""
    return next((n for n in among if difflib.get_close_matches(n.lower(), names, cutoff=0.6)), None)

"""Data sets of the package `datasets`: folders that it saved, and names on the Hugging Face Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from normfree.config import UserError
from normfree.data.sources.tables import library

STATE, SPLITS = "state.json", "dataset_dict.json"  # of a data set that was saved, and of several


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by save_to_disk."""
    return (folder / STATE).is_file() or (folder / SPLITS).is_file()


def saved_splits(folder: Path) -> list[str]:
    """Names of the splits of a saved folder: folders in it."""
    names = _json(folder / SPLITS).get("splits")
    if not isinstance(names, list) or not all(isinstance(n, str) and Path(n).name == n for n in names):
        raise UserError(f"{folder / SPLITS} names no splits")
    return names


def saved_files(folder: Path) -> tuple[Path, ...]:
    """The Arrow files of one saved data set, in order."""
    files = _json(folder / STATE).get("_data_files")
    names = [f.get("filename") for f in files if isinstance(f, dict)] if isinstance(files, list) else []
    if not names or not all(isinstance(n, str) and Path(n).name == n for n in names):
        raise UserError(f"{folder / STATE} names no files")
    return tuple(folder / str(n) for n in names)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} cannot be read: {e}") from e
    if not isinstance(value, dict):
        raise UserError(f"{path} is no object")
    return value


def fetch(name: str) -> dict[str, tuple[Path, ...]]:
    """The Arrow files of each split of NAME or NAME:CONFIG: downloaded once, by the package `datasets`, into its cache.

    Raises:
        UserError: the package is missing, or cannot get the data set; its reason is given.
    """
    datasets = library("datasets")
    name, _, config = name.partition(":")
    if not name:
        raise UserError("name a data set: --data.root hf:NAME")
    try:
        found = datasets.load_dataset(name, config or None)
    except Exception as e:  # of many kinds: of the network, of the hub, of the files
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise UserError(f"hf:{name} cannot be loaded: {reason}") from e
    files = {split: tuple(Path(f["filename"]) for f in part.cache_files) for split, part in found.items()}
    if not all(files.values()):
        raise UserError(f"hf:{name} has a split without files; save it with save_to_disk and name that folder")
    return files

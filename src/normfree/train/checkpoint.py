"""Checkpoints that are whole or not there, and are verified before they are used.

A checkpoint is a folder step-N of state.safetensors, state.json and manifest.json, which has the size and the sha256 of
the other two. It is written beside as .step-N.tmp, synced, renamed; then `latest` names it; then old ones are removed.
So a process that is killed at any instant leaves at least the checkpoint before.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from normfree.config import UserError
from normfree.distributed import Group
from normfree.files import read_json, sha256, sync_folder, write_atomic, write_json
from normfree.tensorfile import file_parts

_FILES = ("state.safetensors", "state.json")
_NAME = re.compile(r"step-\d{8}(-\d)?")


class Checkpoint(NamedTuple):
    """tensors by name; state, plain values; rejected, what was passed over and why, newest first."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]
    rejected: list[str]


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int = 2) -> Path:
    """Write a checkpoint, then remove all but the newest `keep`.

    Raises:
        OSError: it could not be written; those that were there before are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clear(folder)
    final, beside = _free_name(folder, step), folder / f".step-{step:08d}.tmp"
    try:
        beside.mkdir()
        write_atomic(beside / _FILES[0], *file_parts(tensors))
        write_json(beside / _FILES[1], state)
        manifest = {n: {"size": (beside / n).stat().st_size, "sha256": sha256(beside / n)} for n in _FILES}
        write_json(beside / "manifest.json", manifest)
        beside.rename(final)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    write_atomic(folder / "latest", final.name.encode())
    _prune(folder, final, keep)
    plain = folder / f"step-{step:08d}"
    if final != plain:
        final.rename(plain)
        write_atomic(folder / "latest", plain.name.encode())
    return plain


def _prune(folder: Path, newest: Path, keep: int) -> None:
    """Remove all but the newest and the `keep` - 1 whole ones before it.

    Those of its step or later are an earlier try at it, or were passed over as broken when the run was resumed.
    """
    kept = 1
    for old in _steps(folder):
        if old == newest:
            continue
        if kept < keep and old.name < newest.name[:13] and _problem(old) is None:
            kept += 1
        else:
            shutil.rmtree(old, ignore_errors=True)


def _free_name(folder: Path, step: int) -> Path:
    """step-N, or where it is taken step-N-2 and on, so that the first stays until the second is in place."""
    name = f"step-{step:08d}"
    tries = (folder / name, *(folder / f"{name}-{n}" for n in range(2, 10)))
    return next((p for p in tries if not p.exists()), tries[0])


def clear(folder: Path) -> None:
    """Remove what writers that were killed left in a folder."""
    for left in folder.glob(".*.tmp"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def load_checkpoint(folder: Path, group: Group | None = None) -> Checkpoint:
    """The newest whole checkpoint of a folder; with a group, the newest that all of its processes read alike.

    Raises:
        UserError: there is none; the message says what is wrong with each.
    """
    group = Group.alone() if group is None else group
    rejected: list[str] = []
    for name in group.broadcast([path.name for path in _steps(folder)]):
        path = folder / name
        found, problem = None, _problem(path)
        if problem is None:
            try:
                found = _read(path)
            except (OSError, ValueError, SafetensorError) as e:  # as it was written: its checksum is right
                problem = f"it cannot be read: {str(e)[:300]}"
        problem = _shared(problem, path, group)
        if problem is None and found is not None:
            return Checkpoint(*found, rejected)
        rejected.append(f"{path.name}: {problem}")
    why = f": {'; '.join(rejected)}" if rejected else ""
    raise UserError(f"{folder} has no whole checkpoint{why}")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, state = load_file(path / _FILES[0]), read_json(path / _FILES[1])
    if not isinstance(state, dict):
        raise ValueError(f"{_FILES[1]} is no object")
    return tensors, state


def _shared(problem: str | None, path: Path, group: Group) -> str | None:
    """What is wrong with a checkpoint for some process, given what is for this one; or None."""
    found = group.gather([problem, "" if problem else sha256(path / "manifest.json")])
    problems = [why if group.world == 1 else f"process {rank}: {why}" for rank, (why, _) in enumerate(found) if why]
    if not problems and any(checksum != found[0][1] for _, checksum in found):
        problems = ["it is not the same for all processes"]
    return problems[0] if problems else None


def has_checkpoint(folder: Path) -> bool:
    """Whether a folder has a checkpoint, whole or not."""
    return bool(_steps(folder))


def _steps(folder: Path) -> list[Path]:
    """Newest first; what else lies there is not ours."""
    return sorted((p for p in folder.glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir()), reverse=True)


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = read_json(path / "manifest.json")
        if set(manifest) != set(_FILES):
            return "the manifest is of other files"
        for name in _FILES:
            if (path / name).stat().st_size != manifest[name]["size"]:
                return f"{name} has {(path / name).stat().st_size} bytes, not {str(manifest[name]['size'])[:20]}"
            if sha256(path / name) != manifest[name]["sha256"]:
                return f"{name} does not have its checksum"
    except FileNotFoundError as e:
        return f"{Path(str(e.filename)).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as e:
        return f"the manifest cannot be read: {str(e)[:300]}"
    return None

"""Files that are whole or not there: written beside, synced, renamed; read strictly; checksums; where caches are."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, NoReturn


def cache_folder() -> Path:
    """For downloads and lists: $NORMFREE_CACHE, or normfree/ in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("NORMFREE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "normfree"


def write_atomic(path: Path, *parts: bytes | memoryview) -> None:
    """Replace a file in one step. After a crash it has either its old or its new content, never a part of it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as f:
            f.writelines(parts)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically. NaN is refused: it is not JSON."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def open_plain(path: Path) -> BinaryIO:
    """Open a file for reading. A pipe or a device may have no end, and is not waited for.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags)
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
            raise OSError(code, "Is a directory" if stat.S_ISDIR(mode) else "not a regular file", str(path))
        return open(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_json(path: Path) -> Any:
    """The value in a file of ours.

    Raises:
        OSError: it cannot be read. ValueError: it is not JSON, as `parse_json` takes it.
    """
    with open_plain(path) as f:
        return parse_json(f.read())


def parse_json(content: bytes | str) -> Any:
    """The value of a text, strictly: no name comes twice in an object, and every number is one.

    Raises:
        ValueError: says what is wrong.
    """
    try:
        return json.loads(content, object_pairs_hook=_object, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice[:100]!r} comes twice")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Checksum of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open_plain(path) as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

"""Checkpoints and run folders of which a part is missing, damaged, replaced or made up."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from hostile import Case
from normfree.config import UserError
from normfree.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from normfree.train.record import RunFolder

Change = Callable[[Path], object]
STATE, TENSORS, MANIFEST = "state.json", "state.safetensors", "manifest.json"


def read_newest(path: Path) -> Checkpoint:
    """The newer of two checkpoints.

    Raises:
        UserError: it was passed over for the older one, which came whole; the message is the reason that was given.
    """
    found = load_checkpoint(path)
    if found.rejected:
        assert (found.state, len(found.rejected)) == ({"step": 1}, 1), "the older one is another"
        raise UserError(found.rejected[0])
    return found


def cases() -> Iterator[Case]:
    for words, table in _BAD.items():
        for name, change in table.items():
            yield Case("checkpoint", name, _two(change), read_newest, UserError, words)
    for name, change in _WHOLE.items():
        yield Case("checkpoint", name, _two(change), read_newest, None, right=lambda found: found.state["step"] == 2)
    for name in (TENSORS, STATE, MANIFEST):
        for place in ("first", "middle", "last"):
            text = f"{name} with its {place} byte turned over"
            yield Case("checkpoint", text, _two(_flipped(name, place)), read_newest, UserError, damaged=True)
        for part in (0.0, 0.1, 0.5, 0.99):
            text = f"{name} cut after {part:.0%}"
            yield Case("checkpoint", text, _two(_cut(name, part)), read_newest, UserError, damaged=True)
    for name, change in _NONE.items():
        yield Case("checkpoint", name, _two(_all(change)), load_checkpoint, UserError, "no whole checkpoint")
    for name, put in _RUNS.items():
        yield Case("run folder", name, _run(put), _read_rest, None, right=lambda found: found == ({}, [], None))


@lru_cache
def saved() -> dict[str, bytes]:
    """The files of two checkpoints, by name."""
    with tempfile.TemporaryDirectory() as name:
        for step in (1, 2):
            tensors = {"weight": torch.arange(600.0), "count": torch.tensor(step)}
            save_checkpoint(Path(name), step, tensors, {"step": step})
        return {str(p.relative_to(name)): p.read_bytes() for p in Path(name).rglob("*") if p.is_file()}


def save_two(folder: Path) -> None:
    """Puts two whole checkpoints."""
    for name, content in saved().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def _two(change: Change) -> Callable[[Path], Path]:
    def put(folder: Path) -> Path:
        save_two(folder)
        change(folder / "step-00000002")
        return folder

    return put


def _all(change: Change) -> Change:
    """A change of the folder that has both."""
    return lambda path: change(path.parent)


# changes of one checkpoint


def _gone(name: str) -> Change:
    return lambda path: (path / name).unlink()


def _folder(name: str) -> Change:
    def change(path: Path) -> None:
        (path / name).unlink()
        (path / name).mkdir()

    return change


def _pipe(name: str) -> Change:
    """In its place, with a manifest that fits: nothing of no bytes."""

    def change(path: Path) -> None:
        (path / name).unlink()
        os.mkfifo(path / name)
        if name in (STATE, TENSORS):
            _fit(path, name, b"")

    return change


def _link(name: str, to: str) -> Change:
    def change(path: Path) -> None:
        (path / name).unlink()
        (path / name).symlink_to(to)

    return change


def _flipped(name: str, place: str) -> Change:
    def change(path: Path) -> None:
        content = bytearray((path / name).read_bytes())
        content[{"first": 0, "middle": len(content) // 2, "last": len(content.rstrip()) - 1}[place]] ^= 0x10
        (path / name).write_bytes(content)

    return change


def _cut(name: str, part: float) -> Change:
    return lambda path: os.truncate(path / name, int((path / name).stat().st_size * part))


def _manifest(content: Any) -> Change:
    """Another manifest: bytes, or a value as JSON."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda path: (path / MANIFEST).write_bytes(text)


def _fit(path: Path, name: str, content: bytes) -> None:
    """A manifest that is right about a content."""
    manifest = json.loads((path / MANIFEST).read_bytes())
    manifest[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / MANIFEST).write_text(json.dumps(manifest))


def _made(name: str, content: bytes) -> Change:
    """Another content, of which the manifest is right: as somebody writes who means it."""

    def change(path: Path) -> None:
        (path / name).write_bytes(content)
        _fit(path, name, content)

    return change


def _entry(**changes: Any) -> Change:
    """One entry of the manifest otherwise."""

    def change(path: Path) -> None:
        manifest = json.loads((path / MANIFEST).read_bytes())
        manifest[TENSORS] |= changes
        (path / MANIFEST).write_text(json.dumps(manifest))

    return change


def _names(*names: str) -> Change:
    """A manifest of further files."""

    def change(path: Path) -> None:
        manifest = json.loads((path / MANIFEST).read_bytes())
        (path / MANIFEST).write_text(json.dumps(manifest | {name: {"size": 0, "sha256": ""} for name in names}))

    return change


def tensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """safetensors by hand."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + data


def entry(shape: Any = (2,), kind: Any = "F32", offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": offsets}


HEADERS: dict[str, bytes] = {
    "no bytes": b"",
    "seven bytes": bytes(7),
    "eight zeros": bytes(8),
    "a header of 2^40 bytes": tensors({}, length=2**40),
    "a header of 2^63 bytes": tensors({}, length=2**63),
    "a header of 2^64 - 1 bytes": tensors({}, length=2**64 - 1),
    "a header beyond its end": tensors({}, length=100),
    "a header of no JSON": tensors(b"{w: 1}"),
    "a header of no text": tensors(b"{\xff\xfe}"),
    "a header nested without end": tensors(b'{"w":' * 100_000 + b"1" + b"}" * 100_000),
    "a header that is a list": tensors([]),
    "a header that is a pickle": tensors(b"\x80\x04cos\nsystem\n(S'touch marker'\ntR."),
    "a tensor twice": tensors(b'{"w":' + json.dumps(entry()).encode() + b',"w":' + json.dumps(entry()).encode() + b"}"),
    "tensors that overlap": tensors({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "tensors of one place": tensors({"a": entry(), "b": entry()}, bytes(8)),
    "a gap": tensors({"a": entry(), "b": entry(offsets=(16, 24))}, bytes(24)),
    "a tensor beyond the end": tensors({"a": entry((2**38,), offsets=(0, 2**40))}, bytes(8)),
    "a tensor backwards": tensors({"a": entry(offsets=(8, 0))}, bytes(8)),
    "a tensor before the start": tensors({"a": entry(offsets=(-8, 0))}, bytes(8)),
    "a shape that overflows": tensors({"a": entry((2**32, 2**32))}, bytes(8)),
    "a shape that overflows to 2": tensors({"a": entry((2**63 + 1, 2))}, bytes(8)),
    "a shape below 0": tensors({"a": entry((-2,))}, bytes(8)),
    "a shape that is too small": tensors({"a": entry((1,))}, bytes(8)),
    "an unknown type": tensors({"a": entry(kind="F33")}, bytes(8)),
    "an unknown type of a long name": tensors({"x" * 100_000: entry(kind="F33")}, bytes(8)),
    "a type of a long name": tensors({"a": entry(kind="F" * 100_000)}, bytes(8)),
    "a type of objects": tensors({"a": entry(kind="O")}, bytes(8)),
    "a type that is a path": tensors({"a": entry(kind="../../F32")}, bytes(8)),
    "more behind the tensors": tensors({"a": entry()}, bytes(9)),
    "fewer than the tensors": tensors({"a": entry()}, bytes(7)),
    "metadata that is a list": tensors({"__metadata__": []}),
    "metadata of numbers": tensors({"__metadata__": {"a": 1}}),
    "a pickle": b"\x80\x04cos\nsystem\n(S'touch marker'\ntR.",
    "a zip": b"PK\3\4" * 99,
    "a page of HTML": b"<!DOCTYPE html><html>404</html>",
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n",
    "zeros": bytes(4096),
}
_DEEP = b'{"a":' * 100_000
_BAD: dict[str, dict[str, Change]] = {
    "is missing": {f"without {name}": _gone(name) for name in (TENSORS, STATE, MANIFEST)},
    "": {
        **{f"with a folder for {name}": _folder(name) for name in (TENSORS, STATE, MANIFEST)},
        **{f"with a pipe for {name}": _pipe(name) for name in (TENSORS, STATE, MANIFEST)},
        **{f"with a link to itself for {name}": _link(name, name) for name in (TENSORS, STATE, MANIFEST)},
        "with a link to zeros for its tensors": _link(TENSORS, "/dev/zero"),
        "with a link to the system's for its state": _link(STATE, "/etc/hostname"),
    },
    "the manifest is of other files": {
        "with a manifest of no files": _manifest({}),
        "with a manifest of files above": _names("../../../etc/passwd"),
        "with a manifest of the system's files": _names("/etc/passwd"),
        "with a manifest of its tensors alone": _manifest({TENSORS: {}}),
        "with a manifest of 10,000 files": _names(*map(str, range(10_000))),
    },
    "the manifest cannot be read": {
        "with a manifest that is a list": _manifest([[TENSORS], [STATE]]),
        "with a manifest that is null": _manifest(None),
        "with a manifest of no text": _manifest(b"\xff\xfe\xfd"),
        "with a manifest nested without end": _manifest(_DEEP),
        "with a manifest that is no number": _manifest(b'{"a": NaN}'),
        "with a manifest of 5,000 digits": _manifest(b'{"a": ' + b"9" * 5000 + b"}"),
        "with a manifest that says it twice": _manifest(b'{"a": 1, "a": 2}'),
        "with a manifest that is a pickle": _manifest(b"\x80\x04cos\nsystem\n."),
        "with a manifest that is Python": _manifest(b"__import__('os').system('touch marker')"),
        "with entries that are numbers": _manifest({TENSORS: 1, STATE: 2}),
        "with entries that are empty": _manifest({TENSORS: {}, STATE: {}}),
    },
    "bytes, not": {
        "with a size that is too small": _entry(size=3),
        "with a size below 0": _entry(size=-1),
        "with a size of 2^80": _entry(size=2**80),
        "with a size of text": _entry(size="2k" * 100_000),
        "with a size of null": _entry(size=None),
        "with a size of lists": _entry(size=[[[[]]]] * 1000),
    },
    "does not have its checksum": {
        "with another checksum": _entry(sha256="0" * 64),
        "with a checksum of null": _entry(sha256=None),
        "with a checksum that is empty": _entry(sha256=""),
        "with a checksum in capitals": lambda path: _entry(
            sha256=json.loads((path / MANIFEST).read_bytes())[TENSORS]["sha256"].upper()
        )(path),
    },
    "it cannot be read": {
        **{f"of tensors that are {name}": _made(TENSORS, content) for name, content in HEADERS.items()},
        "of a state that is a list": _made(STATE, b"[1, 2]"),
        "of a state that is null": _made(STATE, b"null"),
        "of a state that is empty": _made(STATE, b""),
        "of a state of no text": _made(STATE, b"\xff\xfe\xfd"),
        "of a state nested without end": _made(STATE, _DEEP),
        "of a state that is no number": _made(STATE, b'{"step": NaN}'),
        "of a state that says it twice": _made(STATE, b'{"step": 2, "step": 3}'),
        "of a state that is a pickle": _made(STATE, b"\x80\x04cos\nsystem\n(S'touch marker'\ntR."),
        "of a state of 5,000 digits": _made(STATE, b'{"step": ' + b"9" * 5000 + b"}"),
    },
}
_WHOLE: dict[str, Change] = {
    "with further files": lambda path: (path / "evil.py").write_text("open('marker', 'w')"),
    "with a pickle beside": lambda path: (path / "state.pkl").write_bytes(b"cos\nsystem\n(S'touch marker'\ntR."),
    "named by a latest that lies": lambda path: path.with_name("latest").write_text("../../../etc"),
    "named by a latest that is a pipe": lambda path: _pipe("latest")(path.parent),
    "beside a file named as a later one": lambda path: path.with_name("step-00000009").write_bytes(b"-"),
    "beside what a kill left": lambda path: shutil.copytree(path, path.with_name(".step-00000003.tmp")),
}


# changes of all of them


def _emptied(folder: Path) -> None:
    for path in folder.glob("step-*/*"):
        path.write_bytes(b"")


def _circle(folder: Path) -> None:
    for path in folder.glob("step-*"):
        shutil.rmtree(path)
        path.symlink_to(path.name)


def _removed(folder: Path) -> None:
    for path in folder.glob("step-*"):
        shutil.rmtree(path)


def _hollow(folder: Path) -> None:
    for path in folder.glob("step-*/*"):
        path.unlink()


_NONE: dict[str, Change] = {
    "none at all": _removed,
    "all of them empty": _emptied,
    "links to themselves": _circle,
    "folders that are empty": _hollow,
}


# the rest of a run folder: what is broken there is as if it were not


def _read_rest(path: Path) -> tuple[dict[str, str], list[dict[str, Any]], int | None]:
    folder = RunFolder(path)
    return folder.read_reasons(), folder.read_metrics(), folder.read_micro_batch()


def _run(put: Change) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        put(folder)
        return folder

    return make


_LINES = {
    "nested without end": "[" * 100_000,
    "that are lists": "[1, 2]",
    "that are numbers": "1",
    "of an unknown kind": '{"kind": "exec", "step": 1}',
    "without a step": '{"kind": "train"}',
    "whose step is text": '{"kind": "train", "step": "1"}',
    "whose step is half": '{"kind": "train", "step": 0.5}',
    "that say it twice": '{"kind": "train", "step": 1, "step": 2}',
    "of numbers that are none": '{"kind": "train", "step": 1, "loss": NaN}',
    "of zeros": "\0" * 1000,
    "that are no text": "\udcff\udcfe",
    "that are Python": "__import__('os').system('touch marker')",
}
_NOTES = {
    "empty": b"",
    "a list": b"[]",
    "null": b"null",
    "no text": b"\xff\xfe",
    "nested without end": _DEEP,
    "a pickle": b"\x80\x04cos\nsystem\n(S'touch marker'\ntR.",
}


def _each(make: Change) -> Change:
    def put(folder: Path) -> None:
        for name in ("reasons.json", "micro_batch.json", "metrics.jsonl"):
            make(folder / name)

    return put


def _note(content: bytes) -> Change:
    def put(folder: Path) -> None:
        for name in ("reasons.json", "micro_batch.json"):
            (folder / name).write_bytes(content)

    return put


def _put_line(line: str) -> Change:
    return lambda folder: (folder / "metrics.jsonl").write_bytes((line + "\n").encode(errors="surrogateescape"))


_RUNS: dict[str, Change] = {
    **{f"with lines {name}": _put_line(line) for name, line in _LINES.items()},
    **{f"with notes that are {name}": _note(content) for name, content in _NOTES.items()},
    "with folders for its files": _each(Path.mkdir),
    "with pipes for its files": _each(os.mkfifo),
}

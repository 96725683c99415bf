"""Broken and hostile inputs are refused in a line or read as what they are; none runs, hangs or writes anything."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest

from hostile import Case, corpus, verdicts, written
from normfree.config import UserError

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")  # of fork, from Python 3.12 on

KINDS = (
    *("image", "path", "folder", "tar", "class names", "parquet", "arrow", "saved set", "checkpoint", "run folder"),
    *("config", "validation.json", "pickle", "torch file", "safetensors", "no weights"),
)


@lru_cache(maxsize=1)
def all_cases() -> list[Case]:
    return corpus()


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_inputs(kind: str) -> None:
    """Each input of the kind ends as it must, in little time and memory."""
    if kind in ("parquet", "arrow", "saved set"):
        pytest.importorskip("pyarrow")
    assert verdicts([case for case in all_cases() if case.kind == kind]) == {}


def test_the_corpus_is_as_large_and_as_mixed_as_is_said() -> None:
    """500 or more, each of its own name; cuts and flips are at most a third; every kind is tested."""
    cases = all_cases()
    assert len(cases) >= 500
    assert sum(case.damaged for case in cases) <= len(cases) / 3
    assert {case.kind for case in cases} == set(KINDS)
    assert [name for name, count in Counter(map(str, cases)).items() if count > 1] == []


# whether the tests would notice


def _writes(path: Path) -> None:
    (path.parent / "marker").touch()
    raise UserError("refused")


def _writes_above(path: Path) -> None:
    (path.parent.parent / "marker").touch()
    raise UserError("refused")


def _fails(_path: Path) -> None:
    raise KeyError("x")


def _dies(_path: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _hangs(_path: Path) -> None:
    while True:
        pass


def _takes_all_memory(_path: Path) -> None:
    bytearray(1 << 40)


def _long(_path: Path) -> None:
    raise UserError("x" * 10_000)


def _other(_path: Path) -> None:
    raise UserError("something else")


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "writes a file": (_writes, "changes files"),
    "writes a file above": (_writes_above, "changes files"),
    "raises something else": (_fails, "KeyError"),
    "dies": (_dies, "ends with signal 9"),
    "takes all memory": (_takes_all_memory, "MemoryError"),
    "is accepted": (lambda _path: None, "is read"),
    "says a page": (_long, "not one short line"),
    "says something else": (_other, "does not say 'refused'"),
}


def test_what_goes_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers that do what they must not, each of which has its verdict; and the next input is read all the same."""
    monkeypatch.setattr("hostile.SECONDS", 0.2)
    readers = {**{name: reader for name, (reader, _) in FAULTS.items()}, "hangs": _hangs}
    cases = [Case("fault", name, written(b"-"), reader, UserError, "refused") for name, reader in readers.items()]
    fine = Case("fault", "is fine", written(b"-"), lambda path: path.read_bytes(), None, right=lambda f: f == b"-")
    wrong = verdicts([*cases, fine])
    said = {name: words for name, (_, words) in FAULTS.items()} | {"hangs": "ends with signal 27"}
    assert wrong.keys() == {f"fault: {name}" for name in said}
    assert {name: words for name, words in said.items() if words not in wrong[f"fault: {name}"]} == {}

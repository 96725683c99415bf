"""Broken and hostile inputs of every kind, each with what must become of it; `python tests/hostile.py` counts them.

An input is made by a few lines of code and read as the program reads it, in a process that may take little memory and
little time of its processor. It is refused with a named error of one line, or it is read as what it is. Whatever it is,
nothing in it runs and nothing is written: the folder that it lies in is the same before and after.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normfree.config import UserError

SECONDS = 10  # of the processor's time, for one input
WAIT = 120  # seconds on the clock, for one that waits for something that never comes
MEMORY = 3 << 29  # bytes beyond what the process has


@dataclass(frozen=True)
class Case:
    """One input.

    put writes it into an empty folder and returns what is to be read. words are in the message of the error `refused`;
    without one the input must be read, and `right` must hold for what it gives. damaged: one of many cuts and flips.
    """

    kind: str
    name: str
    put: Callable[[Path], Path]
    read: Callable[[Path], Any]
    refused: type[Exception] | None = UserError
    words: str = ""
    right: Callable[[Any], bool] = lambda _found: True
    damaged: bool = False

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"


def written(content: bytes, name: str = "input") -> Callable[[Path], Path]:
    """Puts one file."""

    def put(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return put


def made(make: Callable[[], bytes], name: str = "input") -> Callable[[Path], Path]:
    """Puts one file, whose content is made when it is due."""

    def put(folder: Path) -> Path:
        return written(make(), name)(folder)

    return put


def corpus() -> list[Case]:
    """All of them; each has a name of its own within its kind."""
    import hostile_checkpoints
    import hostile_configs
    import hostile_images
    import hostile_paths
    import hostile_tables
    import hostile_tars
    import hostile_weights

    parts = (hostile_images, hostile_paths, hostile_tars, hostile_tables, hostile_checkpoints, hostile_configs)
    return [case for part in (*parts, hostile_weights) for case in part.cases()]


def verdicts(cases: Sequence[Case]) -> dict[str, str]:
    """What is wrong with the outcome of each input, by its kind and name; where nothing is, it is left out.

    A child reads one after another. Where one kills it, that is its verdict, and another child goes on with the next.
    """
    wrong: dict[str, str] = {}
    rest = list(cases)
    while rest:
        done, end = _in_child(rest)
        wrong |= {str(case): verdict for case, verdict in zip(rest, done, strict=False) if verdict}
        if len(done) < len(rest):
            wrong[str(rest[len(done)])] = end
        rest = rest[len(done) + 1 :]
    return wrong


def _in_child(cases: Sequence[Case]) -> tuple[list[str], str]:
    """(verdicts of the first inputs, how the child ended if not all have one)."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            _limit_memory()
            with os.fdopen(write, "w") as pipe:
                for case in cases:
                    pipe.write(json.dumps(_verdict(case)) + "\n")
                    pipe.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        done = [json.loads(line) for line in pipe]
    _, status = os.waitpid(child, 0)
    return done, f"ends with signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "ends without a word"


def _limit_memory() -> None:
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in (signal.SIGPROF, signal.SIGALRM):  # which end the process, whatever it is busy with
        signal.signal(number, signal.SIG_DFL)


def _verdict(case: Case) -> str:
    """What is wrong with the outcome, or nothing."""
    outer = Path(tempfile.mkdtemp(prefix="hostile-"))
    try:
        (outer / "inside").mkdir()
        path = case.put(outer / "inside")
        before = sorted(_below(outer))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(WAIT)
        verdict = _outcome(case, path)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        return verdict if sorted(_below(outer)) == before else f"changes files; {verdict}"
    finally:
        shutil.rmtree(outer, ignore_errors=True)


def _outcome(case: Case, path: Path) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a library's, of odd files
            found = case.read(path)
    except Exception as error:
        if case.refused is None or not isinstance(error, case.refused):
            return "".join(traceback.format_exception(error, limit=-3))[-1500:]
        text = error.strerror if isinstance(error, OSError) else str(error)  # the name of its file apart
        return _of_message(text or "", case.words)
    if case.refused is not None:
        return f"is read: {_shown(found)}"
    return "" if case.right(found) else f"gives something else: {_shown(found)}"


def _shown(found: Any) -> str:
    return " ".join(str(found).split())[:300] + f" {getattr(found, 'shape', '')}"


def _of_message(text: str, words: str) -> str:
    if len(text) > 2000 or not text.isprintable():
        return f"the message is not one short line: {text[:500]!r}"
    return "" if words in text else f"does not say {words!r}: {text[:500]}"


def _below(folder: Path) -> Iterator[tuple[str, int]]:
    """Every name below a folder, and the size of each file; links are not followed."""
    for top, folders, files in os.walk(os.fsencode(folder)):
        for name in (*folders, *files):
            path = os.path.join(top, name)
            with suppress(OSError):  # further down than a path may be long
                yield os.fsdecode(path), -1 if os.path.isdir(path) else os.lstat(path).st_size


def main() -> None:
    """Print how many there are of each kind."""
    cases = corpus()
    rows = Counter((c.kind, "refused" if c.refused else "read") for c in cases)
    print(f"{'kind':<14}{'inputs':>8}{'refused':>9}{'read':>7}{'cut or flipped':>16}")
    for kind in dict.fromkeys(c.kind for c in cases):
        damaged = sum(c.damaged for c in cases if c.kind == kind)
        refused, fine = rows[kind, "refused"], rows[kind, "read"]
        print(f"{kind:<14}{refused + fine:>8}{refused:>9}{fine:>7}{damaged:>16}")
    refused = sum(c.refused is not None for c in cases)
    damaged = sum(c.damaged for c in cases)
    print(f"{'all':<14}{len(cases):>8}{refused:>9}{len(cases) - refused:>7}{damaged:>16}")


if __name__ == "__main__":
    sys.modules["hostile"] = sys.modules["__main__"]  # the parts import it under its name
    main()

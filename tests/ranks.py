"""Processes that form a group on this machine, each forked from one that has imported everything."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from forks import FORKS, start_forks
from normfree.cli import _main
from normfree.distributed import Group
from normfree.train import finish


class Ranks:
    """`world` processes that run a function of their group, or a command; what they print is kept by rank."""

    def __init__(self, folder: Path, world: int, work: Callable[..., Any], arguments: Sequence[Any]) -> None:
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        self._folder = folder
        environment = {
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is ours, as it is torchrun's there
            "OMP_NUM_THREADS": "1",
        }
        start_forks()
        self.processes = [
            FORKS.Process(target=_run, args=(environment, rank, folder, work, arguments)) for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def codes(self, seconds: float = 60) -> list[int | None]:
        """How each ended; None of those that had to be killed."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def close(self) -> None:
        """Kill what is left."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()

    def printed(self, rank: int, stream: str = "err") -> str:
        return (self._folder / f"{stream}{rank}").read_text()

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.processes[rank].pid or 0, number)


@contextlib.contextmanager
def ranks(folder: Path, world: int, work: Callable[..., Any], *arguments: Any) -> Iterator[Ranks]:
    """Those processes, none of which is left behind the block."""
    found = Ranks(folder, world, work, arguments)
    try:
        yield found
    finally:
        found.close()


def together(folder: Path, world: int, work: Callable[..., Any], *arguments: Any, seconds: float = 60) -> Ranks:
    """The processes when all have ended well.

    Raises:
        AssertionError: one did not; with what it printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ranks(folder, world, work, *arguments) as found:
        codes = found.codes(seconds)
        assert codes == [0] * world, (codes, *(found.printed(r)[-2000:] for r in range(world)))
    return found


def command(_: Callable[[], Group], *arguments: str) -> int:
    """normfree ARGUMENTS, as each of the processes runs it, but for the pictures, which take the longest."""
    finish.write_report = lambda *_: None  # type: ignore[attr-defined]
    return _main(list(arguments))


def _run(environment: dict[str, str], rank: int, folder: Path, work: Callable[..., Any], arguments: Any) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    os.chdir(folder)
    torch.set_num_threads(1)
    try:
        code = work(Group.from_environment, *arguments)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.exit(code or 0)

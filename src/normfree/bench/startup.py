"""Seconds until Python has imported, and until the command line answers: each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from normfree.bench.timing import Work

PROGRAMS: dict[str, Sequence[str]] = {
    "import torch": ("-c", "import torch"),
    "import normfree": ("-c", "import normfree, torch"),
    "import normfree, and a network": ("-c", "import normfree; normfree.create_model"),
    "normfree --help": ("-m", "normfree", "--help"),
    "python": ("-c", "pass"),
}


def works() -> dict[str, Work]:
    """By name."""
    return {name: _process(arguments) for name, arguments in PROGRAMS.items()}


def _process(arguments: Sequence[str]) -> Work:
    def work() -> None:
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)  # noqa: S603 (our own)

    return work

"""Processes that are forked from one that has imported everything: imports take longer than most of what is tested.

All of them share one order of hashes, which `python -m normfree` draws anew; so some tests start it as it is.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
_COMMANDS = ("train", "evaluate", "predict", "data", "list", "study")
_PLUGINS = ("PIL.JpegImagePlugin", "PIL.PngImagePlugin", "matplotlib.figure", "matplotlib.backends.backend_agg")
# optimizers import torch._dynamo; the rest is what commands import when they run
FORKS.set_forkserver_preload(
    [
        *(f"normfree.cli.{name}" for name in _COMMANDS),
        "normfree.train.finish",
        "torch._dynamo",
        *_PLUGINS,
        "test_distributed",
    ]
)


def start_forks() -> None:
    """The process from which all are forked, of one thread; it does not know where tests are, but for this."""
    os.environ["OMP_NUM_THREADS"] = "1"
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), before]))
    forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def forked(arguments: Sequence[str], cwd: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """normfree ARGUMENTS, as subprocess.run would have it."""
    start_forks()
    with tempfile.TemporaryDirectory() as said:
        process = FORKS.Process(target=_command, args=(list(arguments), dict(os.environ), cwd, said))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(list(arguments), timeout)
        out, err = ((Path(said) / name).read_text() for name in ("out", "err"))
    assert process.exitcode is not None
    return subprocess.CompletedProcess(list(arguments), process.exitcode, out, err)


def _command(arguments: list[str], environment: Mapping[str, str], cwd: Path, said: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(os.path.join(said, name), os.O_WRONLY | os.O_CREAT), number)
    from normfree.cli import main

    sys.argv = ["normfree", *arguments]
    main(arguments)

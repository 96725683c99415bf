"""Signals while networks are compiled: the run ends at once, since nothing can be lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import quick_runs as q
from normfree.train.checkpoint import load_checkpoint
from normfree.train.signals import EndNow, StopRequest

COMPILED = ("--train.compile", "true")


def test_a_signal_ends_what_is_done_at_once() -> None:
    """Each signal, by its number; outside of the block it is noted as ever."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        with StopRequest() as stop:
            with pytest.raises(EndNow) as ended, stop.at_once():  # noqa: PT012
                os.kill(os.getpid(), number)
                time.sleep(60)
            assert ended.value.number == number
        with StopRequest() as stop:
            with stop.at_once():
                pass
            os.kill(os.getpid(), number)
            assert stop.received == number


def test_a_signal_that_is_lost_ends_the_block() -> None:
    """Where something takes the exception for its own, such as a callback, whose errors Python only prints."""
    with StopRequest() as stop, pytest.raises(EndNow), stop.at_once():  # noqa: PT012
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except BaseException:
            pass


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's, about itself
def test_a_compiler_does_not_take_it_for_an_error_of_its_own() -> None:
    """It comes out of torch.compile as it was raised, forward and backward."""

    def compiler(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        os.kill(os.getpid(), signal.SIGTERM)
        return graph

    compiled = torch.compile(lambda x: x * 2, backend=compiler)

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(_: object, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(_: object, grad: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = compiled(grad)
            return found

    with StopRequest() as stop, pytest.raises(EndNow), stop.at_once():
        compiled(torch.ones(2))
    x = torch.ones(2, requires_grad=True)
    with StopRequest() as stop, pytest.raises(EndNow), stop.at_once():
        Doubled.apply(x).sum().backward()  # type: ignore[no-untyped-call]


# whole runs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are looked for as on Linux")


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A folder with images, where nothing was ever compiled."""
    with tempfile.TemporaryDirectory() as name:
        q.make_images(Path(name) / "images")
        yield Path(name)


def of_session(leader: int) -> list[str]:
    """What runs of a session: its compilers, and the processes that start them."""
    found = []
    for process in filter(lambda p: p.name.isdigit(), Path("/proc").iterdir()):
        try:
            state, _, _, session = (process / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            pass
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("when", ["first-step", "start-up"])
def test_a_signal_while_a_compiler_runs_is_obeyed_at_once(home: Path, when: str, number: int, code: int) -> None:
    """Within seconds nothing is left of it; there is no checkpoint; before the first step the signal itself ends it."""
    name = f"{when}-{code}"  # compilers do not take blanks
    command = [sys.executable, "-m", "normfree", *q.train(home, name, *COMPILED)]
    empty = {"TORCHINDUCTOR_CACHE_DIR": str(home / f"cache-{name}")}
    process = subprocess.Popen(
        command, cwd=home, env=os.environ | empty, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    if when == "first-step":
        assert any("writing to" in line for line in process.stdout)
    while not any("cc1plus" in words for words in of_session(process.pid)):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    told = time.monotonic()
    said, _ = process.communicate()
    while of_session(process.pid):
        assert time.monotonic() - told < 10
        time.sleep(0.1)
    assert not (home / name / "checkpoints").exists()
    if when == "first-step":
        assert process.returncode == code
        assert "nothing was trained since the last save" in said
    else:
        assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_signal_while_compiling_after_a_resume_leaves_the_checkpoint(home: Path) -> None:
    """As it was; and the run goes on to the bits of one that was never stopped."""
    arguments = q.train(home, "resumed", *COMPILED)
    assert q.run(arguments, home, "averaged:3:term") == [143], q.said(home)
    assert q.run(arguments, home, "compile:9:int") == [130]
    assert [p.name for p in (home / "resumed/checkpoints").glob("step-*")] == ["step-00000003"]
    assert load_checkpoint(home / "resumed/checkpoints").rejected == []
    assert q.run(arguments, home, q.END) == [0]
    assert q.interrupted(home, "whole", COMPILED, []) == [[0]]
    assert q.differences(home / "whole", home / "resumed") == []


@pytest.mark.slow
def test_the_others_end_with_a_process_that_was_told_while_compiling(home: Path) -> None:
    """They find that it has gone; the run begins anew."""
    codes = q.run(q.train(home, "two", *COMPILED), home, "compile:9:term@1", world=2)
    assert codes == [1, 143], q.said(home)
    assert not (home / "two/checkpoints").exists()
    assert q.run(q.train(home, "two", *COMPILED), home, q.END, world=2) == [0, 0]

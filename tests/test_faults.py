"""Runs that are broken at named points, and go on: they end as one that was never broken, to the last bit."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import faults
import quick_runs as q
from faults import ACTIONS, POINTS, recorded

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked, and asked for as on Linux")
Whole = Callable[..., Path]


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A folder with images, in memory where there is one: saves are synced, which takes its time on a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        q.make_images(Path(name) / "images")
        yield Path(name)


@pytest.fixture(scope="module")
def whole(home: Path) -> Whole:
    """The run of some settings that nothing broke, made when it is first asked for."""
    made: dict[tuple[str, ...], Path] = {}

    def run(*settings: str) -> Path:
        if settings not in made:
            name = f"whole{len(made)}"
            assert q.interrupted(home, name, settings, [], *recording(name)) == [[0]], q.said(home)
            made[settings] = home / name
        return made[settings]

    return run


def recording(name: str) -> tuple[str, str]:
    return f"step:every:record={name}.draws", f"forward:every:record={name}.draws"


def draws_of(run: Path) -> dict[int, list[str]]:
    return recorded(run.with_name(f"{run.name}.draws"))


# the tool


@pytest.mark.parametrize("name", POINTS)
def test_every_point_is_there(name: str) -> None:
    """What a point names can be called; a function that moved is noticed here."""
    for module in faults.IMPORTED:
        importlib.import_module(module)
    module_name, _, path = POINTS[name].of.partition(":")
    found: object = importlib.import_module(module_name)
    for part in path.split("."):
        found = getattr(found, part)
    assert callable(found)


def test_the_tool_says_what_it_can_do() -> None:
    """As a command, which is what torchrun starts: every point and action, with a line of explanation."""
    done = subprocess.run(
        [sys.executable, faults.__file__, "--list"], capture_output=True, text=True, check=True, timeout=60
    )
    named = {line.split()[0] for line in done.stdout.splitlines()}
    assert named == set(POINTS) | set(ACTIONS)


def test_the_tool_breaks_a_command(home: Path) -> None:
    """At the N-th time, and not before; the rest of the command line is normfree's."""
    command = [sys.executable, faults.__file__, "--at", "metrics:3:error", "--", *q.train(home, "broken")]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "as was asked for" in done.stderr
    assert [line["step"] for line in q.metrics(home / "broken")] == [1, 2]


@pytest.mark.parametrize("fault", ["forward:1", "nowhere:1:kill", "forward:1:explode"])
def test_a_fault_that_is_not_known_is_refused(fault: str) -> None:
    """Rather than a run that is not broken at all."""
    with pytest.raises((KeyError, ValueError)):
        faults.inject(fault)


def test_faults_can_be_of_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """On others nothing is patched."""
    from normfree.optim.ema import EMA

    original = EMA.update
    monkeypatch.setattr(EMA, "update", original)  # put back at the end
    monkeypatch.setenv("RANK", "1")
    faults.inject("averaged:1:error@0")
    assert EMA.update is original
    faults.inject("averaged:1:error@1")
    assert EMA.update is not original


# resumes

HERE = [
    ("float32", "in evaluation"),
    ("micro-batches of 3", "between forward and update"),
    ("2 loader processes", "twice"),
]
ALL = [(situation, stop) for situation in q.SITUATIONS for stop in q.STOPS]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in HERE]


@pytest.mark.parametrize(("situation", "stop"), [*HERE, *SLOW])
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(home: Path, whole: Whole, situation: str, stop: str) -> None:
    """Weights, average, momentum, state, metrics, and what the network was fed at every step."""
    settings = q.SITUATIONS[situation]
    name = f"{situation}, {stop}"
    codes = q.interrupted(home, name, settings, q.STOPS[stop], *recording(name))
    assert codes == [[130 if fault.endswith("int") else 143] for fault in q.STOPS[stop]] + [[0]], q.said(home)
    assert q.differences(whole(*settings), home / name) == []
    assert draws_of(home / name) == draws_of(whole(*settings))
    assert len(draws_of(home / name)) == q.STEPS


@pytest.mark.parametrize("control", q.CONTROLS)
def test_what_goes_wrong_in_a_resume_is_noticed(home: Path, whole: Whole, control: str) -> None:
    """The comparison above is one that fails."""
    codes = q.interrupted(home, control, (), ["averaged:12:term", f"{q.CONTROLS[control]} {q.END}"])
    assert codes[:2] == [[143], [0]]
    assert q.differences(whole(), home / control) != []


# kill -9

QUICK_INSTANTS = ("config:1:kill", "write:5:tear", "rename:1:kill", "latest:3:kill", "pruning:2:kill")


@pytest.mark.parametrize(
    "instant", [i if i in QUICK_INSTANTS else pytest.param(i, marks=pytest.mark.slow) for i in q.INSTANTS]
)
def test_a_run_killed_at_any_instant_ends_as_if_it_had_not_been(home: Path, whole: Whole, instant: str) -> None:
    """The same command goes on, whatever was half written."""
    codes = q.interrupted(home, instant, (), [instant])
    assert codes == [[-9], [0]], q.said(home)
    assert q.differences(whole(), home / instant) == []


# the rest

QUICK_FAILURES = (
    "disk full from the second save on",
    "a byte of the newest checkpoint flips",
    "memory runs out once",
    "a loader process is killed",
)


@pytest.mark.parametrize(
    "name", [n if n in QUICK_FAILURES else pytest.param(n, marks=pytest.mark.slow) for n in q.FAILURES]
)
def test_a_failure_is_said_and_survived(home: Path, whole: Whole, name: str) -> None:
    """As the table has it: exit codes, words, and whether the weights are those of a whole run."""
    failure = q.FAILURES[name]
    (home / "said.0").unlink(missing_ok=True)
    codes = q.interrupted(home, name, failure.settings, failure.faulty)
    assert codes == [[code] for code in failure.codes], q.said(home)
    assert failure.says in q.said(home)
    assert ("Traceback" in q.said(home)) == ("RuntimeError" in failure.says)
    if failure.same:
        assert q.differences(whole(), home / name) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", q.SHORTAGES)
def test_memory_runs_out_in_one_of_several_processes(home: Path, name: str) -> None:
    """All compute fewer images at once, from the start or when they are started again; one of them says so, once."""
    for path in home.glob("said.*"):
        path.unlink()
    assert q.short_of_memory(home, name, q.SHORTAGES[name]) == q.SHORTAGES[name].expected, q.said(home)
    assert q.metrics(home / name)[-1]["step"] == q.STEPS


TALK = """
import os
from normfree.distributed import Group
before = len(os.listdir("/proc/self/task"))
group = Group.from_environment()
import torch  # what a run does between: an optimizer imports parts of torch that keep the group they find
torch.optim.SGD([torch.zeros(1)], lr=1.0)
group.agree(0)
group.close()
assert group.first or len(os.listdir("/proc/self/task")) == before
"""


def test_no_thread_outlives_its_group() -> None:
    """One that lets go of a tensor while Python ends aborts its process; rank 0 serves the others to its end."""
    ranks = [subprocess.Popen([sys.executable, "-c", TALK], env=os.environ | e) for e in q.environments(2)]
    try:
        assert [process.wait(120) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()


SHARDED = [(situation, stop, worlds) for situation in q.SHARDED for stop in q.SHARDED_STOPS for worlds in q.WORLDS]
SHARDED_HERE = ("float32", "one is killed", (2, 1))


@pytest.mark.parametrize(
    ("situation", "stop", "worlds"),
    [c if c == SHARDED_HERE else pytest.param(*c, marks=pytest.mark.slow) for c in SHARDED],
)
def test_a_run_goes_on_with_another_number_of_processes(
    home: Path, whole: Whole, situation: str, stop: str, worlds: tuple[int, int]
) -> None:
    """With --train.shards it ends as one process would have, to the bit."""
    settings = (*q.SITUATIONS[situation], "--train.shards", "4")
    name = f"{situation}, {stop}, {worlds}"
    codes = q.interrupted(home, name, settings, q.SHARDED_STOPS[stop], *recording(name), worlds=worlds)
    assert codes[-1] == [0] * worlds[1], q.said(home)
    assert None not in codes[0]
    assert q.differences(whole(*settings), home / name) == []
    assert draws_of(home / name) == draws_of(whole(*settings))


def test_what_a_kill_leaves_in_the_run_folder_is_removed(tmp_path: Path) -> None:
    """Half-written weights are as large as whole ones."""
    q.make_images(tmp_path / "images")
    assert q.run(q.train(tmp_path, "cut"), tmp_path, "weights:1:kill") == [-9]
    assert list((tmp_path / "cut").glob(".best.safetensors.*.tmp"))
    assert q.run(q.train(tmp_path, "cut"), tmp_path, q.END) == [0]
    assert not list((tmp_path / "cut").glob(".*.tmp"))


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_checkpoint_is_made_by_the_clock(tmp_path: Path, world: int) -> None:
    """Between evaluations, of a run that is then killed: it goes on from there, to the bits of one without."""
    q.make_images(tmp_path / "images")
    often = ("--train.save-minutes", "1e-9")
    assert q.run(q.train(tmp_path, "cut", *often), tmp_path, "averaged:12:kill@0", world=world)[0] == -9
    newest = max((tmp_path / "cut/checkpoints").glob("step-*"))
    assert newest.name in ("step-00000010", "step-00000011")  # one may have been under way
    assert q.run(q.train(tmp_path, "cut", "--train.save-minutes", "0"), tmp_path, q.END, world=world) == [0] * world
    assert q.run(q.train(tmp_path, "whole"), tmp_path, q.END, world=world) == [0] * world
    assert not q.differences(tmp_path / "whole", tmp_path / "cut")

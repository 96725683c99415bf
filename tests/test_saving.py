"""Checkpoints that are written while the training goes on: what is in them, in which order, and what goes wrong."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import quick_runs as q
from normfree.train import saving
from normfree.train.checkpoint import load_checkpoint, save_checkpoint
from normfree.train.saving import Saver, copies


class Slow:
    """`save_checkpoint` that waits for `go` first, and says that it has `begun`."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.threads: list[int] = []
        self.fails = False

    def __call__(self, *args: Any) -> Path:
        self.threads.append(threading.get_ident())
        self.begun.set()
        assert self.go.wait(60)
        if self.fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save_checkpoint(*args)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    """In place of `save_checkpoint`."""
    found = Slow()
    monkeypatch.setattr(saving, "save_checkpoint", found)
    return found


def test_what_is_saved_is_what_was_there_as_it_began(tmp_path: Path, slow: Slow) -> None:
    """Of every layout, though all of it is changed in place meanwhile; and the caller is not waited for."""
    tensors = {"plain": torch.randn(4, 3), "other": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)}
    tensors |= {"turned": torch.randn(3, 5).t(), "weight": torch.nn.Parameter(torch.randn(3)), "count": torch.tensor(3)}
    expected = {name: x.detach().clone() for name, x in tensors.items()}
    with Saver(tmp_path) as saver:
        saver.begin(7, copies(tensors), {"step": 7})
        assert slow.begun.wait(60)
        with torch.no_grad():
            for x in tensors.values():
                x.fill_(99)
        saver.check()
        assert not any(tmp_path.iterdir())
        slow.go.set()
        saver.wait()
        found = load_checkpoint(tmp_path)
    assert found.state == {"step": 7}
    assert all(torch.equal(found.tensors[name], x) for name, x in expected.items())
    assert slow.threads != [threading.get_ident()]


def test_saves_come_one_at_a_time_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next waits for the one before; leaving waits for the last."""
    events: list[tuple[str, int]] = []

    def save(folder: Path, step: int, *rest: Any) -> Path:
        events.append(("begins", step))
        path = save_checkpoint(folder, step, *rest)
        events.append(("ends", step))
        return path

    monkeypatch.setattr(saving, "save_checkpoint", save)
    with Saver(tmp_path) as saver:
        for step in (1, 2, 3, 4):
            saver.begin(step, {"x": torch.full((100_000,), float(step))}, {"step": step})
    assert events == [(what, step) for step in (1, 2, 3, 4) for what in ("begins", "ends")]
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000003", "step-00000004"]
    assert load_checkpoint(tmp_path).state == {"step": 4}
    assert not [t for t in threading.enumerate() if t.name.startswith("save")]


@pytest.mark.parametrize("told", ["check", "wait", "begin", "leaving"])
def test_a_failure_is_raised_once_by_whatever_comes_next(tmp_path: Path, slow: Slow, told: str) -> None:
    """As it was raised in the background; a check before it has ended says nothing."""
    slow.fails = True

    def fail() -> None:
        with Saver(tmp_path) as saver:
            saver.begin(1, {}, {})
            saver.check()
            slow.go.set()
            if told == "check":
                assert saver._writing is not None
                saver._writing.exception()
                saver.check()
            elif told != "leaving":
                saver.wait() if told == "wait" else saver.begin(2, {}, {})

    with pytest.raises(OSError, match="No space left") as failed:
        fail()
    assert failed.value.errno == errno.ENOSPC
    assert len(slow.threads) == 1


def test_a_failure_does_not_hide_an_error_that_is_on_its_way(tmp_path: Path, slow: Slow) -> None:
    """It is said beside."""
    said = list[str]()
    slow.fails = True
    slow.go.set()
    with pytest.raises(KeyError, match="mine"), Saver(tmp_path, said.append) as saver:  # noqa: PT012
        saver.begin(1, {}, {})
        raise KeyError("mine")
    assert said == ["a checkpoint could not be saved: [Errno 28] No space left on device"]


# whole runs

forks = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A folder with images and a run of them that nothing broke, `whole`."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        q.make_images(Path(name) / "images")
        assert q.interrupted(Path(name), "whole", (), []) == [[0]], q.said(Path(name))
        yield Path(name)


OFTEN = ("--train.save-minutes", "1e-9")  # a checkpoint begins at every step


@forks
def test_saving_at_every_step_changes_nothing(home: Path) -> None:
    """The weights, the metrics and the state are those of a run that saves after evaluations alone."""
    assert q.interrupted(home, "often", OFTEN, []) == [[0]]
    assert q.differences(home / "whole", home / "often") == []


@forks
def test_a_stop_waits_for_the_checkpoint_that_is_written(home: Path) -> None:
    """SIGTERM while a slow save of step 8 is under way and step 10 is trained: both are whole, and 10 is the newest."""
    assert q.run(q.train(home, "stopped"), home, "tensors:1:stall=1", "averaged:10:term") == [143]
    folder = home / "stopped/checkpoints"
    assert sorted(p.name for p in folder.glob("*")) == ["latest", "step-00000008", "step-00000010"]
    assert load_checkpoint(folder).rejected == []
    assert [line["step"] for line in q.metrics(home / "stopped")] == [*range(1, 9), 8, 9, 10]
    assert q.interrupted(home, "stopped", (), []) == [[0]]
    assert q.differences(home / "whole", home / "stopped") == []


@forks
def test_a_kill_while_training_is_ahead_of_a_checkpoint(home: Path) -> None:
    """Steps 9 to 12 are trained and logged while step 8 is being written: the run begins anew, and ends equal."""
    assert q.run(q.train(home, "killed"), home, "manifest:1:stall=1000", "averaged:12:kill") == [-9]
    assert q.metrics(home / "killed")[-1]["step"] == 11
    assert not list((home / "killed/checkpoints").glob("step-*"))
    assert q.interrupted(home, "killed", (), []) == [[0]]
    assert q.differences(home / "whole", home / "killed") == []


@forks
def test_an_error_waits_for_the_checkpoint_that_is_written(home: Path) -> None:
    """The run ends with its error, and leaves the checkpoint that was begun."""
    assert q.run(q.train(home, "error"), home, "tensors:1:stall=1", "averaged:10:error") == [1]
    assert (home / "error/checkpoints/step-00000008").is_dir()
    assert q.interrupted(home, "error", (), []) == [[0]]
    assert q.differences(home / "whole", home / "error") == []


@forks
def test_a_roll_back_waits_for_the_checkpoint_that_is_written(home: Path) -> None:
    """Five steps that are not finite, while step 8 is written: the run goes back to it, and not to its beginning."""
    (home / "said.0").unlink(missing_ok=True)
    bad = [f"forward:{n}:poison" for n in range(9, 14)]
    assert q.run(q.train(home, "back"), home, "tensors:1:stall=2", *bad, q.END) == [0]
    assert "back to step 8, and on" in q.said(home)


@forks
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_in_the_background_is_told_at_the_next_step(home: Path, world: int) -> None:
    """By the process that writes; the others end with it; the checkpoint before is whole, and nothing else stays."""
    name = f"full{world}"
    for file in home.glob("said.*"):
        file.unlink()
    codes = q.run(q.train(home, name), home, "tensors:2:enospc@0", "averaged:17:stall=1@0", world=world)
    assert codes == [1] * world
    assert q.said(home).count("No space left on device") == 1
    assert "Traceback" not in q.said(home)
    assert sorted(p.name for p in (home / name / "checkpoints").iterdir()) == ["latest", "step-00000008"]
    assert max(line["step"] for line in q.metrics(home / name)) <= 17
    assert q.interrupted(home, name, (), [], worlds=(world,))[-1] == [0] * world
    assert world > 1 or q.differences(home / "whole", home / name) == []


@forks
@pytest.mark.slow
def test_dealt_weights_are_gathered_before(home: Path) -> None:
    """With --train.sharded: a save at every step, and a stop of rank 1 while rank 0 writes, end as a run without."""
    dealt = ("--train.sharded", "true")
    assert q.run(q.train(home, "dealt", *dealt), home, q.END, world=2) == [0, 0]
    assert q.run(q.train(home, "dealt-often", *dealt, *OFTEN), home, q.END, world=2) == [0, 0]
    assert q.differences(home / "dealt", home / "dealt-often") == []
    stopped = q.train(home, "dealt-stopped", *dealt)
    assert q.run(stopped, home, "tensors:1:stall=1@0", "averaged:10:term@1", world=2) == [143, 143]
    assert load_checkpoint(home / "dealt-stopped/checkpoints").state["step"] == 10
    assert q.run(stopped, home, q.END, world=2) == [0, 0]
    assert q.differences(home / "dealt", home / "dealt-stopped") == []

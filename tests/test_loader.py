"""Batches depend on the seed and the position alone: not on workers, not on where a run resumes; workers outlive
signals and not their parent.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from normfree.data.crop import DRAWS, Preprocessing, TrainCrop
from normfree.data.decode import BadImage
from normfree.data.loader import Batch, LoaderStalled, Loading, eval_batches, train_batches
from normfree.data.order import samples_at
from normfree.data.sources import ArraySource, FolderSource, Source, open_folder
from normfree.random import Purpose, uniform

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than cores are part of the claim
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded"),  # Python 3.12 warns of torch's own fork
]
CALM = settings(deadline=None, max_examples=40)  # a busy machine is no failure
COLOURS = {"amber": (220, 160, 20), "blue": (20, 40, 200), "cyan": (10, 190, 190)}
SIZE, BATCH, STEPS = 12, 5, 9
STILL = Preprocessing(SIZE, "center", 2, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
CROP = TrainCrop("box", SIZE, 0.2, 0, 0.0, 0.0, True, STILL)


def write_images(root: Path, per_class: int = 6) -> Path:
    """JPEGs of differing sizes whose colour is that of their class, with noise."""
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            noise = rng.integers(-10, 11, (14 + i, 20 - i, 3))
            Image.fromarray((np.array(colour) + noise).astype(np.uint8)).save(root / name / f"{i}.jpg", quality=95)
    return root


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> FolderSource:
    """18 images that can all be read."""
    return open_folder(write_images(tmp_path_factory.mktemp("whole")))


@pytest.fixture
def damaged(tmp_path: Path) -> FolderSource:
    """18 images, of which 1 is cut off, 7 empty and 16 missing."""
    found = open_folder(write_images(tmp_path))
    cut, empty, missing = (tmp_path / found.name(i) for i in (1, 7, 16))
    cut.write_bytes(cut.read_bytes()[:-20])
    empty.write_bytes(b"")
    missing.unlink()
    return found


def batches_of(source: Source, steps: range = range(STEPS), workers: int = 0, seed: int = 3) -> list[Batch]:
    return list(train_batches(source, CROP, seed, BATCH, steps, Loading(workers)))


def same(found: Iterable[Batch], expected: Iterable[Batch]) -> bool:
    return all(
        torch.equal(a.images, b.images)
        and torch.equal(a.labels, b.labels)
        and torch.equal(a.valid, b.valid)
        and a.bad == b.bad
        for a, b in zip(found, expected, strict=True)
    )


def class_by_colour(image: torch.Tensor) -> int:
    mean = image.double().mean((1, 2)).numpy()
    return int(np.abs(np.array(list(COLOURS.values())) - mean).sum(1).argmin())


# training


def test_batches_are_what_position_and_draws_say(source: FolderSource) -> None:
    """Slot j of step s is the crop of the sample at position s * batch + j with the draws of (pass, index)."""
    for step, batch in enumerate(batches_of(source)):
        passes, indices = samples_at(np.arange(step * BATCH, (step + 1) * BATCH), len(source), 3)
        assert batch.labels.tolist() == source.labels[indices].tolist()
        assert batch.valid.all()
        assert batch.bad == []
        for slot, (p, i) in enumerate(zip(passes.tolist(), indices.tolist(), strict=True)):
            expected = CROP(source.read(i), uniform(3, Purpose.CROP, p, i, n=DRAWS))
            assert np.array_equal(batch.images[slot].permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_change_batches(source: FolderSource, workers: int) -> None:
    """One worker and three deliver, in order, what this process makes."""
    assert same(batches_of(source, workers=workers), batches_of(source))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_goes_on_as_if_nothing_had_been(damaged: FolderSource, workers: int) -> None:
    """From any step on the batches are those of the whole stream, those with broken images too."""
    whole = batches_of(damaged)
    for start in range(STEPS + 1) if workers == 0 else (1, 4):
        assert same(batches_of(damaged, range(start, STEPS), workers), whole[start:])


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_load_the_parts_of_the_same_batches(damaged: FolderSource, workers: int, world: int) -> None:
    """Order, crops and replacements are those of one process, whatever the number of ranks and workers."""
    whole = list(train_batches(damaged, CROP, 3, 8, range(4)))
    for rank in range(world):
        slots = range(rank * 8 // world, (rank + 1) * 8 // world)
        for step, batch in enumerate(train_batches(damaged, CROP, 3, 8, range(4), Loading(workers), slots)):
            assert torch.equal(batch.images, whole[step].images[slots.start : slots.stop])
            assert torch.equal(batch.labels, whole[step].labels[slots.start : slots.stop])


@pytest.mark.parametrize("workers", [0, 2])
def test_large_batches_are_shared_out(source: FolderSource, workers: int) -> None:
    """A batch of several pieces is what one process makes of its positions, and its parts that of ranks."""
    whole = list(train_batches(source, CROP, 3, 300, range(2), Loading(workers)))
    by_image = list(train_batches(source, CROP, 3, 1, range(600)))
    assert len(whole) == 2
    for step, batch in enumerate(whole):
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch.images, torch.cat([b.images for b in by_image[300 * step : 300 * step + 300]]))
        assert torch.equal(batch.labels, torch.cat([b.labels for b in by_image[300 * step : 300 * step + 300]]))
    part = next(train_batches(source, CROP, 3, 300, range(1), Loading(workers), range(100, 300)))
    assert torch.equal(part.images, whole[0].images[100:])


def test_processes_that_are_spawned_deliver_the_same(source: FolderSource) -> None:
    """Where there is no fork, sources and crops travel to the processes."""
    spawned = train_batches(source, CROP, 3, BATCH, range(2), Loading(1, start="spawn"))
    assert same(spawned, batches_of(source, range(2)))


class _Stuck(ArraySource):
    """Its third image never comes."""

    def content(self, index: int) -> NDArray[np.uint8]:
        if index == 2:
            time.sleep(1000)
        return super().content(index)


class _Fatal(ArraySource):
    """Its third image ends the process that reads it."""

    def content(self, index: int) -> NDArray[np.uint8]:
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().content(index)


def _arrays(kind: type[ArraySource]) -> ArraySource:
    return kind(np.zeros((3, SIZE, SIZE, 3), np.uint8), np.arange(3), ("a", "b", "c"), ["0", "1", "2"])


def test_a_loader_that_is_stuck_says_where(capfd: pytest.CaptureFixture[str]) -> None:
    """After the time-out: an error, and the stack of the process on standard error, with the line that waits."""
    with pytest.raises(LoaderStalled, match=r"data\.timeout"):
        list(train_batches(_arrays(_Stuck), CROP, 0, 3, range(3), Loading(1, timeout=2.0)))
    assert "in content" in capfd.readouterr().err


def test_a_loader_process_that_was_killed_is_named() -> None:
    """As the system does when memory runs out."""
    with pytest.raises(LoaderStalled, match=r"data\.workers"):
        list(train_batches(_arrays(_Fatal), CROP, 0, 3, range(3), Loading(1)))


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_arrive_on_a_cuda_device(source: FolderSource, workers: int) -> None:
    """As they are here, while the device computes."""
    device = torch.device("cuda")
    busy = torch.randn(4096, 4096, device=device)
    expected = batches_of(source)
    stream = train_batches(source, CROP, 3, BATCH, range(STEPS), Loading(workers, pin=True), device=device)
    for found, here in zip(stream, expected, strict=True):
        busy = busy @ busy / 4096
        assert found.images.device.type == found.labels.device.type == "cuda"
        assert torch.equal(found.images.cpu(), here.images)
        assert torch.equal(found.labels.cpu(), here.labels)


def test_several_labels_travel_as_zeros_and_ones(source: FolderSource) -> None:
    """(N, classes) float32 in training and evaluation, zeros where an evaluation is padded."""
    several = replace(source, labels=np.eye(3, dtype=bool)[source.labels] | np.eye(3, dtype=bool)[0])
    for found, plain in zip(batches_of(several, range(3)), batches_of(source, range(3)), strict=True):
        expected = torch.eye(3)[plain.labels]
        expected[:, 0] = 1.0
        assert torch.equal(found.labels, expected)
        assert found.labels.dtype == torch.float32
    last = list(eval_batches(several, STILL, 7))[-1]
    assert last.labels[~last.valid].sum() == 0


def test_a_stream_of_other_order_is_noticed(source: FolderSource) -> None:
    """The comparison above is one that fails: another seed, and a start one step later, are other batches."""
    whole = batches_of(source)
    assert not same(batches_of(source, seed=4), whole)
    assert not same(batches_of(source, range(1, STEPS + 1)), whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_uint8_and_channels_last(source: FolderSource, workers: int) -> None:
    """Images are (N, 3, S, S) uint8, channels last in memory also when they come from a worker; labels int64."""
    for batch in batches_of(source, range(3), workers):
        assert batch.images.shape == (BATCH, 3, SIZE, SIZE)
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert (batch.labels.shape, batch.labels.dtype) == ((BATCH,), torch.int64)
        assert (batch.valid.shape, batch.valid.dtype) == ((BATCH,), torch.bool)


def test_loading_leaves_torchs_generator_alone(source: FolderSource) -> None:
    """With workers or without, torch's own random numbers go on as if no data had been loaded."""
    drawn = []
    for workers in (0, 1):
        torch.manual_seed(0)
        batches_of(source, range(2), workers)
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[1]


def test_every_sample_comes_once_a_pass(source: FolderSource) -> None:
    """18 samples in batches of 5: each comes once in each pass, though batches go across their ends."""
    seen = np.concatenate([b.labels.numpy() for b in batches_of(source, range(18))])
    for one_pass in seen.reshape(5, 18):
        assert np.bincount(one_pass).tolist() == [6, 6, 6]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux shows them")
def test_streams_leave_nothing_open(source: FolderSource) -> None:
    """A stream that has ended, and one that was dropped, leave neither open files nor processes, however many."""

    def use() -> None:
        batches_of(source, range(2), workers=1)
        next(train_batches(source, CROP, 3, BATCH, range(9), Loading(1)))
        list(eval_batches(source, STILL, 9, Loading(1)))

    use()
    gc.collect()
    before = len(os.listdir("/proc/self/fd")), len(multiprocessing.active_children())
    for _ in range(3):
        use()
    gc.collect()
    assert (len(os.listdir("/proc/self/fd")), len(multiprocessing.active_children())) == before


def test_shifted_crops_of_arrays() -> None:
    """Sources in memory work as folders do, also with workers."""
    images = np.random.default_rng(1).integers(0, 256, (7, 9, 9, 3), dtype=np.uint8)
    arrays = ArraySource(images, np.arange(7) % 2, ("a", "b"), [str(i) for i in range(7)])
    crop = TrainCrop("shift", SIZE, 1.0, 2, 0.1, 10.0, False, Preprocessing(SIZE, "pad", 1, (0,) * 3, (1,) * 3))
    found, expected = (list(train_batches(arrays, crop, 0, 4, range(5), Loading(workers))) for workers in (1, 0))
    assert same(found, expected)
    assert found[0].images.float().std() > 10


# broken images in training


def test_a_broken_image_is_replaced_and_reported(damaged: FolderSource) -> None:
    """In its slot stands another image with that image's label; its index and the reason are in `bad`."""
    reasons: dict[int, set[str]] = {}
    for step, batch in enumerate(batches_of(damaged, range(18))):
        _, indices = samples_at(np.arange(step * BATCH, (step + 1) * BATCH), len(damaged), 3)
        assert {i for i, _ in batch.bad} >= set(indices.tolist()) & {1, 7, 16}
        for index, reason in batch.bad:
            reasons.setdefault(index, set()).add(reason)
        assert [class_by_colour(image) for image in batch.images] == batch.labels.tolist()
        assert batch.valid.all()
    assert set(reasons) == {1, 7, 16}
    assert {len(said) for said in reasons.values()} == {1}
    assert reasons[1].pop().startswith("broken JPEG: ")
    assert reasons[7] == {"the file is empty"}
    assert reasons[16] == {"cannot be read: No such file or directory"}


def test_a_replacement_is_drawn_by_pass_and_index(damaged: FolderSource) -> None:
    """The replacement is the first readable of the draws for (pass, index); in other passes it is another."""
    replacements = []
    for p in range(12):
        position = p * 18 + samples_at(np.arange(p * 18, (p + 1) * 18), 18, 3)[1].tolist().index(7)
        (batch,) = train_batches(damaged, CROP, 3, 1, range(position, position + 1))
        draws = (int(uniform(3, Purpose.REPLACE, p, 7, attempt)[0] * 18) for attempt in range(1, 101))
        index = next(i for i in draws if i not in (1, 7, 16))
        expected = CROP(damaged.read(index), uniform(3, Purpose.CROP, p, 7, n=DRAWS))
        assert np.array_equal(batch.images[0].permute(1, 2, 0).numpy(), expected)
        assert batch.labels.tolist() == [damaged.labels[index]]
        replacements.append(index)
    assert len(set(replacements)) > 3


@pytest.mark.parametrize("workers", [1, 3])
def test_replacements_do_not_depend_on_workers(damaged: FolderSource, workers: int) -> None:
    """Batches with broken images, and what is reported, are the same for any number of workers."""
    found = batches_of(damaged, workers=workers)
    assert same(found, batches_of(damaged))
    assert any(b.bad for b in found)


@pytest.fixture
def hopeless(tmp_path: Path) -> FolderSource:
    """18 images, all empty files."""
    found = open_folder(write_images(tmp_path))
    for name in found.names:
        (tmp_path / name).write_bytes(b"")
    return found


def why_it_ends(source: Source, workers: int) -> str:
    """The message of BadImage; the exception, which holds the stream and so its workers, is let go."""
    try:
        next(train_batches(source, CROP, 0, BATCH, range(3), Loading(workers)))
    except BadImage as e:
        return str(e)
    return ""


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_without_a_readable_image_ends(hopeless: FolderSource, workers: int) -> None:
    """When no image can be read the search ends in BadImage, one line with a file and a reason; workers end at once."""
    began = time.monotonic()
    message = why_it_ends(hopeless, workers)
    gc.collect()
    assert time.monotonic() - began < 4  # torch waits for 5 s, twice, for workers that it cannot tell to end
    assert re.fullmatch(r"none of 100 images in place of \w+/\d\.jpg could be read: the file is empty", message)


# evaluation


@CALM
@given(st.integers(1, 23), st.integers(1, 30))
def test_evaluation_has_every_sample_once_in_order(n: int, batch_size: int) -> None:
    """For any count and batch size: batches of one shape, samples in order, the padding invalid, zero, at the end."""
    images = np.full((n, 2, 2, 3), 1, np.uint8) * np.arange(1, n + 1, dtype=np.uint8)[:, None, None, None]
    arrays = ArraySource(images, np.arange(n), tuple(map(str, range(n))), [str(i) for i in range(n)])
    batches = list(eval_batches(arrays, Preprocessing(2, "center", 0, (0,) * 3, (1,) * 3), batch_size))
    assert {b.images.shape for b in batches} == {(batch_size, 3, 2, 2)}
    valid, labels, first = (
        np.concatenate([t.numpy() for t in tensors])
        for tensors in zip(*((b.valid, b.labels, b.images[:, 0, 0, 0]) for b in batches), strict=True)
    )
    assert len(batches) == -(-n // batch_size)
    assert valid.tolist() == [True] * n + [False] * (len(valid) - n)
    assert labels[:n].tolist() == list(range(n))
    assert first[:n].tolist() == list(range(1, n + 1))
    assert not labels[n:].any()
    assert not any(b.images[~b.valid].any() for b in batches)


def test_evaluation_prepares_every_image(source: FolderSource) -> None:
    """Each image is what the preprocessing makes of it, uint8 and channels last."""
    for b, batch in enumerate(eval_batches(source, STILL, 7)):
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        for slot in torch.nonzero(batch.valid).flatten().tolist():
            expected: NDArray[np.uint8] = STILL.pixels(source.read(7 * b + slot))
            assert np.array_equal(batch.images[slot].permute(1, 2, 0).numpy(), expected)


def test_broken_images_are_not_evaluated(damaged: FolderSource) -> None:
    """A broken image leaves its slot invalid and is reported with its index; no other takes its place."""
    batches = list(eval_batches(damaged, STILL, 7))
    assert [i for b in batches for i, _ in b.bad] == [1, 7, 16]
    valid = np.concatenate([b.valid.numpy() for b in batches])
    assert np.flatnonzero(~valid).tolist() == [1, 7, 16, 18, 19, 20]
    labels = np.concatenate([b.labels.numpy() for b in batches])
    assert labels[valid].tolist() == damaged.labels[np.flatnonzero(valid)].tolist()


def test_evaluation_does_not_depend_on_workers(damaged: FolderSource) -> None:
    """Two workers deliver the same batches in the same order."""
    assert same(eval_batches(damaged, STILL, 4, Loading(2)), eval_batches(damaged, STILL, 4))


# processes


def test_workers_ignore_signals(source: FolderSource) -> None:
    """SIGINT and SIGTERM, sent to each worker, change nothing: the rest of the stream comes, from the same workers."""
    before = set(multiprocessing.active_children())
    stream = train_batches(source, CROP, 3, BATCH, range(STEPS), Loading(2))
    found = [next(stream), next(stream)]  # one of each worker, so both run
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for worker in workers:
        assert worker.pid is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker.pid, number)
    assert same([*found, *stream], batches_of(source))
    for worker in workers:
        worker.join(10)
    assert {w.exitcode for w in workers} == {0}


SCRIPT = f"""
import multiprocessing, sys
import numpy as np
from normfree.data.crop import Preprocessing, TrainCrop
from normfree.data.loader import Loading, train_batches
from normfree.data.sources import ArraySource

images = np.zeros((8, {SIZE}, {SIZE}, 3), np.uint8)
source = ArraySource(images, np.arange(8) % 2, ("a", "b"), [str(i) for i in range(8)])
still = Preprocessing({SIZE}, "pad", 0, (0,) * 3, (1,) * 3)
crop = TrainCrop("shift", {SIZE}, 1.0, 1, 0.0, 0.0, False, still)
stream = train_batches(source, crop, 0, 4, range(1000), Loading(4))
next(stream)
print(*(w.pid for w in multiprocessing.active_children()), flush=True)
if sys.argv[1] == "wait":
    sys.stdin.read()
"""
Started = tuple["subprocess.Popen[str]", list[int]]


def start(what: str) -> Started:
    """(a process with an open stream, its workers): one that waits to be killed, or one that ends by itself."""
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, what]  # quiet about more workers than cores
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=pipe)
    assert process.stdout is not None
    return process, [int(pid) for pid in process.stdout.readline().split()]


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def left_after(seconds: float, pids: list[int]) -> list[int]:
    """Which of these processes still live after at most so many seconds."""
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return [pid for pid in pids if alive(pid)]


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, Started]]:
    """Two processes at once, to wait for both together; whatever is left of them is removed."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("asks the kernel of Linux which processes live")
    both = {what: start(what) for what in ("wait", "end")}
    both["wait"][0].kill()
    yield both
    for process, workers in both.values():
        process.kill()
        process.communicate()
        for worker in left_after(0, workers):
            os.kill(worker, signal.SIGKILL)


def test_workers_do_not_outlive_a_killed_parent(processes: dict[str, Started]) -> None:
    """After kill -9 of the process, with nobody to tell them, its workers end."""
    process, workers = processes["wait"]
    assert process.wait(10) == -signal.SIGKILL
    assert len(workers) == 4
    assert left_after(20, workers) == []


def test_a_process_with_an_open_stream_ends_quietly(processes: dict[str, Started]) -> None:
    """A process that ends in the middle of a stream ends, and says nothing: workers deaf to SIGTERM do not hold it."""
    process, workers = processes["end"]
    _, complaints = process.communicate(timeout=15)
    assert (process.returncode, complaints) == (0, "")
    assert left_after(5, workers) == []


INTERRUPT = """
import multiprocessing, time
from multiprocessing.process import BaseProcess
plain = BaseProcess.start
def start(self):
    plain(self)
    time.sleep(1)  # until it is deaf
    raise KeyboardInterrupt
BaseProcess.start = start
"""


@pytest.mark.skipif(sys.platform != "linux", reason="loader processes are forked on Linux")
def test_an_interrupt_amid_the_start_of_workers_ends_the_process() -> None:
    """Python waits for its children when it ends: for one that is deaf, and was told of nothing, for ever."""
    command = [sys.executable, "-c", INTERRUPT + SCRIPT, "end"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")

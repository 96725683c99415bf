"""What input, memory and growth report is what there is: of clocks, processes and lines."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from normfree.bench import growth, input, memory  # noqa: A004
from normfree.bench.steps import Task
from normfree.cli import _main
from normfree.config import UserError
from normfree.data.loader import train_batches
from normfree.data.sources import ArraySource, open_folder

CPU = torch.device("cpu")


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def batches(self, seconds: list[float]) -> Iterator[float]:
        for s in seconds:
            self.now += s
            yield s


@pytest.mark.parametrize("skipped", [0, 1, 2])
def test_the_start_of_processes_is_not_counted(skipped: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch of each waits for its process; the rest is what reading takes, and all is read."""
    clock = Clock(monkeypatch)
    batches = clock.batches([100.0] * skipped + [1.0, 2.0, 3.0, 2.0])
    assert input.seconds_apiece(batches, skipped, 4, CPU) == 2.0
    assert next(batches, None) is None


def test_photographs_are_as_large_as_photographs_are(tmp_path: Path) -> None:
    """About 110 kB, like ImageNet's; the same every time, and each another."""
    assert 80_000 < input.write_photographs(tmp_path, 4) < 150_000
    source = open_folder(tmp_path)
    assert (len(source), source.classes, source.read(0).shape) == (4, ("a", "b"), (375, 500, 3))
    first, again, other = (np.asarray(input.photograph(seed)) for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).mean() > 0.5


def test_every_part_of_the_input_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names say what is measured; augmented images are read two for one; processes share batches out evenly."""
    input.write_photographs(tmp_path, 4)
    seen: list[tuple[int, int, int]] = []
    real = train_batches

    def counted(source: Any, crop: Any, seed: int, size: int, steps: range, loading: Any, **more: Any) -> Any:
        seen.append((size, len(steps), loading.workers))
        return real(source, crop, seed, size, steps, loading, **more)

    monkeypatch.setattr(input, "train_batches", counted)
    work = input.pipelines(input.Reading(open_folder(tmp_path), 32, 2, 3), (1, 2), rivals=False)
    assert list(work) == [
        "decoding",
        "decoding and cropping",
        "the same in 1 process",
        "the same in 2 processes",
        "augmented on cpu, 2 processes",
    ]
    told: list[int] = []
    seconds = input.take_turns(work, 1, told.append)
    assert told == [0, 1]
    assert all(len(found) == 1 and found[0] > 0 for found in seconds.values())
    assert seen[:4] == [(2, 3, 0), (2, 1 + 3, 1), (2, 2 + 4, 2), (4, 2 + 4, 2)]


def test_timm_needs_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its transform begins with one: pixels are refused in one line."""
    library = type("timm", (), {"data": type("data", (), {"create_transform": staticmethod(lambda *a, **k: None)})})
    monkeypatch.setattr(input, "library", lambda: library)
    monkeypatch.setattr(input, "import_module", lambda name: type("m", (), {"fast_collate": staticmethod(list)}))
    pixels = ArraySource(np.zeros((2, 8, 8, 3), np.uint8), np.arange(2), ("a", "b"), ("0", "1"))
    with pytest.raises(UserError, match="--alone leaves timm out"):
        input.of_timm(input.Reading(pixels, 8, 2, 1))()


def test_more_memory_is_seen_and_a_parents_is_not() -> None:
    """A process's own peak: 64 MB that are written to count; those of the process that started it do not."""
    program = (
        "from normfree.bench.memory import most_resident as most;"
        "a = most(); b = most(); x = bytearray(b'1') * (64 << 20); print(a, b, most())"
    )
    held = bytearray(b"1") * (512 << 20)  # far more than Python and torch take
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    before, again, after = (int(n) for n in done.stdout.split())
    assert again - before < 2**22
    assert 60 * 2**20 < after - again < 80 * 2**20
    assert after < memory.most_resident() - len(held) // 2


def test_what_does_not_fit_has_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process says so by its exit status, or the system ends it; another failure is one line."""

    def ends(code: int, stderr: str = "") -> None:
        done = subprocess.CompletedProcess([], code, "", stderr)
        monkeypatch.setattr(subprocess, "run", lambda *a, **k: done)

    def fails(_: Task) -> None:
        raise error

    task = Task("nfnet_tiny", 32, 1)
    for code in (77, -9):
        ends(code)
        assert memory.in_fresh_process(task) is None
    ends(1, "Traceback\nKeyError: 'x'\n")
    with pytest.raises(UserError, match="nfnet_tiny did not train: KeyError: 'x'"):
        memory.in_fresh_process(task)
    monkeypatch.setattr(memory, "measure", fails)
    monkeypatch.setattr(sys, "argv", ["memory", json.dumps({"model": "nfnet_tiny", "size": 32, "batch": 1})])
    error: Exception = RuntimeError("CUDA out of memory")
    with pytest.raises(SystemExit, match="77"):
        memory.main()
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        memory.main()


def test_a_step_that_was_cut_did_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the step goes on in micro-batches, its memory is not that of the batch."""

    class Cut:
        micro_batch = 4

        def __call__(self) -> None:
            pass

    monkeypatch.setattr(memory, "step", lambda task: Cut())
    with pytest.raises(MemoryError, match="out of memory"):
        memory.measure(Task("nfnet_tiny", 32, 8))
    memory.measure(Task("nfnet_tiny", 32, 8, micro_batch=4))


def test_the_line_is_that_of_least_squares() -> None:
    """Against numpy's polynomial fit and the definition of R squared."""
    rng = np.random.default_rng(0)
    x = rng.uniform(1, 9, 20)
    y = 3.0 + 0.7 * x + rng.normal(0, 0.2, 20)
    line = growth.fit(list(x), list(y))
    slope, intercept = np.polyfit(x, y, 1)
    off = y - intercept - slope * x
    expected = (intercept, slope, 1 - off.var() / y.var(), np.abs(off / y).max())
    assert np.allclose(line, expected, rtol=1e-9)
    assert np.allclose(growth.fit([1, 2, 4], [5, 7, 11]), (3, 2, 1, 0), atol=1e-12)
    with pytest.raises(UserError, match="at least three"):
        growth.fit([1, 2, 2], [1, 2, 3])


@pytest.mark.slow
def test_times_are_of_each_size_there_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slows down steadily bends no line: each size is measured as early as late."""
    order: list[int] = []

    def turns(work: dict[str, int], rounds: int, device: torch.device) -> dict[str, list[float]]:
        order.append(work[""])
        return {"": [work[""] + 0.01 * len(order)] * rounds}

    monkeypatch.setattr(growth, "step", lambda task: task.batch)
    monkeypatch.setattr(growth, "take_turns", turns)
    found = growth.step_by_images(Task("nfnet_tiny", 32, 1), (1, 2, 4), 4)
    assert order == [1, 2, 4, 4, 2, 1]
    assert found.x == (1.0, 2.0, 4.0)
    assert np.allclose(found.y, [1.035, 2.035, 4.035])
    assert found.line.slope == pytest.approx(1.0)
    assert found.line.intercept == pytest.approx(0.035)
    assert growth.step_by_pixels(Task("nfnet_tiny", 32, 1), (2, 3, 4), 2).x == (4.0, 9.0, 16.0)


def test_the_picture_shows_every_line(tmp_path: Path) -> None:
    """A file of its own size, with something drawn in each half."""
    found = [growth.Growth(w, "images", u, (1.0, 2.0, 4.0), (2.0, 3.0, 5.0)) for w, u in (("a", "s"), ("b", "bytes"))]
    growth.draw(found, tmp_path / "lines.png")
    pixels = np.asarray(Image.open(tmp_path / "lines.png").convert("L"))
    for half in np.array_split(pixels, 2, axis=1):
        assert (half < 100).sum() > 200


def run(arguments: list[str], capsys: pytest.CaptureFixture[str], out: Path) -> dict[str, Any]:
    """What the command prints as JSON, which is what it writes."""
    code = _main(["bench", *arguments, "--rounds", "1", "--device", "cpu", "--json", "--out", str(out)])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    result: dict[str, Any] = json.loads(printed.out)
    assert result == json.loads(out.read_text())
    assert {"device", "cores", "threads", "date", "command", "versions", "n"} <= result.keys()
    return result


def test_bench_input(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images a second of each part, of a folder, and what a network asks for."""
    options = ["--size", "24", "--batch", "2", "--images", "4", "--workers", "1", "--alone", "--model", "nfnet_tiny"]
    result = run(["input", str(image_folder), *options], capsys, tmp_path / "out.json")
    assert "16 images in 2 classes" in result["images"]  # a fifth is held out
    names = [row["name"] for row in result["rows"]]
    assert names[0] == "decoding"
    assert names[-1] == "a step of nfnet_tiny takes"
    assert all(0 < r["images_per_second"]["p10"] <= r["images_per_second"]["p90"] for r in result["rows"])


@pytest.mark.slow
def test_bench_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row for every combination, of a fresh process each; memory grows with images as was said, within a third."""
    options = ["nfnet_tiny", "--size", "32", "--batch", "64", "256"]
    small, large = run(["memory", *options], capsys, tmp_path / "out.json")["rows"]
    assert (small["batch"], large["batch"]) == (64, 256)
    assert abs(small["baseline"] - large["baseline"]) < 0.1 * small["baseline"]
    assert small["baseline"] < small["peak"] < large["peak"]
    assert large["to_estimate"] == pytest.approx((large["peak"] - large["baseline"]) / large["estimate"])
    assert 0.67 < (large["peak"] - small["peak"]) / (large["estimate"] - small["estimate"]) < 1.33


def test_rows_of_memory_say_how_it_was_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate is of the images at once, and of what is kept; where memory does not suffice there is no ratio."""
    seen: list[Task] = []
    monkeypatch.setattr(memory, "in_fresh_process", seen.append)  # None: it does not fit
    options = ["nfnet_tiny", "--size", "32", "--batch", "8", "--remat", "none", "block", "--precision", "fp32", "bf16"]
    rows = run(["memory", *options, "--micro-batch", "4"], capsys, tmp_path / "a.json")["rows"]
    whole = run(["memory", *options], capsys, tmp_path / "b.json")["rows"]
    assert [(t.remat, t.precision, t.micro_batch) for t in seen[:4]] == [
        (r, p, 4) for p in ("fp32", "bf16") for r in ("none", "block")
    ]
    assert all(row["peak"] is row["to_estimate"] is None for row in rows)
    estimates = [[row["estimate"] for row in found] for found in (rows, whole)]
    assert all(a < b for a, b in zip(*estimates, strict=True))
    assert estimates[1][0] == max(estimates[1])
    assert estimates[1][3] == min(estimates[1])
    assert _main(["bench", "memory", *options, "--rounds", "1", "--device", "cpu"]) == 0
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.slow
def test_bench_growth(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Four lines, each with its fit; and the picture."""
    monkeypatch.setattr(memory, "in_fresh_process", lambda task: memory.Peak(1000, 1500 + 10 * task.batch))
    sizes = ["--size", "32", "--batch", "2", "--batches", "1", "2", "3", "--sizes", "24", "32", "40"]
    optimizers = ["--optimizers", "nfnet_tiny", "nfnet_small", "nf_regnet_b0"]
    picture = tmp_path / "lines.png"
    options = ["nfnet_tiny", *sizes, *optimizers, "--png", str(picture)]
    rows = run(["growth", *options], capsys, tmp_path / "out.json")["rows"]
    assert [row["x_unit"] for row in rows] == ["images", "pixels an image", "images", "parameters"]
    assert rows[1]["x"] == [24.0**2, 32.0**2, 40.0**2]
    assert rows[2]["line"] == pytest.approx({"intercept": 500, "slope": 10, "r2": 1, "worst": 0}, abs=1e-9)
    assert rows[3]["x"][0] == 503_309
    for row in rows:
        assert row["line"] == growth.fit(row["x"], row["y"])._asdict()
    assert Image.open(io.BytesIO(picture.read_bytes())).size[0] > 500


@pytest.mark.parametrize("arguments", [["input", "--images", "1"], ["input", "--workers", "-1"]])
def test_what_cannot_be_measured_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """And nothing is begun."""
    assert _main(["bench", *arguments, "--device", "cpu"]) == 1
    assert "--workers not negative" in capsys.readouterr().err

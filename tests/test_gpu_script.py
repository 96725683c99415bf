"""benchmarks/gpu.py on a CPU: its parts run, need few packages, end in time, and say what failed."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CORRECTNESS = ("parity", "bf16", "augmentation", "loader", "agc", "losses", "waiting", "deterministic", "compiled")
WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tyro", "simplejpeg", "datasets", "pyarrow", "mlxtend"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
sys.path.insert(0, {path!r})
import gpu
from on_gpu.common import Part
"""


def script(*arguments: str | Path, more: str = "") -> subprocess.CompletedProcess[str]:
    """The script in a process that has none of the packages that it must not need."""
    program = WITHOUT.format(path=str(BENCHMARKS)) + more + "\nsys.exit(gpu.main())"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of the script by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def read(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.slow
def test_the_checks_run_and_hold(tmp_path: Path) -> None:
    """On a CPU against itself, with a tiny network."""
    done = script("--dry", "--out", tmp_path, *CORRECTNESS)
    assert done.returncode == 0, done.stdout + done.stderr
    found = read(tmp_path)
    assert sorted(found) == sorted(CORRECTNESS)
    for name, result in found.items():
        assert result["status"] == "ok"
        assert result["conditions"]["versions"]["torch"] == torch.__version__
        assert all(check["holds"] for check in result["checks"]), name


def test_failures_do_not_stop_the_rest_and_are_told(tmp_path: Path) -> None:
    """An error leaves its traceback, a check its value, a part that does not end is ended; the status is 1."""
    more = (
        "import time; from pathlib import Path; from on_gpu.common import Setup; gpu.PARTS = {"
        "'error': Part(lambda s: {}['no such key'], 1, ''),"
        "'check': Part(lambda s: {'checks': [{'holds': False}]}, 1, ''),"
        "'fine': Part(lambda s: {'number': 7}, 1, ''),"
        "'endless': Part(lambda s: time.sleep(1000), 10**6, '')};"
        f"print(gpu.run('endless', Setup('cpu', True), Path({str(tmp_path)!r}) / 'endless.json', {{}}, 1.0))"
    )
    done = script("--dry", "--out", tmp_path, more=more)
    assert done.returncode == 1
    assert "failed: error check\n" in done.stdout
    assert "left for another call: endless\n" in done.stdout
    found = read(tmp_path)
    assert {name: result["status"] for name, result in found.items()} == {
        "error": "failed",
        "check": "failed",
        "fine": "ok",
        "endless": "stopped",
    }
    assert any("no such key" in line for line in found["error"]["traceback"])
    assert found["fine"]["number"] == 7


def test_it_says_what_there_is_and_what_it_needs(
    part: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--list; a name that is not there; a dry run that would lie among results."""
    gpu = part("gpu")
    for arguments, said in (
        (["--list"], ""),
        (["partiy"], "no part is called 'partiy'"),
        (["--dry"], "say with --out"),
    ):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
        with pytest.raises(SystemExit):
            gpu.main()
        printed = capsys.readouterr()
        assert said in printed.err
        assert arguments != ["--list"] or all(f"\n{name} " in f"\n{printed.out}" for name in CORRECTNESS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_is_one_line(tmp_path: Path) -> None:
    """And another way to try."""
    done = script("--out", tmp_path, "losses")
    assert (done.returncode, done.stderr) == (1, "no CUDA device was found; --dry tries the script on a CPU\n")


@pytest.mark.slow
def test_every_part_runs_dry(tmp_path: Path) -> None:
    """The measurements too; a second call finds them done."""
    done = script("--dry", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left" not in done.stdout
    found = read(tmp_path)
    assert all(result["status"] == "ok" for result in found.values())
    assert script("--dry", "--out", tmp_path).stdout.count("done before") == len(found)


def test_a_part_is_done_for_these_sources_and_this_device(part: Any, tmp_path: Path) -> None:
    """And for no others, and not if it failed or its file is broken."""
    gpu, path = part("gpu"), tmp_path / "x.json"
    assert not gpu.is_done(path, "a", "b")
    for changes, done in (
        ({}, True),
        ({"status": "failed"}, False),
        ({"sources": "c"}, False),
        ({"device": "c"}, False),
    ):
        path.write_text(json.dumps({"status": "ok", "sources": "a", "device": "b", **changes}))
        assert gpu.is_done(path, "a", "b") == done
    path.write_text("{")
    assert not gpu.is_done(path, "a", "b")


def test_what_is_not_a_number_does_not_hold(part: Any) -> None:
    """Nor what is above its limit; and all of it can be written as JSON."""
    checks = part("on_gpu.common").Checks()
    for value in (0.5, 1.0, 1.5, math.nan, math.inf):
        checks.at_most("x", value, 1.0)
    assert [row["holds"] for row in checks.rows] == [True, True, False, False, False]
    json.dumps(checks.result(), allow_nan=False)


def test_distances_see_what_differs(part: Any) -> None:
    """Relative to the norm of each tensor, those that cancel out to that of the largest; a missing one is far."""
    common = part("on_gpu.common")
    a = {"large": torch.full((4,), 100.0), "small": torch.full((4,), 1e-6)}
    b = {"large": a["large"] * 1.01, "small": a["small"] * 3}
    assert common.distance(b["large"], a["large"]) == pytest.approx(0.01, rel=1e-3)
    assert common.farthest(b, a) == (pytest.approx(2.0, rel=1e-3), "small")
    assert common.farthest(b, a, 1e-4) == (pytest.approx(0.01, rel=1e-3), "large")
    assert common.farthest({"large": a["large"]}, a)[0] == math.inf
    assert common.distance(torch.zeros(2), torch.zeros(2)) == 0
    assert common.distance(torch.ones(2), torch.zeros(2)) == math.inf
    assert math.isnan(common.distance(torch.tensor([math.nan]), torch.ones(1)))
    assert not common.farthest({"x": torch.tensor([math.nan])}, {"x": torch.ones(1)})[0] <= 1


def test_a_fault_is_found(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity fails where the device's arithmetic is off, clipping where a decision is, bits where a bit is."""
    checks, common = part("on_gpu.checks"), part("on_gpu.common")
    setup = common.Setup("cpu", True)
    build, calls = checks.learner, [0]

    def off(*arguments: Any, **more: Any) -> Any:
        found = build(*arguments, **more)
        calls[0] += 1
        if calls[0] == 2:  # the one of the device
            with torch.no_grad():
                found.model.blocks[0].conv0.weight[0, 0] *= 1.01
        return found

    def failing(result: dict[str, Any]) -> int:
        return sum(not check["holds"] for check in result["checks"])

    monkeypatch.setattr(checks, "learner", off)
    assert failing(checks.parity(setup)) >= 3
    factors, turn = checks.agc_factors, [0]

    def undecided(*arguments: Any, **more: Any) -> Any:
        turn[0] += 1
        found = factors(*arguments, **more)
        return found._replace(factors=[f * 0 + 1 for f in found.factors]) if turn[0] % 2 == 0 else found

    monkeypatch.setattr(checks, "agc_factors", undecided)
    assert failing(checks.agc(setup)) == 2
    apply, times = checks.apply_op, [0]

    def flipped(*arguments: Any, **more: Any) -> Any:
        times[0] += 1
        return apply(*arguments, **more) ^ (times[0] == 1)

    monkeypatch.setattr(checks, "apply_op", flipped)
    assert failing(checks.augmentation(setup)) == 1


def test_time_is_counted_once_by_kind(part: Any) -> None:
    """Kernels are listed beside the operations that started them: their sum is the step, and the rest has no name."""
    from torch.autograd import DeviceType  # type: ignore[attr-defined]

    def event(key: str, ms: float, device: DeviceType = DeviceType.CPU) -> SimpleNamespace:
        return SimpleNamespace(key=key, self_device_time_total=ms * 2000, device_type=device)

    kernels = [event("sm90_fprop", 3.0, DeviceType.CUDA), event("mine", 1.0, DeviceType.CUDA)]
    spans = [event("Optimizer.step#AGCSGD.step", 9.0), event("Optimizer.step#AGCSGD.step", 9.0, DeviceType.CUDA)]
    found = part("on_gpu.speed").by_kind([event("aten::cudnn_convolution", 3.0), *kernels, *spans], "device", 2)
    assert found["milliseconds"] == 4.0
    assert found["kinds"]["convolutions, forward"] == {"ms": 3.0, "share": 0.75}
    assert found["kinds"]["the rest"] == {"ms": 1.0, "share": 0.25}
    assert sum(kind["share"] for kind in found["kinds"].values()) == pytest.approx(1.0)

"""What is timed is the work, in turns, and the numbers say under which conditions."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path

import pytest
import torch

from normfree.bench import inference, optimizer, steps, timing
from normfree.cli import _main
from normfree.models import create_model
from normfree.optim import AGCSGD, param_groups

CPU = torch.device("cpu")
TIMM = importlib.util.find_spec("timm") is not None


def test_work_takes_turns() -> None:
    """Every round has each once, in order; warm-up is done and not counted."""
    order: list[str] = []
    told: list[int] = []
    work = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = timing.take_turns(work, 4, CPU, warmup=2, told=told.append)
    assert order == list("abc") * 6
    assert {name: len(found) for name, found in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    assert told == [0, 0, 1, 2, 3, 4]


def test_seconds_are_those_of_the_work() -> None:
    """Sleeping is not quicker than it says."""
    seconds = timing.take_turns({"long": lambda: time.sleep(0.02), "none": lambda: None}, 3, CPU, warmup=0)
    assert min(seconds["long"]) >= 0.02 > max(seconds["none"])


def test_ratios_are_taken_round_by_round() -> None:
    """A machine that slows down slows both."""
    assert timing.ratio([1.0, 2.0, 40.0], [2.0, 4.0, 80.0]) == {"median": 0.5, "p10": 0.5, "p90": 0.5}
    assert timing.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "p10": 1.0, "p90": 3.0}
    assert timing.spread([float(i) for i in range(100)]) == {"median": 49.5, "p10": 10.0, "p90": 89.0}


def test_a_step_trains() -> None:
    """The weights move from round to round: it is a step that is timed."""
    work = steps.step(steps.Task("nfnet_tiny", 32, 4))
    learner = work.__closure__[1].cell_contents if work.__closure__ else None
    assert learner is not None
    before = [p.detach().clone() for p in learner.model.parameters()]
    for _ in range(3):
        work()
    moved = [not torch.equal(a, b) for a, b in zip(before, learner.model.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2  # SkipInit starts at 0, and what is behind it stands still
    assert learner.ema.updates == 3


def test_gradients_of_the_optimizers_task_are_partly_clipped() -> None:
    """As in training: neither none nor all units."""
    network = create_model("nfnet_tiny")
    optimizer.with_gradients(network)
    agc = AGCSGD(param_groups(network), lr=1e-6)
    agc.step()
    clipped, units = agc.clipped_units()
    assert 0 < int(clipped) < units


@pytest.mark.parametrize("folded", [True, False])
def test_inference_is_of_the_network(folded: bool) -> None:
    """It runs, and folded it is plain convolutions."""
    inference.forward(steps.Task("nfnet_tiny", 32, 2, "bf16"), folded)()


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["latency", "nfnet_tiny", "nfnet_small", "--size", "32", "--batch", "2"], ["nfnet_tiny", "nfnet_small"]),
        (["optimizer", "nfnet_tiny", "--alone"], ["normfree"]),
        (["inference", "nfnet_tiny", "--batch", "2"], ["nfnet_tiny, folded", "nfnet_tiny"]),
    ],
)
def test_the_command_writes_numbers_with_conditions(
    arguments: list[str], names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row for each, with its spread and its ratio to the first; the file is what --json prints."""
    out = tmp_path / "out.json"
    code = _main(["bench", *arguments, "--rounds", "2", "--device", "cpu", "--json", "--out", str(out)])
    assert code == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(out.read_text())
    assert [row["name"] for row in result["rows"]] == names
    assert result["rows"][0]["to_first"]["median"] == 1.0
    assert all(row["seconds"]["p10"] <= row["seconds"]["median"] <= row["seconds"]["p90"] for row in result["rows"])
    assert result["n"] == 2
    assert result["versions"]["torch"] == torch.__version__
    assert {"device", "cores", "threads", "date", "command"} <= result.keys()


@pytest.mark.skipif(TIMM, reason="timm is installed")
def test_without_timm_its_networks_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """It says what is needed."""
    assert _main(["bench", "latency", "nfnet_tiny", "timm:resnet18", "--device", "cpu"]) == 1
    assert "need timm and the torchvision that belongs to torch" in capsys.readouterr().err


def test_unknown_actions_are_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    """As every name."""
    assert _main(["bench", "latncy"]) == 2
    assert "latency" in capsys.readouterr().err

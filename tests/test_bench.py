"""What is timed is the work, in turns, and the numbers say under which conditions."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfree.bench import (
    figures,
    inference,
    latency,
    optimizer,
    paper,
    peak,
    results,
    steps,
    table3,
    timing,
    timm_step,
)
from normfree.cli import _main, bench_latency
from normfree.config import IMAGENET_MEAN, IMAGENET_STD, UserError
from normfree.distributed import Group
from normfree.models import create_model, model_config
from normfree.models.count import PAPER, multiply_adds, multiply_adds_of
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
    work: Any = steps.step(steps.Task("nfnet_tiny", 32, 4))
    learner = work.learner
    before = [p.detach().clone() for p in learner.model.parameters()]
    for _ in range(3):
        work()
    moved = [not torch.equal(a, b) for a, b in zip(before, learner.model.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2  # SkipInit starts at 0, and what is behind it stands still
    assert learner.ema.updates == 3
    assert work.is_finite()


def test_a_step_with_sam_ascends_on_a_fifth() -> None:
    """As A.4 has it: rho 0.05, every fifth image, one part of the batch."""
    work: Any = steps.step(steps.Task("nfnet_tiny+sam", 32, 10))
    seen: list[int] = []
    work.learner.model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    work()
    assert seen == [2, 10]
    assert work.learner.sam.rho == 0.05


class Small(nn.Module):
    """A stand-in for a network of timm's, with room for so many images."""

    def __init__(self, room: int = 1000) -> None:
        super().__init__()
        self.room, self.fc = room, nn.Linear(3, steps.CLASSES)
        self.seen: list[Tensor] = []  # gradients that were to be clipped

    def look(self, parameters: Iterator[nn.Parameter], limit: float) -> None:
        assert limit == 0.01
        gradient = next(parameters).grad
        assert gradient is not None
        self.seen.append(gradient.clone())

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.room:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        found: Tensor = self.fc(x.mean((2, 3)))
        return found


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Small:
    """The one network of a stand-in for timm."""
    network = Small()
    average = lambda model, decay: SimpleNamespace(update=lambda _: None)  # noqa: E731
    timm = SimpleNamespace(
        is_model=lambda name: name in ("small", "nf_small"),
        list_models=lambda: ["small"],
        create_model=lambda name, num_classes: network,
        get_pretrained_cfg=lambda name: SimpleNamespace(input_size=(3, 24, 24), test_input_size=(3, 28, 28)),
        utils=SimpleNamespace(ModelEmaV3=average, agc=SimpleNamespace(adaptive_clip_grad=network.look)),
        models=SimpleNamespace(model_parameters=lambda model, exclude_head: model.parameters()),
    )
    monkeypatch.setattr(timm_step, "library", lambda: timm)
    monkeypatch.setattr(steps, "library", lambda: timm)
    return network


def gradient(network: Small, task: steps.Task) -> Tensor:
    """Of the classifier's weight, written plainly in float64."""
    pixels = steps.images(task).double()
    mean, std = (255 * torch.tensor(v).double()[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    weight, bias = (p.detach().double().requires_grad_() for p in (network.fc.weight, network.fc.bias))
    logits = ((pixels - mean) / std).mean((2, 3)) @ weight.T + bias
    labels = torch.arange(task.batch) % steps.CLASSES
    smooth = 0.9 * torch.eye(steps.CLASSES, dtype=torch.float64)[labels] + 0.1 / steps.CLASSES
    (-(smooth * logits.log_softmax(1)).sum(1).mean()).backward()
    assert weight.grad is not None
    return weight.grad


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("micro_batch", [None, 5, 2])
def test_a_rivals_gradient_is_that_of_the_whole_batch(small: Small, micro_batch: int | None, precision: str) -> None:
    """However it is cut, unevenly too; where the loss is scaled, AGC sees it without the scale, once."""
    task = steps.Task("timm:nf_small", 8, 7, precision, micro_batch=micro_batch)
    expected = gradient(small, task)
    steps.step(task)()
    (seen,) = small.seen
    torch.testing.assert_close(seen.double(), expected, rtol=2e-2 if precision == "fp16" else 1e-4, atol=1e-6)


def test_a_rival_that_does_not_fit_goes_on_with_less(small: Small) -> None:
    """Half as many at once, until it fits; then it stays there. The gradient is as ever, the weights move once."""
    small.room = 2
    task = steps.Task("timm:small", 8, 12)
    expected, before = gradient(small, task), small.fc.weight.detach().clone()
    work = steps.step(task)
    work()
    assert work.micro_batch == 1  # 12, 6, 3, 1
    torch.testing.assert_close(small.fc.weight.grad, expected.float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(small.fc.weight, before - 0.01 * 1.9 * (expected.float() + 2e-5 * before))
    small.room = 0
    with pytest.raises(RuntimeError, match="out of memory"):
        work()


def test_ours_that_does_not_fit_goes_on_with_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the row says it."""
    work: Any = steps.step(steps.Task("nfnet_tiny", 32, 6))
    forward = work.learner.model.forward

    def short(x: Tensor, *rest: Any) -> Any:
        if len(x) > 3:
            raise RuntimeError("CUDA out of memory")
        return forward(x, *rest)

    monkeypatch.setattr(work.learner.model, "forward", short)
    monkeypatch.setattr(latency, "step", lambda task, group: work)
    (row,) = latency.rows(latency.together([steps.Task("nfnet_tiny", 32, 6)], 1, 0), 1e9)
    assert row["micro_batch"] == 3
    assert row["fitted"] == "micro-batches of 3"


def test_what_cannot_be_trained_so_is_one_line(small: Small) -> None:
    """Each says what to leave out, or which name was meant."""
    for task, words in (
        (steps.Task("timm:smal", 8, 2), "did you mean 'small'"),
        (steps.Task("timm:small+sam", 8, 2), "for our networks"),
        (steps.Task("timm:small", 8, 2, remat="block"), "leave --remat out"),
        (steps.Task("bn_resnet50", 32, 2, remat="block"), "batch norm"),
        (steps.Task("nfnet_tin", 32, 2), "did you mean nfnet_tiny"),
    ):
        with pytest.raises(UserError, match=words):
            steps.step(task)


def test_sizes_are_the_papers_then_the_networks_own(small: Small) -> None:
    """EfficientNet-B3's are 300 in the paper, whatever timm's weights have."""
    assert steps.size_of("timm:efficientnet_b3") == 300
    assert steps.size_of("nfnet_f1+sam") == steps.size_of("nfnet_f1") == 224
    assert (steps.size_of("timm:small"), steps.size_of("timm:small", "test")) == (24, 28)


def test_the_work_of_a_step(small: Small) -> None:
    """Three forward passes of each image, SAM's fifth rounded up; no more if maps are computed again."""
    once = multiply_adds(model_config("nfnet_tiny"), 32)
    assert steps.step_multiply_adds(steps.Task("nfnet_tiny", 32, 7, remat="block")) == 3 * 7 * once
    assert steps.step_multiply_adds(steps.Task("nfnet_tiny+sam", 32, 7)) == 3 * 9 * once
    small.to("meta")
    assert steps.step_multiply_adds(steps.Task("timm:small", 8, 4)) == 3 * 4 * 3 * steps.CLASSES


class Told:
    """A step that tells when it is built and done, and has no room if its network's name says so."""

    micro_batch = None
    log: list[str]

    def __init__(self, task: steps.Task, group: Group | None) -> None:
        if task.model == "large":
            raise RuntimeError("CUDA out of memory")
        self.name = task.model
        self.log.append(f"new {self.name}")

    def __call__(self) -> None:
        self.log.append(self.name)

    def is_finite(self) -> bool:
        return self.name != "wild"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the steps tell."""
    log: list[str] = []
    monkeypatch.setattr(Told, "log", log, raising=False)
    monkeypatch.setattr(latency, "step", Told)
    monkeypatch.setattr(latency, "step_multiply_adds", lambda task: 1000)
    return log


def tasks(*names: str) -> list[steps.Task]:
    return [steps.Task(name, 32, 8) for name in names]


def test_apart_each_is_built_measured_and_given_back_twice(told: list[str]) -> None:
    """A B A B: two steps to fit, one to warm up, then half of the rounds each."""
    done: list[int] = []
    found = latency.apart(tasks("a", "b"), 5, 1, done.append)
    first, second = (["new x", *"xx", "x", *"x" * n] for n in (3, 2))
    turns = [[word.replace("x", name) for word in turn] for turn in (first, second) for name in "ab"]
    assert told == list(itertools.chain(*turns))
    assert [len(timed.seconds) for timed in found] == [5, 5]
    assert done == [1, 3, 4, 5]
    assert latency.apart(tasks("a"), 1, 0)[0].seconds


def test_what_does_not_fit_is_said(told: list[str]) -> None:
    """Apart the rest goes on, and ratios are to the first that was measured; together nothing does."""
    large, a, wild = latency.rows(latency.apart(tasks("large", "a", "wild"), 2, 0), 1e6)
    assert large == {"name": "large", "size": 32, "batch": 8, "failure": "large does not fit, even one image at a time"}
    assert a["to_first"]["median"] == 1.0
    assert (a["finite"], wild["finite"]) == (True, False)
    assert a["images_per_second"] == pytest.approx(8 / a["seconds"]["median"])
    assert a["share_of_peak"] == pytest.approx(1000 / a["seconds"]["median"] / 1e6)
    assert [bench_latency.cells(row)[-1] for row in (large, a, wild)] == [
        "large does not fit, even one image at a time",
        "",
        "its weights are no longer finite",
    ]
    with pytest.raises(UserError, match="large does not fit, even one image at a time beside the others: try --apart"):
        latency.together(tasks("a", "large"), 2, 0)


def test_the_peak_is_the_best_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger ones are tried until they take long; the quickest of several times counts."""
    tried: list[int] = []

    def quickest(run: timing.Work, device: torch.device, seconds: float) -> float:
        tried.append(len(tried))
        return 1.0 if len(tried) == 3 else 0.001

    with monkeypatch.context() as patch:
        patch.setattr(peak, "_quickest", quickest)
        found = peak.measure_peak(CPU, "fp32")
    assert len(tried) == 3 + 4
    assert found == max(512**3, 128 * 28 * 28 * 256 * 256 * 9) / 0.001
    assert peak._quickest(lambda: time.sleep(0.001), CPU, 0.0) >= 0.001
    monkeypatch.setattr(peak, "_SIDES", (64,))
    monkeypatch.setattr(peak, "_BATCHES", (1,))
    assert peak.measure_peak(CPU, "bf16", 0.0) > 1e6


def test_table_3_is_that_of_the_networks() -> None:
    """Sizes, parameters and multiply-adds of ours are those of the tables; no name stands in two rows."""
    ours = [row for row in paper.TABLE_3 if row.is_ours]
    assert len(paper.TABLE_3) == 27
    assert len(ours) == 8
    for row in ours:
        name = str(row.model).removesuffix("+sam")
        assert row.size == model_config(name).train_size
        assert (row.parameters, row.multiply_adds) == PAPER[name]
    names = paper.measurable()
    assert len(set(names)) == len(names)
    assert all((row.model is None) == (row.size == 0) for row in paper.TABLE_3)


@pytest.mark.skipif(not TIMM, reason="needs timm")
def test_timms_networks_are_those_of_the_rows() -> None:
    """By parameters and, but for what was measured at another size, by multiply-adds; both as the paper rounds."""
    for row in paper.TABLE_3:
        if row.model is None or row.is_ours:
            continue
        with torch.device("meta"):
            network = timm_step.timms_network(row.model)
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(row.parameters, rel=0.03)
        if row.multiply_adds is not None:
            found = multiply_adds_of(network, row.size) / 1e9
            assert found == pytest.approx(row.multiply_adds, rel=0.05)


def joined() -> list[dict[str, Any]]:
    """Table 3 with times of most networks, of one by timm too, and of another network."""
    times = {str(row.model): row.gpu_ms for row in paper.TABLE_3 if row.model and row.gpu_ms}
    times |= {"timm:dm_nfnet_f0": 60.0, "timm:lambda_resnet50ts": 20.0}
    return table3.beside_the_paper([{"name": n, "seconds": {"median": ms / 1000}} for n, ms in times.items()])


def test_what_was_measured_stands_beside_the_papers_row() -> None:
    """In the paper's order; what was not measured says why; others come last and have no numbers of the paper."""
    lines = joined()
    assert [n for n, _ in itertools.groupby(line["network"] for line in lines)] == [
        *(row.name for row in paper.TABLE_3),
        "timm:lambda_resnet50ts",
    ]
    by_timm = next(line for line in lines if line.get("here", {}).get("name") == "timm:dm_nfnet_f0")
    assert by_timm["paper"]["top1"] == 83.6
    notes = {line["network"]: line.get("note") for line in lines}
    assert notes["NFNet-F0"] is None
    assert notes["NFNet-F5+SAM"] == table3.NOT_MEASURED
    assert notes["BoTNet-110"] == table3.PAPER_ONLY
    assert "paper" not in lines[-1]


@pytest.mark.parametrize("rows", [joined(), table3.beside_the_paper([])], ids=["measured", "nothing measured"])
def test_the_pictures_name_every_network_once(rows: list[dict[str, Any]]) -> None:
    """No label lies on another, all are in the frame, and the axis says whose the accuracies are."""
    ours = sum("seconds" in row.get("here", {}) for row in rows) - 2  # another's F0, and what is not in the paper
    latencies = sum(row.tpu_ms is not None for row in paper.TABLE_3)
    counted = sum(row.multiply_adds is not None for row in paper.TABLE_3)
    drawn = [(figures.latency_figure(rows, "here"), [max(0, ours), latencies]), (figures.flops_figure(rows), [counted])]
    for figure, counts in drawn:
        assert figures.as_png(figure).startswith(b"\x89PNG")
        for axis, count in zip(figure.axes, counts, strict=True):
            texts = list(axis.texts)
            assert len(texts) == len({text.get_text() for text in texts}) == count
            boxes = [t.get_window_extent() for t in texts]
            assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
            frame = axis.get_window_extent()
            assert all(frame.contains(b.x0, b.y0) and frame.contains(b.x1, b.y1) for b in boxes)
        assert "the paper's" in figure.axes[0].get_ylabel()


def test_results_as_a_table(tmp_path: Path) -> None:
    """Conditions above, a line each; the rows can be read back, whichever columns they have."""
    rows = [{"name": "a", "seconds": {"median": 0.5}}, {"name": "b", "failure": 'too "large", it is'}]
    results.write_results(tmp_path / "x.csv", {"n": 3, "versions": {"torch": "2"}, "rows": rows})
    lines = (tmp_path / "x.csv").read_text().splitlines()
    above, table = lines[:2], lines[2:]
    assert above == ["# n: 3", "# versions.torch: 2"]
    assert list(csv.DictReader(table)) == [
        {"name": "a", "seconds.median": "0.5", "failure": ""},
        {"name": "b", "seconds.median": "", "failure": 'too "large", it is'},
    ]


def test_table_3_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row of the paper, what was measured, and two pictures."""
    monkeypatch.setattr(bench_latency, "measure_peak", lambda where, precision: 1e12)
    options = ["--models", "nfnet_tiny", "--batch", "2", "--steps", "2", "--device", "cpu", "--warmup", "0"]
    assert _main(["bench", "table3", *options, "--figures", str(tmp_path / "f"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["rows"]) == 28
    assert result["rows"][-1]["here"]["name"] == "nfnet_tiny"
    assert (result["batch"], result["precision"], result["n"], result["apart"]) == (2, "bf16", 2, True)
    assert {path.name for path in (tmp_path / "f").iterdir()} == {"accuracy_latency.png", "accuracy_flops.png"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--size", "32", "--own-sizes"], "leave one out"),
        (["--batch", "0"], "must be positive"),
        (["--micro-batch", "0"], "must be positive"),
        (["--warmup", "-1"], "must not be negative"),
        (["--rounds", "0"], "--rounds must be positive"),
        (["--out", "nowhere/x.json"], "a folder that is there"),
    ],
)
def test_options_that_make_no_sense_are_one_line(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is measured."""
    assert _main(["bench", "latency", "nfnet_tiny", "--device", "cpu", *options]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_several_processes_sum_their_gradients() -> None:
    """Under torchrun rank 0 alone prints, and the images of both count."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "normfree"]
    options = ["nfnet_tiny", "nfnet_tiny+sam", "--batch", "4", "--rounds", "2", "--device", "cpu", "--json"]
    done = subprocess.run(
        [sys.executable, *command, "bench", "latency", *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    result = json.loads(done.stdout)
    assert result["processes"] == 2
    for row in result["rows"]:
        assert row["images_per_second"] == pytest.approx(2 * 4 / row["seconds"]["median"])


def test_gradients_of_the_optimizers_task_are_partly_clipped() -> None:
    """As in training: neither none nor all units."""
    network = create_model("nfnet_tiny")
    optimizer.with_gradients(network)
    agc = AGCSGD(param_groups(network), lr=1e-6)
    agc.step()
    clipped, units = agc.clipped_units()
    assert 0 < int(clipped) < units


@pytest.mark.parametrize("ready", [True, False])
def test_inference_is_of_the_network(ready: bool) -> None:
    """It runs, as it comes and made ready."""
    inference.forward(steps.Task("nfnet_tiny", 32, 2, "bf16"), ready)()


def test_one_network_compiled_beside_the_same_that_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """+compiled behind a name is of this one alone, as --train.compile has it; with --compiled it would say nothing."""
    monkeypatch.setattr(bench_latency, "measure_peak", lambda where, precision: 1e12)
    compiled: list[object] = []
    monkeypatch.setattr(steps, "compile_network", compiled.append)
    options = ["--size", "32", "--batch", "2", "--steps", "1", "--device", "cpu"]
    names = ["nfnet_tiny", "nfnet_tiny+compiled"]
    assert _main(["bench", "latency", *names, *options, "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["rows"]] == names
    assert len(compiled) == 1
    assert _main(["bench", "latency", *names, *options, "--compiled"]) == 1
    assert "+compiled behind a name says nothing beside --compiled" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["inference", "nfnet_tiny", "--batch", "0"], "--size and --batch must be positive"),
        (["inference", "nfnet_tiny", "--size", "0"], "--size and --batch must be positive"),
        (["inference", "nfnet_tiny", "--ways"], "there is nothing to measure"),
        (["inference", "nfnet_tiny", "--out", "."], "--out must be a file in a folder that is there"),
        (["latency", "nfnet_tiny", "--size", "0"], "must be positive"),
    ],
)
def test_bad_options_are_refused_before_anything_is_measured(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line."""
    assert _main(["bench", *options, "--device", "cpu"]) == 1
    assert message in capsys.readouterr().err


def test_an_unknown_way_of_inference_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """With what there is."""
    assert _main(["bench", "inference", "nfnet_tiny", "--ways", "bf16+frozen", "--device", "cpu"]) == 1
    assert "fp32, bf16, fp16, int8, or with +compiled behind, not 'bf16+frozen'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["latency", "nfnet_tiny", "nfnet_small", "--size", "32", "--batch", "2"], ["nfnet_tiny", "nfnet_small"]),
        (["optimizer", "nfnet_tiny", "--alone"], ["normfree"]),
        (["inference", "nfnet_tiny", "--batch", "2"], ["nfnet_tiny, ready, fp32", "nfnet_tiny, fp32"]),
    ],
)
def test_the_command_writes_numbers_with_conditions(
    arguments: list[str],
    names: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A row for each, with its spread and its ratio to the first; the file is what --json prints."""
    monkeypatch.setattr(bench_latency, "measure_peak", lambda where, precision: 1e12)
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

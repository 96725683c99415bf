"""What recipes choose, and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import make_folder
from normfree.cli import _main
from normfree.config import Given, check_ranges, flat
from normfree.data.sources import SyntheticSource, open_data
from normfree.models import MODELS, Network
from normfree.models.count import multiply_adds
from normfree.optim import AGCSGD, WarmupCosine
from normfree.recipes import RECIPES, choose


@pytest.mark.parametrize(
    ("batch", "clipping", "steps"), [(64, 0.01, 2289), (64, 0.16, 178), (4096, 0.01, 62), (4096, 0.16, 10)]
)
def test_steps_to_wake_are_those_of_the_facts(batch: int, clipping: float, steps: int) -> None:
    """At lr 0.1 B / 256, momentum 0.9, eps 1e-3, without warm-up: worked out beforehand."""
    assert choose.steps_to_wake(lambda step: 0.1 * batch / 256, clipping, 1e-3, 0.9, 10_000) == pytest.approx(
        steps, abs=2
    )


def test_steps_to_wake_are_those_of_the_optimizer() -> None:
    """A parameter whose gradient is always clipped reaches 0.1 at that very step of AGCSGD, under a schedule."""
    schedule = WarmupCosine(0.1, 1000, 20)
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = AGCSGD([p], lr=0.1, clipping=0.08)
    for step in range(1000):
        p.grad = torch.full_like(p, -100.0)
        optimizer.param_groups[0]["lr"] = schedule(step)
        optimizer.step()
        if p.item() >= 0.1:
            break
    assert choose.steps_to_wake(schedule, 0.08, 1e-3, 0.9, 1000) == step + 1


@pytest.mark.parametrize("total", [300, 1000, 5000, 50_000])
def test_the_chosen_lambda_is_the_smallest_that_wakes_skipinit_in_a_fifth(total: int) -> None:
    """Or the largest, if none does."""
    schedule: Callable[[int], float] = WarmupCosine(0.025, total, total / 20)
    clipping, steps = choose.clipping_for(schedule, total, 1e-3, 0.9)
    fits = [c for c in choose.LAMBDAS if choose.steps_to_wake(schedule, c, 1e-3, 0.9, total) <= total / 5]
    assert clipping == (fits[0] if fits else choose.LAMBDAS[-1])
    assert steps == choose.steps_to_wake(schedule, clipping, 1e-3, 0.9, total)


def test_memory_and_multiply_adds_are_counted() -> None:
    """F0 at 256 px has the 12.38 billion of Table 3; memory grows linearly with the batch."""
    f0 = MODELS["nfnet_f0"]
    assert multiply_adds(f0, 256) == pytest.approx(12.38e9, rel=2e-3)
    a, b, c = (choose.step_memory(f0, 192, n) for n in (8, 16, 24))
    assert b - a == pytest.approx(c - b, rel=1e-6)
    assert 2 * 2**30 < a < 3 * 2**30  # 2.7 GiB were measured, whole process, on a CPU


def test_the_memory_estimate_covers_what_backward_keeps() -> None:
    """Against the bytes that autograd really saves on the CPU."""
    config = replace(MODELS["nfnet_tiny"], num_classes=10)
    model, seen = Network(config), dict[int, int]()

    def pack(t: torch.Tensor) -> torch.Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = model(torch.randn(16, 3, 32, 32))
    assert sum(seen.values()) <= choose.step_memory(config, 32, 16) <= 4 * sum(seen.values())
    del kept


def run_of(given: dict[str, Any]) -> dict[str, Any]:
    return flat(RECIPES["folder"](Given(given), open_data(given["data.root"], 0.2)[0]))


def test_small_images_are_moved_and_digits_are_not_mirrored(tmp_path: Path) -> None:
    """28 px: 32 px, nfnet_tiny, no cut; names 0 and 1: no mirror images."""
    root = str(make_folder(tmp_path / "digits", classes=("0", "1"), side=28))
    run = run_of({"data.root": root, "train.device": "cpu"})
    assert (run["data.size"], run["model.name"], run["data.train_crop"], run["data.flip"]) == (
        32, "nfnet_tiny", "shift", False,
    )  # fmt: skip
    assert run["data.eval_crop"] == "pad"


def test_photos_are_cut_and_mirrored_unless_their_names_speak_against_it(tmp_path: Path) -> None:
    """150 px: random parts; left and right: no mirror images."""
    for classes, flip in ((("cat", "dog"), True), (("turn_left", "turn_right"), False)):
        root = str(make_folder(tmp_path / classes[0], classes=classes, side=150))
        run = run_of({"data.root": root, "train.device": "cpu"})
        assert (run["data.size"], run["model.name"], run["data.train_crop"]) == (64, "nfnet_small", "box")
        assert run["data.flip"] is flip


def test_given_values_are_kept_and_others_follow_from_them(tmp_path: Path) -> None:
    """Each setting can be given; lr follows the batch, lambda the steps."""
    root = str(make_folder(tmp_path / "images", side=150))
    free = run_of({"data.root": root, "train.device": "cpu"})
    given: dict[str, Any] = {
        name: value
        for name, value in free.items()
        if name not in ("optim.lr", "optim.clipping", "train.batch_size", "data.root")
    }
    bound = run_of({**given, "data.root": root, "train.batch_size": 4, "train.epochs": 2.0})
    assert bound["optim.lr"] == pytest.approx(0.1 * 4 / 256)
    assert bound["train.epochs"] == 2
    assert bound["optim.clipping"] == 0.16
    assert all(bound[name] == value for name, value in given.items() if name != "train.epochs")


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_is_in_range(name: str, tmp_path: Path) -> None:
    """And its docstring says where it comes from."""
    root = str(make_folder(tmp_path / "x", side=50)) if name in ("folder", "finetune") else "digits"
    given = {"data.root": root}
    if name == "finetune":
        given |= {"model.weights": "none.npz", "model.name": "nfnet_f0"}
    images = open_data(root, 0.2)[0] if name in ("digits", "folder", "finetune") else SyntheticSource(1_281_167, 1000)
    check_ranges(flat(RECIPES[name](Given(given), images)))
    assert re.search(r"Ours|A\.1|A\.5|4\.1", RECIPES[name].__doc__ or "")


def test_the_papers_schedule_and_settings() -> None:
    """A.1 in numbers: derived values are computed, and are those of the authors' configuration."""
    imagenet = SyntheticSource(1_281_167, 1000)
    run = RECIPES["nfnet_f1_imagenet"](Given({"data.root": "x"}), imagenet)
    o, t, d, m = run.optim, run.train, run.data, run.model
    assert (t.batch_size, t.epochs, o.lr, o.clipping, o.warmup) == (4096, 360.0, 1.6, 0.01, 5.0)
    assert (o.weight_decay, o.label_smoothing, o.ema_decay, o.sam_rho) == (2e-5, 0.1, 0.99999, 0.0)
    assert (m.drop_rate, m.stochastic_depth, d.size, d.test_size) == (0.3, 0.25, 224, 320)
    assert (d.min_area, d.eval_crop, d.margin, d.antialias) == (0.08, "squash", 32, False)
    sam = RECIPES["nfnet_f6_sam_imagenet"](Given({"data.root": "x"}), imagenet).optim
    assert (sam.sam_rho, sam.sam_every, sam.sam_shards) == (0.05, 5, 128)
    resnet = RECIPES["nf_resnet50_imagenet"](Given({"data.root": "x", "train.batch_size": 256}), imagenet)
    assert (resnet.optim.lr, resnet.optim.clipping, resnet.train.epochs) == (0.1, 0.16, 90.0)
    tune = RECIPES["nfnet_f4_plus_finetune"](Given({"data.root": "x"}), imagenet)
    assert tune.train.epochs * 1_281_167 / 2048 == pytest.approx(15_000)
    assert (tune.optim.lr, tune.optim.sam_rho, tune.model.drop_rate, tune.model.stochastic_depth) == (
        0.1,
        0.05,
        0.25,
        0.1,
    )
    pre = RECIPES["nf_resnet50_pretrain"](Given({"data.root": "x"}), SyntheticSource(10_000_000, 18_000))
    assert (pre.optim.lr, pre.optim.weight_decay, pre.train.epochs, pre.optim.ema_decay) == (0.4, 1e-5, 10.0, 0.0)


def test_a_dry_run_walks_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    """The plan, then building, training, saving and resuming, without a folder of images being there."""
    arguments = ["train", "nf_resnet50_imagenet", "--dry-run", "--data.size", "32", "--data.test-size", "32"]
    assert _main([*arguments, "--train.device", "cpu", "--train.batch-size", "256"]) == 0
    out = capsys.readouterr().out
    for words in (
        "450,410 of 256 images",
        "up for 25,022.79 steps",
        "lambda 0.16",
        "trained     2 steps",
        "bit for bit",
    ):
        assert words in out, out

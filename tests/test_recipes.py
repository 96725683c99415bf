"""What recipes choose, and why."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import make_folder
from normfree.cli import _main
from normfree.config import Given, Run, UserError, check_given, check_ranges, flat
from normfree.data.sources import SyntheticSource, open_data
from normfree.models import MODELS, Network, model_config
from normfree.models.count import multiply_adds, parameters
from normfree.optim import AGCSGD, WarmupCosine
from normfree.recipes import RECIPES, choose
from normfree.recipes.dry_run import plan
from normfree.recipes.paper import IMAGENET, PAPER
from normfree.train.length import run_length
from normfree.train.loop import check_run


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


def test_what_is_given_is_not_searched_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting memory and work takes seconds of each start; the choices around are the same."""
    root = str(make_folder(tmp_path / "images", side=150))
    free = run_of({"data.root": root, "train.device": "cpu"})
    for module, name in (("choose", "step_memory"), ("choose", "clipping_for"), ("folder", "multiply_adds")):
        monkeypatch.setattr(import_module(f"normfree.recipes.{module}"), name, _not_asked_for)
    names = ("model.name", "train.batch_size", "train.epochs", "optim.clipping", "train.device")
    assert run_of({"data.root": root} | {name: free[name] for name in names}) == free
    with pytest.raises(AssertionError, match="nobody asked"):
        run_of({"data.root": root})


def _not_asked_for(*_: Any) -> Any:
    raise AssertionError("nobody asked for it")


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch fits into memory, which is not counted: that takes seconds for large networks."""
    monkeypatch.setattr(choose, "micro_batch", lambda *_: (None, ""))
    monkeypatch.setattr(choose, "step_memory", lambda *_: 0)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_is_in_range(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its docstring says where it comes from. What fits into memory is counted for two of them; it takes long."""
    if name not in ("nfnet_f0_imagenet", "bn_resnet50_imagenet"):
        monkeypatch.setattr(choose, "micro_batch", lambda *_: (None, ""))
    root = str(make_folder(tmp_path / "x", side=50)) if name in ("folder", "finetune") else "digits"
    given = {"data.root": root}
    if name == "finetune":
        given |= {"model.weights": "none.npz", "model.name": "nfnet_f0"}
    images = open_data(root, 0.2)[0] if name in ("digits", "folder", "finetune") else SyntheticSource(1_281_167, 1000)
    check_ranges(flat(RECIPES[name](Given(given), images)))
    assert re.search(r"Ours|A\.1|A\.5|4\.1", RECIPES[name].__doc__ or "")


@pytest.mark.usefixtures("roomy")
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


# The numbers of the paper, typed from it


class Unlabelled(SyntheticSource):
    """Labels of 300 million images take gigabytes, and no recipe looks at them."""

    def __post_init__(self) -> None:
        self.classes = tuple(f"class{i:05d}" for i in range(self.class_count))


IMAGES = SyntheticSource(1_281_167, 1000)  # ILSVRC2012, A.1
JFT = Unlabelled(300_000_000, 18_000)  # 6.2
TABLE_1 = {  # depths, dropout, size in training, in testing; the magnitude of RandAugment is A.3's
    0: ((1, 2, 6, 3), 0.2, 192, 256, 5),
    1: ((2, 4, 12, 6), 0.3, 224, 320, 10),
    2: ((3, 6, 18, 9), 0.4, 256, 352, 10),
    3: ((4, 8, 24, 12), 0.4, 320, 416, 15),
    4: ((5, 10, 30, 15), 0.5, 384, 512, 15),
    5: ((6, 12, 36, 18), 0.5, 416, 544, 15),
    6: ((7, 14, 42, 21), 0.5, 448, 576, 15),
}
RESNETS = (50, 101, 152, 200)


def paper_run(recipe: str, images: SyntheticSource = IMAGES, **given: Any) -> Run:
    """With settings by name, "train__epochs"."""
    values = {"data.root": "x", "train.device": "cpu", **{n.replace("__", "."): v for n, v in given.items()}}
    run = RECIPES[recipe](Given(values), images)
    check_given(run, values)
    assert all(value == values[name] for name, value in flat(run).items() if name in values)
    return run


def warmup_steps(run: Run, images: SyntheticSource) -> float:
    return run_length(run, len(images)).schedule(run.optim).warmup_steps


def test_imagenet_has_the_size_that_the_paper_says() -> None:
    """1,281,167 training images of 1,000 classes, 50,000 for validation; in every dry run."""
    assert IMAGENET == (1_281_167, 50_000, 1000)


@pytest.mark.usefixtures("roomy")
def test_the_lambdas_of_figure_2() -> None:
    """As the paper lists them; and our choice of one for each of its batch sizes."""
    assert choose.LAMBDAS == (0.01, 0.02, 0.04, 0.08, 0.16)
    chosen = {b: paper_run("nf_resnet50_imagenet", train__batch_size=b).optim for b in (256, 512, 1024, 2048, 4096)}
    assert {b: o.lr for b, o in chosen.items()} == {256: 0.1, 512: 0.2, 1024: 0.4, 2048: 0.8, 4096: 1.6}
    assert [o.clipping for o in chosen.values()] == list(choose.LAMBDAS)[::-1]


@pytest.mark.usefixtures("roomy")
@pytest.mark.parametrize("n", TABLE_1)
def test_table_1(n: int) -> None:
    """The network of each variant, and what its recipe makes of it: 360 epochs at batch 4,096 in 112,602 steps."""
    _, drop_rate, size, test_size, _ = TABLE_1[n]
    c = MODELS[f"nfnet_f{n}"]
    assert (c.depths, c.drop_rate, c.train_size, c.test_size, c.magnitude) == TABLE_1[n]
    assert c.widths == (256, 512, 1536, 1536)
    for name in (f"nfnet_f{n}_imagenet", f"nfnet_f{n}_sam_imagenet"):
        if name not in RECIPES:
            continue
        run = paper_run(name)
        o, t, d, m = run.optim, run.train, run.data, run.model
        assert (m.name, m.drop_rate, m.stochastic_depth) == (f"nfnet_f{n}", drop_rate, 0.25)
        assert (d.size, d.test_size, d.train_crop, d.flip, d.eval_crop) == (size, test_size, "box", True, "squash")
        assert (t.batch_size, t.epochs, o.lr, o.clipping, o.momentum) == (4096, 360.0, 1.6, 0.01, 0.9)
        assert (o.kind, o.nesterov, o.weight_decay, o.eps, o.floor) == ("agc", True, 2e-5, 1e-3, 0.0)
        assert (o.loss, o.label_smoothing, o.ema_decay, o.head_only) == ("softmax", 0.1, 0.99999, 0.0)
        assert o.sam_rho == (0.05 if "sam" in name else 0.0)
        assert run_length(run, 1_281_167).total == 112_602
        assert warmup_steps(run, IMAGES) == pytest.approx(1563.92, abs=0.01)  # 5 epochs


@pytest.mark.usefixtures("roomy")
@pytest.mark.parametrize("kind", ["nf", "bn"])
@pytest.mark.parametrize("n", RESNETS)
def test_the_resnets_of_figure_2(kind: str, n: int) -> None:
    """90 epochs with SGD and Nesterov's momentum; batch norm takes the place of AGC."""
    run = paper_run(f"{kind}_resnet{n}_imagenet", train__batch_size=4096)
    o = run.optim
    assert run.model.name == f"{kind}_resnet{n}"
    assert (o.kind, o.momentum, o.nesterov) == ("agc" if kind == "nf" else "sgd", 0.9, True)
    assert (run.train.epochs, o.lr, o.sam_rho, run.data.size) == (90.0, 1.6, 0.0, 224)
    if kind == "nf":
        assert o.clipping == 0.01
    assert MODELS[run.model.name].norm == ("none" if kind == "nf" else "batch")
    other = paper_run(f"{kind}_resnet{n}_imagenet", optim__kind="lars", optim__lr=7.0)
    assert (other.optim.kind, other.optim.lr) == ("lars", 7.0)


@pytest.mark.usefixtures("roomy")
@pytest.mark.parametrize(
    ("name", "batch", "epochs", "lr", "warmup", "decay"),
    [
        ("nfnet_f4", 4096, 40.0, 1.6, 5 * 300e6 / 4096, 1e-6),
        ("nfnet_f4_plus", 4096, 20.0, 1.6, 5 * 300e6 / 4096, 1e-6),
        *((f"nf_resnet{n}", 1024, 10.0, 0.4, 5000.0, 1e-5) for n in RESNETS),
    ],
)
def test_pre_training_in_numbers(name: str, batch: int, epochs: float, lr: float, warmup: float, decay: float) -> None:
    """A.5: 224 px whatever the variant, crops and flips, no average; dropout and stochastic depth as on ImageNet."""
    run = paper_run(f"{name}_pretrain", JFT)
    o, t, d, m = run.optim, run.train, run.data, run.model
    assert (m.name, t.batch_size, t.epochs, o.lr, o.weight_decay, o.ema_decay) == (name, batch, epochs, lr, decay, 0.0)
    assert (d.size, d.test_size, d.train_crop, d.flip, d.shift, d.rotate) == (224, 224, "box", True, 0, 0.0)
    assert (o.kind, o.sam_rho, o.floor, o.head_only) == ("agc", 0.0, 0.0, 0.0)
    assert warmup_steps(run, JFT) == pytest.approx(warmup, rel=1e-12)
    c = MODELS[name]
    assert (m.drop_rate, m.stochastic_depth) == (c.drop_rate, c.stochastic_depth)


@pytest.mark.usefixtures("roomy")
@pytest.mark.parametrize("size", [224, 320, 384])
@pytest.mark.parametrize("name", ["nfnet_f4", "nfnet_f4_plus", *(f"nf_resnet{n}" for n in RESNETS)])
def test_fine_tuning_in_numbers(name: str, size: int) -> None:
    """A.5: batch 2,048, 15,000 steps, 5,000 of them up to 0.1; all layers at once; at 224, 320 and 384 px."""
    run = paper_run(f"{name}_finetune", data__size=size)
    o, d, m, nfnet = run.optim, run.data, run.model, name.startswith("nfnet")
    assert (m.name, run.train.batch_size, o.lr, o.floor, o.head_only) == (name, 2048, 0.1, 0.0, 0.0)
    assert run_length(run, 1_281_167).total == 15_000
    assert warmup_steps(run, IMAGES) == pytest.approx(5000.0, rel=1e-12)
    assert (o.ema_decay, o.unclipped, d.size, d.test_size, d.train_crop) == (0.9999, (), size, size, "box")
    rates = (o.weight_decay, m.drop_rate, m.stochastic_depth, o.sam_rho)
    assert rates == ((1e-5, 0.25, 0.1, 0.05) if nfnet else (0.0, 0.0, 0.0, 0.0))
    few = paper_run(f"{name}_finetune", SyntheticSource(50_000, 100), train__batch_size=64)
    assert (few.optim.lr, few.data.size) == (0.1, 384)  # not scaled with the batch
    assert run_length(few, 50_000).total == 15_000
    assert paper_run(f"{name}_finetune", train__epochs=3.0).optim.warmup == 1.0


def test_default_widths_are_those_of_resnets() -> None:
    """256, 512, 1024, 2048 for the baseline and Default Width of F0 to F3; the modified width has NFNet's."""
    for n in range(4):
        found = {step: MODELS[f"nfnet_f{n}_{step}"] for step in ("baseline", "default_width", "modified_width")}
        assert found["baseline"].widths == found["default_width"].widths == (256, 512, 1024, 2048)
        assert found["modified_width"].widths == (256, 512, 1536, 1536)
        assert [c.second_conv for c in found.values()] == [False, True, False]
        assert all(c.depths == TABLE_1[n][0] for c in found.values())


def test_the_resnet_50_of_table_3_is_near() -> None:
    """26.0 million and 4.10 billion are printed; ours, which is pre-activation, has 1.7 and 0.3 % less."""
    c = MODELS["bn_resnet50"]
    assert parameters(c) / 26.0e6 == pytest.approx(0.983, abs=0.001)
    assert multiply_adds(c, 224) / 4.10e9 == pytest.approx(0.997, abs=0.001)


# Other networks in the paper's recipes


@pytest.mark.usefixtures("roomy")
@pytest.mark.parametrize("other", ["nfnet_f2", "nfnet_tiny", "bn_nfnet_f0", "nfnet_f3_baseline"])
def test_the_papers_recipe_follows_the_network_that_is_given(other: str) -> None:
    """Its sizes and rates are those of --model.name; A.5's rates of fine-tuning are no network's."""
    c = MODELS[other]
    run = paper_run("nfnet_f5_imagenet", model__name=other)
    assert (run.model.drop_rate, run.model.stochastic_depth) == (c.drop_rate, c.stochastic_depth)
    assert (run.data.size, run.data.test_size) == (c.train_size, c.test_size)
    pre = paper_run("nfnet_f4_pretrain", model__name=other)
    assert (pre.model.drop_rate, pre.model.stochastic_depth) == (c.drop_rate, c.stochastic_depth)
    tune = paper_run("nfnet_f4_finetune", model__name=other)
    assert (tune.model.name, tune.model.drop_rate, tune.model.stochastic_depth) == (other, 0.25, 0.1)
    given = paper_run("nfnet_f5_imagenet", model__name=other, model__drop_rate=0.05, data__size=64, data__test_size=96)
    assert (given.model.drop_rate, given.data.size, given.data.test_size) == (0.05, 64, 96)


@pytest.mark.usefixtures("roomy")
def test_the_family_of_the_network_decides_what_the_family_decides() -> None:
    """A ResNet in NFNet's place is pre-trained and fine-tuned as ResNets are; one with batch norm is not clipped."""
    pre = paper_run("nfnet_f4_pretrain", JFT, model__name="nf_resnet50")
    assert (pre.train.batch_size, pre.optim.weight_decay, pre.data.eval_crop) == (1024, 1e-5, "center")
    tune = paper_run("nfnet_f4_finetune", model__name="nf_resnet50")
    assert (tune.optim.weight_decay, tune.optim.sam_rho, tune.model.drop_rate) == (0.0, 0.0, 0.0)
    back = paper_run("nf_resnet50_finetune", model__name="nfnet_f0")
    assert (back.optim.weight_decay, back.optim.sam_rho, back.model.drop_rate) == (1e-5, 0.05, 0.25)
    assert paper_run("nf_resnet50_imagenet", model__name="bn_resnet50").optim.kind == "sgd"
    assert paper_run("bn_resnet50_imagenet", model__name="nf_resnet50").optim.kind == "agc"


@pytest.mark.parametrize(
    "recipe", ["nfnet_f0_imagenet", "nf_resnet50_imagenet", "nfnet_f4_pretrain", "nfnet_f4_finetune"]
)
def test_what_fits_is_counted_for_the_network_and_size_that_are_used(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--model.name, --model.options and --data.size are what the images at once are counted with."""
    seen: list[tuple[Any, ...]] = []

    def count(*arguments: Any) -> tuple[int, str]:
        seen.append(arguments)
        return 3, "counted"

    monkeypatch.setattr(choose, "micro_batch", count)
    options = ("widths=8,16", "depths=1,1", "strides=1,2", "activation=silu")
    values: dict[str, Any] = {
        "model__name": "nfnet_small",
        "model__options": options,
        "data__size": 40,
        "train__batch_size": 24,
    }
    assert paper_run(recipe, **values).train.micro_batch == 3
    ((config, size, batch, device, costs),) = seen
    assert costs == choose.Costs(copies=4 + 2 * (recipe == "nfnet_f4_finetune"))
    assert (config.widths, config.depths, config.activation) == ((8, 16), (1, 1), "silu")
    assert (config.drop_rate, size, batch, device) == (MODELS["nfnet_small"].drop_rate, 40, 24, "cpu")
    assert paper_run(recipe, train__micro_batch=5, **values).train.micro_batch == 5


@pytest.mark.usefixtures("roomy")
@pytest.mark.parametrize(
    ("recipe", "batch", "shards"),
    [("nfnet_f5_sam_imagenet", 4096, 128), ("nfnet_f6_sam_imagenet", 1024, 32), ("nfnet_f6_sam_imagenet", 16, 1)],
)
def test_the_plan_of_a_run_with_sam(recipe: str, batch: int, shards: int) -> None:
    """32 images a shard, as the authors' devices held; each at once, unless fewer fit."""
    run = paper_run(recipe, train__batch_size=batch)
    assert run.optim.sam_shards == shards
    run = replace(run, model=replace(run.model, name="nfnet_tiny"), data=replace(run.data, size=32))
    steps = run_length(run, 1_281_167).total
    work = 3 * multiply_adds(MODELS["nfnet_tiny"], 32) * batch * steps * 1.2
    for micro in (None, 20):
        few = replace(run, train=replace(run.train, micro_batch=micro))
        lines = {line.split()[0]: line for line in plan(few, 1_281_167, 1000)}
        shard = batch // shards
        at_once = min(shard, micro or shard)
        assert f" {at_once} images at once, {shards * math.ceil(shard / at_once)} times;" in lines["batch"]
        assert f"SAM 0.05 on every 5. image in {shards} shards" in lines["optimizer"]
        assert lines["work"].split()[1] == f"{work:.2g}"


def test_what_the_folder_recipe_says_of_steps_is_the_length_of_its_run(tmp_path: Path) -> None:
    """Lambda is chosen by the schedule and the number of steps that the run then has."""
    root = str(make_folder(tmp_path / "x", per_class=21, side=30))
    images = open_data(root, 0.2)[0]
    batch, steps = 3, 1000
    given = Given({"data.root": root, "train.device": "cpu", "train.batch_size": batch})
    given.values["train.epochs"] = steps * batch / len(images)
    run = RECIPES["folder"](given, images)
    length = run_length(run, len(images))
    assert length.total == steps
    clipping, wakes = choose.clipping_for(length.schedule(run.optim), steps, 1e-3, 0.9)
    why = {name: reason for name, _, reason in given.chosen}
    assert why["optim.clipping"] == f"SkipInit can reach 0.1 in {wakes} of {steps} steps"
    assert run.optim.clipping == clipping


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


@pytest.mark.usefixtures("roomy")
@pytest.mark.parametrize("recipe", [name for name in PAPER if name.startswith("bn_")])
def test_networks_with_batch_norm_do_without_agc(recipe: str) -> None:
    """In every recipe, also of another that is told to train one; the plan does not speak of lambda then."""
    for run in (paper_run(recipe), paper_run(recipe.replace("bn_", "nf_"), model__name="bn_resnet50")):
        assert run.optim.kind == "sgd"
        assert not any("lambda" in line for line in plan(run, 1_281_167, 1000))
    assert paper_run(recipe.replace("bn_", "nf_")).optim.kind == "agc"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim.warmup": 2.0, "train.epochs": 2.0}, "optim.warmup 2 leaves none of 2 epochs"),
        ({"optim.class_weights": "balanced", "optim.loss": "sigmoid"}, "goes with the softmax loss"),
        ({"optim.sam_rho": 0.05, "optim.sam_every": 4, "data.mixup": 0.2, "data.cutmix": True}, "must be odd"),
        ({"optim.lambdas": ("stage9=0.02",)}, "no part or parameter of the network is called 'stage9'"),
        ({"optim.lambdas": ("stage1=-1",)}, "PART=LAMBDA"),
        ({"optim.lambdas": ("stage1",)}, "PART=LAMBDA"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, Any], message: str) -> None:
    """Before anything is built or written."""
    images = SyntheticSource(1000, 10)
    run = RECIPES["digits"](Given({"data.root": "digits"} | changes), images)
    with pytest.raises(UserError, match=re.escape(message)):
        check_run(run, images)


def test_memory_follows_remat_precision_and_what_is_copied() -> None:
    """Maps that are computed again are kept for one block or stage at a time, those of 16 bits are half as large.

    A whole stage is more than a block and what enters each of the others, here; SAM and Adam keep more copies.
    """
    config = model_config("nfnet_small")
    of = {remat: choose.step_memory(config, 64, 32, choose.Costs(remat)) for remat in ("none", "block", "stage")}
    assert of["block"] < of["stage"] < of["none"]
    weights = 4 * parameters(config)
    half = choose.step_memory(config, 64, 32, choose.Costs(precision="bf16"))
    assert half - 4 * weights == pytest.approx((of["none"] - 4 * weights) / 2, rel=1e-6)
    assert choose.step_memory(config, 64, 32, choose.Costs(copies=7)) - of["none"] == 3 * weights


@pytest.mark.usefixtures("roomy")
def test_the_validation_size_follows_the_training_size() -> None:
    """In proportion, with a margin in proportion where images are small; one that is given stays."""
    found = paper_run("nfnet_f0_imagenet", data__size=96).data
    assert (found.size, found.test_size, found.margin) == (96, 128, 16)
    assert paper_run("nfnet_f0_imagenet", data__size=96, data__test_size=100).data.test_size == 100
    assert paper_run("nfnet_f0_imagenet").data.margin == 32

"""The training step against the authors' run and plain references: precision, accumulation, SAM, memory, resuming."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from authors import images, load
from normfree.config import DataConfig, Given, ModelConfig, OptimConfig, Run, TrainConfig, UserError
from normfree.data.crop import Preprocessing
from normfree.data.loader import Batch
from normfree.data.sources import SyntheticSource
from normfree.models import MODELS, Network
from normfree.models.exchange import from_haiku, haiku_name
from normfree.models.weights import load_model, save_weights
from normfree.nn import conv as conv_module
from normfree.nn.conv import WSConv2d, standardize
from normfree.nn.layers import Draws
from normfree.nn.loss import LOSSES, balanced_weights, hits, probabilities, sample_losses
from normfree.optim import AGCSGD, EMA, LARS, WarmupCosine, agc, param_groups
from normfree.recipes import RECIPES
from normfree.recipes.dry_run import plan
from normfree.runlog import Screen
from normfree.train import step as step_module
from normfree.train.build import build_learner, unclipped_names
from normfree.train.length import Length, run_length
from normfree.train.loop import check_run, prepare
from normfree.train.record import RunFolder
from normfree.train.step import Learner, Outcome

CLASSES, SIDE = 5, 16
AS_IT_IS = Preprocessing(SIDE, "squash", 0, (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))  # pixels pass unchanged
NARROW = (
    "widths=8,16",
    "depths=1,2",
    "strides=1,2",
    "stem_widths=4,8",
    "stem_strides=2,1",
    "group_width=4",
    "final_width=24",
)
NETWORKS = {
    "nfnet_tiny": NARROW,
    "nf_resnet50": ("widths=16,32", "depths=1,2", "strides=1,2", "stem_widths=8", "stem_strides=2"),
    "bn_nfnet_f0": NARROW,
}
OUT_OF_MEMORY = (
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to"),
)


def a_run(name: str = "nfnet_tiny", masks: bool = True, **changes: Any) -> Run:
    """Settings of a narrow network in which clipping and, unless told otherwise, every mask bites.

    changes: fields of OptimConfig and TrainConfig.
    """
    model = ModelConfig(
        name,
        drop_rate=0.3 if masks else 0.0,
        stochastic_depth=0.6 if masks else 0.0,
        skip_init=1.0,
        options=NETWORKS[name],
    )
    data = DataConfig("nowhere", SIDE, SIDE, "box", 0.1, 0, 0.0, 0.0, False, "squash", 0)
    optim = OptimConfig(lr=0.4, clipping=0.05, warmup=1.0, weight_decay=1e-3, ema_decay=0.99)
    train = TrainConfig(epochs=1.0, batch_size=8, seed=3)
    of_optim = {k: v for k, v in changes.items() if hasattr(optim, k)}
    of_train = {k: v for k, v in changes.items() if hasattr(train, k)}
    assert of_optim.keys() | of_train.keys() == changes.keys()
    return Run("test", model, data, replace(optim, **of_optim), replace(train, **of_train))


def a_learner(run: Run | None = None, **changes: Any) -> Learner:
    """At its start: 20 steps, of which the first is warm-up."""
    return build_learner(run or a_run(**changes), CLASSES, Length(20.0, 1.0), AS_IT_IS)


def a_batch(number: int = 0, n: int = 8) -> Batch:
    """Noise with a brightness that tells the class."""
    generator = torch.Generator().manual_seed(number)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    noise = torch.randn(n, 3, SIDE, SIDE, generator=generator) + labels[:, None, None, None] / CLASSES
    return Batch(noise, labels, torch.ones(n, dtype=torch.bool), [])


def advance(learner: Learner, steps: int, taken: int = 0, applied: int = 0, n: int = 8) -> int:
    """Take so many batches; returns the number of steps that changed the weights, in all."""
    for number in range(taken, taken + steps):
        applied += learner.step(a_batch(number, n), number, applied).applied
    return applied


def copies(learner: Learner) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in learner.tensors().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The greatest relative distance of two tensors of one name."""
    assert a.keys() == b.keys()
    tiny = 1e-30
    return max(float((a[n].double() - b[n].double()).norm() / b[n].double().norm().clamp_min(tiny)) for n in a)


def in_float64(learner: Learner) -> Learner:
    """Its weights and average as float64; the fixture `float64` does the rest."""
    learner.model.double()
    learner.ema.module.double()
    return learner


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 means float64, so that references can be tight."""
    monkeypatch.setitem(step_module.PRECISIONS, "fp32", torch.float64)


# The authors' run


THEIRS, ABOUT = load("authors_training")


def _their_tree(prefix: str) -> dict[str, Tensor]:
    tree: dict[str, dict[str, Any]] = {}
    for key, tensor in THEIRS.items():
        if key.startswith(prefix):
            module, _, name = key.removeprefix(prefix).rpartition("/")
            tree.setdefault(module, {})[name] = tensor.numpy()
    return from_haiku(tree)


def authors_learner(
    sgd: type[AGCSGD] = AGCSGD,
    average: type[EMA] = EMA,
    schedule: type[WarmupCosine] = WarmupCosine,
    smoothing: float = 0.1,
    nesterov: bool = True,
    eps: float = 1e-3,
) -> Learner:
    """The authors' network, weights and settings; the arguments are for rules that are not theirs."""
    variant, experiment = ABOUT["config"]["variant"], ABOUT["config"]["experiment"]
    widths = tuple(variant["width"])
    config = replace(
        MODELS["nfnet_f0"],
        widths=widths,
        depths=tuple(variant["depth"]),
        group_width=tuple(variant["group_width"]),
        stem_widths=(16, 32, 64, widths[0] // 2),
        final_width=2 * widths[-1],
        num_classes=experiment["num_classes"],
        drop_rate=0.0,
        stochastic_depth=0.0,
    )
    model = Network(config)
    theirs = _their_tree("initial/")
    model.load_state_dict({n: theirs[haiku_name(n, config)] for n in model.state_dict()})
    settings = experiment["optimizer"]["kwargs"]
    assert (settings["momentum"], settings["eps"], experiment["label_smoothing"]) == (0.9, 1e-3, 0.1)
    groups: Any = param_groups(model, settings["weight_decay"], settings["clipping"])
    optimizer = sgd(groups, lr=0.0, momentum=0.9, nesterov=nesterov, clipping=settings["clipping"], eps=eps)
    run = a_run(label_smoothing=smoothing)
    return Learner(
        model.train(), average(model, experiment["ema_decay"]), optimizer, schedule(0.4, 8, 1.5), AS_IT_IS, run
    )


# greatest relative differences of a tensor; single steps' momentum is coarser, for there gradients cancel out
TOLERANCES = {"loss": 5e-6, "params": 5e-6, "ema": 5e-6, "norms": 5e-6, "momentum": 3e-5, "momentum_norms": 1e-4}


def follow_the_authors(learner: Learner) -> None:
    """Take their five steps.

    Raises:
        AssertionError: a loss or a tensor is not theirs, or the learning rate.
    """
    config = learner.model.config
    names = {haiku_name(n, config): n for n, _ in learner.model.named_parameters()}
    assert isinstance(learner.optimizer, AGCSGD)

    def check(kind: str, ours: Tensor | float, theirs: Tensor) -> None:
        ours = torch.as_tensor(ours).detach().double()
        difference = float((ours - theirs.double()).norm() / theirs.double().norm())
        assert difference < TOLERANCES[kind.partition(" ")[0]], (kind, difference)

    for itr in range(ABOUT["config"]["steps"]):
        shares = THEIRS[f"ratio/{itr}"][:, None]
        first, second = (F.one_hot(THEIRS[f"{k}/{itr}"], config.num_classes) for k in ("labels", "mix_labels"))
        targets = shares * first + (1 - shares) * second
        x = images(THEIRS[f"images/{itr}"])
        assert torch.equal(learner.preprocessing.normalize(x), x)
        outcome = learner.step(Batch(x, targets, torch.ones(len(x), dtype=torch.bool), []), itr, itr)
        assert outcome.applied
        check("loss", outcome.sums[0] / len(x), THEIRS[f"loss/{itr}"])
        truth, prediction = targets.argmax(1), THEIRS[f"logits/{itr}"].argmax(1)
        assert outcome.sums[1] == (truth == prediction).sum()
        assert all(
            g["lr"] == pytest.approx(float(THEIRS[f"lr/{itr}"]), rel=1.2e-7) for g in learner.optimizer.param_groups
        )
        parameters = [learner.model.get_parameter(names[n]) for n in ABOUT["config"]["names"]]
        velocities = [learner.optimizer.momentum(p) for p in parameters]
        for i, (p, v) in enumerate(zip(parameters, velocities, strict=True)):
            check("norms", p.norm(), THEIRS[f"norms/{itr}"][i])
            check("momentum_norms", v.norm(), THEIRS[f"momentum_norms/{itr}"][i])
    for name, theirs in _their_tree("params/5/").items():
        check(f"params {name}", learner.model.get_parameter(names[name]), theirs)
    for name, theirs in _their_tree("ema/5/").items():
        check(f"ema {name}", learner.ema.module.get_parameter(names[name]), theirs)
    for name, theirs in _their_tree("momentum/5/").items():
        check(f"momentum {name}", learner.optimizer.momentum(learner.model.get_parameter(names[name])), theirs)


def test_five_steps_equal_the_authors_run() -> None:
    """Loss, learning rate, every weight, average and momentum; measured 1e-7, 3e-7, 3e-7 and 3e-6 at worst."""
    assert len(_their_tree("params/5/")) == len(list(authors_learner().model.parameters()))
    follow_the_authors(authors_learner())


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_five_accumulated_steps_equal_the_authors_run(micro_batch: int) -> None:
    """The same in parts, which must not clip each part or weigh them differently."""
    learner = authors_learner()
    learner.micro_batch = micro_batch
    follow_the_authors(learner)


class _DecayFirst(AGCSGD):
    """Weight decay before the clipping."""

    def _clipped(self, group: dict[str, Any], *tensors: Any) -> Any:
        for p in group["params"]:
            p.grad.add_(p, alpha=group["weight_decay"])
        return super()._clipped(group, *tensors)

    def _move(self, group: dict[str, Any], *tensors: Any) -> None:
        super()._move(group | {"weight_decay": 0.0}, *tensors)


class _DecoupledDecay(AGCSGD):
    def _move(self, group: dict[str, Any], *tensors: Any) -> None:
        for p in group["params"]:
            p.mul_(1 - group["lr"] * group["weight_decay"])
        super()._move(group | {"weight_decay": 0.0}, *tensors)


class _LateSchedule(WarmupCosine):
    def __call__(self, step: int) -> float:
        return super().__call__(step + 1)


class _LateAverage(EMA):
    def decay_at(self, update: int) -> float:
        return super().decay_at(update + 1)


class _PlainAverage(EMA):
    def decay_at(self, update: int) -> float:
        return self.decay


def _decay_everything(_: pytest.MonkeyPatch) -> Learner:
    learner = authors_learner()
    for group in learner.optimizer.param_groups:
        group["weight_decay"] = 2e-5
    return learner


def _clip_the_classifier(_: pytest.MonkeyPatch) -> Learner:
    learner = authors_learner()
    (group,) = [g for g in learner.optimizer.param_groups if g["clipping"] is None]
    group["clipping"] = 0.01
    return learner


def _biases_by_element(monkeypatch: pytest.MonkeyPatch) -> Learner:
    plain = agc.unit_norms
    monkeypatch.setattr(agc, "unit_norms", lambda x, *a: x.abs() if x.ndim == 1 else plain(x, *a))
    return authors_learner()


def _whole_tensors_clipped(monkeypatch: pytest.MonkeyPatch) -> Learner:
    monkeypatch.setattr(agc, "unit_norms", lambda x, *_: x.norm().view([1] * x.ndim))
    return authors_learner()


def _hard_targets(monkeypatch: pytest.MonkeyPatch) -> Learner:
    def losses(logits: Tensor, targets: Tensor, *rest: Any) -> Tensor:
        return sample_losses(logits, targets.argmax(1), *rest)

    monkeypatch.setattr(step_module, "sample_losses", losses)
    return authors_learner()


def _average_before_the_step(_: pytest.MonkeyPatch) -> Learner:
    learner = authors_learner()
    update = learner.ema.update
    learner.optimizer.register_step_pre_hook(lambda *_: update(learner.model))
    learner.ema.update = lambda model: None  # type: ignore[method-assign]
    return learner


MUTATIONS: dict[str, Callable[[pytest.MonkeyPatch], Learner]] = {
    "decay on gains": _decay_everything,
    "classifier clipped": _clip_the_classifier,
    "biases clipped by element": _biases_by_element,
    "one unit a tensor": _whole_tensors_clipped,
    "decay before clipping": lambda _: authors_learner(sgd=_DecayFirst),
    "decoupled decay": lambda _: authors_learner(sgd=_DecoupledDecay),
    "schedule off by one": lambda _: authors_learner(schedule=_LateSchedule),
    "average off by one": lambda _: authors_learner(average=_LateAverage),
    "average without warm-up": lambda _: authors_learner(average=_PlainAverage),
    "average before the step": _average_before_the_step,
    "no smoothing": lambda _: authors_learner(smoothing=0.0),
    "no Nesterov": lambda _: authors_learner(nesterov=False),
    "a larger eps": lambda _: authors_learner(eps=1.0),
    "labels not mixed": _hard_targets,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_authors_run_tells_wrong_rules(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each near miss of the rules fails the comparison."""
    learner = MUTATIONS[mutation](monkeypatch)
    with pytest.raises(AssertionError):
        follow_the_authors(learner)


# Accumulation


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("micro_batch", [1, 3, 5, 8, 100])
def test_the_parts_of_a_batch_add_up(micro_batch: int) -> None:
    """Three steps in parts are three whole ones, to 1e-10 in float64; masks are by slot, clipping and step once."""
    whole, parts = (in_float64(a_learner()) for _ in range(2))
    parts.micro_batch = micro_batch
    sizes: list[int] = []
    calls: list[int] = []
    parts.model.register_forward_pre_hook(lambda _, x: sizes.append(len(x[0])))
    parts.optimizer.register_step_post_hook(lambda *_: calls.append(1))
    for taken in range(3):
        a, b = (learner.step(a_batch(taken), taken, taken) for learner in (whole, parts))
        torch.testing.assert_close(a.sums, b.sums, rtol=1e-12, atol=0)
        assert 0 < a.sums[2] < a.sums[3]
    assert distance(copies(parts), copies(whole)) < 1e-10
    assert len(calls) == 3
    assert sum(sizes) == 3 * 8
    assert max(sizes) == min(micro_batch, 8)
    assert whole.clipped_shares() == parts.clipped_shares()


def test_going_back_forgets_what_came_later() -> None:
    """Momentum that was not there yet is not there again."""
    learner, other = a_learner(), a_learner()
    before = {name: tensor.clone() for name, tensor in learner.tensors().items()}
    learner.step(a_batch(0), 0, 0)
    learner.load_tensors(before, 0)
    assert learner.tensors().keys() == before.keys()
    for each in (learner, other):
        each.step(a_batch(1), 1, 1)
    assert all(torch.equal(a, b) for a, b in zip(learner.tensors().values(), other.tensors().values(), strict=True))


@pytest.mark.parametrize(("micro_batch", "sam_rho", "passes"), [(8, 0.0, 1), (3, 0.0, 1), (1, 0.0, 1), (3, 0.05, 2)])
def test_weights_are_standardised_once_for_all_parts(
    micro_batch: int, sam_rho: float, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once more at the point of SAM; nothing of it is left behind the step, nor where a pass fails."""
    learner, calls = a_learner(micro_batch=micro_batch, sam_rho=sam_rho), []
    convolutions = [m for m in learner.model.modules() if isinstance(m, WSConv2d)]

    def counted(weight: Tensor, *arguments: Any) -> Tensor:
        calls.append(weight)
        return standardize(weight, *arguments)

    monkeypatch.setattr(conv_module, "standardize", counted)
    learner.step(a_batch(0), 0, 0)
    assert len(calls) == passes * len(convolutions)
    broken = learner.model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        learner.step(a_batch(1), 1, 1)
    broken.remove()
    assert all(m._standardized is None for m in convolutions)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("change", [{"masks": False}, {"seed": 4}])
def test_masks_matter_in_the_above(change: dict[str, Any]) -> None:
    """Without masks, or with those of another seed (and the same weights), the step is another one."""
    one, other = in_float64(a_learner()), in_float64(a_learner(**change))
    other.model.load_state_dict(one.model.state_dict())
    advance(one, 1)
    advance(other, 1)
    momentum = [{n: t for n, t in copies(x).items() if n.startswith("momentum")} for x in (one, other)]
    assert distance(*momentum) > 0.01


def test_masks_are_drawn_by_batches_taken_and_the_rate_by_steps_applied() -> None:
    """A skipped step moves on to new masks, but not the learning rate."""
    learner = a_learner()
    seen: list[Any] = []
    learner.model.register_forward_pre_hook(lambda _, x: seen.append(x[1]))
    for taken, applied in ((0, 0), (0, 0), (1, 0), (1, 5)):
        learner.step(a_batch(), taken, applied)
        assert learner.optimizer.param_groups[0]["lr"] == learner.schedule(applied)
    assert torch.equal(seen[0].dropout, seen[1].dropout)
    assert torch.equal(seen[0].keep, seen[1].keep)
    assert not torch.equal(seen[1].dropout, seen[2].dropout)
    assert torch.equal(seen[2].dropout, seen[3].dropout)
    assert not torch.equal(seen[0].dropout[0], seen[0].dropout[1])  # slots differ


@pytest.mark.usefixtures("float64")
def test_masks_of_a_slot_do_not_depend_on_the_batch_size() -> None:
    """The first three of eight are those of a batch of three."""
    learner = a_learner()
    few, many = learner._draws(7, 3), learner._draws(7, 8)
    for a, b in zip(few, many, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b[:3])


@pytest.mark.parametrize("block", [0, 1, 2])
def test_each_block_has_its_own_mask(block: int) -> None:
    """Skipping a block is as a gain of 0 there; the first is never skipped."""
    model = a_learner().model
    keep = torch.ones(4, 3)
    keep[:, block] = 0
    x = a_batch(0, 4).images
    skipped, whole = model(x, Draws(keep)), model(x, Draws(torch.ones(4, 3)))
    assert torch.equal(skipped, whole) == (block == 0)
    if block:
        nn.init.zeros_(model.get_parameter(f"blocks.{block}.skip.skip_gain"))
        assert torch.equal(skipped, model(x, Draws()))


# SAM


def _slots_loss(learner: Learner, model: Network, batch: Batch, slots: list[int], taken: int) -> Tensor:
    """The sum of the losses of some slots, with their masks."""
    o = learner.run.optim
    draws = learner._draws(taken, len(batch.labels))
    chosen = Draws(*(None if d is None else d[slots] for d in draws))
    logits = model(learner.preprocessing.normalize(batch.images[slots], torch.float64), chosen)
    return F.cross_entropy(logits, batch.labels[slots], reduction="sum", label_smoothing=o.label_smoothing)


def plain_sam_gradient(learner: Learner, batch: Batch, taken: int) -> list[Tensor]:
    """By a copy of the network for each shard."""
    o, n = learner.run.optim, len(batch.labels)
    shards = min(o.sam_shards, n)
    total = [torch.zeros_like(p) for p in learner.model.parameters()]
    for s in range(shards):
        slots = list(range(s * n // shards, (s + 1) * n // shards))
        few = slots[:: o.sam_every]
        there = copy.deepcopy(learner.model)
        parameters = list(there.parameters())
        up = torch.autograd.grad(_slots_loss(learner, there, batch, few, taken) / len(few), parameters)
        norm = sum(float(g.square().sum()) for g in up) ** 0.5
        with torch.no_grad():
            for p, g in zip(parameters, up, strict=True):
                p.add_(o.sam_rho * g / norm)
        down = torch.autograd.grad(_slots_loss(learner, there, batch, slots, taken) / n, parameters)
        total = [t + g for t, g in zip(total, down, strict=True)]
    return total


SAM_CASES = [  # every, shards, micro_batch, images
    (1, 1, None, 8),
    (5, 1, None, 12),
    (1, 2, 3, 8),
    (5, 2, None, 12),
    (5, 4, 2, 12),
    (2, 4, 1, 11),  # uneven shards: 2, 3, 3, 3
    (5, 8, None, 3),  # more shards than images
    (100, 2, 2, 8),
]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("every", "shards", "micro_batch", "n"), SAM_CASES)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_sam_equals_a_plain_reference(
    every: int, shards: int, micro_batch: int | None, n: int, smoothing: float
) -> None:
    """Two steps against copies of the network, with masks; momentum too, so that it never saw an ascent."""
    sam: dict[str, Any] = {"sam_rho": 0.3, "sam_every": every, "sam_shards": shards}
    learner = in_float64(a_learner(micro_batch=micro_batch, label_smoothing=smoothing, **sam))
    plain = in_float64(a_learner(label_smoothing=smoothing, **sam))
    start = {n: p.detach().clone() for n, p in learner.model.named_parameters()}
    for taken in range(2):
        batch = a_batch(taken, n)
        learner.step(batch, taken, taken + 1)
        for p, g in zip(plain.model.parameters(), plain_sam_gradient(plain, batch, taken), strict=True):
            p.grad = g
        for group in plain.optimizer.param_groups:
            group["lr"] = plain.schedule(taken + 1)
        plain.optimizer.step()
        plain.ema.update(plain.model)
        assert distance(copies(learner), copies(plain)) < 1e-9
    moved = distance({n: p.detach() for n, p in learner.model.named_parameters()}, start)
    assert moved > 1e-3


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("change", [{"sam_rho": 0.0}, {"sam_every": 1}, {"sam_shards": 2}, {"sam_rho": 0.31}])
def test_each_setting_of_sam_matters(change: dict[str, Any]) -> None:
    """The comparison above would tell one from another."""
    sam: dict[str, Any] = {"sam_rho": 0.3, "sam_every": 5, "sam_shards": 1}
    one, other = (in_float64(a_learner(**s)) for s in (sam, sam | change))
    advance(one, 1)
    advance(other, 1)
    assert distance(copies(one), copies(other)) > 1e-6


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sam_puts_the_weights_back_to_the_bit(precision: str) -> None:
    """At learning rate 0, that of the first step, nothing has moved, though the descent was elsewhere."""
    learner = a_learner(sam_rho=0.3, sam_every=2, sam_shards=2, precision=precision)
    before = {n: p.detach().clone() for n, p in learner.model.named_parameters()}
    away: list[bool] = []
    fc = learner.model.fc.weight
    learner.model.register_forward_pre_hook(lambda *_: away.append(not torch.equal(fc, before["fc.weight"])))
    assert learner.schedule(0) == 0.0
    learner.step(a_batch(), 0, 0)
    assert away == [False, True, False, True]
    assert all(torch.equal(p, before[n]) for n, p in learner.model.named_parameters())


# Precision


def with_scale(learner: Learner, scale: float) -> torch.amp.GradScaler:
    """Another loss scale at the start."""
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return learner.scaler


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"sam_rho": 0.3},
        {"kind": "norm"},
        {"kind": "adamw"},
        {"kind": "lars"},
        {"name": "bn_nfnet_f0"},
        {"name": "bn_nfnet_f0", "sam_rho": 0.3, "micro_batch": 4},
    ],
)
def test_an_overflow_in_float16_is_skipped(change: dict[str, Any]) -> None:
    """Weights, batch norm's averages, momentum and average stay to the bit, the scale halves, no unit is counted."""
    learner = a_learner(precision="fp16", **change)
    with_scale(learner, 16.0)
    applied = advance(learner, 2)
    assert applied == 2
    counts = learner.clipped_units()
    scaler = with_scale(learner, 2.0**40)
    before, updates = copies(learner), learner.ema.updates
    outcome = learner.step(a_batch(2), 2, applied)
    assert not outcome.applied
    assert "sam_rho" in change or outcome.sums.isfinite().all()  # the descent of an ascent that overflowed is lost
    assert outcome.sums[2:].tolist() == [0, 0]
    assert scaler.get_scale() == 2.0**39
    assert learner.ema.updates == updates
    assert learner.clipped_units() == counts
    assert equal(copies(learner), before)
    with_scale(learner, 16.0)
    assert learner.step(a_batch(2), 3, applied).applied
    assert all(t.isfinite().all() for t in learner.tensors().values())


def test_float16_finds_its_scale_and_then_trains() -> None:
    """From far too large a scale, halving at each batch; afterwards it is as if it had started with the right one."""
    learner = a_learner(precision="fp16", masks=False)
    scaler = with_scale(learner, 2.0**40)
    taken = 0
    while not learner.step(a_batch(0), taken, 0).applied:
        taken += 1
    assert 5 < taken < 40
    assert scaler.get_scale() == 2.0 ** (40 - taken)
    other = a_learner(precision="fp16", masks=False)
    with_scale(other, scaler.get_scale())
    other.step(a_batch(0), 0, 0)
    assert equal(copies(learner), copies(other))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_low_precision_is_near_float32(precision: str) -> None:
    """Three steps; the movement of the weights agrees to the precision of the maps."""
    full, low = a_learner(), a_learner(precision=precision)
    start = {n: p.detach().clone() for n, p in full.model.named_parameters()}
    assert low.scaler is None or precision == "fp16"
    if precision == "fp16":
        with_scale(low, 256.0)
    for taken in range(3):
        a, b = (learner.step(a_batch(taken), taken, taken) for learner in (full, low))
        assert b.applied
        assert float(b.sums[0]) == pytest.approx(float(a.sums[0]), rel=0.02)
    names = [n for n, _ in full.model.named_parameters()]
    moved = [torch.cat([(x.model.get_parameter(n) - start[n]).flatten() for n in names]) for x in (full, low)]
    tolerance = {"fp16": 0.005, "bf16": 0.04}[precision]
    assert 0 < (moved[0] - moved[1]).norm() < tolerance * moved[0].norm()


@pytest.mark.parametrize("kind", ["agc", "sgd", "norm", "lars", "adamw"])
@pytest.mark.parametrize("sam_rho", [0.0, 0.3])
def test_the_loss_scale_leaves_no_trace(kind: str, sam_rho: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are unscaled before they are clipped: with maps in float32 any power of two gives the same bits.

    But for SAM's ascent, whose division by the norm is not exact.
    """
    plain = a_learner(kind=kind, sam_rho=sam_rho)
    outcomes = [plain.step(a_batch(t), t, t + 1) for t in range(2)]
    shares = plain.clipped_shares()
    monkeypatch.setitem(step_module.PRECISIONS, "fp16", torch.float32)
    for scale in (2.0**-10, 1.0, 2.0**16):
        scaled = a_learner(kind=kind, sam_rho=sam_rho, precision="fp16")
        with_scale(scaled, scale)
        for t in range(2):
            outcome = scaled.step(a_batch(t), t, t + 1)
            assert outcome.applied
            torch.testing.assert_close(outcome.sums, outcomes[t].sums, rtol=1e-6 if sam_rho else 0, atol=0)
        if sam_rho:
            assert distance(copies(scaled), copies(plain)) < 1e-3
        else:
            assert equal(copies(scaled), copies(plain))
            assert scaled.clipped_shares() == shares


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_weights_gradients_and_momentum_are_float32(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps have the low precision; logits and losses are float32."""
    learner = a_learner(precision=precision)
    if precision == "fp16":
        with_scale(learner, 16.0)
    kinds: dict[str, set[torch.dtype]] = {"maps": set(), "logits": set(), "losses": set()}
    for block in learner.model.blocks:
        block.register_forward_hook(lambda _m, _x, y: kinds["maps"].add(y.dtype))
    learner.model.register_forward_hook(lambda _m, _x, y: kinds["logits"].add(y.dtype))

    def losses(*arguments: Any) -> Tensor:
        found = sample_losses(*arguments)
        kinds["losses"].add(found.dtype)
        return found

    monkeypatch.setattr(step_module, "sample_losses", losses)
    advance(learner, 2)
    low = step_module.PRECISIONS[precision]
    assert kinds == {"maps": {low}, "logits": {torch.float32}, "losses": {torch.float32}}
    assert {t.dtype for t in learner.tensors().values()} == {torch.float32}
    assert {None if p.grad is None else p.grad.dtype for p in learner.model.parameters()} == {torch.float32}


# Computing maps again


@pytest.mark.parametrize("remat", ["block", "stage"])
@pytest.mark.parametrize("name", ["nfnet_tiny", "nf_resnet50"])
def test_maps_computed_again_are_the_same(name: str, remat: str) -> None:
    """Three steps with masks, bit for bit; and blocks really run twice."""
    plain, again = a_learner(name=name), a_learner(name=name, remat=remat)
    calls = [0, 0]

    def count(which: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[which] += 1

        return hook

    for which, learner in enumerate((plain, again)):
        learner.model.blocks[0].register_forward_pre_hook(count(which))
        advance(learner, 3)
    assert calls == [3, 6]
    assert equal(copies(plain), copies(again))


@pytest.mark.parametrize("remat", ["block", "stage"])
def test_maps_computed_again_with_batch_norm_give_the_same_weights(remat: str) -> None:
    """Weights, momentum and the average of the weights; the running statistics are the next test's."""
    plain, again = (copies(_stepped(remat=r)) for r in ("none", remat))
    weights = [n for n in plain if "running" not in n and "tracked" not in n]
    assert all(torch.equal(plain[n], again[n]) for n in weights)


def test_batch_norm_is_not_computed_again() -> None:
    """Its running statistics would move twice a step: refused before the run begins."""
    given = Given({"train.remat": "block", "model.name": "bn_nfnet_f0"})
    images = SyntheticSource(1000, 10)
    run = RECIPES["digits"](given, images)
    with pytest.raises(UserError, match="running statistics"):
        check_run(run, images)


def _stepped(**changes: Any) -> Learner:
    learner = a_learner(name="bn_nfnet_f0", **changes)
    advance(learner, 3)
    return learner


# Memory


def too_many(limit: int, error: Exception) -> Callable[..., None]:
    """A hook that fails where more images come at once."""

    def hook(_: nn.Module, x: tuple[Any, ...]) -> None:
        if len(x[0]) > limit:
            raise error

    return hook


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu"])
@pytest.mark.parametrize("change", [{}, {"sam_rho": 0.3}, {"sam_rho": 0.3, "sam_shards": 2}, {"kind": "adamw"}])
def test_half_as_many_images_at_once_until_they_fit(error: Exception, change: dict[str, Any]) -> None:
    """Two steps are as those with that micro-batch to the bit, and it stays."""
    learner, expected = a_learner(**change), a_learner(micro_batch=4, **change)
    learner.model.register_forward_pre_hook(too_many(4, error))
    for taken in range(2):
        a, b = (x.step(a_batch(taken, 16), taken, taken + 1) for x in (learner, expected))
        assert torch.equal(a.sums, b.sums)
    assert learner.micro_batch == 4
    assert equal(copies(learner), copies(expected))


@pytest.mark.parametrize(("n", "limit", "expected"), [(7, 2, 1), (7, 3, 3), (13, 4, 3), (6, 1, 1), (16, 15, 8)])
def test_halving_rounds_down(n: int, limit: int, expected: int) -> None:
    """Of the batch, not of a larger micro-batch."""
    learner = a_learner(micro_batch=100)
    learner.model.register_forward_pre_hook(too_many(limit, OUT_OF_MEMORY[0]))
    learner.step(a_batch(0, n), 0, 1)
    assert learner.micro_batch == expected


def test_gradients_of_the_parts_that_fitted_are_forgotten() -> None:
    """Memory runs out in the backward pass of the second of four parts."""
    learner, expected = a_learner(micro_batch=4), a_learner(micro_batch=2)
    calls: list[int] = []

    def fail(gradient: Tensor) -> None:
        calls.append(len(gradient))
        if len(calls) == 2:
            raise OUT_OF_MEMORY[0]

    learner.model.register_forward_hook(lambda _m, _x, y: y.register_hook(fail) and None)
    for x in (learner, expected):
        x.step(a_batch(0, 16), 0, 1)
    assert calls == [4, 4, *[2] * 8]
    assert equal(copies(learner), copies(expected))


def test_weights_are_back_before_the_step_is_tried_again() -> None:
    """With SAM, memory runs out in the middle of a descent, when the weights are away."""
    change: dict[str, Any] = {"sam_rho": 0.3, "sam_shards": 2, "sam_every": 4}
    learner, expected = a_learner(**change), a_learner(micro_batch=4, **change)
    assert learner.sam is not None
    seen: list[tuple[int, bool]] = []
    first = learner.model.fc.weight.detach().clone()

    def look(_: nn.Module, x: tuple[Any, ...]) -> None:
        seen.append((len(x[0]), torch.equal(learner.model.fc.weight, first)))
        if len(seen) == 4:  # ascent 4, descent 16, ascent 4, descent 16
            raise OUT_OF_MEMORY[0]

    learner.model.register_forward_pre_hook(look)
    learner.micro_batch = 8
    expected_steps = [x.step(a_batch(0, 16), 0, 1) for x in (learner, expected)]
    assert torch.equal(expected_steps[0].sums, expected_steps[1].sums)
    assert seen[:4] == [(2, True), (8, False), (2, True), (8, False)]
    assert seen[4:] == [(2, True), (4, False), (4, False)] * 2
    assert equal(copies(learner), copies(expected))


def test_memory_that_runs_out_between_ascent_and_descent() -> None:
    """When the weights have been copied and are about to move."""
    change: dict[str, Any] = {"sam_rho": 0.3, "sam_every": 1}
    learner, expected = a_learner(**change), a_learner(micro_batch=4, **change)
    sam, calls = learner.sam, []
    assert sam is not None
    climb = sam._climb

    def fail() -> None:
        climb()
        calls.append(1)
        if len(calls) == 1:
            raise OUT_OF_MEMORY[0]

    sam._climb = fail  # type: ignore[method-assign]
    for x in (learner, expected):
        x.step(a_batch(), 0, 1)
    assert (len(calls), learner.micro_batch) == (2, 4)
    assert equal(copies(learner), copies(expected))


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu"])
@pytest.mark.parametrize("change", [{}, {"sam_rho": 0.3}])
def test_where_one_image_does_not_fit_the_error_passes_through(error: Exception, change: dict[str, Any]) -> None:
    """After halving down to 1; the weights are what they were."""
    learner = a_learner(**change)
    before = copies(learner)

    def fail(*_: Any) -> None:
        if learner.sam is None or learner.sam._saved:
            raise error

    learner.model.register_forward_pre_hook(fail)
    with pytest.raises(type(error), match="memory"):
        learner.step(a_batch(), 0, 1)
    assert learner.micro_batch == 1
    assert equal(copies(learner), before)


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_a_batch_of_one_image_cannot_be_halved(micro_batch: int | None) -> None:
    """The error passes at once, and the next batch is not split for it."""
    learner = a_learner(micro_batch=micro_batch)
    learner.model.register_forward_pre_hook(too_many(0, OUT_OF_MEMORY[0]))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        learner.step(a_batch(0, 1), 0, 1)
    assert learner.micro_batch == micro_batch


@pytest.mark.parametrize("change", [{}, {"sam_rho": 0.3}])
def test_other_errors_pass_through_at_once(change: dict[str, Any]) -> None:
    """No halving, no second try; with SAM the weights are back."""
    learner = a_learner(**change)
    before = copies(learner)
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if learner.sam is None or learner.sam._saved:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    learner.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="mat1"):
        learner.step(a_batch(), 0, 1)
    assert len(calls) == (2 if change else 1)
    assert learner.micro_batch is None
    assert equal(copies(learner), before)


def test_running_statistics_of_a_failed_step_are_forgotten() -> None:
    """Memory runs out behind the first norms."""
    learner, expected = a_learner(name="bn_nfnet_f0"), a_learner(name="bn_nfnet_f0", micro_batch=4)
    learner.model.blocks[-1].register_forward_pre_hook(too_many(4, OUT_OF_MEMORY[0]))
    for x in (learner, expected):
        x.step(a_batch(), 0, 1)
    assert equal(copies(learner), copies(expected))


def test_an_update_is_never_done_twice() -> None:
    """Memory runs out inside of the optimizer, behind its first group: the error passes, or the step is right."""
    learner, expected = a_learner(), a_learner(micro_batch=4)
    assert isinstance(learner.optimizer, AGCSGD)
    move, calls = learner.optimizer._move, []

    def fail(*group: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OUT_OF_MEMORY[0]
        move(*group)

    learner.optimizer._move = fail  # type: ignore[method-assign, assignment]
    try:
        learner.step(a_batch(), 0, 1)
    except torch.cuda.OutOfMemoryError:
        return
    expected.step(a_batch(), 0, 1)
    assert distance(copies(learner), copies(expected)) < 1e-3


# What is not finite


@pytest.mark.parametrize("kind", ["agc", "sgd", "norm", "lars", "adamw"])
@pytest.mark.parametrize("sam", [0.0, 0.05])
def test_a_step_that_is_not_finite_is_left_out(kind: str, sam: float) -> None:
    """Of a batch with an infinite pixel: nothing moves, and the next step is as ever."""
    learner, twin = (a_learner(kind=kind, sam_rho=sam) for _ in range(2))
    for x in (learner, twin):
        advance(x, 2)
    before, batch = copies(learner), a_batch(2)
    batch.images[0, 0, 0, 0] = float("inf")
    assert not learner.step(batch, 2, 2).applied
    assert equal(copies(learner), before)
    assert learner.ema.updates == twin.ema.updates
    for x in (learner, twin):
        assert x.step(a_batch(3), 3, 2).applied
    assert equal(copies(learner), copies(twin))


def test_a_loss_that_is_not_finite_is_left_out_though_its_gradient_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of an infinite loss can be finite, as here: it would pass every look at the gradients alone."""
    infinite = torch.tensor(float("inf"))
    monkeypatch.setattr(step_module, "sample_losses", lambda *a: sample_losses(*a) + infinite)
    learner = a_learner()
    before = copies(learner)
    assert not learner.step(a_batch(), 0, 1).applied
    assert equal(copies(learner), before)


def test_an_overflow_in_sams_ascent_leaves_batch_norm_alone() -> None:
    """The descent then runs on weights that are not finite; the running statistics must not become so."""
    learner = a_learner(name="bn_nfnet_f0", precision="fp16", sam_rho=0.3)
    with_scale(learner, 2.0**40)
    assert not learner.step(a_batch(), 0, 1).applied
    assert all(t.isfinite().all() for t in learner.model.state_dict().values())


def test_a_step_that_float16_skipped_is_never_called_applied() -> None:
    """However often the scale was halved before, as by images that are not finite."""
    learner = a_learner(precision="fp16")
    with_scale(learner, 2.0**-149)
    batch = a_batch()
    batch.images[0, 0, 0, 0] = float("nan")
    assert not learner.step(batch, 0, 0).applied
    assert not learner.step(batch, 1, 0).applied


# The loss


def plain_loss(logits: Tensor, targets: Tensor, kind: str, smoothing: float, weights: Tensor | None) -> Tensor:
    """In float64, by logarithms of probabilities, a number at a time."""
    n, classes = logits.shape
    out = torch.zeros(n, dtype=torch.float64)
    for i in range(n):
        row = logits[i].double()
        p = torch.exp(row) / torch.exp(row).sum() if kind == "softmax" else 1 / (1 + torch.exp(-row))
        for c in range(classes):
            t = float(targets[i] == c) if targets.ndim == 1 else float(targets[i, c])
            t = (1 - smoothing) * t + smoothing / (classes if kind == "softmax" else 2)
            term = -t * p[c].log() if kind == "softmax" else -t * p[c].log() - (1 - t) * (1 - p[c]).log()
            out[i] += term if weights is None else term * weights[c]
    return out


def targets_of(kind: str, n: int, classes: int, generator: torch.Generator) -> Tensor:
    if kind == "hard":
        return torch.randint(classes, (n,), generator=generator)
    shares = torch.rand(n, classes, generator=generator)
    return (shares > 0.5).long() if kind == "several" else shares / shares.sum(1, keepdim=True)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(["softmax", "sigmoid"]),
    st.sampled_from(["hard", "soft", "several"]),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.booleans(),
    st.integers(1, 6),
    st.integers(0, 1000),
)
def test_the_loss_is_the_formula(kind: str, of: str, smoothing: float, weighted: bool, classes: int, seed: int) -> None:
    """Softmax and sigmoid; class indices, shares and several ones; smoothing; weights of classes."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(4, classes, generator=generator)
    targets = targets_of(of, 4, classes, generator)
    weights = 2 * torch.rand(classes, generator=generator) if weighted else None
    ours = sample_losses(logits, targets, kind, smoothing, weights)
    assert ours.dtype == torch.float32
    expected = plain_loss(logits, targets, kind, smoothing, weights)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("of", ["hard", "soft", "several"])
@pytest.mark.parametrize("kind", LOSSES)
def test_float64_stays_float64(kind: str, of: str, weighted: bool) -> None:
    """The formula to 1e-13, and the type of its gradient."""
    generator = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(6, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    targets = targets_of(of, 6, 5, generator)
    targets = targets.double() if of == "soft" else targets
    weights = torch.rand(5, generator=generator).double() if weighted else None
    ours = sample_losses(logits, targets, kind, 0.1, weights)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, plain_loss(logits, targets, kind, 0.1, weights), rtol=1e-13, atol=1e-13)
    assert torch.autograd.grad(ours.sum(), logits)[0].dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_probabilities_are_those_that_the_loss_takes_logits_for(dtype: torch.dtype) -> None:
    """-log of the true class is the loss; in float64, of one image and of many; the sigmoid's do not sum to 1."""
    logits = (3 * torch.randn(6, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).to(dtype)
    x, truth = logits.double(), torch.arange(6) % 5
    softmax, sigmoid = probabilities(logits), probabilities(logits, "sigmoid")
    assert softmax.dtype == sigmoid.dtype == torch.float64
    torch.testing.assert_close(softmax, x.exp() / x.exp().sum(1, keepdim=True), rtol=1e-13, atol=0)
    torch.testing.assert_close(sigmoid, 1 / (1 + (-x).exp()), rtol=1e-13, atol=0)
    torch.testing.assert_close(-softmax[range(6), truth].log(), sample_losses(x, truth), rtol=1e-12, atol=0)
    one = F.one_hot(truth, 5).double()
    binary = -(one * sigmoid.log() + (1 - one) * (1 - sigmoid).log()).sum(1)
    torch.testing.assert_close(binary, sample_losses(x, truth, "sigmoid"), rtol=1e-10, atol=0)
    for kind, many in zip(LOSSES, (softmax, sigmoid), strict=True):
        torch.testing.assert_close(probabilities(logits[2], kind), many[2], rtol=1e-15, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("of", ["hard", "soft"])
def test_the_loss_is_torchs_where_that_has_it(of: str, weighted: bool, smoothing: float) -> None:
    """Cross-entropy, values and gradients."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 7, generator=generator, requires_grad=True)
    targets = targets_of(of, 6, 7, generator)
    weights = torch.rand(7, generator=generator) if weighted else None
    ours = sample_losses(logits, targets, "softmax", smoothing, weights)
    theirs = F.cross_entropy(logits, targets, weights, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_loss_survives_extreme_logits(kind: str) -> None:
    """Up to 1e4, and beyond float16 in low precision: finite values and gradients, float32."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], dtype=dtype, requires_grad=True)
        loss = sample_losses(logits, torch.tensor([1, 0]), kind, 0.1)
        assert loss.dtype == torch.float32
        loss.sum().backward()
        assert loss.isfinite().all()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_is_computed_in_float32(kind: str, dtype: torch.dtype) -> None:
    """Whatever the logits are."""
    logits = torch.randn(8, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    targets = torch.arange(8)
    assert torch.equal(sample_losses(logits, targets, kind, 0.1), sample_losses(logits.float(), targets, kind, 0.1))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(5, 7))
def test_balanced_weights_make_classes_count_alike(labels: list[int], classes: int) -> None:
    """Each class that occurs has the same sum of weights; their mean over the samples is 1; all are finite."""
    y = torch.tensor(labels)
    weights = balanced_weights(y, classes)
    assert weights.shape == (classes,)
    assert weights.isfinite().all()
    sums = [float(weights[y[y == c]].sum()) for c in set(labels)]
    assert sums == pytest.approx([len(labels) / len(sums)] * len(sums))
    assert float(weights[y].mean()) == pytest.approx(1.0)


def test_hits_by_hand() -> None:
    """By class index, and by the greatest share."""
    logits = torch.tensor([[0.1, 0.9, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 5.0]])
    assert hits(logits, torch.tensor([1, 1, 2])) == 2
    shares = torch.tensor([[0.3, 0.7, 0.0], [0.6, 0.4, 0.0], [0.5, 0.3, 0.2]])
    assert hits(logits, shares) == 2
    assert hits(logits.bfloat16(), shares).ndim == 0


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_the_step_uses_the_settings_of_the_loss(loss: str) -> None:
    """Kind, smoothing and weights of classes: the sum that it reports, and the gradient of the classifier's bias."""
    learner = a_learner(masks=False, loss=loss, label_smoothing=0.2, kind="sgd", weight_decay=0.0)
    learner.class_weights = torch.tensor([0.5, 1.0, 2.0, 1.5, 0.0])
    batch = a_batch()
    model = copy.deepcopy(learner.model)
    expected = sample_losses(model(batch.images), batch.labels, loss, 0.2, learner.class_weights)
    (gradient,) = torch.autograd.grad(expected.mean(), [model.fc.bias])
    expected = expected.detach()
    outcome = learner.step(batch, 0, 0)
    assert float(outcome.sums[0]) == pytest.approx(float(expected.sum()), rel=1e-5)
    torch.testing.assert_close(learner.optimizer.state[learner.model.fc.bias]["momentum_buffer"], gradient)


# Other optimizers, and going on


@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_lars_is_the_formula(decay: float, momentum: float) -> None:
    """Four steps in float64: ratios of lengths for tensors, plain momentum for vectors, with decay and without.

    A vector is what is one once its ones are squeezed out. Weights and gradients of zeros are no trap.
    """
    torch.manual_seed(0)
    shapes = {(4, 3): True, (2, 3, 1, 1): True, (2, 3, 3, 3): True, (2, 2): True}
    shapes |= dict.fromkeys(((5,), (1, 7), (6, 1, 1), (1,)), False)  # whether the ratio of lengths is kept
    starts = {shape: torch.randn(shape, dtype=torch.float64) for shape in shapes}
    starts[2, 2].zero_()
    ours = {shape: nn.Parameter(w.clone()) for shape, w in starts.items()}
    optimizer = LARS(ours.values(), lr=0.5, momentum=momentum, weight_decay=decay, trust=0.02)
    plain = {shape: w.clone() for shape, w in starts.items()}
    velocities = {shape: torch.zeros_like(w) for shape, w in starts.items()}
    for step in range(4):
        lr = optimizer.param_groups[0]["lr"] = 0.5 / (1 + step)
        for shape, adapted in shapes.items():
            raw = torch.randn(shape, dtype=torch.float64) * (step != 2)
            ours[shape].grad = raw.clone()
            g = raw + decay * plain[shape]
            if adapted and float(plain[shape].norm()) > 0 and float(g.norm()) > 0:
                g = g * 0.02 * plain[shape].norm() / g.norm()
            velocities[shape] = momentum * velocities[shape] + lr * g
            plain[shape] = plain[shape] - velocities[shape]
        optimizer.step()
        for shape, w in plain.items():
            torch.testing.assert_close(ours[shape].detach(), w, rtol=1e-12, atol=1e-14)
    assert all(p.isfinite().all() for p in ours.values())
    with pytest.raises(ValueError, match="out of range"):
        LARS(ours.values(), lr=0.1, trust=0.0)


@pytest.mark.parametrize("kind", ["agc", "sgd", "norm", "lars", "adamw"])
def test_every_kind_of_optimizer_is_what_it_says(kind: str) -> None:
    """Two steps against torch's own optimizer, and clipping by hand, on the same gradients."""
    learner = a_learner(masks=False, kind=kind, clipping=0.05)
    model = copy.deepcopy(learner.model)
    decayed = [n for n, _ in model.named_parameters() if n.endswith("weight")]
    groups: Any = [
        {"params": [model.get_parameter(n) for n in decayed], "weight_decay": 1e-3},
        {"params": [p for n, p in model.named_parameters() if n not in decayed], "weight_decay": 0.0},
    ]
    other: torch.optim.Optimizer
    if kind == "adamw":
        other = torch.optim.AdamW(groups, lr=0.1)
    elif kind == "lars":
        other = LARS(groups, lr=0.1, momentum=0.9)
    else:
        other = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    for t in range(2):
        batch = a_batch(t)
        learner.step(batch, t, t + 1)
        other.zero_grad()
        sample_losses(model(batch.images), batch.labels, "softmax", 0.1).mean().backward()
        if kind in ("agc", "adamw"):
            for name, p in model.named_parameters():
                if name != "fc.weight":
                    assert p.grad is not None
                    units = p.grad.flatten(1) if p.ndim > 1 else p.grad[None]
                    limit = 0.05 * p.detach().view(len(units), -1).norm(dim=1).clamp_min(1e-3)
                    units.mul_((limit / units.norm(dim=1)).clamp_max(1.0)[:, None])
        elif kind == "norm":
            size = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
            assert size > 0.05
            for p in model.parameters():
                assert p.grad is not None
                p.grad *= 0.05 / size
        for group in other.param_groups:
            group["lr"] = learner.schedule(t + 1)
        other.step()
    ours, theirs = ({n: p.detach() for n, p in m.named_parameters()} for m in (learner.model, model))
    assert max(float((ours[n] - theirs[n]).norm() / (1e-3 + theirs[n].norm())) for n in ours) < 2e-4


RESUMED: list[dict[str, Any]] = [
    {"kind": "agc"},
    {"kind": "sgd"},
    {"kind": "norm"},
    {"kind": "lars"},
    {"kind": "adamw"},
    {"sam_rho": 0.3, "sam_every": 2, "sam_shards": 2, "micro_batch": 3},
    {"precision": "bf16", "remat": "block"},
    {"precision": "fp16"},
    {"precision": "fp16", "kind": "adamw", "sam_rho": 0.3, "micro_batch": 3},
    {"name": "bn_nfnet_f0", "precision": "fp16"},
]


@pytest.mark.parametrize("change", RESUMED, ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items()))
def test_a_learner_goes_on_from_its_tensors_to_the_bit(change: dict[str, Any]) -> None:
    """Two batches, then two more, in another learner; in float16 a scale that falls on both sides of the break."""
    first = a_learner(**change)
    if first.scaler is not None:
        with_scale(first, 2.0**25)
    applied = advance(first, 2)
    kept = copies(first)
    scale = copy.deepcopy(first.scaler.state_dict()) if first.scaler is not None else None
    second = a_learner(**change | {"seed": 99})  # another start: everything must come from the tensors
    second.run = first.run
    second.load_tensors({n: t.clone() for n, t in kept.items()}, applied)
    second.micro_batch = first.micro_batch
    if second.scaler is not None and scale is not None:
        second.scaler.load_state_dict(scale)
    assert equal(copies(second), kept)
    ends = [advance(x, 2, taken=2, applied=applied) for x in (first, second)]
    assert ends[0] == ends[1]
    assert equal(copies(first), copies(second))
    assert not equal(copies(first), kept) or applied == ends[0]
    if first.scaler is not None and second.scaler is not None:
        assert first.scaler.state_dict() == second.scaler.state_dict()
        assert first.scaler.get_scale() < 2.0**25


@pytest.mark.parametrize("lost", ["model.", "ema.", "momentum_buffer.", "updates"])
def test_resuming_needs_every_part(lost: str) -> None:
    """Without one of the parts the run goes on otherwise: the comparison above sees them all."""
    first = a_learner()
    applied = advance(first, 2)
    kept, fresh = copies(first), a_learner(seed=99)
    initial = copies(fresh)
    second = fresh
    second.run = first.run
    changed = {n: initial.get(n) if n.startswith(lost) else t for n, t in kept.items()}
    second.load_tensors({n: t for n, t in changed.items() if t is not None}, 0 if lost == "updates" else applied)
    for x in (first, second):
        advance(x, 2, taken=2, applied=applied)
    assert not equal(copies(first), copies(second))


# Parts without clipping


def _part(name: str) -> str:
    """By the names of the narrow network: the first block is its first stage, two more are the second."""
    first, _, rest = name.partition(".")
    if first == "blocks":
        return "stage0" if rest.startswith("0.") else "stage1"
    return first if first == "stem" else "head"


PARTS = ("stem", "stage0", "stage1", "head")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([*PARTS, "blocks.2.*", "*.bias", "fc.bias", "stem.0.gain"]), max_size=5))
def test_any_parts_can_go_unclipped(parts: list[str]) -> None:
    """Parts, patterns and names, in any order and more than once; the classifier's weight always; nothing else."""
    model = a_learner().model if not _MODELS else _MODELS[0]
    _MODELS[:] = [model]
    groups = param_groups(model, clipping=0.01, overrides=unclipped_names(model, tuple(parts)))
    found = {n: g["clipping"] for g in groups for n in g["names"]}
    assert len(found) == len(list(model.parameters()))
    for name, clipping in found.items():
        named = (
            _part(name) in parts
            or ("blocks.2.*" in parts and name.startswith("blocks.2."))
            or ("*.bias" in parts and name.endswith(".bias"))
            or name in parts
        )
        assert clipping == (None if named or name == "fc.weight" else 0.01), name


_MODELS: list[Network] = []


def test_unclipped_parts_reach_the_optimizer() -> None:
    """Their gradients are taken as they are, and they are not counted."""
    learner = a_learner(masks=False, unclipped=("stage1", "head"), clipping=1e-4)
    outcome = learner.step(a_batch(), 0, 1)
    assert 0 < outcome.sums[2] <= outcome.sums[3]
    shares = learner.clipped_shares()
    names = [n for n, _ in learner.model.named_parameters()]
    assert set(shares) == {n for n in names if _part(n) in ("stem", "stage0")}
    bias = learner.model.fc.bias
    torch.testing.assert_close(learner.optimizer.state[bias]["momentum_buffer"], bias.grad)


@pytest.mark.parametrize("unclipped", [(), ("stage1",), ("head",), ("fc.*",), ("fc.bias", "stem.*")])
@pytest.mark.parametrize("kind", ["agc", "adamw"])
@pytest.mark.parametrize("clip_classifier", [False, True])
def test_the_classifiers_weight_is_clipped_only_if_told(
    kind: str, clip_classifier: bool, unclipped: tuple[str, ...]
) -> None:
    """With the lambda of the others; a part that goes unclipped, the classifier's own included, still does."""
    learner = a_learner(
        masks=False, kind=kind, clipping=1e-4, weight_decay=0.0, unclipped=unclipped, clip_classifier=clip_classifier
    )
    before = {n: p.detach().clone() for n, p in learner.model.named_parameters()}
    learner.step(a_batch(), 0, 0)
    spared = {n for n in before if _part(n) in unclipped or n in unclipped}
    spared |= {n for n in before if any(n.startswith(u[:-1]) for u in unclipped if u.endswith("*"))}
    if not clip_classifier:
        spared.add("fc.weight")
    assert set(learner.clipped_shares()) == set(before) - spared
    gradients = {n: p.grad for n, p in learner.model.named_parameters()}
    if kind == "agc":  # which leaves gradients as they were
        gradients = {n: learner.optimizer.state[p]["momentum_buffer"] for n, p in learner.model.named_parameters()}
    weight, gradient = before["fc.weight"], gradients["fc.weight"]
    assert gradient is not None
    ratios = gradient.norm(dim=1) / weight.norm(dim=1).clamp_min(1e-3)
    if "fc.weight" in spared:
        assert (ratios > 1e-2).all()
    else:
        torch.testing.assert_close(ratios, torch.full_like(ratios, 1e-4))


@pytest.mark.parametrize("part", ["stage2", "stage", "stage-1", "stem2", "heads", "Stem", "tail", "blocks.9.*", ""])
def test_a_part_that_is_not_there_is_an_error(part: str) -> None:
    """Whatever it is; those that look like parts are answered with the list of parts."""
    with pytest.raises(ValueError, match=r"no part|matches"):
        a_learner(unclipped=("stem", part))
    model = a_learner().model
    if part.startswith(("st", "he")):
        with pytest.raises(UserError, match="head, stage0, stage1, stem"):
            unclipped_names(model, (part,))


@pytest.mark.parametrize(
    "pattern",
    [
        "stem*",
        "stem?0.*",
        "s*m.0.gain",
    ],
)
def test_a_pattern_may_begin_like_a_part(pattern: str) -> None:
    """It is one of names."""
    model = a_learner().model
    groups = param_groups(model, overrides=unclipped_names(model, (pattern,)))
    names = {n for g in groups if g["clipping"] is None for n in g["names"]}
    assert "stem.0.gain" in names
    assert not any(n.startswith("blocks") for n in names)


# Counts of clipped units


def _clipped_by_hand(learner: Learner, parameters: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    """(clipped, units) by the gradients of the last step and the weights before it."""
    found = {}
    for name, p in learner.model.named_parameters():
        if name == "fc.weight":
            continue
        assert p.grad is not None
        rows = [(p.grad.flatten(), parameters[name].flatten())]
        if p.ndim > 1:
            rows = list(zip(p.grad.flatten(1), parameters[name].flatten(1), strict=True))
        over = sum(float(g.norm()) > 0.05 * max(float(w.norm()), 1e-3) for g, w in rows)
        found[name] = over, len(rows)
    return found


@pytest.mark.parametrize("change", [{}, {"sam_rho": 0.3, "micro_batch": 3}, {"precision": "fp16"}])
def test_clipped_shares_are_counted_by_tensor(change: dict[str, Any]) -> None:
    """Over three steps, and from anew once they were asked for; each step says its total."""
    learner = a_learner(**change)
    if learner.scaler is not None:
        with_scale(learner, 64.0)
    for steps in (range(3), range(3, 5)):
        sums: dict[str, list[int]] = {}
        for t in steps:
            before = {n: p.detach().clone() for n, p in learner.model.named_parameters()}
            outcome = learner.step(a_batch(t), t, t)
            assert outcome.applied
            counted = _clipped_by_hand(learner, before)
            for name, (clipped, units) in counted.items():
                total = sums.setdefault(name, [0, 0])
                total[0], total[1] = total[0] + clipped, total[1] + units
            expected = [sum(c for c, _ in counted.values()), sum(u for _, u in counted.values())]
            assert outcome.sums[2:].tolist() == expected
        shares = learner.clipped_shares()
        assert shares == {n: clipped / units for n, (clipped, units) in sums.items()}
        assert 0 < sum(shares.values()) < len(shares)
        assert learner.clipped_shares() == {}


@pytest.mark.parametrize("kind", ["sgd", "norm", "lars"])
def test_nothing_is_counted_where_nothing_is_clipped_by_unit(kind: str) -> None:
    """Zeros, and no tensors."""
    learner = a_learner(kind=kind)
    outcome: Outcome = learner.step(a_batch(), 0, 1)
    assert outcome.sums[2:].tolist() == [0, 0]
    assert learner.clipped_shares() == {}


def test_clipped_units_are_counted_for_adamw_too() -> None:
    """Whose gradients AGC clips as well."""
    learner = a_learner(kind="adamw", clipping=1e-3)
    outcome = learner.step(a_batch(), 0, 1)
    assert 0 < outcome.sums[2] <= outcome.sums[3]


@pytest.mark.parametrize("change", [{}, {"kind": "adamw"}, {"sam_rho": 0.3, "micro_batch": 3}, {"head_only": 1.5}])
def test_counts_of_clipped_units_go_on_from_what_was_saved(change: dict[str, Any]) -> None:
    """Through JSON, as a checkpoint has them, and on in steps that look at other tensors; nothing is counted twice."""
    straight, broken = a_learner(**change), a_learner(**change)
    for x in (straight, broken):
        advance(x, 2)
    saved = broken.clipped_units()
    assert sum(clipped for clipped, _ in saved.values()) > 0
    for _ in range(2):  # in place of what was counted, not beside it
        broken.load_clipped_units(json.loads(json.dumps(saved)))
        assert broken.clipped_units() == saved
    for x in (straight, broken):
        advance(x, 2, taken=2, applied=2)
    units = straight.clipped_units()
    assert broken.clipped_units() == units
    rows = {n: (p.shape[0] if p.ndim > 1 else 1) for n, p in straight.model.named_parameters() if n != "fc.weight"}
    alone = 2 if "head_only" in change else 0  # steps in which the classifier's bias alone is looked at
    assert {n: looked_at for n, (_, looked_at) in units.items()} == {
        n: rows[n] * (4 if n == "fc.bias" else 4 - alone) for n in rows
    }
    assert straight.clipped_units() == units  # asking does not count anew
    assert broken.clipped_shares() == {n: clipped / looked_at for n, (clipped, looked_at) in units.items()}
    assert broken.clipped_units() == {}
    straight.load_clipped_units({})
    assert straight.clipped_shares() == {}


# The classifier alone, then all layers


HEAD = {"fc.weight", "fc.bias"}
HEAD_ONLY: list[dict[str, Any]] = [
    {},
    {"kind": "norm"},
    {"kind": "lars"},
    {"kind": "adamw"},
    {"sam_rho": 0.3, "sam_every": 2, "sam_shards": 2},
    {"remat": "block", "micro_batch": 3},
    {"precision": "fp16"},
    {"name": "bn_nfnet_f0"},
    {"name": "bn_nfnet_f0", "sam_rho": 0.3, "micro_batch": 4},
]


@pytest.mark.parametrize("change", HEAD_ONLY, ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items()))
def test_the_classifier_moves_alone_at_first(change: dict[str, Any]) -> None:
    """For so many epochs the body keeps its bits, buffers and average too, without gradient or momentum; then all move.

    SAM neither moves the body at its ascent point.
    """
    learner = a_learner(head_only=2.5, **change)
    if learner.scaler is not None:
        with_scale(learner, 16.0)
    before = copies(learner)
    body = {n: p for n, p in learner.model.state_dict(keep_vars=True).items() if n not in HEAD}
    away: list[set[str]] = []

    def look(*_: Any) -> None:
        away.append({n for n, p in body.items() if not torch.equal(p, before[f"model.{n}"])})

    hook = learner.model.register_forward_pre_hook(look)
    taken = advance(learner, 3)
    hook.remove()
    assert away
    assert set.union(*away) == set()
    assert all(p.grad is None for p in body.values())
    after = copies(learner)
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == {f"{part}.{n}" for part in ("model", "ema") for n in HEAD}
    assert {n.partition(".")[2] for n in after if n.partition(".")[0] not in ("model", "ema")} <= HEAD
    assert advance(learner, 4, taken, taken) == 7
    after = copies(learner)
    assert {n for n in before if torch.equal(before[n], after[n])} == set()


def test_the_classifiers_gradient_is_that_of_a_whole_step() -> None:
    """Freezing the body changes nothing for the classifier, and the masks are the same."""
    alone, whole = a_learner(head_only=1.0, kind="sgd"), a_learner(kind="sgd")
    for x in (alone, whole):
        x.step(a_batch(), 0, 0)
    for a, b in zip(alone.model.fc.parameters(), whole.model.fc.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("name", NETWORKS)
def test_all_layers_move_at_once_from_given_weights(name: str, tmp_path: Path) -> None:
    """Unless told otherwise: the first step with a rate moves every parameter of the network, and its average."""
    save_weights(a_learner(name=name, seed=8).model, tmp_path / "weights.safetensors")
    learner = a_learner(name=name, masks=False)
    learner.start_from(tmp_path / "weights.safetensors")
    given_weights = load_model(tmp_path / "weights.safetensors")[0].state_dict()
    assert equal(dict(learner.model.state_dict()), dict(given_weights))
    assert equal(dict(learner.ema.module.state_dict()), dict(given_weights))
    learner.step(a_batch(), 0, 1)
    for model in (learner.model, learner.ema.module):
        assert [n for n, p in model.named_parameters() if torch.equal(p, given_weights[n])] == []


# The length of a run


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(1, 10**7), st.integers(1, 10**7), st.integers(1, 65_536), st.sampled_from([-1.0, 0.0, 1.0]))
def test_epochs_that_make_a_whole_number_of_steps_make_that_number(
    steps: int, images: int, batch: int, side: float
) -> None:
    """Though steps x batch / images is seldom a float; and so the last step is the last evaluation."""
    epochs = steps * batch / images
    epochs += side * math.ulp(epochs)
    found = run_length(a_run(epochs=epochs, batch_size=batch), images)
    assert found.total == steps
    if epochs < 100:
        assert max(found.evaluate_at()) == steps


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(1, 400), st.integers(1, 3_000_000), st.integers(1, 65_536))
def test_every_epoch_is_evaluated_at_the_first_step_by_which_it_is_done(eighths: int, images: int, batch: int) -> None:
    """In whole numbers: total = floor(epochs x images / batch), ends = ceil(epoch x images / batch)."""
    found = run_length(a_run(epochs=eighths / 8, batch_size=batch), images)
    total = max(1, eighths * images // (8 * batch))
    assert found.total == total
    ends = {min(total, -(-epoch * images // batch)) for epoch in range(1, -(-eighths // 8) + 1)}
    assert found.evaluate_at() == ends | {total}
    assert min(found.evaluate_at()) >= 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(1, 300), st.integers(1, 30), st.integers(0, 40), st.sampled_from([0.0, 0.01]))
def test_the_schedule_of_a_run_is_its_formula(epochs: int, images: int, batch: int, warmup: int, floor: float) -> None:
    """Up in a line for warmup epochs, fractions of a step included, then half a cosine; at most all but one step."""
    run = a_run(lr=0.7, warmup=warmup / 4, floor=floor, epochs=float(epochs), batch_size=batch)
    found = run_length(run, images)
    schedule, total = found.schedule(run.optim), found.total
    up = min(Fraction(warmup * images, 4 * batch), Fraction(total - 1))
    for step in {0, 1, total // 3, int(up), int(up) + 1, total - 1, total}:
        if up > 0 and step <= up:
            expected = 0.7 * float(step / up)
        else:
            expected = floor + (0.7 - floor) * (1 + math.cos(math.pi * min(1.0, float((step - up) / (total - up))))) / 2
        assert schedule(step) == pytest.approx(expected, abs=1e-9)


def test_the_loop_and_the_plan_have_the_length_of_the_run(tmp_path: Path) -> None:
    """Where floor(epochs x images / batch) in floats is one step too few."""
    epochs, images, batch = 15 * 4 / 13, 13, 4
    assert math.floor(epochs * (images / batch)) == 14
    run = a_run(epochs=epochs, batch_size=batch, warmup=2.0, head_only=1.5)
    source = SyntheticSource(images, CLASSES, SIDE)
    job = prepare(run, RunFolder.create(tmp_path / "run", run), source, source, Screen())
    assert job.total == 15
    assert job.evaluate_at == {4, 7, 10, 13, 15}
    schedule = job.learner.schedule
    assert schedule == run_length(run, images).schedule(run.optim)
    assert (schedule.total_steps, schedule.warmup_steps) == (15, 6.5)
    assert job.learner.head_steps == 1.5 * 13 / 4
    lines = "\n".join(plan(run, images, CLASSES))
    assert "15 of 4 images: 4.61538 epochs of 3.25 steps" in lines
    assert f"up for 6.50 steps, then a cosine; 0 at 0, {schedule(6):.4g} at 6, {schedule(7):.4g} at 7, " in lines


@pytest.mark.parametrize(
    ("batch", "micro_batch", "sam"),
    [
        (8, None, {}),
        (8, 3, {}),
        (8, 100, {}),
        (8, None, {"sam_rho": 0.1, "sam_shards": 2}),
        (8, 2, {"sam_rho": 0.1, "sam_shards": 2}),
        (8, 3, {"sam_rho": 0.1, "sam_shards": 2}),
        (8, 6, {"sam_rho": 0.1, "sam_shards": 2}),
        (4, 2, {"sam_rho": 0.1, "sam_shards": 9}),
        (8, 4, {"sam_rho": 0.0, "sam_shards": 4}),
    ],
)
def test_the_plan_counts_the_parts_of_a_step(batch: int, micro_batch: int | None, sam: dict[str, Any]) -> None:
    """As many images at once, as often, as the network then sees on the way down."""
    run = a_run(batch_size=batch, micro_batch=micro_batch, **sam)
    learner, sizes = a_learner(run), []

    def look(_: nn.Module, x: tuple[Tensor, ...]) -> None:
        if learner.sam is None or learner.sam._saved:
            sizes.append(len(x[0]))

    learner.model.register_forward_pre_hook(look)
    learner.step(a_batch(0, batch), 0, 0)
    assert sum(sizes) == batch
    (line,) = [line for line in plan(run, 80, CLASSES) if line.startswith("batch ")]
    assert line == f"batch       {max(sizes)} images at once, {len(sizes)} times; fp32, remat none"


def test_parts_can_have_their_own_lambda() -> None:
    """By stage and by pattern, the last one winning, and exemption over both."""
    o = OptimConfig(
        lr=0.1, clipping=0.01, warmup=0.0, lambdas=("stage0=0.02", "blocks.0.conv0.*=0.04"), unclipped=("stem",)
    )
    learner = build_learner(replace(a_run(), optim=o), CLASSES, Length(4.0, 1.0), AS_IT_IS)
    found = {n: g["clipping"] for g in learner.optimizer.param_groups for n in g["names"]}
    for name, clipping in found.items():
        part = learner.model.part_of(name)
        expected = {"stem": None, "stage0": 0.02}.get(part, None if name == "fc.weight" else 0.01)
        assert clipping == (0.04 if name.startswith("blocks.0.conv0.") else expected), name


def test_memory_that_runs_out_with_sam_halves_the_shard() -> None:
    """What was tried at once is a shard, not the batch."""
    learner = a_learner(sam_rho=0.3, sam_every=1, sam_shards=4)
    learner.model.register_forward_pre_hook(too_many(1, OUT_OF_MEMORY[0]))
    learner.step(a_batch(), 0, 1)
    assert learner.micro_batch == 1

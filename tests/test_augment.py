"""The order of mixing and RandAugment, and that parts of a batch are augmented as the whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from normfree.config import Given, Run, UserError, check_given
from normfree.data import augment as augment_module
from normfree.data.augment import Augment
from normfree.data.autoaugment import AutoAugment
from normfree.data.mix import MixUpCutMix
from normfree.data.randaugment import RandAugment
from normfree.data.sources import SyntheticSource
from normfree.recipes import choose
from normfree.recipes.paper import PAPER
from normfree.train.build import build_augment
from test_step import a_batch, a_learner, a_run, advance, copies, equal

SEED, STEP, CLASSES, SIDE = 5, 7, 4, 24
BOTH = Augment(MixUpCutMix(), RandAugment(4, 10))


def images_of(n: int, seed: int = 0) -> Tensor:
    pixels = np.random.default_rng(seed).integers(0, 256, (n, SIDE, SIDE, 3), np.uint8)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def labels_of(n: int) -> Tensor:
    return torch.arange(n) % CLASSES


def test_the_order_is_mixing_then_operations() -> None:
    """As A.3 has it; the other order gives other images."""
    images, labels = images_of(16), labels_of(16)
    mix, operations = MixUpCutMix(), RandAugment(4, 10)
    mixed, targets = mix(images, labels, CLASSES, seed=SEED, step=STEP)
    expected = operations(mixed, seed=SEED, step=STEP)
    found, found_targets = BOTH(images, labels, CLASSES, SEED, STEP)
    assert torch.equal(found, expected)
    assert torch.equal(found_targets, targets)
    plan = operations.plan(SEED, STEP, np.arange(16) // 2, SIDE)
    other, _ = mix(operations(images, plan), labels, CLASSES, seed=SEED, step=STEP)
    assert not torch.equal(found, other)


@pytest.mark.parametrize("pairs", ["disjoint", "batch"])
@pytest.mark.parametrize("world", [2, 4])
def test_parts_are_augmented_as_the_whole(pairs: Literal["disjoint", "batch"], world: int) -> None:
    """Each of so many ranks has its slots of the step's batch."""
    augment = replace(BOTH, mix=MixUpCutMix(pairs=pairs))
    images, labels = images_of(8 * augment.reads), labels_of(8 * augment.reads)
    whole, targets = augment(images, labels, CLASSES, SEED, STEP)
    for rank in range(world):
        slots = range(rank * 8 // world, (rank + 1) * 8 // world)
        read = slice(slots.start * augment.reads, slots.stop * augment.reads)
        part, part_targets = augment(images[read], labels[read], CLASSES, SEED, STEP, slots)
        assert torch.equal(part, whole[slots.start : slots.stop])
        assert torch.equal(part_targets, targets[slots.start : slots.stop])


def test_draws_follow_seed_and_step() -> None:
    """Another seed or step draws anew, the same again does not."""
    images, labels = images_of(16), labels_of(16)
    first = BOTH(images, labels, CLASSES, SEED, STEP)[0]
    assert torch.equal(first, BOTH(images, labels, CLASSES, SEED, STEP)[0])
    assert not torch.equal(first, BOTH(images, labels, CLASSES, SEED, STEP + 1)[0])
    assert not torch.equal(first, BOTH(images, labels, CLASSES, SEED + 1, STEP)[0])


def test_without_anything_nothing_changes() -> None:
    """Images and labels are those that came in."""
    images, labels = images_of(4), labels_of(4)
    found, targets = Augment()(images, labels, CLASSES, SEED, STEP)
    assert found is images
    assert targets is labels


def test_floats_are_cut_off_behind_the_mixing() -> None:
    """Beyond [0, 255] is kept for the mean, and then clipped and truncated, as in the authors' code."""
    images = torch.tensor([-40.0, 60.9]).repeat(4)[:, None, None, None].expand(-1, 3, SIDE, SIDE).half()
    mix = MixUpCutMix(cutmix=False)
    mixed, _ = mix(images, labels_of(8), CLASSES, seed=SEED, step=STEP)
    assert mixed.dtype == torch.float16
    assert mixed.min() < 0
    found, _ = Augment(mix, RandAugment(0, 5))(images, labels_of(8), CLASSES, SEED, STEP)
    assert torch.equal(found, mixed.clamp(0, 255).byte())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Augment()),
        ({"mixup": 0.2, "cutmix": True, "randaugment": 4, "magnitude": 5.0}, Augment(MixUpCutMix(), RandAugment(4, 5))),
        ({"mixup": 0.3}, Augment(MixUpCutMix(0.3, cutmix=False))),
        ({"cutmix": True, "pairs": "batch"}, Augment(MixUpCutMix(1.0, mixup=False, pairs="batch"))),
        ({"randaugment": 2, "magnitude": 9.0}, Augment(None, RandAugment(2, 9))),
        ({"autoaugment": True}, Augment(None, AutoAugment())),
    ],
)
def test_settings_say_what_is_done(changes: dict[str, Any], expected: Augment) -> None:
    """Any of the three alone, as in the rows of Table 2."""
    run = a_run()
    assert build_augment(replace(run, data=replace(run.data, **changes))) == expected


@pytest.mark.parametrize(("setting", "message"), [("data.pairs", "mixup"), ("data.magnitude", "randaugment")])
def test_settings_that_do_nothing_are_refused(setting: str, message: str) -> None:
    """The kind of pairs without mixing, the magnitude without operations."""
    with pytest.raises(UserError, match=message):
        check_given(a_run(), [setting])


def augmented_run(**changes: Any) -> Run:
    run = a_run(**changes)
    return replace(run, data=replace(run.data, mixup=0.2, cutmix=True, randaugment=4, magnitude=5.0))


def test_a_step_trains_on_what_comes_out() -> None:
    """A step with mixing on 16 images is a step without on the 8 mixed ones, with their shares as targets."""
    learner, plain = a_learner(augmented_run()), a_learner()
    batch = a_batch(n=16)._replace(images=images_of(16)[:, :, :16, :16])
    images, targets = learner.augment(batch.images, batch.labels, 5, learner.run.train.seed, 3)
    found = learner.step(batch, 3, 1)
    expected = plain.step(batch._replace(images=images, labels=targets), 3, 1)
    assert torch.equal(found.sums, expected.sums)
    assert equal(copies(learner), copies(plain))


def test_augmentation_goes_by_batches_taken() -> None:
    """So that a batch made up for a step that was left out is drawn anew."""
    learner, again = a_learner(augmented_run()), a_learner(augmented_run())
    batch = a_batch(n=16)
    assert not torch.equal(learner.step(batch, 3, 1).sums, again.step(batch, 4, 1).sums)


def test_parts_of_a_mixed_batch_add_up() -> None:
    """Micro-batches are cut behind the augmentation, and change nothing but rounding."""
    whole, parts = a_learner(augmented_run()), a_learner(augmented_run(micro_batch=3))
    for learner in (whole, parts):
        advance(learner, 3, n=16)
    for name, tensor in copies(whole).items():
        assert torch.allclose(tensor, copies(parts)[name], rtol=1e-3, atol=1e-5), name


MAGNITUDES = {"f0": 5, "f1": 10, "f2": 10, "f3": 15, "f4": 15, "f5": 15, "f6": 15}


def test_the_papers_runs_are_augmented_as_the_paper_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A.3: MixUp with alpha 0.2 on a half, CutMix on the other, then RandAugment of 4 layers at these magnitudes."""
    monkeypatch.setattr(choose, "micro_batch", lambda *_: (None, ""))  # which builds every network
    images = SyntheticSource(100_000, 1000)
    for name, recipe in PAPER.items():
        d = recipe(Given({"data.root": "images"}), images).data
        found = (d.mixup, d.cutmix, d.pairs, d.randaugment)
        if name.startswith("nfnet") and name.endswith("_imagenet"):
            assert found == (0.2, True, "disjoint", 4), name
            assert d.magnitude == MAGNITUDES[name[6:8]]
        else:  # 4.1 and A.5: crops and flips
            assert found == (0.0, False, "disjoint", 0), name
        assert not d.antialias
        assert (d.train_crop, d.min_area, d.flip) == ("box", 0.08, True)


@pytest.mark.parametrize("pairs", ["disjoint", "batch"])
def test_large_batches_are_augmented_in_parts(
    pairs: Literal["disjoint", "batch"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which changes nothing."""
    augment = replace(BOTH, mix=MixUpCutMix(pairs=pairs))
    images, labels = images_of(22 * augment.reads), labels_of(22 * augment.reads)
    whole = augment(images, labels, CLASSES, SEED, STEP)
    monkeypatch.setattr(augment_module, "_AT_ONCE", 4)
    parts = augment(images, labels, CLASSES, SEED, STEP)
    assert torch.equal(parts[0], whole[0])
    assert torch.equal(parts[1], whole[1])

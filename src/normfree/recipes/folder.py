"""Training on a folder of images without a hyper-parameter being known: each choice with its reason."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, replace

import numpy as np
import torch

from normfree.config import DataConfig, Given, ModelConfig, OptimConfig, Run, TrainConfig, UserError
from normfree.data.decode import BadImage, image_size
from normfree.data.sources import FolderSource, Source
from normfree.models import NetworkConfig, model_config, parse_options, with_options
from normfree.models.count import multiply_adds
from normfree.optim import WarmupCosine
from normfree.recipes import choose

_EPOCHS, _STEPS = 30, 2000  # that small networks need to converge; a run has both if time allows
_LONG = 20_000  # steps from which SkipInit starts at 0, as in the paper
_SAMPLE = 256  # images whose headers are read
_CPU_SPEED, _GPU_SPEED = 15e9, 15e12  # multiply-adds a second in training, of a core and a device; orders of magnitude
_CPU_MINUTES, _GPU_MINUTES = 10, 60  # that a run without settings aims at


@dataclass(frozen=True)
class Facts:
    """What the choices follow from."""

    images: int
    classes: tuple[str, ...]
    side: int  # median of the short sides, in pixels
    same_shape: bool  # all that were looked at are squares of one size


def folder(given: Given, images: Source) -> Run:
    """Any folder of images, ROOT/CLASS/IMAGES or with train/ and val/. Ours, not the paper's.

    Command: normfree train --data.root ROOT. On the 12 classes of `normfree data sample` (2,400 images for training,
    600 held out, about 160 x 120), one seed on 2 cores (benchmarks/results/sample.json): top-1 100 % in 3:40.
    """
    facts = look(images)
    device = given.choose("train.device", *choose.device())
    small = facts.side <= 40
    size = given.choose("data.size", *_size(facts, device))
    name = given.choose("model.name", *_model(facts, size, device))
    options = given.values.get("model.options", ())
    config = with_options(replace(model_config(name), num_classes=len(facts.classes)), parse_options(options))
    batch = given.choose("train.batch_size", *_batch(facts, config, size, device))
    epochs = given.choose("train.epochs", *_epochs(facts, config, size, device, batch))
    tuned = given.values.get("model.weights") is not None
    per, source = (2048, "A.5") if tuned else (256, "A.1")  # the paper fine-tunes with an eighth of the rate
    lr = given.choose("optim.lr", 0.1 * batch / per, f"0.1 x {batch} / {per} ({source} of the paper)")
    optim = _optim(given, facts, lr, batch, epochs, tuned)
    short = epochs * facts.images / batch < _LONG
    wakes = "a short run: the residual branches work at once" if short and not tuned else ""
    skip_init = given.choose("model.skip_init", 1.0 if short else 0.0, wakes)
    flip, why = _flip(facts.classes)
    data = DataConfig(
        root=given.values["data.root"],
        size=size,
        test_size=given.choose("data.test_size", size),
        train_crop=given.choose(
            "data.train_crop",
            "shift" if small else "box",
            "small images: moved and zoomed, not cut" if small else "random parts of the image, resized",
        ),
        min_area=given.choose("data.min_area", 0.35),  # the paper's 0.08 wants hundreds of epochs
        shift=max(1, size // 10),
        zoom=0.1,
        rotate=10.0,
        flip=given.choose("data.flip", flip, why),
        eval_crop="pad" if small else "center",
        margin=0 if small or facts.same_shape else round(size / 8),
        workers=given.choose("data.workers", *_workers(device)),
    )
    precision = given.choose("train.precision", "bf16" if device.startswith("cuda") else "fp32")
    train = TrainConfig(
        epochs=epochs, batch_size=batch, device=device, precision=precision, eval_batch_size=min(250, 2 * batch)
    )
    return given.apply(
        Run("folder", ModelConfig(name, config.drop_rate, config.stochastic_depth, skip_init), data, optim, train)
    )


def look(source: Source) -> Facts:
    """Facts about a source, from the headers of a sample of its images."""
    sizes = []
    for i in np.linspace(0, len(source) - 1, min(_SAMPLE, len(source))).astype(int).tolist():
        try:
            assert isinstance(source, FolderSource)
            sizes.append(image_size(source.read_bytes(i)))
        except BadImage:
            continue  # counted and named when it is met in training
    if not sizes:
        raise UserError(f"none of {min(_SAMPLE, len(source))} images that were tried could be read")
    side = int(np.median([min(s) for s in sizes]))
    return Facts(len(source), source.classes, side, len(set(sizes)) == 1 and sizes[0][0] == sizes[0][1])


def _size(facts: Facts, device: str) -> tuple[int, str]:
    if facts.side <= 40:
        return 32, f"the images are small, {facts.side} px"
    if not device.startswith("cuda"):
        return 64, f"short sides are about {facts.side} px; more is slow on a CPU"
    size = next((s for s in (192, 128, 96) if facts.side >= s), 64)
    return size, f"short sides are about {facts.side} px"


def _model(facts: Facts, size: int, device: str) -> tuple[str, str]:
    if size >= 160 and facts.images >= 20_000 and device.startswith("cuda"):
        return "nfnet_f0", f"{facts.images} images on an accelerator"
    if size <= 40:
        return "nfnet_tiny", f"for {size} px"
    small = replace(model_config("nfnet_small"), num_classes=len(facts.classes))
    if _affordable(small, facts, size, device) >= _EPOCHS:
        return "nfnet_small", f"for {size} px; {facts.images} images are few enough for it here"
    return "nfnet_tiny", f"nfnet_small would need too long for {facts.images} images here"


def _affordable(config: NetworkConfig, facts: Facts, size: int, device: str) -> float:
    """Epochs in the time that a run without settings aims at; an estimate within a factor of about two."""
    if device.startswith("cuda"):
        operations = _GPU_MINUTES * 60 * _GPU_SPEED
    else:
        operations = _CPU_MINUTES * 60 * _CPU_SPEED * torch.get_num_threads()
    return operations / (3 * multiply_adds(config, size) * facts.images)  # backward costs twice forward


def _batch(facts: Facts, config: NetworkConfig, size: int, device: str) -> tuple[int, str]:
    most = 1024 if device.startswith("cuda") else 64
    wanted = 2 ** int(math.log2(min(max(16, min(facts.images / 40, most)), facts.images)))
    why = f"of {facts.images} images" if wanted > 16 else "few images"
    memory = choose.free_memory(device)
    while wanted > 8 and choose.step_memory(config, size, wanted) > memory // 2:
        wanted, why = wanted // 2, f"half of the free memory, {memory / 2**30:.1f} GiB"
    return wanted, why


def _epochs(facts: Facts, config: NetworkConfig, size: int, device: str, batch: int) -> tuple[float, str]:
    enough = max(_EPOCHS, _STEPS * batch / facts.images)
    epochs = float(round(min(max(_affordable(config, facts, size, device), _EPOCHS / 3), enough, 300)))
    return epochs, f"{round(epochs * facts.images / batch)} steps"


def _optim(given: Given, facts: Facts, lr: float, batch: int, epochs: float, tuned: bool) -> OptimConfig:
    warmup = given.choose("optim.warmup", min(5.0, epochs / 10))
    total = max(2, math.floor(epochs * facts.images / batch))
    schedule = WarmupCosine(lr, total, min(warmup * facts.images / batch, total - 1))
    base = OptimConfig(lr=lr, clipping=0.01, warmup=warmup)
    if tuned:
        return replace(base, clipping=given.choose("optim.clipping", base.clipping, "the given weights are awake"))
    clipping, steps = choose.clipping_for(schedule, total, base.eps, base.momentum)
    clipping = given.choose("optim.clipping", clipping, f"SkipInit can reach 0.1 in {steps} of {total} steps")
    return replace(base, clipping=clipping)


def _flip(classes: tuple[str, ...]) -> tuple[bool, str]:
    """Mirrored digits, letters and directions are other classes."""
    words = [set(re.split(r"[\W_]+", c.lower())) for c in classes]
    if sum(len(c) == 1 for c in classes) >= len(classes) / 2:
        return False, "single characters as class names: mirrored they are others"
    if any("left" in w for w in words) and any("right" in w for w in words):
        return False, "classes named left and right"
    return True, "no class name speaks against it"


def _workers(device: str) -> tuple[int, str]:
    if not device.startswith("cuda"):
        return 0, "training uses every core"
    return min(16, max(1, (os.cpu_count() or 2) - 1)), "one a core"

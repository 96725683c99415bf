"""Training on a folder of images without a hyper-parameter being known: each choice with its reason."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from normfree.config import DataConfig, Given, ModelConfig, OptimConfig, Run, TrainConfig, UserError, from_dict
from normfree.data.crop import Preprocessing
from normfree.data.decode import BadImage, image_size
from normfree.data.sources import Source, several_labels
from normfree.evaluate import published_preprocessing
from normfree.models import MODELS, NetworkConfig, model_config, parse_options, with_options
from normfree.models.count import multiply_adds
from normfree.models.weights import is_ours, read_header
from normfree.recipes import choose
from normfree.train.length import Length

_EPOCHS, _STEPS = 30, 2000  # that small networks need to converge; a run has both if time allows
_NATIVE = "that the weights were trained at"
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
    start = _start(given)
    small = facts.side <= 40 and start is None
    size = given.choose("data.size", *(_size(facts, device) if start is None else (start.size, _NATIVE)))
    name = given.find("model.name", lambda: (start.name, _NATIVE) if start else _model(facts, size, device))
    options = given.values.get("model.options", ())
    config = with_options(replace(model_config(name), num_classes=len(facts.classes)), parse_options(options))
    batch = given.find("train.batch_size", lambda: _batch(facts, config, size, device))
    epochs = given.find("train.epochs", lambda: _epochs(facts, config, size, device, batch))
    if start is not None:  # the paper fine-tunes with 0.1 at a batch of 2,048
        lr = given.choose("optim.lr", 0.1 * batch / 2048, f"0.1 x {batch} / 2048, scaled from A.5 of the paper")
        optim = _fine_tuning(given, config, lr, epochs)
    else:
        lr = given.choose("optim.lr", 0.1 * batch / 256, f"0.1 x {batch} / 256 (A.1 of the paper)")
        optim = _optim(given, config, lr, Length(epochs, facts.images / batch))
    if several_labels(images):
        optim = replace(optim, loss=given.choose("optim.loss", "sigmoid", "an image may have several labels"))
    short = epochs * facts.images / batch < _LONG and config.norm == "none"
    wakes = "a short run: the residual branches work at once" if short and start is None else ""
    skip_init = given.choose("model.skip_init", 1.0 if short else None, wakes)
    rates = (config.drop_rate, config.stochastic_depth)
    if start is not None:
        rates = (0.25, 0.1) if config.final != "none" else (0.0, 0.0)  # NFNets, and ResNets (A.5)
    flip, why = _flip(facts.classes)
    data = DataConfig(
        root=given.values["data.root"],
        size=size,
        test_size=given.choose("data.test_size", size if start is None else start.evaluation.size),
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
        workers=given.choose("data.workers", *choose.workers(device)),
    )
    if start is not None:
        e = start.evaluation
        data = replace(data, eval_crop=e.crop, margin=e.margin, mean=e.mean, std=e.std, antialias=e.antialias)
    precision = given.choose("train.precision", "bf16" if device.startswith("cuda") else "fp32")
    train = TrainConfig(
        epochs=epochs, batch_size=batch, device=device, precision=precision, eval_batch_size=min(250, 2 * batch)
    )
    return given.apply(Run("folder", ModelConfig(name, *rates, skip_init), data, optim, train))


@dataclass(frozen=True)
class _Start:
    """The weights that a run starts from: their network, its training size, and how its images are prepared."""

    name: str
    size: int
    evaluation: Preprocessing


def _start(given: Given) -> _Start | None:
    """What the file of --model.weights says of itself; for others' files, what is published for the named model."""
    weights, name = given.values.get("model.weights"), given.values.get("model.name")
    if weights is None:
        return None
    if Path(weights).is_file() and is_ours(Path(weights)):
        about = read_header(Path(weights))
        name = str(about.get("model", "")) if name is None else name
        if "preprocessing" in about and name in MODELS:
            evaluation = from_dict(Preprocessing, about["preprocessing"], f"{weights}: preprocessing")
            return _Start(name, evaluation.size, evaluation)
    if name is None:
        raise UserError("name the network of --model.weights with --model.name")
    return _Start(name, model_config(name).train_size, published_preprocessing(name))


def finetune(given: Given, images: Source) -> Run:
    """A folder of images, from the weights of --weights: `folder` with the settings of A.5, scaled to the data.

    Command: normfree train finetune --weights FILE --data.root ROOT.
    """
    if given.values.get("model.weights") is None:
        raise UserError("name the weights to start from with --weights FILE")
    return replace(folder(given, images), recipe="finetune")


def look(source: Source) -> Facts:
    """Facts about a source, from the headers of a sample of its images."""
    sizes = []
    for i in np.linspace(0, len(source) - 1, min(_SAMPLE, len(source))).astype(int).tolist():
        try:
            content = source.content(i)
            sizes.append(image_size(content) if isinstance(content, bytes) else content.shape[1::-1])
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


def _optim(given: Given, config: NetworkConfig, lr: float, length: Length) -> OptimConfig:
    base = OptimConfig(lr=lr, clipping=0.01, warmup=given.choose("optim.warmup", min(5.0, length.epochs / 10)))
    return replace(base, clipping=given.find("optim.clipping", lambda: _clipping(config, base, length)))


def _clipping(config: NetworkConfig, optim: OptimConfig, length: Length) -> tuple[float, str]:
    total = length.total
    clipping, steps = choose.clipping_for(length.schedule(optim), total, optim.eps, optim.momentum)
    if config.norm == "batch":
        return clipping, f"as for a normalizer-free network of {total} steps"
    return clipping, f"SkipInit can reach 0.1 in {steps} of {total} steps"


def _fine_tuning(given: Given, config: NetworkConfig, lr: float, epochs: float) -> OptimConfig:
    """A.5 but for SAM: a third of the run is warm-up, decay 1e-5 for NFNets and none for ResNets, EMA 0.9999."""
    return OptimConfig(
        lr=lr,
        clipping=given.choose("optim.clipping", 0.01, "the branches of given weights are awake"),
        warmup=given.choose("optim.warmup", epochs / 3, "a third of the run (A.5)"),
        weight_decay=given.choose("optim.weight_decay", 1e-5 if config.final != "none" else 0.0),
        ema_decay=given.choose("optim.ema_decay", 0.9999),
    )


def _flip(classes: tuple[str, ...]) -> tuple[bool, str]:
    """Mirrored digits, letters and directions are other classes."""
    words = [set(re.split(r"[\W_]+", c.lower())) for c in classes]
    if sum(len(c) == 1 for c in classes) >= len(classes) / 2:
        return False, "single characters as class names: mirrored they are others"
    if any("left" in w for w in words) and any("right" in w for w in words):
        return False, "classes named left and right"
    return True, "no class name speaks against it"

"""The paper's own runs: ImageNet (Section 4.1, A.1), large-scale pre-training and fine-tuning (A.5).

What the sources do not give is marked "ours". No result is measured here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from normfree.config import DataConfig, Given, ModelConfig, OptimConfig, Run, TrainConfig
from normfree.data.sources import Source
from normfree.models import NetworkConfig, model_config, parse_options, with_options
from normfree.recipes import choose

IMAGENET = (1_281_167, 50_000, 1000)  # training and validation images, classes
Recipe = Callable[[Given, Source], Run]

# lambda by batch size: 4.1 finds that larger batches want smaller ones and tries these; which for which is ours
_LAMBDAS = {256: 0.16, 512: 0.08, 1024: 0.04, 2048: 0.02, 4096: 0.01}


def nfnet_imagenet(name: str, sam: bool = False) -> Recipe:
    """360 epochs at batch 4,096 (A.1); with SAM as A.4 has it."""

    def recipe(given: Given, images: Source) -> Run:  # noqa: ARG001 (as every recipe)
        c, model = _model(given, name)
        batch = given.choose("train.batch_size", 4096, "A.1")
        optim = OptimConfig(
            lr=given.choose("optim.lr", 0.1 * batch / 256, f"0.1 x {batch} / 256 (A.1)"),
            clipping=given.choose("optim.clipping", 0.01, "for batches of 1,024 to 4,096 (5.1)"),
            warmup=given.choose("optim.warmup", *_warmup(given, 360.0, "A.1")),
            weight_decay=2e-5,
            sam_rho=0.05 if sam else 0.0,
            sam_shards=max(1, batch // 32),  # the paper's devices held 32 images each
        )
        magnitude_of = "of this variant (A.3)" if c.magnitude else "ours: A.3 has none for this network"
        data = replace(
            _data(given, c.train_size, c.test_size),
            mixup=0.2,
            cutmix=True,
            randaugment=4,
            magnitude=given.choose("data.magnitude", float(c.magnitude or 10), magnitude_of),
        )
        return _run(given, f"{name}_imagenet", c, _Parts(model, data, optim, batch, 360.0))

    recipe.__doc__ = f"{name} on ImageNet, 360 epochs{', with SAM' if sam else ''} (A.1). Here: not measured."
    return recipe


def resnet_imagenet(name: str) -> Recipe:
    """90 epochs at batches of 256 to 4,096 (4.1): with AGC, or with batch norm in its place."""

    def recipe(given: Given, images: Source) -> Run:  # noqa: ARG001 (as every recipe)
        c, model = _model(given, name)
        batch = given.choose("train.batch_size", 1024, "4.1 has 256 to 4,096")
        clipping, why = _LAMBDAS[min(_LAMBDAS, key=lambda b: abs(b - batch))], "of 4.1; which for this batch is ours"
        optim = OptimConfig(
            lr=given.choose("optim.lr", 0.1 * batch / 256, f"0.1 x {batch} / 256 (4.1)"),
            clipping=given.choose("optim.clipping", clipping, why if c.norm == "none" else ""),
            kind=_kind(given, c),
            warmup=given.choose("optim.warmup", *_warmup(given, 90.0, "ours: 4.1 does not say, A.1 has 5")),
            weight_decay=given.choose("optim.weight_decay", 5e-5, "ours: 4.1 does not say"),
            label_smoothing=given.choose("optim.label_smoothing", 0.1, "ours: 4.1 does not say, A.1 has 0.1"),
            ema_decay=given.choose("optim.ema_decay", 0.99999, "ours: 4.1 does not say, A.1 has 0.99999"),
        )
        depth = given.choose("model.stochastic_depth", c.stochastic_depth, "the authors' code; 4.1 does not say")
        model = replace(model, stochastic_depth=depth)
        data = replace(_data(given, 224, 224), eval_crop="center")  # as the authors' code evaluates ResNets
        return _run(given, f"{name}_imagenet", c, _Parts(model, data, optim, batch, 90.0))

    recipe.__doc__ = f"{name} on ImageNet, 90 epochs (Section 4.1). Here: not measured."
    return recipe


def pretrain(name: str, epochs: float) -> Recipe:
    """On a large set of labelled images: 224 px, crops and flips only, no average (A.5)."""

    def recipe(given: Given, images: Source) -> Run:
        c, model = _model(given, name)
        nfnet = c.final != "none"
        batch = given.choose("train.batch_size", 4096 if nfnet else 1024, "A.5")
        warmup = 5.0 if nfnet else 5000 * batch / len(images)
        optim = OptimConfig(
            lr=given.choose("optim.lr", 0.1 * batch / 256, f"0.1 x {batch} / 256 (A.5)"),
            clipping=given.choose("optim.clipping", 0.01, "as on ImageNet" if c.norm == "none" else ""),
            kind=_kind(given, c),
            warmup=given.choose("optim.warmup", min(warmup, epochs / 2), "A.5: 5 epochs, ResNets 5,000 steps"),
            weight_decay=1e-6 if nfnet else 1e-5,
            ema_decay=0.0,
        )
        data = replace(_data(given, 224, 224), eval_crop="squash" if nfnet else "center")
        return _run(given, f"{name}_pretrain", c, _Parts(model, data, optim, batch, epochs))

    recipe.__doc__ = f"{name}, {epochs:g} epochs of large-scale pre-training (A.5). Here: not measured."
    return recipe


def finetune(name: str) -> Recipe:
    """15,000 steps at batch 2,048 from pre-trained weights, at 224, 320 or 384 px (A.5)."""

    def recipe(given: Given, images: Source) -> Run:
        c, model = _model(given, name)
        nfnet = c.final != "none"
        batch = given.choose("train.batch_size", 2048, "A.5")
        size = given.choose("data.size", 384, "A.5 has 224, 320 and 384")
        epochs = given.choose("train.epochs", 15_000 * batch / len(images), "15,000 steps (A.5)")
        optim = OptimConfig(
            lr=0.1,
            clipping=given.choose("optim.clipping", 0.01, "as on ImageNet" if c.norm == "none" else ""),
            kind=_kind(given, c),
            warmup=given.choose("optim.warmup", epochs / 3, "5,000 of 15,000 steps (A.5)"),
            weight_decay=1e-5 if nfnet else 0.0,
            ema_decay=0.9999,
            sam_rho=0.05 if nfnet else 0.0,
            sam_shards=max(1, batch // 32),
        )
        drop_rate, depth = (0.25, 0.1) if nfnet else (0.0, 0.0)
        model = replace(model, drop_rate=drop_rate, stochastic_depth=depth)
        data = replace(_data(given, size, size), eval_crop="squash" if nfnet else "center")
        return _run(given, f"{name}_finetune", c, _Parts(model, data, optim, batch, epochs))

    recipe.__doc__ = f"{name}, fine-tuned for 15,000 steps from --weights (A.5). Here: not measured."
    return recipe


def _model(given: Given, name: str) -> tuple[NetworkConfig, ModelConfig]:
    """The network of a recipe, or another that is given, with its options, and its rates as settings."""
    name = given.choose("model.name", name)
    c = with_options(model_config(name), parse_options(given.values.get("model.options", ())))
    return c, ModelConfig(name, c.drop_rate, c.stochastic_depth)


def _warmup(given: Given, epochs: float, reason: str) -> tuple[float, str]:
    """Epochs of warm-up, and why; half of a run that is told to be shorter than the paper's."""
    epochs = given.values.get("train.epochs", epochs)
    return (5.0, reason) if epochs >= 10 else (epochs / 2, "half of a short run")


def _kind(given: Given, network: NetworkConfig) -> str:
    """Networks with batch norm do without AGC."""
    return given.choose("optim.kind", "agc" if network.norm == "none" else "sgd")


def _data(given: Given, size: int, test_size: int) -> DataConfig:
    chosen = given.choose("data.size", size)
    test, why = (test_size, "") if chosen == size else (round(test_size * chosen / size), "in proportion to data.size")
    test = given.choose("data.test_size", test, why)
    margin, why = (32, "") if test >= 160 else (round(test / 8), "as 32 of 256 px")
    return DataConfig(
        root=given.values["data.root"],
        size=chosen,
        test_size=test,
        train_crop="box",
        min_area=0.08,
        shift=0,
        zoom=0.0,
        rotate=0.0,
        flip=True,
        eval_crop="squash",
        margin=given.choose("data.margin", margin, why),
        antialias=False,
        workers=given.choose("data.workers", *choose.workers(given.choose("train.device", *choose.device()))),
    )


class _Parts(NamedTuple):
    """What a recipe decides."""

    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    batch: int
    epochs: float


def _run(given: Given, name: str, network: NetworkConfig, parts: _Parts) -> Run:
    """The run with what follows from the machine, and with what is given in its place."""
    device = given.choose("train.device", *choose.device())
    precision = given.choose("train.precision", "bf16" if device.startswith("cuda") else "fp32", "A.1 has bf16")
    train = TrainConfig(parts.epochs, parts.batch, device=device, precision=precision, eval_batch_size=50)
    run = given.apply(Run(name, parts.model, parts.data, parts.optim, train))
    if "train.micro_batch" in given.values:
        return run
    costs = choose.Costs.of(run.train, run.optim)
    micro, why = choose.micro_batch(network, run.data.size, run.train.batch_size, device, costs)
    return replace(run, train=replace(run.train, micro_batch=given.choose("train.micro_batch", micro, why)))


_RESNETS = tuple(f"{family}_resnet{n}" for family in ("nf", "bn") for n in (50, 101, 152, 200))
PAPER: dict[str, Recipe] = {
    **{f"nfnet_f{n}_imagenet": nfnet_imagenet(f"nfnet_f{n}") for n in range(7)},
    **{f"nfnet_f{n}_sam_imagenet": nfnet_imagenet(f"nfnet_f{n}", sam=True) for n in (5, 6)},
    **{f"{n}_imagenet": resnet_imagenet(n) for n in _RESNETS},
    "nfnet_f4_pretrain": pretrain("nfnet_f4", 40.0),
    "nfnet_f4_plus_pretrain": pretrain("nfnet_f4_plus", 20.0),
    **{f"{n}_pretrain": pretrain(n, 10.0) for n in _RESNETS},
    **{f"{n}_finetune": finetune(n) for n in ("nfnet_f4", "nfnet_f4_plus")},
    **{f"{n}_finetune": finetune(n) for n in _RESNETS},
}

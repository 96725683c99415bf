"""What a run needs, made from its settings."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from normfree.config import ModelConfig, OptimConfig, Run, UserError
from normfree.data.augment import Augment
from normfree.data.autoaugment import AutoAugment
from normfree.data.crop import Preprocessing, TrainCrop
from normfree.data.loader import train_batches
from normfree.data.mix import MixUpCutMix
from normfree.data.randaugment import RandAugment
from normfree.data.sources import Source
from normfree.distributed import Group
from normfree.models import Network, create_model, parse_options
from normfree.nn.fused import fuse
from normfree.optim import AGCSGD, EMA, LARS, SAM, param_groups
from normfree.train.length import Length
from normfree.train.step import Learner


def build_learner(
    run: Run, classes: int, length: Length, preprocessing: Preprocessing, group: Group | None = None
) -> Learner:
    """A learner at its start; the weights are drawn from torch's generator, seeded with the run's seed."""
    torch.manual_seed(run.train.seed)
    o, t = run.optim, run.train
    model = _network(run.model, classes).to(device=t.device).train()
    model.remat = t.remat
    if t.compile:
        compile_network(model)
    return Learner(
        model,
        EMA(model, o.ema_decay),
        _optimizer(o, model),
        length.schedule(o),
        preprocessing,
        run,
        build_augment(run),
        head_steps=o.head_only * length.per_epoch,
        micro_batch=t.micro_batch,
        scaler=torch.amp.GradScaler(t.device.partition(":")[0]) if t.precision == "fp16" else None,
        sam=SAM(model.parameters(), o.sam_rho) if o.sam_rho > 0 else None,
        group=Group.alone() if group is None else group,
    )


def compile_network(model: Network) -> None:
    """On a CPU its activations and standardisations; elsewhere all of its passes, replayed as CUDA graphs.

    Raises:
        UserError: torch.compile does not work here.
    """
    if model.fc.weight.device.type != "cpu":
        model.compile(mode="reduce-overhead")
        return
    try:
        fuse(model)
    except Exception as e:  # whatever the compiler and its absence may raise
        raise UserError(f"--train.compile does not work here: {e}") from e


def eval_preprocessing(run: Run) -> Preprocessing:
    """What evaluation does to an image, and what is stored with the weights."""
    d = run.data
    return Preprocessing(d.test_size, d.eval_crop, d.margin, d.mean, d.std, d.antialias)


def train_crop(run: Run) -> TrainCrop:
    """What training does to an image before the batch is on its device."""
    d = run.data
    margin = round(d.margin * d.size / d.test_size)
    still = Preprocessing(d.size, d.eval_crop, margin, d.mean, d.std)
    shift = d.train_crop == "shift"
    return TrainCrop(
        d.train_crop,
        d.size,
        d.min_area,
        d.shift,
        d.zoom,
        d.rotate,
        d.flip,
        still,
        antialias=d.antialias or shift,
        pixels=d.pixels,
        scaled=d.scaled_decode,
        margin=d.margin,
    )


def first_images(run: Run, source: Source, n: int) -> tuple[Tensor, Tensor]:
    """N images of the first step as training sees them, and their targets, on the CPU: for pictures."""
    augment = build_augment(run)
    read = run.train.batch_size * augment.reads
    slots = range(min(n, run.train.batch_size) * augment.reads)
    batch = next(train_batches(source, train_crop(run), run.train.seed, read, range(1), slots=slots))
    return augment(batch.images, batch.labels, len(source.classes), run.train.seed, 0)


def build_augment(run: Run) -> Augment:
    """What the settings ask for."""
    d = run.data
    mix = None
    if d.mixup or d.cutmix:
        pairs: Any = d.pairs
        mix = MixUpCutMix(d.mixup or 1.0, mixup=d.mixup > 0, cutmix=d.cutmix, pairs=pairs)
    if d.autoaugment:
        return Augment(mix, AutoAugment())
    return Augment(mix, RandAugment(d.randaugment, d.magnitude) if d.randaugment else None)


def _network(m: ModelConfig, classes: int) -> Network:
    return create_model(
        m.name,
        classes,
        drop_rate=m.drop_rate,
        stochastic_depth=m.stochastic_depth,
        skip_init=m.skip_init,
        **parse_options(m.options),
    )


def _optimizer(o: OptimConfig, model: Network) -> torch.optim.Optimizer:
    clipping = o.clipping if o.kind in ("agc", "adamw") else None
    groups: Any = param_groups(model, o.weight_decay, clipping, overrides=_overrides(o, model, clipping))
    if o.kind == "lars":
        return LARS(groups, lr=o.lr, momentum=o.momentum)
    if o.kind == "adamw":
        return torch.optim.AdamW(groups, lr=o.lr)
    return AGCSGD(groups, o.lr, o.momentum, o.nesterov, clipping=clipping, eps=o.eps, skip_nonfinite=True)


def _overrides(o: OptimConfig, model: Network, clipping: float | None) -> dict[str, float | None]:
    """Lambda by name, where it differs from the paper's."""
    if clipping is None:
        return {}
    classifier: dict[str, float | None] = {"fc.weight": clipping} if o.clip_classifier else {}
    return classifier | lambdas_by_name(model, o.lambdas) | unclipped_names(model, o.unclipped)


def lambdas_by_name(model: Network, settings: tuple[str, ...]) -> dict[str, float | None]:
    """Overrides for `param_groups` from PART=LAMBDA, with parts as `unclipped_names` takes them. The last one wins.

    Raises:
        UserError: a part that the network does not have, or a lambda that is no positive number.
    """
    found: dict[str, float | None] = {}
    for setting in settings:
        part, _, text = setting.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise UserError(f"optim.lambdas are PART=LAMBDA, as stage1=0.02, not {setting!r}")
        found |= dict.fromkeys(_names_of(model, part), value)
    return found


def unclipped_names(model: Network, parts: tuple[str, ...]) -> dict[str, None]:
    """Overrides for `param_groups` that exempt parts of a network, "stem", "stage0", .., "head", or patterns of names.

    Raises:
        UserError: a part that the network does not have.
    """
    return dict.fromkeys(name for part in parts for name in _names_of(model, part))


def _names_of(model: Network, part: str) -> list[str]:
    names = [n for n, _ in model.named_parameters()]
    found = [n for n in names if part == model.part_of(n) or fnmatchcase(n, part)]
    if not found:
        known = ", ".join(sorted({model.part_of(n) for n in names}))
        raise UserError(f"no part or parameter of the network is called {part!r}; its parts are {known}")
    return found

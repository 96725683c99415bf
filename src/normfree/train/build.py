"""The learner of a run, from its settings."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch

from normfree.config import ModelConfig, OptimConfig, Run, UserError
from normfree.data.crop import Preprocessing
from normfree.models import Network, create_model, parse_options
from normfree.optim import AGCSGD, EMA, LARS, SAM, param_groups
from normfree.train.length import Length
from normfree.train.step import Learner


def build_learner(run: Run, classes: int, length: Length, preprocessing: Preprocessing) -> Learner:
    """A learner at its start; the weights are drawn from torch's generator, seeded with the run's seed."""
    torch.manual_seed(run.train.seed)
    o, t = run.optim, run.train
    model = _network(run.model, classes).to(device=t.device).train()
    model.remat = t.remat
    return Learner(
        model,
        EMA(model, o.ema_decay),
        _optimizer(o, model),
        length.schedule(o),
        preprocessing,
        run,
        head_steps=o.head_only * length.per_epoch,
        micro_batch=t.micro_batch,
        scaler=torch.amp.GradScaler(t.device.partition(":")[0]) if t.precision == "fp16" else None,
        sam=SAM(model.parameters(), o.sam_rho) if o.sam_rho > 0 else None,
    )


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
    groups: Any = param_groups(model, o.weight_decay, clipping, overrides=_overrides(o, model))
    if o.kind == "lars":
        return LARS(groups, lr=o.lr, momentum=o.momentum)
    if o.kind == "adamw":
        return torch.optim.AdamW(groups, lr=o.lr)
    return AGCSGD(groups, lr=o.lr, momentum=o.momentum, nesterov=o.nesterov, clipping=clipping, eps=o.eps)


def _overrides(o: OptimConfig, model: Network) -> dict[str, float | None]:
    """Lambda by name, where it differs from the paper's."""
    classifier: dict[str, float | None] = {"fc.weight": o.clipping} if o.clip_classifier else {}
    return classifier | unclipped_names(model, o.unclipped)


def unclipped_names(model: Network, parts: tuple[str, ...]) -> dict[str, None]:
    """Overrides for `param_groups` that exempt parts of a network, "stem", "stage0", .., "head", or patterns of names.

    Raises:
        UserError: a part that the network does not have.
    """
    names = [n for n, _ in model.named_parameters()]
    found: dict[str, None] = {}
    for part in parts:
        of_part = [n for n in names if part == model.part_of(n) or fnmatchcase(n, part)]
        if not of_part:
            known = ", ".join(sorted({model.part_of(n) for n in names}))
            raise UserError(f"no part or parameter of the network is called {part!r}; its parts are {known}")
        found |= dict.fromkeys(of_part)
    return found

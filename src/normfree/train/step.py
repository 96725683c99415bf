"""One optimizer step, and the model with everything that moves with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from normfree import random
from normfree.config import Run
from normfree.data.crop import Preprocessing
from normfree.data.loader import Batch
from normfree.models import Network, create_model, parse_options
from normfree.models.weights import Loaded, fill_from
from normfree.nn.layers import Draws
from normfree.optim import AGCSGD, EMA, WarmupCosine, param_groups
from normfree.random import Purpose

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Learner:
    """The network, its average, the optimizer and the schedule."""

    model: Network
    ema: EMA
    optimizer: AGCSGD
    schedule: WarmupCosine
    preprocessing: Preprocessing  # its mean and std serve training too
    run: Run

    def step(self, batch: Batch, step: int) -> Tensor:
        """Update the weights and their average on a batch; `step` counts from 0.

        Returns:
            (4,) float64 on the device: sum of the losses, correct predictions, clipped units, units.
        """
        train, device = self.run.train, self.model.fc.weight.device
        images = batch.images.to(device, non_blocking=True)
        labels = batch.labels.to(device, non_blocking=True)
        x = self.preprocessing.normalize(images, PRECISIONS[train.precision])
        logits = self.model(x, self._draws(step, len(labels)))
        loss = F.cross_entropy(logits, labels, label_smoothing=self.run.optim.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(step)
        self.optimizer.step()
        self.ema.update(self.model)
        hits = (logits.argmax(1) == labels).sum()
        clipped, units = self.optimizer.clipped_units()
        counts = torch.stack([loss.detach().double() * len(labels), hits.double(), clipped.double()])
        return torch.cat([counts, counts.new_full((1,), units)])

    def _draws(self, step: int, n: int) -> Draws:
        """The masks of dropout and stochastic depth, by (seed, step, slot, layer)."""
        config, seed, slots = self.model.config, self.run.train.seed, np.arange(n)
        device = self.model.fc.weight.device
        keep = dropout = None
        if config.stochastic_depth > 0:
            draws = random.uniform(seed, Purpose.DEPTH, step, slots, n=len(self.model.blocks))
            keep = torch.from_numpy(draws).to(device)
        if config.drop_rate > 0:
            draws = random.uniform(seed, Purpose.DROPOUT, step, slots, n=self.model.num_features)
            dropout = torch.from_numpy(draws).to(device)
        return self.model.draws(n, keep, dropout)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint must hold, by name."""
        found = {f"model.{n}": t for n, t in self.model.state_dict().items()}
        found |= {f"ema.{n}": t for n, t in self.ema.module.state_dict().items()}
        return found | {f"momentum.{n}": t for n, t in self._momentum().items()}

    def load_tensors(self, tensors: dict[str, Tensor], step: int) -> None:
        """Take over what `tensors` returned after `step` steps."""
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "momentum": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self.model.load_state_dict(parts["model"])
        self.ema.module.load_state_dict(parts["ema"])
        self.ema.updates = step
        for name, buffer in self._momentum().items():
            buffer.copy_(parts["momentum"][name])

    def start_from(self, path: Path) -> Loaded:
        """Take weights from a file, which the average starts from too. A classifier for other classes stays new."""
        loaded = fill_from(self.model, path)
        self.ema.module.load_state_dict(self.model.state_dict())
        return loaded

    def _momentum(self) -> dict[str, Tensor]:
        groups = self.optimizer.param_groups
        return {n: self.optimizer.momentum(p) for g in groups for n, p in zip(g["names"], g["params"], strict=True)}


def build_learner(run: Run, classes: int, steps: int, steps_per_epoch: float, preprocessing: Preprocessing) -> Learner:
    """A learner at its start; the weights are drawn from torch's generator, seeded with the run's seed."""
    torch.manual_seed(run.train.seed)
    m, o = run.model, run.optim
    model = create_model(
        m.name,
        classes,
        drop_rate=m.drop_rate,
        stochastic_depth=m.stochastic_depth,
        skip_init=m.skip_init,
        **parse_options(m.options),
    )
    model = model.to(device=run.train.device)
    groups = param_groups(model, weight_decay=o.weight_decay, clipping=o.clipping)
    optimizer = AGCSGD(groups, lr=o.lr, momentum=o.momentum, nesterov=o.nesterov, eps=o.eps)
    schedule = WarmupCosine(o.lr, steps, min(o.warmup * steps_per_epoch, steps - 1))
    return Learner(model.train(), EMA(model, o.ema_decay), optimizer, schedule, preprocessing, run)

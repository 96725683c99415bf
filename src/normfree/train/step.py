"""One optimizer step, and the model with everything that moves with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from normfree import random
from normfree.config import Run, UserError
from normfree.data.crop import Preprocessing
from normfree.data.loader import Batch
from normfree.models import Network, create_model, parse_options
from normfree.models.weights import Loaded, fill_from
from normfree.nn.layers import Draws
from normfree.optim import AGCSGD, EMA, LARS, SAM, WarmupCosine, param_groups
from normfree.optim.agc import clip_group_
from normfree.random import Purpose
from normfree.train.loss import hits, sample_losses

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


_Counts = tuple[list[str], Tensor, list[int]]  # names of tensors, clipped units of each, all units of each


class Outcome(NamedTuple):
    """What a step did. sums: (4,) float64 on the device: of losses, correct predictions, clipped units, units.

    applied: False where float16 overflowed and the weights were left alone.
    """

    sums: Tensor
    applied: bool


@dataclass
class Learner:
    """The network, its average, the optimizer and the schedule."""

    model: Network
    ema: EMA
    optimizer: torch.optim.Optimizer
    schedule: WarmupCosine
    preprocessing: Preprocessing  # its mean and std serve training too
    run: Run
    class_weights: Tensor | None = None
    head_steps: float = 0.0  # at the start, in which the classifier alone moves
    micro_batch: int | None = None  # images at once; falls when memory runs out
    sam: SAM | None = None
    scaler: torch.amp.GradScaler | None = None
    clipped: dict[str, tuple[Tensor, int]] = field(default_factory=dict)  # (clipped, looked at) units by tensor

    def step(self, batch: Batch, taken: int, applied: int) -> Outcome:
        """Update the weights and their average on a batch.

        Args:
            batch: its images may be fewer than usual.
            taken: batches before this one, which key the random masks.
            applied: steps before this one that changed the weights, which give the learning rate.
        """
        device = self.model.fc.weight.device
        images = batch.images.to(device, non_blocking=True)
        targets = batch.labels.to(device, non_blocking=True)
        sums = self._fitting_gradients(_Work(images, targets, self._draws(taken, len(targets))))
        if applied < self.head_steps:
            for name, p in self.model.named_parameters():
                if not name.startswith("fc."):
                    p.grad = None  # neither clipped, nor decayed, nor in the momentum
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(applied)
        counts = self._update()
        if counts is None:
            return Outcome(torch.cat([sums, sums.new_zeros(2)]), applied=False)
        self.ema.update(self.model)
        return Outcome(torch.cat([sums, self._count(counts)]), applied=True)

    def _fitting_gradients(self, work: _Work) -> Tensor:
        """`_gradients`, of half as many images at once, from now on, as long as memory runs out."""
        images = len(work.targets)
        buffers = [(b, b.clone()) for b in self.model.buffers()]  # of batch norm
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            try:
                return self._gradients(work)
            except (RuntimeError, MemoryError) as e:
                if not _is_out_of_memory(e) or min(images, self.micro_batch or images) == 1:
                    raise
            # behind the handler, which keeps the maps of the failed step alive
            if self.sam is not None:
                self.sam.restore()
            for buffer, before in buffers:
                buffer.copy_(before)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.micro_batch = max(1, min(self.micro_batch or images, images) // 2)

    def _gradients(self, work: _Work) -> Tensor:
        """Leave the mean gradient over the batch in the parameters; with SAM, of each shard at its ascent point."""
        o, n = self.run.optim, len(work.targets)
        if self.sam is None:
            return self._backward(work, range(n), n)
        sums = torch.zeros(2, dtype=torch.float64, device=work.images.device)
        shards = min(o.sam_shards, n)
        for s in range(shards):
            slots = range(s * n // shards, (s + 1) * n // shards)
            few = slots[:: o.sam_every]
            with self.sam.ascent():
                self._backward(work, few, len(few))
            with self.sam.descent(), _frozen_statistics(self.model):
                sums += self._backward(work, slots, n)
        return sums

    def _backward(self, work: _Work, slots: range, n: int) -> Tensor:
        """Add the gradient of (sum of the slots' losses) / n; returns (2,) sums of losses and correct predictions."""
        o, dtype = self.run.optim, PRECISIONS[self.run.train.precision]
        sums = torch.zeros(2, dtype=torch.float64, device=work.images.device)
        for part in _parts(slots, self.micro_batch):
            images, targets, draws = work.at(part)
            logits = self.model(self.preprocessing.normalize(images, dtype), draws)
            losses = sample_losses(logits, targets, o.loss, o.label_smoothing, self.class_weights)
            loss = losses.sum() / n
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            sums += torch.stack([losses.detach().double().sum(), hits(logits, targets).double()])
        return sums

    def _update(self) -> list[_Counts] | None:
        """Clip and step, gradients unscaled first: what AGC found; None if float16 overflowed, and nothing was done."""
        o = self.run.optim
        counts: list[_Counts] = []
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if o.kind == "norm":
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), o.clipping)
        elif o.kind == "adamw":
            for group in self.optimizer.param_groups:
                indices, found = clip_group_(group, o.eps)
                if found is not None:
                    counts.append(([group["names"][i] for i in indices], found.clipped, found.units))
        if self.scaler is None:
            self.optimizer.step()
        else:
            before = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if not self.scaler.get_scale() >= before > 0:  # it falls where a step was left out
                return None
        if isinstance(self.optimizer, AGCSGD):
            counts.append(self.optimizer.clipped_by_name())
        return counts

    def _count(self, counts: list[_Counts]) -> Tensor:
        """Add to the counts by tensor; returns (2,) clipped and all units of the step."""
        totals = torch.zeros(2, dtype=torch.float64, device=self.model.fc.weight.device)
        for names, clipped, units in counts:
            for name, count, all_units in zip(names, clipped, units, strict=True):
                before, looked_at = self.clipped.get(name, (torch.zeros_like(count), 0))
                self.clipped[name] = (before.to(count.device) + count, looked_at + all_units)
            totals[0] += clipped.sum()
            totals[1] += sum(units)
        return totals

    def clipped_shares(self) -> dict[str, float]:
        """The share of clipped units of each tensor since this was last asked."""
        shares = {n: int(clipped) / units for n, (clipped, units) in self.clipped.items()}
        self.clipped = {}
        return shares

    def _draws(self, taken: int, n: int) -> Draws:
        """The masks of dropout and stochastic depth, by (seed, step, slot, layer)."""
        config, seed, slots = self.model.config, self.run.train.seed, np.arange(n)
        device = self.model.fc.weight.device
        keep = dropout = None
        if config.stochastic_depth > 0:
            draws = random.uniform(seed, Purpose.DEPTH, taken, slots, n=len(self.model.blocks))
            keep = torch.from_numpy(draws).to(device)
        if config.drop_rate > 0:
            draws = random.uniform(seed, Purpose.DROPOUT, taken, slots, n=self.model.num_features)
            dropout = torch.from_numpy(draws).to(device)
        return self.model.draws(n, keep, dropout)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint must hold, by name."""
        found = {f"model.{n}": t for n, t in self.model.state_dict().items()}
        found |= {f"ema.{n}": t for n, t in self.ema.module.state_dict().items()}
        for name, p in self._optimized():
            for key, value in self.optimizer.state[p].items():
                found[f"{key}.{name}"] = value
        return found

    def load_tensors(self, tensors: dict[str, Tensor], applied: int) -> None:
        """Take over what `tensors` returned after so many steps."""
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = tensor
        self.model.load_state_dict(parts.pop("model"))
        self.ema.module.load_state_dict(parts.pop("ema"))
        self.ema.updates = applied
        for name, p in self._optimized():
            for key, values in parts.items():
                if name in values:
                    value = values[name]
                    self.optimizer.state[p][key] = value.to(p.device) if value.ndim else value

    def start_from(self, path: Path) -> Loaded:
        """Take weights from a file, which the average starts from too. A classifier for other classes stays new."""
        loaded = fill_from(self.model, path)
        self.ema.module.load_state_dict(self.model.state_dict())
        return loaded

    def _optimized(self) -> Iterator[tuple[str, Tensor]]:
        for group in self.optimizer.param_groups:
            yield from zip(group["names"], group["params"], strict=True)


class _Work(NamedTuple):
    """A batch on the device: images (N, 3, H, W), targets, and the masks of each slot."""

    images: Tensor
    targets: Tensor
    draws: Draws

    def at(self, slots: range) -> tuple[Tensor, Tensor, Draws]:
        where = slice(slots.start, slots.stop, slots.step)
        keep, dropout = (None if d is None else d[where] for d in self.draws)
        return self.images[where], self.targets[where], Draws(keep, dropout)


def _parts(slots: range, size: int | None) -> Iterator[range]:
    """The slots, at most so many at once."""
    size = size or len(slots)
    return (slots[i : i + size] for i in range(0, len(slots), size))


@contextmanager
def _frozen_statistics(model: torch.nn.Module) -> Iterator[None]:
    """Batch norm goes by the batch, as in training, and leaves its running statistics as the ascent made them."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d) and m.track_running_stats]
    for m in norms:
        m.track_running_stats = False
    try:
        yield
    finally:
        for m in norms:
            m.track_running_stats = True


def _is_out_of_memory(e: BaseException) -> bool:
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(e, (torch.cuda.OutOfMemoryError, MemoryError)) or any(w in str(e) for w in words)


def build_learner(run: Run, classes: int, steps: int, steps_per_epoch: float, preprocessing: Preprocessing) -> Learner:
    """A learner at its start; the weights are drawn from torch's generator, seeded with the run's seed."""
    torch.manual_seed(run.train.seed)
    m, o, t = run.model, run.optim, run.train
    model = create_model(
        m.name,
        classes,
        drop_rate=m.drop_rate,
        stochastic_depth=m.stochastic_depth,
        skip_init=m.skip_init,
        **parse_options(m.options),
    )
    model = model.to(device=t.device).train()
    model.remat = t.remat
    schedule = WarmupCosine(o.lr, steps, min(o.warmup * steps_per_epoch, steps - 1), floor=o.floor)
    learner = Learner(model, EMA(model, o.ema_decay), _optimizer(run, model), schedule, preprocessing, run)
    scaler = torch.amp.GradScaler(t.device.partition(":")[0]) if t.precision == "fp16" else None
    sam = SAM(model.parameters(), o.sam_rho) if o.sam_rho > 0 else None
    head_steps = o.head_only * steps_per_epoch
    return replace(learner, head_steps=head_steps, micro_batch=t.micro_batch, scaler=scaler, sam=sam)


def _optimizer(run: Run, model: Network) -> torch.optim.Optimizer:
    o = run.optim
    clipping = o.clipping if o.kind in ("agc", "adamw") else None
    groups: Any = param_groups(model, o.weight_decay, clipping, overrides=unclipped_names(model, o.unclipped))
    if o.kind == "lars":
        return LARS(groups, lr=o.lr, momentum=o.momentum)
    if o.kind == "adamw":
        return torch.optim.AdamW(groups, lr=o.lr)
    return AGCSGD(groups, lr=o.lr, momentum=o.momentum, nesterov=o.nesterov, clipping=clipping, eps=o.eps)


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

"""One optimizer step, and the model with everything that moves with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from normfree import random
from normfree.config import Run, is_out_of_memory
from normfree.data.augment import Augment
from normfree.data.crop import Preprocessing
from normfree.data.loader import Batch
from normfree.models import Network
from normfree.models.weights import Loaded, fill_from
from normfree.nn.layers import Draws
from normfree.nn.loss import hits, sample_losses
from normfree.optim import AGCSGD, EMA, SAM, WarmupCosine
from normfree.optim.agc import clip_group_
from normfree.random import Purpose

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
    augment: Augment = field(default_factory=Augment)
    class_weights: Tensor | None = None
    head_steps: float = 0.0  # at the start, in which the classifier alone moves
    micro_batch: int | None = None  # images at once; falls when memory runs out
    sam: SAM | None = None
    scaler: torch.amp.GradScaler | None = None
    # units that were clipped, on the device, and looked at: a row for each of the tensors that were looked at together
    clipped: dict[tuple[str, ...], tuple[Tensor, list[int]]] = field(default_factory=dict)

    def step(self, batch: Batch, taken: int, applied: int) -> Outcome:
        """Update the weights and their average on a batch.

        Args:
            batch: what the loader delivers.
            taken: batches before this one, which key the augmentation and the random masks.
            applied: steps before this one that changed the weights, which give the learning rate.
        """
        device = self.model.fc.weight.device
        images = batch.images.to(device, non_blocking=True)
        labels = batch.labels.to(device, non_blocking=True)
        classes = self.model.config.num_classes
        images, targets = self.augment(images, labels, classes, self.run.train.seed, taken)
        head_only = applied < self.head_steps
        if self.head_steps > 0:
            for name, p in self.model.named_parameters():
                p.requires_grad_(not head_only or name.startswith("fc."))
        buffers = _Buffers(self.model)
        with frozen_statistics(self.model) if head_only else nullcontext():
            sums = self._fitting_gradients(_Work(images, targets, self._draws(taken, len(targets))), buffers)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(applied)
        counts = self._update()
        if counts is None:
            buffers.restore()
            return Outcome(torch.cat([sums, sums.new_zeros(2)]), applied=False)
        self.ema.update(self.model)
        return Outcome(torch.cat([sums, self._count(counts)]), applied=True)

    def _fitting_gradients(self, work: _Work, buffers: _Buffers) -> Tensor:
        """`_gradients`, of half as many images at once, from now on, as long as memory runs out."""
        n = len(work.targets)
        images = -(-n // min(self.run.optim.sam_shards, n)) if self.sam is not None else n  # in one pass, at most
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            try:
                return self._gradients(work)
            except (RuntimeError, MemoryError) as e:
                if not is_out_of_memory(e) or min(images, self.micro_batch or images) == 1:
                    raise
            # behind the handler, which keeps the maps of the failed step alive
            if self.sam is not None:
                self.sam.restore()
            buffers.restore()
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
            with self.sam.descent(), frozen_statistics(self.model):
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
            key = tuple(names)
            before, looked_at = self.clipped.get(key, (torch.zeros_like(clipped), [0] * len(units)))
            self.clipped[key] = before + clipped, [a + b for a, b in zip(looked_at, units, strict=True)]
            totals[0] += clipped.sum()
            totals[1] += sum(units)
        return totals

    def clipped_units(self) -> dict[str, tuple[int, int]]:
        """(clipped, looked at) units of each tensor since `clipped_shares` was last asked."""
        found: dict[str, tuple[int, int]] = {}
        for names, (clipped, units) in self.clipped.items():
            for name, a, b in zip(names, clipped.tolist(), units, strict=True):
                before = found.get(name, (0, 0))
                found[name] = before[0] + a, before[1] + b
        return found

    def clipped_shares(self) -> dict[str, float]:
        """The share of clipped units of each tensor since this was last asked."""
        shares = {name: clipped / units for name, (clipped, units) in self.clipped_units().items()}
        self.clipped = {}
        return shares

    def load_clipped_units(self, units: Mapping[str, Sequence[int]]) -> None:
        """Go on counting from what `clipped_units` returned."""
        self.clipped = {}
        if units:
            clipped = torch.tensor([a for a, _ in units.values()], device=self.model.fc.weight.device)
            self.clipped[tuple(units)] = clipped, [b for _, b in units.values()]

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


class _Buffers:
    """The running statistics of batch norm, to be put back where a step is given up."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._saved = [(b, b.clone()) for b in model.buffers()]

    def restore(self) -> None:
        for buffer, before in self._saved:
            buffer.copy_(before)


@contextmanager
def frozen_statistics(model: torch.nn.Module) -> Iterator[None]:
    """Batch norm goes by the batch, as in training, and leaves its running statistics as they are."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d) and m.track_running_stats]
    for m in norms:
        m.track_running_stats = False
    try:
        yield
    finally:
        for m in norms:
            m.track_running_stats = True

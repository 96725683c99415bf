"""One optimizer step, and the model with everything that moves with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
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
from normfree.distributed import Group
from normfree.models import Network
from normfree.models.weights import Loaded, fill_from
from normfree.nn.conv import standardized_once
from normfree.nn.layers import Draws
from normfree.nn.loss import hits, sample_losses
from normfree.optim import AGCSGD, EMA, SAM, WarmupCosine
from normfree.optim.agc import all_finite, clip_group_
from normfree.random import Purpose
from normfree.train.reduce import GradientSum, Tree, average_, gradients
from normfree.train.sharded import RowSum, load_full, shard, shard_like
from normfree.train.share import Ascent, Share, ascents, share_of, unit_of
from normfree.train.work import Buffers, Work, frozen_statistics, parts_of

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


Total = GradientSum | RowSum
_Counts = tuple[list[str], Tensor, list[int]]  # names of tensors, clipped units of each, all units of each


class Outcome(NamedTuple):
    """What a step did. sums: (4,) float64 on the device: of losses, correct predictions, clipped units, units.

    The first two are of this process's images, or with `train.shards` of the whole batch; the others are of the whole.
    applied: False where the loss or a gradient was not finite, such as when float16 overflows: nothing was changed.
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
    attempt: int = 0  # grows with every roll-back, so that what follows is drawn anew
    micro_batch: int | None = None  # images at once; falls when memory runs out
    sam: SAM | None = None
    scaler: torch.amp.GradScaler | None = None
    group: Group = field(default_factory=Group.alone)  # the processes that share the batch
    # units that were clipped, on the device, and looked at: a row for each of the tensors that were looked at together
    clipped: dict[tuple[str, ...], tuple[Tensor, list[int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parameters, world = list(self.model.parameters()), self.group.world
        self._averaged_over = 1  # processes, where a sum of gradients comes out as their mean
        self._sum: Total = GradientSum(parameters, self.group)
        together = world // self.run.optim.sam_shards if self.sam is not None else 1  # processes that ascend as one
        self._ascent_sum: Total = GradientSum(parameters, self.group.split(max(1, together)))

    def shard(self) -> None:
        """Deal weights, average and momentum to the processes, which then hold a part of each; once, before steps."""
        from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415 - of which others need nothing

        mesh = init_device_mesh(self.model.fc.weight.device.type, (self.group.world,))
        kept = {name: self.optimizer.state.pop(p, {}) for name, p in self._optimized()}
        shard(self.model, mesh)
        shard(self.ema.module, mesh)
        parameters = dict(self.model.named_parameters())
        for group in self.optimizer.param_groups:
            group["params"] = [parameters[name] for name in group["names"]]
        for name, state in kept.items():
            for key, value in state.items():
                self.optimizer.state[parameters[name]][key] = shard_like(value, parameters[name])
        if self.sam is not None:
            self.sam = SAM(self.model.parameters(), self.run.optim.sam_rho)
        self._sum = self._ascent_sum = RowSum(self.model)
        self._averaged_over = self.group.world

    def share(self, n: int) -> Share:
        """What this process computes of a step's batch: alone all of the n outputs that it has."""
        if self.group.world == 1:
            return Share(range(n), n)
        return share_of(self.group.rank, self.group.world, self.run.train.batch_size, unit_of(self.run))

    def step(self, batch: Batch, taken: int, applied: int) -> Outcome:
        """Update the weights and their average on a batch.

        Args:
            batch: what the loader delivers, of the slots of `share`.
            taken: batches before this one, which key the augmentation and the random masks.
            applied: steps before this one that changed the weights, which give the learning rate.
        """
        device = self.model.fc.weight.device
        images = batch.images.to(device, non_blocking=True)
        labels = batch.labels.to(device, non_blocking=True)
        classes = self.model.config.num_classes
        share = self.share(len(labels) // self.augment.reads)
        images, targets = self.augment(images, labels, classes, self.run.train.seed, taken, share.slots, self.attempt)
        head_only = applied < self.head_steps
        if self.head_steps > 0:
            for name, p in self.model.named_parameters():
                p.requires_grad_(not head_only or name.startswith("fc."))
        buffers = Buffers(self.model)
        with frozen_statistics(self.model) if head_only else nullcontext():
            draws = self._draws(taken, len(targets), share.slots.start)
            sums = self._fitting_gradients(Work(images, targets, draws, share), buffers)
        average_([b for b in self.model.buffers() if b.is_floating_point()], self.group)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(applied)
        counts = self._update()
        if counts is None:
            buffers.restore()
            return Outcome(torch.cat([sums, sums.new_zeros(2)]), applied=False)
        self.ema.update(self.model)
        return Outcome(torch.cat([sums, self._count(counts)]), applied=True)

    def _fitting_gradients(self, work: Work, buffers: Buffers, alone: bool = False) -> Tensor:
        """`_gradients`, of half as many images at once, from now on, as long as memory runs out.

        Not where other processes wait for a sum, nor where shards have a fixed shape.
        """
        images = self.at_most(len(work.targets))
        fixed = self.run.train.shards is not None or (self.group.world > 1 and not alone)
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            try:
                return self._gradients(work, alone)
            except (RuntimeError, MemoryError) as e:
                if fixed or not is_out_of_memory(e) or min(images, self.micro_batch or images) == 1:
                    raise
            # behind the handler, which keeps the maps of the failed step alive
            if self.sam is not None:
                self.sam.restore()
            buffers.restore()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.micro_batch = max(1, min(self.micro_batch or images, images) // 2)

    def at_most(self, n: int) -> int:
        """Images of n that are computed in one pass if memory suffices: with SAM, those of an ascent's shard."""
        if self.sam is None:
            return n
        total = n if self.group.world == 1 else self.run.train.batch_size
        return min(n, -(-total // min(self.run.optim.sam_shards, total)))

    def fit_memory(self, size: int) -> None:
        """Find out how many images fit at once, on blank ones of `size` pixels; weights and statistics do not move.

        No other process is waited for: each may find another number in `micro_batch`.
        """
        device, share = self.model.fc.weight.device, self.share(self.run.train.batch_size)
        n = len(share.slots)
        images = torch.zeros(n, 3, size, size, dtype=torch.uint8, device=device).to(memory_format=torch.channels_last)
        labels = torch.zeros(n, dtype=torch.int64, device=device)
        work = Work(images, labels, self._draws(0, n), share)
        buffers = Buffers(self.model)
        self._fitting_gradients(work, buffers, alone=True)
        self.optimizer.zero_grad(set_to_none=True)
        buffers.restore()

    def _gradients(self, work: Work, alone: bool) -> Tensor:
        """Leave the mean gradient over the batch in the parameters; with SAM, of each shard at its ascent point.

        `alone` leaves out what other processes have.
        """
        n = len(work.targets)
        if self.run.train.shards is not None:
            return self._in_shards(work, Group.alone() if alone else self.group)
        total, ascent_total = (None, None) if alone else (self._sum, self._ascent_sum)
        if self.sam is None:
            return self._backward(work, range(n), work.share.total, total)
        sums = torch.zeros(2, dtype=torch.float64, device=work.images.device)
        parts = list(ascents(work.share, self.run.optim.sam_shards, self.run.optim.sam_every))
        for part in parts:
            sums += self._descend(work, part, ascent_total, total if part is parts[-1] else None)
        return sums

    def _descend(
        self,
        work: Work,
        part: Ascent,
        ascent_total: Total | None = None,
        total: Total | None = None,
    ) -> Tensor:
        """`_backward` of a part at the point to which its own gradient leads."""
        assert self.sam is not None
        with self.sam.ascent():
            self._backward(work, part.few, part.seen, ascent_total)
        with self.sam.descent(), frozen_statistics(self.model):
            return self._backward(work, part.slots, work.share.total, total)

    def _in_shards(self, work: Work, group: Group) -> Tensor:
        """`_gradients` of shards of one shape, added in one order: the same bits for any number of processes."""
        size = work.share.total // (self.run.train.shards or 1)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        tree = Tree(group)
        for start in range(0, len(work.targets), size):
            self.optimizer.zero_grad(set_to_none=True)
            slots = range(start, start + size)
            if self.sam is None:
                sums = self._backward(work, slots, work.share.total)
            else:
                few = slots[:: self.run.optim.sam_every]
                sums = self._descend(work, Ascent(few, len(few), slots))
            tree.add([*gradients(parameters), sums])
        *found, sums = tree.root()
        for p, gradient in zip(parameters, found, strict=True):
            p.grad = gradient
        return sums

    def _backward(self, work: Work, slots: range, n: int, total: Total | None = None) -> Tensor:
        """Add the gradient of (sum of the slots' losses) / n; returns (2,) sums of losses and correct predictions.

        With a `total` the gradients are then summed over processes, which have other slots.
        """
        o, dtype = self.run.optim, PRECISIONS[self.run.train.precision]
        sums = torch.zeros(2, dtype=torch.float64, device=work.images.device)
        parts = list(parts_of(slots, self.micro_batch)) or [slots]  # nothing of an ascent may be here
        once = standardized_once(self.model) if self._shares_weights(parts) else nullcontext(None)
        with once as carry:
            for part in parts:
                with total.last() if total is not None and part is parts[-1] else nullcontext():
                    if not part:
                        continue
                    images, targets, draws = work.at(part)
                    logits = self.model(self.preprocessing.normalize(images, dtype), draws)
                    losses = sample_losses(logits, targets, o.loss, o.label_smoothing, self.class_weights)
                    loss = losses.sum() / (n / self._averaged_over)
                    # of a loss that is not finite the gradients might be: they must tell
                    seed = torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan).to(loss.dtype)
                    (loss if self.scaler is None else self.scaler.scale(loss)).backward(seed)
                    sums += torch.stack([losses.detach().double().sum(), hits(logits, targets).double()])
            if carry is not None:
                carry()
        return sums

    def _shares_weights(self, parts: list[range]) -> bool:
        """Whether the passes of several parts can share the standardised weights.

        Not where gradients are sent while the last pass goes on, nor where weights are dealt out; nor in a compiled
        network, where they cost next to nothing.
        """
        whole = (self.group.world == 1 or bool(self.run.train.shards)) and isinstance(self._sum, GradientSum)
        return whole and len(parts) > 1 and self.model._compiled_call_impl is None

    def _update(self) -> list[_Counts] | None:
        """Clip and step, gradients unscaled first: what AGC found; None if they were not finite: nothing was done."""
        o = self.run.optim
        counts: list[_Counts] = []
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        elif not isinstance(self.optimizer, AGCSGD) and not all_finite(grads):
            return None
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
            if self.optimizer.skipped:
                return None
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

    def _draws(self, taken: int, n: int, first: int = 0) -> Draws:
        """The masks of dropout and stochastic depth of n slots from the first, by (seed, step, slot, layer)."""
        config, seed, slots = self.model.config, self.run.train.seed, np.arange(first, first + n)
        device = self.model.fc.weight.device
        keep = dropout = None
        if config.stochastic_depth > 0:
            draws = random.uniform(seed, Purpose.DEPTH, taken, slots, n=len(self.model.blocks), attempt=self.attempt)
            keep = torch.from_numpy(draws).to(device)
        if config.drop_rate > 0:
            draws = random.uniform(seed, Purpose.DROPOUT, taken, slots, n=self.model.num_features, attempt=self.attempt)
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
        load_full(self.model, parts.pop("model"))
        load_full(self.ema.module, parts.pop("ema"))
        self.ema.updates = applied
        for name, p in self._optimized():
            self.optimizer.state.pop(p, None)  # what came later has no place in it
            for key, values in parts.items():
                if name in values:
                    value = values[name]
                    self.optimizer.state[p][key] = shard_like(value, p) if value.ndim else value

    def start_from(self, path: Path) -> Loaded:
        """Take weights from a file, which the average starts from too. A classifier for other classes stays new."""
        loaded = fill_from(self.model, path)
        self.ema.module.load_state_dict(self.model.state_dict())
        return loaded

    def _optimized(self) -> Iterator[tuple[str, Tensor]]:
        for group in self.optimizer.param_groups:
            yield from zip(group["names"], group["params"], strict=True)

"""How long a run is, in steps, and the learning rate at each."""

from __future__ import annotations

import math
from dataclasses import dataclass

from normfree.config import OptimConfig, Run
from normfree.optim import WarmupCosine

_ROUNDING = 1e-6  # of a step: epochs x images / batch may come out as 14999.999999999998


@dataclass(frozen=True)
class Length:
    """Steps do not regard where a pass over the images ends: an epoch is a number of steps, seldom a whole one."""

    epochs: float
    per_epoch: float  # steps

    @property
    def total(self) -> int:
        """Steps of the run, at least 1."""
        return max(1, math.floor(self.epochs * self.per_epoch + _ROUNDING))

    def evaluate_at(self) -> frozenset[int]:
        """The first step by which each epoch is done, and the last."""
        ends = {math.ceil(e * self.per_epoch - _ROUNDING) for e in range(1, math.ceil(self.epochs) + 1)}
        return frozenset({min(self.total, max(1, end)) for end in ends} | {self.total})

    def schedule(self, optim: OptimConfig) -> WarmupCosine:
        """The learning rate by step; a warm-up longer than the run ends one step before it."""
        warmup = min(optim.warmup * self.per_epoch, self.total - 1)
        return WarmupCosine(optim.lr, self.total, warmup, floor=optim.floor)


def run_length(run: Run, images: int) -> Length:
    """The length of a run on so many training images."""
    return Length(run.train.epochs, images / run.train.batch_size)

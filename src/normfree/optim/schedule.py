"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class WarmupCosine:
    """Linear from `start` to `peak` over `warmup_steps`, then half a cosine down to `floor` at `total_steps`.

    A pure function of the number of steps applied so far: `schedule(0)` is the rate of the first update, which is
    `start`, 0 in the paper. `warmup_steps` may be fractional, as the authors' 1563.92. Also fits
    `torch.optim.lr_scheduler.LambdaLR`, with peak=1.
    """

    peak: float
    total_steps: int
    warmup_steps: float = 0.0
    start: float = 0.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.total_steps < 1 or not 0 <= self.warmup_steps < self.total_steps:
            raise ValueError(
                f"need 0 <= warmup_steps < total_steps, not {self.warmup_steps} and {self.total_steps} steps"
            )

    def __call__(self, step: int) -> float:
        """The rate at a step, counted from 0; beyond the last step it stays at the floor."""
        if step <= self.warmup_steps and self.warmup_steps > 0:
            return self.start + (self.peak - self.start) * step / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return self.floor + 0.5 * (self.peak - self.floor) * (1.0 + math.cos(math.pi * progress))

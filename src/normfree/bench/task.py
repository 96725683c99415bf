"""What a benchmark of training steps is asked to measure, and what every such step offers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

CLASSES = 1000
TIMM, SAM, COMPILED = "timm:", "+sam", "+compiled"
RATE = 0.01  # of learning: steady, and small, so that after thousands of steps on one batch all numbers are finite


@dataclass(frozen=True)
class Task:
    """What is measured: network, side of the images in pixels, images of a step, type of the maps, device."""

    model: str  # ours by name, with "+sam" if it is trained so, or "timm:NAME"
    size: int
    batch: int
    precision: str = "fp32"
    device: str = "cpu"
    compiled: bool = False
    fused: bool = False  # torch's fused SGD for timm's networks; ours has one optimizer
    micro_batch: int | None = None  # images at once; as many as fit if None
    remat: str = "none"  # compute maps again in backward: of each "block" or "stage"; timm's networks have one way

    @property
    def name(self) -> str:
        """What sets it apart from others that are measured beside it."""
        return self.model + COMPILED * self.compiled


class Step(Protocol):
    """A training step, over and over on the same images; where memory runs out, from then on of fewer at once."""

    @property
    def micro_batch(self) -> int | None:
        """Images at once; None is the whole batch."""

    def __call__(self) -> None: ...

    def is_finite(self) -> bool:
        """Whether all weights are."""


def images(task: Task) -> torch.Tensor:
    """(N, 3, S, S) uint8 of noise, channels last, on the device; the same for every network."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randint(256, (task.batch, task.size, task.size, 3), generator=generator, dtype=torch.uint8)
    return found.permute(0, 3, 1, 2).to(task.device)


def is_finite(model: nn.Module) -> bool:
    """Whether all weights are."""
    return all(bool(torch.isfinite(p).all()) for p in model.parameters())

"""What happens to a batch on the device that trains, in the paper's order: mixing, then operations (A.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normfree.data.autoaugment import AutoAugment
from normfree.data.mix import MixUpCutMix
from normfree.data.randaugment import RandAugment

_AT_ONCE = 256  # outputs, even: operations on a whole batch of thousands would need gigabytes beside it


@dataclass(frozen=True)
class Augment:
    """Draws are functions of (seed, attempt, step, slot), where slots number the outputs of a step's whole batch."""

    mix: MixUpCutMix | None = None
    operations: RandAugment | AutoAugment | None = None

    @property
    def reads(self) -> int:
        """Images that are read for each that comes out."""
        return 2 if self.mix is not None and self.mix.pairs == "disjoint" else 1

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        classes: int,
        seed: int,
        step: int,
        slots: range | None = None,
        attempt: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """(images (N, 3, H, W), targets): targets are the labels as they were, or (N, classes) shares from mixing.

        Args:
            images: (reads N, 3, H, W), uint8; or floating-point, in the range of uint8 and beyond: as in the authors'
                code they are clipped and truncated to uint8 behind the mixing, for the operations.
            labels: (reads N,) int64, or (reads N, classes) float32.
            classes: columns of the targets.
            seed, step, attempt: of the draws, as in `normfree.random`.
            slots: of the N outputs; 0 .. N - 1 if not given.
        """
        slots = range(len(images) // self.reads) if slots is None else slots
        if len(slots) > _AT_ONCE:
            found = []
            for start in range(0, len(slots), _AT_ONCE):
                part = slots[start : start + _AT_ONCE]
                read = slice(start * self.reads, (start + len(part)) * self.reads)
                found.append(self(images[read], labels[read], classes, seed, step, part, attempt))
            return torch.cat([x for x, _ in found]), torch.cat([t for _, t in found])
        size = (images.shape[-2], images.shape[-1])
        if self.mix is not None:
            images, labels = self.mix(images, labels, classes, self.mix.plan(seed, step, slots, size, attempt))
        if self.operations is not None:
            if images.is_floating_point():
                images = images.clamp(0, 255).to(torch.uint8)
            images = self.operations(images, self.operations.plan(seed, step, slots, size, attempt))
        return images, labels

"""What a step works on: its batch with the masks, parts of it that fit into memory, statistics that must not move."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from normfree.nn.layers import Draws
from normfree.train.share import Share


class Work(NamedTuple):
    """A batch on the device: images (N, 3, H, W), targets, and the masks of each slot; share, which they are."""

    images: Tensor
    targets: Tensor
    draws: Draws
    share: Share

    def at(self, slots: range) -> tuple[Tensor, Tensor, Draws]:
        where = slice(slots.start, slots.stop, slots.step)
        keep, dropout = (None if d is None else d[where] for d in self.draws)
        return self.images[where], self.targets[where], Draws(keep, dropout)


def parts_of(slots: range, size: int | None) -> Iterator[range]:
    """The slots, at most so many at once."""
    size = size or max(1, len(slots))
    return (slots[i : i + size] for i in range(0, len(slots), size))


class Buffers:
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

"""Gradients of several processes added up: as quickly as can be, or in one order whatever the number of processes.

`GradientSum` does what DistributedDataParallel does, less what would be in the way here. That one deals gradients to
new buckets after its first step, and a sum over three or more processes is rounded by where in a bucket a number
lies: so a resumed run would differ in the last bits from one that was never stopped. Nor can parameters be frozen for
some steps and moved in others, as at the beginning of a fine-tuning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from normfree.distributed import Group, Pending

_BUCKET = 25 * 2**20  # bytes that are sent at once


class GradientSum:
    """The gradients of parameters, summed over processes while the backward pass is still under way.

    Buckets are fixed: tensors in the reverse of their order, which is about that in which gradients come. They are sent
    in this order, so that all processes do it alike, each when it is full.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], group: Group) -> None:
        self._group = group
        self._buckets = _buckets(parameters)
        self._open = False
        if group.world > 1:
            for b, bucket in enumerate(self._buckets):
                for p in bucket:
                    p.register_post_accumulate_grad_hook(partial(self._arrived, b))

    @contextmanager
    def last(self) -> Iterator[None]:
        """The backward pass in this block, if there is any, is the last of the step: behind it gradients are sums."""
        if self._group.world == 1:
            yield
            return
        self._missing = [sum(p.requires_grad for p in bucket) for bucket in self._buckets]
        self._sent: list[tuple[Tensor, Pending | None]] = []
        self._open = True
        try:
            yield
        finally:
            self._open = False
        while len(self._sent) < len(self._buckets):  # such as those of a process that has no image in this pass
            self._send()
        for bucket, (flat, pending) in zip(self._buckets, self._sent, strict=True):
            if pending is not None:
                pending.wait()
                _scatter(flat, gradients(bucket))
        self._sent = []

    def _arrived(self, bucket: int, _p: Tensor) -> None:
        if self._open:
            self._missing[bucket] -= 1
            while len(self._sent) < len(self._buckets) and self._missing[len(self._sent)] == 0:
                self._send()

    def _send(self) -> None:
        found = gradients(self._buckets[len(self._sent)])
        flat = _flat(found)
        self._sent.append((flat, self._group.add(flat) if found else None))  # all of a bucket may be frozen


class Tree:
    """Sums of lists of tensors in one fixed binary tree of a power of two leaves, dealt evenly to processes in order.

    Leaves come one by one. A sum waits until its neighbour is there, so that log2(leaves) + 1 lists are kept at most.
    Between processes two neighbours swap theirs, then two neighbours of those, and so on: a + b is b + a to the last
    bit, so that all end with the same. The order of a sum by NCCL or gloo depends on how many take part.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._waiting: list[tuple[int, list[Tensor]]] = []  # (level, sums)

    @torch.no_grad()
    def add(self, leaf: list[Tensor]) -> None:
        """The next leaf, whose tensors now belong to the tree."""
        level = 0
        while self._waiting and self._waiting[-1][0] == level:
            _, left = self._waiting.pop()
            for a, b in zip(left, leaf, strict=True):
                a.add_(b)
            level, leaf = level + 1, left
        self._waiting.append((level, leaf))

    @torch.no_grad()
    def root(self) -> list[Tensor]:
        """The sum of all leaves of all processes, once each has added as many."""
        ((_, own),) = self._waiting
        distance = 1
        while distance < self._group.world:
            for kind in {x.dtype: None for x in own}:
                alike = [x for x in own if x.dtype == kind]
                flat = _flat(alike)
                _scatter(flat + self._group.swap(flat, self._group.rank ^ distance), alike)
            distance *= 2
        return own


def average_(tensors: Sequence[Tensor], group: Group) -> None:
    """Replace floating-point tensors by their means over processes, computed in float64: running statistics."""
    if group.world > 1 and tensors:
        flat = _flat([x.double() for x in tensors])
        group.add(flat).wait()
        _scatter(flat / group.world, tensors)


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    found: list[list[nn.Parameter]] = []
    room = 0
    for p in reversed(parameters):
        size = p.numel() * p.element_size()
        if not found or size > room or p.dtype != found[-1][0].dtype:
            found.append([])
            room = _BUCKET
        found[-1].append(p)
        room -= size
    return found


def gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Of those that move; zeros, in the parameter's place, where a pass has left none."""
    found = []
    for p in parameters:
        if p.requires_grad:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            found.append(p.grad)
    return found


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """One after the other, each in the order of its indices, however it lies in memory."""
    return torch.cat([x.flatten() for x in tensors]) if tensors else torch.zeros(0)


def _scatter(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    pieces = flat.split([x.numel() for x in tensors]) if tensors else ()
    for x, piece in zip(tensors, pieces, strict=True):
        x.copy_(piece.view(x.shape))

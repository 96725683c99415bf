"""Sharpness-aware minimisation (Foret et al. 2021), with the paper's cheaper ascent (A.4).

The weights take a step of length rho up the gradient, the gradient there is used, and the weights are put back:

    sam = SAM(model.parameters(), rho=0.05)
    for images, labels in batches:
        optimizer.zero_grad()
        with sam.ascent():  # a fifth of the batch is enough; its gradients only choose the direction
            loss(model(images[::5]), labels[::5]).backward()
        with sam.descent():
            loss(model(images), labels).backward()
        optimizer.step()

The paper found it best where each device ascends along its own gradient. One device mimics many by accumulation: repeat
both blocks for every part of the batch, and step once. Weights may be sharded: all ranks then ascend together, along
the gradient that `fully_shard` averaged over them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from normfree.optim.shards import local_parts, whole_norms


class SAM:
    """Moves weights to the ascent point and back. It is no optimizer: any may take the step.

    Args:
        parameters: the weights; those without a gradient in the ascent stay where they are.
        rho: length of the ascent step, in the Euclidean norm over all weights.

    Raises:
        ValueError: rho is not positive.
    """

    def __init__(self, parameters: Iterable[Tensor], rho: float = 0.05) -> None:
        if not rho > 0:
            raise ValueError(f"rho must be positive, not {rho}")
        self.rho = rho
        self.parameters = [p for p in parameters if p.requires_grad]
        self._saved: list[tuple[Tensor, Tensor]] = []  # weights and copies of what is here, while they are away

    @contextmanager
    def ascent(self) -> Iterator[None]:
        """Gradients of this block are apart from those before, and gone behind it; the weights have moved then.

        A scale of the loss, as with float16, cancels out. Where the gradient is not finite the weights become so too,
        and with them the gradients of the descent: whoever skips such a step skips this one.

        Raises:
            RuntimeError: the weights are away already.
        """
        if self._saved:
            raise RuntimeError("the weights are at an ascent point already: end the descent first")
        before = [p.grad for p in self.parameters]
        for p in self.parameters:
            p.grad = None
        try:
            yield
            self._climb()
        finally:
            for p, gradient in zip(self.parameters, before, strict=True):
                p.grad = gradient

    @contextmanager
    def descent(self) -> Iterator[None]:
        """Gradients of this block are those at the ascent point, added to those before; the weights are back behind it.

        Raises:
            RuntimeError: there was no ascent.
        """
        if not self._saved:
            raise RuntimeError("descent() follows an ascent()")
        try:
            yield
        finally:
            self.restore()

    @torch.no_grad()
    def _climb(self) -> None:
        moved = [p for p in self.parameters if p.grad is not None]
        if not moved:
            raise RuntimeError("no gradient was computed in ascent()")
        gradients = [p.grad for p in moved if p.grad is not None]
        step = self.rho / _length(gradients).clamp_min(1e-12)
        rows = local_parts(moved)
        self._saved = [(p, w.clone()) for p, w in zip(moved, rows, strict=True)]
        torch._foreach_add_(rows, torch._foreach_mul(local_parts(gradients), step))
        torch.clear_autocast_cache()  # it holds weights as they were

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights back to what they were, bit for bit: by their copies, not by subtracting."""
        if self._saved:
            torch._foreach_copy_(local_parts([p for p, _ in self._saved]), [copy for _, copy in self._saved])
            torch.clear_autocast_cache()
        self._saved = []


def _length(gradients: list[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients together, float64; of sharded ones over all ranks, in one collective."""
    whole = whole_norms(gradients)
    here = [g for g in gradients if id(g) not in whole]
    norms = [n.double() for n in torch._foreach_norm(here)] if here else []
    norms += [n.double().reshape(()) for n in whole.values()]
    length: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return length

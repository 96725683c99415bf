"""LARS (You et al. 2017), which Section 4 of the paper compares AGC with: torch has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from normfree.optim.agc import is_vector
from normfree.optim.shards import is_sharded, local, sums_over_ranks


class LARS(torch.optim.Optimizer):
    """Momentum SGD whose step has, for each tensor, a length in proportion to the tensor's own.

    g += weight_decay w; g *= trust |w| / |g|; v = momentum v + lr g; w -= v. Tensors that are vectors once their ones
    are squeezed out, which gains and biases are, take plain steps, as is usual. Parameters may be sharded by rows.

    Args:
        params: tensors or groups.
        lr: learning rate.
        momentum: in [0, 1).
        weight_decay: L2 coefficient.
        trust: the ratio of the lengths of step and weight at lr 1.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self, params: ParamsT, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 1e-3
    ) -> None:
        if lr < 0 or not 0 <= momentum < 1 or weight_decay < 0 or trust <= 0:
            raise ValueError(f"out of range: {lr=}, {momentum=}, {weight_decay=}, {trust=}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update; parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        lengths = self._lengths_over_ranks()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                w = local(p)
                g = _decayed(group, p)
                if not is_vector(p):
                    size, length = lengths[p] if p in lengths else (_length(w), _length(g))
                    ratio = group["trust"] * size / length.clamp_min(1e-12)
                    g = g * torch.where((size > 0) & (length > 0), ratio, torch.ones_like(ratio))
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                velocity = local(state["momentum_buffer"])
                velocity.mul_(group["momentum"]).add_(g, alpha=group["lr"])
                w.sub_(velocity)
        return loss

    def _lengths_over_ranks(self) -> dict[Tensor, tuple[Tensor, Tensor]]:
        """The lengths of sharded tensors and of their decayed gradients, in one collective; of plain ones none."""
        work = [(g, p) for g in self.param_groups for p in g["params"] if p.grad is not None and is_sharded(p)]
        work = [(group, p) for group, p in work if not is_vector(p)]
        squares = [_length(local(p), torch.float64).square() for _, p in work]
        squares += [_length(_decayed(group, p), torch.float64).square() for group, p in work]
        owners = [p for _, p in work]
        lengths = [total.sqrt() for total in sums_over_ranks(squares, owners * 2)]
        pairs = zip(owners, lengths, lengths[len(owners) :], strict=False)
        return {p: (size.to(p.dtype), length.to(p.dtype)) for p, size, length in pairs}


def _decayed(group: dict[str, Any], p: Tensor) -> Tensor:
    """The rows of the gradient that are here, with weight decay."""
    assert p.grad is not None
    decay: float = group["weight_decay"]
    return local(p.grad) + decay * local(p)


def _length(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, dtype=dtype)
    return length

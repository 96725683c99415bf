"""LARS (You et al. 2017), which Section 4 of the paper compares AGC with: torch has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import overload

import torch
from torch.optim.optimizer import ParamsT


class LARS(torch.optim.Optimizer):
    """Momentum SGD whose step has, for each tensor, a length in proportion to the tensor's own.

    g += weight_decay w; g *= trust |w| / |g|; v = momentum v + lr g; w -= v. Tensors that are vectors once their ones
    are squeezed out, which gains and biases are, take plain steps, as is usual.

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
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad + group["weight_decay"] * p
                if sum(n > 1 for n in p.shape) > 1:
                    size, length = torch.linalg.vector_norm(p), torch.linalg.vector_norm(g)
                    ratio = group["trust"] * size / length.clamp_min(1e-12)
                    g = g * torch.where((size > 0) & (length > 0), ratio, torch.ones_like(ratio))
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                state["momentum_buffer"].mul_(group["momentum"]).add_(g, alpha=group["lr"])
                p.sub_(state["momentum_buffer"])
        return loss

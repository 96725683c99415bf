"""SGD with Nesterov momentum and adaptive gradient clipping, in the authors' order of operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from normfree.optim.agc import agc_factors


class AGCSGD(torch.optim.Optimizer):
    """g = clip(g); g += weight_decay * w; v = momentum * v + g; w -= lr * (g + momentum * v).

    Decay is L2, added after clipping, so that it is not clipped itself. `param_groups` makes the paper's groups.
    Gradients are left as they were.

    Args:
        params: tensors or groups; "clipping": None in a group exempts it from AGC.
        lr: learning rate.
        momentum: in [0, 1).
        nesterov: False is w -= lr * v.
        weight_decay: L2 coefficient.
        clipping: lambda of AGC, Eq. 3 of the paper; None for plain SGD.
        eps: floor of the norm of a weight in AGC.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        clipping: float | None = 0.01,
        eps: float = 1e-3,
    ) -> None:
        if lr < 0 or not 0 <= momentum < 1 or weight_decay < 0 or eps <= 0 or (clipping is not None and clipping <= 0):
            raise ValueError(
                f"out of range: lr={lr}, momentum={momentum}, weight_decay={weight_decay}, "
                f"clipping={clipping}, eps={eps}"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "clipping": clipping,
            "eps": eps,
        }
        self._clipped = self._units = torch.zeros(())
        super().__init__(params, defaults)

    def clipped_units(self) -> tuple[Tensor, Tensor]:
        """(clipped, all) units of the last step, scalar tensors on the device: reading them as numbers waits for it."""
        return self._clipped, self._units

    def momentum(self, p: Tensor) -> Tensor:
        """The velocity of a parameter, zeros before its first step."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        buffer: Tensor = state["momentum_buffer"]
        return buffer

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
        self._clipped = self._units = torch.zeros(())
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params)
        return loss

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        if any(g.is_sparse for g in grads):
            raise ValueError("AGCSGD needs dense gradients: build the embedding with sparse=False")
        velocities = [self.momentum(p) for p in params]
        if group["clipping"] is not None:
            found = agc_factors(params, grads, group["clipping"], group["eps"])
            grads = list(torch._foreach_mul(grads, [f.to(g.dtype) for f, g in zip(found.factors, grads, strict=True)]))
            self._clipped = found.clipped + self._clipped.to(found.clipped.device)
            self._units = torch.full_like(self._clipped, found.units) + self._units.to(found.clipped.device)
        if group["weight_decay"] != 0:
            grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, grads)
        # nesterov looks ahead along the velocity: w -= lr g + lr momentum v, in two in-place passes
        if group["nesterov"]:
            torch._foreach_add_(params, grads, alpha=-group["lr"])
            torch._foreach_add_(params, velocities, alpha=-group["lr"] * group["momentum"])
        else:
            torch._foreach_add_(params, velocities, alpha=-group["lr"])

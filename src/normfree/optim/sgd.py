"""SGD with Nesterov momentum and adaptive gradient clipping, in the authors' order of operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from normfree.optim.agc import Clipping, clipped_copies, group_factors, with_gradients
from normfree.optim.groups import check_clipping


class AGCSGD(torch.optim.Optimizer):
    """g = clip(g); g += weight_decay * w; v = momentum * v + g; w -= lr * (g + momentum * v).

    Decay is L2, added after clipping, so that it is not clipped itself. `param_groups` makes the paper's groups.
    Gradients are left as they were.

    Args:
        params: tensors or groups; "clipping": None in a group exempts it from AGC, "unit_dim" and "unit_groups" say
            where its outputs are (`normfree.optim.agc`), "names" are for `clipped_by_name`.
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
        self._found: list[tuple[dict[str, Any], list[int], Clipping]] = []  # of the last step, by group
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "clipping": clipping,
            "eps": eps,
            "unit_dim": 0,
            "unit_groups": 1,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or one from a pickle, has found nothing yet."""
        super().__setstate__(state)
        self._found = []

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. Raises ValueError where the group's "clipping" is not positive; None exempts."""
        check_clipping(param_group.get("clipping"))
        super().add_param_group(param_group)

    def clipped_units(self) -> tuple[Tensor, int]:
        """(clipped, all) units of the last step; the first on the device: reading it as a number waits for it."""
        if not self._found:
            return torch.zeros(()), 0
        device = self._found[0][2].clipped.device
        clipped = torch.stack([found.clipped.sum().to(device) for _, _, found in self._found]).sum()
        return clipped, sum(sum(found.units) for _, _, found in self._found)

    def clipped_by_name(self) -> tuple[list[str], Tensor, list[int]]:
        """(names, clipped, units) of every tensor that the last step clipped, or looked at; clipped on the device.

        Names are those of `param_groups`, otherwise "group.index".
        """
        names: list[str] = []
        for g, (group, indices, _) in enumerate(self._found):
            names += [group["names"][i] if "names" in group else f"{g}.{i}" for i in indices]
        counts = [found.clipped for _, _, found in self._found]
        device = counts[0].device if counts else None
        clipped = torch.cat([c.to(device) for c in counts]) if counts else torch.zeros(0)
        return names, clipped, [n for _, _, found in self._found for n in found.units]

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
        self._found = []
        for group in self.param_groups:
            self._update(group)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        indices, params, grads = with_gradients(group)
        if not indices:
            return
        velocities = [self.momentum(p) for p in params]
        if group["clipping"] is not None:
            found = group_factors(group, params, grads, group["eps"])
            grads = clipped_copies(grads, found)
            self._found.append((group, indices, found._replace(factors=[])))
        if _fusible(params, grads, velocities):
            _one_pass(group, params, grads, velocities)
        else:
            _pass_by_pass(group, params, grads, velocities)


def _fusible(params: list[Tensor], grads: list[Tensor], velocities: list[Tensor]) -> bool:
    """Whether torch's fused kernel takes these: it goes through memory as it lies, so all must lie alike."""
    return all(
        p.device.type in ("cpu", "cuda")
        and p.is_floating_point()
        and p.dtype == g.dtype == v.dtype
        and p.stride() == g.stride() == v.stride()
        and _is_dense(p)
        for p, g, v in zip(params, grads, velocities, strict=True)
    )


def _is_dense(p: Tensor) -> bool:
    return p.is_contiguous() or (p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last))


def _one_pass(group: dict[str, Any], params: list[Tensor], grads: list[Tensor], velocities: list[Tensor]) -> None:
    sgd(
        params,
        grads,
        list(velocities) if group["momentum"] else [],
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        lr=group["lr"],
        dampening=0.0,
        nesterov=group["nesterov"],
        maximize=False,
        fused=True,
    )


def _pass_by_pass(group: dict[str, Any], params: list[Tensor], grads: list[Tensor], velocities: list[Tensor]) -> None:
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

"""SGD with Nesterov momentum and adaptive gradient clipping, in the authors' order of operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from normfree.optim.agc import (
    Clipping,
    all_finite,
    clipped_copies,
    group_factors,
    over_ranks,
    vector_norms,
    with_gradients,
)
from normfree.optim.groups import check_clipping
from normfree.optim.shards import is_sharded, local_parts, sums_over_ranks


class AGCSGD(torch.optim.Optimizer):
    """g = clip(g); g += weight_decay * w; v = momentum * v + g; w -= lr * (g + momentum * v).

    Decay is L2, added after clipping, so that it is not clipped itself. `param_groups` makes the paper's groups.
    Gradients are left as they were. Parameters may be sharded by `fully_shard`: the update is then that of one process,
    and the velocities are sharded as the parameters are. A step costs one small collective, for the norms of vectors.

    Args:
        params: tensors or groups; "clipping": None in a group exempts it from AGC, "unit_dim" and "unit_groups" say
            where its outputs are (`normfree.optim.agc`), "names" are for `clipped_by_name`.
        lr: learning rate.
        momentum: in [0, 1).
        nesterov: False is w -= lr * v.
        weight_decay: L2 coefficient.
        clipping: lambda of AGC, Eq. 3 of the paper; None for plain SGD.
        eps: floor of the norm of a weight in AGC.
        skip_nonfinite: leave everything as it is where a gradient is not finite, and say so in `skipped`. It costs next
            to nothing beside clipping, whose norms tell; the device is waited for, once a step.

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
        skip_nonfinite: bool = False,
    ) -> None:
        if lr < 0 or not 0 <= momentum < 1 or weight_decay < 0 or eps <= 0 or (clipping is not None and clipping <= 0):
            raise ValueError(
                f"out of range: lr={lr}, momentum={momentum}, weight_decay={weight_decay}, "
                f"clipping={clipping}, eps={eps}"
            )
        self._found: list[tuple[dict[str, Any], list[int], Clipping]] = []  # of the last step, by group
        self._counted = True  # units of sharded tensors on other ranks are in it
        self.skip_nonfinite = skip_nonfinite
        self.skipped = False  # whether the last step was
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

    def __getstate__(self) -> dict[str, Any]:
        """As torch's, which leaves out what is no group's."""
        return super().__getstate__() | {"skip_nonfinite": self.skip_nonfinite}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or one from a pickle, has found nothing yet."""
        super().__setstate__(state)
        self._found, self._counted, self.skipped = [], True, False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. Raises ValueError where the group's "clipping" is not positive; None exempts."""
        check_clipping(param_group.get("clipping"))
        super().add_param_group(param_group)

    def clipped_units(self) -> tuple[Tensor, int]:
        """(clipped, all) units of the last step; the first on the device: reading it as a number waits for it.

        Of sharded parameters the units of all ranks, which must then all ask: it is a collective.
        """
        counts = self._counts()
        if not counts:
            return torch.zeros(()), 0
        device = counts[0].device
        clipped = torch.stack([c.sum().to(device) for c in counts]).sum()
        return clipped, sum(sum(found.units) for _, _, found in self._found)

    def clipped_by_name(self) -> tuple[list[str], Tensor, list[int]]:
        """(names, clipped, units) of every tensor that the last step clipped, or looked at; clipped on the device.

        Names are those of `param_groups`, otherwise "group.index". A collective, as `clipped_units`.
        """
        names: list[str] = []
        for g, (group, indices, _) in enumerate(self._found):
            names += [group["names"][i] if "names" in group else f"{g}.{i}" for i in indices]
        counts = self._counts()
        device = counts[0].device if counts else None
        clipped = torch.cat([c.to(device) for c in counts]) if counts else torch.zeros(0)
        return names, clipped, [n for _, _, found in self._found for n in found.units]

    def _counts(self) -> list[Tensor]:
        """Clipped units of each tensor, by group, over all ranks."""
        if not self._counted:
            params = [[group["params"][i] for i in indices] for group, indices, _ in self._found]
            counts = over_ranks([found.clipped for _, _, found in self._found], params)
            self._found = [(g, i, f._replace(clipped=c)) for (g, i, f), c in zip(self._found, counts, strict=True)]
            self._counted = True
        return [found.clipped for _, _, found in self._found]

    def momentum(self, p: Tensor) -> Tensor:
        """The velocity of a parameter, zeros before its first step; sharded as the parameter is."""
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
        self._found, self._counted = [], False
        work = [(group, *with_gradients(group)) for group in self.param_groups]
        clipped = (x for g, _, params, grads in work if g["clipping"] is not None for x in (*params, *grads))
        whole = vector_norms(clipped)
        ready = [self._clipped(*item, whole) for item in work if item[1]]
        self.skipped = self.skip_nonfinite and not _are_finite(ready)
        if not self.skipped:
            self._found = [(r.group, r.indices, r.found._replace(factors=[])) for r in ready if r.found is not None]
            for r in ready:
                self._move(r.group, r.params, r.grads)
        return loss

    def _clipped(
        self,
        group: dict[str, Any],
        indices: list[int],
        params: list[Tensor],
        grads: list[Tensor],
        whole: dict[int, Tensor],
    ) -> _Ready:
        if group["clipping"] is None:
            return _Ready(group, indices, params, local_parts(grads), None)
        found = group_factors(group, params, grads, group["eps"], whole)
        return _Ready(group, indices, params, clipped_copies(local_parts(grads), found), found)

    def _move(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        velocities = local_parts([self.momentum(p) for p in params])
        params = local_parts(params)
        if _fusible(params, grads, velocities):
            _one_pass(group, params, grads, velocities)
        else:
            _pass_by_pass(group, params, grads, velocities)


class _Ready(NamedTuple):
    """A group's tensors that have a gradient, those gradients clipped, of rows that are here, and what AGC found."""

    group: dict[str, Any]
    indices: list[int]
    params: list[Tensor]
    grads: list[Tensor]
    found: Clipping | None


def _are_finite(ready: list[_Ready]) -> bool:
    """Whether the norms of all gradients are, on all ranks; clipped ones are known."""
    bad = [~(all_finite(r.grads) if r.found is None else r.found.finite) for r in ready]
    split = [next((p for p in r.params if is_sharded(p)), None) for r in ready]
    return not any(n.item() for n in sums_over_ranks([flag.float() for flag in bad], split))


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

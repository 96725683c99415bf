"""Adaptive gradient clipping (Eq. 3 of the paper).

The gradient of a unit is rescaled to norm lambda * max(|W_i|, eps) where it is longer. A unit is a row of dimension 0,
the fan-in of one output, for weights; a tensor that is one-dimensional once its ones are squeezed out (bias, gain,
SkipInit) is one unit as a whole, as in the authors' code. Transposed convolutions have their inputs on dimension 0, and
so are clipped by input here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normfree.optim.groups import param_groups


class Clipping(NamedTuple):
    """What AGC finds in a list of gradients.

    factors: one tensor per gradient, broadcastable to it, 1 where nothing is clipped.
    clipped, units: how many units were clipped, a tensor on the device (no synchronisation), and how many there are.
    """

    factors: list[Tensor]
    clipped: Tensor
    units: int


def unit_norms(x: Tensor) -> Tensor:
    """Euclidean norm of each unit, float32 at least: (out, 1, ..) for weights, all ones for a vector or scalar."""
    one_unit = sum(n > 1 for n in x.shape) <= 1
    dims = tuple(range(0 if one_unit else 1, x.ndim))
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else None
    norms: Tensor = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=dtype)
    return norms


def agc_factors(params: Sequence[Tensor], grads: Sequence[Tensor], clipping: float, eps: float) -> Clipping:
    """The factor of each unit of each gradient; norms of all tensors are compared in one go."""
    norms = [unit_norms(p) for p in params]
    limit = torch.cat([n.flatten() for n in norms]).clamp_min_(eps).mul_(clipping)
    size = torch.cat([unit_norms(g).flatten() for g in grads])
    over = size > limit
    # the inner floor only prevents 0/0: a unit whose gradient is that short is never over the limit
    factor = torch.where(over, limit / size.clamp_min(1e-6), 1.0)
    pieces = factor.split([n.numel() for n in norms])
    factors = [piece.view(n.shape) for piece, n in zip(pieces, norms, strict=True)]
    return Clipping(factors, over.sum(), factor.numel())


Parameters = Tensor | nn.Module | Iterable[Tensor] | Iterable[Mapping[str, Any]]


@torch.no_grad()
def clip_grad_agc_(parameters: Parameters, clipping: float = 0.01, eps: float = 1e-3) -> Tensor:
    """Clip gradients in place, before the step of any optimizer.

    Args:
        parameters: a tensor or tensors, all clipped; param groups, where "clipping" overrides the argument and None
            exempts the group; or a module, whose classifier's weight is exempt, as in the paper.
        clipping: lambda, the largest ratio of the norms of a unit's gradient and weight.
        eps: floor of the weight's norm, so that zero-initialised parameters can move.

    Returns:
        the share of units that were clipped, a scalar tensor on the device of the gradients.

    Raises:
        ValueError: a gradient is sparse, or clipping or eps is not positive.
    """
    if clipping <= 0 or eps <= 0:
        raise ValueError(f"clipping and eps must be positive, not {clipping} and {eps}")
    clipped: Tensor | int = 0
    units = 0
    for group in _as_groups(parameters, clipping):
        params = [p for p in group["params"] if p.grad is not None]
        if group["clipping"] is None or not params:
            continue
        grads = [_dense(p.grad) for p in params]
        found = agc_factors(params, grads, group["clipping"], eps)
        torch._foreach_mul_(grads, [f.to(g.dtype) for f, g in zip(found.factors, grads, strict=True)])
        clipped, units = clipped + found.clipped, units + found.units
    return torch.as_tensor(clipped) / max(units, 1)


def _as_groups(parameters: Parameters, clipping: float) -> list[dict[str, Any]]:
    if isinstance(parameters, nn.Module):
        return param_groups(parameters, clipping=clipping)
    items: list[Any] = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if items and isinstance(items[0], Mapping):
        return [{"clipping": clipping, **group, "params": _as_list(group["params"])} for group in items]
    return [{"params": items, "clipping": clipping}]


def _as_list(params: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [params] if isinstance(params, Tensor) else list(params)


def _dense(grad: Tensor | None) -> Tensor:
    assert grad is not None
    if grad.is_sparse:
        raise ValueError("AGC needs dense gradients: build the embedding with sparse=False")
    return grad

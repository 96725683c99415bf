"""Adaptive gradient clipping (Eq. 3 of the paper).

The gradient of a unit is rescaled to norm lambda * max(|W_i|, eps) where it is longer. What a unit is:

| tensor                                             | unit                                              |
|----------------------------------------------------|---------------------------------------------------|
| weight of Linear, Bilinear, Conv1d, Conv2d, Conv3d | an output: a row of dimension 0, over its fan-in  |
| weight of ConvTranspose1d, 2d, 3d                  | an output: of dimension 1, within its group       |
| packed projections of MultiheadAttention, RNNs     | an output: a row of dimension 0                   |
| weight of Embedding, EmbeddingBag                  | an entry: a row of dimension 0                    |
| any tensor that is a vector once its ones are      | the whole tensor, as in the authors' code: biases, |
| squeezed out, or a number                          | gains, SkipInit                                    |
| any other tensor                                   | a row of dimension 0                              |

Bare tensors are taken as the first row has them; a group can say otherwise with "unit_dim" (the dimension of the
outputs) and "unit_groups" (into how many groups the dimension before it is split).

Tensors may be sharded by rows (`normfree.optim.shards`): a row is clipped where it lies, whole tensors by the norm over
all ranks, so that the result is that of one process. All ranks must then clip together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normfree.optim.groups import check_clipping, param_groups
from normfree.optim.shards import is_sharded, local, local_parts, sharing, sums_over_ranks, whole_norms


class Clipping(NamedTuple):
    """What AGC finds in a list of gradients.

    factors: one tensor per gradient, of its shape or broadcastable to it, 1 where nothing is clipped; of a sharded one
        for the rows that are here.
    clipped: how many units of each gradient were clipped, (gradients,), on the device: reading it waits. Of sharded
        rows, those that are here; `over_ranks` adds up.
    units: how many each has, on all ranks.
    finite: whether all norms of gradients that are here are, (), on the device.
    """

    factors: list[Tensor]
    clipped: Tensor
    units: list[int]
    finite: Tensor


def unit_norms(x: Tensor, unit_dim: int = 0, groups: int = 1) -> Tensor:
    """Euclidean norm of each unit, float32 at least, broadcastable to x: (out, 1, ..) for weights.

    With groups, dimension 0 is split into so many and a unit is within one: the result has the shape of x then.
    """
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else None
    if is_vector(x):
        return _norm(x, tuple(range(x.ndim)), dtype)
    if groups > 1:
        split = x.unflatten(0, (groups, -1))  # (groups, in / groups, out / groups, ..)
        dims = tuple(d for d in range(1, split.ndim) if d != unit_dim + 1)
        norms = _norm(split, dims, dtype)
        return norms.expand(-1, split.shape[1], *norms.shape[2:]).flatten(0, 1)
    return _norm(x, tuple(d for d in range(x.ndim) if d != unit_dim), dtype)


def is_vector(x: Tensor) -> bool:
    """Whether the whole tensor is one unit: a vector once its ones are squeezed out, or a number."""
    return sum(n > 1 for n in x.shape) <= 1


def vector_norms(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """`whole_norms` of those that are one unit each; nothing happens where none is sharded."""
    return whole_norms([x for x in tensors if is_sharded(x) and is_vector(x)])


def _unit_norms_here(x: Tensor, unit_dim: int, groups: int, whole: Mapping[int, Tensor]) -> Tensor:
    """`unit_norms`, of a sharded tensor for the units that are here."""
    if sharing(x) is None:
        return unit_norms(local(x), unit_dim, groups)
    if is_vector(x):
        return whole[id(x)]
    if (unit_dim, groups) != (0, 1):
        raise ValueError(
            "a unit of a sharded tensor must be a row, and those of transposed convolutions are none: do not shard "
            'them, or exempt them from AGC with "clipping": None'
        )
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else None
    return _norm(local(x), tuple(range(1, x.ndim)), dtype)


def _norm(x: Tensor, dims: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=dtype)
    return norms


def agc_factors(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    clipping: float,
    eps: float,
    unit_dim: int = 0,
    groups: int = 1,
    whole: Mapping[int, Tensor] | None = None,
) -> Clipping:
    """The factor of each unit of each gradient; norms of all tensors are compared in one go.

    whole: `vector_norms` of the tensors and gradients, where they are known already.
    """
    whole = vector_norms([*params, *grads]) if whole is None else whole
    norms = [_unit_norms_here(p, unit_dim, groups, whole) for p in params]
    sizes = [n.numel() for n in norms]
    limit = torch.cat([n.flatten() for n in norms]).clamp_min_(eps).mul_(clipping)
    size = torch.cat([_unit_norms_here(g, unit_dim, groups, whole).flatten() for g in grads])
    over = size > limit
    # the inner floor only prevents 0/0: a unit whose gradient is that short is never over the limit
    factor = torch.where(over, limit / size.clamp_min(1e-6), 1.0)
    factors = [piece.view(n.shape) for piece, n in zip(factor.split(sizes), norms, strict=True)]
    clipped = torch.stack([piece.sum() for piece in over.split(sizes)])
    units = [_units(p, here) for p, here in zip(params, sizes, strict=True)]
    return Clipping(factors, clipped, units, torch.isfinite(size).all())


def _units(p: Tensor, here: int) -> int:
    return here if sharing(p) is None or is_vector(p) else p.shape[0]


def over_ranks(clipped: Sequence[Tensor], params: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The counts of `Clipping` with the rows that lie on other ranks, in one collective; of plain tensors as they are.

    clipped: (tensors,) for each group; params: the tensors of each.
    """
    if not any(is_sharded(p) for group in params for p in group):
        return list(clipped)
    owners = [None if is_vector(p) else p for group in params for p in group]
    totals = sums_over_ranks([count for counts in clipped for count in counts.unbind()], owners)
    return list(torch.stack(totals).split([len(counts) for counts in clipped]))


Parameters = Tensor | nn.Module | Iterable[Tensor] | Iterable[Mapping[str, Any]]


@torch.no_grad()
def clip_grad_agc_(parameters: Parameters, clipping: float = 0.01, eps: float = 1e-3) -> Tensor:
    """Clip gradients in place, before the step of any optimizer.

    Args:
        parameters: a tensor or tensors, all clipped; param groups, where "clipping" overrides the argument and None
            exempts the group; or a module, whose classifier's weight is exempt, as in the paper. Tensors without a
            gradient are passed over.
        clipping: lambda, the largest ratio of the norms of a unit's gradient and weight. Before AdamW, which divides by
            the gradients' size, it hardly matters: 0.01 to 0.16 are all safe (benchmarks/results/adamw.json).
        eps: floor of the weight's norm, so that zero-initialised parameters can move.

    Returns:
        the share of units that were clipped, a scalar tensor on the device of the gradients.

    Raises:
        ValueError: a gradient is sparse, clipping or eps is not positive, or a tensor is sharded otherwise than by its
            units.
    """
    if clipping <= 0 or eps <= 0:
        raise ValueError(f"clipping and eps must be positive, not {clipping} and {eps}")
    clipped: Tensor | int = 0
    units = 0
    for _, found in _clip_groups_(_as_groups(parameters, clipping), eps):
        if found is not None:
            clipped, units = clipped + found.clipped.sum(), units + sum(found.units)
    return torch.as_tensor(clipped) / max(units, 1)


@torch.no_grad()
def clip_group_(group: Mapping[str, Any], eps: float) -> tuple[list[int], Clipping | None]:
    """Clip the gradients of one param group in place: (places of its tensors that have a gradient, what was found)."""
    return _clip_groups_([group], eps)[0]


def _clip_groups_(groups: Sequence[Mapping[str, Any]], eps: float) -> list[tuple[list[int], Clipping | None]]:
    """`clip_group_` of each; of sharded tensors, one collective for all norms and one for all counts."""
    work = [with_gradients(group) for group in groups]
    work = [w if check_clipping(g["clipping"]) is not None else ([], [], []) for g, w in zip(groups, work, strict=True)]
    whole = vector_norms([x for _, params, grads in work for x in (*params, *grads)])
    found: list[Clipping | None] = []
    for group, (_, params, grads) in zip(groups, work, strict=True):
        if not params:
            found.append(None)
            continue
        clipping = group_factors(group, params, grads, eps, whole)
        torch._foreach_mul_(local_parts(grads), clipping.factors)
        found.append(clipping._replace(factors=[]))
    counts = iter(over_ranks([f.clipped for f in found if f is not None], [params for _, params, _ in work if params]))
    totals = [None if f is None else f._replace(clipped=next(counts)) for f in found]
    return [(places, f) for (places, _, _), f in zip(work, totals, strict=True)]


def with_gradients(group: Mapping[str, Any]) -> tuple[list[int], list[Tensor], list[Tensor]]:
    """(places, tensors, gradients) of those of a group that have one. Raises ValueError where it is sparse."""
    found = [(i, p, _dense(p.grad)) for i, p in enumerate(group["params"]) if p.grad is not None]
    return [i for i, _, _ in found], [p for _, p, _ in found], [g for _, _, g in found]


def group_factors(
    group: Mapping[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    eps: float,
    whole: Mapping[int, Tensor] | None = None,
) -> Clipping:
    """`agc_factors` by the settings of a group, in the gradients' own types."""
    units = group.get("unit_dim", 0), group.get("unit_groups", 1)
    found = agc_factors(params, grads, group["clipping"], eps, *units, whole)
    return found._replace(factors=[f.to(g.dtype) for f, g in zip(found.factors, grads, strict=True)])


def all_finite(grads: list[Tensor]) -> Tensor:
    """Whether the norms of all gradients that are here are finite, (), on their device."""
    return torch.isfinite(torch.stack(torch._foreach_norm(grads))).all()


def clipped_copies(grads: list[Tensor], found: Clipping) -> list[Tensor]:
    """The gradients times their factors; on a CPU those of which no unit was clipped are not copied."""
    if grads[0].device.type == "cpu":  # where reading the counts waits for nothing
        counts = found.clipped.tolist()
        return [g * f if n else g for g, f, n in zip(grads, found.factors, counts, strict=True)]
    return list(torch._foreach_mul(grads, found.factors))


def _as_groups(parameters: Parameters, clipping: float) -> list[dict[str, Any]]:
    if isinstance(parameters, nn.Module):
        return param_groups(parameters, clipping=clipping)
    items: list[Any] = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if items and isinstance(items[0], Mapping):
        return [{"clipping": clipping, **group, "params": _as_list(group["params"])} for group in items]
    return [{"params": items, "clipping": clipping}]


def _as_list(params: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [params] if isinstance(params, Tensor) else list(params)


def _dense(grad: Tensor) -> Tensor:
    if grad.is_sparse:
        raise ValueError("AGC needs dense gradients: build the embedding with sparse=False")
    return grad

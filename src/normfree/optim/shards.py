"""Tensors whose rows are dealt to processes, as `torch.distributed.fsdp.fully_shard` leaves parameters and gradients.

They are DTensors with Shard(0): each rank of a mesh holds some rows of dimension 0, the first ranks as many as all but
the last, and late ranks may hold none. A unit of the optimizers is such a row, so that it lies whole on one rank; what
belongs to a whole tensor is summed over ranks. On any other tensor every function here does nothing.

Distributed parts of torch are not imported: whoever has a sharded tensor has them already, and some builds have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_PLAIN = (Tensor, nn.Parameter)


def is_sharded(x: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which only a part may be here."""
    return type(x) not in _PLAIN and hasattr(x, "device_mesh")


def local(x: Tensor) -> Tensor:
    """The rows of a sharded tensor that are here, in the same memory; any other tensor itself."""
    if type(x) in _PLAIN or not is_sharded(x):  # the first alone decides nearly always, and many tensors are asked
        return x
    with torch.no_grad():  # so that it is the memory itself, not a node of autograd
        rows: Tensor = x.to_local()  # type: ignore[attr-defined]
        return rows


def local_parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`local` of each."""
    return [x if type(x) in _PLAIN else local(x) for x in tensors]


def sharing(x: Tensor) -> ProcessGroup | None:
    """The ranks that hold the rows of a tensor between them; None where all of it is here.

    Raises:
        ValueError: it is split in another way than by rows.
    """
    if type(x) in _PLAIN or not is_sharded(x):
        return None
    split: list[int] = []
    dtensor: Any = x
    for axis, placement in enumerate(dtensor.placements):
        if type(placement).__name__ == "Shard" and placement.dim == 0:
            split.append(axis)
        elif not placement.is_replicate():
            raise ValueError(f"a unit must lie whole on one rank: shard tensors along dimension 0, not {placement}")
    if len(split) > 1:
        raise ValueError("a tensor may be sharded along one dimension of the mesh, not over several")
    return dtensor.device_mesh.get_group(split[0]) if split else None


def sums_over_ranks(parts: Sequence[Tensor], owners: Sequence[Tensor | None]) -> list[Tensor]:
    """Numbers of this rank, each added up over the ranks that share its owner: one collective for all of them.

    Args:
        parts: tensors of one element, of one type and device.
        owners: the tensor that each is a sum over the local rows of; None, or a plain tensor: it is whole already.
    """
    groups = [None if x is None else sharing(x) for x in owners]
    found = list(parts)
    for group in dict.fromkeys(g for g in groups if g is not None):
        places = [i for i, g in enumerate(groups) if g is group]
        total = torch.stack([parts[i].reshape(()) for i in places])
        torch.distributed.all_reduce(total, group=group)
        for i, value in zip(places, total.unbind(), strict=True):
            found[i] = value
    return found


def whole_norms(tensors: Sequence[Tensor]) -> dict[int, Tensor]:
    """Euclidean norms of sharded tensors, over all their rows, by id; tensors that are whole here are left out.

    Float32, or float64 of float64; one element, with as many dimensions as the tensor has, so that it multiplies its
    rows. Squares are summed in float64. One collective for all of them, which all ranks must take part in.
    """
    split = [x for x in tensors if is_sharded(x)]
    squares = [torch.linalg.vector_norm(local(x), dtype=torch.float64).square() for x in split]
    sums = sums_over_ranks(squares, split)
    found: dict[int, Tensor] = {}
    for x, total in zip(split, sums, strict=True):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        found[id(x)] = total.sqrt().to(dtype).view([1] * x.ndim)
    return found

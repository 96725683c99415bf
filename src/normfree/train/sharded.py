"""A network whose weights are dealt to processes: each holds some rows of every tensor and gathers blocks as it goes.

    average = EMA(model)  # of the whole network, before it is sharded
    shard(model, mesh), shard(average.module, mesh)
    optimizer = AGCSGD(param_groups(model), lr)  # behind, as SAM: the parameters are other tensors now

Steps, averages and ascents are then written as for one process (`normfree.optim.shards`). Every rank must do the same:
a forward pass of a sharded network is a collective.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from normfree.models import Network
from normfree.optim.shards import is_sharded, local, sharing

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Sharded = TypeVar("Sharded", bound=nn.Module)


def shard(model: Sharded, mesh: DeviceMesh) -> Sharded:
    """Deal the rows of every parameter to the ranks of a mesh, in place, by `torch.distributed.fsdp.fully_shard`.

    Blocks are gathered one by one, forward and again backward; stem, last convolution and classifier are together one
    more. With P parameters on W ranks each holds 16 P / W bytes: weights, gradient, momentum and average in float32. To
    them come, whole, the weights and gradients of the part in hand and the weights of the one fetched ahead.

    Weights are gathered in float32, twice the traffic of bfloat16, since they are standardised from it; the type of
    the input decides that of the maps, as always. Gradients are averaged in float32, as DistributedDataParallel does
    it. Buffers, which networks with batch norm have, stay each rank's own.

    Args:
        model: a network, or a copy of one, of which every rank has the same whole weights, on any device; they go to
            the mesh's as they are dealt.
        mesh: of one dimension; with two the weights are replicated over the first and sharded over the second.

    Returns:
        the model itself, whose parameters are DTensors now, under the same names.

    Raises:
        ValueError: it is sharded already.
    """
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 - half a second, of which others need nothing

    if any(is_sharded(p) for p in model.parameters()):
        raise ValueError("the network is sharded already")
    # the root too gives its weights back behind the forward pass: else they were whole tensors until a backward pass,
    # and no optimizer or average could find their rows behind an evaluation
    blocks: Any = model.get_submodule("blocks")
    for part in (*blocks, model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    return model


class RowSum:
    """In place of `GradientSum` where a network is sharded: gradients meet as they are dealt out again.

    They come out as means over the ranks, not as sums, which gloo cannot do here.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parts: list[Any] = [m for m in model.modules() if hasattr(m, "set_requires_gradient_sync")]
        for part in self._parts:
            part.set_requires_gradient_sync(False, recurse=False)

    @contextmanager
    def last(self) -> Iterator[None]:
        """The backward pass in this block is the last of the step: behind it gradients are means, dealt by rows."""
        for part in self._parts:
            part.set_requires_gradient_sync(True, recurse=False)
        try:
            yield
        finally:
            for part in self._parts:
                part.set_requires_gradient_sync(False, recurse=False)


@contextmanager
def gathered(*models: nn.Module) -> Iterator[None]:
    """Whole weights in every rank while it lasts, so that ranks may run as many batches as each likes, or none.

    All ranks enter and leave together. Parameters are plain tensors meanwhile, 4 bytes each, and must not be changed.
    Models that are not sharded stay as they are.
    """
    parts: list[Any] = [m for model in models for m in model.modules() if hasattr(m, "set_reshard_after_forward")]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


@torch.no_grad()
def full_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, on the CPU of rank 0, of a state that is sharded in whole or in part; nothing on other ranks.

    state: the same names in the same order on every rank: `model.state_dict()`, velocities, `Learner.tensors()`.
    """
    first = torch.distributed.get_rank() == 0
    found: dict[str, Tensor] = {}
    for name, x in state.items():
        whole = x.full_tensor() if is_sharded(x) else x  # type: ignore[attr-defined]
        if first:  # a copy, on a CPU too, where the whole may be the tensor itself
            found[name] = torch.empty_like(whole, device="cpu").copy_(whole.detach())
    return found


def whole_copy(model: Network) -> Network | None:
    """A plain copy on the CPU of rank 0, to be saved, exported or folded; None on other ranks. All must call it."""
    tensors = full_tensors(model.state_dict())
    if torch.distributed.get_rank() != 0:
        return None
    with torch.device("meta"):  # no random numbers for weights that are replaced
        copy = Network(model.config)
    copy.load_state_dict(tensors, assign=True)
    copy.name, copy.remat = model.name, model.remat
    return copy.train(model.training)


@torch.no_grad()
def load_full(target: nn.Module | Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Fill a model, or tensors by name, from whole ones that every rank has read: each takes its rows, none speaks.

    Raises:
        ValueError: names that are missing or unexpected, or other shapes.
    """
    wanted: Mapping[str, Tensor] = target.state_dict() if isinstance(target, nn.Module) else target
    missing, unexpected = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or unexpected:
        raise ValueError(f"the tensors do not fit: missing {missing[:3]}, unexpected {unexpected[:3]}")
    for name, x in wanted.items():
        if x.shape != tensors[name].shape:
            raise ValueError(f"{name} has the shape {tuple(x.shape)}, not {tuple(tensors[name].shape)}")
        local(x).copy_(_rows_here(tensors[name], x))


@torch.no_grad()
def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every rank has, dealt to the ranks as a parameter of its shape is, in its own type.

    For what an optimizer keeps of a parameter. Where the parameter is no sharded one: the tensor on its device.
    """
    if not is_sharded(like):
        return whole.to(like.device)
    x = torch.zeros_like(like, dtype=whole.dtype)
    local(x).copy_(_rows_here(whole, like))
    return x


def _rows_here(whole: Tensor, like: Tensor) -> Tensor:
    """The rows that this rank has of a tensor: as many as each but the last ones, which have what is left, or none."""
    ranks = sharing(like)
    if ranks is None:
        return whole
    rows = -(-len(whole) // ranks.size())
    return whole[rows * ranks.rank() : rows * (ranks.rank() + 1)]

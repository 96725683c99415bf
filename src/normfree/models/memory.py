"""The memory of a training step, counted without one: on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import cast

import torch
from torch import Tensor

from normfree.config import OptimConfig, TrainConfig
from normfree.models.block import Block
from normfree.models.count import parameters
from normfree.models.families import NetworkConfig
from normfree.models.network import Network


@dataclass(frozen=True)
class Costs:
    """What the memory of a training step depends on, beside the network and its images."""

    remat: str = "none"  # as train.remat
    precision: str = "fp32"  # of the maps
    copies: int = 4  # of the weights: themselves, gradients, momentum and average

    @classmethod
    def of(cls, train: TrainConfig, optim: OptimConfig) -> Costs:
        """SAM keeps the weights and puts gradients aside; Adam has a second moment."""
        copies = 4 + 2 * (optim.sam_rho > 0) + (optim.kind == "adamw")
        return cls(train.remat, train.precision, copies)


def step_memory(config: NetworkConfig, size: int, batch_size: int, costs: Costs | None = None) -> int:
    """Bytes of a training step: copies of the weights in float32, and what backward keeps.

    Counted on the meta device. A quarter of the maps is added for work space; maps of 16 bits count half.
    """
    costs = Costs() if costs is None else costs
    image, beside = _memory_terms(config, size, costs.remat)
    maps = (image * batch_size + beside) * 5 // 4
    return maps // (1 if costs.precision == "fp32" else 2) + costs.copies * 4 * parameters(config)


@lru_cache(maxsize=32)
def _memory_terms(config: NetworkConfig, size: int, remat: str) -> tuple[int, int]:
    """(bytes kept for each image, bytes beside)."""
    two, three = (_kept(config, size, n, remat) for n in (2, 3))  # batch norm takes no single image
    return three - two, 3 * two - 2 * three


def _kept(config: NetworkConfig, size: int, n: int, remat: str) -> int:
    """Bytes that autograd keeps for backward after a forward pass of n images, beside the weights.

    With remat that is what enters each span of blocks, and inside of one span, the largest, what is computed again.
    """
    with torch.device("meta"):
        model, images = Network(config), torch.empty(n, config.in_chans, size, size)
    inside: dict[int | None, dict[int, int]] = {None: {}}  # by span, those outside of any under None: by storage
    entering: dict[int, int] = {}
    where: int | None = None

    def enter(_block: torch.nn.Module, x: tuple[Tensor, ...], span: int) -> None:
        nonlocal where
        where = span
        entering.setdefault(span, x[0].untyped_storage().nbytes())
        inside.setdefault(span, {})

    def leave(*_: object) -> None:
        nonlocal where
        where = None

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t, torch.nn.Parameter):
            inside[where][t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    if remat != "none":
        for number, block in enumerate(model.blocks):
            span = number if remat == "block" else cast(Block, block).place.stage
            block.register_forward_pre_hook(partial(enter, span=span))
            block.register_forward_hook(leave)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(images)  # kept until all is counted, so that no storage takes the place of another
    del out
    outside = sum(inside.pop(None).values())
    return outside + sum(entering.values()) + max((sum(kept.values()) for kept in inside.values()), default=0)

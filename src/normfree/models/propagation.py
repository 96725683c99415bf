"""Signal propagation: what happens to mean and variance from block to block (Brock et al. 2021a, Section 3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from normfree.models.block import Block
from normfree.models.families import NetworkConfig
from normfree.models.network import Network


class Signal(NamedTuple):
    """Of one map, averages over its channels.

    mean_square: of the squares of the channels' means, over images and pixels; near 0 if means do not drift.
    variance: of the channels' variances, over images and pixels.
    residual: the variance of the residual branch before alpha and SkipInit; None behind the stem.
    """

    mean_square: float
    variance: float
    residual: float | None


@torch.no_grad()
def measure(model: Network, images: Tensor) -> list[Signal]:
    """The signal behind the stem and behind each block, for images (N, C, H, W), in evaluation mode.

    The three numbers are those of the authors' code, which calls them avg_sq_mean, avg_var and res_avg_var.
    """
    found: list[Signal] = []
    hooks = [block.register_forward_hook(lambda *call: found.append(_of_block(*call))) for block in model.blocks]
    hooks.append(model.blocks[0].register_forward_pre_hook(lambda _, inputs: found.append(_of_map(inputs[0]))))
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()(images)
    finally:
        for module in training:
            module.training = True
        for hook in hooks:
            hook.remove()
    return found


def _of_map(x: Tensor, residual: float | None = None) -> Signal:
    x = x.double()
    return Signal(x.mean((0, 2, 3)).square().mean().item(), _variance(x), residual)


def _of_block(block: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Signal:
    assert isinstance(block, Block)
    branch, gate = block.branch(block.activate(inputs[0]))
    return _of_map(out, _variance(branch if gate is None else branch * gate[:, :, None, None]))


def _variance(x: Tensor) -> float:
    return x.double().var((0, 2, 3), correction=0).mean().item()


def expected_variance(config: NetworkConfig, skip_gain: float = 1.0) -> list[float]:
    """What the bookkeeping predicts behind the stem and each block, for unit-variance branches.

    1 behind the stem, where no pooling follows its convolution; each block adds (alpha * skip_gain)^2; a transition
    starts again from 1. With skip_gain = 1 these are the beta^2 that the blocks divide by.
    """
    alpha = config.alpha * skip_gain
    variances = [1.0]
    for depth in config.depths:
        for index in range(depth):
            variances.append((1.0 if index == 0 else variances[-1]) + alpha**2)
    return variances

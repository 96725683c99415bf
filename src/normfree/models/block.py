"""The residual block: a pre-activation bottleneck (Figures 5 and 6 of the paper), with or without normalization.

Shapes: N images, C channels, H x W pixels. Where the paper and the authors' code differ the code is followed, since
the published weights come from it; docs/design.md lists the differences.

Scalars live in weights. The paper's block is  h + alpha * skip_gain * 2 * gate * f(gamma * act(h) / beta).  Here gamma
and 1/beta are factors of the standardised weights of the next convolutions, and alpha, SkipInit, the 2 and the
stochastic depth mask are factors of the squeeze-excite gate, which is (N, C): no constant multiplies a full-size map.
Two exceptions, in the open: a gate inside the bottleneck, and the paper's order act(h / beta).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normfree.config import UserError
from normfree.models.families import NetworkConfig
from normfree.nn.conv import Padding, SameConv2d, WSConv2d
from normfree.nn.eager import is_eager_on_cpu, take
from normfree.nn.layers import SqueezeExcite, at_least_float32, avg_pool_dense, avg_pool_same
from normfree.nn.signal import Activation, activation


@dataclass(frozen=True)
class Place:
    """Where a block stands: its channels, its stage, and what the bookkeeping expects of its input."""

    in_chans: int
    out_chans: int
    stage: int
    first: bool  # of the network
    beta: float  # expected standard deviation of the input
    stride: int = 1
    dilation: int = 1  # of a map that would be coarser by this factor, but for the output stride
    dense: bool = False  # dilates from here on by `stride`, instead of striding


def convolution(config: NetworkConfig, scale: float) -> Callable[..., SameConv2d]:
    """What makes the convolutions of a network: weight-standardised with a factor, or plain before batch norm."""

    def make(in_chans: int, out_chans: int, kernel: int, dilation: int = 1, **options: int) -> SameConv2d:
        padding: Padding = "same" if config.padding == "same" else kernel // 2 * dilation
        chosen: dict[str, Any] = {"padding": padding, "dilation": dilation, **options}
        if config.norm == "batch":
            return SameConv2d(in_chans, out_chans, kernel, bias=False, **chosen)
        return WSConv2d(in_chans, out_chans, kernel, scale=scale, eps=config.ws_eps, **chosen)

    return make


def batch_norm(config: NetworkConfig, channels: int) -> nn.BatchNorm2d | None:
    """Before an activation of a twin with batch norm; the others have none."""
    return nn.BatchNorm2d(channels) if config.norm == "batch" else None


def bottleneck_width(config: NetworkConfig, place: Place) -> tuple[int, int]:
    """(channels, groups) of the 3x3 convolutions; the width is rounded down to whole groups, but to one at least."""
    expansion = config.expansion[place.stage]
    if place.first and config.first_expansion is not None:
        expansion = config.first_expansion
    group_width = config.group_width[place.stage]
    width = max(1, int(expansion * (place.in_chans if config.expand_from[place.stage] == "in" else place.out_chans)))
    groups = max(1, width // group_width) if group_width else 1
    return groups * group_width if group_width else width, groups


class SkipInit(nn.Module):
    """The learnable gain of a residual branch (De & Smith 2020), with alpha; a module, so that hooks see it alone."""

    def __init__(self, alpha: float, start: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.skip_gain = nn.Parameter(torch.full((1,), start))  # one element, since sharding refuses scalars

    def forward(self, gate: Tensor) -> Tensor:
        """(N, C) -> (N, C): alpha * skip_gain * gate, in float32 at least."""
        return gate * (self.alpha * at_least_float32(self.skip_gain))


class Block(nn.Module):
    """One residual block.

    A block that strides or changes the width is a transition: its shortcut is pooled and projected from the activated,
    beta-scaled signal, which resets the variance to 1. Otherwise the shortcut is the input itself.
    """

    def __init__(self, config: NetworkConfig, place: Place) -> None:
        super().__init__()
        free = config.norm == "none"
        self.act, gamma = activation(config.activation)
        self.act_of_sum: Activation | None = None  # the same behind a sum, where that is quicker otherwise
        self.gamma = gamma if free else 1.0
        self.beta = place.beta if config.beta_first and free else 1.0  # otherwise it is in the weights
        self.place, self.squeeze, self.pooled = place, config.squeeze, config.shortcut == "pool"
        chans, out = place.in_chans, place.out_chans
        width, groups = bottleneck_width(config, place)
        if any(n % config.pointwise_groups for n in (chans, width, out)):
            raise UserError(
                f"pointwise_groups {config.pointwise_groups} must divide the widths {chans}, {width} and {out}"
            )
        first = convolution(config, gamma if config.beta_first else gamma / place.beta)
        conv = convolution(config, gamma)
        stride = 1 if place.dense else place.stride
        late = place.dilation * (place.stride if place.dense else 1)  # of what follows the first 3x3

        self.norm0, self.norm1, self.norm2 = (batch_norm(config, c) for c in (chans, width, width))
        self.conv0 = first(chans, width, 1, groups=config.pointwise_groups)
        self.conv1 = conv(
            width,
            width,
            3,
            stride=stride,
            groups=groups,
            dilation=place.dilation,
            in_place_of=place.stride if place.dense else 1,
        )
        self.norm1b = batch_norm(config, width) if config.second_conv else None
        self.conv1b = conv(width, width, 3, groups=groups, dilation=late) if config.second_conv else None
        self.conv2 = conv(width, out, 1, groups=config.pointwise_groups)
        transition = place.stride > 1 or chans != out
        self.conv_shortcut = first(chans, out, 1, stride=1 if self.pooled else stride) if transition else None
        gated = width if config.squeeze == "inner" else out
        seen = out if config.squeeze == "out" else width
        hidden = max(1, int(gated * config.se_ratio))
        self.squeeze_excite = SqueezeExcite(seen, hidden, gated, config.se_gelu) if config.squeeze != "none" else None
        self.twice = 2.0 if free else 1.0  # twice the sigmoid keeps the variance; batch norm does so itself
        self.skip = SkipInit(config.alpha, config.skip_init) if free else None

    @property
    def skip_gain(self) -> nn.Parameter | None:
        """The gain of the branch, (1,); None with batch norm."""
        return None if self.skip is None else self.skip.skip_gain

    def activate(self, x: Tensor) -> Tensor:
        """What the convolutions of the block see, but for the factors that are in their weights."""
        if self.norm0 is not None:
            x = self.norm0(x)
        act = self.act if self.act_of_sum is None else self.act_of_sum
        return act(x if self.beta == 1.0 else x / self.beta)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """(N, C, H, W) -> (N, C', ceil(H / stride), ceil(W / stride)); keep (N,) is 0 for samples that skip it."""
        out = self.activate(x)
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(self._pool(out))
        alive = None if keep is None else self._alive(keep)
        if alive is not None:  # the others are their shortcuts; where nobody is left, parameters still get a gradient
            found = self._joined(take(shortcut, alive), take(out, alive), None)
            return shortcut.index_copy(0, alive, found)
        return self._joined(shortcut, out, keep)

    def _alive(self, keep: Tensor) -> Tensor | None:
        """Places of the samples that survive, if some do not and the mask can be read without waiting for a device.

        With batch norm the whole batch is needed.
        """
        if self.norm1 is not None or not is_eager_on_cpu(keep):
            return None
        alive = keep.nonzero()[:, 0]
        return alive if len(alive) < len(keep) else None

    def _joined(self, shortcut: Tensor, out: Tensor, keep: Tensor | None) -> Tensor:
        """The shortcut and the gated branch of an activated map."""
        out, gate = self.branch(out)
        if self.skip is not None:
            gate = self.skip(torch.ones(out.shape[0], 1, device=out.device) if gate is None else gate)
        if keep is not None:
            gate = keep[:, None] if gate is None else gate * keep[:, None]
        if gate is None:
            return shortcut + out
        return torch.addcmul(shortcut, out, gate.to(out.dtype)[:, :, None, None])

    def branch(self, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """The residual branch f of an activated map, and the gate (N, C) that belongs on it, if it has one."""
        gate = None
        out = self.conv1(self._between(self.norm1, self.conv0(out)))
        if self.conv1b is not None:
            out = self.conv1b(self._between(self.norm1b, out))
        if self.squeeze == "inner":
            out = out * self._gate(out).to(out.dtype)[:, :, None, None]
        out = self._between(self.norm2, out)
        if self.squeeze == "straddle":
            gate = self._gate(out, self.gamma)
        out = self.conv2(out)
        if self.squeeze == "out":
            gate = self._gate(out)
        return out, gate

    def _gate(self, seen: Tensor, scale: float = 1.0) -> Tensor:
        assert self.squeeze_excite is not None
        gate: Tensor = self.twice * self.squeeze_excite(seen, scale)
        return gate

    def _between(self, norm: nn.Module | None, x: Tensor) -> Tensor:
        return self.act(x if norm is None else norm(x))

    def _pool(self, out: Tensor) -> Tensor:
        stride, dilation = self.place.stride, self.place.dilation
        if stride == 1 or not self.pooled:
            return out
        return avg_pool_dense(out, stride, dilation) if self.place.dense else avg_pool_same(out, stride)

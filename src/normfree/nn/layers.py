"""Layers beside the convolution: SAME average pooling, the squeeze-excite gate, and the random draws of a step."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def at_least_float32(x: Tensor) -> Tensor:
    """X itself if it is float32 or float64, otherwise a float32 copy."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def avg_pool_same(x: Tensor, stride: int = 2) -> Tensor:
    """Average over stride x stride windows, SAME padding; a window over the edge divides by its valid pixels.

    (N, C, H, W) -> (N, C, ceil(H / stride), ceil(W / stride)).
    """
    return F.avg_pool2d(x, stride, stride, ceil_mode=True, count_include_pad=False)


def linear(in_features: int, out_features: int, std: float | None = None) -> nn.Linear:
    """A linear layer with weights from N(0, std^2), LeCun's 1/sqrt(fan-in) by default, and zero biases."""
    layer = nn.Linear(in_features, out_features)
    nn.init.normal_(layer.weight, std=in_features**-0.5 if std is None else std)
    nn.init.zeros_(layer.bias)
    return layer


class SqueezeExcite(nn.Module):
    """sigmoid(FC1(relu(FC0(mean over pixels)))): the gate alone, (N, C, H, W) -> (N, C) in float32.

    Appendix C writes GELU between the two; the authors' code, and so the published weights, have ReLU. The block
    multiplies the gate with its other scalars first and with the map last.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc0 = linear(channels, hidden)
        self.fc1 = linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """The gate of each channel, in (0, 1)."""
        pooled = x.mean((2, 3), dtype=x.dtype if x.dtype == torch.float64 else torch.float32)
        hidden = F.relu(self.fc0(pooled.to(self.fc0.weight.dtype)))
        return at_least_float32(torch.sigmoid(self.fc1(hidden)))


class Draws(NamedTuple):
    """The random masks of one forward pass in training, for a batch of N.

    keep: (N, blocks), 1 where the sample's residual branch survives stochastic depth, else 0; None drops nothing.
    dropout: (N, features), the multiplier of the pooled vector, 0 or 1 / (1 - rate); None drops nothing.
    """

    keep: Tensor | None = None
    dropout: Tensor | None = None


def depth_mask(uniform: Tensor, rates: Tensor) -> Tensor:
    """Stochastic depth: 1 with probability 1 - rate. The survivors are not rescaled, as in the authors' code.

    (N, blocks) numbers in [0, 1), (blocks,) -> (N, blocks).
    """
    return (uniform >= rates).to(uniform.dtype)


def dropout_mask(uniform: Tensor, rate: float) -> Tensor:
    """Dropout's multiplier: 1 / (1 - rate) with probability 1 - rate, else 0; of the shape of the uniform numbers."""
    return (uniform >= rate).to(uniform.dtype) / (1.0 - rate)

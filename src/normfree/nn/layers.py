"""Layers beside the convolution: SAME average pooling, the squeeze-excite gate, and the random draws of a step."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.nn.conv import same_padding


def at_least_float32(x: Tensor) -> Tensor:
    """X itself if it is float32 or float64, otherwise a float32 copy."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def mean_pixels(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C), summed in float32 at least."""
    return x.mean((2, 3), dtype=x.dtype if x.dtype == torch.float64 else torch.float32)


def avg_pool_same(x: Tensor, stride: int = 2) -> Tensor:
    """Average over stride x stride windows, SAME padding; a window over the edge divides by its valid pixels.

    (N, C, H, W) -> (N, C, ceil(H / stride), ceil(W / stride)).
    """
    return F.avg_pool2d(x, stride, stride, ceil_mode=True, count_include_pad=False)


def avg_pool_dense(x: Tensor, window: int = 2, dilation: int = 1) -> Tensor:
    """`avg_pool_same` at every pixel: the same averages, of pixels `dilation` apart, without striding; same shape."""
    for dim in (-2, -1):
        ones = torch.ones(x.shape[dim], device=x.device, dtype=x.dtype).view(-1, *[1] * (-1 - dim))
        total, count = x, ones
        for step in range(dilation, window * dilation, dilation):
            total = total + _shifted(x, step, dim)
            count = count + _shifted(ones, step, dim)
        x = total / count
    return x


def _shifted(x: Tensor, by: int, dim: int) -> Tensor:
    """Pixel i + by in place of pixel i, zeros beyond the edge."""
    by = min(by, x.shape[dim])
    gap = (0, 0) * (-1 - dim) + (0, by)
    return F.pad(x.narrow(dim, by, x.shape[dim] - by), gap)


def max_pool_same(x: Tensor, window: int = 3, stride: int = 2) -> Tensor:
    """Greatest value of each window, SAME padding: (N, C, H, W) -> (N, C, ceil(H / stride), ceil(W / stride))."""
    (top, bottom), (left, right) = (same_padding(size, window, stride) for size in x.shape[-2:])
    return F.max_pool2d(F.pad(x, (left, right, top, bottom), value=-math.inf), window, stride)


def block_dct(x: Tensor, size: int = 8) -> Tensor:
    """Orthonormal cosine transform (DCT-II) of each size x size block, zeros beyond the edge (Gueguen et al. 2018).

    (N, C, H, W) -> (N, C * size^2, ceil(H / size), ceil(W / size)); the coefficients of a channel are neighbours, by
    vertical and then horizontal frequency.
    """
    n = torch.arange(size, device=x.device, dtype=torch.float64)
    norm = torch.sqrt((1.0 + (n > 0).double()) / size)  # by frequency: the constant is shorter
    basis = norm[:, None] * torch.cos(math.pi / size * (n + 0.5) * n[:, None])  # (frequency, pixel)
    kernels = torch.einsum("ua,vb->uvab", basis, basis).reshape(-1, 1, size, size).to(x.dtype)
    pads = [-length % size for length in x.shape[-2:]]
    x = F.pad(x, (0, pads[1], 0, pads[0]))
    return F.conv2d(x, kernels.repeat(x.shape[1], 1, 1, 1), stride=size, groups=x.shape[1])


def linear(in_features: int, out_features: int, std: float | None = None) -> nn.Linear:
    """A linear layer with weights from N(0, std^2), LeCun's 1/sqrt(fan-in) by default, and zero biases."""
    if torch.get_default_device().type == "meta":
        empty: nn.Linear = nn.utils.skip_init(nn.Linear, in_features, out_features, device="meta")
        return empty
    layer = nn.Linear(in_features, out_features)
    nn.init.normal_(layer.weight, std=in_features**-0.5 if std is None else std)
    nn.init.zeros_(layer.bias)
    return layer


class SqueezeExcite(nn.Module):
    """sigmoid(FC1(relu(FC0(mean over pixels)))): the gate alone, (N, C, H, W) -> (N, gated) in float32.

    Appendix C writes GELU between the two (`gelu`); the authors' code, and so the published weights, have ReLU. The
    block multiplies the gate with its other scalars first and with the map last.
    """

    def __init__(self, channels: int, hidden: int, gated: int | None = None, gelu: bool = False) -> None:
        super().__init__()
        self.gelu = gelu
        self.fc0 = linear(channels, hidden)
        self.fc1 = linear(hidden, channels if gated is None else gated)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """The gate of each channel, in (0, 1); `scale` multiplies the map that is seen."""
        pooled = mean_pixels(x) * scale if scale != 1.0 else mean_pixels(x)
        hidden = self.fc0(pooled.to(self.fc0.weight.dtype))
        hidden = F.gelu(hidden, approximate="tanh") if self.gelu else F.relu(hidden)
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

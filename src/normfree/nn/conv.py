"""Convolution with scaled weight standardisation (Eq. 1 of the paper) and TensorFlow's SAME padding."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def standardize(weight: Tensor, gain: Tensor, eps: float = 1e-4) -> Tensor:
    """W_hat = gain * (W - mu) / sqrt(max(N sigma^2, eps)), per output unit; N is the fan-in, sigma^2 biased (Eq. 1).

    The paper's equation has no eps; the authors' code has it inside a maximum, so that it changes nothing unless the
    weights of a unit are nearly equal.

    Args:
        weight: (out, in / groups, *kernel).
        gain: (out,), the learnable gain, times any constant that the layer absorbs.

    Returns:
        the shape and type of `weight`; the arithmetic is in float32 at least.
    """
    w = weight if weight.dtype == torch.float64 else weight.float()
    dims = tuple(range(1, w.ndim))
    variance, mean = torch.var_mean(w, dim=dims, correction=0, keepdim=True)
    fan_in = math.prod(w.shape[1:])
    scale = gain.view(-1, *[1] * len(dims)) * torch.rsqrt(torch.clamp_min(variance * fan_in, eps))
    return (w - mean) * scale


def same_padding(size: int, kernel: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """Padding (before, after) with which ceil(size / stride) outputs come out; an odd pixel goes after."""
    total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


class WSConv2d(nn.Conv2d):
    """A 2-d convolution of the standardised weight, SAME padding, always with a bias.

    `scale` is a constant that multiplies the standardised weight and not the bias. It is how the gain gamma of the
    activation before this layer, and the 1/beta of its block, are applied: conv(c x, W) = conv(x, c W), and the weight
    is far smaller than the image.

    Parameters: weight (out, in / groups, kh, kw), gain (out,), bias (out,), in float32 whatever the type of the input,
    which decides the type of the output.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int | tuple[int, int] = 1,
        groups: int = 1,
        scale: float = 1.0,
        eps: float = 1e-4,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, groups=groups)
        self.scale, self.eps = scale, eps
        self.gain = nn.Parameter(torch.ones_like(self.bias))  # type: ignore[arg-type]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights from N(0, 1 / fan-in), gains 1, biases 0; standardisation makes the first nearly irrelevant."""
        nn.init.normal_(self.weight, std=math.prod(self.weight.shape[1:]) ** -0.5)
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]
        if hasattr(self, "gain"):  # the base class calls this before the gain exists
            nn.init.ones_(self.gain)

    def standardized_weight(self) -> Tensor:
        """What is convolved with: (out, in / groups, kh, kw), float32."""
        gain = self.gain if self.gain.dtype == torch.float64 else self.gain.float()
        return standardize(self.weight, gain * self.scale if self.scale != 1.0 else gain, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, ceil(H / stride), ceil(W / stride))."""
        weight, bias = self.standardized_weight().to(x.dtype), self.bias
        assert bias is not None
        (kh, kw), (sh, sw) = self.kernel_size, self.stride
        top, bottom = same_padding(x.shape[-2], kh, sh)
        left, right = same_padding(x.shape[-1], kw, sw)
        if top != bottom or left != right:
            x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
        return F.conv2d(x, weight, bias.to(x.dtype), self.stride, (top, left), 1, self.groups)

    def extra_repr(self) -> str:
        """As of the base class, with the constant that the weight absorbs."""
        return f"{super().extra_repr()}, scale={self.scale:.5g}"  # type: ignore[no-untyped-call]

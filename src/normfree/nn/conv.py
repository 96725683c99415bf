"""Convolution with scaled weight standardisation (Eq. 1 of the paper) and TensorFlow's SAME padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.nn.eager import is_eager_on_cpu

Standardizer = Callable[[Tensor, Tensor, float, torch.dtype], Tensor]  # weight, gain, eps, type of the outcome
Padding = Literal["same"] | int | tuple[int, int]


def standardize(weight: Tensor, gain: Tensor, eps: float = 1e-4) -> Tensor:
    """W_hat = gain * (W - mu) / sqrt(max(N sigma^2, eps)), per output unit; N is the fan-in, sigma^2 biased (Eq. 1).

    The paper's equation has no eps; the authors' code has it inside a maximum, so that it changes nothing unless the
    weights of a unit are nearly equal.

    Args:
        weight: (out, in / groups, *kernel).
        gain: (out,), the learnable gain, times any constant that the layer absorbs.

    Returns:
        the shape of `weight`, in float32 at least, as the arithmetic is.
    """
    w = weight if weight.dtype == torch.float64 else weight.float()
    gain = gain.to(w.dtype)
    fan_in = math.prod(w.shape[1:])
    if w.is_contiguous() and is_eager_on_cpu(w):
        # batch norm of one sample whose channels are the units: one kernel, and one for the backward pass
        rows = w.reshape(1, len(w), fan_in)
        found, _, rstd = torch.native_batch_norm(rows, gain * fan_in**-0.5, None, None, None, True, 0.0, 0.0)
        if bool((rstd * rstd * eps < fan_in).all()):  # no unit is at the floor
            return found.view(w.shape)
    dims = tuple(range(1, w.ndim))
    variance, mean = torch.var_mean(w, dim=dims, correction=0, keepdim=True)
    scale = gain.view(-1, *[1] * len(dims)) * torch.rsqrt(torch.clamp_min(variance * fan_in, eps))
    return (w - mean) * scale


def same_padding(size: int, kernel: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """Padding (before, after) with which ceil(size / stride) outputs come out; an odd pixel goes after."""
    total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


class SameConv2d(nn.Conv2d):
    """A 2-d convolution with TensorFlow's SAME padding, whose output has ceil(size / stride) pixels a side.

    Args:
        kernel_size, stride, dilation: one number, or (height, width).
        padding: "same", or zeros on both sides as in `nn.Conv2d`.
        in_place_of: a stride that was replaced by dilation in the layers behind: the pixels that a convolution with
            this stride would have given are found, unmoved, among those of the dense output.

    Parameters: weight (out, in / groups, kh, kw) and bias (out,), in float32 whatever the type of the input, which
    decides the type of the output.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int | tuple[int, int] = 1,
        padding: Padding = "same",
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        in_place_of: int = 1,
    ) -> None:
        zeros = 0 if padding == "same" else padding
        super().__init__(in_channels, out_channels, kernel_size, stride, zeros, dilation, groups, bias)
        self.same, self.in_place_of = padding == "same", in_place_of

    def reset_parameters(self) -> None:
        """Weights from N(0, 1 / fan-in), biases 0."""
        if self.weight.is_meta:  # nothing to fill, and torch would load a compiler to know so
            return
        nn.init.normal_(self.weight, std=math.prod(self.weight.shape[1:]) ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def geometry(self) -> dict[str, Any]:
        """What a convolution of the same shape, without parameters in common, is made with."""
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": "same" if self.same else self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "in_place_of": self.in_place_of,
        }

    def filters(self) -> Tensor:
        """What is convolved with: (out, in / groups, kh, kw)."""
        return self.weight

    def filters_in(self, dtype: torch.dtype) -> Tensor:
        """`filters`, in the type of the maps."""
        return self.filters().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, ceil(H / stride), ceil(W / stride))."""
        x, padding = self.padded(x)
        weight = self.filters_in(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def padded(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The input with the zeros that differ between two sides, and those that the convolution can add itself."""
        if not self.same:
            return x, self.padding  # type: ignore[return-value]
        (top, bottom), (left, right) = self._pads(x.shape[-2], 0), self._pads(x.shape[-1], 1)
        if top == bottom and left == right:
            return x, (top, left)
        return F.pad(x, (left, right, top, bottom)), (0, 0)

    def _pads(self, size: int, axis: int) -> tuple[int, int]:
        kernel, stride, dilation = self.kernel_size[axis], self.stride[axis], self.dilation[axis]
        if self.in_place_of == 1:
            return same_padding(size, kernel, stride, dilation)
        before = same_padding(-(-size // dilation), kernel, self.in_place_of)[0] * dilation
        return before, (kernel - 1) * dilation - before


class WSConv2d(SameConv2d):
    """A convolution with the standardised weight (Eq. 1), SAME padding unless told otherwise, always with a bias.

    `scale` is a constant that multiplies the standardised weight and not the bias. It is how the gain gamma of the
    activation before this layer, and the 1/beta of its block, are applied: conv(c x, W) = conv(x, c W), and the weight
    is far smaller than the image.

    Parameters: as of `SameConv2d`, and gain (out,).

    Raises:
        ValueError: a fan-in of 1, whose standardised weight would be 0.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int | tuple[int, int] = 1,
        padding: Padding = "same",
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        scale: float = 1.0,
        eps: float = 1e-4,
        in_place_of: int = 1,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            in_place_of=in_place_of,
        )
        if math.prod(self.weight.shape[1:]) == 1:
            raise ValueError("a fan-in of 1 cannot be standardised: the weight minus its mean is 0")
        self.scale, self.eps = scale, eps
        self.standardizer: Standardizer | None = None  # for maps of 16 bits, where something quicker is at hand
        self._standardized: Tensor | None = None  # where `standardized_once` has it
        self.gain = nn.Parameter(torch.ones_like(self.bias))  # type: ignore[arg-type]

    def reset_parameters(self) -> None:
        """Weights from N(0, 1 / fan-in), gains 1, biases 0; standardisation makes the first nearly irrelevant."""
        super().reset_parameters()
        if hasattr(self, "gain"):  # the base class calls this before the gain exists
            nn.init.ones_(self.gain)

    def filters(self) -> Tensor:
        """The standardised weight with its gain and scale, in float32 at least."""
        if self._standardized is not None:
            return self._standardized
        return standardize(self.weight, self._gain(), self.eps)

    def filters_in(self, dtype: torch.dtype) -> Tensor:
        """`filters`, in the type of the maps; always from the weights as they are stored."""
        if self.standardizer is None or self._standardized is not None or dtype.itemsize > 2:
            return self.filters().to(dtype)
        return self.standardizer(self.weight, self._gain(), self.eps, dtype)

    def _gain(self) -> Tensor:
        gain = self.gain if self.gain.dtype == torch.float64 else self.gain.float()
        return gain * self.scale if self.scale != 1.0 else gain

    def folded(self) -> SameConv2d:
        """A plain convolution with the same outputs, and parameters of its own."""
        with torch.device("meta"):  # no random numbers for weights that are replaced
            conv = SameConv2d(**self.geometry)
        assert self.bias is not None
        weight, bias = self.filters().detach().to(self.weight.dtype), self.bias.detach().clone()
        conv.weight = nn.Parameter(weight, self.weight.requires_grad)
        conv.bias = nn.Parameter(bias, self.bias.requires_grad)
        return conv.train(self.training)

    def extra_repr(self) -> str:
        """As of the base class, with the constant that the weight absorbs."""
        return f"{super().extra_repr()}, scale={self.scale:.5g}"  # type: ignore[no-untyped-call]


@contextmanager
def standardized_once(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Standardise each weight once for all passes in this block, which take it as given and add to its gradient.

    Yields:
        what carries those gradients on to the weights and gains, to be called behind the last backward pass.
    """
    found: list[tuple[WSConv2d, Tensor]] = []

    def carry() -> None:
        for conv, weight in found:
            given, conv._standardized = conv._standardized, None
            if given is not None and given.grad is not None:
                weight.backward(given.grad)

    try:
        for conv in model.modules():
            if isinstance(conv, WSConv2d):
                weight = conv.filters()
                found.append((conv, weight))
                conv._standardized = weight.detach().requires_grad_(weight.requires_grad)
        yield carry
    finally:
        for conv, _ in found:
            conv._standardized = None

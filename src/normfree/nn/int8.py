"""Convolutions of 8-bit integers, for inference on CPUs.

A map is rounded to 256 levels between the least and the greatest value that calibration saw, 0 among them; a weight to
255 levels around 0, by output unit. Uncompiled the arithmetic is of the rounded numbers, in floats; compiled with
frozen weights it is oneDNN's, of the integers themselves.
"""

from __future__ import annotations

import math
from contextlib import suppress
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.nn.conv import SameConv2d

LEVELS = 255
_LEAST = 1e-12  # step, so that its inverse is a number


def is_available() -> bool:
    """Whether this torch and this processor have what it takes: oneDNN's operation, and AVX512's or AVX's VNNI."""
    return hasattr(torch.ops.onednn, "qconv_pointwise") and bool(torch.cpu._is_vnni_supported())


class Int8Conv2d(SameConv2d):
    """What a plain convolution computes, of a rounded map and a rounded weight.

    Args:
        conv: the convolution.
        low, high: the range of its input, with 0 in between or not.

    Attributes:
        of_integers: compute with the integers themselves, where it is compiled with frozen weights.
    """

    weight_levels: Tensor
    unit_step: Tensor
    unit_zero: Tensor
    bias: nn.Parameter

    def __init__(self, conv: SameConv2d, low: float, high: float) -> None:
        with torch.device("meta"):
            super().__init__(**conv.geometry)
        low, high = min(low, 0.0), max(high, 0.0)
        self.step = max((high - low) / LEVELS, _LEAST)
        self.zero = round(-low / self.step)
        self.of_integers = False
        weight = conv.weight.detach().float()
        steps = weight.abs().amax(dim=(1, 2, 3)) / 127
        steps = torch.where(steps > 0, steps, 1.0)
        del self.weight
        self.register_buffer("weight_levels", (weight / steps.view(-1, 1, 1, 1)).round().to(torch.int8))
        self.register_buffer("unit_step", steps)
        self.register_buffer("unit_zero", torch.zeros(len(steps), dtype=torch.int64))
        bias = torch.zeros(len(steps)) if conv.bias is None else conv.bias.detach().float()
        self.bias = nn.Parameter(bias, requires_grad=False)

    def filters(self) -> Tensor:
        """The rounded weight: (out, in / groups, kh, kw), float32."""
        return self.weight_levels * self.unit_step.view(-1, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, ceil(H / stride), ceil(W / stride))."""
        x, padding = self.padded(x)
        if self.of_integers and torch.compiler.is_compiling():
            return self._of_integers(x, padding)
        rounded = torch.fake_quantize_per_tensor_affine(x.float(), self.step, self.zero, 0, LEVELS).to(x.dtype)
        weight, bias = self.filters().to(x.dtype), self.bias.to(x.dtype)
        return F.conv2d(rounded, weight, bias, self.stride, padding, self.dilation, self.groups)

    def _of_integers(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        levels = (x.float() * (1 / self.step)).round().add(self.zero).clamp(0, LEVELS).to(torch.uint8)
        places = [list(self.stride), list(padding), list(self.dilation), self.groups]
        packed = torch.ops.onednn.qconv_prepack(
            self.weight_levels, self.unit_step, self.step, self.zero, *places, list(x.shape)
        )
        units = (packed, self.unit_step, self.unit_zero, self.bias)
        out: Tensor = torch.ops.onednn.qconv_pointwise(
            levels, self.step, self.zero, *units, *places, 1.0, 0, x.dtype, "none", [], ""
        )
        return out

    def extra_repr(self) -> str:
        """As of the base class, with the levels of the input."""
        return f"{super().extra_repr()}, step={self.step:.5g}, zero={self.zero}"  # type: ignore[no-untyped-call]


@torch.no_grad()
def round_convolutions(model: nn.Module, images: Tensor) -> dict[str, Int8Conv2d]:
    """By name, what the plain convolutions of a network become; those that see the image itself stay as they are.

    Args:
        model: in float32, with plain convolutions (`normfree.fold`).
        images: (N, C, H, W), normalised, for which ranges are measured.
    """
    ranges: dict[SameConv2d, tuple[float, float]] = {}

    def measure(conv: nn.Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(conv, SameConv2d)
        if inputs[0] is images:
            return
        low, high = (x.item() for x in inputs[0].aminmax())
        before = ranges.get(conv, (math.inf, -math.inf))
        ranges[conv] = min(low, before[0]), max(high, before[1])

    named = {n: m for n, m in model.named_modules() if isinstance(m, SameConv2d)}
    hooks = [conv.register_forward_pre_hook(measure) for conv in named.values()]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: Int8Conv2d(conv, *ranges[conv]) for name, conv in named.items() if conv in ranges}


def allow_integers(model: nn.Module) -> None:
    """Let the convolutions of a network be compiled as those of integers, by a compiler that freezes the weights."""
    _describe_packing()
    for module in model.modules():
        if isinstance(module, Int8Conv2d):
            module.of_integers = True


@lru_cache(maxsize=1)
def _describe_packing() -> None:
    """Tell torch the shape of what is computed once, when weights are frozen, and which it has no description of."""
    with suppress(RuntimeError):  # a torch that has one
        torch.library.register_fake("onednn::qconv_prepack", _packed)


def _packed(weight: Tensor, *_: object) -> Tensor:
    return torch.empty_like(weight)

"""GELU as one compiled kernel each way, for CPUs.

torch's kernel computes a tanh, which takes three quarters of its time. The same function is x * sigmoid(2 u), and a
compiler that sees the whole expression makes it as quick as SiLU nearly: 0.6 in place of 1.7 ms on a map of 2.4 million
numbers in bfloat16, two cores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from normfree.nn.eager import is_eager_on_cpu
from normfree.nn.signal import gelu

_LINEAR = 2 * math.sqrt(2 / math.pi)  # 2 u = _LINEAR x + _CUBIC x^3
_CUBIC = 0.044715 * _LINEAR


def fused_gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, of any shape and floating-point type; computed in float32 at least.

    Elsewhere than on an eager CPU it is torch's: a compiled network needs no kernel of its own.
    """
    if not is_eager_on_cpu(x) or x.numel() == 0:
        return gelu(x)
    found: Tensor = _FusedGelu.apply(x)  # type: ignore[no-untyped-call]
    return found


def sigmoid_gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, written as a compiler makes it quickest; of any shape and floating-point type."""
    y = _wide(x)
    return (y * torch.sigmoid(y * (_LINEAR + _CUBIC * y * y))).to(x.dtype)


def replace_gelu(model: nn.Module, other: Callable[[Tensor], Tensor]) -> None:
    """Put another function where modules have the tanh form of GELU as their `act`."""
    for module in model.modules():
        if getattr(module, "act", None) is gelu:
            module.act = other  # type: ignore[assignment]


def fuse_activations(model: nn.Module) -> None:
    """Let every module that has the tanh form of GELU use `fused_gelu`.

    Raises:
        RuntimeError: torch.compile does not work here, for want of a C++ compiler, say.
    """
    fused_gelu(torch.zeros(2))  # is compiled now, if it can be
    replace_gelu(model, fused_gelu)


class _FusedGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _kernel(sigmoid_gelu)(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative
            again: Tensor = torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
            return again
        return _kernel(_backward)(grad, x)


def _backward(grad: Tensor, x: Tensor) -> Tensor:
    y = _wide(x)
    square = y * y
    s = torch.sigmoid(y * (_LINEAR + _CUBIC * square))
    return (_wide(grad) * (s + y * s * (1 - s) * (_LINEAR + 3 * _CUBIC * square))).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@lru_cache(maxsize=2)
def _kernel(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(function, dynamic=True)
    return compiled

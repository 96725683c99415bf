"""Signal propagation without normalisation: the gains gamma, and the variance bookkeeping alpha and beta.

With scaled weight standardisation (`normfree.nn.conv`) and activations multiplied by gamma, every layer keeps unit
variance at initialisation. A residual block is h + alpha * f(h / beta), so that the variance of h is known in advance:
it grows by alpha^2 a block and starts again from 1 after each transition block (Section 3 of the paper).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]

# 1/std of f(z) for z ~ N(0, 1), by sampling: the numbers that the published weights were trained with.
# The exact integrals differ in the third or fourth digit (gelu 1.70093, relu 1.71286, silu 1.78719).
GAMMA: dict[str, float] = {
    "identity": 1.0,
    "celu": 1.270926833152771,
    "elu": 1.2716004848480225,
    "gelu": 1.7015043497085571,
    "glu": 1.8484294414520264,
    "leaky_relu": 1.70590341091156,
    "log_sigmoid": 1.9193484783172607,
    "log_softmax": 1.0002083778381348,
    "relu": 1.7139588594436646,
    "relu6": 1.7131484746932983,
    "selu": 1.0008515119552612,
    "sigmoid": 4.803835391998291,
    "silu": 1.7881293296813965,
    "soft_sign": 2.338853120803833,
    "softplus": 1.9203323125839233,
    "tanh": 1.5939117670059204,
}


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form: JAX's default, which the authors used."""
    return F.gelu(x, approximate="tanh")


# (N, C, ...) -> the same shape, except glu, which halves C; glu and log_softmax act on the channels.
ACTIVATIONS: dict[str, Activation] = {
    "identity": lambda x: x,
    "celu": F.celu,
    "elu": F.elu,
    "gelu": gelu,
    "glu": partial(F.glu, dim=1),
    "leaky_relu": F.leaky_relu,
    "log_sigmoid": F.logsigmoid,
    "log_softmax": partial(F.log_softmax, dim=1),
    "relu": F.relu,
    "relu6": F.relu6,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "soft_sign": F.softsign,
    "softplus": F.softplus,
    "tanh": torch.tanh,
}


def activation(kind: str | Activation) -> tuple[Activation, float]:
    """The function and its gain gamma, for a name of `ACTIVATIONS` or any elementwise function of a tensor.

    Raises:
        ValueError: the name is not in the table, or the function has no finite, non-zero gain.
    """
    if callable(kind):
        return kind, gain(kind)
    if kind not in ACTIVATIONS:
        raise ValueError(f"unknown activation {kind!r}; choose from {', '.join(ACTIVATIONS)}, or pass a function")
    return ACTIVATIONS[kind], GAMMA[kind]


@lru_cache(maxsize=64)
def gain(function: Activation) -> float:
    """Gamma = 1/std of f(z), z ~ N(0, 1), for an elementwise function, by quadrature in float64.

    The trapezoid rule on [-12, 12] is exact to about 1e-8 here, kinks included: the density beyond is below 1e-32.
    """
    z = torch.linspace(-12.0, 12.0, 2**17 + 1, dtype=torch.float64)
    density = torch.exp(-0.5 * z**2)
    density /= density.sum()
    with torch.no_grad():
        y = function(z)
    if y.shape != z.shape:
        raise ValueError("the gain of a function that is not elementwise cannot be computed; give it as a number")
    mean = (density * y).sum()
    std = (density * (y - mean) ** 2).sum().sqrt().item()
    if not math.isfinite(std) or std == 0.0:
        raise ValueError(f"the function has standard deviation {std} on N(0, 1): no gain exists")
    return 1.0 / std


def block_input_std(depths: Sequence[int], alpha: float) -> list[float]:
    """Beta of every block: the standard deviation of its input at initialisation, as the bookkeeping predicts it.

    beta^2 grows by alpha^2 a block. A transition block (the first of a stage) still divides by the beta of the stage
    before; as its shortcut is taken after that division, the variance behind it is 1 + alpha^2.
    """
    betas, variance = [], 1.0
    for depth in depths:
        for index in range(depth):
            betas.append(math.sqrt(variance))
            if index == 0:
                variance = 1.0
            variance += alpha**2
    return betas

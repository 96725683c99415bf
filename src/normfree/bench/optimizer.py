"""What moves the weights, alone: clipping, the update and the average, on gradients that stay the same."""

from __future__ import annotations

from typing import Any

import torch

from normfree.bench.steps import library
from normfree.bench.timing import Work
from normfree.models import create_model
from normfree.optim import AGCSGD, EMA, param_groups

_SHARE = 5e-3  # of the weights' norms that gradients have: some units are clipped, as in training, and most are not


def ours(model: str, device: str) -> Work:
    """AGCSGD in the paper's groups, and EMA."""
    network = create_model(model).to(device)
    with_gradients(network)
    optimizer, average = AGCSGD(param_groups(network), lr=1e-6), EMA(network)

    def work() -> None:
        optimizer.step()
        average.update(network)

    return work


def timms(model: str, device: str, fused: bool) -> Work:
    """Timm's AGC, torch's SGD as it comes or fused, and timm's average; on the same weights."""
    timm = library()
    network = create_model(model).to(device)
    with_gradients(network)
    settings: dict[str, Any] = {"momentum": 0.9, "nesterov": True, "weight_decay": 2e-5, "fused": fused or None}
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-6, **settings)
    average = timm.utils.ModelEmaV3(network, decay=0.9999)
    clipped = [p for name, p in network.named_parameters() if not name.startswith("fc.")]

    def work() -> None:
        timm.utils.agc.adaptive_clip_grad(clipped, 0.01)
        optimizer.step()
        average.update(network)

    return work


def with_gradients(network: torch.nn.Module) -> None:
    """Noise in proportion to each weight."""
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        noise = torch.randn(p.shape, generator=generator).to(p.device)
        size = torch.linalg.vector_norm(p).clamp_min(1e-3) / noise.norm().clamp_min(1e-6)
        p.grad = noise.mul_(_SHARE * size.detach()).contiguous()


def works(model: str, device: str, rivals: bool = True) -> dict[str, Work]:
    """By name; without rivals ours alone."""
    found = {"normfree": ours(model, device)}
    if rivals:
        found["timm, SGD as it comes"] = timms(model, device, fused=False)
        found["timm, fused SGD"] = timms(model, device, fused=True)
    return found

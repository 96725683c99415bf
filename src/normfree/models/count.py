"""Parameters and multiply-adds, counted on the meta device: nothing is allocated, nothing computed."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from normfree.models.families import NetworkConfig
from normfree.models.network import Network

# (parameters, multiply-adds at the test size), in millions and billions as the paper prints them: Table 3, and Table 5
# for F4+. The row of ResNet-50 is the batch-normalised one.
PAPER: dict[str, tuple[float, float]] = {
    "nfnet_f0": (71.5, 12.38),
    "nfnet_f1": (132.6, 35.54),
    "nfnet_f2": (193.8, 62.59),
    "nfnet_f3": (254.9, 114.76),
    "nfnet_f4": (316.1, 215.24),
    "nfnet_f5": (377.2, 289.76),
    "nfnet_f6": (438.4, 377.28),
    **dict.fromkeys(("nfnet_f4_plus", "nfnet_f4_plus_192"), (527.0, 367.0)),  # docs/design.md has the difference
    "bn_resnet50": (26.0, 4.10),
}


def parameters(config: NetworkConfig) -> int:
    """Trained numbers of a network."""
    with torch.device("meta"):
        return sum(p.numel() for p in Network(config).parameters())


def multiply_adds(config: NetworkConfig, size: int) -> int:
    """Of the forward pass of one image of size x size pixels: convolutions and linear layers, as the paper counts."""
    with torch.device("meta"):
        model = Network(config)
    return multiply_adds_of(model, size, config.in_chans)


def multiply_adds_of(model: torch.nn.Module, size: int, in_chans: int = 3) -> int:
    """The same of any network that is on the meta device; it is in evaluation afterwards."""
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, in_chans, size, size, device="meta"))
    return int(counter.get_total_flops()) // 2

"""The settings of a run on a folder of images, for tests that need any."""

from __future__ import annotations

from normfree.config import DataConfig, ModelConfig, OptimConfig, Run, TrainConfig

RUN = Run(
    recipe="folder",
    model=ModelConfig("nfnet_tiny"),
    data=DataConfig("images", 32, 32, "shift", 0.25, 3, 0.1, 10.0, False, "pad", 2),
    optim=OptimConfig(0.1, 0.02, 1.0),
    train=TrainConfig(10.0, 64),
)

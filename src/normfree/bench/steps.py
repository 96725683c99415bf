"""Whole training steps to be timed (A.2): ours, and the same work with timm's networks, AGC and average.

Images and labels are on the device already. A step is forward, loss, backward, clipping, the optimizer and the average.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from normfree.bench.timing import Work
from normfree.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DataConfig,
    ModelConfig,
    OptimConfig,
    Run,
    TrainConfig,
    UserError,
)
from normfree.data.crop import Preprocessing
from normfree.data.loader import Batch
from normfree.train.build import build_learner
from normfree.train.length import Length
from normfree.train.step import PRECISIONS

CLASSES = 1000


@dataclass(frozen=True)
class Task:
    """What is measured: network, side of the images in pixels, images of a step, type of the maps, device."""

    model: str  # ours by name, or "timm:NAME"
    size: int
    batch: int
    precision: str = "fp32"
    device: str = "cpu"
    compiled: bool = False
    fused: bool = False  # torch's fused SGD for timm's networks; ours has one optimizer


def step(task: Task) -> Work:
    """One training step, over and over on the same images.

    Raises:
        UserError: timm is needed and not there.
    """
    return _timms(task) if task.model.startswith("timm:") else _ours(task)


def images(task: Task) -> torch.Tensor:
    """(N, 3, S, S) uint8 of noise, channels last, on the device; the same for every network."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randint(256, (task.batch, task.size, task.size, 3), generator=generator, dtype=torch.uint8)
    return found.permute(0, 3, 1, 2).to(task.device)


def _ours(task: Task) -> Work:
    data = DataConfig("nowhere", task.size, task.size, "box", 0.08, 0, 0.0, 0.0, True, "squash", 32)
    train = TrainConfig(epochs=1.0, batch_size=task.batch, device=task.device, precision=task.precision)
    run = Run("bench", ModelConfig(task.model), data, OptimConfig(lr=0.1, clipping=0.01, warmup=1.0), train)
    preprocessing = Preprocessing(task.size, "squash", 32, IMAGENET_MEAN, IMAGENET_STD)
    learner = build_learner(run, CLASSES, Length(100.0, 1000.0), preprocessing)
    if task.compiled:
        learner.model.compile()
    labels = torch.arange(task.batch, device=task.device) % CLASSES
    batch = Batch(images(task), labels, torch.ones(task.batch, dtype=torch.bool), [])
    taken = 0

    def work() -> None:
        nonlocal taken
        learner.step(batch, taken, taken)
        taken += 1

    return work


def library() -> Any:
    """The package timm. Raises UserError where it does not import."""
    try:
        import_module("timm.utils")
        return import_module("timm")
    except (ImportError, RuntimeError, OSError) as e:
        raise UserError(f"networks of timm need timm and the torchvision that belongs to torch: {e}") from e


def _timms(task: Task) -> Work:
    timm = library()
    model: nn.Module = timm.create_model(task.model.removeprefix("timm:"), num_classes=CLASSES)
    model.to(task.device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    forward: Any = torch.compile(model) if task.compiled else model
    average = timm.utils.ModelEmaV3(model, decay=0.9999)
    settings: dict[str, Any] = {"momentum": 0.9, "nesterov": True, "weight_decay": 2e-5}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=task.fused or None, **settings)
    nf = "nfnet" in task.model or "nf_" in task.model
    mean, std = (torch.tensor(v, device=task.device).mul(255)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    x = images(task).float().sub(mean).div(std).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(task.batch, device=task.device) % CLASSES
    dtype = PRECISIONS[task.precision]

    def work() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(torch.device(task.device).type, dtype, enabled=dtype != torch.float32):
            logits = forward(x)
        F.cross_entropy(logits.float(), labels, label_smoothing=0.1).backward()
        if nf:
            timm.utils.agc.adaptive_clip_grad(timm.models.model_parameters(model, exclude_head=True), 0.01)
        optimizer.step()
        average.update(model)

    return work

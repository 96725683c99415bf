"""A forward pass of trained networks: ours as it is and ready for inference, timm's as it comes, in any precision."""

from __future__ import annotations

from typing import Any

import torch

from normfree.bench.steps import CLASSES, TIMM, Task, images, library
from normfree.bench.timing import Work
from normfree.bench.timm_step import known_name
from normfree.config import IMAGENET_MEAN, IMAGENET_STD
from normfree.data.crop import Preprocessing
from normfree.models import create_model, for_inference
from normfree.models.inference import TYPES, freeze


def forward(task: Task, ready: bool = True) -> Work:
    """One forward pass over the images of a task, already normalised, on the device.

    Args:
        task: its precision may be "int8" too, of ours made ready.
        ready: ours as `normfree.for_inference` makes it; otherwise, and timm's always, as it comes in that precision.

    Raises:
        UserError: timm is needed and not there, or the machine does not have the precision.
    """
    preprocessing = Preprocessing(task.size, "squash", 0, IMAGENET_MEAN, IMAGENET_STD)
    x = preprocessing.normalize(images(task)).to(memory_format=torch.channels_last)
    timms, model = task.model.startswith(TIMM), _network(task.model).eval().to(task.device)
    if ready and not timms:
        model = for_inference(model, task.precision, task.compiled, x)
    else:
        x = x.to(TYPES[task.precision])
        model = model.to(TYPES[task.precision]).to(memory_format=torch.channels_last)
        model = freeze(model) if task.compiled else model

    def work() -> None:
        with torch.no_grad():
            model(x)

    return work


def _network(name: str) -> Any:
    if name.startswith(TIMM):
        return library().create_model(known_name(name), num_classes=CLASSES)
    return create_model(name, CLASSES)

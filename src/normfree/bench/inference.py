"""A forward pass of trained networks: as they are, folded, in 16 bits, compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from normfree.bench.steps import CLASSES, Task, images, library
from normfree.bench.timing import Work
from normfree.config import IMAGENET_MEAN, IMAGENET_STD
from normfree.data.crop import Preprocessing
from normfree.models import create_model, fold
from normfree.train.step import PRECISIONS


def forward(task: Task, folded: bool = True) -> Work:
    """One forward pass over the images of a task, already normalised, on the device; timm's networks as they come.

    Compiled networks have their weights frozen into the program.

    Raises:
        UserError: timm is needed and not there.
    """
    model = _model(task.model, folded).to(task.device, PRECISIONS[task.precision]).to(memory_format=torch.channels_last)
    normalized = Preprocessing(task.size, "squash", 0, IMAGENET_MEAN, IMAGENET_STD).normalize(images(task))
    x = normalized.to(PRECISIONS[task.precision])
    run: Any = model
    if task.compiled:
        import torch._inductor.config as inductor  # noqa: PLC0415 (it takes seconds)

        inductor.freezing = True
        run = torch.compile(model)

    def work() -> None:
        with torch.no_grad():
            run(x)

    return work


def _model(name: str, folded: bool) -> Any:
    if name.startswith("timm:"):
        model: nn.Module = library().create_model(name.removeprefix("timm:"), num_classes=CLASSES)
        return model.eval()
    network = create_model(name, CLASSES).eval()
    return fold(network) if folded else network

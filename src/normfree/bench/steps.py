"""Whole training steps to be timed (A.2): ours, and the same work with timm's networks, AGC and average.

Images and labels are on the device already. A step is forward, loss, backward, the sum of gradients over processes if
there are several, clipping, the optimizer and the average.
"""

from __future__ import annotations

import torch

from normfree.bench import paper
from normfree.bench.task import CLASSES, COMPILED, RATE, SAM, TIMM, Step, Task, images, is_finite
from normfree.bench.timm_step import TimmStep, known_name, library, timms_network
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
from normfree.distributed import Group
from normfree.models import model_config
from normfree.models.count import multiply_adds, multiply_adds_of
from normfree.train.build import build_learner, compile_network
from normfree.train.length import Length

__all__ = [
    "CLASSES",
    "COMPILED",
    "SAM",
    "TIMM",
    "Step",
    "Task",
    "images",
    "library",
    "size_of",
    "step",
    "step_multiply_adds",
]

_SAM_EVERY = 5  # the ascent sees a fifth of the images (A.4)


def step(task: Task, group: Group | None = None) -> Step:
    """One training step; of the batches of all processes of a group, if there is one.

    Raises:
        UserError: timm is needed and not there, no such network, or it cannot be trained as the task says.
    """
    group = Group.alone() if group is None else group
    return TimmStep(task, group) if task.model.startswith(TIMM) else _Ours(task, group)


def step_multiply_adds(task: Task) -> int:
    """Of the convolutions and linear layers of a step: three times those of a forward pass, of every image it sees.

    Backward is two of them: by the weights and by the maps. (torch's counter is wrong about the backward of grouped
    convolutions: for EfficientNets by a factor of 14.) What `remat` computes again is not counted: it is no progress.
    """
    seen = task.batch + (-(-task.batch // _SAM_EVERY) if task.model.endswith(SAM) else 0)
    if not task.model.startswith(TIMM):
        return 3 * seen * multiply_adds(model_config(task.model.removesuffix(SAM)), task.size)
    with torch.device("meta"):
        model = timms_network(task.model)
    return 3 * seen * multiply_adds_of(model, task.size)


def size_of(model: str, which: str = "train") -> int:
    """Side in pixels of the images that a network is trained ("train") or tested ("test") on.

    Of the paper's rivals it is the one of Table 3, of others of timm the one that its weights have.

    Raises:
        UserError: no such network, or it does not say.
    """
    if which == "train" and (row := paper.row_of(model)) is not None:
        return row.size
    if not model.startswith(TIMM):
        size: int = getattr(model_config(model.removesuffix(SAM)), f"{which}_size")
        return size
    known = library().get_pretrained_cfg(known_name(model))
    shape = known and ((known.test_input_size if which == "test" else None) or known.input_size)
    if not shape:
        raise UserError(f"name the side of the images with --size: {model} does not say it")
    return int(shape[-1])


class _Ours:
    def __init__(self, task: Task, group: Group) -> None:
        name = task.model.removesuffix(SAM)
        if task.remat != "none" and model_config(name).norm == "batch":
            raise UserError(f"--remat is not for {name}: it would move the statistics of batch norm twice a step")
        data = DataConfig("nowhere", task.size, task.size, "box", 0.08, 0, 0.0, 0.0, True, "squash", 32)
        train = TrainConfig(
            epochs=1.0,
            batch_size=task.batch * group.world,
            device=task.device,
            precision=task.precision,
            micro_batch=task.micro_batch,
            remat=task.remat,
        )
        rho = 0.05 if task.model.endswith(SAM) else 0.0
        optim = OptimConfig(
            lr=RATE,
            clipping=0.01,
            warmup=0.0,
            sam_rho=rho,
            sam_every=_SAM_EVERY,
            sam_shards=group.world,  # each device ascends by itself
        )
        run = Run("bench", ModelConfig(name), data, optim, train)
        preprocessing = Preprocessing(task.size, "squash", 32, IMAGENET_MEAN, IMAGENET_STD)
        self.learner = build_learner(run, CLASSES, Length(1000.0, 1000.0), preprocessing, group)
        if task.compiled:
            compile_network(self.learner.model)
        labels = torch.arange(task.batch, device=task.device) % CLASSES
        self._batch = Batch(images(task), labels, torch.ones(task.batch, dtype=torch.bool), [])
        self._taken = 0
        if group.world > 1:  # what fits is found while nobody waits for a sum, and is the same for all
            self.learner.fit_memory(task.size)
            self.learner.micro_batch = -group.agree(-(self.learner.micro_batch or task.batch))

    @property
    def micro_batch(self) -> int | None:
        return self.learner.micro_batch

    def __call__(self) -> None:
        self.learner.step(self._batch, self._taken, self._taken)
        self._taken += 1

    def is_finite(self) -> bool:
        return is_finite(self.learner.model)

"""Evaluation: every image once, in batches of one shape, sums in float64 in the order of the samples.

Logits of an image differ in the last bits between batch sizes, and not between places in the batch. So evaluation and
prediction, which share `infer`, always run the batch size stored with the weights and agree to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.config import IMAGENET_MEAN, IMAGENET_STD, UserError
from normfree.data.crop import Preprocessing
from normfree.data.loader import eval_batches
from normfree.data.sources import Source
from normfree.models import model_config


@dataclass(frozen=True)
class Scores:
    """top1 and top5 are fractions of 1, loss is the mean cross-entropy in nats, images how many were counted."""

    top1: float
    top5: float
    loss: float
    images: int

    def as_dict(self) -> dict[str, float | int]:
        """As evaluate --json prints it."""
        return asdict(self)


@dataclass(frozen=True)
class Outputs:
    """Logits (N, classes), labels (N,) and indices (N,) of the images that could be read; bad, those that could not."""

    logits: Tensor
    labels: Tensor
    indices: Tensor
    bad: list[tuple[int, str]]


def published_preprocessing(name: str, size: int | None = None) -> Preprocessing:
    """How images are prepared for published weights: as their authors did, at the test size of the model or another.

    The NFNets: both sides to size + 32, whatever the aspect, and the centre (A.1). NF-ResNets, NF-RegNets and the
    batch-norm twins: the centred square. Neither is antialiased. timm's own networks as timm evaluates them.
    """
    size = model_config(name).test_size if size is None else size
    if name.startswith("timm_"):
        crop, margin, antialias = "center", {"timm_nf_resnet50": 18}.get(name, 0), True
    else:
        crop, margin, antialias = "squash" if name.startswith(("nfnet", "bn_nfnet")) else "center", 32, False
    return Preprocessing(size, crop, margin, IMAGENET_MEAN, IMAGENET_STD, antialias)


def sample_images(source: Source, preprocessing: Preprocessing, n: int) -> Tensor:
    """The first n of the images, evenly spread over the source, that can be read: (n, 3, S, S), normalised."""
    spread = source.subset(np.unique(np.linspace(0, len(source) - 1, min(2 * n, len(source))).astype(np.int64)))
    batch = next(iter(eval_batches(spread, preprocessing, len(spread))))
    return preprocessing.normalize(batch.images[batch.valid][:n])


class Interrupted(Exception):
    """An evaluation was asked to stop."""


@torch.inference_mode()
def infer(
    model: nn.Module,
    source: Source,
    preprocessing: Preprocessing,
    batch_size: int,
    workers: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
    done: Callable[[int], None] = lambda _: None,
) -> Outputs:
    """Logits of every image of a source, in its order, float32 on the CPU; `done` is told the batches so far.

    Raises:
        Interrupted: `should_stop` returned True between two batches.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    logits, labels, indices, bad = [], [], [], []
    for b, batch in enumerate(eval_batches(source, preprocessing, batch_size, workers, pin=device.type == "cuda")):
        if should_stop():
            raise Interrupted
        out = model(preprocessing.normalize(batch.images.to(device))).cpu()
        logits.append(out[batch.valid])
        labels.append(batch.labels[batch.valid])
        indices.append(b * batch_size + torch.nonzero(batch.valid).flatten())
        bad += batch.bad
        done(b + 1)
    model.train(was_training)
    if not logits:
        raise UserError("there are no images to evaluate")
    return Outputs(torch.cat(logits), torch.cat(labels), torch.cat(indices), bad)


def score(outputs: Outputs) -> Scores:
    """Accuracies and loss. Of equal logits the lower class counts as the greater, as argmax has it.

    Raises:
        UserError: no image could be read.
    """
    n = len(outputs.labels)
    if n == 0:
        raise UserError("no validation image could be read")
    # place of the true class: how many classes beat it, ties going to the lower index; NaN beats, and is beaten
    own = outputs.logits.gather(1, outputs.labels[:, None])
    earlier = torch.arange(outputs.logits.shape[1]) < outputs.labels[:, None]
    rank = (~(outputs.logits <= own) | ((outputs.logits == own) & earlier)).sum(1)
    loss = F.cross_entropy(outputs.logits.double(), outputs.labels, reduction="sum")
    return Scores(int((rank < 1).sum()) / n, int((rank < 5).sum()) / n, loss.item() / n, n)

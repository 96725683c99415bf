"""Evaluation: every image once, in batches of one shape, sums in float64 in the order of the samples.

Logits of an image differ in the last bits between batch sizes, and not between places in the batch. So evaluation and
prediction, which share `infer`, always run the batch size stored with the weights and agree to the last bit. Several
processes deal the same batches out among them, so that they find what one finds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn

from normfree.config import IMAGENET_MEAN, IMAGENET_STD, UserError
from normfree.data.crop import Preprocessing
from normfree.data.loader import Batch, Loading, eval_batches
from normfree.data.sources import Source
from normfree.distributed import Group
from normfree.models import model_config
from normfree.nn.loss import sample_losses


@dataclass(frozen=True)
class Scores:
    """top1 and top5 are fractions of 1, loss is the mean cross-entropy in nats, images how many were counted.

    average_precision: for images with several labels, its mean over the classes that occur; None otherwise.
    """

    top1: float
    top5: float
    loss: float
    images: int
    average_precision: float | None = None

    @property
    def value(self) -> float:
        """What weights are chosen by: the average precision where there is one, otherwise top-1."""
        return self.top1 if self.average_precision is None else self.average_precision

    @property
    def measure(self) -> str:
        """What `value` is called."""
        return "top-1" if self.average_precision is None else "average precision"

    def as_dict(self) -> dict[str, float | int]:
        """As evaluate --json prints it."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Outputs:
    """Logits (N, classes), labels and indices (N,) of the images that could be read; bad, those that could not.

    labels: (N,) classes, or (N, classes) of zeros and ones.
    """

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


def infer(
    model: nn.Module,
    source: Source,
    preprocessing: Preprocessing,
    batch_size: int,
    loading: Loading | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    done: Callable[[int], None] = lambda _: None,
) -> Outputs:
    """Logits of every image of a source, in its order, float32 on the CPU; `done` is told the batches so far.

    Raises:
        Interrupted: `should_stop` returned True between two batches.
    """
    return infer_all([model], source, preprocessing, batch_size, loading, should_stop, done)[0]


@torch.inference_mode()
def infer_all(
    models: Sequence[nn.Module],
    source: Source,
    preprocessing: Preprocessing,
    batch_size: int,
    loading: Loading | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    done: Callable[[int], None] = lambda _: None,
    group: Group | None = None,
) -> list[Outputs]:
    """As `infer`, of several models on one device, with each image read once.

    With a group its processes share the work and stop together. Rank 0 has the outputs of all; the others have none.
    """
    if len(source) == 0:
        raise UserError("there are no images to evaluate")
    group = Group.alone() if group is None else group
    device = next(models[0].parameters()).device
    modes = [model.training for model in models]
    logits: list[list[Tensor]] = [[] for _ in models]
    labels: list[Tensor] = []
    indices: list[Tensor] = []
    bad: list[tuple[int, str]] = []
    for model in models:
        model.eval()
    for number, batch in enumerate(_dealt(source, preprocessing, batch_size, loading, group)):
        if group.agree(should_stop()):
            raise Interrupted
        if batch is not None:
            own, at = batch
            images = preprocessing.normalize(own.images.to(device))
            for model, found in zip(models, logits, strict=True):
                found.append(model(images).cpu()[own.valid])
            labels.append(own.labels[own.valid])
            indices.append(at * batch_size + torch.nonzero(own.valid).flatten())
            bad += [(at * batch_size + index % batch_size, reason) for index, reason in own.bad]
        done(number + 1)
    for model, mode in zip(models, modes, strict=True):
        model.train(mode)
    return _collected(group, [indices, labels, *logits], bad)


def _dealt(
    source: Source, preprocessing: Preprocessing, batch_size: int, loading: Loading | None, group: Group
) -> Iterator[tuple[Batch, int] | None]:
    """The batches of a process with their numbers, b % world == rank. None where others have one more."""
    batches = math.ceil(len(source) / batch_size)
    own = range(group.rank, batches, group.world)
    if group.world > 1 and own:
        ends = (np.arange(b * batch_size, min((b + 1) * batch_size, len(source))) for b in own)
        source = source.subset(np.concatenate(list(ends)))
    if own:
        yield from zip(eval_batches(source, preprocessing, batch_size, loading), own, strict=True)
    yield from (None for _ in range(len(own), math.ceil(batches / group.world)))


def _collected(group: Group, columns: list[list[Tensor]], bad: list[tuple[int, str]]) -> list[Outputs]:
    """The outputs of all processes in the order of the samples, on rank 0; columns are indices, labels, logits.."""
    if group.world > 1:
        shapes = group.broadcast([[str(c[0].dtype).removeprefix("torch."), list(c[0].shape[1:])] for c in columns if c])
        rows = [_joined(c, getattr(torch, kind), shape) for c, (kind, shape) in zip(columns, shapes, strict=True)]
        most = group.agree(len(rows[0]))
        gathered = [group.rows(column, most) for column in rows]
        bad = sorted((index, reason) for part in group.gather(bad) for index, reason in part)
        columns = [[] if parts is None else parts for parts in gathered]
        if not group.first:
            return []
    indices, labels, *logits = (torch.cat(column) for column in columns)
    order = torch.argsort(indices)
    return [Outputs(found[order], labels[order], indices[order], bad) for found in logits]


def _joined(parts: list[Tensor], kind: torch.dtype, shape: list[int]) -> Tensor:
    """The rows of a process, which may have none."""
    return torch.cat([torch.zeros(0, *shape, dtype=kind), *parts])


def score(outputs: Outputs, loss: str = "softmax") -> Scores:
    """Accuracies and loss. Of equal logits the lower class counts as the greater, as argmax has it.

    Where an image has several labels, the best placed of them counts.

    Args:
        outputs: of `infer`.
        loss: "softmax", or "sigmoid": the sum of the binary cross-entropies of all classes.

    Raises:
        UserError: no image could be read.
    """
    n = len(outputs.labels)
    if n == 0:
        raise UserError("no validation image could be read")
    rank = _places(outputs.logits, outputs.labels)
    if outputs.labels.ndim == 2:  # an image without labels is never right
        rank = torch.where((outputs.labels > 0).any(1), rank, 5)
    total = sample_losses(outputs.logits.double(), outputs.labels, loss).sum().item()
    precision = average_precision(outputs.logits, outputs.labels) if outputs.labels.ndim == 2 else None
    return Scores(int((rank < 1).sum()) / n, int((rank < 5).sum()) / n, total / n, n, precision)


def _places(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes beat the true one, (N,): ties go to the lower index; NaN beats, and is beaten."""
    if labels.ndim == 2:  # the best placed of the true classes is the one with the greatest logit
        labels = torch.where(labels > 0, logits, -torch.inf).argmax(1)
    own = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1]) < labels[:, None]
    return (~(logits <= own) | ((logits == own) & earlier)).sum(1)


def average_precision(logits: Tensor, labels: Tensor) -> float | None:
    """Mean over the classes with a positive of the mean precision at each of its positives, by falling logit.

    None where there is no positive at all.

    Args:
        logits: (N, classes).
        labels: (N, classes), zeros and ones. Of equal logits the earlier image is ranked first.
    """
    order = logits.sort(dim=0, descending=True, stable=True).indices
    positive = labels.gather(0, order).double()
    precision = positive.cumsum(0) / torch.arange(1, len(labels) + 1, dtype=torch.float64)[:, None]
    count = positive.sum(0)
    by_class = ((precision * positive).sum(0) / count)[count > 0]
    return float(by_class.mean()) if len(by_class) else None

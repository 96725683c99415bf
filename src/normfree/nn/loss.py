"""The training loss: softmax or sigmoid cross-entropy, for hard, soft and multi-label targets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from normfree.nn.layers import at_least_float32

LOSSES = ("softmax", "sigmoid")


def sample_losses(
    logits: Tensor, targets: Tensor, kind: str = "softmax", smoothing: float = 0.0, weights: Tensor | None = None
) -> Tensor:
    """The loss of each sample, float32 or float64: (N, classes), targets -> (N,).

    Args:
        logits: (N, classes).
        targets: (N,) class indices; or (N, classes) floats: shares that sum to 1, as mixing makes them, or for the
            sigmoid any number of ones, as in multi-label data.
        kind: "softmax", cross-entropy against the shares; "sigmoid", the sum of the binary cross-entropies.
        smoothing: s takes a target t to (1 - s) t + s / classes, after mixing (A.1); with the sigmoid to
            (1 - s) t + s / 2.
        weights: (classes,) factors of the terms of each class; scale them to mean 1 to keep the learning rate.
    """
    logits = at_least_float32(logits)
    t = (F.one_hot(targets, logits.shape[1]) if targets.ndim == 1 else targets).to(logits.dtype)
    if kind == "softmax":
        if smoothing:
            t = (1.0 - smoothing) * t + smoothing / logits.shape[1]
        terms = -t * F.log_softmax(logits, 1)
    else:
        if smoothing:
            t = (1.0 - smoothing) * t + smoothing / 2
        terms = F.binary_cross_entropy_with_logits(logits, t, reduction="none")
    return (terms if weights is None else terms * weights).sum(1)


def probabilities(logits: Tensor, kind: str = "softmax") -> Tensor:
    """What the loss takes logits for, in float64: (.., classes) -> the same shape; with the sigmoid not of sum 1."""
    return logits.double().softmax(-1) if kind == "softmax" else logits.double().sigmoid()


def balanced_weights(labels: Tensor, classes: int) -> Tensor:
    """Weights by which every class counts alike, 1 on average over the labels: (N,) or (N, classes) -> (classes,).

    A class without samples has weight 1.
    """
    counts = (labels.sum(0) if labels.ndim == 2 else torch.bincount(labels, minlength=classes)).float()
    weights = counts.sum() / (int((counts > 0).sum()) * counts.clamp_min(1.0))
    return torch.where(counts > 0, weights, torch.ones_like(weights))


def hits(logits: Tensor, targets: Tensor) -> Tensor:
    """How many predictions are the class of the target, of its greatest share, or one of its labels; a scalar."""
    predicted = logits.argmax(1)
    if targets.ndim == 1:
        return (predicted == targets).sum()
    return (targets.gather(1, predicted[:, None])[:, 0] == targets.amax(1).clamp_min(1e-9)).sum()

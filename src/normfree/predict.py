"""Prediction: labels and probabilities of image files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from normfree.config import UserError
from normfree.data.crop import Preprocessing
from normfree.data.decode import EXTENSIONS
from normfree.data.sources import FolderSource, Names, files_below, is_image_name
from normfree.evaluate import infer
from normfree.nn.loss import probabilities


def find_images(paths: Sequence[str]) -> list[str]:
    """The files among the paths, and the images below the folders among them, in order; hidden ones are left out.

    Raises:
        UserError: a path is missing, or a folder has no images.
    """
    found: list[str] = []
    for path in paths:
        if os.path.isfile(path):
            found.append(path)
        elif os.path.isdir(path):
            below = [f for f in files_below(Path(path)) if is_image_name(f)]
            if not below:
                raise UserError(f"{path} has no images ({', '.join(EXTENSIONS)})")
            found += below
        else:
            raise UserError(f"{path} is missing")
    return found


def image_files(paths: list[str], classes: Sequence[str]) -> FolderSource:
    """Files as a source of images, without labels."""
    return FolderSource(Path(), Names(paths), np.zeros(len(paths), np.int64), tuple(classes))


def predict(
    model: nn.Module,
    paths: list[str],
    classes: Sequence[str],
    preprocessing: Preprocessing,
    batch_size: int,
    loss: str = "softmax",
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Predictions of files, and (path, reason) of those that could not be read.

    Returns:
        [{"path":, "label":, "probability":, "top5": [{"label":, "probability":}, ...]}, ...] in the order of the paths;
        probabilities are fractions of 1; those of weights trained with the loss "sigmoid" are each class's own.
    """
    outputs = infer(model, image_files(paths, classes), preprocessing, batch_size)
    found = zip(outputs.indices.tolist(), outputs.logits, strict=True)
    rows = [_row(paths[i], logits, probabilities(logits, loss), classes) for i, logits in found]
    return rows, [(paths[i], reason) for i, reason in outputs.bad]


def _row(path: str, logits: Tensor, shares: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    # a stable sort of the logits: of equals the lower class first, as evaluation counts it
    order = logits.sort(descending=True, stable=True).indices[:5].tolist()
    top = [{"label": classes[i], "probability": shares[i].item()} for i in order]
    return {"path": path, **top[0], "top5": top}

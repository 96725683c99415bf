"""Batches of images: the endless training stream, and evaluation in batches of one shape.

Workers only read, decode and crop. What they deliver depends on the position in the stream and nothing else.
"""

from __future__ import annotations

import math
import multiprocessing
import signal
from collections.abc import Iterator
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from normfree import random
from normfree.data.crop import DRAWS, Preprocessing, TrainCrop
from normfree.data.decode import BadImage
from normfree.data.order import samples_at
from normfree.data.sources import Source
from normfree.random import Purpose


class Batch(NamedTuple):
    """images (N, 3, S, S) uint8, channels last in memory; float32 for an evaluation without antialiasing.

    labels (N,) int64; valid (N,) bool, False where an image of an evaluation is padding or broken; bad, the (index,
    reason) of every image that could not be read.
    """

    images: Tensor
    labels: Tensor
    valid: Tensor
    bad: list[tuple[int, str]]


class _TrainStream(Dataset["Batch | BadImage"]):
    """Item p is the crop of the sample at position p; fetched a batch at a time."""

    def __init__(self, source: Source, crop: TrainCrop, seed: int) -> None:
        self.source, self.crop, self.seed = source, crop, seed

    def __getitems__(self, positions: list[int]) -> Batch | BadImage:
        try:
            return self._batch(positions)
        except BadImage as e:
            return e

    def _batch(self, positions: list[int]) -> Batch:
        passes, indices = samples_at(np.array(positions), len(self.source), self.seed)
        draws = random.uniform(self.seed, Purpose.CROP, passes, indices, n=DRAWS)
        images = np.empty((len(positions), self.crop.size, self.crop.size, 3), np.uint8)
        bad: list[tuple[int, str]] = []
        for slot, (pass_number, index) in enumerate(zip(passes.tolist(), indices.tolist(), strict=True)):
            image, indices[slot] = self._read(pass_number, index, bad)
            images[slot] = self.crop(image, draws[slot])
        valid = np.ones(len(positions), bool)
        return _batch(images, self.source.labels[indices], valid, bad)

    def _read(self, pass_number: int, index: int, bad: list[tuple[int, str]]) -> tuple[NDArray[np.uint8], int]:
        """The image, or in place of a broken one another, drawn by (pass, index); and its index."""
        wanted, attempts = index, 0
        while True:
            try:
                return self.source.read(index), index
            except BadImage as e:
                bad.append((index, str(e)))
            if attempts == 100:
                raise BadImage(f"none of 100 images in place of {self.source.name(wanted)} could be read: {bad[-1][1]}")
            attempts += 1
            draw = random.uniform(self.seed, Purpose.REPLACE, pass_number, wanted, attempts)
            index = int(draw[0] * len(self.source))


class _EvalBatches(Dataset[Batch]):
    """Item b is the b-th batch of the source, in order, always full: the last one is padded."""

    def __init__(self, source: Source, preprocessing: Preprocessing, batch_size: int) -> None:
        self.source, self.preprocessing, self.batch_size = source, preprocessing, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.source) / self.batch_size)

    def __getitem__(self, b: int) -> Batch:
        size = self.preprocessing.size
        images = np.zeros((self.batch_size, size, size, 3), np.uint8 if self.preprocessing.antialias else np.float32)
        labels, valid = np.zeros(self.batch_size, np.int64), np.zeros(self.batch_size, bool)
        bad: list[tuple[int, str]] = []
        start = b * self.batch_size
        for slot, index in enumerate(range(start, min(start + self.batch_size, len(self.source)))):
            try:
                images[slot] = self.preprocessing(self.source.read(index))
                labels[slot], valid[slot] = self.source.labels[index], True
            except BadImage as e:
                bad.append((index, str(e)))
        return _batch(images, labels, valid, bad)


def _batch(
    images: NDArray[Any], labels: NDArray[np.int64], valid: NDArray[np.bool_], bad: list[tuple[int, str]]
) -> Batch:
    # (N, H, W, C) in memory is NCHW with channels last
    return Batch(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels), torch.from_numpy(valid), bad)


def train_batches(
    source: Source, crop: TrainCrop, seed: int, batch_size: int, steps: range, workers: int = 0, pin: bool = False
) -> Iterator[Batch]:
    """The batches of these steps; step s has positions s * batch_size and on, of the stream of `samples_at`."""
    stream, requests = _TrainStream(source, crop, seed), _Steps(steps, batch_size)
    if not workers:
        return (_batch_or_error(stream.__getitems__(positions)) for positions in requests)
    return _start(DataLoader(stream, batch_sampler=requests, **_worker_options(workers, pin)))


def eval_batches(
    source: Source, preprocessing: Preprocessing, batch_size: int, workers: int = 0, pin: bool = False
) -> Iterator[Batch]:
    """Every sample once, in order."""
    batches = _EvalBatches(source, preprocessing, batch_size)
    if not workers:
        return (batches[b] for b in range(len(batches)))
    return _start(DataLoader(batches, batch_size=None, **_worker_options(workers, pin)))


class _Steps:
    """The positions of each step, made when they are asked for."""

    def __init__(self, steps: range, batch_size: int) -> None:
        self.steps, self.batch_size = steps, batch_size

    def __iter__(self) -> Iterator[list[int]]:
        return (list(range(s * self.batch_size, (s + 1) * self.batch_size)) for s in self.steps)

    def __len__(self) -> int:
        return len(self.steps)


def _worker_options(workers: int, pin: bool) -> dict[str, Any]:
    return {
        "num_workers": workers,
        "collate_fn": _as_is,
        "pin_memory": pin,
        "worker_init_fn": _deaf,
        "generator": torch.Generator(),  # for seeds of workers, instead of torch's own
    }


def _start(loader: DataLoader[Any]) -> Iterator[Batch]:
    """The batches of a loader, whose workers end with this process even if they are in the middle of something.

    At its end Python asks children to terminate, which ours ignore, and then waits for them: so they are killed first.
    """
    before = set(multiprocessing.active_children())
    batches = iter(loader)
    pids = [child.pid for child in set(multiprocessing.active_children()) - before]
    Finalize(None, _kill, args=(pids,), exitpriority=100)
    return (_batch_or_error(batch) for batch in batches)


def _batch_or_error(batch: Batch | BadImage) -> Batch:
    # an exception that crosses from a worker by being raised would bring its traceback along as text
    if isinstance(batch, BadImage):
        raise BadImage(str(batch))  # a new one: its traceback would hold the batch, and the workers, in a circle
    return batch


def _kill(pids: list[int | None]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes a killed worker for an accident
    for child in multiprocessing.active_children():
        if child.pid in pids:
            child.kill()


def _as_is(batch: Any) -> Any:
    return batch


def _deaf(_worker: int) -> None:
    """Workers leave signals to the parent, which saves a checkpoint first and then ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

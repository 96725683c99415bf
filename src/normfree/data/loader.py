"""Batches of images: the endless training stream, and evaluation in batches of one shape.

Workers only read, decode and crop. What they deliver depends on the position in the stream and nothing else.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from normfree import random
from normfree.config import UserError
from normfree.data.crop import DRAWS, Preprocessing, TrainCrop
from normfree.data.decode import BadImage
from normfree.data.order import samples_at
from normfree.data.sources import Source
from normfree.random import Purpose


@dataclass(frozen=True)
class Loading:
    """How batches are made: nothing of it changes what they hold.

    workers: processes; 0 loads in this one.
    pin: batches come in page-locked memory, from which a CUDA device copies while it computes.
    timeout: seconds without a batch from the processes until their stacks are printed and `LoaderStalled` is raised; 0
        waits for ever.
    start: how processes begin: "fork", which shares the lists of files with them, or "spawn", where there is no fork
        or it is not safe (macOS). They touch neither CUDA nor thread pools, so that they can be forked at any time.
    """

    workers: int = 0
    pin: bool = False
    timeout: float = 0.0
    start: str = "fork" if sys.platform == "linux" else "spawn"


_PIECE = 128  # images that a process makes at once: a step of thousands is shared out, and little of it waits in memory


class LoaderStalled(UserError):
    """The loader processes delivered nothing for too long, or one of them died."""


class Batch(NamedTuple):
    """images (N, 3, S, S), channels last in memory: uint8, or floating-point in the same range where so asked for.

    labels (N,) int64, or (N, classes) float32 where an image may have several; valid (N,) bool, False where an image of
    an evaluation is padding or broken; bad, the (index, reason) of every image that could not be read.
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
        images = np.empty((len(positions), self.crop.size, self.crop.size, 3), self.crop.pixels)
        bad: list[tuple[int, str]] = []
        for slot, (pass_number, index) in enumerate(zip(passes.tolist(), indices.tolist(), strict=True)):
            images[slot], indices[slot] = self._crop(pass_number, index, draws[slot], bad)
        valid = np.ones(len(positions), bool)
        return _batch(images, self.source.labels[indices], valid, bad)

    def _crop(
        self, pass_number: int, index: int, draws: NDArray[np.float32], bad: list[tuple[int, str]]
    ) -> tuple[NDArray[Any], int]:
        """The crop of an image, or in place of a broken one another, drawn by (pass, index); and its index."""
        wanted, attempts = index, 0
        while True:
            try:
                return self.crop(self.source.content(index), draws), index
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
        labels = np.zeros((self.batch_size, *self.source.labels.shape[1:]), self.source.labels.dtype)
        valid = np.zeros(self.batch_size, bool)
        bad: list[tuple[int, str]] = []
        start = b * self.batch_size
        for slot, index in enumerate(range(start, min(start + self.batch_size, len(self.source)))):
            try:
                images[slot] = self.preprocessing(self.source.content(index))
                labels[slot], valid[slot] = self.source.labels[index], True
            except BadImage as e:
                bad.append((index, str(e)))
        return _batch(images, labels, valid, bad)


def _batch(images: NDArray[Any], labels: NDArray[Any], valid: NDArray[np.bool_], bad: list[tuple[int, str]]) -> Batch:
    # (N, H, W, C) in memory is NCHW with channels last
    several = labels.astype(np.float32) if labels.ndim == 2 else labels
    return Batch(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(several), torch.from_numpy(valid), bad)


def train_batches(
    source: Source,
    crop: TrainCrop,
    seed: int,
    batch_size: int,
    steps: range,
    loading: Loading | None = None,
    slots: range | None = None,
    device: torch.device | None = None,
) -> Iterator[Batch]:
    """The batches of these steps; step s has positions s * batch_size and on, of the stream of `samples_at`.

    Args:
        source: of the images.
        crop: of each.
        seed: of the order and the crops.
        batch_size: images read for a step, by all processes that train.
        steps: of the run; they may begin anywhere.
        loading: how; in this process if not given.
        slots: those of each step's images that this process loads; all if not given.
        device: where images and labels come out; the CPU if not given. A CUDA device copies from pinned memory on a
            stream of its own, beside the computation of the step before.
    """
    loading = Loading() if loading is None else loading
    slots = range(batch_size) if slots is None else slots
    stream = _TrainStream(source, crop, seed)
    pieces = [slots[i : i + _PIECE] for i in range(0, len(slots), _PIECE)]
    requests = _Positions(steps, batch_size, pieces)
    if loading.workers:
        found = start_loader(DataLoader(stream, batch_sampler=requests, **worker_options(loading)))
    else:
        found = (_batch_or_error(stream.__getitems__(positions)) for positions in requests)
    return _joined(found, len(pieces), torch.device("cpu") if device is None else device)


def eval_batches(
    source: Source, preprocessing: Preprocessing, batch_size: int, loading: Loading | None = None
) -> Iterator[Batch]:
    """Every sample once, in order."""
    loading = Loading() if loading is None else loading
    batches = _EvalBatches(source, preprocessing, batch_size)
    if not loading.workers:
        return (batches[b] for b in range(len(batches)))
    return start_loader(DataLoader(batches, batch_size=None, **worker_options(loading)))


def _joined(pieces: Iterator[Batch], count: int, device: torch.device) -> Iterator[Batch]:
    """Batches of so many pieces each, on a device."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    while parts := list(itertools.islice(pieces, count)):
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            images = _together([p.images.permute(0, 2, 3, 1) for p in parts], device).permute(0, 3, 1, 2)
            labels = _together([p.labels for p in parts], device)
        if stream is not None:
            computation = torch.cuda.current_stream(device)
            computation.wait_stream(stream)
            for t in (images, labels):
                t.record_stream(computation)  # their memory is not given away while a step uses it
        valid = torch.cat([p.valid for p in parts])
        yield Batch(images, labels, valid, [bad for p in parts for bad in p.bad])


def _together(parts: list[Tensor], device: torch.device) -> Tensor:
    moved = [p.to(device, non_blocking=True) for p in parts]
    return moved[0] if len(moved) == 1 else torch.cat(moved)


class _Positions:
    """The positions of each piece of each step, made when they are asked for."""

    def __init__(self, steps: range, batch_size: int, pieces: list[range]) -> None:
        self.steps, self.batch_size, self.pieces = steps, batch_size, pieces

    def __iter__(self) -> Iterator[list[int]]:
        return ([s * self.batch_size + slot for slot in piece] for s in self.steps for piece in self.pieces)

    def __len__(self) -> int:
        return len(self.steps) * len(self.pieces)


def worker_options(loading: Loading) -> dict[str, Any]:
    """Arguments of a DataLoader, for `start_loader`."""
    return {
        "num_workers": loading.workers,
        "collate_fn": _as_is,
        "pin_memory": loading.pin,
        "worker_init_fn": _deaf,
        "timeout": loading.timeout,
        "multiprocessing_context": loading.start,
        "generator": torch.Generator(),  # for seeds of workers, instead of torch's own
    }


def start_loader(loader: DataLoader[Any]) -> Iterator[Batch]:
    """The batches of a loader, whose workers end with this process even if they are in the middle of something.

    At its end Python asks children to terminate, which ours ignore, and then waits for them: so they are killed first.
    """
    before, pids = set(multiprocessing.active_children()), list[int]()
    Finalize(None, _kill, args=(pids,), exitpriority=100)
    try:
        batches = iter(loader)
    finally:  # an interrupt may come when some of them are there
        started = set(multiprocessing.active_children()) - before
        pids += [child.pid for child in started if child.pid is not None]
    return _delivered(batches, pids)


def _delivered(batches: Iterator[Any], pids: list[int]) -> Iterator[Batch]:
    while True:
        try:
            batch = next(batches, None)
        except RuntimeError as e:
            if "timed out" in str(e):
                _print_stacks(pids)
                _kill(pids)
                raise LoaderStalled(
                    "the loader delivered no batch in --data.timeout seconds; its stacks are above"
                ) from e
            if "DataLoader worker" in str(e):
                raise LoaderStalled(f"{str(e).rstrip('.')}; if memory ran out, lower --data.workers") from e
            raise
        if batch is None:
            return
        yield _batch_or_error(batch)


def _print_stacks(pids: list[int]) -> None:
    """Where each loader process is, on its standard error."""
    for pid in pids:
        with contextlib.suppress(OSError, AttributeError):  # it has gone; a system without such signals
            os.kill(pid, signal.SIGUSR2)
    time.sleep(1.0)


def _batch_or_error(batch: Batch | BadImage) -> Batch:
    # an exception that crosses from a worker by being raised would bring its traceback along as text
    if isinstance(batch, BadImage):
        raise BadImage(str(batch))  # a new one: its traceback would hold the batch, and the workers, in a circle
    return batch


def _kill(pids: list[int]) -> None:
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
    if hasattr(faulthandler, "register"):  # not on Windows
        faulthandler.register(signal.SIGUSR2, file=2)  # on standard error; USR1 is passed on to them by torchrun

"""The input of training: images a second from files to a batch, part by part, and beside timm's transform."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from normfree.bench.steps import library
from normfree.bench.timing import wait
from normfree.config import IMAGENET_MEAN, IMAGENET_STD, UserError
from normfree.data.augment import Augment
from normfree.data.crop import Preprocessing, TrainCrop
from normfree.data.loader import Batch, Loading, train_batches
from normfree.data.mix import MixUpCutMix
from normfree.data.randaugment import RandAugment
from normfree.data.sources import Source

Pipeline = Callable[[], float]  # reads for a while and returns the seconds of an image, without what starting took


@dataclass(frozen=True)
class Reading:
    """What is read: crops of `size` pixels, in `batches` of `batch` images, which end on `device`."""

    source: Source
    size: int = 192
    batch: int = 32
    batches: int = 8
    device: str = "cpu"


def photograph(seed: int) -> Image.Image:
    """500 x 375 pixels of noise with the spectrum of photographs, 1 / f, and edges: its JPEG has the size of one."""
    generator = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(375)[:, None], np.fft.rfftfreq(500)[None]
    spectrum = 1.0 / np.maximum(np.hypot(fy, fx), 1 / 500)
    planes = []
    for _ in range(3):
        phases = np.exp(2j * np.pi * generator.random(spectrum.shape))
        planes.append(np.fft.irfft2(spectrum * phases, s=(375, 500)))
    x = np.stack(planes, -1) @ np.array([[1, 1, 1], [0.3, 0, -0.3], [0.15, -0.3, 0.15]])
    x[generator.integers(300) :, generator.integers(400) :] += generator.normal(0, 1, 3) * x.std()
    x = 128 + 55 * (x - x.mean()) / x.std() + generator.normal(0, 4, x.shape)
    return Image.fromarray(x.clip(0, 255).astype(np.uint8))


def write_photographs(root: Path, count: int, quality: int = 90) -> float:
    """JPEGs in two folders, a and b; returns their mean size in bytes: about 110 kB at quality 90, as ImageNet's."""
    sizes = []
    for i in range(count):
        path = root / "ab"[i % 2] / f"{i:04d}.jpg"
        path.parent.mkdir(exist_ok=True)
        photograph(i).save(path, quality=quality)
        sizes.append(path.stat().st_size)
    return statistics.mean(sizes)


def paper_crop(size: int, antialias: bool = False) -> TrainCrop:
    """What the paper's training does to an image before it is in a batch."""
    still = Preprocessing(size, "squash", round(size / 7), IMAGENET_MEAN, IMAGENET_STD)
    return TrainCrop("box", size, 0.08, 0, 0.0, 0.0, True, still, antialias=antialias)


def decoding(reading: Reading) -> Pipeline:
    """Files to pixels, one after the other in this process."""
    count, source = reading.batch * reading.batches, reading.source

    def run() -> float:
        began = time.perf_counter()
        for i in range(count):
            source.read(i % len(source))
        return (time.perf_counter() - began) / count

    return run


def loading(reading: Reading, workers: int, augmented: bool = False) -> Pipeline:
    """Files to batches on the device: decoded and cropped, in this process or by loader processes.

    Augmented batches went through MixUp, CutMix and 4 layers of RandAugment there. For each of their images two are
    read, as in the paper; the seconds are those of an image that comes out.
    """
    device, crop = torch.device(reading.device), paper_crop(reading.size)
    augment = Augment(MixUpCutMix() if augmented else None, RandAugment(4, 10) if augmented else None)
    how = Loading(workers, pin=device.type == "cuda")
    counted = -(-reading.batches // max(1, workers)) * max(1, workers)  # the same for each process
    read = reading.batch * augment.reads

    def run() -> float:
        steps = range(workers + counted)
        batches = train_batches(reading.source, crop, 0, read, steps, how, device=device)
        ready = (_augmented(batch, augment, step) for step, batch in enumerate(batches))
        return seconds_apiece(ready, workers, counted, device) / reading.batch

    return run


def seconds_apiece(batches: Iterator[Any], skipped: int, counted: int, device: torch.device) -> float:
    """Seconds of each of the counted batches. The first ones are not counted: while processes start and make one each.

    As many are then in the making as at the end have been made ahead: none.
    """
    for _ in range(skipped):
        next(batches)
    wait(device)
    began = time.perf_counter()
    for _ in range(counted):
        next(batches)
    wait(device)
    seconds = time.perf_counter() - began
    for _ in batches:  # none: but only its end ends the processes
        pass
    return seconds / counted


def _augmented(batch: Batch, augment: Augment, step: int) -> torch.Tensor:
    return augment(batch.images, batch.labels, 1000, 0, step)[0]


def of_timm(reading: Reading, augmented: bool = False) -> Pipeline:
    """The same files through timm's transform in this process, to uint8 batches; augmented: with its `rand-m10-n4`.

    That leaves out each operation half of the time, and mixes nothing.

    Raises:
        UserError: timm is not there, or the images are not files.
    """
    timm, fast_collate = library(), import_module("timm.data.loader").fast_collate
    settings: dict[str, Any] = {"auto_augment": "rand-m10-n4"} if augmented else {"color_jitter": None}
    transform = timm.data.create_transform(
        reading.size, is_training=True, interpolation="bicubic", use_prefetcher=True, **settings
    )
    source, count = reading.source, reading.batch * reading.batches

    def item(index: int) -> tuple[Any, int]:
        content = source.content(index % len(source))
        if not isinstance(content, bytes):
            raise UserError(f"{source.place} has no files that timm could decode; --alone leaves timm out")
        return transform(Image.open(io.BytesIO(content)).convert("RGB")), 0

    def run() -> float:
        began = time.perf_counter()
        for start in range(0, count, reading.batch):
            fast_collate([item(i) for i in range(start, start + reading.batch)])
        return (time.perf_counter() - began) / count

    return run


def pipelines(reading: Reading, workers: tuple[int, ...], rivals: bool) -> dict[str, Pipeline]:
    """By name: the parts one after another, then in so many loader processes, then timm's."""
    most = max(workers, default=0)
    where = f"{most} processes" if most else "this process"
    found = {"decoding": decoding(reading), "decoding and cropping": loading(reading, 0)}
    found |= {f"the same in {_processes(n)}": loading(reading, n) for n in workers if n}
    found[f"augmented on {reading.device}, {where}"] = loading(reading, most, augmented=True)
    if rivals:
        found["timm, decoding and cropping"] = of_timm(reading)
        found["timm, and RandAugment"] = of_timm(reading, augmented=True)
    return found


def _processes(n: int) -> str:
    return f"{n} process" if n == 1 else f"{n} processes"


def take_turns(
    work: dict[str, Pipeline], rounds: int, told: Callable[[int], None] | None = None
) -> dict[str, list[float]]:
    """Seconds of an image by each pipeline, round after round; a round before the first is not counted."""
    found: dict[str, list[float]] = {name: [] for name in work}
    for r in range(-1, rounds):
        for name, run in work.items():
            seconds = run()
            if r >= 0:
                found[name].append(seconds)
        if told is not None:
            told(max(0, r + 1))
    return found

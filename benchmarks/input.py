"""Images a second on one core, side by side with timm's and torchvision's pipelines, and the memory of a long read.

Every pipeline reads the same JPEG files (500 x 375, about 110 kB, as ImageNet's are) and ends in a uint8 batch.
They take turns, round after round, pinned to one core; ratios are taken within a round. timm's RandAugment leaves out
each operation half of the time, ours never. Needs timm and torchvision beside a build of torch that they import with.
`normfree bench input` measures the parts of our own, with loader processes and on the device.

    python benchmarks/input.py --out benchmarks/results/input.json
    python benchmarks/input.py --memory --out benchmarks/results/input_memory.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from normfree.bench.input import paper_crop, write_photographs
from normfree.bench.timing import conditions, ratio, take_turns
from normfree.config import IMAGENET_MEAN, IMAGENET_STD
from normfree.data.augment import Augment
from normfree.data.crop import Preprocessing, TrainCrop
from normfree.data.loader import Loading, eval_batches, train_batches
from normfree.data.randaugment import RandAugment
from normfree.data.sources import ArraySource, open_folder

FILES, BATCH, TRAIN, EVAL = 64, 32, 192, 224
CPU = torch.device("cpu")
Pipeline = Callable[[], object]  # goes through FILES images once


def ours(root: Path) -> dict[str, Pipeline]:
    source = open_folder(root)
    paper, smooth = paper_crop(TRAIN), paper_crop(TRAIN, antialias=True)
    augment = Augment(None, RandAugment(4, 10))
    steps = range(FILES // BATCH)

    def train(crop: TrainCrop, operations: bool = False) -> None:
        for step, batch in enumerate(train_batches(source, crop, 0, BATCH, steps)):
            if operations:
                augment(batch.images, batch.labels, 2, 0, step)

    def evaluate(crop: str, antialias: bool) -> None:
        prepared = Preprocessing(EVAL, crop, 32, IMAGENET_MEAN, IMAGENET_STD, antialias)
        for _ in eval_batches(source, prepared, BATCH):
            pass

    def decoded() -> None:
        for i in range(FILES):
            source.read(i)

    return {
        "decoding alone": decoded,
        "train": lambda: train(paper),
        "train, antialiased": lambda: train(smooth),
        "train, operations elsewhere": lambda: train(paper),
        "train, operations here": lambda: train(paper, operations=True),
        "evaluation": lambda: evaluate("center", True),
        "evaluation, as published": lambda: evaluate("squash", False),
    }


def of_timm(root: Path) -> dict[str, Pipeline]:
    from timm.data import ImageDataset, create_transform
    from timm.data.loader import fast_collate

    def over(transform: Any) -> Pipeline:
        dataset = ImageDataset(str(root), transform=transform)

        def run() -> None:
            for start in range(0, FILES, BATCH):
                fast_collate([dataset[i] for i in range(start, start + BATCH)])

        return run

    common: dict[str, Any] = {"interpolation": "bicubic", "use_prefetcher": True}

    def decoded() -> None:
        for path in root.glob("*/*.jpg"):
            Image.open(path).convert("RGB")

    train = over(create_transform(TRAIN, is_training=True, color_jitter=None, **common))
    augmented = over(create_transform(TRAIN, is_training=True, auto_augment="rand-m10-n4", **common))
    evaluation = over(create_transform(EVAL, crop_pct=0.875, **common))
    return {
        "decoding alone": decoded,
        "train": train,
        "train, antialiased": train,
        "train, operations elsewhere": augmented,
        "train, operations here": augmented,
        "evaluation": evaluation,
        "evaluation, as published": evaluation,
    }


def of_torchvision(root: Path) -> dict[str, Pipeline]:
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import InterpolationMode, v2

    paths = sorted(str(p) for p in root.glob("*/*.jpg"))
    cubic = {"interpolation": InterpolationMode.BICUBIC, "antialias": True}
    crop: list[Any] = [v2.RandomResizedCrop(TRAIN, **cubic), v2.RandomHorizontalFlip()]

    def over(*transforms: Any) -> Pipeline:
        transform = v2.Compose(list(transforms))

        def run() -> None:
            for start in range(0, FILES, BATCH):
                torch.stack([transform(decode_image(p, ImageReadMode.RGB)) for p in paths[start : start + BATCH]])

        return run

    def decoded() -> None:
        for path in paths:
            decode_image(path, ImageReadMode.RGB)

    train, augmented = over(*crop), over(*crop, v2.RandAugment(4, 10))
    evaluation = over(v2.Resize(EVAL + 32, **cubic), v2.CenterCrop(EVAL))
    return {
        "decoding alone": decoded,
        "train": train,
        "train, antialiased": train,
        "train, operations elsewhere": augmented,
        "train, operations here": augmented,
        "evaluation": evaluation,
        "evaluation, as published": evaluation,
    }


def measure(rounds: int, quality: int) -> dict[str, Any]:
    """Images a second by pipeline, and ratios to the peers', of so many rounds."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        size = write_photographs(Path(scratch), FILES, quality)
        makers = {"normfree": ours, "timm": of_timm, "torchvision": of_torchvision}
        pipelines = {name: make(Path(scratch)) for name, make in makers.items()}
        rows = {}
        for case in pipelines["normfree"]:
            seconds = take_turns({n: found[case] for n, found in pipelines.items()}, rounds, CPU, warmup=1)
            rows[case] = summary(seconds)
            print(case, json.dumps(rows[case]), flush=True)
    return {"what": "images a second on one core", "mean_file_bytes": round(size), "n": rounds, "rows": rows}


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    found: dict[str, Any] = {f"{n}, images/s": round(FILES / statistics.median(t), 1) for n, t in seconds.items()}
    for name, times in seconds.items():
        if name != "normfree":
            gain = ratio(times, seconds["normfree"])
            found[f"times {name}"] = [round(gain[key], 2) for key in ("p10", "median", "p90")]
    return found


@dataclass
class Listed(ArraySource):
    """A million paths, looked at one by one, and a small image for each."""

    def content(self, index: int) -> NDArray[np.uint8]:
        assert self.name(index)
        return self.images[index % len(self.images)]


def measure_memory(paths: int, workers: int, passes: int) -> dict[str, Any]:
    """Memory of all processes, shared pages counted once, at the end of each tenth of a pass."""
    from normfree.data.sources.names import Names

    names = Names(f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(paths))
    labels = np.arange(paths) % 1000
    images = np.zeros((1, 8, 8, 3), np.uint8)
    source = Listed(images, labels, tuple(f"n{i:08d}" for i in range(1000)), names)
    still = Preprocessing(8, "pad", 0, IMAGENET_MEAN, IMAGENET_STD)
    crop = TrainCrop("shift", 8, 1.0, 0, 0.0, 0.0, True, still)
    batch, found = 1000, []
    steps = passes * paths // batch
    began = time.perf_counter()
    for step, _ in enumerate(train_batches(source, crop, 0, batch, range(steps), Loading(workers))):
        if step == 0:
            print(f"first batch after {time.perf_counter() - began:.1f} s", flush=True)
        if (step + 1) % (paths // batch // 10) == 0:
            found.append(proportional_memory())
            print(f"{(step + 1) * batch / paths:.1f} passes: {found[-1]} MB", flush=True)
    tenths = {f"pass {p + 1}": [found[p * 10], found[p * 10 + 9]] for p in range(passes)}
    return {
        "what": f"MB of {workers} loader processes and their parent over {passes} passes of {paths:,} paths",
        "first and last tenth of each pass": tenths,
        "end of the last pass to end of the first": round(found[-1] / found[9], 4),
    }


def proportional_memory() -> float:
    """MB of this process and its children."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    total = 0
    for pid in [str(os.getpid()), *children]:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return round(total / 1024, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs; 90 makes them as large as ImageNet's")
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    result = measure_memory(1_000_000, 4, 3) if args.memory else measure(args.rounds, args.quality)
    result |= {"command": " ".join(["python", *sys.argv])} | conditions(CPU)
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""normfree bench input, memory and growth: what training costs beside the step's time, and how costs grow."""

from __future__ import annotations

import contextlib
import itertools
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.table import Table

from normfree.bench import growth, input, memory  # noqa: A004 (it is the input of training)
from normfree.bench.steps import Task, library, size_of, step
from normfree.bench.timing import spread, take_turns
from normfree.cli.bench_common import Measured, Precision, hand_over, place
from normfree.config import UserError
from normfree.data.sources import Source, describe, open_data, open_folder
from normfree.runlog import Screen

Remat = Literal["none", "block", "stage"]


@dataclass
class Input(Measured):
    """Time the input of training: decoding, cropping, loader processes, augmentation on the device; and timm's."""

    rounds: int = 10  # measured, in turns
    root: Annotated[str | None, tyro.conf.Positional] = None  # images, as --data.root; generated photographs if None
    size: int = 192  # side of the crops in pixels
    batch: int = 32  # images of a batch
    images: int = 256  # of a round, about
    workers: tuple[int, ...] = (1, 2)  # loader processes, beside none
    alone: bool = False  # without timm
    model: str | None = None  # a network whose step is timed too, to say what it asks of the input
    precision: Precision = "fp32"  # of that network's maps


@dataclass
class Memory(Measured):
    """Measure the most memory of a training step, in a fresh process for each row, beside what a dry run says.

    On a CPU that is all of the process (baseline: before the network is built), on CUDA what torch's allocator gave
    out. Every combination of the options is a row.
    """

    rounds: int = 1  # processes for each row; the largest counts
    models: Annotated[tuple[str, ...], tyro.conf.Positional] = ("nfnet_f0",)
    size: tuple[int, ...] = ()  # sides of the images in pixels; the network's training size if none is given
    batch: tuple[int, ...] = (8, 32)  # images of a step
    precision: tuple[Precision, ...] = ("fp32",)  # of the maps
    remat: tuple[Remat, ...] = ("none",)  # maps computed again in backward
    micro_batch: int | None = None  # images at once


@dataclass
class Growth(Measured):
    """Check that cost grows as it should, with a straight line through each: a step's time over its images and over
    their pixels, its memory over its images, the optimizer's time over the parameters.
    """

    model: Annotated[str, tyro.conf.Positional] = "nfnet_f0"
    size: int | None = None  # side of the images where their number varies; the network's training size if not given
    batch: int = 4  # images where their size varies
    batches: tuple[int, ...] = (2, 4, 8, 16)
    sizes: tuple[int, ...] = (96, 128, 160, 192)  # pixels
    optimizers: tuple[str, ...] = ("nfnet_tiny", "nfnet_small", "nf_resnet50", "nfnet_f0", "nfnet_f1")
    precision: Precision = "fp32"  # of the maps
    png: Path | None = None  # a picture of the lines


def run_input(args: Input, command: str) -> int:
    """Images a second by pipeline."""
    where = place(args)
    if args.images < args.batch or args.batch < 1 or any(n < 0 for n in args.workers):
        raise UserError("--images must be at least --batch, --batch at least 1, and --workers not negative")
    with _source(args.root) as (source, about):
        reading = input.Reading(source, args.size, args.batch, args.images // args.batch, str(where))
        work = input.pipelines(reading, args.workers, not args.alone and _is_there())
        with Screen(sys.stderr).progress(args.rounds, 0) as line:
            seconds = input.take_turns(work, args.rounds, line.advance)
    rows: list[dict[str, Any]] = [_speed(name, found) for name, found in seconds.items()]
    if args.model is not None:
        task = Task(args.model, args.size, args.batch, args.precision, str(where))
        step_times = take_turns({"": step(task)}, min(args.rounds, 5), where)[""]
        rows.append(_speed(f"a step of {args.model} takes", [s / args.batch for s in step_times]))
    table = Table("", "images/s", "p10", "p90", box=None, header_style="dim")
    for row in rows:
        numbers = [row["images_per_second"][key] for key in ("median", "p10", "p90")]
        table.add_row(row["name"], *(f"{n:.1f}" for n in numbers))
    return hand_over(args, command, where, {"images": about, "rows": rows}, table)


def _speed(name: str, seconds: list[float]) -> dict[str, Any]:
    return {"name": name, "images_per_second": spread([1 / s for s in seconds])}


@contextlib.contextmanager
def _source(root: str | None) -> Iterator[tuple[Source, str]]:
    """The training images at a path, or made ones; and what they are."""
    if root is not None:
        source = open_data(root, 0.2)[0]
        yield source, describe(source)
        return
    with tempfile.TemporaryDirectory() as scratch:
        size = input.write_photographs(Path(scratch), 64)
        yield open_folder(Path(scratch)), f"64 generated photographs, 500 x 375, {size / 1000:.0f} kB each"


def _is_there() -> bool:
    try:
        library()
    except UserError:
        return False
    return True


def run_memory(args: Memory, command: str) -> int:
    """Peak memory by network, size, batch, precision and remat."""
    where = place(args)
    combinations = itertools.product(args.models, args.size or (None,), args.batch, args.precision, args.remat)
    tasks = [
        Task(m, s or size_of(m), b, p, str(where), micro_batch=args.micro_batch, remat=r)
        for m, s, b, p, r in combinations
    ]
    rows = []
    with Screen(sys.stderr).progress(len(tasks), 0) as line:
        for i, task in enumerate(tasks):
            rows.append(memory_row(task, args.rounds))
            line.advance(i + 1)
    return hand_over(args, command, where, {"rows": rows}, _memory_table(rows))


def memory_row(task: Task, rounds: int = 1) -> dict[str, Any]:
    """Bytes: measured, before the network, and estimated (of ours); what was measured above that, to the estimate."""
    found = [memory.in_fresh_process(task) for _ in range(rounds)]
    most = None if None in found else max((peak for peak in found if peak), key=lambda peak: peak.peak)
    row = {key: getattr(task, key) for key in ("model", "size", "batch", "micro_batch", "precision", "remat")}
    row["estimate"] = memory.estimate(task)
    if most is None:
        return row | {"baseline": None, "peak": None, "to_estimate": None}
    share = (most.peak - most.baseline) / row["estimate"] if row["estimate"] else None
    return row | {"baseline": most.baseline, "peak": most.peak, "to_estimate": share}


def _memory_table(rows: list[dict[str, Any]]) -> Table:
    columns = ("", "px", "batch", "maps", "remat", "peak MiB", "baseline", "estimate", "to estimate")
    table = Table(*columns, box=None, header_style="dim")
    for row in rows:
        batch = f"{row['batch']}" if row["micro_batch"] is None else f"{row['batch']} by {row['micro_batch']}"
        numbers = [f"{row[key] / 2**20:.0f}" if row[key] else "does not fit" for key in ("peak", "baseline")]
        share = f"{row['to_estimate']:.2f}" if row["to_estimate"] else ""
        estimate = f"{row['estimate'] / 2**20:.0f}" if row["estimate"] else ""
        table.add_row(row["model"], str(row["size"]), batch, row["precision"], row["remat"], *numbers, estimate, share)
    return table


def run_growth(args: Growth, command: str) -> int:
    """Lines through times and memory."""
    where, size = place(args), args.size or size_of(args.model)
    task = Task(args.model, size, args.batch, args.precision, str(where))
    with Screen(sys.stderr).progress(4, 0) as line:
        found = [growth.step_by_images(task, args.batches, args.rounds)]
        line.advance(1)
        found.append(growth.step_by_pixels(task, args.sizes, args.rounds))
        line.advance(2)
        found.append(growth.memory_by_images(task, args.batches))
        line.advance(3)
        found.append(growth.optimizer_by_parameters(args.optimizers, str(where), args.rounds))
    if args.png is not None:
        growth.draw(found, args.png)
    return hand_over(args, command, where, {"rows": [g.record() for g in found]}, _growth_table(found))


def _growth_table(found: list[growth.Growth]) -> Table:
    table = Table("", "at 0", "for each", "", "R²", "farthest", box=None, header_style="dim")
    for g in found:
        line, unit = g.line, g.y_unit
        scale, unit = (2**-20, "MiB") if unit == "bytes" else (1e3, "ms")
        numbers = [f"{line.intercept * scale:.1f} {unit}", f"{line.slope * scale:.4g} {unit}"]
        table.add_row(g.what, *numbers, g.x_unit, f"{line.r2:.4f}", f"{100 * line.worst:.1f} %")
    return table

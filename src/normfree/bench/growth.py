"""How costs grow: times and memory over sizes, and the straight lines through them."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from normfree.bench import memory, optimizer
from normfree.bench.steps import Task, step
from normfree.bench.timing import take_turns
from normfree.config import UserError
from normfree.models import model_config
from normfree.models.count import parameters


class Line(NamedTuple):
    """y = intercept + slope x by least squares; r2, the share of the variance of y that it explains.

    worst: the largest distance of a point from it, relative to the point's y.
    """

    intercept: float
    slope: float
    r2: float
    worst: float


@dataclass(frozen=True)
class Growth:
    """Points and the line through them. what, x_unit and y_unit are words for people."""

    what: str
    x_unit: str
    y_unit: str
    x: tuple[float, ...]
    y: tuple[float, ...]

    @property
    def line(self) -> Line:
        """Through the points."""
        return fit(self.x, self.y)

    def record(self) -> dict[str, Any]:
        """For a file."""
        about = {"what": self.what, "x_unit": self.x_unit, "y_unit": self.y_unit}
        return {**about, "x": list(self.x), "y": list(self.y), "line": self.line._asdict()}


def fit(x: Sequence[float], y: Sequence[float]) -> Line:
    """The line of least squares.

    Raises:
        UserError: fewer than three different x: any two points are on a line.
    """
    if len(set(x)) < 3:
        raise UserError(f"a line through {len(set(x))} points says nothing: give at least three")
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    around = a - a.mean()
    slope = float((around * b).sum() / (around**2).sum())
    intercept = float(b.mean()) - slope * float(a.mean())
    off = b - intercept - slope * a
    spread = float(((b - b.mean()) ** 2).sum())
    r2 = 1.0 - float((off**2).sum()) / spread if spread > 0 else 1.0
    return Line(intercept, slope, r2, float(np.max(np.abs(off / b))))


def step_by_images(task: Task, batches: Sequence[int], rounds: int) -> Growth:
    """Seconds of a training step over the images in it."""
    seconds = _medians([replace(task, batch=n) for n in batches], rounds)
    return Growth(f"a step of {task.model}, {task.size} px", "images", "s", tuple(map(float, batches)), seconds)


def step_by_pixels(task: Task, sizes: Sequence[int], rounds: int) -> Growth:
    """Seconds of a training step over the pixels of an image."""
    seconds = _medians([replace(task, size=s) for s in sizes], rounds)
    pixels = tuple(float(s * s) for s in sizes)
    return Growth(f"a step of {task.model}, {task.batch} images", "pixels an image", "s", pixels, seconds)


def memory_by_images(task: Task, batches: Sequence[int]) -> Growth:
    """Bytes that a step has at most, beyond those of an idle process, over the images in it.

    Raises:
        UserError: it did not fit.
    """
    found = [memory.in_fresh_process(replace(task, batch=n)) for n in batches]
    if None in found:
        raise UserError(f"{batches[found.index(None)]} images do not fit into memory; give fewer with --batches")
    most = tuple(float(p.peak - p.baseline) for p in found if p is not None)
    what = f"memory of a step of {task.model}, {task.size} px"
    return Growth(what, "images", "bytes", tuple(map(float, batches)), most)


def optimizer_by_parameters(models: Sequence[str], device: str, rounds: int) -> Growth:
    """Seconds of clipping, update and average over the numbers in a network."""
    work = {name: optimizer.ours(name, device) for name in models}
    seconds = take_turns(work, rounds, torch.device(device))
    counts = tuple(float(parameters(model_config(name))) for name in models)
    medians = tuple(statistics.median(found) for found in seconds.values())
    return Growth("clipping, update and average", "parameters", "s", counts, medians)


def _medians(tasks: Sequence[Task], rounds: int) -> tuple[float, ...]:
    """Of each task's steps; one network is in memory at a time.

    They are gone through twice, there and back: a machine that slows down bends no line.
    """
    seconds: list[list[float]] = [[] for _ in tasks]
    for order in (range(len(tasks)), range(len(tasks) - 1, -1, -1)):
        for i in order:
            where = torch.device(tasks[i].device)
            seconds[i] += take_turns({"": step(tasks[i])}, -(-rounds // 2), where)[""]
            gc.collect()
    return tuple(statistics.median(found) for found in seconds)


_SCALES = {"s": (1e3, "ms"), "bytes": (2**-20, "MiB"), "parameters": (1e-6, "million parameters")}


def draw(found: Sequence[Growth], path: Path) -> None:
    """A picture of each, side by side: the points, and the line with its slope."""
    from matplotlib.figure import Figure  # noqa: PLC0415 (only where something is drawn)

    columns = min(2, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.7 * rows), layout="constrained")
    for i, growth in enumerate(found):
        axes = figure.add_subplot(rows, columns, i + 1)
        scale, unit = _SCALES[growth.y_unit]
        across, below = _SCALES.get(growth.x_unit, (1.0, growth.x_unit))
        line, ends = growth.line, np.array([0.0, max(growth.x) * 1.05])
        axes.plot(ends * across, (line.intercept + line.slope * ends) * scale, color="0.6", lw=1.5, zorder=1)
        axes.scatter(np.array(growth.x) * across, np.array(growth.y) * scale, s=30, color="tab:blue", zorder=2)
        axes.set_title(growth.what, fontsize=10, loc="left")
        axes.set(xlabel=below, ylabel=unit, xlim=(0, ends[1] * across))
        axes.set_ylim(bottom=min(0.0, line.intercept * scale))
        note = f"R² {line.r2:.4f}, farthest point {100 * line.worst:.1f} %"
        axes.annotate(note, (0.03, 0.95), xycoords="axes fraction", va="top", fontsize=8, color="0.35")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)

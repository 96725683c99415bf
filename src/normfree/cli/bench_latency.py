"""normfree bench latency: a whole training step of any networks, side by side."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.table import Table

from normfree.bench import steps
from normfree.bench.latency import apart, rows, together
from normfree.bench.peak import measure_peak
from normfree.cli.bench_common import Measured, Precision, hand_over, place
from normfree.cli.common import among_processes
from normfree.config import UserError
from normfree.distributed import Group
from normfree.runlog import Screen


@dataclass
class Steps(Measured):
    """How training steps are measured."""

    rounds: Annotated[int, tyro.conf.arg(aliases=["--steps"])] = 20  # steps that count; 5,000 in the paper
    warmup: int | None = None  # steps before them that do not; 5 if compiled, otherwise 2
    precision: Precision = "fp32"  # of the maps
    compiled: bool = False  # torch.compile: of ours as --train.compile does, of timm's the network
    fused: bool = False  # torch's fused SGD for timm's networks, instead of SGD as it comes
    micro_batch: int | None = None  # images at once, whose gradients add up; as many as fit if not given
    remat: Literal["none", "block", "stage"] = "none"  # compute maps again in backward, to save memory


@dataclass
class Latency(Steps):
    """Time a whole training step (A.2): forward, loss, backward, AGC, update and average, images on the device.

    Ratios are to the first network named, round by round. Under torchrun each process has a batch of its own, and the
    sum of gradients is in the time.
    """

    # ours, or NAME+sam, or timm:NAME; +compiled behind one compiles it alone
    models: Annotated[tuple[str, ...], tyro.conf.Positional] = ("nfnet_f0",)
    size: int | None = None  # side of the images in pixels; the first network's training size if not given
    own_sizes: bool = False  # each network at the size it is trained on
    batch: int = 32  # images of a step
    apart: bool = False  # one network in memory at a time, all of them twice, instead of turns step by step


def latency(args: Latency, command: str) -> int:
    """Measure the networks and hand the numbers over."""
    return among_processes(lambda group: _latency(args, command, group))


def _latency(args: Latency, command: str, group: Group) -> int:
    where = place(args, group)
    if args.size is not None and args.own_sizes:
        raise UserError("--size is for all networks and --own-sizes for each its own: leave one out")
    own = {name: steps.size_of(name.removesuffix(steps.COMPILED)) for name in args.models if args.own_sizes}
    size = steps.size_of(args.models[0].removesuffix(steps.COMPILED)) if args.size is None else args.size
    sizes = {name: own.get(name, size) for name in args.models}
    result = measure(args, sizes, args.batch, where, args.apart, group)
    return hand_over(args, command, where, result, table(result["rows"])) if group.first else 0


def measure(
    args: Steps, sizes: dict[str, int], batch: int, where: torch.device, alone: bool, group: Group
) -> dict[str, Any]:
    """Rows of the networks, each at its size in pixels, and how they were measured."""
    if min(batch, 1 if args.micro_batch is None else args.micro_batch, *sizes.values()) < 1:
        raise UserError("--size, --batch and --micro-batch must be positive")
    if args.warmup is not None and args.warmup < 0:
        raise UserError("--warmup must not be negative")
    settings = {name: getattr(args, name) for name in ("precision", "fused", "micro_batch", "remat")}
    tasks = [
        steps.Task(
            name.removesuffix(steps.COMPILED),
            size,
            batch,
            device=str(where),
            compiled=args.compiled or name.endswith(steps.COMPILED),
            **settings,
        )
        for name, size in sizes.items()
    ]
    if len({task.name for task in tasks}) < len(tasks):
        raise UserError("+compiled behind a name says nothing beside --compiled")
    warmup = (5 if any(task.compiled for task in tasks) else 2) if args.warmup is None else args.warmup
    peak = measure_peak(where, args.precision)
    measured = apart if alone else together
    if group.first:
        with Screen(sys.stderr).progress(args.rounds, 0) as line:
            found = measured(tasks, args.rounds, warmup, line.advance, group)
    else:
        found = measured(tasks, args.rounds, warmup, None, group)
    how = settings | {
        "compiled": args.compiled,
        "batch": batch,
        "processes": group.world,
        "warmup": warmup,
        "apart": alone,
    }
    return how | {"peak_multiply_adds_per_second": peak, "rows": rows(found, peak)}


def table(found: list[dict[str, Any]]) -> Table:
    """The rows for a screen."""
    heads = ("", "px", "ms", "p10", "p90", "to the first", "images/s", "memory", "G multiply-adds", "of the peak", "")
    shown = Table(*heads, box=None, header_style="dim")
    for row in found:
        shown.add_row(row["name"], str(row["size"]), *cells(row))
    return shown


def cells(row: dict[str, Any]) -> list[str]:
    """Times, ratio, speed, memory, work, share of the peak and remarks of a row, as text."""
    if "failure" in row:
        return ["-"] * 8 + [row["failure"]]
    times = [f"{1000 * row['seconds'][key]:.1f}" for key in ("median", "p10", "p90")]
    memory = "n/a" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**30:.2f} GiB"
    remarks = [row["fitted"]] if row["fitted"] else []
    remarks += [] if row["finite"] else ["its weights are no longer finite"]
    return [
        *times,
        f"{row['to_first']['median']:.3f}",
        f"{row['images_per_second']:.1f}",
        memory,
        f"{row['multiply_adds'] / 1e9:.1f}",
        f"{100 * row['share_of_peak']:.1f} %",
        ", ".join(remarks),
    ]

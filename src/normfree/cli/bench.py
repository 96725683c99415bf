"""normfree bench: which benchmark, and the short ones: optimizer, inference, startup."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from rich.table import Table

from normfree.bench import inference, optimizer, startup, steps
from normfree.bench.timing import ratio, spread
from normfree.cli import bench_costs, bench_latency, bench_table3
from normfree.cli.bench_common import Measured, hand_over, place, turns
from normfree.cli.common import parse, warn
from normfree.config import UserError, suggestion
from normfree.models import model_config
from normfree.models.count import multiply_adds
from normfree.models.inference import TYPES


@dataclass
class _Optimizer(Measured):
    """Time clipping, update and average alone; with timm beside us, timm's AGC and average and torch's SGD."""

    model: Annotated[str, tyro.conf.Positional] = "nfnet_f0"
    alone: bool = False  # without timm


@dataclass
class _Inference(Measured):
    """Time a forward pass: ours as it is and made ready for inference, timm's as it comes."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional] = ("nfnet_f0",)  # ours, or timm:NAME
    size: int | None = None  # the first network's test size if not given
    batch: int = 8  # images of a pass
    ways: tuple[str, ...] = (
        "fp32",
    )  # fp32, bf16, fp16 or int8 (timm's have none), as bf16+compiled with torch.compile


@dataclass
class _Startup(Measured):
    """Time imports and the command line's help, each in a process of its own."""


def run(arguments: Sequence[str]) -> int:
    """Measure what the first argument says."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: normfree bench {' | '.join(_ACTIONS)}    each with --help")
        return 0
    action, rest = arguments[0], arguments[1:]
    if action not in _ACTIONS:
        warn(f"unknown action {action!r}{suggestion(action, _ACTIONS) or '; choose from ' + ', '.join(_ACTIONS)}")
        return 2
    kind, measure = _ACTIONS[action]
    return measure(parse(kind, f"bench {action}", rest), " ".join(["normfree bench", *arguments]))


def _optimizer(args: _Optimizer, command: str) -> int:
    where = place(args)
    seconds = turns(optimizer.works(args.model, str(where), not args.alone), args.rounds, where)
    return _hand_over(args, command, seconds)


def _startup(args: _Startup, command: str) -> int:
    return _hand_over(args, command, turns(startup.works(), args.rounds, place(args)))


def _inference(args: _Inference, command: str) -> int:
    where, size = place(args), steps.size_of(args.models[0], "test") if args.size is None else args.size
    if min(size, args.batch) < 1:
        raise UserError("--size and --batch must be positive")
    works = {}
    for name, way in itertools.product(args.models, args.ways):
        precision, _, compiled = way.partition("+")
        if precision not in TYPES or compiled not in ("", "compiled"):
            raise UserError(f"--ways are {', '.join(TYPES)}, or with +compiled behind, not {way!r}")
        task = steps.Task(name, size, args.batch, precision, str(where), compiled=bool(compiled))
        if name.startswith(steps.TIMM):
            if precision != "int8":
                works[f"{name}, {way}"] = inference.forward(task)
            continue
        works[f"{name}, ready, {way}"] = inference.forward(task)
        if precision != "int8" and not compiled:
            works[f"{name}, {way}"] = inference.forward(task, ready=False)
    if not works:
        raise UserError("there is nothing to measure: name --ways; of timm's networks int8 is none")
    return _hand_over(args, command, turns(works, args.rounds, where), size)


def _hand_over(args: Any, command: str, seconds: dict[str, list[float]], size: int | None = None) -> int:
    first = next(iter(seconds.values()))
    rows = [
        {"name": name, "seconds": spread(found), "to_first": ratio(found, first)} | _per_image(args, name, found, size)
        for name, found in seconds.items()
    ]
    return hand_over(args, command, place(args), {"rows": rows}, _table(rows))


def _per_image(args: Any, name: str, seconds: list[float], size: int | None) -> dict[str, float]:
    """Images a second, and of ours multiply-adds a second, where there are images."""
    if size is None:
        return {}
    per_second = args.batch / spread(seconds)["median"]
    found = {"images_per_second": per_second}
    if not name.startswith(steps.TIMM):
        work = multiply_adds(model_config(name.partition(",")[0]), size)
        found["multiply_adds_per_second"] = per_second * work
    return found


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("", "ms", "p10", "p90", "to the first", "images/s", box=None, header_style="dim")
    for row in rows:
        times = [f"{1000 * row['seconds'][key]:.1f}" for key in ("median", "p10", "p90")]
        speed = f"{row['images_per_second']:.1f}" if "images_per_second" in row else ""
        table.add_row(row["name"], *times, f"{row['to_first']['median']:.3f}", speed)
    return table


# what it takes, and what measures it: given the options and the command as typed, it returns the exit code
_ACTIONS: dict[str, tuple[type, Callable[[Any, str], int]]] = {
    "latency": (bench_latency.Latency, bench_latency.latency),
    "table3": (bench_table3.Table3, bench_table3.table3),
    "optimizer": (_Optimizer, _optimizer),
    "inference": (_Inference, _inference),
    "startup": (_Startup, _startup),
    "input": (bench_costs.Input, bench_costs.run_input),
    "memory": (bench_costs.Memory, bench_costs.run_memory),
    "growth": (bench_costs.Growth, bench_costs.run_growth),
}

"""normfree bench latency|optimizer|inference|startup."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.table import Table

from normfree.bench import inference, optimizer, startup, steps
from normfree.bench.timing import Work, conditions, ratio, spread, take_turns
from normfree.cli.common import check_device, parse, show, warn
from normfree.config import UserError, suggestion
from normfree.files import write_json
from normfree.models import model_config
from normfree.models.count import multiply_adds
from normfree.recipes.choose import device
from normfree.runlog import Screen

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass
class _Common:
    rounds: int = 20  # measured, in turns
    device: str | None = None  # "cpu" or "cuda"
    out: Path | None = None  # a JSON file with every number and its conditions
    json: bool = False  # print that instead of a table


@dataclass
class _Latency(_Common):
    """Time a whole training step (A.2): forward, loss, backward, AGC, update and average, images on the device.

    Ratios are to the first network named, round by round.
    """

    models: Annotated[tuple[str, ...], tyro.conf.Positional] = ("nfnet_f0",)  # ours, or timm:NAME
    size: int | None = None  # side of the images in pixels; the first network's training size if not given
    batch: int = 32  # images of a step
    precision: Precision = "fp32"  # of the maps
    compiled: bool = False  # torch.compile of the network
    fused: bool = False  # torch's fused SGD for timm's networks, instead of SGD as it comes


@dataclass
class _Optimizer(_Common):
    """Time clipping, update and average alone; with timm beside us, timm's AGC and average and torch's SGD."""

    model: Annotated[str, tyro.conf.Positional] = "nfnet_f0"
    alone: bool = False  # without timm


@dataclass
class _Inference(_Common):
    """Time a forward pass: ours as it is and folded, timm's as it comes."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional] = ("nfnet_f0",)  # ours, or timm:NAME
    size: int | None = None  # the first network's test size if not given
    batch: int = 8  # images of a pass
    precision: Precision = "fp32"  # of weights and maps
    compiled: bool = False  # torch.compile with frozen weights


@dataclass
class _Startup(_Common):
    """Time imports and the command line's help, each in a process of its own."""


def run(arguments: Sequence[str]) -> int:
    """Measure what the first argument says."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: normfree bench latency | optimizer | inference | startup    each with --help")
        return 0
    action, rest = arguments[0], arguments[1:]
    if action not in _ACTIONS:
        warn(f"unknown action {action!r}{suggestion(action, _ACTIONS) or '; choose from ' + ', '.join(_ACTIONS)}")
        return 2
    kind, works = _ACTIONS[action]
    args: Any = parse(kind, f"bench {action}", rest)
    if args.rounds < 1:
        raise UserError("--rounds must be positive")
    check_device(args.device)
    where = torch.device(args.device or device()[0])
    with Screen(sys.stderr).progress(args.rounds, 0) as line:
        seconds = take_turns(works(args, str(where)), args.rounds, where, told=line.advance)
    first = next(iter(seconds))
    rows = [
        {"name": name, "seconds": spread(found), "to_first": ratio(found, seconds[first]), **_more(args, name, found)}
        for name, found in seconds.items()
    ]
    result = {"command": " ".join(["normfree bench", *arguments]), "n": args.rounds, "rows": rows} | conditions(where)
    if args.out is not None:
        write_json(args.out, result)
    if args.json:
        print(json.dumps(result))
    else:
        show(_table(rows))
    return 0


def _latency(args: Any, where: str) -> dict[str, Work]:
    size = args.size or _size(args.models[0], "train_size")
    tasks = {m: steps.Task(m, size, args.batch, args.precision, where, args.compiled, args.fused) for m in args.models}
    return {name: steps.step(task) for name, task in tasks.items()}


def _inference(args: Any, where: str) -> dict[str, Work]:
    size, found = args.size or _size(args.models[0], "test_size"), {}
    for name in args.models:
        task = steps.Task(name, size, args.batch, args.precision, where, args.compiled)
        if not name.startswith("timm:"):
            found[f"{name}, folded"] = inference.forward(task)
        found[name] = inference.forward(task, folded=False)
    return found


def _size(model: str, which: str) -> int:
    if model.startswith("timm:"):
        raise UserError(f"name the side of the images with --size: {model} does not say it here")
    size: int = getattr(model_config(model), which)
    return size


def _more(args: Any, name: str, seconds: list[float]) -> dict[str, float]:
    """Images a second, and of ours multiply-adds a second, where there are images."""
    if not hasattr(args, "batch"):
        return {}
    per_second = args.batch / spread(seconds)["median"]
    found = {"images_per_second": per_second}
    model = name.removesuffix(", folded")
    if not model.startswith("timm:"):
        training = isinstance(args, _Latency)
        size = args.size or _size(args.models[0], "train_size" if training else "test_size")
        work = multiply_adds(model_config(model), size) * (3 if training else 1)  # backward is twice forward
        found["multiply_adds_per_second"] = per_second * work
    return found


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("", "ms", "p10", "p90", "to the first", "images/s", box=None, header_style="dim")
    for row in rows:
        times = [f"{1000 * row['seconds'][key]:.1f}" for key in ("median", "p10", "p90")]
        speed = f"{row['images_per_second']:.1f}" if "images_per_second" in row else ""
        table.add_row(row["name"], *times, f"{row['to_first']['median']:.3f}", speed)
    return table


_ACTIONS: dict[str, tuple[type, Callable[[Any, str], dict[str, Work]]]] = {
    "latency": (_Latency, _latency),
    "optimizer": (_Optimizer, lambda args, where: optimizer.works(args.model, where, not args.alone)),
    "inference": (_Inference, _inference),
    "startup": (_Startup, lambda _args, _where: startup.works()),
}

"""normfree bench table3: the latencies of Table 3 again, beside the paper's, and the pictures of Figures 1 and 4."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from normfree.bench import steps
from normfree.bench.paper import CONDITIONS, measurable
from normfree.bench.table3 import beside_the_paper
from normfree.cli.bench_common import Precision, hand_over, place
from normfree.cli.bench_latency import Steps, cells, measure
from normfree.cli.common import among_processes, warn
from normfree.config import UserError
from normfree.distributed import Group
from normfree.files import write_atomic

_ON_A_CPU = ("nfnet_f0", "timm:resnet50", "timm:efficientnet_b0")  # what ends within minutes
_BATCH, _BATCH_ON_A_CPU = 32, 4


@dataclass
class Table3(Steps):
    """Time a training step of the networks of Table 3, each at its training size, beside the paper's numbers.

    Each network has the device to itself, all of them twice. Without --models it is every network of the table that is
    to be had here, on a CPU a few of them, of 4 images. What no package has keeps the paper's numbers only.
    """

    models: tuple[str, ...] = ()  # ours, or NAME+sam, or timm:NAME; others than the table's are rows of their own
    batch: int | None = None  # images of a step; 32, as in the paper, and 4 on a CPU
    precision: Precision = "bf16"  # of the maps; the paper's V100 had fp16
    figures: Path | None = None  # a folder for accuracy_latency.png and accuracy_flops.png


def table3(args: Table3, command: str) -> int:
    """Measure, draw, and hand the numbers over."""
    return among_processes(lambda group: _table3(args, command, group))


def _table3(args: Table3, command: str, group: Group) -> int:
    where = place(args, group)
    if args.figures is not None and args.figures.exists() and not args.figures.is_dir():
        raise UserError(f"--figures must be a folder, not {args.figures}")
    models = args.models or _default(where)
    batch = args.batch if args.batch is not None else _BATCH_ON_A_CPU if where.type == "cpu" else _BATCH
    result = measure(args, {model: steps.size_of(model) for model in models}, batch, where, True, group)
    if not group.first:
        return 0
    result["rows"] = beside_the_paper(result["rows"])
    result["paper"] = CONDITIONS
    if args.figures is not None:
        _draw(args.figures, result["rows"], f"here: {batch} images, {args.precision}, {_called(where)}")
    return hand_over(args, command, where, result, _table(result["rows"], f"to {models[0]}"))


def _default(where: torch.device) -> tuple[str, ...]:
    chosen = measurable() if where.type == "cuda" else list(_ON_A_CPU)
    try:
        steps.library()
    except UserError as e:
        warn(f"ours alone: {e}")
        chosen = [model for model in chosen if not model.startswith(steps.TIMM)]
    return tuple(chosen)


def _called(where: torch.device) -> str:
    from normfree.bench.timing import processor

    return torch.cuda.get_device_name(where) if where.type == "cuda" else processor()


def _draw(folder: Path, rows: list[dict[str, Any]], measured: str) -> None:
    from normfree.bench.figures import as_png, flops_figure, latency_figure

    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "accuracy_latency.png", as_png(latency_figure(rows, measured)))
    write_atomic(folder / "accuracy_flops.png", as_png(flops_figure(rows)))


def _table(rows: list[dict[str, Any]], to: str) -> Table:
    heads = ("", "V100 ms", "TPUv3 ms", "top-1", "G multiply-adds", "| here", "ms", "p10", "p90", to, "images/s")
    shown = Table(*heads, "memory", "G multiply-adds", "of the peak", "", box=None, header_style="dim")
    for row in rows:
        here, printed = row.get("here"), row.get("paper", {})
        numbers = [_number(printed.get(key)) for key in ("gpu_ms", "tpu_ms", "top1", "multiply_adds")]
        shown.add_row(
            row["network"], *numbers, *(["| " + here["name"], *cells(here)] if here else ["| " + row["note"]])
        )
    return shown


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"

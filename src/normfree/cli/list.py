"""normfree list [PATTERN] [--table] [--json]."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import tyro
from rich.table import Table

from normfree.cli.common import parse, show, warn
from normfree.config import suggestion
from normfree.models import MODELS, NetworkConfig, list_models
from normfree.models.count import PAPER, multiply_adds, parameters


@dataclass
class _Arguments:
    """The networks by name. With --table also what they cost, beside the numbers of the paper."""

    pattern: Annotated[str, tyro.conf.Positional] = "*"  # as in a shell: "nfnet_f*"
    table: bool = False  # multiply-adds at the test and training sizes, augmentation, and the paper's numbers
    json: bool = False  # all of it, as a JSON list


def run(arguments: Sequence[str]) -> int:
    """Print a table of the networks that match."""
    args = parse(_Arguments, "list", arguments)
    names = list_models(args.pattern)
    if not names:
        warn(f"no model matches {args.pattern!r}{suggestion(args.pattern, MODELS)}")
        return 1
    if args.json:
        print(json.dumps([_facts(name, MODELS[name]) for name in names], indent=2))
        return 0
    columns = {**_WHAT, **(_COSTS if args.table else {"parameters": _parameters, **_SIZES})}
    table = Table("name", *columns, box=None, header_style="dim", padding=(0, 2, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    for name in names:
        facts = _facts(name, MODELS[name], costs=args.table)
        table.add_row(name, *(cell(facts) for cell in columns.values()))
    show(table)
    if args.table:
        print(_NOTES)
    return 0


def _facts(name: str, config: NetworkConfig, costs: bool = True) -> dict[str, Any]:
    """Numbers of a network: multiply-adds and parameters whole, those of the paper too, None where it has none."""
    facts = {"name": name, **asdict(config), "parameters": parameters(config)}
    if costs:
        paper = PAPER.get(name)
        facts["test_multiply_adds"] = multiply_adds(config, config.test_size)
        facts["train_multiply_adds"] = multiply_adds(config, config.train_size)
        facts["paper_parameters"] = round(paper[0] * 1e6) if paper else None
        facts["paper_multiply_adds"] = round(paper[1] * 1e9) if paper else None
    return facts


def _parameters(facts: dict[str, Any]) -> str:
    return f"{facts['parameters']:,}"


def _difference(facts: dict[str, Any], ours: str, paper: str, unit: float, digits: int) -> str:
    """How far we are from the paper in the digits that it prints; "=" where they agree."""
    if facts[paper] is None:
        return ""
    apart = round(round(facts[ours] / unit, digits) - facts[paper] / unit, digits)
    return "=" if apart == 0 else f"{apart:+.{digits}f}"


def _whole(value: int | None, unit: float, digits: int, letter: str) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}{letter}"


_Columns = dict[str, Callable[[dict[str, Any]], str]]  # heading -> the text of a cell
_WHAT: _Columns = {
    "depths": lambda f: "-".join(map(str, f["depths"])),
    "widths": lambda f: "-".join(map(str, f["widths"])),
}
_SIZES: _Columns = {
    "train px": lambda f: str(f["train_size"]),
    "test px": lambda f: str(f["test_size"]),
    "dropout": lambda f: f"{f['drop_rate']:g}",
}
_COSTS: _Columns = {
    **_SIZES,
    "RandAug": lambda f: str(f["magnitude"] or "-"),
    "params": lambda f: _whole(f["parameters"], 1e6, 1, "M"),
    "paper": lambda f: _whole(f["paper_parameters"], 1e6, 1, "M"),
    "diff": lambda f: _difference(f, "parameters", "paper_parameters", 1e6, 1),
    "test FLOPs": lambda f: _whole(f["test_multiply_adds"], 1e9, 2, "B"),
    "paper ": lambda f: _whole(f["paper_multiply_adds"], 1e9, 2, "B"),
    "diff ": lambda f: _difference(f, "test_multiply_adds", "paper_multiply_adds", 1e9, 2),
    "train FLOPs": lambda f: _whole(f["train_multiply_adds"], 1e9, 2, "B"),
}
_NOTES = """
FLOPs are multiply-adds of one image, as in the paper. Its numbers are those of Table 3, and of Table 5 for F4+, which
counts 192 channels in the bottleneck of the first stage: nfnet_f4_plus_192. The authors' code builds nfnet_f4_plus,
with 128. Table 3 prints 26.0M and 4.10B for its ResNet-50, here bn_resnet50."""

"""What every benchmark takes and hands over: rounds, a device, numbers as a table, as JSON, and in a file."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table

from normfree.bench.results import write_results
from normfree.bench.timing import Work, conditions, take_turns
from normfree.cli.common import check_device, show
from normfree.config import UserError
from normfree.distributed import Group
from normfree.recipes.choose import device
from normfree.runlog import Screen

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass
class Measured:
    """The options of every benchmark."""

    rounds: int = 20  # measured, in turns
    device: str | None = None  # "cpu" or "cuda"
    out: Path | None = None  # a file with every number and its conditions: .csv for a table, JSON otherwise
    json: bool = False  # print that instead of a table


def place(args: Measured, group: Group | None = None) -> torch.device:
    """Where to measure; of several processes, each has its own.

    Raises:
        UserError: there is no such device here, there is nothing to measure, or nowhere to write it.
    """
    if args.rounds < 1:
        raise UserError("--rounds must be positive")
    if args.out is not None and (args.out.is_dir() or not args.out.parent.is_dir()):
        raise UserError(f"--out must be a file in a folder that is there, not {args.out}")
    check_device(args.device)
    name = args.device or device()[0]
    return torch.device(name if group is None else group.device(name))


def turns(works: dict[str, Work], rounds: int, where: torch.device, warmup: int = 2) -> dict[str, list[float]]:
    """`take_turns`, with a bar."""
    with Screen(sys.stderr).progress(rounds, 0) as line:
        return take_turns(works, rounds, where, warmup, told=line.advance)


def hand_over(args: Measured, command: str, where: torch.device, result: dict[str, Any], table: Table) -> int:
    """Write the result with its conditions where the options say, and print it; 0, the exit code."""
    result = {"command": command, "n": args.rounds, **result} | conditions(where)
    if args.out is not None:
        write_results(args.out, result)
    if args.json:
        print(json.dumps(result))
    else:
        show(table)
    return 0

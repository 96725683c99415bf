"""normfree list [PATTERN]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from rich.table import Table

from normfree.cli.common import parse, show, warn
from normfree.config import suggestion
from normfree.models import MODELS, create_model, list_models


@dataclass
class _Arguments:
    """The networks by name."""

    pattern: Annotated[str, tyro.conf.Positional] = "*"  # as in a shell: "nfnet_f*"


def run(arguments: Sequence[str]) -> int:
    """Print a table of the networks that match."""
    pattern = parse(_Arguments, "list", arguments).pattern
    names = list_models(pattern)
    if not names:
        warn(f"no model matches {pattern!r}{suggestion(pattern, MODELS)}")
        return 1
    table = Table(
        "name", "parameters", "depths", "widths", "train px", "test px", "dropout", box=None, header_style="dim"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name in names:
        with torch.device("meta"):
            model = create_model(name)
        c = model.config
        table.add_row(
            name,
            f"{sum(p.numel() for p in model.parameters()):,}",
            "-".join(map(str, c.depths)),
            "-".join(map(str, c.widths)),
            str(c.train_size),
            str(c.test_size),
            f"{c.drop_rate:g}",
        )
    show(table)
    return 0

"""Table 3 measured again: what was found of each network, beside the paper's row of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from normfree.bench.paper import TABLE_3, Row, row_of
from normfree.bench.task import COMPILED

_PRINTED = ("multiply_adds", "parameters", "top1", "top5", "tpu_ms", "gpu_ms", "borrowed")
NOT_MEASURED, PAPER_ONLY = "not measured", "the paper's numbers only: no package has it"


def beside_the_paper(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The paper's rows in its order, each with what was measured of it; networks of no row come last.

    Args:
        found: as `latency.rows` returns them.

    Returns:
        a dictionary for each: "network", its name; "paper", what is printed there (accuracies in per cent, multiply-
        adds in billions at the test size, parameters in millions); "here", of `found`; and where that is not there, or
        has no numbers, "note", why. A network in another implementation has a row of its own behind the first.
    """
    by_name = {row["name"].removesuffix(COMPILED): row for row in found}
    joined = [line for row in TABLE_3 for line in _lines(row, by_name)]
    return joined + [{"network": name, "here": here} for name, here in by_name.items() if row_of(name) is None]


def _lines(row: Row, found: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    paper = {key: value for key, value in asdict(row).items() if key in _PRINTED}
    line = {"network": row.name, "paper": paper}
    measured = [line | {"here": found[name]} for name in (row.model, row.also) if name is not None and name in found]
    return measured or [line | {"note": PAPER_ONLY if row.model is None else NOT_MEASURED}]

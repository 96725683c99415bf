"""Results as files: JSON, or a table of comma-separated values with its conditions above it."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from normfree.files import write_atomic, write_json


def write_results(path: Path, result: dict[str, Any]) -> None:
    """Write a result, whose "rows" are a list of dictionaries, atomically: as CSV if the name ends so, else as JSON."""
    if path.suffix.lower() == ".csv":
        write_atomic(path, as_csv(result).encode())
    else:
        write_json(path, result)


def as_csv(result: dict[str, Any]) -> str:
    """A line "# name: value" for everything but the rows, then the rows; what lies deeper has dotted names."""
    rows = [_flat(row) for row in result["rows"]]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    for name, value in _flat({k: v for k, v in result.items() if k != "rows"}).items():
        out.write(f"# {name}: {value if isinstance(value, str) else json.dumps(value)}\n")
    table = csv.DictWriter(out, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return out.getvalue()


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= {f"{name}.{key}": v for key, v in _flat(value).items()}
        else:
            found[name] = value
    return found

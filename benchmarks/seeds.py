"""Runs `normfree train` with several seeds and writes what they reached, with the conditions, as JSON.

python benchmarks/seeds.py --out benchmarks/results/digits.json
python benchmarks/seeds.py --out benchmarks/results/sample.json --seeds 3 -- --data.root sample/
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from normfree.bench.timing import conditions
from normfree.recipes.choose import device


def run(seed: int, folder: Path, settings: list[str]) -> dict[str, Any]:
    """One run in a process of its own; seconds are of the whole process, imports and report included."""
    target = folder / f"seed{seed}"
    command = [sys.executable, "-m", "normfree", "train", "--run-dir", str(target), "--train.seed", str(seed)]
    began = time.monotonic()
    subprocess.run([*command, *settings], check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - began
    summary = json.loads((target / "summary.json").read_text())
    first = json.loads((target / "metrics.jsonl").open().readline())
    return {
        "seed": seed,
        "top1": summary["top1"],
        "loss": summary["loss"],
        "best": summary["best"],
        "last_ema_top1": summary["last"]["ema"]["top1"],
        "last_raw_top1": summary["last"]["raw"]["top1"],
        "process_seconds": round(seconds, 1),
        "training_seconds": summary["wall_seconds"],
        "first_line_after_seconds": round(first["seconds"], 2),
        "images_per_second": summary["images_per_second"],
    }


def main() -> None:
    """Run the seeds, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("settings", nargs="*")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            rows.append(run(seed, Path(folder), args.settings))
            print(rows[-1], flush=True)
    result: dict[str, Any] = {
        "command": "normfree train --train.seed N " + " ".join(args.settings),
        "n": len(rows),
        **conditions(torch.device(device()[0])),
    }
    for key in ("top1", "last_ema_top1", "last_raw_top1", "process_seconds", "training_seconds"):
        values = [row[key] for row in rows]
        result[key] = {"mean": round(statistics.mean(values), 5), "min": min(values), "max": max(values)}
        if len(values) > 1:
            result[key]["std"] = round(statistics.stdev(values), 5)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result | {"runs": rows}, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

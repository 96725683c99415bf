"""Top-1 on the bundled digits by setting, several seeds each: what SAM does, and which lambda suits AdamW.

python benchmarks/ablations.py sam --out benchmarks/results/sam_effect.json
python benchmarks/ablations.py adamw --out benchmarks/results/adamw.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from seeds import run

from normfree.bench.timing import conditions
from normfree.recipes.choose import device

_ADAMW = "--train.epochs 6 --optim.kind adamw --optim.weight-decay 0.05"
STUDIES: dict[str, dict[str, str]] = {
    "sam": {
        "plain": "--train.epochs 10",
        "a fifth": "--train.epochs 10 --optim.sam-rho 0.05 --optim.sam-every 5",
        "full": "--train.epochs 10 --optim.sam-rho 0.05 --optim.sam-every 1",
    },
    "adamw": {
        f"lr {lr}, lambda {clipping}": f"{_ADAMW} --optim.lr {lr} --optim.clipping {clipping}"
        for lr in (0.001, 0.004, 0.016)
        for clipping in (1e6, 0.16, 0.04, 0.01)  # the first clips nothing
    },
}


def row(settings: str, seeds: int, folder: Path) -> dict[str, Any]:
    """What so many seeds reached with some settings; of the averaged and of the raw weights at the end."""
    runs = [run(seed, folder, settings.split()) for seed in range(seeds)]
    averaged, raw = ([r[f"last_{kind}_top1"] for r in runs] for kind in ("ema", "raw"))
    spread = {"stdev": statistics.stdev(averaged)} if seeds > 1 else {}
    return {
        "settings": settings,
        "averaged": averaged,
        "raw": raw,
        "mean": statistics.mean(averaged),
        **spread,
        "loss": [r["loss"] for r in runs],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    rows = {}
    for name, settings in STUDIES[args.study].items():
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = row(settings, args.seeds, Path(folder))
        print(f"{name:<28} {100 * rows[name]['mean']:.2f}", flush=True)
    result = {
        "what": "top-1 of 1,000 held-out digits at the end of a run",
        "rows": rows,
        "n": args.seeds,
        "command": f"python benchmarks/ablations.py {args.study} --out {args.out}",
        **conditions(torch.device(device()[0])),
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

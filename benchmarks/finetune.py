"""Does fine-tuning beat training from scratch on the same budget?

The 12 classes of `normfree data sample` are halved. A network is trained on one half; then, for each seed and budget,
the other half is learnt from its weights (`normfree train finetune`) and from scratch (`normfree train`), with the same
number of epochs and everything else chosen by the recipes.

    python benchmarks/finetune.py --out benchmarks/results/finetune.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch

from normfree.data.sample import write_sample


def normfree(*arguments: str, cwd: Path) -> None:
    subprocess.run([sys.executable, "-m", "normfree", *arguments], cwd=cwd, check=True, stdout=subprocess.DEVNULL)


def halve(root: Path) -> tuple[Path, Path]:
    """The sample set, its classes taken in turn into two sets."""
    write_sample(root / "all")
    halves = root / "first", root / "second"
    for split in ("train", "val"):
        for i, folder in enumerate(sorted((root / "all" / split).iterdir())):
            target = halves[i % 2] / split
            target.mkdir(parents=True, exist_ok=True)
            folder.rename(target / folder.name)
    return halves


def scores(cwd: Path, run: str) -> float:
    summary = json.loads((cwd / run / "summary.json").read_text())
    return float(summary["last"]["ema"]["top1"])  # not selected on the validation images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=float, nargs="+", default=[2.0, 5.0])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        first, second = halve(work)
        normfree("train", "--data.root", str(first), "--run-dir", "base", cwd=work)
        weights = "base/best.safetensors"
        model = json.loads((work / "base" / "config.json").read_text())["model"]["name"]
        rows = []
        for epochs in args.epochs:
            found: dict[str, list[float]] = {"finetune": [], "scratch": []}
            for seed in range(args.seeds):
                common = ["--data.root", str(second), "--train.epochs", str(epochs), "--train.seed", str(seed)]
                for kind, tops in found.items():
                    start = ["finetune", "--weights", weights] if kind == "finetune" else ["--model.name", model]
                    run = f"{kind}-{epochs}-{seed}"
                    normfree("train", *start, *common, "--run-dir", run, cwd=work)
                    tops.append(scores(work, run))
            rows.append({"epochs": epochs, **found, "median": {k: statistics.median(v) for k, v in found.items()}})
            print(rows[-1], flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result = {
        "what": "top-1 of the averaged weights after the last epoch, held-out images of the second half of the classes",
        "model": model,
        "rows": rows,
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "command": f"python benchmarks/finetune.py --out {args.out} --seeds {args.seeds}",
        "commit": commit.stdout.strip(),
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

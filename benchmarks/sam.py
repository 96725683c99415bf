"""What SAM costs: the time of a whole training step with none, with a fifth of each shard in the ascent, and with all.

The three take turns, round after round, on the same batch; ratios are taken within a round.

    python benchmarks/sam.py --out benchmarks/results/sam.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch

from normfree.config import Given, Run
from normfree.data.loader import Batch
from normfree.data.sources import SyntheticSource
from normfree.recipes import RECIPES
from normfree.train.build import build_learner, eval_preprocessing
from normfree.train.length import Length
from normfree.train.step import Learner

FORMS = {"plain": (0.0, 1), "a fifth": (0.05, 5), "full": (0.05, 1)}  # rho, every


def learner(run: Run, rho: float, every: int, shards: int) -> Learner:
    optim = replace(run.optim, sam_rho=rho, sam_every=every, sam_shards=shards)
    # all take as many images at once: larger batches alone are slower or faster, as the machine has it
    run = replace(run, optim=optim, train=replace(run.train, micro_batch=run.train.batch_size // shards))
    return build_learner(run, 10, Length(10.0, 100.0), eval_preprocessing(run))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="nfnet_small")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    given = Given({"model.name": args.model, "data.size": args.size, "train.batch_size": args.batch})
    run = RECIPES["digits"](given, SyntheticSource(1000, 10))
    device = run.train.device
    images = torch.randint(0, 256, (args.batch, 3, args.size, args.size), dtype=torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last)
    batch = Batch(images, torch.arange(args.batch) % 10, torch.ones(args.batch, dtype=torch.bool), [])
    learners = {form: learner(run, rho, every, args.shards) for form, (rho, every) in FORMS.items()}
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    for r in range(args.rounds + 1):
        for form, one in learners.items():
            began = time.perf_counter()
            one.step(batch, r, r)
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if r > 0:  # the first warms up
                seconds[form].append(time.perf_counter() - began)
    rows = {}
    for form, times in seconds.items():
        tenth = len(times) // 10
        ratios = sorted(t / p for t, p in zip(times, seconds["plain"], strict=True))
        rows[form] = {"median ratio": statistics.median(ratios), "p10": ratios[tenth], "p90": ratios[-1 - tenth]}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result = {
        "what": f"time of a step of {args.model}, {args.size} px, {args.batch} images, {args.shards} shards, to plain",
        "rows": rows,
        "n": args.rounds,
        "device": device,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "command": f"python benchmarks/sam.py --out {args.out}",
        "commit": commit.stdout.strip(),
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()

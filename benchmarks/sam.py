"""What SAM costs: the time of a whole training step with none, with a fifth of each shard in the ascent, and with all.

The three take turns, round after round, on the same batch; ratios are taken within a round.

    python benchmarks/sam.py --out benchmarks/results/sam.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from normfree.bench.timing import conditions, ratio, take_turns
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
    taken = dict.fromkeys(FORMS, 0)

    def step(form: str) -> None:
        learners[form].step(batch, taken[form], taken[form])
        taken[form] += 1

    where = torch.device(device)
    seconds = take_turns({form: partial(step, form) for form in FORMS}, args.rounds, where, warmup=1)
    rows = {form: ratio(times, seconds["plain"]) for form, times in seconds.items()}
    result = {
        "what": f"time of a step of {args.model}, {args.size} px, {args.batch} images, {args.shards} shards, to plain",
        "rows": rows,
        "n": args.rounds,
        "command": f"python benchmarks/sam.py --out {args.out}",
        **conditions(where),
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()

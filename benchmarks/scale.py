"""What a step takes with 1, 2 and 4 processes, and the sum of gradients alone, beside the model of docs/scale.md.

All forms take turns, round after round, in the same four processes; those that have no part in one wait without
work. A form's time is that of its slowest process; core-seconds are what all of them have computed.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 4 benchmarks/scale.py     about 2 minutes on 2 cores

Writes benchmarks/results/scale.json.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from normfree.bench.timing import conditions, spread
from normfree.config import Given, Run
from normfree.data.loader import Batch
from normfree.data.sources import SyntheticSource
from normfree.distributed import Group
from normfree.recipes import RECIPES
from normfree.train.build import build_learner, eval_preprocessing
from normfree.train.length import Length
from normfree.train.step import Learner

BATCH = 64
NETWORKS = {"nfnet_tiny": (3, 30.0), "nf_resnet50": (1, 75.0)}  # steps at once, seconds; the second has many weights
WORLDS = (2, 4)
RESULT = Path(__file__).parent / "results" / "scale.json"
Form = tuple[int, Callable[[], object]]  # processes that take part, and what each does
Times = tuple[float, float]  # seconds, core-seconds


def settings(network: str) -> Run:
    given = Given({"model.name": network, "data.size": 32, "train.batch_size": BATCH, "train.device": "cpu"})
    return RECIPES["digits"](given, SyntheticSource(1000, 10))


class Steps:
    """Steps of a learner on n images of its own, one a call, with the word that the loop has between them."""

    def __init__(self, learner: Learner, n: int) -> None:
        images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
        self.batch = Batch(images, torch.arange(n) % 10, torch.ones(n, dtype=torch.bool), [])
        self.learner, self.taken = learner, 0

    def __call__(self) -> None:
        self.learner.group.agree(0)
        self.learner.step(self.batch, self.taken, self.taken)
        self.taken += 1


def sum_alone(learner: Learner) -> None:
    """The sum of all gradients of a network, with nothing to hide behind."""
    with learner._sum.last():
        pass


def forms_of(network: str, groups: dict[int, Group]) -> tuple[dict[str, Form], int]:
    """By name what is timed, and the network's parameters."""
    run = settings(network)

    def learner(group: Group) -> Learner:
        return build_learner(run, 10, Length(10.0, 100.0), eval_preprocessing(run), group)

    alone = learner(Group.alone())
    forms: dict[str, Form] = {f"1 process, {n} images": (1, Steps(alone, n)) for n in (64, 32, 16)}
    for world in WORLDS:
        together = learner(groups[world])
        forms[f"{world} processes, silent"] = world, Steps(alone, BATCH // world)
        forms[f"{world} processes"] = world, Steps(together, BATCH // world)
        forms[f"{world} processes, sum alone"] = world, partial(sum_alone, together)
    return forms, sum(p.numel() for p in alone.model.parameters())


def timed(everyone: Group, form: Form, repeats: int) -> Times:
    """Of one of the repeats: seconds of the slowest process that takes part, and core-seconds of all of them."""
    processes, work = form
    everyone.barrier()
    began, busy = time.perf_counter(), time.process_time()
    if everyone.rank < processes:
        for _ in range(repeats):
            work()
    own = (time.perf_counter() - began) / repeats, (time.process_time() - busy) / repeats
    seconds, cores = zip(*everyone.gather(own)[:processes], strict=True)
    return max(seconds), sum(cores)


def compared(found: dict[str, list[Times]], w: int, parameters: int) -> dict[str, Any]:
    """What w processes take beside what the model makes of its parts, round by round."""
    steps, silent, sums = (found[f"{w} processes{what}"] for what in ("", ", silent", ", sum alone"))
    alone, whole = found[f"1 process, {BATCH // w} images"], found[f"1 process, {BATCH} images"]
    shared = max(1.0, w / (os.cpu_count() or 1))  # processes that take turns on a core
    model = [(shared * a[0] + s[0], w * a[1] + s[1]) for a, s in zip(alone, sums, strict=True)]
    rows: dict[str, Any] = {"bytes sent by each": round(2 * (w - 1) / w * 4 * parameters)}
    for i, unit in enumerate(("seconds", "core-seconds")):
        rows[f"model, {unit}"] = spread([m[i] for m in model])
        for name, other in {"model": model, "silent": silent, "one process": whole}.items():
            rows[f"measured to {name}, {unit}"] = spread([a[i] / b[i] for a, b in zip(steps, other, strict=True)])
    return rows


def measure(network: str, repeats: int, seconds: float, groups: dict[int, Group]) -> dict[str, Any]:
    forms, parameters = forms_of(network, groups)
    found: dict[str, list[Times]] = {name: [] for name in forms}
    everyone, until = groups[4], time.perf_counter() + seconds
    counted = False  # the first round is not
    while everyone.broadcast(time.perf_counter() < until or not found["4 processes"]):
        for name, form in forms.items():
            times = timed(everyone, form, repeats)
            if counted:
                found[name].append(times)
        counted = True
    return {
        "parameters": parameters,
        "n": len(found["4 processes"]),
        "seconds": {name: spread([t[0] for t in times]) for name, times in found.items()},
        "core-seconds": {name: spread([t[1] for t in times]) for name, times in found.items()},
        "processes": {str(w): compared(found, w, parameters) for w in WORLDS},
    }


def main() -> None:
    everyone = Group.from_environment()
    assert everyone.world == 4, "torchrun --nproc-per-node 4 starts it"
    groups = {2: everyone.split(2), 4: everyone}
    rows = {network: measure(network, *how, groups) for network, how in NETWORKS.items()}
    if everyone.first:
        result = {
            "what": f"a step of {BATCH} images of 32 px by processes that share the cores, one thread each, over gloo",
            "rows": rows,
            "command": "OMP_NUM_THREADS=1 torchrun --nproc-per-node 4 benchmarks/scale.py",
            "load of the machine": round(os.getloadavg()[0], 1),
            **conditions(torch.device("cpu")),
        }
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps(rows, indent=2))
    everyone.close()


if __name__ == "__main__":
    main()

"""The memory of a training step, measured: what it has at most, in a fresh process, and what that has before it.

`python -m normfree.bench.memory JSON` is that process.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from normfree.bench.steps import SAM, TIMM, Task, step
from normfree.config import UserError, is_out_of_memory
from normfree.models import model_config
from normfree.models.memory import Costs, step_memory

_STEPS = 3  # the first makes the momentum
_OUT_OF_MEMORY = 77  # exit status of the fresh process


class Peak(NamedTuple):
    """Bytes: before there is a network, and at most from there to the end of a few steps.

    On a CPU of the whole process, Python, torch and all; on CUDA of what torch's allocator has given out.
    """

    baseline: int
    peak: int


def estimate(task: Task) -> int | None:
    """Bytes of a step, as a dry run says; None for timm's networks."""
    if task.model.startswith(TIMM):
        return None
    images = min(task.batch, task.micro_batch or task.batch)
    costs = Costs(task.remat, task.precision, 6 if task.model.endswith(SAM) else 4)
    return step_memory(model_config(task.model.removesuffix(SAM)), task.size, images, costs)


def in_fresh_process(task: Task) -> Peak | None:
    """What `measure` finds in a process that did nothing else; None where memory did not suffice.

    Raises:
        UserError: the process failed otherwise; its last line.
    """
    program = [sys.executable, "-m", "normfree.bench.memory", json.dumps(asdict(task))]
    done = subprocess.run(program, capture_output=True, text=True, check=False)  # noqa: S603 (our own)
    if done.returncode in (_OUT_OF_MEMORY, -9):  # -9: the system's own answer
        return None
    if done.returncode != 0:
        raise UserError(f"{task.model} did not train: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return Peak(*json.loads(done.stdout.splitlines()[-1]))


def measure(task: Task) -> Peak:
    """Train a few steps here. On a CPU it means something only in a fresh process: a peak of before is seen too.

    Before the network there is a step of the smallest one, which loads what torch loads late.

    Raises:
        MemoryError: it fits only in smaller micro-batches.
    """
    device = torch.device(task.device)
    small = step(Task("nfnet_tiny", 32, 1, task.precision, task.device))
    small()
    del small
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        baseline = torch.cuda.memory_allocated(device)
        _train(task)
        return Peak(baseline, torch.cuda.max_memory_allocated(device))
    baseline = most_resident()
    _train(task)
    return Peak(baseline, most_resident())


def _train(task: Task) -> None:
    work = step(task)
    for _ in range(_STEPS):
        work()
    if work.micro_batch != task.micro_batch:
        raise MemoryError("out of memory: the step was cut into smaller micro-batches")


def most_resident() -> int:
    """Bytes of memory that this process had at most.

    Of /proc: what getrusage says of a child begins with what its parent had when it was made.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if found:
        return int(found.group(1)) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Measure what the argument says, and print it."""
    try:
        print(json.dumps(measure(Task(**json.loads(sys.argv[1])))))
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        sys.exit(_OUT_OF_MEMORY)


if __name__ == "__main__":
    main()

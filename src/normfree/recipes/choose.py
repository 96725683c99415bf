"""Choices that follow from the data, the network and the machine, as functions of numbers."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import torch

from normfree.models import NetworkConfig
from normfree.models.memory import Costs, step_memory

__all__ = [
    "LAMBDAS",
    "Costs",
    "clipping_for",
    "device",
    "free_memory",
    "micro_batch",
    "step_memory",
    "steps_to_wake",
    "workers",
]

LAMBDAS = (0.01, 0.02, 0.04, 0.08, 0.16)  # Section 4.1


def steps_to_wake(
    schedule: Callable[[int], float], clipping: float, eps: float, momentum: float, limit: int, target: float = 0.1
) -> int:
    """Optimizer steps until a parameter that starts at 0 can reach `target`, if AGC clips it at each: at most `limit`.

    A clipped gradient has norm clipping * max(|w|, eps). So SkipInit moves by at most lr * clipping * eps / (1 -
    momentum) a step at first, and grows exponentially beyond eps. While it is near 0 the residual branches do nothing.
    """
    w = velocity = 0.0
    for step in range(limit):
        gradient = clipping * max(w, eps)
        velocity = momentum * velocity + gradient
        w += schedule(step) * (gradient + momentum * velocity)
        if w >= target:
            return step + 1
    return limit


def clipping_for(schedule: Callable[[int], float], total: int, eps: float, momentum: float) -> tuple[float, int]:
    """(lambda, steps to wake): the smallest of the paper's lambdas that wakes SkipInit in the first fifth of a run.

    Where none does, the largest.
    """
    steps = total
    for clipping in LAMBDAS:
        steps = steps_to_wake(schedule, clipping, eps, momentum, total)
        if steps <= total / 5:
            return clipping, steps
    return LAMBDAS[-1], steps


def workers(device: str) -> tuple[int, str]:
    """Loader processes, of each of the processes that torchrun started on this machine."""
    if not device.startswith("cuda"):
        return 0, "training uses every core"
    cores = (os.cpu_count() or 2) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(16, max(1, cores - 1)), "one a core"


def micro_batch(
    config: NetworkConfig, size: int, batch: int, device: str, costs: Costs | None = None
) -> tuple[int | None, str]:
    """Images at once that fit into half of the free memory; None where the whole batch does."""
    memory, n = free_memory(device), batch
    while n > 1 and step_memory(config, size, n, costs) > memory // 2:
        n = -(-n // 2)
    whole = n == batch
    return (None if whole else n), "" if whole else f"what fits into half of the free memory, {memory / 2**30:.1f} GiB"


def device() -> tuple[str, str]:
    """(device, why)."""
    if torch.cuda.is_available():
        return "cuda", torch.cuda.get_device_name()
    return "cpu", f"no CUDA device; threads: {torch.get_num_threads()}"


def free_memory(device: str) -> int:
    """Bytes that a run may use."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [_read_number("/proc/meminfo", r"MemAvailable:\s+(\d+) kB") * 1024]
    most, used = (_read_number(f"/sys/fs/cgroup/memory.{name}", r"(\d+)") for name in ("max", "current"))
    if most:  # a container's limit; without one the file says "max"
        limits.append(max(most - used, 1 << 20))
    return min((n for n in limits if n), default=4 << 30)  # where the system does not say: a small laptop


def _read_number(path: str, pattern: str) -> int:
    """The number that a pattern finds in a file of the system; 0 if there is none."""
    try:
        found = re.search(pattern, Path(path).read_text())
    except OSError:
        return 0
    return int(found.group(1)) if found else 0

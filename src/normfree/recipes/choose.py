"""Choices that follow from the data, the network and the machine, as functions of numbers."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from normfree.config import OptimConfig, TrainConfig
from normfree.models import Network, NetworkConfig
from normfree.models.block import Block
from normfree.models.count import parameters

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


@dataclass(frozen=True)
class Costs:
    """What the memory of a training step depends on, beside the network and its images."""

    remat: str = "none"  # as train.remat
    precision: str = "fp32"  # of the maps
    copies: int = 4  # of the weights: themselves, gradients, momentum and average

    @classmethod
    def of(cls, train: TrainConfig, optim: OptimConfig) -> Costs:
        """SAM keeps the weights and puts gradients aside; Adam has a second moment."""
        copies = 4 + 2 * (optim.sam_rho > 0) + (optim.kind == "adamw")
        return cls(train.remat, train.precision, copies)


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


def step_memory(config: NetworkConfig, size: int, batch_size: int, costs: Costs | None = None) -> int:
    """Bytes of a training step: copies of the weights in float32, and what backward keeps.

    Counted on the meta device. A quarter of the maps is added for work space; maps of 16 bits count half.
    """
    costs = Costs() if costs is None else costs
    image, beside = _memory_terms(config, size, costs.remat)
    maps = (image * batch_size + beside) * 5 // 4
    return maps // (1 if costs.precision == "fp32" else 2) + costs.copies * 4 * parameters(config)


@lru_cache(maxsize=32)
def _memory_terms(config: NetworkConfig, size: int, remat: str) -> tuple[int, int]:
    """(bytes kept for each image, bytes beside)."""
    two, three = (_kept(config, size, n, remat) for n in (2, 3))  # batch norm takes no single image
    return three - two, 3 * two - 2 * three


def _kept(config: NetworkConfig, size: int, n: int, remat: str) -> int:
    """Bytes that autograd keeps for backward after a forward pass of n images, beside the weights.

    With remat that is what enters each span of blocks, and inside of one span, the largest, what is computed again.
    """
    with torch.device("meta"):
        model, images = Network(config), torch.empty(n, config.in_chans, size, size)
    inside: dict[int | None, dict[int, int]] = {None: {}}  # by span, those outside of any under None: by storage
    entering: dict[int, int] = {}
    where: int | None = None

    def enter(_block: torch.nn.Module, x: tuple[Tensor, ...], span: int) -> None:
        nonlocal where
        where = span
        entering.setdefault(span, x[0].untyped_storage().nbytes())
        inside.setdefault(span, {})

    def leave(*_: object) -> None:
        nonlocal where
        where = None

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t, torch.nn.Parameter):
            inside[where][t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    if remat != "none":
        for number, block in enumerate(model.blocks):
            span = number if remat == "block" else cast(Block, block).place.stage
            block.register_forward_pre_hook(partial(enter, span=span))
            block.register_forward_hook(leave)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(images)  # kept until all is counted, so that no storage takes the place of another
    del out
    outside = sum(inside.pop(None).values())
    return outside + sum(entering.values()) + max((sum(kept.values()) for kept in inside.values()), default=0)

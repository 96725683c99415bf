"""Training latencies of several networks as rows: fitted into memory, measured in turns or apart, beside the peak."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from normfree.bench.steps import Step, Task, step, step_multiply_adds
from normfree.bench.timing import ratio, spread, take_turns
from normfree.config import UserError, is_out_of_memory
from normfree.distributed import Group


class DoesNotFit(UserError):
    """A network for which memory does not suffice, even for one image at a time."""


@dataclass
class Timed:
    """What was found of a task. micro_batch: images at once, None for the whole batch; memory: peak, in bytes."""

    task: Task
    seconds: list[float] = field(default_factory=list)
    micro_batch: int | None = None
    memory: int | None = None
    finite: bool = True
    failure: str = ""  # why there are no seconds
    processes: int = 1  # that share the work, each with a batch of its own; seconds and memory are of this one


Told = Callable[[int], None]


def together(
    tasks: Sequence[Task], rounds: int, warmup: int, told: Told | None = None, group: Group | None = None
) -> list[Timed]:
    """All networks are there at once and take turns, step by step.

    Raises:
        DoesNotFit: memory does not suffice for all.
    """
    device = torch.device(tasks[0].device)
    works: dict[str, Step] = {}
    found = [Timed(task, processes=1 if group is None else group.world) for task in tasks]
    for timed in found:
        try:
            works[timed.task.name] = _settled(timed, device, group)
        except DoesNotFit as e:
            raise DoesNotFit(f"{e}{' beside the others: try --apart' if len(tasks) > 1 else ''}") from None
    seconds = take_turns(works, rounds, device, warmup, told)
    for timed in found:
        _conclude(timed, works[timed.task.name], seconds[timed.task.name])
    return found


def apart(
    tasks: Sequence[Task], rounds: int, warmup: int, told: Told | None = None, group: Group | None = None
) -> list[Timed]:
    """Each network has the device to itself: all in turn for half of the rounds, and all again (A B A B).

    One that does not fit has a reason instead of seconds, and the rest goes on; among several processes all ends.
    """
    found = {task.name: Timed(task, processes=1 if group is None else group.world) for task in tasks}
    done = 0  # steps of all networks
    for n in (rounds - rounds // 2, rounds // 2):
        for timed in found.values():
            if n > 0 and not timed.failure:
                try:
                    _measure_alone(timed, n, warmup, group)
                except DoesNotFit as e:
                    if group is not None and group.world > 1:
                        raise
                    timed.failure, timed.seconds = str(e), []
                _release(timed.task.compiled)
            done += n
            if told is not None:
                told(done // len(found))
    return list(found.values())


def _measure_alone(timed: Timed, rounds: int, warmup: int, group: Group | None) -> None:
    device = torch.device(timed.task.device)
    work = _settled(timed, device, group)
    _conclude(timed, work, take_turns({"": work}, rounds, device, warmup)[""])


def _settled(timed: Timed, device: torch.device, group: Group | None) -> Step:
    """The step, run twice: then it is compiled, fits, and holds what it will hold; the peak is that of the second."""
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    try:
        work = step(timed.task, group)
        work()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        work()
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        raise DoesNotFit(f"{timed.task.model} does not fit, even one image at a time") from None
    if device.type == "cuda":
        timed.memory = max(timed.memory or 0, torch.cuda.max_memory_allocated(device) - before)
    return work


def _conclude(timed: Timed, work: Step, seconds: list[float]) -> None:
    timed.seconds += seconds
    timed.micro_batch = work.micro_batch
    timed.finite = timed.finite and work.is_finite()


def _release(compiled: bool) -> None:
    """Give back what a network leaves behind: compiled programs hold its weights."""
    if compiled:
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def rows(found: Sequence[Timed], peak: float) -> list[dict[str, Any]]:
    """A dictionary for each; ratios are to the first that was measured, round by round. `peak` is a rate, of `peak`."""
    first = next((timed.seconds for timed in found if timed.seconds), [])
    return [_row(timed, first, peak) for timed in found]


def _row(timed: Timed, first: list[float], peak: float) -> dict[str, Any]:
    task = timed.task
    about = {"name": task.name, "size": task.size, "batch": task.batch}
    if not timed.seconds:
        return about | {"failure": timed.failure}
    times, work = spread(timed.seconds), step_multiply_adds(task)
    rate = work / times["median"]
    return about | {
        "seconds": times,
        "to_first": ratio(timed.seconds, first),
        "images_per_second": timed.processes * task.batch / times["median"],
        "peak_memory": timed.memory,  # bytes of a process; None on a CPU, where it cannot be told apart
        "multiply_adds": work,  # of a process, as those below
        "multiply_adds_per_second": rate,
        "share_of_peak": rate / peak,
        "micro_batch": timed.micro_batch,
        "remat": task.remat,
        "fitted": fitted(timed),
        "finite": timed.finite,
    }


def fitted(timed: Timed) -> str:
    """How the step was made to fit, in words; "" where it is the whole batch at once."""
    task, words = timed.task, []
    if timed.micro_batch is not None and timed.micro_batch < task.batch:
        words.append(f"micro-batches of {timed.micro_batch}")
    if task.remat != "none":
        words.append("remat" if task.model.startswith("timm:") else f"remat of each {task.remat}")
    return ", ".join(words)

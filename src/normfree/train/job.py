"""What a run consists of while it runs, and the ways in which it ends early."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from normfree.config import Run, UserError
from normfree.data.crop import TrainCrop
from normfree.data.loader import Loading
from normfree.data.sources import Source
from normfree.distributed import Group
from normfree.optim.shards import local
from normfree.runlog import Screen
from normfree.train.record import RunFolder
from normfree.train.step import Learner


class Diverged(UserError):
    """The loss is not finite."""


class Stopped(Exception):
    """The run was asked to stop; `exit_code` is what the process should end with.

    saved: a checkpoint first. Otherwise there was nothing to save.
    """

    def __init__(self, exit_code: int, saved: bool = True) -> None:
        super().__init__("stopped by a signal")
        self.exit_code, self.saved = exit_code, saved


@dataclass
class State:
    """What a checkpoint holds beside the tensors. All processes of a run have the same, but for `sums`."""

    step: int = 0  # optimizer steps done
    taken: int = 0  # batches used for them: more, where a step was left out since something was not finite
    skipped: int = 0  # steps that were left out
    in_a_row: int = 0  # of them, the last ones without another between
    attempt: int = 0  # times that the run went back to a checkpoint, for too many of them in a row
    micro_batch: int | None = None  # images at once
    loss_scale: dict[str, float] = field(default_factory=dict)  # of float16
    clipped: dict[str, list[int]] = field(default_factory=dict)  # units clipped and looked at since the last evaluation
    evaluated: int = -1  # the step of the last evaluation
    best: tuple[float, float] = (-1.0, 0.0)  # (top-1 or average precision, -loss) of the best weights so far
    best_is: str = ""  # "raw" or "ema", and the step
    seconds: float = 0.0  # spent in the loop
    line_seconds: float = 0.0  # of them, until the last line or evaluation
    sums: list[float] = field(default_factory=lambda: [0.0] * 4)  # as Learner.step returns, since the last line
    sums_by_rank: list[list[float]] = field(default_factory=list)  # of each process, where they differ
    images: int = 0  # behind the sums
    bad: dict[str, str] = field(default_factory=dict)  # reason by name of training images that could not be read
    bad_val: dict[str, str] = field(default_factory=dict)  # and of validation images
    last: dict[str, dict[str, float]] = field(default_factory=dict)  # scores of the last evaluation, raw and ema
    data: str = ""  # fingerprints of the sources, so that a resumed run sees the same samples
    settings: str = ""  # hash of the settings, so that a resumed run has the same


@dataclass
class Job:
    """What does not change during a run."""

    run: Run
    folder: RunFolder
    train: Source
    val: Source
    crop: TrainCrop
    learner: Learner
    total: int  # steps
    evaluate_at: frozenset[int]  # steps
    screen: Screen
    group: Group = field(default_factory=Group.alone)

    @property
    def loading(self) -> Loading:
        """How batches are made, of training images and of others."""
        d = self.run.data
        return Loading(d.workers, self.run.train.device.startswith("cuda"), d.timeout)


def is_dealt(job: Job) -> bool:
    """Whether the processes hold a part of the weights each."""
    return job.run.train.sharded and job.group.world > 1


def diagnosis(job: Job, state: State) -> str:
    """Where a loss that is not finite may come from, and what to change."""
    o = job.run.optim
    parameters = job.learner.model.named_parameters()
    gone = [n for n, p in parameters if not finite(p) or not finite(p.grad)]
    clipping = f" or --optim.clipping (now {o.clipping:g})" if o.kind in ("agc", "adamw", "norm") else ""
    where = f"; the first weight or gradient that is not: {gone[0]}" if gone else ""
    left_out = f", {state.skipped} steps were left out and {state.attempt} times the run went back" * (
        state.skipped > 0
    )
    half = " It trains in float16: try --train.precision bf16." if job.run.train.precision == "fp16" else ""
    lower = f"--optim.lr (now {o.lr:g}){clipping}"
    return f"the loss is not finite by step {state.step}{left_out}{where}.{half} Lower {lower} and start a new run"


def finite(x: torch.Tensor | None) -> bool:
    """Whether all of a tensor is, if there is one."""
    return x is None or bool(torch.isfinite(local(x)).all())


def note_bad(job: Job, source: Source, bad: list[Any], known: dict[str, str]) -> None:
    """Say and keep which images could not be read, (index, reason) each; too many of a source end the run."""
    for index, reason in bad:
        name = source.name(index)
        if name not in known:
            known[name] = reason
            job.screen.say(f"skipped {name}: {reason}")
    share = job.run.data.bad_images
    if len(known) > (max(share * len(source), 1) if share else 0):  # one alone is no share
        name, reason = next(iter(known.items()))
        raise UserError(
            f"{len(known)} images cannot be read, more than --data.bad-images {share:g} of {len(source)}; the first is "
            f"{name}: {reason}"
        )

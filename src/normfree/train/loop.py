"""The training loop: one function, and what it needs at its beginning and end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from normfree.config import Run, UserError, check_ranges, flat, settings_hash
from normfree.data.crop import TrainCrop
from normfree.data.loader import Batch, Loading, train_batches
from normfree.data.sources import ArraySource, Source, fingerprint, several_labels
from normfree.evaluate import Interrupted, infer_all, score
from normfree.files import write_json
from normfree.models import Network, model_config, parse_options, with_options
from normfree.models.download import find_weights
from normfree.models.weights import describe, save_weights
from normfree.nn.loss import balanced_weights
from normfree.runlog import ProgressLine, Screen, duration, percent
from normfree.train.build import build_learner, eval_preprocessing, lambdas_by_name, train_crop, unclipped_names
from normfree.train.checkpoint import has_checkpoint, load_checkpoint, save_checkpoint
from normfree.train.length import run_length
from normfree.train.record import RunFolder
from normfree.train.signals import StopRequest
from normfree.train.step import Learner, Outcome


class Diverged(UserError):
    """The loss is not finite."""


class Stopped(Exception):
    """The run was asked to stop, and saved a checkpoint first; `exit_code` is what the process should end with."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("stopped by a signal")
        self.exit_code = exit_code


@dataclass
class State:
    """What a checkpoint holds beside the tensors."""

    step: int = 0  # optimizer steps done
    taken: int = 0  # batches used for them: more, where float16 overflowed and a step was left out
    micro_batch: int | None = None  # images at once
    loss_scale: dict[str, float] = field(default_factory=dict)  # of float16
    clipped: dict[str, list[int]] = field(default_factory=dict)  # units clipped and looked at since the last evaluation
    evaluated: int = -1  # the step of the last evaluation
    best: tuple[float, float] = (-1.0, 0.0)  # (top-1 or average precision, -loss) of the best weights so far
    best_is: str = ""  # "raw" or "ema", and the step
    seconds: float = 0.0  # spent in the loop
    line_seconds: float = 0.0  # of them, until the last line or evaluation
    sums: list[float] = field(default_factory=lambda: [0.0] * 4)  # as Learner.step returns, since the last line
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


def check_run(run: Run, train: Source) -> None:
    """Settings that are each in range can still not go together, or not with these training images.

    Raises:
        UserError: says which.
    """
    check_ranges(flat(run))
    d, o = run.data, run.optim
    with torch.device("meta"):  # options that do not go together are found when the network is made
        model = Network(with_options(model_config(run.model.name), parse_options(run.model.options)))
    unclipped_names(model, o.unclipped)
    lambdas_by_name(model, o.lambdas)
    if run.train.remat != "none" and model.config.norm == "batch":
        raise UserError("train.remat would move the running statistics of batch norm twice a step; leave it at none")
    eval_preprocessing(run)
    train_crop(run)
    if run.train.batch_size > len(train):
        raise UserError(f"train.batch_size {run.train.batch_size} is more than the {len(train)} training images")
    if several_labels(train) and o.loss != "sigmoid":
        raise UserError("images with several labels need --optim.loss sigmoid")
    if o.class_weights == "balanced" and o.loss == "sigmoid":
        raise UserError("optim.class_weights balanced goes with the softmax loss: it would weigh what is no class too")
    if o.warmup >= run.train.epochs and o.warmup > 0:
        raise UserError(f"optim.warmup {o.warmup:g} leaves none of {run.train.epochs:g} epochs to train in; lower it")
    if o.sam_rho and o.sam_every % 2 == 0 and d.mixup and d.cutmix:
        raise UserError("optim.sam_every must be odd, so that the ascent sees MixUp (even slots) and CutMix (odd ones)")


def prepare(run: Run, folder: RunFolder, train: Source, val: Source, screen: Screen) -> Job:
    """Build the learner and lay out the steps."""
    length = run_length(run, len(train))
    learner = build_learner(run, len(train.classes), length, eval_preprocessing(run))
    if run.optim.class_weights == "balanced":
        weights = balanced_weights(torch.from_numpy(train.labels), len(train.classes))
        learner.class_weights = weights.to(run.train.device)
    return Job(run, folder, train, val, train_crop(run), learner, length.total, length.evaluate_at(), screen)


def fit(job: Job, state: State) -> State:
    """Train from a state to the end of the run.

    Raises:
        Stopped: by a signal, after saving.
        Diverged: the loss is not finite; the last checkpoint is from before.
    """
    began = time.monotonic() - state.seconds
    sums = torch.tensor(state.sums, dtype=torch.float64, device=job.run.train.device)
    batches = _batches(job, state.taken)
    waited = 0.0  # for batches, since the last line
    with StopRequest() as stop, job.screen.progress(job.total, state.step) as line:
        while True:
            evaluated = state.step in job.evaluate_at and state.evaluated != state.step
            if evaluated:
                _evaluate(job, state, lambda: stop.received is not None)
                state.line_seconds = time.monotonic() - began
            if evaluated or stop.received is not None:
                state.seconds, state.sums = time.monotonic() - began, sums.tolist()
                _save(job, state)
            if stop.received is not None:
                raise Stopped(stop.exit_code)
            if state.step == job.total:
                return state
            waiting = time.monotonic()
            batch = next(batches, None)
            waited += time.monotonic() - waiting
            if batch is None:  # float16 left out as many steps as were due
                raise Diverged(_diagnosis(job, state))
            outcome = _step(job, batch, state)
            state.taken += 1
            _note_bad(job, job.train, batch.bad, state.bad)
            if not outcome.applied:
                continue
            sums += outcome.sums
            state.step, state.images = state.step + 1, state.images + job.run.train.batch_size
            line.advance(state.step)
            if state.step % job.run.train.log_every == 0 or state.step in job.evaluate_at:
                state.seconds = time.monotonic() - began
                _log(job, state, sums.tolist(), waited, line)
                sums.zero_()
                state.images, state.line_seconds, waited = 0, state.seconds, 0.0


def _step(job: Job, batch: Batch, state: State) -> Outcome:
    """A step, and a word if the batch had to be split."""
    before = job.learner.micro_batch
    outcome = job.learner.step(batch, state.taken, state.step)
    if job.learner.micro_batch != before:
        job.screen.say(f"out of memory: from here on {job.learner.micro_batch} images at once, added up to the batch")
    return outcome


def _batches(job: Job, start: int) -> Iterator[Batch]:
    d, t = job.run.data, job.run.train
    # float16 may leave steps out, which are made up for with further batches
    steps = range(start, 2 * job.total if t.precision == "fp16" else job.total)
    loading = Loading(d.workers, t.device.startswith("cuda"), d.timeout)
    read, device = t.batch_size * job.learner.augment.reads, torch.device(t.device)
    return train_batches(job.train, job.crop, t.seed, read, steps, loading, device=device)


def _log(job: Job, state: State, sums: list[float], waited: float, line: ProgressLine) -> None:
    loss, hits, clipped, units = sums
    if not math.isfinite(loss):
        raise Diverged(_diagnosis(job, state))
    seconds = state.seconds - state.line_seconds
    numbers: dict[str, Any] = {
        "kind": "train",
        "step": state.step,
        "epoch": state.step * job.run.train.batch_size / len(job.train),
        "loss": loss / state.images,
        "top1": hits / state.images,
        "lr": job.learner.schedule(state.step - 1),
        "clip_share": clipped / units if units else 0.0,
        "images_per_second": state.images / max(seconds, 1e-9),
        "wait_share": min(1.0, waited / max(seconds, 1e-9)),  # of the time, for the loader
        "seconds": state.seconds,
    }
    job.folder.append_metrics(numbers)
    line.update(
        state.step,
        f"loss {numbers['loss']:.3f} top-1 {100 * numbers['top1']:.1f}% lr {numbers['lr']:.3g} "
        f"clip {100 * numbers['clip_share']:.1f}% {numbers['images_per_second']:.0f} img/s "
        f"wait {100 * numbers['wait_share']:.0f}%",
    )


def _diagnosis(job: Job, state: State) -> str:
    o = job.run.optim
    gone = [n for n, p in job.learner.model.named_parameters() if not torch.isfinite(p).all()]
    clipping = f" or --optim.clipping (now {o.clipping:g})" if o.kind in ("agc", "adamw", "norm") else ""
    where = f"; the first weights that are not finite: {gone[0]}" if gone else ""
    lower = f"--optim.lr (now {o.lr:g}){clipping}"
    return f"the loss is not finite by step {state.step}{where}. Lower {lower} and start a new run"


def _evaluate(job: Job, state: State, should_stop: Callable[[], bool]) -> None:
    """Score the raw and the averaged weights, keep the better ones if they are the best so far."""
    d, t = job.run.data, job.run.train
    models = {"raw": job.learner.model, "ema": job.learner.ema.module}
    loading = Loading(d.workers, t.device.startswith("cuda"), d.timeout)
    try:
        outputs = infer_all(
            list(models.values()), job.val, job.learner.preprocessing, t.eval_batch_size, loading, should_stop
        )
    except Interrupted:
        return  # still due: the loop saves, and the next process evaluates
    _note_bad(job, job.val, outputs[0].bad, state.bad_val)
    scores = {kind: score(out, job.run.optim.loss) for kind, out in zip(models, outputs, strict=True)}
    for kind, found in scores.items():
        if not math.isfinite(found.loss):
            raise Diverged(_diagnosis(job, state))
        rank = (found.value, -found.loss)
        if rank > state.best:
            state.best, state.best_is = rank, f"{kind} at step {state.step}"
            save_weights(models[kind], job.folder.weights, _about(job, kind, state.step))
    state.evaluated, state.last = state.step, {kind: s.as_dict() for kind, s in scores.items()}
    epoch = state.step * t.batch_size / len(job.train)
    line = {"kind": "eval", "step": state.step, "epoch": epoch, "clipped": job.learner.clipped_shares()}
    job.folder.append_metrics(line | state.last)
    raw, averaged = scores["raw"], scores["ema"]
    job.screen.say(
        f"epoch {epoch:5.1f}  {raw.measure} {percent(raw.value)}, averaged {percent(averaged.value)}  "
        f"loss {raw.loss:.3f}, {averaged.loss:.3f}  {duration(state.seconds)}"
    )


def _about(job: Job, kind: str, step: int) -> dict[str, Any]:
    return describe(job.learner.model) | {
        "classes": list(job.train.classes),
        "preprocessing": asdict(job.learner.preprocessing),
        "eval_batch_size": job.run.train.eval_batch_size,
        "loss": job.run.optim.loss,
        "weights": kind,
        "step": step,
    }


def _note_bad(job: Job, source: Source, bad: list[tuple[int, str]], known: dict[str, str]) -> None:
    """Say and keep which images could not be read; too many of a source end the run."""
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


def _save(job: Job, state: State) -> None:
    if not math.isfinite(state.sums[0]):
        raise Diverged(_diagnosis(job, state))
    state.micro_batch = job.learner.micro_batch
    state.clipped = {n: list(units) for n, units in job.learner.clipped_units().items()}
    if job.learner.scaler is not None:
        state.loss_scale = job.learner.scaler.state_dict()
    save_checkpoint(job.folder.checkpoints, state.step, job.learner.tensors(), asdict(state))


def begin(job: Job) -> State:
    """The state before the first step, with the weights to start from, if the run names some."""
    model = job.run.model
    if model.weights is not None:
        job.screen.say(f"starting from {job.learner.start_from(find_weights(model.name, model.weights))}")
    return State(data=_fingerprints(job), settings=settings_hash(job.run))


def _fingerprints(job: Job) -> str:
    return f"{fingerprint(job.train)} {fingerprint(job.val)}"


def resume(job: Job) -> State:
    """The state of the newest whole checkpoint, with the learner filled from it; a new one if none was ever saved."""
    if not has_checkpoint(job.folder.checkpoints):
        job.folder.truncate_metrics(0, -1)
        job.screen.say(f"{job.folder.path} has no checkpoint yet: starting at its beginning")
        return begin(job)
    checkpoint = load_checkpoint(job.folder.checkpoints)
    for problem in checkpoint.rejected:
        job.screen.say(f"passed over a broken checkpoint: {problem}")
    state = State(**checkpoint.state | {"best": tuple(checkpoint.state["best"])})
    if state.settings != settings_hash(job.run):
        raise UserError(f"{job.folder.config} is not what its checkpoints were made with; put it back as it was")
    if state.data != _fingerprints(job):
        raise UserError(
            f"the images in {job.run.data.root} are not those that {job.folder.path} was started with, so it cannot go "
            "on as it was; put them back, or start a new run"
        )
    learner = job.learner
    learner.load_tensors(checkpoint.tensors, state.step)
    learner.micro_batch = state.micro_batch
    learner.load_clipped_units(state.clipped)
    if learner.scaler is not None and state.loss_scale:
        learner.scaler.load_state_dict(state.loss_scale)
    job.folder.truncate_metrics(state.step, state.evaluated)
    job.screen.say(f"resumed {job.folder.path} at step {state.step} of {job.total}")
    return state


def held_out(folder: RunFolder, val: Source) -> None:
    """Write down which images are held out, where the split was made here, so that every command agrees on it."""
    if val.held_out and not isinstance(val, ArraySource):
        write_json(folder.validation, [val.name(i) for i in range(len(val))])


def weights_path(folder: RunFolder) -> Path:
    """The best weights of a run. Raises UserError before the first evaluation."""
    if not folder.weights.exists():
        raise UserError(f"{folder.path} has no weights yet: its first evaluation has not ended")
    return folder.weights

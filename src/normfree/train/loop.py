"""The training loop: one function, and what it needs at its beginning and end."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from normfree.config import Run, UserError, check_ranges, flat, is_out_of_memory, settings_hash
from normfree.data.loader import Batch, train_batches
from normfree.data.sources import ArraySource, Source, fingerprint, several_labels
from normfree.distributed import Group
from normfree.models import Network, model_config, parse_options, with_options
from normfree.models.download import find_weights
from normfree.nn.loss import balanced_weights
from normfree.runlog import ProgressLine, Screen
from normfree.train.build import build_learner, eval_preprocessing, lambdas_by_name, train_crop, unclipped_names
from normfree.train.checkpoint import Checkpoint, clear, has_checkpoint, load_checkpoint
from normfree.train.evaluation import evaluate
from normfree.train.job import Diverged, Job, State, Stopped, diagnosis, is_dealt, note_bad
from normfree.train.length import run_length
from normfree.train.record import RunFolder
from normfree.train.saving import Saver, copies
from normfree.train.sharded import full_tensors
from normfree.train.share import check_share
from normfree.train.signals import EndNow, StopRequest, exit_code
from normfree.train.step import Outcome
from normfree.train.watchdog import Watchdog

_NO_LIMIT = 2**62  # images
_SAVE = 1  # in place of a signal's number, which are all greater: save and go on
_IN_A_ROW = 5  # steps that are not finite, until the run goes back to its last checkpoint
_ATTEMPTS = 3  # times that it goes back


def check_run(run: Run, train: Source, world: int = 1) -> None:
    """Settings that are each in range can still not go together, or not with these training images and processes.

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
    check_share(run, world, model.config.norm == "batch")
    if several_labels(train) and o.loss != "sigmoid":
        raise UserError("images with several labels need --optim.loss sigmoid")
    if o.class_weights == "balanced" and o.loss == "sigmoid":
        raise UserError("optim.class_weights balanced goes with the softmax loss: it would weigh what is no class too")
    if o.warmup >= run.train.epochs and o.warmup > 0:
        raise UserError(f"optim.warmup {o.warmup:g} leaves none of {run.train.epochs:g} epochs to train in; lower it")
    if o.sam_rho and o.sam_every % 2 == 0 and d.mixup and d.cutmix:
        raise UserError("optim.sam_every must be odd, so that the ascent sees MixUp (even slots) and CutMix (odd ones)")


def prepare(run: Run, folder: RunFolder, train: Source, val: Source, screen: Screen, group: Group | None = None) -> Job:
    """Build the learner and lay out the steps."""
    group = Group.alone() if group is None else group
    length = run_length(run, len(train))
    learner = build_learner(run, len(train.classes), length, eval_preprocessing(run), group)
    if run.optim.class_weights == "balanced":
        weights = balanced_weights(torch.from_numpy(train.labels), len(train.classes))
        learner.class_weights = weights.to(run.train.device)
    return Job(run, folder, train, val, train_crop(run), learner, length.total, length.evaluate_at(), screen, group)


def fit(job: Job, state: State) -> State:
    """Train from a state to the end of the run.

    Raises:
        Stopped: by a signal, after saving; or at once, where what compiles comes before there is anything to save.
        Diverged: the loss is not finite; the last checkpoint is from before.
    """
    deaf = job.group.world > 1
    if is_dealt(job):
        job.learner.shard()
    with StopRequest(deaf) as stop, _ending_at_once(stop):
        fit_memory(job)
    began = time.monotonic() - state.seconds
    sums = torch.tensor(state.sums, dtype=torch.float64, device=job.run.train.device)
    first, batches = state.taken, _batches(job, state.taken)
    waited, saved = 0.0, time.monotonic()  # for batches, since the last line; when a checkpoint was
    bad: list[tuple[int, str]] = []  # training images that could not be read, since others were told
    with (
        StopRequest(deaf) as stop,
        Saver(job.folder.checkpoints, job.screen.say) as saver,
        Watchdog(job.run.train.watchdog) as watchdog,
        job.screen.progress(job.total, state.step) as line,
    ):
        while True:
            saver.check()
            watchdog.alive()
            due = state.step in job.evaluate_at and state.evaluated != state.step
            if due:
                saver.wait()  # no thread of it runs while loader processes are forked
                evaluate(job, state, lambda: _asked_to_stop(stop, watchdog))
                state.line_seconds = state.seconds = time.monotonic() - began
                _save(job, saver, state, sums, bad)
            waiting = time.monotonic()
            over = state.step == job.total or stop.received is not None
            batch = None if over else next(batches, None)
            waited += time.monotonic() - waiting
            if number := job.group.agree(stop.received or _is_long_ago(job, saved)):
                state.seconds = time.monotonic() - began
                if not due:
                    _save(job, saver, state, sums, bad)
                if number != _SAVE:
                    _saved(job, saver)
                    raise Stopped(exit_code(number))
            if due or number:
                saved = time.monotonic()
            if state.step == job.total:
                _saved(job, saver)
                return state
            if batch is None:  # as many steps were left out as were due
                raise Diverged(diagnosis(job, state))
            compiles = job.run.train.compile and state.taken == first
            with _ending_at_once(stop) if compiles else nullcontext():
                outcome = _step(job, batch, state)
            state.taken += 1
            bad += batch.bad
            if job.group.world == 1:
                _tell_bad(job, state, bad)
            if not outcome.applied:
                if _leave_out(job, saver, state):
                    sums = torch.tensor(state.sums, dtype=torch.float64, device=sums.device)
                continue
            state.in_a_row = 0
            sums += outcome.sums
            state.step, state.images = state.step + 1, state.images + job.run.train.batch_size
            line.advance(state.step)
            if state.step % job.run.train.log_every == 0 or state.step in job.evaluate_at:
                state.seconds = time.monotonic() - began
                _tell_bad(job, state, bad)
                _log(job, state, _whole(job, sums.tolist()), waited, line)
                sums.zero_()
                state.images, state.line_seconds, waited = 0, state.seconds, 0.0


def _asked_to_stop(stop: StopRequest, watchdog: Watchdog) -> bool:
    """Between two batches of an evaluation."""
    watchdog.alive()
    return stop.received is not None


def _is_long_ago(job: Job, saved: float) -> int:
    """_SAVE if a checkpoint is due by the clock of rank 0, otherwise 0."""
    limit = 60 * job.run.train.save_minutes
    return _SAVE if job.group.first and limit and time.monotonic() - saved > limit else 0


def fit_memory(job: Job) -> None:
    """Settle how many images are computed at once, the same for all processes, before they wait for one another."""
    learner, t, before = job.learner, job.run.train, job.learner.micro_batch
    if before is None and t.shards is None and not t.sharded and (job.group.world > 1 or t.device.startswith("cuda")):
        learner.fit_memory(job.run.data.size)
    found = [n for n in (learner.micro_batch, job.folder.read_micro_batch()) if n is not None]
    fits = -job.group.agree(-min(found, default=_NO_LIMIT))
    learner.micro_batch = fits if fits < _NO_LIMIT else None
    if learner.micro_batch != before:
        job.screen.say(f"{fits} images at once on each device, added up to the batch")


@contextmanager
def _ending_at_once(stop: StopRequest) -> Iterator[None]:
    """A block that may take minutes, since networks are compiled in it, while all that was done before is saved.

    Raises:
        Stopped: by a signal, in the middle of it.
    """
    try:
        with stop.at_once():
            yield
    except EndNow as e:
        raise Stopped(exit_code(e.number), saved=False) from None


def _step(job: Job, batch: Batch, state: State) -> Outcome:
    """A step, and a word if the batch had to be split.

    Raises:
        UserError: memory ran out, while other processes wait; half as many images at once are noted for the next start.
    """
    before = job.learner.micro_batch
    try:
        outcome = job.learner.step(batch, state.taken, state.step)
    except (RuntimeError, MemoryError) as e:
        if job.group.world == 1 or not is_out_of_memory(e):
            raise
        raise UserError(_out_of_memory(job)) from e
    if job.learner.micro_batch != before:
        job.screen.say(f"out of memory: from here on {job.learner.micro_batch} images at once, added up to the batch")
    return outcome


def _leave_out(job: Job, saver: Saver, state: State) -> bool:
    """Count a step whose loss or gradient was not finite; whether that led the run back to its last checkpoint.

    The run goes on behind the batches that it failed on, with draws of its own: a mere replay would fail again.

    Raises:
        Diverged: there is no checkpoint, or going back has not helped.
    """
    state.skipped, state.in_a_row = state.skipped + 1, state.in_a_row + 1
    scaler = job.learner.scaler
    if state.in_a_row < _IN_A_ROW or (scaler is not None and scaler.get_scale() > 1):  # it falls until it fits
        return False
    saver.wait()
    if state.attempt == _ATTEMPTS or not job.group.broadcast(has_checkpoint(job.folder.checkpoints)):
        raise Diverged(diagnosis(job, state))
    failed, checkpoint = state.step, load_checkpoint(job.folder.checkpoints, job.group)
    kept = {name: getattr(state, name) for name in ("taken", "skipped", "bad", "bad_val")}
    vars(state).update(vars(_state_of(checkpoint)) | kept | {"attempt": state.attempt + 1, "in_a_row": 0})
    at_once = job.learner.micro_batch
    _restore(job, state, checkpoint.tensors)
    job.learner.micro_batch = min(filter(None, (at_once, state.micro_batch)), default=None)  # as little as fitted since
    job.screen.say(
        f"{_IN_A_ROW} steps in a row were not finite at step {failed}: back to step {state.step}, and on with the "
        f"images behind them ({state.attempt} of {_ATTEMPTS} times)"
    )
    return True


def _out_of_memory(job: Job) -> str:
    t = job.run.train
    where = f"out of memory in a step of process {job.group.rank}"
    if t.shards is not None:
        return f"{where}; raise --train.shards (now {t.shards}), or lower --train.batch-size, in a new run"
    at_once = job.learner.at_most(len(job.learner.share(t.batch_size).slots))
    half = max(1, min(job.learner.micro_batch or at_once, at_once) // 2)
    job.folder.write_micro_batch(half)
    return f"{where}; with --resume the run goes on from its last checkpoint with {half} images at once"


def _tell_bad(job: Job, state: State, bad: list[tuple[int, str]]) -> None:
    """Let all processes know which images each could not read, so that they agree whether there are too many."""
    note_bad(job, job.train, [entry for part in job.group.gather(bad) for entry in part], state.bad)
    bad.clear()


def _whole(job: Job, sums: list[float]) -> list[float]:
    """The sums of a step's whole batch, of what `Learner.step` returned on each process."""
    if job.run.train.shards is not None:
        return sums
    return job.group.sums(sums[:2]) + sums[2:]


def _batches(job: Job, start: int) -> Iterator[Batch]:
    t = job.run.train
    # steps may be left out, which are made up for with further batches
    steps = range(start, 2 * job.total + _IN_A_ROW * (_ATTEMPTS + 1))
    reads, own, device = job.learner.augment.reads, job.learner.share(t.batch_size).slots, torch.device(t.device)
    slots = range(own.start * reads, own.stop * reads)
    return train_batches(job.train, job.crop, t.seed, t.batch_size * reads, steps, job.loading, slots, device)


def _log(job: Job, state: State, sums: list[float], waited: float, line: ProgressLine) -> None:
    loss, hits, clipped, units = sums
    if not math.isfinite(loss):
        raise Diverged(diagnosis(job, state))
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
    if job.group.first:
        job.folder.append_metrics(numbers)
    line.update(
        state.step,
        f"loss {numbers['loss']:.3f} top-1 {100 * numbers['top1']:.1f}% lr {numbers['lr']:.3g} "
        f"clip {100 * numbers['clip_share']:.1f}% {numbers['images_per_second']:.0f} img/s "
        f"wait {100 * numbers['wait_share']:.0f}%",
    )


def _save(job: Job, saver: Saver, state: State, sums: torch.Tensor, bad: list[tuple[int, str]]) -> None:
    """Begin to write a checkpoint of this very step; the training may go on at once."""
    saver.wait()  # so that there is one copy in memory and not two
    _tell_bad(job, state, bad)
    own = sums.tolist()
    state.sums, state.sums_by_rank = _whole(job, own), job.group.gather(own)
    if not math.isfinite(state.sums[0]):
        raise Diverged(diagnosis(job, state))
    state.micro_batch = job.learner.micro_batch
    state.clipped = {n: list(units) for n, units in job.learner.clipped_units().items()}
    if job.learner.scaler is not None:
        state.loss_scale = job.learner.scaler.state_dict()
    dealt = full_tensors(job.learner.tensors()) if is_dealt(job) else None
    if job.group.first:
        job.folder.sync_metrics()
        saver.begin(state.step, copies(job.learner.tensors()) if dealt is None else dealt, asdict(state))


def _saved(job: Job, saver: Saver) -> None:
    """Wait until the last checkpoint is on the disk; then all processes may end."""
    saver.wait()
    job.group.barrier()


def begin(job: Job) -> State:
    """The state before the first step, with the weights to start from, if the run names some."""
    model = job.run.model
    state = State(data=_fingerprints(job), settings=settings_hash(job.run))
    if len(set(job.group.gather(state.data))) > 1:
        raise UserError(f"the images in {job.run.data.root} are not the same for all processes")
    if model.weights is not None:
        job.screen.say(f"starting from {job.learner.start_from(find_weights(model.name, model.weights))}")
    job.group.take_first(list(job.learner.tensors().values()))
    return state


def _fingerprints(job: Job) -> str:
    return f"{fingerprint(job.train)} {fingerprint(job.val)}"


def resume(job: Job) -> State:
    """The state of the newest whole checkpoint, with the learner filled from it; a new one if none was ever saved."""
    if job.group.first:
        clear(job.folder.path)
    if not job.group.broadcast(has_checkpoint(job.folder.checkpoints)):
        if job.group.first:
            job.folder.truncate_metrics(0, -1)
        job.screen.say(f"{job.folder.path} has no checkpoint yet: starting at its beginning")
        return begin(job)
    checkpoint = load_checkpoint(job.folder.checkpoints, job.group)
    for problem in checkpoint.rejected:
        job.screen.say(f"passed over a broken checkpoint: {problem}")
    state = _state_of(checkpoint)
    if state.settings != settings_hash(job.run):
        raise UserError(f"{job.folder.config} is not what its checkpoints were made with; put it back as it was")
    if state.data != _fingerprints(job):
        raise UserError(
            f"the images in {job.run.data.root} are not those that {job.folder.path} was started with, so it cannot go "
            "on as it was; put them back, or start a new run"
        )
    _restore(job, state, checkpoint.tensors)
    job.screen.say(f"resumed {job.folder.path} at step {state.step} of {job.total}")
    return state


def _state_of(checkpoint: Checkpoint) -> State:
    try:
        return State(**checkpoint.state | {"best": tuple(checkpoint.state["best"])})
    except (TypeError, KeyError) as e:
        raise UserError(f"the checkpoint is whole, and not of this version of normfree: {e}") from e


def _restore(job: Job, state: State, tensors: dict[str, torch.Tensor]) -> None:
    """Put the learner and the lines of metrics where a state is."""
    learner = job.learner
    try:
        learner.load_tensors(tensors, state.step)
    except (KeyError, ValueError) as e:
        raise UserError(f"the checkpoint is whole, and not of this network: {e}") from e
    learner.micro_batch, learner.attempt = state.micro_batch, state.attempt
    learner.load_clipped_units(state.clipped)
    if learner.scaler is not None and state.loss_scale:
        learner.scaler.load_state_dict(state.loss_scale)
    state.sums = _own_sums(job, state)
    if job.group.first:
        job.folder.truncate_metrics(state.step, state.evaluated)


def _own_sums(job: Job, state: State) -> list[float]:
    """What this process had in its sums; where there were more processes or fewer, rank 0 takes all."""
    if len(state.sums_by_rank) == job.group.world:
        return state.sums_by_rank[job.group.rank]
    if job.group.first or job.run.train.shards is not None:
        return state.sums
    return [0.0, 0.0, *state.sums[2:]]


def held_out(val: Source) -> list[str] | None:
    """Which images are held out, where the split was made here, so that every command agrees on it."""
    return [val.name(i) for i in range(len(val))] if val.held_out and not isinstance(val, ArraySource) else None


def weights_path(folder: RunFolder) -> Path:
    """The best weights of a run. Raises UserError before the first evaluation."""
    if not folder.weights.exists():
        raise UserError(f"{folder.path} has no weights yet: its first evaluation has not ended")
    return folder.weights

"""Evaluation during a run: the scores of the raw and the averaged weights, and the best of them kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from normfree.evaluate import Interrupted, Scores, infer_all, score
from normfree.models.weights import describe, save_weights
from normfree.runlog import duration, percent
from normfree.train.job import Diverged, Job, State, diagnosis, is_dealt, note_bad
from normfree.train.sharded import gathered, whole_copy


def evaluate(job: Job, state: State, should_stop: Callable[[], bool]) -> None:
    """Score the raw and the averaged weights, keep the better ones if they are the best so far.

    Where it is asked to stop it is still due: the loop saves, and the next process evaluates.
    """
    models: dict[str, Any] = {"raw": job.learner.model, "ema": job.learner.ema.module}
    try:
        scores = _scores(job, state, models, should_stop)
    except Interrupted:
        return
    for kind, found in scores.items():
        if not math.isfinite(found.loss):
            raise Diverged(diagnosis(job, state))
        rank = (found.value, -found.loss)
        if rank > state.best:
            state.best, state.best_is = rank, f"{kind} at step {state.step}"
            whole = whole_copy(models[kind]) if is_dealt(job) else models[kind]
            if job.group.first and whole is not None:
                save_weights(whole, job.folder.weights, _about(job, kind, state.step))
    state.evaluated, state.last = state.step, {kind: s.as_dict() for kind, s in scores.items()}
    epoch = state.step * job.run.train.batch_size / len(job.train)
    line = {"kind": "eval", "step": state.step, "epoch": epoch, "clipped": job.learner.clipped_shares()}
    if job.group.first:
        job.folder.append_metrics(line | state.last)
    raw, averaged = scores["raw"], scores["ema"]
    job.screen.say(
        f"epoch {epoch:5.1f}  {raw.measure} {percent(raw.value)}, averaged {percent(averaged.value)}  "
        f"loss {raw.loss:.3f}, {averaged.loss:.3f}  {duration(state.seconds)}"
    )


def _scores(job: Job, state: State, models: dict[str, Any], should_stop: Callable[[], bool]) -> dict[str, Scores]:
    """By the kind of weights, the same on every process."""
    preprocessing, networks = job.learner.preprocessing, list(models.values())
    batch_size = job.run.train.eval_batch_size
    with gathered(*networks) if is_dealt(job) else nullcontext():
        outputs = infer_all(networks, job.val, preprocessing, batch_size, job.loading, should_stop, group=job.group)
    note_bad(job, job.val, job.group.broadcast(outputs[0].bad if outputs else []), state.bad_val)
    found = [asdict(score(out, job.run.optim.loss)) for out in outputs]
    return {kind: Scores(**s) for kind, s in zip(models, job.group.broadcast(found), strict=True)}


def _about(job: Job, kind: str, step: int) -> dict[str, Any]:
    return describe(job.learner.model) | {
        "classes": list(job.train.classes),
        "preprocessing": asdict(job.learner.preprocessing),
        "eval_batch_size": job.run.train.eval_batch_size,
        "loss": job.run.optim.loss,
        "weights": kind,
        "step": step,
    }

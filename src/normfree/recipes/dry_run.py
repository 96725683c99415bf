"""What a run would do, before it does it: its plan, and each part once on synthetic images of the true sizes."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from normfree.config import Run
from normfree.data.sources import SyntheticSource
from normfree.models import model_config, parse_options, with_options
from normfree.models.count import multiply_adds, parameters
from normfree.recipes import choose
from normfree.runlog import Screen
from normfree.train.length import run_length
from normfree.train.loop import begin, fit, prepare, resume
from normfree.train.record import RunFolder

_TRIED = 4  # images of the batch that is tried on a CPU, at most


def plan(run: Run, images: int, classes: int) -> Iterator[str]:
    """The run in numbers, a line each."""
    m, d, o, t = run.model, run.data, run.optim, run.train
    config = with_options(replace(model_config(m.name), num_classes=classes), parse_options(m.options))
    length = run_length(run, images)
    steps, per_epoch, schedule = length.total, length.per_epoch, length.schedule(o)
    warmup = schedule.warmup_steps
    shards = min(o.sam_shards, t.batch_size) if o.sam_rho else 1
    shard = -(-t.batch_size // shards)
    micro = min(t.micro_batch or shard, shard)
    yield f"recipe      {run.recipe}"
    yield f"network     {m.name}, {parameters(config):,} parameters, dropout {m.drop_rate}, depth {m.stochastic_depth}"
    yield f"images      {images:,} of {classes:,} classes, {d.size} px; validation {d.test_size} px, {d.eval_crop}"
    yield f"steps       {steps:,} of {t.batch_size} images: {t.epochs:g} epochs of {per_epoch:,.2f} steps"
    yield f"schedule    up for {warmup:,.2f} steps, then a cosine; " + ", ".join(
        f"{schedule(s):.4g} at {s:,}" for s in sorted({0, round(warmup), steps // 2, steps - 1})
    )
    sam = f"SAM {o.sam_rho:g} on every {o.sam_every}. image in {shards} shards" if o.sam_rho else "no SAM"
    clipping = {"agc": "lambda", "adamw": "lambda", "norm": "norm"}.get(o.kind)
    clipped = f"{clipping} {o.clipping:g}, " if clipping else ""
    yield f"optimizer   {o.kind}, {clipped}decay {o.weight_decay:g}, average {o.ema_decay:g}, {sam}"
    yield f"batch       {micro} images at once, {shards * -(-shard // micro)} times; {t.precision}, remat {t.remat}"
    memory = choose.step_memory(config, d.size, micro, choose.Costs.of(t, o))
    yield f"memory      about {memory / 2**30:.1f} GiB a step, without Python, torch and the loader"
    work = 3 * multiply_adds(config, d.size) * steps * t.batch_size * (1 + (1 / o.sam_every if o.sam_rho else 0))
    yield f"work        {work:.2g} multiply-adds, forward and backward"


def walk(run: Run, classes: int) -> Iterator[str]:
    """Train, evaluate, save and resume on a few images, as the run would; a line when each part is done."""
    o, t = run.optim, run.train
    on_gpu = t.device.startswith("cuda")
    batch = min(t.batch_size, t.micro_batch or t.batch_size) if on_gpu else min(t.batch_size, _TRIED)
    shards = max(1, round(o.sam_shards * batch / t.batch_size))
    tried = replace(
        run,
        train=replace(t, batch_size=batch, epochs=2.0, eval_batch_size=min(t.eval_batch_size, batch), log_every=1),
        data=replace(run.data, workers=min(run.data.workers, 2)),
        optim=replace(o, warmup=0.0, sam_shards=shards),
    )
    images, val = SyntheticSource(batch, classes, run.data.size), SyntheticSource(batch, classes, run.data.test_size)
    with tempfile.TemporaryDirectory() as scratch:
        folder, quiet = RunFolder.create(Path(scratch) / "run", tried), Screen(io.StringIO())
        began = time.monotonic()
        job = prepare(tried, folder, images, val, quiet)
        yield f"built       in {time.monotonic() - began:.1f} s, on {t.device}"
        began = time.monotonic()
        state = fit(job, begin(job))
        seconds = time.monotonic() - began
        yield f"trained     {state.step} steps of {batch} images, evaluated and saved twice, in {seconds:.1f} s"
        again = prepare(tried, folder, images, val, quiet)
        resume(again)
        saved, loaded = job.learner.tensors(), again.learner.tensors()
        if saved.keys() != loaded.keys() or not all(torch.equal(saved[n], loaded[n]) for n in saved):
            raise RuntimeError("the resumed run differs from the saved one")
        yield "resumed     bit for bit"
        if on_gpu:
            yield f"peak        {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of the device's memory"

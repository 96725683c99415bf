"""A training step written plainly, beside the trainer's: what its checks, counts, flags and agreements cost."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.queues import SimpleQueue

import torch

from normfree.config import Given, Run
from normfree.data.crop import Preprocessing
from normfree.data.loader import Batch
from normfree.data.sources import SyntheticSource
from normfree.distributed import Group
from normfree.nn.loss import sample_losses
from normfree.recipes import RECIPES
from normfree.train.build import build_learner
from normfree.train.length import Length
from normfree.train.step import Learner

_STILL = Preprocessing(32, "squash", 0, (0.5,) * 3, (0.25,) * 3)


def learner(model: str, size: int, batch: int, classes: int = 1000, group: Group | None = None) -> Learner:
    """One at its start, or a process's part of one, with the settings of a folder of images but for these."""
    given = Given(
        {
            "data.root": "images",
            "data.size": size,
            "model.name": model,
            "train.batch_size": batch,
            "train.device": "cpu",
            "train.precision": "fp32",
        }
    )
    run: Run = RECIPES["folder"](given, SyntheticSource(1000 * batch, classes, size))
    return build_learner(run, classes, Length(10.0, 1000.0), dataclasses.replace(_STILL, size=size), group)


def noise(size: int, batch: int) -> Batch:
    """A batch of labelled noise, the same each time."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (batch, size, size, 3), generator=generator, dtype=torch.uint8).permute(0, 3, 1, 2)
    labels = torch.randint(1000, (batch,), generator=generator)
    return Batch(images, labels, torch.ones(batch, dtype=torch.bool), [])


def plain_and_safe(model: str, size: int, batch: int) -> dict[str, Callable[[], object]]:
    """The two, each with a network of its own, on the same images of noise; masks are drawn alike."""
    data = noise(size, batch)
    ours, theirs = learner(model, size, batch), learner(model, size, batch)
    theirs.optimizer.skip_nonfinite = False  # type: ignore[attr-defined]
    times, plain_times = itertools.count(1), itertools.count(1)

    def safe() -> None:
        number = next(times)
        assert ours.step(data, number, number).applied

    def plain() -> None:
        number = next(plain_times)
        theirs.optimizer.zero_grad(set_to_none=True)
        x = theirs.preprocessing.normalize(data.images, torch.float32)
        logits = theirs.model(x, theirs._draws(number, batch))
        sample_losses(logits, data.labels, "softmax", theirs.run.optim.label_smoothing).mean().backward()
        for group in theirs.optimizer.param_groups:
            group["lr"] = theirs.schedule(number)
        theirs.optimizer.step()
        theirs.ema.update(theirs.model)

    return {"plain": plain, "safe": safe}


def agreement(
    model: str, size: int, batch: int, rounds: int, environments: Sequence[Mapping[str, str]]
) -> dict[str, list[float]]:
    """Seconds of "step" and of "agree", on rank 0, of processes that each have their share of a batch of noise.

    All are there when the agreement begins: one before it has waited for whoever is slower, as the next sums would.
    """
    context = multiprocessing.get_context("spawn")
    found: SimpleQueue[dict[str, list[float]]] = context.SimpleQueue()
    ranks = [context.Process(target=_agree, args=(e, model, size, batch, rounds, found)) for e in environments]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        raise RuntimeError(f"the processes ended with {[rank.exitcode for rank in ranks]}")
    return found.get()


def _agree(
    environment: Mapping[str, str],
    model: str,
    size: int,
    batch: int,
    rounds: int,
    found: SimpleQueue[dict[str, list[float]]],
) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    group = Group.from_environment()
    ours = learner(model, size, batch, group=group)
    data = noise(size, len(ours.share(batch).slots))
    seconds: dict[str, list[float]] = {"step": [], "agree": []}
    for number in range(-3, rounds):
        group.agree(0)
        began = time.perf_counter()
        assert ours.step(data, number + 4, number + 4).applied
        stepped = time.perf_counter()
        group.agree(0)
        met = time.perf_counter()
        group.agree(0)
        if number >= 0:
            seconds["step"].append(stepped - began)
            seconds["agree"].append(time.perf_counter() - met)
    group.close()
    if group.first:
        found.put(seconds)

"""A training step written plainly, beside the trainer's: what its checks, counts and flags cost."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import torch

from normfree.config import Given, Run
from normfree.data.crop import Preprocessing
from normfree.data.loader import Batch
from normfree.data.sources import SyntheticSource
from normfree.nn.loss import sample_losses
from normfree.recipes import RECIPES
from normfree.train.build import build_learner
from normfree.train.length import Length
from normfree.train.step import Learner

_STILL = Preprocessing(32, "squash", 0, (0.5,) * 3, (0.25,) * 3)


def learner(model: str, size: int, batch: int, classes: int = 1000) -> Learner:
    """One at its start, with the settings of a folder of images but for these."""
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
    run: Run = RECIPES["folder"](given, SyntheticSource(1000 * batch, size, classes))
    return build_learner(run, classes, Length(10.0, 1000.0), dataclasses.replace(_STILL, size=size))


def plain_and_safe(model: str, size: int, batch: int) -> dict[str, Callable[[], object]]:
    """The two, each with a network of its own, on the same images of noise; masks are drawn alike."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (batch, size, size, 3), generator=generator, dtype=torch.uint8).permute(0, 3, 1, 2)
    labels = torch.randint(1000, (batch,), generator=generator)
    data = Batch(images, labels, torch.ones(batch, dtype=torch.bool), [])
    ours, theirs = learner(model, size, batch), learner(model, size, batch)
    times, plain_times = itertools.count(1), itertools.count(1)

    def safe() -> None:
        number = next(times)
        assert ours.step(data, number, number).applied

    def plain() -> None:
        number = next(plain_times)
        theirs.optimizer.zero_grad(set_to_none=True)
        x = theirs.preprocessing.normalize(images, torch.float32)
        logits = theirs.model(x, theirs._draws(number, batch))
        sample_losses(logits, labels, "softmax", theirs.run.optim.label_smoothing).mean().backward()
        for group in theirs.optimizer.param_groups:
            group["lr"] = theirs.schedule(number)
        theirs.optimizer.step()
        theirs.ema.update(theirs.model)

    return {"plain": plain, "safe": safe}

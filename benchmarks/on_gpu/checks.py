"""Is it right: the device against this machine's processor, 16 bits and compiled against neither, run against run."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from normfree.bench.input import paper_crop, write_photographs
from normfree.bench.optimizer import with_gradients
from normfree.config import IMAGENET_MEAN, IMAGENET_STD, DataConfig, ModelConfig, OptimConfig, Run, TrainConfig
from normfree.data.augment import Augment
from normfree.data.autoaugment import AutoAugment
from normfree.data.crop import Preprocessing
from normfree.data.loader import Batch, Loading, train_batches
from normfree.data.mix import MixUpCutMix
from normfree.data.randaugment import OPERATIONS, RandAugment, apply_op
from normfree.data.sources import open_folder
from normfree.models import create_model
from normfree.nn.loss import sample_losses
from normfree.optim import AGCSGD, param_groups
from normfree.optim.agc import agc_factors, unit_norms
from normfree.train.build import build_learner, compile_network
from normfree.train.length import Length
from normfree.train.step import PRECISIONS, Learner
from on_gpu.common import Checks, Part, Setup, distance, farthest, without_tf32

CLASSES = 1000
TAKEN = 50  # steps before the one that is looked at: the learning rate is at its peak


class Limits(NamedTuple):
    """Of distances relative to the norm of what is compared with: the loss, all gradients as one vector, and so on."""

    logits: float
    loss: float
    gradients: float
    each_gradient: float
    weights: float


# What float32 is from float64 on a CPU, for these networks and sizes, is at most 7e-7, 4e-8, 1e-6 and 1e-5; the limits
# are 15 times that. Behind ReLU and max-pooling gradients jump where two numbers are nearly equal: there 2e-4 and 2e-3.
SMOOTH = Limits(1e-5, 1e-6, 2e-5, 2e-4, 1e-6)
ROUGH = SMOOTH._replace(gradients=3e-3, each_gradient=3e-2, weights=1e-5)
CANCELS = 1e-4  # a gradient whose norm is below this share of the largest is a sum of what cancels out
# bfloat16 on a CPU is at most 8e-3, 1.2e-4 and a cosine of 1 - 1.5e-3 from float32
BF16_LOGITS, BF16_LOSS, BF16_ANGLE = 2e-2, 1e-3, 5e-3


def limits(network: str) -> Limits:
    return ROUGH if "resnet" in network else SMOOTH


def networks(setup: Setup) -> list[tuple[str, int, int]]:
    """(name, side in pixels, images)."""
    real = [("nfnet_f0", 128, 8), ("nf_resnet50", 128, 8), ("nf_regnet_b0", 128, 8), ("nfnet_tiny", 32, 32)]
    return setup.pick(real, [("nfnet_tiny", 32, 4)])


def learner(name: str, size: int, n: int, device: str, precision: str = "fp32", rho: float = 0.0) -> Learner:
    """As the paper trains, with all of the augmentation, and with every part of the network awake."""
    mixing: dict[str, Any] = {"mixup": 0.2, "cutmix": True, "randaugment": 4}
    data = DataConfig("nowhere", size, size, "box", 0.08, 0, 0.0, 0.0, True, "squash", 32, **mixing)
    optim = OptimConfig(lr=0.1, clipping=0.01, warmup=0.0, sam_rho=rho)
    train = TrainConfig(epochs=1.0, batch_size=n, device=device, precision=precision)
    preprocessing = Preprocessing(size, "squash", 32, IMAGENET_MEAN, IMAGENET_STD)
    run = Run("gpu", ModelConfig(name), data, optim, train)
    found = build_learner(run, CLASSES, Length(1000.0, 1000.0), preprocessing)
    waken(found.model)
    found.ema.module.load_state_dict(found.model.state_dict())
    return found


@torch.no_grad()
def waken(model: torch.nn.Module) -> None:
    """SkipInit, gains, biases and classifiers that start at 0 or 1 leave parts of a network unseen."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator).to(p.device)
        if "skip_gain" in name:
            p.fill_(0.5).add_(noise, alpha=0.1)
        elif p.ndim == 1:
            p.add_(noise, alpha=0.1)
        elif not p.any():
            p.copy_(noise * 0.01)


def batch(size: int, n: int, seed: int = 0) -> Batch:
    """For N outputs: 2N images on the host."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (2 * n, size, size, 3), generator=generator, dtype=torch.uint8).permute(0, 3, 1, 2)
    return Batch(pixels, torch.arange(2 * n) % CLASSES, torch.ones(2 * n, dtype=torch.bool), [])


def logits(found: Learner, images: Tensor) -> Tensor:
    """Of evaluation, in the precision of training."""
    model, dtype = found.model.eval(), PRECISIONS[found.run.train.precision]
    with torch.no_grad():
        out: Tensor = model(found.preprocessing.normalize(images.to(model.fc.weight.device), dtype))
    model.train()
    return out


def joined(tensors: Mapping[str, Tensor]) -> Tensor:
    """One vector of all, in the order of their names, in float64 on the host."""
    return torch.cat([tensors[name].detach().double().cpu().flatten() for name in sorted(tensors)])


def stepped(found: Learner, work: Batch) -> tuple[float, dict[str, Tensor]]:
    """Mean loss and gradients of one step, after it."""
    sums = found.step(work, TAKEN, TAKEN).sums.cpu()
    gradients = {n: p.grad.clone() for n, p in found.model.named_parameters() if p.grad is not None}
    return float(sums[0]) / found.run.train.batch_size, gradients


def parity(setup: Setup) -> dict[str, Any]:
    """float32 there and here: logits, loss, gradients, and what a whole step leaves."""
    without_tf32()
    checks = Checks()
    for name, size, n in networks(setup):
        here, there = learner(name, size, n, "cpu"), learner(name, size, n, setup.device)
        compare(checks, name, there, here, batch(size, n))
        off, worst = farthest(there.tensors(), here.tensors(), CANCELS)
        what = f"{name}: weights, average and momentum after the step, worst {worst}"
        checks.at_most(what, off, limits(name).each_gradient)
        off, worst = farthest(there.model.state_dict(), here.model.state_dict(), CANCELS)
        checks.at_most(f"{name}: weights after the step, worst {worst}", off, limits(name).weights)
    return checks.result()


def compare(checks: Checks, label: str, found: Learner, expected: Learner, work: Batch) -> None:
    """Two learners in float32: logits, then loss and gradients of a step."""
    limit = limits(label)
    checks.at_most(
        f"{label}: logits", distance(logits(found, work.images), logits(expected, work.images)), limit.logits
    )
    (loss, gradients), (other_loss, others) = stepped(found, work), stepped(expected, work)
    checks.at_most(f"{label}: loss", abs(loss / other_loss - 1), limit.loss)
    checks.at_most(f"{label}: gradients together", distance(joined(gradients), joined(others)), limit.gradients)
    off, worst = farthest(gradients, others, CANCELS)
    checks.at_most(f"{label}: each gradient, worst {worst}", off, limit.each_gradient)


def compare_bf16(checks: Checks, label: str, found: Learner, expected: Learner, work: Batch) -> None:
    """The same, where one has 16 bits at least."""
    off = distance(logits(found, work.images), logits(expected, work.images))
    checks.at_most(f"{label}: logits", off, BF16_LOGITS)
    (loss, gradients), (other_loss, others) = stepped(found, work), stepped(expected, work)
    checks.at_most(f"{label}: loss", abs(loss / other_loss - 1), BF16_LOSS)
    angle = 1 - torch.cosine_similarity(joined(gradients), joined(others), dim=0).item()
    checks.at_most(f"{label}: 1 - cosine of the gradients together", angle, BF16_ANGLE)


def bf16(setup: Setup) -> dict[str, Any]:
    """bfloat16 against float32, both there."""
    without_tf32()
    checks = Checks()
    for name, size, n in networks(setup):
        half, full = (learner(name, size, n, setup.device, precision) for precision in ("bf16", "fp32"))
        compare_bf16(checks, name, half, full, batch(size, n))
    return checks.result()


def compiled(setup: Setup) -> dict[str, Any]:
    """A network compiled as --train.compile does, CUDA graphs and all, against the plain one, both there."""
    without_tf32()
    checks = Checks()
    name, size, n = networks(setup)[0]
    for precision, check in (("fp32", compare), ("bf16", compare_bf16)):
        quick, plain = (learner(name, size, n, setup.device, precision) for _ in range(2))
        if setup.on_cuda:
            compile_network(quick.model)
        else:
            quick.model.compile(dynamic=False, backend="eager")
        check(checks, f"{name}, {precision}", quick, plain, batch(size, n))
    return checks.result()


def augmentation(setup: Setup) -> dict[str, Any]:
    """Every operation at every level, mixing, and all in their order: the same bits there and here."""
    checks, where = Checks(), setup.where
    shapes, levels = setup.pick(([(16, 192, 192), (6, 50, 71)], range(21)), ([(3, 20, 27)], (0, 5, 10, 15)))
    images = [_noise(shape) for shape in shapes]
    for name in OPERATIONS:
        differing = []
        for x, level, sign in itertools.product(images, levels, (1, -1)):
            center = np.stack([np.arange(len(x)) * 7 % x.shape[2], np.arange(len(x)) * 11 % x.shape[3]], -1)
            there = apply_op(name, x.to(where), level, sign, center).cpu()
            if not torch.equal(there, apply_op(name, x, level, sign, center)):
                differing.append(f"level {level}, sign {sign}, {tuple(x.shape)}")
        checks.holds(f"{name}: the same bits", not differing, differing[:5])
    for kind in ("uint8", "float16", "float32"):
        mixed = images[0][: len(images[0]) // 2 * 2].to(getattr(torch, kind))
        for operations in (RandAugment(4, 10), RandAugment(4, 15), AutoAugment()):
            augment, labels = Augment(MixUpCutMix(), operations), torch.arange(len(mixed)) % 10
            here, other = (augment(mixed.to(d), labels.to(d), 10, 3, 7) for d in (torch.device("cpu"), where))
            same = all(torch.equal(a, b.cpu()) for a, b in zip(here, other, strict=True))
            checks.holds(f"mixing of {kind}, then {operations}: the same bits and targets", same)
    return checks.result()


def _noise(shape: tuple[int, int, int]) -> Tensor:
    """(N, 3, H, W) uint8, channels last, with dark and light images among them."""
    n, height, width = shape
    x = np.random.default_rng(0).integers(0, 256, (n, height, width, 3))
    x[0] //= 4
    x[1] = 128 + x[1] // 3
    return torch.from_numpy(x.astype(np.uint8)).permute(0, 3, 1, 2)


def loader(setup: Setup) -> dict[str, Any]:
    """Batches that are copied from pinned memory beside the computation are those of this machine."""
    checks, steps, n = Checks(), range(setup.pick(12, 3)), setup.pick(32, 2)
    busy = torch.randn(setup.pick(4096, 16), setup.pick(4096, 16), device=setup.where)
    with tempfile.TemporaryDirectory() as scratch:
        write_photographs(Path(scratch), setup.pick(64, 4))
        source, crop = open_folder(Path(scratch)), paper_crop(setup.pick(192, 32))
        expected = list(train_batches(source, crop, 0, n, steps))
        for workers in setup.pick((0, 2, 8), (0,)):
            how, same = Loading(workers, pin=setup.on_cuda), 0
            for found, here in zip(
                train_batches(source, crop, 0, n, steps, how, device=setup.where), expected, strict=True
            ):
                busy = (busy @ busy).clamp(-1, 1)
                kept = found.images * 1  # used on the stream that computes, while the next one is on its way
                same += torch.equal(kept.cpu(), here.images) and torch.equal(found.labels.cpu(), here.labels)
            checks.holds(f"{workers} loader processes: the same batches", same == len(steps), f"{same} of {len(steps)}")
    return checks.result()


def agc(setup: Setup) -> dict[str, Any]:
    """Adaptive gradient clipping there and here: factors, which units are clipped, and three steps of the optimizer."""
    without_tf32()
    checks = Checks()
    here = create_model(setup.pick("nfnet_f0", "nfnet_tiny"))
    waken(here)
    with_gradients(here)
    there = create_model(setup.pick("nfnet_f0", "nfnet_tiny")).to(setup.where)
    again = create_model(setup.pick("nfnet_f0", "nfnet_tiny")).to(setup.where)
    for copy in (there, again):
        copy.load_state_dict(here.state_dict())
        for a, b in zip(copy.parameters(), here.parameters(), strict=True):
            a.grad = None if b.grad is None else b.grad.to(setup.where)
    _compare_factors(checks, here, there)
    optimizers = [AGCSGD(param_groups(m), lr=0.1) for m in (here, there, again)]
    for step in range(3):
        for optimizer in optimizers:
            optimizer.step()
        off, worst = farthest(dict(there.named_parameters()), dict(here.named_parameters()))
        checks.at_most(f"weights after {step + 1} steps, worst {worst}", off, 1e-6)
        same = all(torch.equal(a, b) for a, b in zip(there.parameters(), again.parameters(), strict=True))
        checks.holds(f"the same bits in another run, after {step + 1} steps", same)
    return checks.result()


@torch.no_grad()
def _compare_factors(checks: Checks, here: torch.nn.Module, there: torch.nn.Module) -> None:
    far, wrong, units = 0.0, 0, 0
    for own, other in zip(param_groups(here), param_groups(there), strict=True):
        if own["clipping"] is None:
            continue
        grads, others = ([p.grad for p in g["params"]] for g in (own, other))
        rule = (own["clipping"], 1e-3, own["unit_dim"], own["unit_groups"])
        expected = agc_factors(own["params"], grads, *rule).factors
        found = agc_factors(other["params"], others, *rule).factors
        for p, g, a, b in zip(own["params"], grads, expected, found, strict=True):
            b = b.cpu()
            far = max(far, float(((a - b).abs() / a).max()))
            limit = rule[0] * unit_norms(p, *rule[2:]).clamp_min(rule[1])
            clear = (unit_norms(g, *rule[2:]) / limit - 1).abs() > 1e-5
            wrong += int((((a < 1) != (b < 1)) & clear.view(a.shape)).sum())
            units += a.numel()
    checks.at_most("factors, relative", far, 1e-5)
    checks.at_most(
        f"units of {units} that one clips and the other does not, farther than 1e-5 from the limit", wrong, 0
    )


def waiting(setup: Setup) -> dict[str, Any]:
    """A step waits for the device once, for whether its gradients are finite. Every line in which it does is named."""
    checks = Checks()
    name, size, n = setup.pick(("nfnet_f0", 128, 8), ("nfnet_tiny", 32, 4))
    cases = [("fp32", 0.0, None), ("bf16", 0.0, None), ("bf16, micro-batches", 0.0, 4), ("bf16, SAM", 0.05, None)]
    for label, rho, micro in [*cases, ("fp16, whose loss scale is read", 0.0, None)]:
        found = learner(name, size, n, setup.device, setup.pick(label[:4], "fp32"), rho)
        found.micro_batch = micro
        work = batch(size, n)
        if setup.on_cuda:
            work = work._replace(images=work.images.pin_memory(), labels=work.labels.pin_memory())
        for step in range(3):
            found.step(work, step, step)
        places = waits(setup, lambda learned=found, given=work: learned.step(given, TAKEN, TAKEN))
        others = [place for place in places if not place.startswith("sgd.py:")]
        once = len(places) - len(others) <= 1
        checks.holds(f"{label}: waits", (once and not others) or label.startswith("fp16"), places)
    return checks.result()


def waits(setup: Setup, run: Any) -> list[str]:
    """Where it waits: "file:line: text" of each place, with how often."""
    if not setup.on_cuda:
        run()
        return []
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places: dict[str, int] = {}
    for w in seen:
        if "synchronizing" in str(w.message):
            text = Path(w.filename).read_text().splitlines()[w.lineno - 1].strip()
            place = f"{Path(w.filename).name}:{w.lineno}: {text}"
            places[place] = places.get(place, 0) + 1
    return [f"{place} ({count} times)" for place, count in places.items()]


def deterministic(setup: Setup) -> dict[str, Any]:
    """Two runs of three steps give the same bits with torch's deterministic kernels; and whether they do without."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    checks, found = Checks(), {}
    name, size, n = setup.pick(("nfnet_f0", 128, 16), ("nfnet_tiny", 32, 4))
    for precision, exact in itertools.product(("fp32", "bf16"), (True, False)):
        torch.use_deterministic_algorithms(exact)
        torch.backends.cudnn.deterministic = exact
        runs = []
        for _ in range(2):
            trained = learner(name, size, n, setup.device, precision)
            for step in range(3):
                trained.step(batch(size, n, step), step, TAKEN + step)
            runs.append(trained.tensors())
        differing = [key for key in runs[0] if not torch.equal(runs[0][key], runs[1][key])]
        if exact:
            checks.holds(f"{precision}: the same bits", not differing, differing[:5])
        else:
            found[f"{precision}, tensors that differ without"] = f"{len(differing)} of {len(runs[0])}"
    return checks.result(**found)


def losses(setup: Setup) -> dict[str, Any]:
    """The loss of extreme logits there and here."""
    checks = Checks()
    x = torch.tensor([[0.0, 80.0, -80.0], [1e4, -1e4, 0.0], [3e-8, 0.0, -3e-8]])
    for kind, smoothing in itertools.product(("softmax", "sigmoid"), (0.0, 0.1)):
        target = torch.eye(3) if kind == "sigmoid" else torch.arange(3)
        here = sample_losses(x, target, kind, smoothing)
        there = sample_losses(x.to(setup.where), target.to(setup.where), kind, smoothing)
        checks.at_most(f"{kind}, smoothing {smoothing}", distance(there, here), 1e-6)
    return checks.result()


def tests(setup: Setup) -> dict[str, Any]:
    """The project's own tests that need a device, where pytest is there."""
    root = Path(__file__).resolve().parents[2]
    has = importlib.util.find_spec("pytest") is not None
    if setup.dry or not has:
        return {"skipped": "a dry run" if setup.dry else "no pytest here"}
    # without the project's own settings, which ask for plugins that may be missing
    options = ["-q", "-m", "gpu", "-c", os.devnull, "--rootdir", str(root), "-p", "no:cacheprovider", "--tb=short"]
    files = sorted({str(p) for p in (root / "tests").glob("test_*.py") if "mark.gpu" in p.read_text()})
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files], cwd=root, capture_output=True, text=True, check=False
    )
    checks = Checks()
    checks.holds("pytest -m gpu", done.returncode == 0, done.stdout.splitlines()[-40:])
    return checks.result(files=[Path(f).name for f in files])


PARTS: dict[str, Part] = {
    "parity": Part(parity, 45, "float32 there and here: logits, loss, gradients, a step"),
    "bf16": Part(bf16, 30, "bfloat16 against float32: logits, loss, gradients"),
    "augmentation": Part(augmentation, 45, "RandAugment's operations, MixUp and CutMix: the same bits"),
    "loader": Part(loader, 20, "batches copied from pinned memory beside the computation"),
    "agc": Part(agc, 20, "clip factors, decisions, the optimizer's steps"),
    "losses": Part(losses, 10, "the loss at its ends"),
    "waiting": Part(waiting, 30, "a step does not wait for the device"),
    "deterministic": Part(deterministic, 40, "run to run, bit for bit"),
    "compiled": Part(compiled, 180, "a compiled network against the plain one"),
    "tests": Part(tests, 90, "the project's tests that need a device"),
}

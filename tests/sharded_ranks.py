"""What each rank of a sharded run does, for `test_sharded.py`: python sharded_ranks.py FOLDER WORLD...

A scene takes the folder and returns tensors, which rank 0 writes, whole, as FOLDER/WORLD/SCENE.safetensors. Those that
start from the same weights are run by the test in one process too, on plain tensors.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import normfree
from normfree.models import Network
from normfree.nn.layers import Draws
from normfree.optim import AGCSGD, EMA, LARS, SAM, clip_grad_agc_, param_groups, shards
from normfree.train.sharded import full_tensors, gathered, load_full, shard, shard_like, whole_copy

CLIPPING, EPS, BATCH = 0.05, 1e-3, 12
Tensors = dict[str, Tensor]


def network() -> Network:
    """7 classes, which neither 2 nor 3 ranks divide."""
    torch.manual_seed(0)
    return normfree.create_model("nfnet_tiny", 7, drop_rate=0.1, stochastic_depth=0.3, skip_init=0.5)


def images() -> Tensor:
    return torch.randn(BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Learner:
    """A network, its average and the optimizer, sharded over a mesh or not."""

    def __init__(self, mesh: Any = None) -> None:
        self.model = network()
        self.ema = EMA(self.model, decay=0.9)
        if mesh is not None:
            shard(self.model, mesh)
            shard(self.ema.module, mesh)
        self.groups = param_groups(self.model, weight_decay=1e-3, clipping=CLIPPING)
        self.optimizer = AGCSGD(self.groups, lr=0.1, eps=EPS)
        self.ranks = 1 if mesh is None else mesh.size()
        self.rank = 0 if mesh is None else mesh.get_rank()

    def slots(self, every: int = 1) -> range:
        """Those of a batch that are this rank's."""
        return range(BATCH * self.rank // self.ranks, BATCH * (self.rank + 1) // self.ranks)[::every]

    def backward(self, step: int, slots: range | None = None, dtype: torch.dtype = torch.float32) -> None:
        """Leave the gradient of the mean loss over the slots of all ranks."""
        slots = self.slots() if slots is None else slots
        g = torch.Generator().manual_seed(100 + step)
        keep = torch.rand(BATCH, len(self.model.blocks), generator=g)
        dropout = torch.rand(BATCH, self.model.num_features, generator=g)
        draws = self.model.draws(BATCH, keep, dropout)
        chosen = list(slots)
        assert draws.keep is not None
        assert draws.dropout is not None
        mine = Draws(draws.keep[chosen], draws.dropout[chosen])
        logits = self.model(images()[chosen].to(dtype), mine)
        losses = F.cross_entropy(logits, torch.arange(BATCH)[chosen] % 7, reduction="sum")
        (losses / (len(chosen) * self.ranks) * self.ranks).backward()

    def update(self) -> Tensors:
        """A step; the counts of clipped units by name."""
        self.optimizer.step()
        self.ema.update(self.model)
        names, clipped, units = self.optimizer.clipped_by_name()
        total, looked_at = self.optimizer.clipped_units()
        assert (int(total), looked_at) == (int(clipped.sum()), sum(units))
        return {n: torch.stack([c, torch.tensor(u)]) for n, c, u in zip(names, clipped, units, strict=True)}

    def set_gradients(self, step: int, scale: float = 1.0) -> None:
        for name, gradient in gradients(step).items():
            p = self.model.get_parameter(name)
            p.grad = shard_like(gradient * scale, p)

    def tensors(self) -> Tensors:
        found = {f"model.{n}": t for n, t in self.model.state_dict().items()}
        found |= {f"ema.{n}": t for n, t in self.ema.module.state_dict().items()}
        return found | {f"momentum.{n}": self.optimizer.momentum(p) for n, p in self.model.named_parameters()}


@cache
def gradients(step: int) -> Tensors:
    """Of sizes from far below the threshold to far above it: by row, and of vectors as a whole."""
    g = torch.Generator().manual_seed(step)
    found = {}
    for name, p in network().named_parameters():
        rows = len(p) if p.ndim > 1 else 1
        size = 10.0 ** torch.empty(rows, *[1] * (p.ndim - 1)).uniform_(-3.0, 1.0, generator=g)
        found[name] = torch.randn(p.shape, generator=g) * size * (1e-3 if p.ndim == 1 else 1.0)
    return found


def same_gradients(mesh: Any = None) -> Tensors:
    """Five steps on gradients that are given."""
    learner = Learner(mesh)
    counts: Tensors = {}
    for step in range(5):
        learner.set_gradients(step)
        counts |= {f"count{step}.{n}": c for n, c in learner.update().items()}
    return learner.tensors() | counts


def local_norms(mesh: Any = None) -> Tensors:
    """`same_gradients` with the fault that the test must see: vectors go by what is on their rank."""
    with mock.patch.object(shards, "sums_over_ranks", lambda parts, owners: list(parts)):
        return {n: t for n, t in same_gradients(mesh).items() if n.startswith("momentum.")}


def training(mesh: Any = None) -> Tensors:
    """Five steps on its own gradients, of each rank's part of the batch."""
    learner = Learner(mesh)
    found: Tensors = {}
    for step in range(5):
        learner.optimizer.zero_grad()
        learner.backward(step)
        if mesh is None:
            found |= {f"near{step}.{n}": m for n, m in near_units(learner).items()}
        found |= {f"count{step}.{n}": c for n, c in learner.update().items()}
    return learner.tensors() | found


def near_units(learner: Learner) -> Tensors:
    """How many units of each plain tensor are so near to the threshold that rounding may decide: within 1e-5 of it."""
    found = {}
    for name, p in learner.model.named_parameters():
        assert p.grad is not None
        w, g = (x.detach().double().flatten(1 if x.ndim > 1 else 0).norm(dim=-1) for x in (p, p.grad))
        found[name] = ((g / (CLIPPING * w.clamp_min(EPS)) - 1).abs() < 1e-5).sum()
    return found


def share(mesh: Any = None) -> Tensors:
    """`clip_grad_agc_` of a module, before any optimizer."""
    learner = Learner(mesh)
    learner.set_gradients(0)
    clipped = clip_grad_agc_(learner.model, clipping=CLIPPING)
    grads = {n: p.grad for n, p in learner.model.named_parameters() if p.grad is not None}
    return grads | {"share": clipped}


def lars(mesh: Any = None) -> Tensors:
    """Three steps of LARS on given gradients."""
    learner = Learner(mesh)
    optimizer = LARS(learner.groups, lr=0.5)
    for step in range(3):
        learner.set_gradients(step)
        optimizer.step()
    return learner.model.state_dict()


def given_ascent(mesh: Any = None) -> Tensors:
    """The ascent point along a given gradient, and the weights behind the descent."""
    learner = Learner(mesh)
    sam = SAM(learner.model.parameters(), rho=0.5)
    with sam.ascent():
        learner.set_gradients(0, 1e-3)
    there = {f"there.{n}": t.clone() for n, t in learner.model.state_dict().items()}
    with sam.descent():
        pass
    return there | {f"back.{n}": t for n, t in learner.model.state_dict().items()}


def sam_training(mesh: Any = None) -> Tensors:
    """Two steps of sharpness-aware training: ascents over every other sample of all ranks."""
    learner = Learner(mesh)
    sam = SAM(learner.model.parameters(), rho=0.05)
    for step in range(2):
        learner.optimizer.zero_grad()
        with sam.ascent():
            learner.backward(step, learner.slots(2))
        with sam.descent():
            learner.backward(step)
        learner.update()
    return learner.model.state_dict()


def head_only(mesh: Any = None) -> Tensors:
    """A step of the classifier alone, then one of all, with the switches of gradients in between."""
    learner = Learner(mesh)
    for step in range(2):
        learner.optimizer.zero_grad()
        for name, p in learner.model.named_parameters():
            p.requires_grad_(step > 0 or name.startswith("fc."))
        learner.backward(step)
        assert {n for n, p in learner.model.named_parameters() if p.grad is not None} == {
            n for n, p in learner.model.named_parameters() if p.requires_grad
        }
        learner.update()
    return learner.model.state_dict()


def reference_logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(images())
    return found


def saved(folder: Path, mesh: Any) -> Tensors:
    """A few steps, a plain copy written to copy.safetensors, and the logits of the sharded network itself."""
    learner = Learner(mesh)
    for step in range(2):
        learner.set_gradients(step)
        learner.update()
    copy = whole_copy(learner.model)
    assert (copy is None) == (learner.rank > 0)
    if copy is not None:
        normfree.models.weights.save_weights(copy, folder / str(mesh.size()) / "copy.safetensors")
    logits = reference_logits(learner.model)
    assert all(shards.is_sharded(p) for p in learner.model.parameters())  # an evaluation leaves nothing gathered
    return {"logits": logits}


def loaded(folder: Path, mesh: Any) -> Tensors:
    """The logits and the state of a network that takes its rows from the whole tensors in start.safetensors."""
    learner = Learner(mesh)
    load_full(learner.model, load_file(folder / "start.safetensors"))
    state = {f"model.{n}": t.clone() for n, t in learner.model.state_dict().items()}
    return state | {"logits": reference_logits(learner.model)}


def uneven_evaluation(mesh: Any) -> Tensors:
    """Ranks evaluate as many batches as each likes, before the first step too, which must not spoil it."""
    learner = Learner(mesh)
    with gathered(learner.model, learner.ema.module), torch.inference_mode():
        for _ in range(1 + 2 * learner.rank):
            logits = learner.ema.module(images())
            assert torch.equal(logits, learner.model.eval()(images()))
    learner.model.train()
    learner.backward(0)
    learner.update()
    with gathered(learner.model):
        pass
    return {"logits": logits} | learner.model.state_dict()


def ways(mesh: Any) -> Tensors:
    """How far gradients of one batch are from plain ones with maps made again, and in micro-batches that wait."""
    rows: dict[str, Tensors] = {}
    for name in ("plain", "block", "stage", "accumulated"):
        learner = Learner(mesh)
        model: Any = learner.model
        if name == "accumulated":
            for part in (0, 1):
                model.set_requires_gradient_sync(part == 1)
                learner.backward(0, learner.slots()[part::2])
        else:
            model.remat = "none" if name == "plain" else name
            learner.backward(0)
        scale = 0.5 if name == "accumulated" else 1.0
        rows[name] = {n: shards.local(p.grad) * scale for n, p in model.named_parameters()}
    return {name: _farthest_of_ranks(found, rows["plain"]) for name, found in rows.items()}


def _farthest_of_ranks(found: Tensors, expected: Tensors) -> Tensor:
    """The greatest difference relative to a tensor's greatest number, of the rows of any rank."""
    far = [(a - expected[n]).abs().max() / expected[n].abs().max().clamp_min(1e-30) for n, a in found.items() if len(a)]
    worst = torch.stack(far).max()
    torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
    return worst


def refusals(mesh: Any) -> Tensors:
    """Units that do not lie whole on a rank; a second sharding; an average of what is sharded; misfitting tensors."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    net = nn.Sequential(nn.ConvTranspose2d(6, 4, 2, groups=2), nn.Conv2d(4, 4, 1))
    fully_shard(net, mesh=mesh)
    across = nn.Linear(6, 6)
    fully_shard(across, mesh=mesh, shard_placement_fn=lambda p: Shard(p.ndim - 1))
    net(torch.ones(1, 6, 3, 3)).sum().backward()
    with _refused("transposed"):
        clip_grad_agc_(net)
    clip_grad_agc_(param_groups(net, overrides={"0.weight": None}))
    across(torch.ones(1, 6)).sum().backward()
    with _refused("dimension 0"):
        AGCSGD(across.parameters(), lr=0.1).step()
    model = Learner(mesh).model
    with _refused("already"):
        shard(model, mesh)
    with _refused("before|then shard"):
        EMA(model)
    with _refused("missing"):
        load_full(model, {})
    with _refused("shape"):
        load_full({"w": model.fc.weight}, {"w": torch.zeros(3, 3)})
    return {}


@contextmanager
def _refused(pattern: str) -> Iterator[None]:
    import re

    said = "nothing"
    try:
        yield
    except ValueError as e:
        said = str(e)
    assert re.search(pattern, said), said


def layout(mesh: Any) -> Tensors:
    """How many gains of the branches each rank has, and the types of what meets in a convolution under bfloat16."""
    learner = Learner(mesh)
    seen: list[torch.dtype] = []
    conv = learner.model.get_submodule("blocks.1.conv1")
    conv.register_forward_hook(lambda m, x, y: seen.extend([m.weight.dtype, x[0].dtype, y.dtype]))
    learner.backward(0, dtype=torch.bfloat16)
    assert seen == [torch.float32, torch.bfloat16, torch.bfloat16], seen
    grads = {n: p.grad for n, p in learner.model.named_parameters()}
    assert {g.dtype for g in grads.values() if g is not None} == {torch.float32}
    gain = learner.model.get_parameter("blocks.0.skip.skip_gain")
    here = torch.zeros(mesh.size(), dtype=torch.int64)
    here[learner.rank] = shards.local(gain).numel()
    torch.distributed.all_reduce(here)
    return {"gains": here}


def collectives(mesh: Any) -> Tensors:
    """How often all ranks speak with one another: in a step, in its counts, in clipping alone, average and ascent."""
    learner = Learner(mesh)
    learner.set_gradients(0)
    sam = SAM(learner.model.parameters())
    calls: list[int] = []
    for act in (
        learner.optimizer.step,
        lambda: [learner.optimizer.clipped_by_name(), learner.optimizer.clipped_units()],
        lambda: clip_grad_agc_(learner.groups),
        lambda: learner.ema.update(learner.model),
        sam._climb,
        sam.restore,
    ):
        with mock.patch("torch.distributed.all_reduce", wraps=torch.distributed.all_reduce) as all_reduce:
            act()
        calls.append(all_reduce.call_count)
    return {"calls": torch.tensor(calls)}


def replicated(mesh: Any) -> Tensors:
    """`share` on meshes of two dimensions, where weights are copied over the first and sharded over the second."""
    from torch.distributed.device_mesh import init_device_mesh

    shapes = ((1, mesh.size()), (mesh.size(), 1))
    found: Tensors = {}
    for i, shape in enumerate(shapes):
        two = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "rows"))
        found |= {f"{i}.{n}": t for n, t in share(two).items() if n == "share" or n.startswith(("fc", "blocks.4"))}
    return found


def not_finite(mesh: Any) -> Tensors:
    """An infinite gradient on the last rank alone, in a clipped tensor and in an exempt one: all leave the step out."""
    for name in ("blocks.0.conv0.weight", "fc.weight"):
        learner = Learner(mesh)
        learner.optimizer.skip_nonfinite = True
        learner.set_gradients(0)
        before = [shards.local(p).clone() for p in learner.model.parameters()]
        if learner.rank == mesh.size() - 1:
            shards.local(learner.model.get_parameter(name).grad)[0] = torch.inf  # type: ignore[arg-type]
        learner.optimizer.step()
        assert learner.optimizer.skipped
        now = [shards.local(p) for p in learner.model.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True))
    return {}


BOTH = (same_gradients, training)  # in one process too, and by 2 and by 3 ranks
IN_TWO = (sam_training, share, lars, given_ascent, head_only)  # in one process too, and by 2 ranks
SHARDED = (uneven_evaluation, layout)  # by 2 and by 3 ranks
SHARDED_IN_TWO = (local_norms, ways, refusals, collectives, replicated, not_finite)


def run_rank(folder: Path, rank: int, world: int) -> None:
    """All scenes, one after another."""
    from torch.distributed.device_mesh import init_device_mesh

    store = f"file://{folder / f'store{world}'}"
    torch.distributed.init_process_group("gloo", store, timedelta(seconds=60), rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    scenes: list[Callable[..., Tensors]] = [*BOTH, *SHARDED, *((*IN_TWO, *SHARDED_IN_TWO) if world == 2 else ())]
    named: dict[str, Callable[..., Tensors]] = {f.__name__: f for f in scenes}
    for name, scene in (named | {f.__name__: partial(f, folder) for f in (saved, loaded)}).items():
        tensors = full_tensors(scene(mesh=mesh))
        if rank == 0:
            save_file(tensors, folder / str(world) / f"{name}.safetensors")
    torch.distributed.destroy_process_group()


def run_world(folder: Path, world: int) -> None:
    """Fork the ranks, which have imported everything already; where one fails the others are ended."""
    (folder / str(world)).mkdir()
    ranks = [_fork(folder, rank, world) for rank in range(world)]
    left = set(ranks)
    while left:
        pid, status = os.wait()
        left.discard(pid)
        if status != 0:
            for other in left:
                os.kill(other, signal.SIGKILL)
            raise SystemExit(1)


def _fork(folder: Path, rank: int, world: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        run_rank(folder, rank, world)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    assert "torch.distributed.tensor" not in sys.modules  # what is sharded brings it, nothing else needs it
    import torch.distributed.fsdp

    torch.set_num_threads(1)
    for size in sys.argv[2:]:
        run_world(Path(sys.argv[1]), int(size))

"""Optimizers, average and ascent on sharded parameters, and sharded networks, against one process on plain tensors.

`sharded_ranks.py` has the scenes, which 2 and 3 real processes play and leave their results in files.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sharded_ranks as ranks
from normfree.models.weights import load_model
from normfree.optim import AGCSGD, EMA, LARS, SAM, clip_grad_agc_
from sharded_ranks import Tensors

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="ranks are forked")
WORLDS = pytest.mark.parametrize("world", [2, 3])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks left their results; start.safetensors is what they start from in one scene."""
    found = tmp_path_factory.mktemp("sharded")
    save_file(_moved().state_dict(), found / "start.safetensors")
    _play(found, 2, 3)
    return found


def _moved() -> nn.Module:
    """A network with other weights than the ranks have at first."""
    model = ranks.network()
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    return model


def _play(folder: Path, *worlds: int) -> None:
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    process = subprocess.Popen(
        [sys.executable, "-W", "error", str(Path(__file__).with_name("sharded_ranks.py")), folder, *map(str, worlds)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | loopback,
        start_new_session=True,
    )
    try:
        _, said = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the ranks with it
        _, said = process.communicate()
        pytest.fail(f"the ranks did not end: {said}")
    assert process.returncode == 0, said


def _found(folder: Path, world: int, scene: str) -> Tensors:
    return load_file(folder / str(world) / f"{scene}.safetensors")


@cache
def _alone(scene: Callable[..., Tensors]) -> Tensors:
    """The same in one process, on plain tensors."""
    return {name: t.detach().clone() for name, t in scene().items()}


def _distance(a: Tensor, b: Tensor) -> float:
    """Greatest difference, relative to the greatest number."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30))


def _farthest(found: Tensors, expected: Tensors) -> float:
    assert found.keys() == expected.keys()
    return max(_distance(found[n], expected[n]) for n in expected)


def _unequal(a: Tensor, b: Tensor, world: int) -> int:
    """Numbers that differ, but for the last 15 of each rank's rows, which vector instructions leave over.

    Kernels round those one by one and so in another way, wherever a tensor ends.
    """
    different = (a != b).flatten(1)
    rows = -(-len(different) // world)
    parts = [different[i : i + rows].flatten()[:-15] for i in range(0, len(different), rows)]
    return int(torch.cat(parts).sum())


@WORLDS
def test_updates_are_bit_equal_for_equal_gradients(folder: Path, world: int) -> None:
    """Five steps: weights, average, momentum. Whole vectors, whose norms are summed in another order, to 1e-6."""
    found, expected = _found(folder, world, "same_gradients"), _alone(ranks.same_gradients)
    assert _farthest(found, expected) < 1e-6
    assert {n: _unequal(found[n], x, world) for n, x in expected.items() if x.ndim > 1 and "count" not in n} == (
        dict.fromkeys((n for n, x in expected.items() if x.ndim > 1 and "count" not in n), 0)
    )


@WORLDS
def test_each_unit_is_counted_once(folder: Path, world: int) -> None:
    """Clipped and all units of every tensor at every step; both answers are among them."""
    found, expected = _found(folder, world, "same_gradients"), _alone(ranks.same_gradients)
    counts = {n: x.tolist() for n, x in expected.items() if n.startswith("count")}
    assert {n: found[n].tolist() for n in counts} == counts
    for vectors in (True, False):
        shares = [clipped / units for clipped, units in counts.values() if (units == 1) == vectors]
        assert 0.1 < sum(shares) / len(shares) < 0.9


def test_a_norm_of_the_local_part_alone_is_seen(folder: Path) -> None:
    """The negative control: without the collective, vectors are far off, and nothing else is."""
    found, expected = _found(folder, 2, "local_norms"), _alone(ranks.same_gradients)
    names = [n for n in expected if n.startswith("momentum.")]
    off = {n: _distance(found[n], expected[n]) for n in names}
    vectors = [off[n] for n in names if expected[n].ndim == 1]
    assert sum(d > 1e-2 for d in vectors) > len(vectors) / 4
    assert max(off[n] for n in names if expected[n].ndim > 1) < 1e-6


@pytest.mark.parametrize(("scene", "world"), [(ranks.training, 2), (ranks.training, 3), (ranks.sam_training, 2)])
def test_training_is_that_of_one_process(folder: Path, scene: Callable[..., Tensors], world: int) -> None:
    """Each rank has a part of the batch: steps agree to summation error, clip decisions but where rounding decides."""
    found, expected = _found(folder, world, scene.__name__), _alone(scene)
    counts = {n for n in expected if n.startswith("count")}
    near = {n: int(x) for n, x in expected.items() if n.startswith("near")}
    for n in counts:
        assert abs(int(found[n][0] - expected[n][0])) <= near[n.replace("count", "near")], n
    rest = expected.keys() - counts - near.keys()
    assert _farthest({n: found[n] for n in rest}, {n: expected[n] for n in rest}) < 1e-5


@pytest.mark.parametrize("scene", [ranks.share, ranks.lars, ranks.head_only])
def test_clipping_alone_lars_and_a_step_of_the_head(folder: Path, scene: Callable[..., Tensors]) -> None:
    """`clip_grad_agc_` of a module and its share, LARS's lengths, and parameters that have no gradient for a step."""
    assert _farthest(_found(folder, 2, scene.__name__), _alone(scene)) < 2e-6


def test_the_ascent_point_is_one_for_all_rows(folder: Path) -> None:
    """It lies rho up the whole gradient; behind the descent the weights are back, bit for bit."""
    found, expected = _found(folder, 2, "given_ascent"), _alone(ranks.given_ascent)
    assert _farthest(found, expected) < 1e-6
    start = ranks.network().state_dict()
    moved = torch.cat([(found[f"there.{n}"] - w).double().flatten() for n, w in start.items()])
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-6)
    assert all(torch.equal(found[f"back.{n}"], w) for n, w in start.items())


@WORLDS
def test_a_rank_may_have_no_rows(folder: Path, world: int) -> None:
    """SkipInit's gain, of shape (1,), is on the first rank; convolutions see float32 weights and bfloat16 maps."""
    layout = _found(folder, world, "layout")
    assert layout["gains"].tolist() == [1, *[0] * (world - 1)]


@WORLDS
def test_what_is_saved_whole_is_loaded_by_one_process(folder: Path, world: int) -> None:
    """The file of a sharded network is one of a plain network: the same logits."""
    model, _ = load_model(folder / str(world) / "copy.safetensors")
    assert torch.equal(ranks.reference_logits(model), _found(folder, world, "saved")["logits"])


@WORLDS
def test_what_one_process_saved_is_loaded_by_ranks(folder: Path, world: int) -> None:
    """Every tensor to the bit, and the same logits."""
    model, found = _moved(), _found(folder, world, "loaded")
    assert all(torch.equal(found[f"model.{n}"], w) for n, w in model.state_dict().items())
    assert torch.equal(ranks.reference_logits(model), found["logits"])


@WORLDS
def test_ranks_evaluate_as_many_batches_as_each_likes(folder: Path, world: int) -> None:
    """Raw and average, under inference mode, with the logits of one process; training goes on behind it."""
    found = _found(folder, world, "uneven_evaluation")
    assert torch.equal(found.pop("logits"), ranks.reference_logits(ranks.network()))
    learner = ranks.Learner()
    learner.backward(0)
    learner.update()
    assert _farthest(found, learner.model.state_dict()) < 1e-5


def test_recomputed_maps_and_waiting_micro_batches_change_nothing(folder: Path) -> None:
    """Gradients to the bit where maps are made again, to summation error where the sum is another."""
    far = _found(folder, 2, "ways")
    assert float(far["block"]) == float(far["stage"]) == 0.0
    assert 0 < far["accumulated"] < 1e-5


def test_copies_of_shards_clip_as_one_process(folder: Path) -> None:
    """On a mesh of two dimensions only the ranks that share the rows add up."""
    found, expected = _found(folder, 2, "replicated"), _alone(ranks.share)
    for i in range(2):
        of_mesh = {n.removeprefix(f"{i}."): t for n, t in found.items() if n.startswith(f"{i}.")}
        assert _farthest(of_mesh, {n: expected[n] for n in of_mesh}) < 1e-6
        assert len(of_mesh) > 20


def test_a_step_is_one_collective(folder: Path) -> None:
    """All norms of a step; its counts when asked; both when clipping alone; none for the average; one to ascend."""
    assert _found(folder, 2, "collectives")["calls"].tolist() == [1, 1, 2, 0, 1, 0]


def test_a_gradient_that_is_not_finite_stops_all_ranks(folder: Path) -> None:
    """The ranks have asserted it: where one has it, none moves."""
    assert _found(folder, 2, "not_finite") == {}


def test_what_cannot_be_exact_is_refused(folder: Path) -> None:
    """The ranks have asserted it: units across ranks, sharding twice, averages of shards, misfitting tensors."""
    assert _found(folder, 2, "refusals") == {}


def test_plain_tensors_need_no_distributed_parts_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some builds have none; and importing the package does not bring them (`sharded_ranks.py` asserts that)."""
    learner = ranks.Learner()
    learner.set_gradients(0)
    sam = SAM(learner.model.parameters())
    monkeypatch.setattr(torch.distributed, "all_reduce", None)
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    clip_grad_agc_(learner.model)
    learner.update()
    sam._climb()
    sam.restore()
    AGCSGD(learner.groups, lr=0.1).step()
    LARS(learner.groups, lr=0.1).step()
    EMA(learner.model).update(learner.model)

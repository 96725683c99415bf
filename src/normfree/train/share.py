"""Which part of a step's batch is whose: of a process, of a shard, of an ascent of SAM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from normfree.config import Run, UserError


class Share(NamedTuple):
    """Outputs of a step's batch that a process computes: their slots among `total`."""

    slots: range
    total: int


class Ascent(NamedTuple):
    """Of one of SAM's ascents, the slots that are this process's: those that ascend, among `seen`, and then descend."""

    few: range
    seen: int
    slots: range


def share_of(rank: int, world: int, total: int, unit: int = 1) -> Share:
    """The rank-th of `world` parts, equal to a unit: 2 where neighbours are mixed, whom nothing may part."""
    units = -(-total // unit)
    start, stop = (min(total, unit * (r * units // world)) for r in (rank, rank + 1))
    return Share(range(start, stop), total)


def ascents(share: Share, shards: int, every: int) -> Iterator[Ascent]:
    """Those of the ascents of a step in which this process has a part; slots are its own, from 0."""
    shards = min(shards, share.total)
    for s in range(shards):
        shard = range(s * share.total // shards, (s + 1) * share.total // shards)
        few = shard[::every]
        if here := _within(shard, share.slots):
            yield Ascent(_within(few, share.slots), len(few), here)


def _within(part: range, slots: range) -> range:
    """Members of a range that are in another, counted from its start."""
    step = part.step
    begin, end = (max(0, -(-(edge - part.start) // step)) for edge in (slots.start, slots.stop))
    found = part[begin:end]
    return range(found.start - slots.start, found.stop - slots.start, step)


def check_share(run: Run, world: int, batch_norm: bool) -> None:
    """The batch can be dealt to so many processes, and cut into the shards that are asked for.

    Raises:
        UserError: says which setting to change.
    """
    batch, unit = run.train.batch_size, unit_of(run)
    if world > -(-batch // unit):
        raise UserError(f"train.batch_size {batch} leaves some of {world} processes without images; raise it")
    if run.train.sharded:
        _check_sharded(run, world)
    elif run.train.shards is not None:
        _check_shards(run, world, batch_norm)
    elif run.optim.sam_rho:
        _check_ascents(run, world)


def _check_sharded(run: Run, world: int) -> None:
    """What all processes must do in step, since each pass gathers weights from all of them."""
    t, o = run.train, run.optim
    unfit = {
        "--train.shards": t.shards is not None,
        "--train.compile": t.compile,
        "--train.precision fp16": t.precision == "fp16",
        "--optim.head-only": o.head_only > 0,
        f"--optim.kind {o.kind}": o.kind not in ("agc", "sgd"),
        f"--optim.sam-shards {o.sam_shards}": o.sam_rho > 0 and o.sam_shards > 1,
    }
    if found := [name for name, given in unfit.items() if given]:
        raise UserError(f"--train.sharded does not go with {found[0]}")
    parts = world * unit_of(run) * (o.sam_every if o.sam_rho else 1)
    if t.batch_size % parts:
        raise UserError(f"with --train.sharded on {world} processes train.batch_size must be a multiple of {parts}")


def unit_of(run: Run) -> int:
    """Slots that must stay together."""
    d = run.data
    return 2 if d.pairs == "batch" and (d.mixup or d.cutmix) else 1


def _check_shards(run: Run, world: int, batch_norm: bool) -> None:
    t, o = run.train, run.optim
    shards = t.shards or 1
    if t.batch_size % (shards * unit_of(run)):
        raise UserError(
            f"train.shards {shards} must divide train.batch_size {t.batch_size} (into even parts for pairs)"
        )
    if shards % world:
        raise UserError(f"train.shards {shards} must be a multiple of the {world} processes")
    if t.micro_batch is not None and (t.batch_size // shards) % min(t.micro_batch, t.batch_size // shards):
        raise UserError(f"train.micro_batch {t.micro_batch} must divide a shard of {t.batch_size // shards} images")
    if batch_norm:
        raise UserError("train.shards is for networks without batch norm, whose statistics depend on who computes them")
    if o.sam_rho and o.sam_shards != shards:
        raise UserError(f"with train.shards {shards} each shard ascends by itself: --optim.sam-shards {shards}")


def _check_ascents(run: Run, world: int) -> None:
    batch, shards = run.train.batch_size, min(run.optim.sam_shards, run.train.batch_size)
    edges = {share_of(r, world, batch, unit_of(run)).slots.start for r in range(world)}
    ascents = {s * batch // shards for s in range(shards)}
    if (shards % world and world % shards) or not (edges <= ascents or ascents <= edges):
        raise UserError(
            f"optim.sam_shards {shards} and {world} processes do not fit: one must be a multiple of the other and both "
            f"part the batch of {batch} at the same images"
        )

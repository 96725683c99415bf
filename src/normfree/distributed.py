"""The processes that train together: which one this is, and the few things that they say to one another.

torchrun starts them, or whatever sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Words go between hosts
over gloo, as JSON and plain numbers: nothing that comes in is executed. Tensors on CUDA devices go over NCCL.

A process that fails ends. The others find its connections closed at the next thing they have to say, and end as well;
the first of them to fail is the one that says why.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Its defaults take the group that is there when it is imported, as torch's optimizers do, and would keep gloo's threads
# beyond `close`. One of them that lets go of a tensor while Python ends aborts the process, and torchrun ends the rest.
import torch.distributed.nn.functional
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from normfree.config import UserError

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_MEET = timedelta(minutes=10)  # until all processes are there
_WAIT = timedelta(minutes=30)  # for another process; rank 0 may be writing a large checkpoint


class LostPeer(UserError):
    """Another process of the run has ended, or does not answer."""


class Pending:
    """A sum over processes that is under way."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self) -> None:
        """Until the sum is there; on CUDA the current stream waits, and not this process."""
        with _listening():
            self._work.wait()


class Group:
    """Processes that do the same together; every method but `first_to_fail` is called by all of them in one order.

    rank: this one's number, of `world`; local_rank: its number on its machine. The group of one says nothing to
    nobody: every method is there and costs nothing.
    """

    def __init__(self, rank: int = 0, world: int = 1, local_rank: int = 0, store: Any = None) -> None:
        self.rank, self.world, self.local_rank = rank, world, local_rank
        self._store = store
        self._words: Any = None  # process groups of torch: None is the one of all, gloo
        self._tensors: Any = None

    @classmethod
    def alone(cls) -> Group:
        """One process by itself."""
        return cls()

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Group:
        """The group that the environment describes, once all of its processes are there; one alone if it has none.

        Raises:
            UserError: the environment is half set, or the processes cannot reach one another.
        """
        place = _place(environment)
        if place is None:
            return cls.alone()
        rank, world, local_rank = place
        try:
            shared, _, _ = next(rendezvous("env://", rank, world, timeout=_MEET))
            store = _fresh(shared, rank, world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=_WAIT)
        except (RuntimeError, ValueError, OSError) as e:
            where = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
            raise UserError(f"the processes do not find one another at {where}: {str(e).partition(chr(10))[0]}") from e
        return cls(rank, world, local_rank, store)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes and prints."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The device of this process alone, "cuda:2" for "cuda"; tensors on it go over NCCL from here on.

        Raises:
            UserError: a device by number is asked of several processes, or there are fewer devices than processes.
        """
        if self.world == 1 or not name.startswith("cuda"):
            return name
        if name != "cuda":
            raise UserError(f"each process has its own device: --train.device cuda, not {name}")
        if self.local_rank >= torch.cuda.device_count():
            devices = torch.cuda.device_count()
            raise UserError(f"there are more processes on this machine than the {devices} devices that torch finds")
        torch.cuda.set_device(self.local_rank)
        with _listening():
            self._tensors = dist.new_group(backend="nccl", timeout=_WAIT)
        return f"cuda:{self.local_rank}"

    def agree(self, flag: int) -> int:
        """The greatest of all flags."""
        if self.world == 1:
            return flag
        value = torch.tensor([flag], dtype=torch.int64)
        with _listening():
            dist.all_reduce(value, dist.ReduceOp.MAX, group=self._words)
        return int(value)

    def gather(self, value: Any) -> list[Any]:
        """What each process has, by rank, for all: anything that JSON has."""
        if self.world == 1:
            return [value]
        own = _words(value)
        with _listening():
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
            dist.all_gather(sizes, torch.tensor([len(own)]), group=self._words)
            padded = own.new_zeros(max(map(int, sizes)))
            padded[: len(own)] = own
            parts = [torch.zeros_like(padded) for _ in sizes]
            dist.all_gather(parts, padded, group=self._words)
        return [_value(part[: int(n)]) for part, n in zip(parts, sizes, strict=True)]

    def broadcast(self, value: Any) -> Any:
        """What rank 0 has, for all: anything that JSON has. What others give is not looked at."""
        if self.world == 1:
            return value
        words = _words(value) if self.first else torch.zeros(0, dtype=torch.uint8)
        size = torch.tensor([len(words)])
        with _listening():
            dist.broadcast(size, 0, group=self._words)
            words = words if self.first else words.new_zeros(int(size))
            dist.broadcast(words, 0, group=self._words)
        return _value(words)

    def barrier(self) -> None:
        """Until all are here."""
        self.agree(0)

    def sums(self, values: Sequence[float]) -> list[float]:
        """Sums over processes, each by itself, in float64 and in the order of ranks: the same for all."""
        if self.world == 1:
            return list(values)
        own = torch.tensor(values, dtype=torch.float64)
        parts = [torch.zeros_like(own) for _ in range(self.world)]
        with _listening():
            dist.all_gather(parts, own, group=self._words)
        return [sum(column) for column in zip(*(part.tolist() for part in parts), strict=True)]

    def rows(self, own: Tensor, most: int) -> list[Tensor] | None:
        """The rows of all processes, by rank, on rank 0; None on the others. On the CPU.

        Args:
            own: (n, ...), of one shape and type but for n, which may be 0.
            most: no process has more than so many.
        """
        if self.world == 1:
            return [own]
        counts = self.gather(len(own))
        padded = own.new_zeros(most, *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in counts] if self.first else None
        with _listening():
            dist.gather(padded, parts, 0, group=self._words)
        return None if parts is None else [part[:n] for part, n in zip(parts, counts, strict=True)]

    def add(self, x: Tensor) -> Pending:
        """Begin to put the sum over processes in the place of a tensor, on whatever device."""
        with _listening():
            return Pending(dist.all_reduce(x, group=self._of(x), async_op=True))

    def take_first(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by those of rank 0."""
        if self.world == 1:
            return
        with _listening(), torch.no_grad():
            for x in tensors:
                whole = x.detach().contiguous()
                dist.broadcast(whole, 0, group=self._of(x))
                x.copy_(whole)

    def swap(self, x: Tensor, partner: int) -> Tensor:
        """The tensor of another process, of the same shape and type, which calls this with our rank."""
        found = torch.empty_like(x)
        group = self._of(x)
        talk = [dist.P2POp(dist.isend, x, partner, group), dist.P2POp(dist.irecv, found, partner, group)]
        with _listening():
            for work in dist.batch_isend_irecv(talk):
                work.wait()
        return found

    def split(self, size: int) -> Group:
        """The group of the `size` neighbours in rank that this one belongs to; `size` divides the world."""
        if size == 1:
            return Group.alone()
        found = Group(self.rank % size, size, self.local_rank, self._store)
        for start in range(0, self.world, size):  # all take part in making each
            ranks = list(range(start, start + size))
            with _listening():
                words = dist.new_group(ranks, backend="gloo", timeout=_WAIT)
                tensors = None if self._tensors is None else dist.new_group(ranks, backend="nccl", timeout=_WAIT)
            if self.rank in ranks:
                found._words, found._tensors = words, tensors
        return found

    def first_to_fail(self) -> bool:
        """Whether no other process has said yet that it fails: then this is the one to say why. Waits for nobody."""
        if self._store is None:
            return True
        try:
            return bool(self._store.compare_set("failed", "", str(self.rank)) == str(self.rank).encode())
        except RuntimeError:  # whoever kept the store has gone, and may not have said anything
            return True

    def close(self, failed: bool = False) -> None:
        """Leave the group. One that failed waits for nothing that is still under way."""
        if self.world == 1 or not dist.is_initialized():
            return
        with suppress(RuntimeError, AttributeError):
            if failed and self._tensors is not None:
                self._tensors._get_backend(torch.device("cuda")).abort()
            dist.destroy_process_group()

    def _of(self, x: Tensor) -> Any:
        return self._tensors if x.device.type == "cuda" else self._words


def started_again(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun has started these processes anew after some failed."""
    return environment.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def may_start_again(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun will do so."""
    return environment.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def rank_of(environment: Mapping[str, str] = os.environ) -> int:
    """The rank by the environment, 0 if it has none, before there is a group."""
    rank = environment.get("RANK", "0")
    return int(rank) if rank.isdecimal() else 0


def _place(environment: Mapping[str, str]) -> tuple[int, int, int] | None:
    """(rank, world, local rank), or None for one process alone."""
    if not {"RANK", "WORLD_SIZE"} & environment.keys() or environment.get("WORLD_SIZE") == "1":
        return None
    if missing := [name for name in _NAMES if not environment.get(name)]:
        raise UserError(f"the environment is set for several processes, but without {' and '.join(missing)}")
    numbers = [environment[name] for name in _NAMES[:3]]
    if not all(n.isdecimal() for n in numbers):
        raise UserError(f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers, not {' and '.join(map(repr, numbers))}")
    rank, world, local_rank = map(int, numbers)
    if not rank < world:
        raise UserError(f"RANK {rank} is not below WORLD_SIZE {world}")
    return rank, world, local_rank


def _fresh(store: Any, rank: int, world: int) -> Any:
    """A part of a store that no earlier start of these processes has written to; torchrun keeps its own over restarts.

    Rank 0 names it. The others sign in under the name that they find, and take it once rank 0 has read their names: one
    that an earlier start has left there is never signed.
    """
    own, deadline = os.urandom(8).hex(), time.monotonic() + _MEET.total_seconds()
    if rank == 0:
        store.set("normfree/start", own)
        names = [store.get(f"normfree/{own}/{r}").decode() for r in range(1, world)]
        store.set(f"normfree/{own}/all", " ".join(names))
        return PrefixStore(f"normfree/{own}", store)
    while time.monotonic() < deadline:
        start = store.get("normfree/start").decode()
        store.set(f"normfree/{start}/{rank}", own)
        if store.check([f"normfree/{start}/all"]) and own in store.get(f"normfree/{start}/all").decode().split():
            return PrefixStore(f"normfree/{start}", store)
        time.sleep(0.02)
    raise RuntimeError("rank 0 has not come")


def _words(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _value(words: Tensor) -> Any:
    return json.loads(bytes(words.numpy()))


@contextmanager
def _listening() -> Iterator[None]:
    """A talk with others. Raises LostPeer where one of them has gone."""
    try:
        yield
    except RuntimeError as e:
        reason = str(e).partition("\n")[0]
        raise LostPeer(f"another process of the run has ended or does not answer ({reason})") from e

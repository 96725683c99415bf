"""Runs of a second, with faults: processes are forked from one that has imported everything; and how runs differ."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

import faults
from forks import FORKS, start_forks

_CLOCKS = {"seconds", "line_seconds", "images_per_second", "wait_share"}
_DEALT = {"sums_by_rank"}  # how it is dealt to processes; lost sums are seen in the metrics
CLASSES = ("dark", "grey", "light", "white")
# 64 training images, 8 steps an epoch, 3 epochs; the first is warm-up; 16 held-out images in 4 batches; random masks
STEPS, EPOCH = 24, 8
SETTINGS: tuple[str, ...] = ("--train.batch-size", "8", "--train.epochs", "3", "--optim.warmup", "1")
SETTINGS += ("--train.log-every", "1", "--train.eval-batch-size", "4", "--train.device", "cpu", "--data.workers", "0")
SETTINGS += ("--optim.lr", "0.1", "--optim.clipping", "0.04", "--data.validation", "0.2")
SETTINGS += ("--model.drop-rate", "0.3", "--model.stochastic-depth", "0.3")

_MIXED = ("--data.mixup", "0.2", "--data.cutmix", "true", "--data.randaugment", "2")
_SAM = ("--optim.sam-rho", "0.05", "--optim.sam-shards", "2")
_BF16, _SPLIT, _WORKERS = ("--train.precision", "bf16"), ("--train.micro-batch", "3"), ("--data.workers", "2")
SITUATIONS: dict[str, tuple[str, ...]] = {
    "float32": (),
    "bfloat16": _BF16,
    "float16 and its loss scale": ("--train.precision", "fp16"),
    "micro-batches of 3": _SPLIT,
    "2 loader processes": _WORKERS,
    "SAM": _SAM,
    "MixUp, CutMix, RandAugment": _MIXED,
    "classifier alone at first": ("--optim.head-only", "1"),
    "batch norm": ("--model.options", "norm=batch"),
    "AdamW": ("--optim.kind", "adamw", "--optim.lr", "0.002", "--optim.weight-decay", "0.05"),
    "all of them": (*_MIXED, "--data.pairs", "batch", *_SPLIT, *_WORKERS, *_BF16, *_SAM, "--optim.sam-every", "3"),
}
# faults of the first process, of the second, ..; what counts up in a process begins anew in the next
STOPS: dict[str, tuple[str, ...]] = {
    "in warm-up": ("averaged:3:term",),
    "at an epoch's end": ("save:1:term",),
    "mid-epoch": ("averaged:12:term",),
    "between forward and update": ("forward:14:usr1",),
    "in evaluation": ("evaluation:11:term",),
    "while saving": ("tensors:2:int",),
    "twice": ("averaged:5:term", "averaged:9:int"),
}
WORLDS = ((1, 2), (2, 1), (2, 4), (4, 2), (1, 4), (4, 1))  # processes before and after
SHARDED = ("float32", "bfloat16", "2 loader processes", "MixUp, CutMix, RandAugment", "SAM in 4 shards")
SITUATIONS["SAM in 4 shards"] = ("--optim.sam-rho", "0.05", "--optim.sam-shards", "4", "--optim.sam-every", "1")
SHARDED_STOPS = {
    "all are told": ("averaged:12:term",),
    "one is told, before its update": ("update:6:usr1@0",),
    "in evaluation": ("evaluation:3:term",),
    "one is killed": ("averaged:12:kill@0",),
}
# what must be noticed if it is wrong in the second process
CONTROLS = {
    "order begins anew": "stream:1:set=start=0",
    "masks are keyed by another step": "step:every:set=taken=0",
    "momentum is lost": "load:1:drop=momentum_buffer.",
    "the count of the average is lost": "load:1:set=applied=0",
}
# every named instant at which a save, or what is written beside it, can be cut off by kill -9
INSTANTS = (
    [
        "validation:1:kill",
        "config:1:kill",
        "write:1:tear",
        "write:2:tear",
        "write:3:tear",
        "write:5:tear",
        "metrics:5:tear",
        "metrics:9:tear",
    ]
    + [f"{point}:{n}:kill" for n in (1, 2) for point in ("weights", "save", "tensors", "state", "manifest")]
    + [f"{point}:{n}:kill" for n in (1, 3) for point in ("rename", "renamed", "latest", "saved")]
    + ["prune:1:kill", "pruning:1:kill", "pruning:2:kill", "pruning:3:kill", "finish:1:kill", "summary:1:kill"]
)


class Failure(NamedTuple):
    """Settings, faults, the exit code of each start, what is said, whether the weights are those of a whole run."""

    settings: tuple[str, ...]
    faulty: tuple[str, ...]
    codes: tuple[int, ...]
    says: str = ""
    same: bool = True


FAILURES = {
    "disk full from the second save on": Failure((), ("save:2:full",), (1, 0), "File too large"),
    "disk full once, in a save": Failure((), ("tensors:2:enospc",), (1, 0), "No space left"),
    "disk full, in a line of metrics": Failure((), ("metrics:5:enospc",), (1, 0), "No space left"),
    "a byte of the newest checkpoint flips": Failure(
        (), ("saved:2:flip evaluation:22:kill",), (-9, 0), "passed over a broken checkpoint: step-00000016"
    ),
    "a byte of the only checkpoint flips": Failure(
        (), ("saved:1:flip evaluation:14:kill",), (-9, 1), "no whole checkpoint: step-00000008", same=False
    ),
    "memory runs out once": Failure((), ("forward:5:oom",), (0, 0), "from here on 4 images at once", same=False),
    "a loader process is killed": Failure(_WORKERS, ("read:3:kill",), (1, 0), "--data.workers"),
    "a loader process hangs": Failure((*_WORKERS, "--data.timeout", "3"), ("read:3:stall",), (1, 0), "--data.timeout"),
    "a loader process is slow": Failure(_WORKERS, ("read:3:stall=2",), (0, 0)),
    "an error in the trainer": Failure((), ("averaged:12:error",), (1, 0), "RuntimeError: an error, as was asked for"),
    "SIGTERM before the first step": Failure((), ("stream:1:term",), (-15, 0)),
    "SIGTERM while a checkpoint is loaded": Failure((), ("averaged:12:term", "load:1:term"), (143, -15, 0)),
    "SIGINT before the report": Failure((), ("finish:1:int",), (130, 0), "Write the report with"),
}


class Shortage(NamedTuple):
    """Processes, the fault of one of them, each start's exit code, images at once in the end, what one of them says."""

    world: int
    fault: str
    codes: tuple[int, ...]
    at_once: int
    says: str
    settings: tuple[str, ...] = ()

    @property
    def expected(self) -> dict[str, Any]:
        return {"codes": [[code] * self.world for code in self.codes], "said": 1, "images_at_once": self.at_once}


# a batch of 8: each of 2 processes has 4 images of it, each of 4 has 2
SHORTAGES = {
    "before the first step, of the first": Shortage(2, "forward:1:oom@0", (0,), 2, "2 images at once on each device"),
    "in a step": Shortage(2, "forward:12:oom@1", (1, 0), 2, "in a step of process 1; with --resume"),
    "in the first step": Shortage(2, "forward:2:oom@0", (1, 0), 2, "in a step of process 0; with --resume"),
    "while weights are changed": Shortage(2, "update:12:oom@1", (1, 0), 2, "in a step of process 1; with --resume"),
    "in a micro-batch": Shortage(
        2, "forward:17:oom@1", (1, 0), 1, "in a step of process 1; with --resume", ("--train.micro-batch", "2")
    ),
    "before the first step, of the last of four": Shortage(
        4, "forward:1:oom@3", (0,), 1, "1 images at once on each device"
    ),
    "in a step of one of four": Shortage(4, "forward:12:oom@2", (1, 0), 1, "in a step of process 2; with --resume"),
}
# two processes under torchrun, in shards of one image: restarts that are allowed, the fault, exit codes
TORCHRUN: dict[str, tuple[int, str, tuple[int, ...]]] = {
    "a process is killed, and all are started again": (1, "averaged:12:kill@1", (0,)),
    "a process is killed": (0, "averaged:12:kill@1", (1, 0)),
    "SIGTERM to one process": (0, "averaged:12:term@1", (1, 0)),
    "SIGTERM to torchrun": (0, "averaged:12:term=parent@0", (1, 0)),
    "SIGTERM to torchrun, in evaluation": (0, "evaluation:3:term=parent@0", (1, 0)),
    "an error in one process": (0, "averaged:12:error@1", (1, 0)),
}
END = "finish:1:end"  # without the report, which takes as long as the rest


def make_images(root: Path, per_class: int = 20, side: int = 20) -> Path:
    """ROOT/CLASS/N.jpg: noise whose brightness tells the class."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.normal(50 + 50 * label, 30, (side, side, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:03d}.jpg", quality=90)
    return root


def train(folder: Path, name: str, *more: str) -> list[str]:
    """The arguments of a run on folder/images that begins or goes on, with SETTINGS but where `more` are other ones."""
    return ["train", "--data.root", str(folder / "images"), "--run-dir", name, "--resume", "auto", *SETTINGS, *more]


def interrupted(
    folder: Path,
    name: str,
    settings: Sequence[str],
    faulty: Sequence[str],
    *always: str,
    worlds: Sequence[int] = (1,),
) -> list[list[int | None]]:
    """A run that breaks again and again, and then goes on to its end; the exit codes of its processes each time.

    Args:
        folder: where folder/images is.
        name: of the run folder.
        settings: beside SETTINGS.
        faulty: the faults of the first start, of the second, ..; several are parted by blanks.
        always: faults of every start.
        worlds: how many processes there are at each start; the last number is that of all further ones.
    """
    counts = [*worlds, *[worlds[-1]] * (len(faulty) + 1 - len(worlds))]
    starts = zip((*faulty, END), counts, strict=True)
    return [run(train(folder, name, *settings), folder, *fault.split(), *always, world=n) for fault, n in starts]


def short_of_memory(folder: Path, name: str, shortage: Shortage, *always: str) -> dict[str, Any]:
    """Exit codes of each start, how often its words were said, and how many images are computed at once in the end."""
    arguments, starts = train(folder, name, *shortage.settings), [[shortage.fault], []][: len(shortage.codes)]
    codes = [run(arguments, folder, *fault, *always, END, world=shortage.world) for fault in starts]
    newest = max((folder / name / "checkpoints").glob("step-*"))
    at_once = json.loads((newest / "state.json").read_text())["micro_batch"]
    return {"codes": codes, "said": said(folder).count(shortage.says), "images_at_once": at_once}


# processes


def start(
    arguments: Sequence[str], folder: Path, faulty: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """`normfree ARGUMENTS` in a folder, as a process of its own of one thread. What it says is in folder/said.RANK."""
    start_forks()
    process = FORKS.Process(target=_child, args=(list(arguments), folder, list(faulty), dict(environment or {})))
    process.start()
    return process


def run(arguments: Sequence[str], folder: Path, *faulty: str, world: int = 1, timeout: float = 120) -> list[int | None]:
    """The exit code of each rank, -9 and the like where a signal ended it; None where one had to be ended by us."""
    together = {"FAULTS_START": str(time.time_ns())}
    ranks = [start(arguments, folder, faulty, e | together) for e in environments(world)]
    end = time.monotonic() + timeout
    for process in ranks:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    return codes


def torchrun(arguments: Sequence[str], folder: Path, *faulty: str, restarts: int = 0, timeout: float = 180) -> int:
    """The exit code of torchrun with two processes; what they say is in folder/said.torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), faults.__file__]
    command += [word for fault in faulty for word in ("--at", fault)] + ["--", *arguments]
    with open(folder / "said.torchrun", "a") as said:
        process = subprocess.Popen(command, cwd=folder, stdout=said, stderr=said, start_new_session=True)
        try:
            return process.wait(timeout)
        finally:
            with suppress(ProcessLookupError):  # whatever is left of it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def environments(world: int) -> list[dict[str, str]]:
    """What torchrun tells each of the processes of one machine; nothing where there is one."""
    if world == 1:
        return [{}]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def _child(arguments: list[str], folder: Path, faulty: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    os.chdir(folder)
    said = os.open(f"said.{environment.get('RANK', '0')}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(said, stream)
    faults.normfree(arguments, faulty)


def said(folder: Path) -> str:
    """Everything that was said in a folder, by all ranks."""
    return "".join(path.read_text() for path in sorted(folder.glob("said.*")))


# differences


def differences(a: Path, b: Path) -> list[str]:
    """What differs between two runs, to the bit: of all that is saved, the best weights, the metrics. Times do not."""
    newest = [sorted((run / "checkpoints").glob("step-*"))[-1] for run in (a, b)]
    files = [(p / "state.safetensors" for p in newest), (run / "best.safetensors" for run in (a, b))]
    found = [f"{newest[0].name} and {newest[1].name}"] if newest[0].name != newest[1].name else []
    for pair in files:
        ours, theirs = (load_file(path) for path in pair)
        found += sorted(ours.keys() ^ theirs.keys())
        found += [name for name in ours.keys() & theirs.keys() if not torch.equal(ours[name], theirs[name])]
    states = [_timeless(json.loads((path / "state.json").read_text())) for path in newest]
    found += [f"state {name}" for name in states[0] if states[0][name] != states[1].get(name)]
    lines = [metrics(run) for run in (a, b)]
    return found + ([] if lines[0] == lines[1] else ["metrics"])


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without times."""
    return [_timeless(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _timeless(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in _CLOCKS | _DEALT}

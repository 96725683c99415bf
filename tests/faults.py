"""Breaks a run at a named point, from outside: the package itself has no hooks.

    python tests/faults.py --at forward:7:term -- train --run-dir run --data.root images
    torchrun --nproc-per-node 2 tests/faults.py --at rename:1:kill@1 -- train ...
    python tests/faults.py --list

A fault is POINT:N:ACTION: at the N-th time that a process passes the point, or every time where N is "every". Some
actions take a value, POINT:N:ACTION=VALUE; with several processes POINT:N:ACTION@RANK is for one of them.
"""

from __future__ import annotations

import argparse
import errno
import functools
import hashlib
import importlib
import inspect
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

IMPORTED = ("normfree.cli.train", "normfree.train.finish")
Call = dict[str, Any]  # the arguments of the call that is broken, by name


class Point(NamedTuple):
    """A function of a module, the calls that count, and whether the fault comes after the call."""

    of: str
    about: str
    counts: Callable[[Call], bool] = lambda _: True
    after: bool = False


def _onto(*names: str) -> Callable[[Call], bool]:
    """Renames onto a file of one of these names."""
    return lambda call: Path(call["dst"]).name in names


def _of_step(call: Call) -> bool:
    return Path(call["path"]).name.startswith("step-")


_FORWARD = "normfree.models.network:Network.forward"
_FILES = ("state.safetensors", "state.json", "manifest.json")
POINTS = {
    "config": Point("os:replace", "config.json is written, and not in its place", _onto("config.json")),
    "validation": Point("os:replace", "names held out are written, and not in place", _onto("validation.json")),
    "stream": Point("normfree.train.loop:_batches", "the stream of batches is opened"),
    "read": Point("normfree.data.loader:_TrainStream.__getitems__", "a loader makes training images; counted in each"),
    "step": Point("normfree.train.step:Learner.step", "a step begins"),
    "forward": Point(_FORWARD, "a micro-batch begins", lambda c: c["self"].training and not c["x"].is_meta),
    "compile": Point("normfree.nn.fused:_run", "a compiled activation is due, of each layer and each way"),
    "update": Point("normfree.optim.sgd:AGCSGD.step", "the gradients are there, the weights are not changed"),
    "updated": Point("normfree.optim.sgd:AGCSGD.step", "the weights are changed, their average is not", after=True),
    "averaged": Point("normfree.optim.ema:EMA.update", "the average is changed too", after=True),
    "evaluation": Point(_FORWARD, "a batch is evaluated, by each of the models", lambda c: not c["self"].training),
    "weights": Point("os:replace", "the best weights are written, and not in their place", _onto("best.safetensors")),
    "metrics": Point("normfree.train.record:RunFolder.append_metrics", "a line of metrics.jsonl is due"),
    "save": Point("normfree.train.checkpoint:save_checkpoint", "a checkpoint is due"),
    "write": Point("normfree.files:write_atomic", "a file of a checkpoint is due", lambda c: c["path"].name in _FILES),
    "tensors": Point("os:replace", "the tensors are written, and not in their place", _onto("state.safetensors")),
    "state": Point("os:replace", "so is the state", _onto("state.json")),
    "manifest": Point("os:replace", "so is the manifest", _onto("manifest.json")),
    "rename": Point("pathlib:Path.rename", "the checkpoint is whole, and not in its place"),
    "renamed": Point("pathlib:Path.rename", "it is in its place", after=True),
    "latest": Point("os:replace", "the name of the newest is written, and not in its place", _onto("latest")),
    "prune": Point("shutil:rmtree", "an old checkpoint is to be removed", _of_step),
    "pruning": Point("os:unlink", "a file of it is to be removed", lambda c: Path(c["path"]).name in _FILES),
    "saved": Point("normfree.train.checkpoint:save_checkpoint", "the checkpoint is saved", after=True),
    "load": Point("normfree.train.step:Learner.load_tensors", "a learner is filled from a checkpoint"),
    "finish": Point("normfree.train.finish:finish", "the training is done, the report is not"),
    "summary": Point("os:replace", "summary.json is written, and not in its place", _onto("summary.json")),
}


def _send(number: int) -> Callable[[Call, str], None]:
    """A signal to this process, or to its parent."""
    return lambda _, to: os.kill(os.getppid() if to == "parent" else os.getpid(), number)


def _raise(make: Callable[[], BaseException]) -> Callable[[Call, str], NoReturn]:
    def act(_call: Call, _value: str) -> NoReturn:
        raise make()

    return act


def _out_of_memory() -> BaseException:
    import torch

    return torch.OutOfMemoryError("out of memory, as was asked for")


def _full(_call: Call, room: str) -> None:
    """From here on the system itself lets no file grow beyond so many bytes."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (int(room or 4096), resource.RLIM_INFINITY))


def _poison(call: Call, value: str) -> None:
    """The gradient of the first weights that have one is not a number, once."""
    p = next(p for p in call["self"].parameters() if p.requires_grad)
    left = [True]  # the hook stays, and does nothing from then on
    p.register_hook(lambda g: g * float(value or "nan") if left and left.pop() else g)


def _flip(call: Call, _value: str) -> None:
    """A byte in the middle of the tensors of the newest checkpoint."""
    newest = sorted(call["folder"].glob("step-*"))[-1] / _FILES[0]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)


def _tear(call: Call, _value: str) -> None:
    """Half of a file, or of a line, is written; then kill -9."""
    if "parts" in call:
        path, content = call["path"], b"".join(call["parts"])
        path.with_name(f".{path.name}.{os.getpid()}.tmp").write_bytes(content[: len(content) // 2])
    else:
        with open(call["self"].metrics, "a", encoding="utf-8") as f:
            f.write(json.dumps(call["line"])[:20])
    os.kill(os.getpid(), signal.SIGKILL)


def _set(call: Call, setting: str) -> None:
    """An argument by its name, as start=0."""
    name, _, value = setting.partition("=")
    call[name] = json.loads(value)


def _drop(call: Call, prefix: str) -> None:
    """The tensors whose names begin so."""
    call["tensors"] = {name: t for name, t in call["tensors"].items() if not name.startswith(prefix)}


def _record(call: Call, path: str) -> None:
    """Writes down which batch a step takes, and the checksum of each image and its masks; see `recorded`."""
    if "taken" in call:
        line: Any = call["taken"]
    else:
        images, masks = call["x"].detach(), [m for m in call["draws"] or () if m is not None]
        rows = [
            b"".join(t[i].contiguous().float().numpy().tobytes() for t in (images, *masks)) for i in range(len(images))
        ]
        line = [hashlib.blake2b(row, digest_size=8).hexdigest() for row in rows]
    start = os.environ.get("FAULTS_START", _BEGAN)  # the same for all processes that were started together
    with open(f"{path}.{start}.{os.environ.get('RANK', '0')}", "a", encoding="utf-8") as f:
        f.write(json.dumps(line) + "\n")


_BEGAN = str(time.time_ns())


def recorded(path: Path) -> dict[int, list[str]]:
    """Checksums of what each batch fed to the network, sorted, from all ranks; of a batch taken again, the last."""
    batches: dict[int, tuple[str, list[str]]] = {}
    for file in sorted(path.parent.glob(f"{path.name}.*")):
        start, rows = file.suffixes[-2], list[str]()
        for line in map(json.loads, file.read_text().splitlines()):
            if not isinstance(line, int):
                rows += line  # before the first step: a probe for memory, which is forgotten
            elif line in batches and batches[line][0] == start:
                rows = batches[line][1]  # another rank of the same start
            else:
                batches[line] = start, (rows := [])
    return {number: sorted(rows) for number, (_, rows) in batches.items()}


ACTIONS: dict[str, tuple[Callable[[Call, str], object], str]] = {
    "kill": (_send(signal.SIGKILL), "kill -9 of this process, or of its =parent"),
    "term": (_send(signal.SIGTERM), "SIGTERM to the same"),
    "int": (_send(signal.SIGINT), "SIGINT"),
    "usr1": (_send(signal.SIGUSR1), "SIGUSR1"),
    "tear": (_tear, "half of what is due is written, then kill -9 (write, metrics)"),
    "full": (_full, "from here on no file can grow beyond 4096 bytes, or =BYTES"),
    "enospc": (_raise(lambda: OSError(errno.ENOSPC, "No space left on device")), "no space left, this once"),
    "flip": (_flip, "a byte of the newest checkpoint is another (save, saved)"),
    "oom": (_raise(_out_of_memory), "memory runs out, this once"),
    "error": (_raise(lambda: RuntimeError("an error, as was asked for")), "a RuntimeError"),
    "poison": (_poison, "a gradient of this backward pass is nan, or =inf (forward)"),
    "stall": (lambda _, seconds: time.sleep(float(seconds or 1000)), "nothing for 1000 seconds, or =SECONDS"),
    "end": (_raise(lambda: SystemExit(0)), "the process ends well"),
    "set": (_set, "an argument has another value, =NAME=JSON"),
    "drop": (_drop, "tensors of these names are not loaded, =PREFIX (load)"),
    "record": (_record, "what the network is fed is written to =FILE.RANK (step, forward)"),
}


def inject(fault: str) -> None:
    """Patch the function of a fault's point in this process, wherever the package has imported it to."""
    name, number, action = fault.split(":", 2)
    action, _, rank = action.partition("@")
    if rank and rank != os.environ.get("RANK", "0"):
        return
    action, _, value = action.partition("=")
    point, (act, _about) = POINTS[name], ACTIONS[action]
    module, _, path = point.of.partition(":")
    *owners, attribute = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original = getattr(owner, attribute)
    broken = _broken(original, point, number, lambda call: act(call, value))
    setattr(owner, attribute, broken)
    for other in [m for n, m in sys.modules.items() if n.startswith("normfree.") and not owners]:
        if vars(other).get(attribute) is original:
            setattr(other, attribute, broken)


def _broken(
    original: Callable[..., Any], point: Point, number: str, act: Callable[[Call], object]
) -> Callable[..., Any]:
    signature, times = inspect.signature(original), itertools.count(1)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        due = point.counts(bound.arguments) and number in ("every", str(next(times)))
        if due and not point.after:
            act(bound.arguments)
        result = original(*bound.args, **bound.kwargs)
        if due and point.after:
            act(bound.arguments)
        return result

    return call


def normfree(arguments: Sequence[str], faults: Sequence[str]) -> None:
    """The command line with faults. Everything is imported first, so that every import is patched."""
    for module in IMPORTED:
        importlib.import_module(module)
    for fault in faults:
        inject(fault)
    importlib.import_module("normfree.cli").main(arguments)


def main() -> None:
    """Parse and run, or list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at", action="append", default=[], metavar="POINT:N:ACTION")
    parser.add_argument("--list", action="store_true", help="the points and the actions")
    parser.add_argument("arguments", nargs="*", help="of normfree, after --")
    args = parser.parse_args()
    if args.list:
        lines = [(name, point.about) for name, point in POINTS.items()] + [
            (n, about) for n, (_, about) in ACTIONS.items()
        ]
        print("\n".join(f"{name:<12}{about}" for name, about in lines))
        return
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # a restart of torchrun is left alone
    normfree(args.arguments, [] if again else args.at)


if __name__ == "__main__":
    main()

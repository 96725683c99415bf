"""Everything that needs a CUDA device, in parts: is it right there, and how fast beside timm.

    PYTHONPATH=src python benchmarks/gpu.py --list
    PYTHONPATH=src python benchmarks/gpu.py                      as many parts as 9.5 minutes hold, again and again
    PYTHONPATH=src python benchmarks/gpu.py parity agc           these
    PYTHONPATH=src python benchmarks/gpu.py --dry parity agc     on a CPU with a tiny network, to try the script

A part is a process of its own that writes OUT/PART.json with its conditions. A part that is done for these sources and
this device is skipped; one that fails leaves its traceback there, or the checks that do not hold, and the others go on.
The exit status is 1 if any part failed. It needs torch, numpy, Pillow, safetensors and rich; timm for rivals and
matplotlib for pictures, where they are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # however this file is run

import torch  # noqa: E402
from on_gpu import checks, speed  # noqa: E402
from on_gpu.common import Part, Setup  # noqa: E402

PARTS: dict[str, Part] = {**checks.PARTS, **speed.PARTS}
_FORK = multiprocessing.get_context("fork")  # this process never touches CUDA, so that children may


def main() -> int:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    setup, digest = Setup("cpu" if args.dry else "cuda", args.dry), sources()
    args.out.mkdir(parents=True, exist_ok=True)
    began, failed, left = time.monotonic(), [], []
    device = device_name(setup)
    for name in args.parts or PARTS:
        path, remaining = args.out / f"{name}.json", args.minutes * 60 - (time.monotonic() - began)
        if not args.again and is_done(path, digest, device):
            print(f"{name:<22} done before", flush=True)
            continue
        if remaining < PARTS[name].seconds / (30 if args.dry else 1):
            left.append(name)
            continue
        status = run(name, setup, path, {"sources": digest, "device": device}, remaining)
        print(f"{name:<22} {status}", flush=True)
        if not status.startswith("ok"):
            failed.append(name)
    if left:
        print(f"left for another call: {' '.join(left)}")
    if failed:
        print(f"failed: {' '.join(failed)}")
    return 1 if failed else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="all if none is named")
    parser.add_argument("--out", type=Path, help="folder of the results; benchmarks/results/gpu if not given")
    parser.add_argument("--minutes", type=float, default=9.5, help="no part is begun that would end later")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with a tiny network and small sizes")
    parser.add_argument("--again", action="store_true", help="parts that are done, too")
    parser.add_argument("--list", action="store_true", help="the parts, and about how many seconds they take")
    args = parser.parse_args()
    unknown = [name for name in args.parts if name not in PARTS]
    if unknown:
        parser.error(f"no part is called {unknown[0]!r}; there are {' '.join(PARTS)}")
    if args.out is None and args.dry:
        parser.error("--dry measures nothing: say with --out where its files go")
    args.out = args.out or HERE / "results" / "gpu"
    if args.list:
        for name, part in PARTS.items():
            print(f"{name:<22} {part.seconds:4} s  {part.what}")
        parser.exit()
    return args


def sources() -> str:
    """A checksum of the library and of this script: a part is done for what it was run with."""
    digest = hashlib.sha256()
    for folder in (HERE.parent / "src", HERE / "on_gpu"):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(HERE.parent).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def is_done(path: Path, digest: str, device: str) -> bool:
    """Whether a file has this part, of these sources, on this device, without a failure."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return bool(found["status"] == "ok" and found["sources"] == digest and found["device"] == device)


def device_name(setup: Setup) -> str:
    """Of a child: who asks has CUDA, and may not have children any more."""
    ours, theirs = _FORK.Pipe()
    child = _FORK.Process(target=tell, args=(setup, theirs))
    child.start()
    name = str(ours.recv())
    child.join()
    return name or sys.exit("no CUDA device was found; --dry tries the script on a CPU")


def tell(setup: Setup, pipe: Connection) -> None:
    """The child: the name, or nothing."""
    try:
        pipe.send(setup.device_name())
    except (RuntimeError, AssertionError):  # torch's answers where there is no device, or no CUDA in torch
        pipe.send("")


def run(name: str, setup: Setup, path: Path, about: dict[str, Any], limit: float) -> str:
    """Run a part in a child, which writes its file; a word and the seconds."""
    write(path, {"part": name, "status": "stopped", **about})  # what stays if the child ends before it can say more
    began = time.monotonic()
    child = _FORK.Process(target=work, args=(name, setup, path, about))
    child.start()
    try:
        child.join(limit)
    finally:  # also where this process is told to end
        if child.is_alive() and child.pid is not None:
            os.killpg(child.pid, signal.SIGKILL)  # with the compiler's own processes
            child.join()
    seconds = time.monotonic() - began
    return f"{json.loads(path.read_text())['status']:<8} {seconds:6.1f} s"


def work(name: str, setup: Setup, path: Path, about: dict[str, Any]) -> None:
    """The child: one part, and its file."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if setup.dry:
        torch.compiler.set_stance("force_eager")  # a compiler takes a minute even for a tiny network
    began, found = time.monotonic(), {"part": name, **about}
    try:
        result = PARTS[name].run(setup)
        holds = all(check["holds"] for check in result.get("checks", []))
        found |= {"status": "ok" if holds else "failed", **result}
    except BaseException:
        found |= {"status": "failed", "traceback": traceback.format_exc().splitlines()}
        print(traceback.format_exc(), file=sys.stderr, flush=True)
    found |= {"seconds": round(time.monotonic() - began, 1), "conditions": setup.conditions()}
    write(path, found)


def write(path: Path, value: dict[str, Any]) -> None:
    from normfree.files import write_json

    write_json(path, value)


if __name__ == "__main__":
    sys.exit(main())

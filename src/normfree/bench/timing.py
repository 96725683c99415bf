"""Seconds of several pieces of work that take turns, and what they are against one another."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

Work = Callable[[], object]
PACKAGES = ("torch", "timm", "torchvision", "numpy", "pillow", "simplejpeg", "safetensors")


def take_turns(
    work: Mapping[str, Work],
    rounds: int,
    device: torch.device,
    warmup: int = 2,
    told: Callable[[int], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each, round after round, so that whatever slows the machine slows all.

    Args:
        work: by name; each leaves the device's queue as it likes, and is waited for.
        rounds: measured.
        device: where the work is done.
        warmup: rounds before those.
        told: is called with the number of rounds done.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for r in range(-warmup, rounds):
        for name, run in work.items():
            wait(device)
            began = time.perf_counter()
            run()
            wait(device)
            if r >= 0:
                seconds[name].append(time.perf_counter() - began)
        if told is not None:
            told(max(0, r + 1))
    return seconds


def wait(device: torch.device) -> None:
    """Until everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, and the tenths from below and above."""
    ordered, tenth = sorted(values), len(values) // 10
    return {"median": statistics.median(ordered), "p10": ordered[tenth], "p90": ordered[-1 - tenth]}


def ratio(own: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Own time to the other's, round by round: below 1 is quicker."""
    return spread([a / b for a, b in zip(own, other, strict=True)])


def conditions(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, date and commit."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
    }


def _commit() -> str:
    """As git describes it; nothing where there is no git."""
    if shutil.which("git") is None:
        return ""
    found = subprocess.run(  # noqa: S603 (the arguments are ours)
        [  # noqa: S607
            "git",
            "-C",
            str(Path(__file__).parent),
            "describe",
            "--always",
            "--dirty",
            "--abbrev=12",
            "--exclude=*",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip()


def processor() -> str:
    """What the system calls its cores."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

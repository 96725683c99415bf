"""normfree doctor: what this machine has, and whether a training step works on it."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F

from normfree.cli.common import parse
from normfree.models import create_model
from normfree.optim import AGCSGD, param_groups
from normfree.recipes.choose import free_memory

_PACKAGES = ("normfree", "torch", "numpy", "pillow", "safetensors", "tyro", "rich", "matplotlib", "mlxtend")


@dataclass
class _Arguments:
    """Versions, devices, threads, writable folders, and one training step on each device."""


def run(arguments: Sequence[str]) -> int:
    """Print the findings; 1 if something does not work."""
    parse(_Arguments, "doctor", arguments)
    problems = 0
    print(f"python       {sys.version.split()[0]} on {platform.platform()}")
    for package in _PACKAGES:
        print(f"{package:<12} {_version(package)}")
    print(f"threads      {torch.get_num_threads()} of {os.cpu_count()} cores")
    for device in ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]:
        name = torch.cuda.get_device_name(device) if device != "cpu" else platform.machine()
        outcome = step_error(device)
        problems += outcome is not None
        free = f"{free_memory(device) / 2**30:.1f} GiB free"
        print(f"{device:<12} {name}, {free}; training step {'FAILED: ' + outcome if outcome else 'ok'}")
    for folder in (Path.cwd(), Path(tempfile.gettempdir())):
        writable = _writable(folder)
        problems += not writable
        print(f"{'folder':<12} {folder} {'is writable' if writable else 'is NOT writable'}")
    print("all well" if not problems else f"{problems} problem{'s' if problems > 1 else ''}")
    return 1 if problems else 0


def step_error(device: str) -> str | None:
    """What goes wrong in a training step on a device, or None: the loss must be finite and fall."""
    try:
        torch.manual_seed(0)
        model = create_model("nfnet_tiny", num_classes=10).to(device)
        optimizer = AGCSGD(param_groups(model, clipping=0.1), lr=0.1)
        images, labels = torch.randn(8, 3, 32, 32, device=device), torch.arange(8, device=device)
        losses = []
        for _ in range(5):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    except (RuntimeError, OSError) as e:
        return str(e).splitlines()[0]
    if not losses[-1] < losses[0]:
        return f"the loss does not fall: {losses[0]:.4f} to {losses[-1]:.4f}"
    return None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False

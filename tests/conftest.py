"""Small image folders, short runs, and the command line as a process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from forks import forked

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Small networks are fastest so, and a busy machine does not make threads wait for one another."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)


def run_command(
    *arguments: str | Path, cwd: Path, timeout: float = 120, fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """normfree ARGUMENTS as a process of its own; a traceback on the error stream is always a failure.

    `fresh` starts Python anew, as a user does, where it is forked otherwise.
    """
    words = [str(a) for a in arguments]
    if fresh:
        program = [sys.executable, "-m", "normfree", *words]
        done = subprocess.run(program, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)
    else:
        done = forked(words, cwd, timeout)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """`command("list", ..)` runs in the test's own folder."""

    def run(*arguments: str | Path, timeout: float = 120, fresh: bool = False) -> subprocess.CompletedProcess[str]:
        return run_command(*arguments, cwd=tmp_path, timeout=timeout, fresh=fresh)

    return run


def make_folder(root: Path, classes: tuple[str, ...] = ("dark", "light"), per_class: int = 10, side: int = 24) -> Path:
    """ROOT/CLASS/N.jpg: noise whose brightness tells the class, sizes a little different."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            level = 40 + 170 * label // max(1, len(classes) - 1)
            pixels = rng.normal(level, 25, (side + i % 3, side + i % 2, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:03d}.jpg", quality=90)
    return root


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Two classes of ten images."""
    return make_folder(tmp_path / "images")


@pytest.fixture
def narrow() -> Iterator[str]:
    """The name of an NFNet as the authors' and timm's code could build it, so narrow that it takes a moment."""
    from dataclasses import replace

    from normfree.models import MODELS

    MODELS["nfnet_narrow"] = replace(
        MODELS["nfnet_f0"],
        widths=(16, 32, 48, 48),
        depths=(1, 1, 2, 1),
        train_size=32,
        test_size=40,
        stem_widths=(16, 32, 64, 8),
        group_width=(8,),
        final_width=96,
    )
    yield "nfnet_narrow"
    del MODELS["nfnet_narrow"]

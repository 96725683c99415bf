"""The examples run as they stand, and learn."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDS = {
    "plain_adamw": None,
    "plain_sam": None,
    "lightning_module": "lightning",
    "timm_training": "timm.utils",
    "opacus_dp": "opacus",
}


def _python(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, cwd=cwd, check=False)


@cache
def _why_absent(module: str) -> str:
    """Empty where the module can be imported. timm, for one, is of no use beside a torchvision that does not load."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return f"{module} is not installed"
    tried = _python("-c", f"import {module}")
    return "" if tried.returncode == 0 else f"{module} does not import: {tried.stderr.strip().splitlines()[-1]}"


def test_every_example_is_here() -> None:
    assert sorted(NEEDS) == sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_says_how_to_run_it(name: str) -> None:
    """Its docstring ends in what to install and the command."""
    said = ast.get_docstring(ast.parse((ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")))
    assert said
    needed = NEEDS[name]
    install = "Needs normfree alone: " if needed is None else f"pip install {needed.split('.')[0]}; "
    assert said.endswith(f"{install}python examples/{name}.py")


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_runs_and_learns(name: str, tmp_path: Path) -> None:
    """Every loss that it prints has fallen; those that need nothing else do not even warn; no file is left."""
    needed = NEEDS[name]
    if needed is not None and _why_absent(needed):
        pytest.skip(_why_absent(needed))
    flags = ["-W", "error"] if needed is None else []
    done = _python(*flags, ROOT / "examples" / f"{name}.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    losses = re.findall(r"loss ([\d.]+) -> ([\d.]+)", done.stdout)
    assert losses
    assert all(float(last) < 0.95 * float(first) for first, last in losses), done.stdout
    assert not list(tmp_path.iterdir())

"""The job files of examples/cluster say what the shell, YAML, torchrun and normfree understand."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from normfree.cli.common import parse
from normfree.cli.settings import given_settings, recipe_name
from normfree.cli.train import _Arguments, _with_resume
from normfree.config import check_given, check_ranges
from normfree.data.sources import SyntheticSource
from normfree.recipes import RECIPES
from normfree.recipes.paper import IMAGENET
from normfree.train.loop import check_run

FOLDER = Path(__file__).parents[1] / "examples" / "cluster"
SLURM, SKYPILOT = FOLDER / "slurm.sh", FOLDER / "skypilot.yaml"
ENVIRONMENT = {"SLURM_NNODES": "4", "SLURM_JOB_ID": "17", "head": "node1", "SHARED": "/shared"}
PROCESSES = {"slurm": 32, "skypilot": 8}


def _sky() -> dict[str, Any]:
    found: dict[str, Any] = pytest.importorskip("yaml").safe_load(SKYPILOT.read_text())
    return found


def _script(name: str) -> str:
    return SLURM.read_text() if name == "slurm" else str(_sky()["run"])


def _command(name: str) -> list[str]:
    """The words of the torchrun command of a file, as the shell would make them."""
    lines = _script(name).replace("\\\n", " ").splitlines()
    (line,) = (line for line in lines if "torchrun " in line and not line.lstrip().startswith("#"))
    words = re.sub(r"\$\{?(\w+)\}?", lambda m: ENVIRONMENT[m[1]], line)
    return shlex.split(words.partition("torchrun ")[2])


def _options(name: str) -> Any:
    """torchrun's options; it exits on one that it does not know."""
    return get_args_parser().parse_args(_command(name))


@pytest.mark.parametrize("name", PROCESSES)
def test_bash_can_read_the_scripts(name: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=_script(name), text=True, capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize("name", PROCESSES)
def test_torchrun_knows_its_options(name: str) -> None:
    """And they are those that let a run save when it is asked to stop, and start again."""
    options = _options(name)
    assert options.module
    assert options.training_script == "normfree"
    assert set(options.signals_to_handle.split(",")) == {"SIGTERM", "SIGINT", "SIGUSR1"}
    assert options.max_restarts > 0
    nodes = 1 if options.standalone else int(options.nnodes)
    assert nodes * int(options.nproc_per_node) == PROCESSES[name]


@pytest.mark.parametrize("name", PROCESSES)
def test_normfree_knows_its_settings(name: str) -> None:
    """The run can be made from them, be dealt to the processes, and be gone on with by the same command."""
    command, *arguments = _options(name).training_script_args
    assert command == "train"
    args: Any = parse(_Arguments, "train", _with_resume(arguments))
    given = given_settings(args)
    check_ranges(given.values)
    images = SyntheticSource(*IMAGENET[::2])
    settings = RECIPES[recipe_name(args.recipe, given)](given, images)
    check_given(settings, given.values)
    check_run(settings, images, PROCESSES[name])
    assert args.resume == "auto"
    assert args.run_dir is not None


def test_slurm_leaves_time_to_save() -> None:
    """The signal comes by name, before the limit, by more than torchrun waits for its processes to end."""
    sent = re.search(r"^#SBATCH --signal=(\w+)@(\d+)", SLURM.read_text(), re.MULTILINE)
    assert sent is not None
    options = _options("slurm")
    assert f"SIG{sent[1]}" in options.signals_to_handle.split(",")
    assert int(sent[2]) > options.shutdown_timeout
    assert "\n#SBATCH --requeue" in SLURM.read_text()


@pytest.mark.parametrize(
    ("code", "left", "requeued"), [(0, 60, False), (1, 60, True), (1, 4000, False), (143, 60, True), (1, None, False)]
)
def test_slurm_puts_back_only_what_its_limit_has_ended(
    code: int, left: int | None, requeued: bool, tmp_path: Path
) -> None:
    """With commands in the place of Slurm's own: srun ends with a code, so many seconds before the limit."""
    for name, does in {"srun": f"exit {code}", "scontrol": f'echo "$@" >> {tmp_path}/said; echo node1'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    environment = ENVIRONMENT | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[1-4]"}
    script = SLURM.read_text()
    if left is not None:
        script = f"export SLURM_JOB_END_TIME=$(($(date +%s) + {left}))\n{script}"
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, "")
    assert ("requeue 17" in (tmp_path / "said").read_text()) == requeued


def test_a_spot_job_keeps_its_run_outside_the_machine() -> None:
    """What the run folder lies on outlives the machine and takes renames; the machine is replaced."""
    job = _sky()
    assert job["resources"]["use_spot"] is True
    arguments = _options("skypilot").training_script_args
    folder = Path(arguments[arguments.index("--run-dir") + 1])
    mount = job["file_mounts"][str(folder.parent)]
    assert mount["mode"] == "MOUNT_CACHED"
    assert arguments[arguments.index("--data.root") + 1] in job["file_mounts"]

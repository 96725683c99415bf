"""What several commands share: parsing, and finding the weights that an argument means."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import nn

from normfree.config import Run, UserError, from_dict, is_out_of_memory, suggestion
from normfree.data.crop import Preprocessing
from normfree.data.sources import Source
from normfree.distributed import Group
from normfree.evaluate import published_preprocessing, sample_images
from normfree.models import MODELS, Network, model_config
from normfree.models.download import PUBLISHED, find_weights
from normfree.models.inference import for_inference
from normfree.models.weights import is_ours, load_foreign, load_model
from normfree.nn.loss import LOSSES
from normfree.recipes.choose import device
from normfree.train.loop import weights_path
from normfree.train.record import RunFolder

T = TypeVar("T")


def parse(kind: type[T], command: str, arguments: Sequence[str]) -> T:
    """The arguments of a command as a dataclass; leaves with 2 and the nearest names if they are off."""
    return tyro.cli(kind, prog=f"normfree {command}", args=list(arguments))


def among_processes(run: Callable[[Group], int]) -> int:
    """The exit code of `run`, alone or among the processes that torchrun started; the first to fail says why."""
    group, failed = Group.from_environment(), True
    try:
        code = run(group)
        failed = code != 0
    except (Exception, KeyboardInterrupt) as e:
        if group.first_to_fail():
            raise
        code = 130 if isinstance(e, KeyboardInterrupt) else 1  # another process has said why
    finally:
        group.close(failed)
    return code


@dataclass(frozen=True)
class Trained:
    """A network with what is stored beside its weights; run, where the weights belong to a run folder.

    classes is empty where no names are stored: then the classifier's outputs go by number.
    """

    model: Network
    name: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    batch_size: int
    loss: str = "softmax"  # that it was trained with
    folder: RunFolder | None = None
    run: Run | None = None


_PUBLISHED_BATCH = 50  # as the authors evaluate


def load_trained(target: str, weights: str | None) -> Trained:
    """The network that `target` means: a run folder, a weights file, or a model's name with `weights`.

    Weights are a file of ours or, with a model's name, one of the authors or of timm; an address; or "hub" or
    "authors" for those that are published.

    Raises:
        UserError: neither a run folder, nor a file, nor a name; or a name without weights.
    """
    path = Path(target)
    if path.is_dir():
        folder, run = RunFolder.open(path)
        return _load(Path(weights) if weights else weights_path(folder), folder, run)
    if path.is_file():
        if weights is not None:
            raise UserError(f"{target} is a file of weights already; --weights goes with a model's name")
        return _load(path)
    if target not in MODELS:
        if os.sep in target or "/" in target:
            raise UserError(f"{target} is missing: expected a run folder, or the name of a model")
        hint = suggestion(target, MODELS) or "; `normfree list` shows them"
        raise UserError(f"{target!r} is neither a run folder nor a model{hint}")
    if weights is None:
        has = ", or --weights hub to download those published" if target in PUBLISHED else ""
        raise UserError(f"{target} needs --weights FILE{has}")
    file = find_weights(target, weights)
    if not is_ours(file):
        model = load_foreign(model_config(target), file)
        return Trained(model, target, (), published_preprocessing(target), _PUBLISHED_BATCH)
    found = _load(file)
    if found.name != target:
        raise UserError(f"{weights} has the weights of {found.name}, not of {target}")
    return found


def _load(path: Path, folder: RunFolder | None = None, run: Run | None = None) -> Trained:
    if path.exists() and not is_ours(path):
        raise UserError(f"{path} is not of this program; name its model: normfree evaluate MODEL --weights {path}")
    model, about = load_model(path)
    classes, batch_size = about.get("classes", []), about.get("eval_batch_size", _PUBLISHED_BATCH)
    if not isinstance(classes, list) or not all(isinstance(c, str) for c in classes):
        raise UserError(f"{path}: its class names are broken")
    if classes and len(classes) != model.config.num_classes:
        raise UserError(f"{path} names {len(classes)} classes and has {model.config.num_classes} outputs")
    if type(batch_size) is not int or batch_size < 1:
        raise UserError(f"{path}: its batch size is broken")
    loss = about.get("loss", "softmax")
    if loss not in LOSSES:
        raise UserError(f"{path} was trained with a loss that is not known: {loss!r}")
    return Trained(model, model.name, tuple(classes), _stored(path, model, about), batch_size, loss, folder, run)


def _stored(path: Path, model: Network, about: dict[str, Any]) -> Preprocessing:
    """The preprocessing in a file's header; where it has none, that of the weights that are published for the model."""
    if "preprocessing" in about:
        return from_dict(Preprocessing, about["preprocessing"], f"{path}: preprocessing")
    if model.name not in MODELS:
        raise UserError(f"{path} does not say how its images are prepared")
    return published_preprocessing(model.name)


@dataclass(kw_only=True)
class Speed:
    """How a trained network is run: by default in the arithmetic that its scores are stored of, to the last bit."""

    device: str | None = None  # "cpu" or "cuda"
    precision: Literal["fp32", "bf16", "fp16", "int8"] = "fp32"  # of weights and maps; int8 is for CPUs, compiled
    compile: bool = False  # by torch.compile with frozen weights: half a minute, then quickest


_CALIBRATION = 64  # images whose ranges the integers cover
_FEW = 16


def made_ready(
    trained: Trained, speed: Speed, source: Source, preprocessing: Preprocessing, batch_size: int
) -> nn.Module:
    """The network on its device, as stored; folded and as `speed` says where that asks for something else.

    Raises:
        UserError: the device does not have the precision.
    """
    model = trained.model.to(speed.device or device()[0])
    if speed.precision == "fp32" and not speed.compile:
        return model
    images = sample_images(source, preprocessing, _CALIBRATION) if speed.precision == "int8" else None
    if images is not None and 0 < len(images) < _FEW:
        warn(f"int8 covers the ranges of {len(images)} images: more would be better")
    ready = for_inference(model, speed.precision, speed.compile, images)
    if speed.compile:
        _compile_now(ready, torch.zeros(batch_size, 3, *[preprocessing.size] * 2))
    return ready


def _compile_now(ready: nn.Module, images: torch.Tensor) -> None:
    """Where it can be said that it does not work."""
    try:
        with torch.inference_mode():
            ready(images.to(next(ready.parameters()).device))
    except Exception as e:  # whatever the compiler and its absence may raise
        if is_out_of_memory(e):
            raise
        raise UserError(f"--compile does not work here: {str(e)[:300]}") from e


def check_device(device: str | None) -> None:
    """Raises UserError if a device does not exist here."""
    if device is None:
        return
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"unknown device {device!r}; choose cpu, cuda or cuda:N")
    if device != "cpu" and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise UserError(
            f"{device!r} is not here: torch finds {torch.cuda.device_count()} CUDA devices; see normfree doctor"
        )


def show(table: Table) -> None:
    """Print a table in full, even where the output is no terminal or a narrow one."""
    console = Console(highlight=False)
    needed = Console(width=10_000).measure(table).maximum
    console.width = max(console.width, needed)
    console.print(table)


def warn(text: str) -> None:
    """A line on the error stream."""
    print(f"normfree: {text}", file=sys.stderr)

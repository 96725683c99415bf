"""Weights in files: ours are safetensors whose header says what they belong to."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from normfree.config import UserError, from_dict, suggestion
from normfree.files import write_atomic
from normfree.models.families import NetworkConfig
from normfree.models.network import Network

_KEY = "normfree"  # of the header's entry, a JSON object: {"model": .., "config": {..}, "classes": [..], ..}


def save_weights(model: nn.Module, path: Path, about: dict[str, Any]) -> None:
    """Write the state of a model with `about`, anything that JSON holds, in the header; atomically."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    write_atomic(path, save(tensors, {_KEY: json.dumps(about)}))


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by name, what the header says) of a safetensors file; nothing in it is executed.

    Raises:
        UserError: no such file, or not a whole safetensors file.
    """
    try:
        with safe_open(path, "pt") as f:
            about = json.loads((f.metadata() or {}).get(_KEY, "{}"))
            return {name: f.get_tensor(name) for name in f.keys()}, about  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (SafetensorError, ValueError, OSError) as e:
        raise UserError(f"{path} is not a whole safetensors file: {e}") from e


def load_weights(model: nn.Module, path: Path | str) -> None:
    """Fill a model from one of our safetensors files, after checking that every tensor is there, fits and is finite.

    Raises:
        UserError: no such file, not safetensors, or tensors that are missing, unexpected, misshapen or not finite.
    """
    tensors, _ = read_weights(Path(path))
    _fill(model, tensors, Path(path))


def load_model(path: Path) -> tuple[Network, dict[str, Any]]:
    """The model that a file of `save_weights` was made from, in evaluation mode, and what its header says."""
    tensors, about = read_weights(path)
    if "config" not in about:
        raise UserError(f"{path} does not say which network it belongs to; name the model too")
    model = Network(from_dict(NetworkConfig, about["config"], f"{path}: config"))
    _fill(model, tensors, path)
    return model.eval(), about


def describe(name: str, model: Network) -> dict[str, Any]:
    """The part of `about` from which `load_model` builds the network again."""
    return {"model": name, "config": asdict(model.config)}


def _fill(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    wanted = model.state_dict()
    problems = [f"{n} is missing" for n in wanted if n not in tensors]
    problems += [f"{n} is unexpected{suggestion(n, wanted)}" for n in tensors if n not in wanted]
    for n in wanted.keys() & tensors.keys():
        if wanted[n].shape != tensors[n].shape:
            problems.append(f"{n} has shape {tuple(tensors[n].shape)}, the model {tuple(wanted[n].shape)}")
        elif not torch.isfinite(tensors[n]).all():
            problems.append(f"{n} has values that are not finite")
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise UserError(f"{path} does not fit the model: {'; '.join(problems[:5])}{more}")
    model.load_state_dict(tensors)

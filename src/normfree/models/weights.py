"""Weights in files: our own, the authors', and timm's, told apart by what is in them and never by executing it.

Ours are safetensors whose header says what they belong to.
"""

from __future__ import annotations

import json
import pickle
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from normfree.config import UserError, from_dict, suggestion
from normfree.files import write_atomic
from normfree.models.exchange import (
    State,
    from_haiku,
    from_timm,
    haiku_name,
    timm_name,
    to_haiku,
    to_timm,
    written_by_haiku,
    written_by_timm,
)
from normfree.models.families import NetworkConfig
from normfree.models.fold import fold
from normfree.models.network import Network
from normfree.models.unpickle import read_haiku, write_haiku

_KEY = "normfree"  # of the header's entry, a JSON object: {"model": .., "config": {..}, "classes": [..], ..}
_LEGACY_TORCH = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # how torch.save began before zip files


@dataclass(frozen=True)
class Loaded:
    """What `load_weights` found: kind is "normfree", "authors" or "timm"; left_out, our tensors that keep their values
    since the file's classifier is for another number of classes.
    """

    kind: str
    left_out: tuple[str, ...]


def save_weights(model: nn.Module, path: Path | str, about: dict[str, Any]) -> None:
    """Write the state of a model with `about`, anything that JSON holds, in the header; atomically."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    write_atomic(Path(path), save(tensors, {_KEY: json.dumps(about)}))


def export_weights(model: Network, path: Path | str, kind: str) -> None:
    """Write the weights for other code: kind "authors" is their pickled Haiku tree, "timm" safetensors in its names.

    Raises:
        UserError: an unknown kind, or a network that the other code does not have.
    """
    if kind == "authors":
        write_atomic(Path(path), write_haiku(to_haiku(model)))
    elif kind == "timm":
        write_atomic(Path(path), save({n: t.cpu().contiguous() for n, t in to_timm(model).items()}))
    else:
        raise UserError(f"unknown kind of weights {kind!r}; choose authors or timm")


def read_weights(path: Path) -> tuple[State, dict[str, Any]]:
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
    except (SafetensorError, ValueError, OSError, RecursionError) as e:
        raise UserError(f"{path} is not a whole safetensors file: {e}") from e


def read_tensors(path: Path) -> State:
    """The tensors of a file of any kind by the names it gives them; arrays of Haiku already in our layouts.

    safetensors; the authors' pickle of arrays, whose name ends in .npz; torch's .pth, which is read with weights_only.

    Raises:
        UserError: no such file, none of these, or a file that asks for something to be executed.
    """
    try:
        with open(path, "rb") as f:
            start = f.read(16)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}") from None
    if start.startswith((b"PK\x03\x04", _LEGACY_TORCH)):
        return _read_torch(path)
    if start.startswith(b"\x80"):
        return from_haiku(read_haiku(path))
    if start[8:9] == b"{":
        return read_weights(path)[0]
    raise UserError(f"{path} holds no weights: not safetensors, a .pth of torch, or the authors' .npz")


def _read_torch(path: Path) -> State:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError, KeyError, AttributeError) as e:
        lines = str(e).strip().splitlines() or [type(e).__name__]
        raise UserError(f"{path} is not a file of plain tensors: {lines[0][:200]}") from e
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):  # checkpoints of timm and others
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
            break
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise UserError(f"{path} does not hold a state dict")
    return {str(n).removeprefix("module."): t for n, t in found.items()}


def load_weights(model: nn.Module, path: Path | str) -> Loaded:
    """Fill a model from a file of weights: ours, the authors', or timm's where the network is the same.

    Every tensor must be there, fit and be finite. Only the classifier may be for another number of classes: then it
    keeps its values, with a warning.

    Raises:
        UserError: no such file, no weights, or tensors that are missing, unexpected, misshapen or not finite.
    """
    return _load(model, read_tensors(Path(path)), Path(path))


def _load(model: nn.Module, tensors: State, path: Path) -> Loaded:
    kind = "normfree"
    names = {n: n for n in model.state_dict()}
    if isinstance(model, Network) and written_by_haiku(tensors):
        kind, names = (
            "authors",
            {n: haiku_name(n, model.config) for n in names if not n.endswith("num_batches_tracked")},
        )
        tensors = {n: t for n, t in tensors.items() if "_ema/" not in n or n.endswith("/average")}
    elif isinstance(model, Network) and written_by_timm(tensors):
        kind, names = "timm", {n: timm_name(n, model.config) for n in names}
        tensors = from_timm(tensors, model)
    return Loaded(kind, _fill(model, tensors, names, path))


def load_model(path: Path) -> tuple[Network, dict[str, Any]]:
    """The model that a file of `save_weights` was made from, in evaluation mode, and what its header says."""
    tensors, about = read_weights(path)
    if not isinstance(about, dict) or "config" not in about:
        raise UserError(f"{path} does not say which network it belongs to; name the model too")
    with torch.device("meta"):  # so that a header that lies allocates nothing
        model = Network(from_dict(NetworkConfig, about["config"], f"{path}: config"))
    if about.get("folded"):
        model = fold(model)
    _check(model, tensors, {n: n for n in model.state_dict()}, path)
    model = model.to_empty(device="cpu")
    model.load_state_dict(tensors)
    return model.eval(), about


def is_ours(path: Path) -> bool:
    """Whether a file is one of `save_weights`, by the mark in its header."""
    try:
        with safe_open(path, "pt") as f:
            return _KEY in (f.metadata() or {})
    except (SafetensorError, OSError):
        return False


def network_for(config: NetworkConfig, path: Path) -> Network:
    """A network of that configuration with the weights of a file, and as many classes as the file has.

    Raises:
        UserError: as `load_weights`.
    """
    tensors = read_tensors(path)
    heads = [t for n, t in tensors.items() if n.endswith(("~/linear/b", "fc.bias")) and "squeeze_excite" not in n]
    if len(heads) == 1 and heads[0].ndim == 1:
        config = replace(config, num_classes=max(1, len(heads[0])))
    model = Network(config)
    _load(model, tensors, path)
    return model.eval()


def describe(name: str, model: Network) -> dict[str, Any]:
    """The part of `about` from which `load_model` builds the network again."""
    return {"model": name, "config": asdict(model.config), "folded": model.folded}


def _fill(model: nn.Module, tensors: State, names: dict[str, str], path: Path) -> tuple[str, ...]:
    """Copy the tensors that `names` says, from ours to the file's, into the model; returns those left out."""
    classifier = {"fc.weight", "fc.bias"} & names.keys()
    wanted = model.state_dict()
    others = {n for n in classifier if names[n] in tensors and tensors[names[n]].shape != wanted[n].shape}
    left_out: tuple[str, ...] = ()
    if others and {tensors[names[n]].shape[1:] for n in classifier if names[n] in tensors} == {
        wanted[n].shape[1:] for n in classifier
    }:
        left_out = tuple(sorted(classifier))
        theirs, own = (len(t["fc.bias"]) for t in ({n: tensors[names[n]] for n in classifier}, wanted))
        warnings.warn(
            f"{path} has a classifier for {theirs} classes, the model for {own}: it keeps its own, untrained",
            stacklevel=4,
        )
        tensors = {n: t for n, t in tensors.items() if n not in {names[c] for c in classifier}}
        names = {ours: n for ours, n in names.items() if ours not in classifier}
    _check(model, tensors, names, path)
    model.load_state_dict({ours: tensors[theirs] for ours, theirs in names.items()}, strict=False)
    return left_out


def _check(model: nn.Module, tensors: State, names: dict[str, str], path: Path) -> None:
    wanted = model.state_dict()
    known = set(names.values())
    problems = [f"{n} is missing" for n in names.values() if n not in tensors]
    problems += [f"{n} is unexpected{suggestion(n, known - tensors.keys())}" for n in tensors if n not in known]
    for ours, n in names.items():
        if n not in tensors:
            continue
        if wanted[ours].shape != tensors[n].shape:
            problems.append(f"{n} has shape {tuple(tensors[n].shape)}, the model {tuple(wanted[ours].shape)}")
        elif not torch.isfinite(tensors[n]).all():
            problems.append(f"{n} has values that are not finite")
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise UserError(f"{path} does not fit the model: {'; '.join(problems[:5])}{more}")

"""Weights in files: our own, the authors', and timm's, told apart by what is in them and never by executing it.

Ours are safetensors whose header says what they belong to.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from normfree.config import UserError, from_dict, suggestion
from normfree.files import open_plain, parse_json, write_atomic
from normfree.models.exchange import (
    State,
    authors_build,
    from_haiku,
    from_timm,
    haiku_name,
    take_constants,
    timm_builds,
    timm_name,
    to_haiku,
    to_timm,
    written_by_haiku,
    written_by_timm,
)
from normfree.models.families import NetworkConfig
from normfree.models.fold import fold
from normfree.models.network import Network
from normfree.models.torch_file import check_torch_file
from normfree.models.unpickle import read_haiku, write_haiku
from normfree.tensorfile import file_parts

_KEY = "normfree"  # of the header's entry, a JSON object: {"model": .., "config": {..}, "classes": [..], ..}
_LEGACY_TORCH = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # how torch.save began before zip files


@dataclass(frozen=True)
class Loaded:
    """What `load_weights` found.

    kind: "normfree", "authors" or "timm". left_out: our tensors that keep their values, since the classifier is for
    another number of classes; classes: (of the file, of the model) then.
    """

    path: Path
    kind: str
    left_out: tuple[str, ...] = ()
    classes: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        if not self.left_out:
            return f"weights of {self.path} ({self.kind})"
        theirs, ours = self.classes
        return f"{self.path} has a classifier for {theirs} classes, the model for {ours}: it keeps its own, untrained"


def save_weights(model: nn.Module, path: Path | str, about: dict[str, Any] | None = None) -> None:
    """Write the state of a model, atomically. For our networks the header says which one it is, so that `load_model`,
    `normfree evaluate` and `normfree predict` take the file alone.

    Args:
        model: any module.
        path: the file, safetensors.
        about: anything that JSON holds, for the header too: "classes", a list of names; "preprocessing", the fields of
            `normfree.data.crop.Preprocessing`.
    """
    header = {**(describe(model) if isinstance(model, Network) else {}), **(about or {})}
    write_atomic(Path(path), *file_parts(model.state_dict(), {_KEY: json.dumps(header)}))


def export_weights(model: Network, path: Path | str, kind: str) -> None:
    """Write the weights for other code: kind "authors" is their pickled Haiku tree, "timm" safetensors in its names.

    Raises:
        UserError: an unknown kind, or a network that the other code does not have.
    """
    if kind == "authors":
        write_atomic(Path(path), write_haiku(to_haiku(model)))
    elif kind == "timm":
        write_atomic(Path(path), *file_parts(to_timm(model)))
    else:
        raise UserError(f"unknown kind of weights {kind!r}; choose authors or timm")


def read_weights(path: Path) -> tuple[State, dict[str, Any]]:
    """(tensors by name, what the header says) of a safetensors file; nothing in it is executed.

    Raises:
        UserError: no such file, or not a whole safetensors file.
    """
    try:
        open_plain(path).close()  # safe_open would wait for a pipe
        with safe_open(path, "pt") as f:
            about = parse_json((f.metadata() or {}).get(_KEY, "{}"))
            return {name: f.get_tensor(name) for name in f.keys()}, about  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (SafetensorError, ValueError, OSError) as e:
        raise UserError(f"{path} is not a whole safetensors file: {str(e)[:300]}") from e


def read_tensors(path: Path) -> State:
    """The tensors of a file of any kind by the names it gives them; arrays of Haiku already in our layouts.

    safetensors; the authors' pickle of arrays, whose name ends in .npz; torch's .pth, which is read with weights_only.

    Raises:
        UserError: no such file, none of these, or a file that asks for something to be executed.
    """
    try:
        with open_plain(path) as f:
            start = f.read(16)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}") from None
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return read_weights(path)[0]  # first: the length that these files begin with may look like another kind
    if start.startswith((b"PK\x03\x04", _LEGACY_TORCH)):
        return _read_torch(path)
    if start.startswith(b"\x80"):
        return from_haiku(read_haiku(path))
    if start[8:9] == b"{":
        return read_weights(path)[0]  # which says what is wrong with it
    raise UserError(f"{path} holds no weights: not safetensors, a .pth of torch, or the authors' .npz")


def _read_torch(path: Path) -> State:
    try:
        with open_plain(path) as f, warnings.catch_warnings():  # opened here: torch goes by some suffixes
            warnings.simplefilter("ignore")
            check_torch_file(f)
            found = torch.load(f, map_location="cpu", weights_only=True)
    except Exception as e:  # a broken file may fail in any way, and ask for any amount
        lines = str(e).strip().splitlines() or [type(e).__name__]
        raise UserError(f"{path} is not a file of plain tensors: {lines[0][:200]}") from e
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):  # checkpoints of timm and others
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
            break
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise UserError(f"{path} does not hold a state dict")
    for n, t in found.items():
        if t.layout != torch.strided or t.device.type != "cpu" or t.untyped_storage().nbytes() < t.nbytes:
            raise UserError(f"{path}: {str(n)[:100]} is not a plain tensor")
    names = [str(n) for n in found]
    prefix = "module." if all(n.startswith("module.") for n in names) else ""
    return {n.removeprefix(prefix): t for n, t in zip(names, found.values(), strict=True)}


def load_weights(model: nn.Module, path: Path | str) -> Loaded:
    """Fill a model from a file of weights: ours, the authors', or timm's where the network is the same.

    Every tensor must be there, fit and be finite. Only the classifier may be for another number of classes: then it
    keeps its values, with a warning.

    Raises:
        UserError: no such file, no weights, another network's, or tensors that are missing, unexpected, misshapen or
            not finite.
    """
    loaded = fill_from(model, Path(path))
    if loaded.left_out:
        warnings.warn(str(loaded), stacklevel=2)
    return loaded


def fill_from(model: nn.Module, path: Path) -> Loaded:
    """`load_weights` without its warning."""
    return _fill(model, read_tensors(path), path)


def _fill(model: nn.Module, tensors: State, path: Path) -> Loaded:
    kind, names = _names(model, tensors, path)
    if kind == "authors":
        tensors = {n: t for n, t in tensors.items() if not n.endswith(("/hidden", "/counter"))}
    elif kind == "timm":
        assert isinstance(model, Network)
        tensors = from_timm(tensors, model)
    classes = _other_classes(model, tensors, names)
    left_out = tuple(n for n in ("fc.bias", "fc.weight") if n in names) if classes is not None else ()
    tensors = {n: t for n, t in tensors.items() if n not in {names[ours] for ours in left_out}}
    names = {ours: n for ours, n in names.items() if ours not in left_out}
    _check(model, tensors, names, path)
    if kind == "timm":
        assert isinstance(model, Network)
        take_constants(tensors, model)
    model.load_state_dict({ours: tensors[n] for ours, n in names.items()}, strict=False)
    return Loaded(path, kind, left_out, classes or (0, 0))


def _other_classes(model: nn.Module, tensors: State, names: dict[str, str]) -> tuple[int, int] | None:
    """(classes of the file, of the model) where its classifier fits but for their number."""
    own = {n: t for n, t in model.state_dict().items() if n in ("fc.weight", "fc.bias")}
    theirs = {n: tensors[names[n]] for n in own if names[n] in tensors}
    if not own or theirs.keys() != own.keys() or any(t.ndim == 0 for t in theirs.values()):
        return None
    counts = {len(t) for t in theirs.values()}
    fits = all(theirs[n].shape[1:] == own[n].shape[1:] for n in own)
    classes, ours = counts.pop(), len(next(iter(own.values())))
    return (classes, ours) if fits and not counts and classes not in (0, ours) else None


def _names(model: nn.Module, tensors: State, path: Path) -> tuple[str, dict[str, str]]:
    """(kind of the file, the file's name of each tensor of the model)."""
    ours = list(model.state_dict())
    if isinstance(model, Network) and written_by_haiku(tensors):
        if not authors_build(model.config):
            raise UserError(f"{path} is of the authors' code, which has no such network as the model")
        return "authors", {n: haiku_name(n, model.config) for n in ours if not n.endswith("num_batches_tracked")}
    if isinstance(model, Network) and written_by_timm(tensors):
        if not timm_builds(model.config):
            raise UserError(f"{path} is of timm, which has no such network as the model")
        return "timm", {n: timm_name(n, model.config) for n in ours}
    if isinstance(model, Network) and is_ours(path):
        _same_network(model, read_header(path), path)
    return "normfree", {n: n for n in ours}


# fields of a configuration that may differ between a file and the model that it fills
_FREE = (
    *("num_classes", "train_size", "test_size", "drop_rate", "stochastic_depth", "magnitude", "output_stride"),
    *("skip_init", "classifier_std"),
)


def _same_network(model: Network, about: Any, path: Path) -> None:
    """Tensors of one shape may belong to another function: the activation, alpha and others have none."""
    if not isinstance(about, dict) or "config" not in about:
        return
    if bool(about.get("folded")) != model.folded:
        raise UserError(f"{path} is {'' if about.get('folded') else 'not '}folded, the model is not so")
    theirs = from_dict(NetworkConfig, about["config"], f"{path}: config")
    for f in fields(NetworkConfig):
        a, b = getattr(theirs, f.name), getattr(model.config, f.name)
        if f.name not in _FREE and a != b:
            raise UserError(f"{path} is of another network: its {f.name} is {a}, the model's {b}")


def load_model(path: Path) -> tuple[Network, dict[str, Any]]:
    """The model that a file of `save_weights` was made from, in evaluation mode, and what its header says."""
    tensors, about = read_weights(path)
    if not isinstance(about, dict) or "config" not in about:
        raise UserError(f"{path} does not say which network it belongs to; name the model too")
    config = from_dict(NetworkConfig, about["config"], f"{path}: config")
    if sum(config.depths) > len(tensors):
        raise UserError(f"{path} has fewer tensors than its network blocks")
    with torch.device("meta"):  # so that a header that lies allocates nothing
        model = Network(config)
    if about.get("folded"):
        model = fold(model)
    model.name = str(about.get("model", ""))
    _check(model, tensors, {n: n for n in model.state_dict()}, path)
    model = model.to_empty(device="cpu")
    model.load_state_dict(tensors)
    return model.eval(), about


def is_ours(path: Path) -> bool:
    """Whether a file is one of `save_weights`, by the mark in its header."""
    return _header(path) is not None


def read_header(path: Path) -> Any:
    """What the header of one of our files says, without reading its tensors; an empty dict for other files.

    Raises:
        UserError: the header is broken.
    """
    try:
        return parse_json(_header(path) or "{}")
    except ValueError as e:
        raise UserError(f"{path} is not a whole safetensors file: {str(e)[:300]}") from e


def _header(path: Path) -> str | None:
    try:
        open_plain(path).close()
        with safe_open(path, "pt") as f:
            text: str | None = (f.metadata() or {}).get(_KEY)
            return text
    except (SafetensorError, OSError):
        return None


def load_foreign(config: NetworkConfig, path: Path) -> Network:
    """A network of that configuration with weights of the authors or of timm, and as many classes as the file has.

    In evaluation mode.

    Raises:
        UserError: as `load_weights`.
    """
    tensors = read_tensors(path)
    heads = [t for n, t in tensors.items() if n.endswith(("~/linear/b", "fc.bias")) and "squeeze_excite" not in n]
    if len(heads) == 1 and heads[0].ndim == 1:
        config = replace(config, num_classes=max(1, len(heads[0])))
    model = Network(config)
    _fill(model, tensors, path)
    return model.eval()


def describe(model: Network) -> dict[str, Any]:
    """The part of `about` from which `load_model` builds the network again."""
    return {"model": model.name, "config": asdict(model.config), "folded": model.folded}


def _check(model: nn.Module, tensors: State, names: dict[str, str], path: Path) -> None:
    wanted = model.state_dict()
    known = set(names.values())
    found = {n for n in known if n in tensors}
    shapes = {n: wanted[ours].shape for ours, n in names.items() if n in found}
    misshapen = [n for n in found if tensors[n].shape != shapes[n]]
    problems = {
        "missing": [n for n in names.values() if n not in tensors],
        "unexpected": [n for n in tensors if n not in known],
        "of another shape": [f"{n}, {_shape(tensors[n])} and not {_shape(shapes[n])}" for n in sorted(misshapen)],
    }
    if not misshapen:
        types = {n: wanted[ours].dtype for ours, n in names.items() if n in found}
        problems["of another type"] = [n for n in sorted(found) if not _castable(tensors[n].dtype, types[n])]
        problems["not finite"] = [
            n
            for n in sorted(found.difference(problems["of another type"]))
            if not torch.isfinite(tensors[n].to(types[n])).all()
        ]
    parts = [f"{_some(n)} {'is' if len(n) == 1 else 'are'} {kind}" for kind, n in problems.items() if n]
    if parts:
        near = suggestion(problems["unexpected"][0], problems["missing"][:1000]) if problems["unexpected"] else ""
        raise UserError(f"{path} does not fit the model: {'; '.join(parts)}{near}")


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _castable(theirs: torch.dtype, ours: torch.dtype) -> bool:
    """Floats go into floats, and counters are counters."""
    return theirs in _FLOATS if ours in _FLOATS else theirs == ours


def _shape(x: Tensor | torch.Size) -> str:
    return "x".join(map(str, x.shape if isinstance(x, Tensor) else x)) or "a number"


def _some(names: list[str]) -> str:
    return ", ".join(n[:100] for n in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

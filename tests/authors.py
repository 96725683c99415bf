"""The fixtures that the authors' code made, in our names and layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

FIXTURES = Path(__file__).parent / "fixtures"


def load(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, what the file says about itself) of a fixture."""
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as f:
        return {key: f.get_tensor(key) for key in f.keys()}, json.loads(f.metadata()["about"])  # noqa: SIM118


def our_name(theirs: str) -> str:
    """'NFNet/~/nf_block_3/~/squeeze_excite/~/linear_1/w' -> 'blocks.3.squeeze_excite.fc1.weight'."""
    path, _, leaf = theirs.rpartition("/")
    leaf = {"w": "weight", "b": "bias"}.get(leaf, leaf)
    parts = []
    for part in path.split("/~/")[1:]:
        stem, _, number = part.rpartition("_")
        if part.startswith("stem_conv"):
            parts.append(f"stem.{part.removeprefix('stem_conv')}")
        elif part == "nf_block" or stem == "nf_block":
            parts.append(f"blocks.{number if stem else 0}" if part != "nf_block" else "blocks.0")
        elif parts and part in ("linear", "linear_1"):
            parts.append("fc1" if number == "1" else "fc0")
        else:
            parts.append("fc" if part == "linear" else part)
    if leaf == "skip_gain":
        parts.append("skip")
    return ".".join([*parts, leaf])


def our_layout(theirs: Tensor) -> Tensor:
    """HWIO -> OIHW, IO -> OI, a scalar -> one element."""
    if theirs.ndim == 4:
        return theirs.permute(3, 2, 0, 1).contiguous()
    return theirs.T.contiguous() if theirs.ndim == 2 else theirs.reshape(-1)


def tree(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The parameters below a prefix, in our names and layouts."""
    return {our_name(k.removeprefix(prefix)): our_layout(t) for k, t in tensors.items() if k.startswith(prefix)}


def images(nhwc: Tensor) -> Tensor:
    """NHWC -> NCHW."""
    return nhwc.permute(0, 3, 1, 2).contiguous()

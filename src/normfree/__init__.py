"""Normalizer-free image recognition in PyTorch: NFNets, adaptive gradient clipping, and a trainer.

After Brock, De, Smith, Simonyan: High-Performance Large-Scale Image Recognition Without Normalization (2021).
Names are imported when they are first used, so that `import normfree` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normfree import data, models, nn, optim
    from normfree.models import (
        convert,
        create_model,
        export_weights,
        fold,
        for_inference,
        list_models,
        load_weights,
        save_weights,
    )
    from normfree.optim import EMA, SAM, WarmupCosine, clip_grad_agc_, param_groups

__version__ = "0.1.0"

_HOMES = {
    "convert": "models",
    "create_model": "models",
    "export_weights": "models",
    "fold": "models",
    "for_inference": "models",
    "list_models": "models",
    "load_weights": "models",
    "save_weights": "models",
    "EMA": "optim",
    "SAM": "optim",
    "WarmupCosine": "optim",
    "clip_grad_agc_": "optim",
    "param_groups": "optim",
}
_MODULES = ("data", "models", "nn", "optim")

__all__ = [
    "EMA",
    "SAM",
    "WarmupCosine",
    "clip_grad_agc_",
    "convert",
    "create_model",
    "data",
    "export_weights",
    "fold",
    "for_inference",
    "list_models",
    "load_weights",
    "models",
    "nn",
    "optim",
    "param_groups",
    "save_weights",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"normfree.{name}")
    if name in _HOMES:
        return getattr(import_module(f"normfree.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'normfree' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})

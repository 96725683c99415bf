"""The paper's parameter groups, every parameter in exactly one."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

_WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CLASSIFIERS = ("fc", "head", "classifier")


def param_groups(
    model: nn.Module,
    weight_decay: float = 2e-5,
    clipping: float | None = 0.01,
    classifier: str | None = None,
    overrides: Mapping[str, float | None] | None = None,
) -> list[dict[str, Any]]:
    """Groups for `AGCSGD`, or any optimizer that takes groups.

    Gains and biases (SkipInit, squeeze-excite and classifier biases among them): clipped, never decayed. The weight of
    the classifier: decayed, never clipped. All other weights: both.

    Args:
        model: any module.
        weight_decay: L2 coefficient of the weights.
        clipping: lambda of AGC; None switches it off everywhere.
        classifier: name of the classifier, a linear layer of the model; None takes the last one that is called, or is
            inside of what is called, fc, head or classifier.
        overrides: lambda by name of parameter or shell pattern, None to exempt: {"stem.*": None, "blocks.0.*": 0.02}.
            The last that matches wins, over the rules above too.

    Returns:
        [{"params": [...], "names": [...], "weight_decay": ..., "clipping": ..., "unit_dim": ..., "unit_groups": ...}],
        empty groups left out; parameters of one group share all of the latter.

    Raises:
        ValueError: `classifier` names no linear layer, a pattern matches nothing, or a lambda is not positive.
    """
    head = _classifier(model, classifier)
    named = dict(model.named_parameters())
    lambdas = _overridden(named, overrides or {})
    groups: dict[tuple[bool, float, int, int], dict[str, Any]] = {}
    for name, parameter in named.items():
        weight = _is_weight(model, name, parameter)
        exempt = weight and head is not None and name.startswith(f"{head}.")  # whatever parametrizes it
        settings: dict[str, Any] = {
            "weight_decay": weight_decay if weight else 0.0,
            "clipping": check_clipping(lambdas.get(name, None if exempt else clipping)),
            **_units(model, name),
        }
        order = (weight, settings["clipping"] or 0.0, settings["unit_dim"], settings["unit_groups"])
        group = groups.setdefault(order, {"params": [], "names": [], **settings})
        group["params"].append(parameter)
        group["names"].append(name)
    return [group for _, group in sorted(groups.items())]


def check_clipping(clipping: float | None) -> float | None:
    """A lambda as it is. Raises ValueError where it is not positive: None is what exempts."""
    if clipping is not None and not clipping > 0:
        raise ValueError(f"clipping must be positive, or None to exempt, not {clipping}")
    return clipping


def _overridden(names: Mapping[str, Any], overrides: Mapping[str, float | None]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for pattern, value in overrides.items():
        matching = [n for n in names if fnmatchcase(n, pattern)]
        if not matching:
            raise ValueError(f"no parameter matches {pattern!r}; names are such as {', '.join(list(names)[:3])}")
        found |= dict.fromkeys(matching, value)
    return found


def _classifier(model: nn.Module, name: str | None) -> str | None:
    modules = dict(model.named_modules())
    if name is not None:
        if not _is_linear(modules.get(name)):
            raise ValueError(f"the model has no linear layer named {name!r}")
        return name
    linear = [n.split(".") for n, m in modules.items() if _is_linear(m)]
    found = [parts for parts in linear if parts[0] in _CLASSIFIERS or parts[-1] in _CLASSIFIERS]
    return ".".join(found[-1]) if found else None


def _is_linear(module: nn.Module | None) -> bool:
    """A linear layer, or a convolution of single pixels, which is one."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and set(module.kernel_size) == {1})


def _is_weight(model: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    owner, _, leaf = name.rpartition(".")
    if "bias" in leaf or "gain" in leaf:
        return False
    if leaf == "weight" and isinstance(model.get_submodule(owner), _WEIGHTED):
        return True
    return sum(n > 1 for n in parameter.shape) > 1


def _units(model: nn.Module, name: str) -> dict[str, int]:
    """Where the outputs of a parameter are; see `normfree.optim.agc`."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf == "weight" and isinstance(module, _TRANSPOSED):
        return {"unit_dim": 1, "unit_groups": module.groups}
    return {"unit_dim": 0, "unit_groups": 1}

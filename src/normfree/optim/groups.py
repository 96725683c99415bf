"""The paper's three parameter groups, every parameter in exactly one."""

from __future__ import annotations

from typing import Any

from torch import nn

_WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)
_CLASSIFIERS = ("fc", "head", "classifier")


def param_groups(
    model: nn.Module, weight_decay: float = 2e-5, clipping: float | None = 0.01, classifier: str | None = None
) -> list[dict[str, Any]]:
    """Groups for `AGCSGD`, or any optimizer that takes groups.

    Gains and biases (SkipInit, squeeze-excite and classifier biases among them): clipped, never decayed. The weight of
    the classifier: decayed, never clipped. All other weights: both.

    Args:
        model: any module.
        weight_decay: L2 coefficient of the weights.
        clipping: lambda of AGC; None switches it off everywhere.
        classifier: name of the classifier, a linear layer of the model; None looks for fc, head and classifier.

    Returns:
        [{"params": [...], "names": [...], "weight_decay": ..., "clipping": ...}, ...], empty groups left out.

    Raises:
        ValueError: `classifier` names no linear layer.
    """
    exempt = f"{_classifier(model, classifier)}.weight"
    kinds: dict[str, list[tuple[str, nn.Parameter]]] = {"gain": [], "classifier": [], "weight": []}
    for name, parameter in model.named_parameters():
        kind = "classifier" if name == exempt else "weight" if _is_weight(model, name, parameter) else "gain"
        kinds[kind].append((name, parameter))
    settings = {
        "gain": {"weight_decay": 0.0, "clipping": clipping},
        "classifier": {"weight_decay": weight_decay, "clipping": None},
        "weight": {"weight_decay": weight_decay, "clipping": clipping},
    }
    return [
        {"params": [p for _, p in found], "names": [n for n, _ in found], **settings[kind]}
        for kind, found in kinds.items()
        if found
    ]


def _classifier(model: nn.Module, name: str | None) -> str | None:
    modules = dict(model.named_modules())
    if name is not None:
        if not isinstance(modules.get(name), nn.Linear):
            raise ValueError(f"the model has no linear layer named {name!r}")
        return name
    found = [n for n, m in modules.items() if n.split(".")[-1] in _CLASSIFIERS and isinstance(m, nn.Linear)]
    return found[-1] if found else None


def _is_weight(model: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    owner, _, leaf = name.rpartition(".")
    if "bias" in leaf or "gain" in leaf:
        return False
    if leaf == "weight" and isinstance(model.get_submodule(owner), _WEIGHTED):
        return True
    return sum(n > 1 for n in parameter.shape) > 1

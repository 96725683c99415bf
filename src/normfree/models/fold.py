"""Folding: the same network with plain convolutions, for inference and export."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from normfree.nn.conv import WSConv2d

M = TypeVar("M", bound=nn.Module)


def fold(model: M) -> M:
    """A copy in which every weight-standardised convolution is a plain one that gives the same maps.

    The standardised weight, with gain, gamma and 1/beta, becomes the weight. The copy has the parameters of plain
    convolutions (no gains) and no longer trains as the paper does; folding it again changes nothing. The original and
    its parameters are left as they are.

    Args:
        model: any module with `WSConv2d` in it; float32 or float64 for equal logits, other types are standardised in
            float32 and rounded once.

    Returns:
        a module of the same class.
    """
    if isinstance(model, WSConv2d):
        return model.folded()  # type: ignore[return-value]
    copied = copy.deepcopy(model)
    plain: dict[WSConv2d, nn.Module] = {}  # a convolution that is shared stays shared
    for module in list(copied.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, WSConv2d):
                if child not in plain:
                    plain[child] = child.folded()
                setattr(module, name, plain[child])
    return copied

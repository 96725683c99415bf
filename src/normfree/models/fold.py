"""Folding: the same network with plain convolutions, for inference and export."""

from __future__ import annotations

import copy
from typing import TypeVar, cast

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from normfree.models.block import Block
from normfree.models.network import Network
from normfree.nn.conv import SameConv2d, WSConv2d

M = TypeVar("M", bound=nn.Module)


def fold(model: M) -> M:
    """A copy in which every weight-standardised convolution is a plain one that gives the same maps.

    The standardised weight, with gain, gamma and 1/beta, becomes the weight. In a twin with batch norm, each norm that
    follows a convolution directly is merged into it, with its running statistics; those on the residual stream stay.
    The copy has the parameters of plain convolutions and no longer trains as the paper does; folding it again changes
    nothing. The original and its parameters are left as they are.

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
        for name, child in list(module._modules.items()):  # named_children() leaves out second names
            if isinstance(child, WSConv2d):
                if child not in plain:
                    plain[child] = child.folded()
                setattr(module, name, plain[child])
        if isinstance(module, Network):
            _merge_norms(module)
    return copied


def _merge_norms(network: Network) -> None:
    """Merge the norms that see nothing but a convolution's output, and mark the network."""
    network.folded = True
    for i, stem_norm in enumerate(network.stem_norms):
        network.stem[i] = _merged(network.stem[i], stem_norm)
    network.stem_norms = nn.ModuleList()
    for block in network.blocks:
        for conv, norm in _pairs(cast("Block", block)):
            if getattr(block, norm) is not None:
                setattr(block, conv, _merged(getattr(block, conv), getattr(block, norm)))
                setattr(block, norm, None)
    if network.final_norm is not None and network.final_conv is not None:
        network.final_conv = _merged(network.final_conv, network.final_norm)
        network.final_norm = None


def _pairs(block: Block) -> list[tuple[str, str]]:
    """The convolutions of a block and the norms that directly follow them."""
    pairs = [("conv0", "norm1")]
    if block.conv1b is not None:
        pairs.append(("conv1", "norm1b"))
    if block.squeeze != "inner":  # whose gate stands between
        pairs.append(("conv1" if block.conv1b is None else "conv1b", "norm2"))
    return pairs


def _merged(conv: nn.Module, norm: nn.Module) -> SameConv2d:
    """One convolution for conv and then norm, in evaluation mode."""
    assert isinstance(conv, SameConv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    return fuse_conv_bn_eval(copy.deepcopy(conv).eval(), norm.eval()).train(conv.training)

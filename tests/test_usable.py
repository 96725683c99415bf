"""The networks as others use them: every option against plain formulas, folding, features, compilers, per-example
gradients, types and sizes."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import normfree
from normfree.config import UserError, from_dict
from normfree.models import Network, NetworkConfig, model_config
from normfree.models.block import Block, Place, bottleneck_width
from normfree.models.fold import fold
from normfree.models.network import places
from normfree.models.propagation import expected_variance, measure
from normfree.nn.conv import SameConv2d, WSConv2d
from normfree.nn.layers import Draws

# Shapes: N images, C channels, H x W pixels.

_NFNET: dict[str, Any] = {
    "name": "nfnet_f0",
    "widths": (16, 24, 32, 32),
    "depths": (1, 2, 1, 2),
    "stem_widths": (4, 4, 8, 8),
    "group_width": 4,
    "final_width": 48,
}
_RESNET: dict[str, Any] = {"widths": (16, 24, 32, 48), "depths": (1, 2, 1, 2), "stem_widths": (8,)}
_REGNET: dict[str, Any] = {
    "name": "nf_regnet_b0",
    "widths": (8, 16, 24, 32),
    "depths": (1, 2, 1, 2),
    "stem_widths": (8,),
    "group_width": 4,
    "final_width": 40,
}
_NF_RESNET, _BN_RESNET = {"name": "nf_resnet50", **_RESNET}, {"name": "bn_resnet50", **_RESNET}
_BN_NFNET = {**_NFNET, "name": "bn_nfnet_f0"}
FAMILIES: dict[str, dict[str, Any]] = {
    "nfnet": _NFNET,
    "nf_resnet": _NF_RESNET,
    "nf_regnet": _REGNET,
    "bn_resnet": _BN_RESNET,
    "bn_nfnet": _BN_NFNET,
}
_STAGES = {
    "group_width": (2, 2, 4, 4),
    "expansion": (0.25, 0.25, 0.5, 0.5),
    "expand_from": ("in", "in", "out", "out"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "straddle": {**_NFNET, "squeeze": "straddle"},
    "inner": {**_NFNET, "squeeze": "inner"},
    "no squeeze": {**_NFNET, "squeeze": "none"},
    "grouped 1x1": {**_NFNET, "pointwise_groups": 2},
    "grouped 1x1, straddle": {**_NFNET, "pointwise_groups": 4, "squeeze": "straddle"},
    "stages differ": {**_NFNET, **_STAGES},
    "one group": {**_NFNET, "group_width": 0},
    "dct": {**_NFNET, "stem": "dct"},
    "fc": {**_NFNET, "final": "fc"},
    "no final": {**_NFNET, "final": "none"},
    "beta first": {**_NFNET, "beta_first": True},
    "zero classifier": {**_NFNET, "classifier_std": 0.0},
    "one 3x3": {**_NFNET, "second_conv": False},
    "strided shortcut": {**_NFNET, "shortcut": "stride"},
    "symmetric": {**_NFNET, "padding": "symmetric"},
    "silu": {**_NFNET, "activation": "silu"},
    "relu": {**_NFNET, "activation": "relu"},
    "first expansion": {**_NFNET, "first_expansion": 1.0},
    "se gelu": {**_NFNET, "se_gelu": True},
    "alpha and ratio": {**_NFNET, "alpha": 0.35, "se_ratio": 0.25, "skip_init": 1.0},
    "many": {**_NFNET, **_STAGES, "squeeze": "straddle", "beta_first": True, "final": "fc", "padding": "symmetric"},
    "resnet, symmetric": {**_NF_RESNET, "padding": "symmetric"},
    "resnet, pooled shortcut": {**_NF_RESNET, "shortcut": "pool", "squeeze": "out"},
    "resnet, second 3x3": {**_NF_RESNET, "second_conv": True, "group_width": 4, "beta_first": True},
    "resnet, dct": {**_NF_RESNET, "stem": "dct"},
    "regnet, straddle": {**_REGNET, "squeeze": "straddle", "beta_first": True},
    "regnet, fc": {**_REGNET, "final": "fc", "padding": "symmetric", "se_gelu": True},
    "bn, straddle": {**_BN_NFNET, "squeeze": "straddle", "padding": "symmetric", "se_gelu": True},
    "bn, inner": {**_BN_NFNET, "squeeze": "inner", "pointwise_groups": 2},
    "bn, fc": {**_BN_NFNET, "final": "fc", "second_conv": False},
    "bn, dct": {**_BN_NFNET, "stem": "dct"},
    "bn, beta first": {**_BN_NFNET, "beta_first": True},
    "bn resnet, conv": {**_BN_RESNET, "final": "conv", "final_width": 40, "shortcut": "pool"},
}
CASES = {**FAMILIES, **OPTIONS}
NORM_FREE = [case for case in FAMILIES if not case.startswith("bn")]


@cache
def _made(case: str) -> Network:
    return _make(CASES[case])


def _make(options: dict[str, Any], **more: Any) -> Network:
    """A network whose gains, biases and SkipInit are random: at SkipInit's 0 no residual branch is tested."""
    torch.manual_seed(1)
    chosen = {"num_classes": 7, "drop_rate": 0.0, **options, **more}
    return _random(normfree.create_model(**chosen))


def _random(model: Network) -> Network:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("bias", "gain")):
                p.normal_(0, 0.3)
            if ".norm" in name or "_norm" in name or name.endswith("gain"):
                p.add_(1)
        nn.init.normal_(model.fc.weight, 0, 0.3)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                cast(Tensor, module.running_mean).normal_(0, 0.3)
                cast(Tensor, module.running_var).uniform_(0.5, 2)
    return model


def _new(case: str) -> Network:
    """Of one's own, in evaluation mode."""
    return copy.deepcopy(_made(case)).eval()


def _blocks(model: Network) -> list[Block]:
    return cast("list[Block]", list(model.blocks))


def _error(ours: Tensor, theirs: Tensor) -> float:
    """Relative to the size of the whole tensor."""
    assert ours.shape == theirs.shape
    error: float = ((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-30)).item()
    return error


# The plain formulas


_GAMMAS = {"gelu": 1.7015043497085571, "relu": 1.7139588594436646, "silu": 1.7881293296813965}


def _gelu(z: Tensor) -> Tensor:
    """The tanh form, without gain."""
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


class Plain:
    """The network written from the descriptions of the options, with every scalar where the paper has it."""

    def __init__(self, model: Network) -> None:
        self.model, self.c = model, model.config
        self.free = self.c.norm == "none"

    def act(self, z: Tensor, norm: nn.Module | None = None) -> Tensor:
        """Gamma * act(z), or act(batch norm of z)."""
        if not self.free:
            z = self.batch_norm(norm, z)
        kind = self.c.activation
        z = _gelu(z) if kind == "gelu" else z * torch.sigmoid(z) if kind == "silu" else z.clamp_min(0)
        return z * _GAMMAS[kind] if self.free else z

    def batch_norm(self, norm: nn.Module | None, z: Tensor) -> Tensor:
        if norm is None:
            return z
        assert isinstance(norm, nn.BatchNorm2d)
        mean, var = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
        if self.model.training:
            mean = z.mean((0, 2, 3))
            var = ((z - mean[:, None, None]) ** 2).mean((0, 2, 3))
        z = (z - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        return z * norm.weight[:, None, None] + norm.bias[:, None, None]

    def pad(self, z: Tensor, k: int, s: int, value: float = 0.0) -> Tensor:
        if self.c.padding == "symmetric":
            return F.pad(z, (k // 2,) * 4, value=value)
        (top, bottom), (left, right) = (
            (total // 2, total - total // 2)
            for total in (max((math.ceil(size / s) - 1) * s + k - size, 0) for size in z.shape[2:])
        )
        return F.pad(z, (left, right, top, bottom), value=value)

    def conv(self, layer: nn.Module | None, z: Tensor, k: int, s: int = 1, groups: int = 1) -> Tensor:
        assert isinstance(layer, SameConv2d)
        w = layer.weight
        assert layer.kernel_size == (k, k)
        if self.free:
            n = w[0].numel()
            mean = w.mean((1, 2, 3), keepdim=True)
            sigma_squared = ((w - mean) ** 2).mean((1, 2, 3), keepdim=True)
            w = (w - mean) / (sigma_squared * n).clamp_min(self.c.ws_eps).sqrt()
            w = w * cast(Tensor, layer.gain)[:, None, None, None]
        return F.conv2d(self.pad(z, k, s), w, layer.bias, s, groups=groups)

    def gate(self, block: Block, z: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, 1, 1)."""
        se = block.squeeze_excite
        assert se is not None
        hidden = se.fc0(z.mean((2, 3)))
        hidden = _gelu(hidden) if self.c.se_gelu else hidden.clamp_min(0)
        out = torch.sigmoid(se.fc1(hidden))[:, :, None, None]
        return 2 * out if self.free else out

    def stem(self, x: Tensor) -> Tensor:
        c, norms = self.c, list(self.model.stem_norms)
        layers = list(self.model.stem)
        if c.stem == "dct":
            assert len(layers) == 1
            return self.conv(layers[0], _dct(x), 1)
        for i, (layer, stride) in enumerate(zip(layers, c.stem_strides, strict=True)):
            if i:
                x = self.act(x, norms[i - 1] if norms else None)
            x = self.conv(layer, x, c.stem_kernel, stride)
        return F.max_pool2d(self.pad(x, 3, 2, -math.inf), 3, 2) if c.stem_pool else x

    def block(self, block: Block, stage: int, index: int, stride: int, beta: float, x: Tensor) -> tuple[Tensor, Tensor]:
        """(the shortcut, the residual branch with alpha and SkipInit)."""
        c = self.c
        place = (stage, index)
        expansion = c.expansion[stage]
        if place == (0, 0) and c.first_expansion is not None:
            expansion = c.first_expansion
        out_chans = c.widths[stage]
        base = x.shape[1] if c.expand_from[stage] == "in" else out_chans
        width = int(expansion * base)
        groups = max(1, width // c.group_width[stage]) if c.group_width[stage] else 1
        first, then = (1.0, 1.0) if not self.free else (beta, 1.0) if c.beta_first else (1.0, beta)
        out = self.act(x / first, block.norm0) / then
        shortcut = x
        if stride > 1 or x.shape[1] != out_chans:
            if c.shortcut == "stride":
                shortcut = self.conv(block.conv_shortcut, out, 1, stride)
            else:
                shortcut = self.conv(block.conv_shortcut, _average(out, stride), 1)
        else:
            assert block.conv_shortcut is None
        out = self.conv(block.conv0, out, 1, groups=c.pointwise_groups)
        out = self.conv(block.conv1, self.act(out, block.norm1), 3, stride, groups)
        if c.second_conv:
            out = self.conv(block.conv1b, self.act(out, block.norm1b), 3, groups=groups)
        if c.squeeze == "inner":
            out = out * self.gate(block, out)
        before = self.act(out, block.norm2)
        out = self.conv(block.conv2, before, 1, groups=c.pointwise_groups)
        if c.squeeze == "straddle":
            out = out * self.gate(block, before)
        if c.squeeze == "out":
            out = out * self.gate(block, out)
        if self.free:
            assert block.skip_gain is not None
            out = out * block.skip_gain * c.alpha
        return shortcut, out

    def logits(self, x: Tensor, keep: Tensor | None = None, dropout: Tensor | None = None) -> Tensor:
        c, model = self.c, self.model
        strides = list(c.strides)
        if c.stem == "dct":  # it halves once more, so the first halving after it is left out
            strides[strides.index(2)] = 1
        x = self.stem(x)
        variance, i = 1.0, 0
        for stage, depth in enumerate(c.depths):
            for index in range(depth):
                stride = strides[stage] if index == 0 else 1
                shortcut, out = self.block(_blocks(model)[i], stage, index, stride, math.sqrt(variance), x)
                x = shortcut + (out if keep is None else out * keep[:, i, None, None, None])
                variance = (1.0 if index == 0 else variance) + c.alpha**2
                i += 1
        if c.final == "fc":
            assert model.final_fc is not None
            pooled = self.act(model.final_fc(x.mean((2, 3))))
        else:
            if c.final == "conv":
                x = self.conv(model.final_conv, x, 1)
            pooled = self.act(x, model.final_norm).mean((2, 3))
        return model.fc(pooled if dropout is None else pooled * dropout)  # type: ignore[no-any-return]


def _average(x: Tensor, stride: int) -> Tensor:
    """Over stride x stride windows, by the valid pixels."""
    pads = (0, -x.shape[3] % stride, 0, -x.shape[2] % stride)
    total, count = (F.avg_pool2d(F.pad(z, pads), stride) for z in (x, torch.ones_like(x)))
    return total / count


def _dct(x: Tensor) -> Tensor:
    """The 8 x 8 cosine transform by its sum: X[u, v] = a(u) a(v) sum of x[i, j] cos(..u..) cos(..v..)."""
    x = F.pad(x, (0, -x.shape[3] % 8, 0, -x.shape[2] % 8))
    n, c, h, w = x.shape
    rows = [[math.cos(math.pi * (2 * i + 1) * u / 16) / math.sqrt(4 if u else 8) for i in range(8)] for u in range(8)]
    basis = torch.tensor(rows, dtype=x.dtype)
    blocks = x.reshape(n, c, h // 8, 8, w // 8, 8)
    return torch.einsum("ncyixj,ui,vj->ncuvyx", blocks, basis, basis).reshape(n, c * 64, h // 8, w // 8)


@pytest.mark.parametrize("size", [(32, 32), (37, 50)])
@pytest.mark.parametrize("case", CASES)
def test_every_option_equals_its_plain_formula(case: str, size: tuple[int, int]) -> None:
    """In float64 to 1e-9, in training with the masks of stochastic depth and dropout and in evaluation."""
    model = _new(case).double()
    x = torch.randn(3, 3, *size, dtype=torch.float64)
    n = len(model.blocks)
    keep = (torch.rand(3, n) < 0.5).double()
    keep[:, 0] = 1  # the first block has rate 0
    if model.config.stochastic_depth == 0:
        keep = torch.ones_like(keep)
    dropout = (torch.rand(3, model.num_features) < 0.7).double() / 0.7
    with torch.no_grad():
        assert _error(model(x), Plain(model).logits(x)) < 1e-9
        model.train()
        plain = Plain(model).logits(x, keep, dropout)
        assert _error(model(x, Draws(keep, dropout)), plain) < 1e-9
        assert _error(Plain(model).logits(x), plain) > 1e-3  # the masks matter


@pytest.mark.parametrize("case", [case for case in CASES if "dct" in case])
def test_the_dct_stem_equals_its_plain_formula_in_float32(case: str) -> None:
    """To 1e-5, also where the image ends inside a block of 8 x 8 pixels."""
    model = _new(case)
    with torch.no_grad():
        for size in ((32, 32), (37, 50)):
            x = torch.randn(2, 3, *size)
            assert _error(model(x), Plain(copy.deepcopy(model).double()).logits(x.double())) < 1e-5


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("bn")])
def test_every_part_of_a_plain_formula_matters(case: str) -> None:
    """Changing any one parameter of a norm-free network changes its logits: nothing is tested at a dead branch."""
    model = _new(case)
    x = torch.randn(2, 3, 40, 40)
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name


# Folding


def _convolutions(model: nn.Module) -> list[WSConv2d]:
    return [m for m in model.modules() if isinstance(m, WSConv2d)]


@pytest.mark.parametrize("case", CASES)
def test_folding_changes_no_logits(case: str) -> None:
    """1e-5 in float32, 1e-10 in float64; no weight-standardised convolution and no gain of one is left; idempotent."""
    model = _new(case)
    x = torch.randn(2, 3, 37, 50)
    with torch.no_grad():
        folded = fold(model)
        assert type(folded) is Network
        assert not _convolutions(folded)
        gains = [name for name in folded.state_dict() if name.endswith("gain") and "skip" not in name]
        assert not gains
        # without its signal control a random twin can amplify rounding; in float64 it must agree all the same
        assert _error(folded(x), model(x)) < (1e-5 if model.config.norm == "none" else 1e-3)
        assert torch.equal(fold(folded)(x), folded(x))
        model.double()
        assert _error(fold(model)(x.double()), model(x.double())) < 1e-10


@pytest.mark.parametrize("case", FAMILIES)
def test_folding_leaves_the_original_alone(case: str) -> None:
    """Its parameters to the bit, its mode, its gradients; it trains on, and the copy shares no memory with it."""
    model = _new(case).train()
    x = torch.randn(2, 3, 32, 32)
    draws = model.draws(2)
    model(x, draws).sum().backward()
    before = {n: (p.detach().clone(), cast(Tensor, p.grad).clone()) for n, p in model.named_parameters()}
    folded = fold(model)
    assert folded.training
    assert model.training
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0])
        assert torch.equal(cast(Tensor, p.grad), before[name][1])
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in folded.parameters()}
    if case in NORM_FREE:
        assert _error(folded(x, draws), model(x, draws)) < 1e-5
    with torch.no_grad():
        old = copy.deepcopy(folded).eval()(x)
        torch.optim.SGD(model.parameters(), 0.1).step()
        assert torch.equal(copy.deepcopy(folded).eval()(x), old)
    assert _error(copy.deepcopy(model).eval()(x), old) > 1e-3


def test_a_folded_network_is_a_network() -> None:
    """deepcopy, pickle, state_dict, reset_classifier, features, gradients of every parameter."""
    folded = fold(_new("nfnet"))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = folded(x)
        other = fold(_make(_NFNET).eval())
        other.load_state_dict(folded.state_dict())
        for again in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded)), other):
            assert torch.equal(again(x), logits)
        for ours, theirs in zip(folded.forward_intermediates(x), _new("nfnet").forward_intermediates(x), strict=True):
            assert _error(ours, theirs) < 1e-5
    folded(x).sum().backward()
    assert all(p.grad is not None for p in folded.parameters())
    folded.reset_classifier(2)
    assert folded(x).shape == (2, 2)


def test_folding_freezes_what_was_frozen() -> None:
    """A convolution whose weight takes no gradient gives one whose weight and bias take none."""
    model = _new("nfnet").requires_grad_(False)
    model.fc.requires_grad_(True)
    assert [n for n, p in fold(model).named_parameters() if p.requires_grad] == ["fc.weight", "fc.bias"]


class Users(nn.Module):
    """Convolutions of other shapes, one of them used twice from two places."""

    def __init__(self) -> None:
        super().__init__()
        shared = WSConv2d(4, 4, 3, groups=2)
        self.first = nn.Sequential(WSConv2d(1, 4, (1, 5), stride=(1, 2), padding=(0, 2)), nn.ReLU(), shared)
        self.second = nn.ModuleDict({"again": shared, "wide": WSConv2d(4, 4, (7, 2), dilation=(1, 2), scale=0.7)})
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second["again"](self.first(x))
        return self.last(self.second["wide"](x))  # type: ignore[no-any-return]


def _shake(model: nn.Module) -> None:
    with torch.no_grad():
        for conv in _convolutions(model):
            conv.gain.uniform_(0.5, 2)
            cast(Tensor, conv.bias).normal_()


def test_folding_a_users_module() -> None:
    """Kernels that are not square, a convolution shared by two containers stays shared, others are left."""
    torch.manual_seed(0)
    model = Users().double()
    _shake(model)
    x = torch.randn(2, 1, 9, 14, dtype=torch.float64)
    folded = fold(model)
    assert type(folded) is Users
    assert not _convolutions(folded)
    assert _error(folded(x), model(x)) < 1e-12
    assert folded.first[2] is folded.second["again"]
    assert len(_convolutions(model)) == 3


def test_folding_a_convolution_with_two_names_in_one_container() -> None:
    """Both names get the one plain convolution."""
    shared = WSConv2d(4, 4, 3)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    _shake(model)
    x = torch.randn(1, 4, 6, 6)
    folded = fold(model)
    assert _error(folded(x), model(x)) < 1e-5
    assert folded[0] is folded[2]
    assert not _convolutions(folded)


def test_folding_a_single_convolution() -> None:
    """It becomes a plain one with equal maps, and keeps its mode."""
    for options in ({"stride": 2}, {"padding": 1, "groups": 2}, {"dilation": 2, "in_place_of": 2, "scale": 1.7}):
        conv = WSConv2d(4, 6, (3, 5), **options).double().eval()
        _shake(conv)
        plain = fold(conv)
        assert type(plain) is SameConv2d
        assert not plain.training
        x = torch.randn(2, 4, 11, 8, dtype=torch.float64)
        assert _error(plain(x), conv(x)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folding_low_precision_weights_rounds_once(dtype: torch.dtype) -> None:
    """The folded weight is the float32 one, rounded; the type stays."""
    model = _new("nfnet").to(dtype)
    folded = fold(model)
    assert {p.dtype for p in folded.parameters()} == {dtype}
    before, after = _blocks(model)[0].conv0, _blocks(folded)[0].conv0
    assert torch.equal(after.weight, before.filters().to(dtype))


def test_folding_keeps_channels_last() -> None:
    """Of the weights."""
    model = nn.Sequential(WSConv2d(8, 8, 3)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert fold(model)[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_folding_freezes_weight_and_bias_each_as_it_was(frozen: str) -> None:
    """A bias that is tuned alone stays trainable, one that is frozen alone stays frozen."""
    conv = WSConv2d(4, 4, 3)
    conv.get_parameter(frozen).requires_grad_(False)
    assert [n for n, p in fold(conv).named_parameters() if not p.requires_grad] == [frozen]


def test_folding_draws_no_random_numbers() -> None:
    """Folding in the middle of a run does not change what torch's generator gives next."""
    model = _new("nfnet")
    state = torch.random.get_rng_state()
    fold(model)
    assert torch.equal(torch.random.get_rng_state(), state)


# Features


def _seen_by_next(model: Network, x: Tensor) -> list[Tensor]:
    """What the first convolution of each stage but the first sees."""
    seen: list[Tensor] = []
    starts = list(accumulate(model.config.depths))[:-1]
    hooks = [
        _blocks(model)[i].conv0.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for i in starts
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("case", [*FAMILIES, "dct", "beta first", "symmetric", "resnet, symmetric", "many"])
def test_features_have_the_announced_channels_and_strides(case: str, output_stride: int) -> None:
    """At even, odd and non-square sizes, and with every output stride, whose parameters have the same shapes."""
    model = _make(CASES[case], output_stride=output_stride).eval()
    plain = _made(case).state_dict()
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in plain.items()}
    assert max(info.stride for info in model.feature_info) <= output_stride
    assert [info.name for info in model.feature_info] == ["stage0", "stage1", "stage2", "stage3"]
    for size in ((64, 64), (33, 65), (7, 50), (1, 1)):
        with torch.no_grad():
            maps = model.forward_intermediates(torch.randn(2, 3, *size))
        for info, x in zip(model.feature_info, maps, strict=True):
            assert x.shape == (2, info.channels, *(math.ceil(side / info.stride) for side in size))


def test_which_stages_are_returned() -> None:
    """All, the last n, by index from either end, in the given order, twice, none; numbers of numpy in a list."""
    model = _new("nfnet")
    x = torch.randn(1, 3, 33, 40)
    with torch.no_grad():
        every = model.forward_intermediates(x)
        wanted: list[tuple[Any, list[int]]] = [
            (None, [0, 1, 2, 3]),
            (4, [0, 1, 2, 3]),
            (1, [3]),
            (2, [2, 3]),
            ([-1, 0], [3, 0]),
            ((2, 2, -2), [2, 2, 2]),
            ([], []),
            (list(np.array([1, -1])), [1, 3]),
            (range(2), [0, 1]),
        ]
        for indices, stages in wanted:
            maps = model.forward_intermediates(x, indices)
            assert len(maps) == len(stages)
            assert all(torch.equal(a, every[i]) for a, i in zip(maps, stages, strict=True))


@pytest.mark.parametrize("indices", [0, 5, -1, [4], [-5], [0, 9]])
def test_a_stage_that_is_not_there_is_refused(indices: Any) -> None:
    """Also a number of stages that is not positive."""
    with pytest.raises(ValueError, match="stages 0 to 3"):
        _new("nfnet").forward_intermediates(torch.randn(1, 3, 8, 8), indices)


def test_a_number_of_stages_may_be_numpys() -> None:
    """np.int64(2) means the last two."""
    with torch.no_grad():
        assert len(_new("nfnet").forward_intermediates(torch.randn(1, 3, 8, 8), cast(int, np.int64(2)))) == 2


@pytest.mark.parametrize("case", [*FAMILIES, "beta first", "fc", "no final", "dct"])
def test_features_are_the_residual_stream_and_what_the_next_stage_sees(case: str) -> None:
    """Plain maps are what the blocks give; activated ones are what the next convolutions see, times their factors."""
    model = _new(case)
    x = torch.randn(2, 3, 45, 64)
    c = model.config
    out: list[Tensor] = []
    ends = [end - 1 for end in accumulate(c.depths)]
    hooks = [model.blocks[i].register_forward_hook(lambda _, __, y: out.append(y)) for i in ends]
    with torch.no_grad():
        plain = model.forward_intermediates(x, activated=False)
        for hook in hooks:
            hook.remove()
        assert all(torch.equal(a, b) for a, b in zip(plain, out, strict=True))
        seen, maps = _seen_by_next(model, x), model.forward_intermediates(x)
    for stage, theirs in enumerate(seen):
        factor = 1.0
        if c.norm == "none":  # the stage's first block restarts the variance at 1
            beta = math.sqrt(1 + c.depths[stage] * c.alpha**2)
            factor = _GAMMAS[c.activation] / (1.0 if c.beta_first else beta)
        assert _error(maps[stage], theirs * factor) < 1e-6
    if c.norm == "batch" and c.final == "none":
        with torch.no_grad():
            assert torch.equal(maps[-1], model.forward_features(x))


def test_activated_features_have_a_variance_near_one() -> None:
    """Behind every stage of an NF-ResNet with SkipInit 1, on noise."""
    torch.manual_seed(0)
    model = normfree.create_model("nf_resnet50", 5, skip_init=1.0, widths=(64, 96, 128, 128), depths=(2, 3, 2, 2))
    with torch.no_grad():
        maps = model.eval().forward_intermediates(torch.randn(4, 3, 96, 96))
    for x in maps:
        assert x.square().mean((0, 2, 3)).sub(x.mean((0, 2, 3)).square()).mean().item() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize("family", ["nfnet", "nf_resnet", "nf_regnet", "bn_resnet", "bn_nfnet"])
def test_dilated_maps_hold_the_strided_ones(family: str, padding: str, output_stride: int) -> None:
    """Without squeeze-excite, every k-th pixel of a dense map from the first is the strided network's; any size."""
    options = {**CASES[family], "squeeze": "none", "padding": padding}
    strided = _make(options).double().eval()
    dense = _make(options, output_stride=output_stride).double().eval()
    dense.load_state_dict(strided.state_dict())
    for size in ((64, 96), (33, 65), (63, 50), (97, 7), (70, 38)):
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            ours, theirs = (m.forward_intermediates(x, activated=False) for m in (dense, strided))
        for a, b, info, of in zip(ours, theirs, dense.feature_info, strided.feature_info, strict=True):
            k = of.stride // info.stride
            assert _error(a[..., ::k, ::k], b) < 1e-12, (size, info)


def test_the_receptive_field_does_not_shrink_in_dense_maps() -> None:
    """A dense map is not the strided one repeated: neighbouring pixels differ, as those of shifted images do."""
    options = {**_NFNET, "squeeze": "none", "padding": "symmetric", "output_stride": 8}
    model = _make(options).eval()
    with torch.no_grad():
        x = model.forward_intermediates(torch.randn(1, 3, 64, 64), 1)[0]
    assert (x[..., 1:] - x[..., :-1]).abs().amax((0, 1, 2)).min() > 1e-3


def test_the_announced_stride_of_a_stage_that_would_overshoot() -> None:
    """A stage of stride 4 behind a stem of stride 4 dilates at output stride 8, so that its map has stride 4."""
    model = _make({**_NFNET, "strides": (1, 4, 1, 1), "output_stride": 8}).eval()
    with torch.no_grad():
        maps = model.forward_intermediates(torch.randn(1, 3, 64, 64))
    assert [64 // x.shape[-1] for x in maps] == [info.stride for info in model.feature_info]


@pytest.mark.parametrize("case", ["nf_regnet", "tiny"])
def test_the_dct_stem_leaves_the_last_stride_as_it_was(case: str) -> None:
    """A network whose stem halves once ends at its own stride with the DCT stem, and nothing in it dilates."""
    options = {"name": "nfnet_tiny"} if case == "tiny" else _REGNET
    plain, dct = _make(options), _make({**options, "stem": "dct"})
    assert not any(b.place.dense for b in _blocks(dct))
    assert dct.feature_info[-1].stride == plain.feature_info[-1].stride


def test_stages_behind_the_last_wanted_one_are_not_computed() -> None:
    """And the head is not."""
    model = _new("nfnet")
    ran: list[int] = []
    for i, module in enumerate((*model.blocks, model.final_conv)):
        assert module is not None
        module.register_forward_hook(lambda *_, i=i: ran.append(i))
    with torch.no_grad():
        model.forward_intermediates(torch.randn(1, 3, 32, 32), [1, 0])
    assert ran == [0, 1, 2]


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case].get("final") != "fc"])
def test_the_mean_of_the_last_features_goes_to_the_classifier(case: str) -> None:
    """forward_features and fc make the logits, with the announced width."""
    model = _new(case)
    x = torch.randn(2, 3, 33, 50)
    with torch.no_grad():
        maps = model.forward_features(x)
        assert maps.shape[1] == model.num_features
        assert _error(model.fc(maps.mean((2, 3))), model(x)) < 1e-5


def test_measuring_the_signal_keeps_the_mode_of_every_module() -> None:
    """A batch norm that was frozen in a network that trains stays frozen."""
    model = _new("bn_nfnet").train()
    model.blocks[0].eval()
    measure(model, torch.randn(2, 3, 32, 32))
    assert not model.blocks[0].training


# Compilers


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        pytest.param("nfnet", "aot_eager", marks=pytest.mark.slow),
        pytest.param("many", "eager", marks=pytest.mark.slow),
        pytest.param("nf_regnet", "eager", marks=pytest.mark.slow),
        *((case, "eager") for case in ("nfnet", "nf_resnet", "bn_nfnet")),
    ],
)
def test_torch_compile_takes_the_whole_graph(case: str, backend: str) -> None:
    """Evaluation and training, one compilation for batches of one shape; logits and gradients as without."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = _make(CASES[case], stochastic_depth=0.5, drop_rate=0.2, depths=(1, 2, 1, 1)).eval()
    batches = [torch.randn(2, 3, 32, 32) for _ in range(3)]
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=False)
    with torch.no_grad():
        for x in batches:
            assert _error(compiled(x), model(x)) < 1e-5
    assert counter.frame_count == 1
    model.train()
    eager, draws = copy.deepcopy(model), model.draws(2)
    for x in batches:
        loss, ours = eager(x, draws).square().sum(), compiled(x, draws).square().sum()
        loss.backward()
        ours.backward()
    assert counter.frame_count == 2
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert p.grad is not None, name
        assert q.grad is not None, name
        assert (p.grad - q.grad).norm() < 1e-4 * q.grad.norm() + 1e-5, name


@pytest.mark.parametrize("case", ["nfnet", "nf_resnet"])
def test_torch_compile_draws_the_masks_itself(case: str) -> None:
    """In training without draws, in one graph; two passes differ."""
    torch._dynamo.reset()
    model = _make(CASES[case], stochastic_depth=0.5, drop_rate=0.2).train()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    x = torch.randn(4, 3, 32, 32)
    assert not torch.equal(compiled(x), compiled(x))
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # of inductor itself
def test_inductor_compiles_evaluation() -> None:
    """nfnet_tiny to 1e-4."""
    torch._dynamo.reset()
    model = _random(normfree.create_model("nfnet_tiny", 5)).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert _error(torch.compile(model, fullgraph=True, dynamic=False)(x), model(x)) < 1e-4


@pytest.mark.parametrize(
    ("case", "folded"),
    [
        *((case, False) for case in FAMILIES),
        pytest.param("many", False, marks=pytest.mark.slow),
        *((case, True) for case in ("nfnet", "nf_regnet", "dct")),
    ],
)
def test_torch_export_with_any_batch_size(case: str, folded: bool) -> None:
    """The exported program equals the network at other batch sizes than it was traced with."""
    model = fold(_new(case)) if folded else _new(case)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(3, 3, 33, 40),), dynamic_shapes={"x": {0: batch}})
        for n in (1, 2, 5):
            x = torch.randn(n, 3, 33, 40)
            assert _error(program.module()(x), model(x)) < 1e-5


def test_torch_export_of_the_features() -> None:
    """Through a module that calls forward_intermediates, as a detector's backbone does."""

    class Backbone(nn.Module):
        def __init__(self, body: Network) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: Tensor) -> list[Tensor]:
            return self.body.forward_intermediates(x, [1, 2, -1])

    model = Backbone(_new("nfnet")).eval()
    x = torch.randn(2, 3, 33, 40)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        for ours, theirs in zip(program.module()(x), model(x), strict=True):
            assert _error(ours, theirs) < 1e-5


# Per-example gradients


def _loop(model: Network, x: Tensor, y: Tensor, keep: Tensor) -> dict[str, Tensor]:
    """The gradient of each parameter for each example: name -> (N, *shape)."""
    found: dict[str, list[Tensor]] = {n: [] for n, _ in model.named_parameters()}
    for i in range(len(x)):
        model.zero_grad()
        F.cross_entropy(model(x[i : i + 1], Draws(keep[i : i + 1])), y[i : i + 1]).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            found[name].append(p.grad.clone())
    return {name: torch.stack(gradients) for name, gradients in found.items()}


@pytest.mark.parametrize("case", [*NORM_FREE, "grouped 1x1, straddle", "no squeeze", "symmetric", "many", "dct"])
def test_per_example_gradients_equal_a_loop(case: str) -> None:
    """vmap of grad over functional_call, with the mask of each example, to 1e-4."""
    model = _make(CASES[case], stochastic_depth=0.5).train()
    x, y = torch.randn(4, 3, 33, 32), torch.randint(7, (4,))
    keep = (torch.rand(4, len(model.blocks)) < 0.6).float()
    keep[0] = 1

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor, kept: Tensor) -> Tensor:
        logits = functional_call(model, parameters, (image[None], Draws(kept[None])))
        return F.cross_entropy(logits, label[None])

    parameters = {n: p.detach() for n, p in model.named_parameters()}
    ours = vmap(grad(loss), in_dims=(None, 0, 0, 0))(parameters, x, y, keep)
    for name, theirs in _loop(model, x, y, keep).items():
        for a, b in zip(ours[name], theirs, strict=True):
            assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6, name
    skip = ours[f"blocks.{len(model.blocks) - 1}.skip.skip_gain"]
    assert ((skip.flatten() != 0) == (keep[:, -1] != 0)).all()  # nothing flows through a branch that was dropped


def _opacus_step(model: Network, mode: str, keep: Tensor | None = None) -> None:
    """One step of DP-SGD whose per-example gradients equal those of a loop."""
    opacus = pytest.importorskip("opacus")
    torch.manual_seed(3)
    x, y = torch.randn(4, 3, 32, 32), torch.randint(7, (4,))
    theirs = _loop(model.train(), x, y, torch.ones(4, len(model.blocks)) if keep is None else keep)
    public = copy.deepcopy(model)
    private, optimizer, _ = opacus.PrivacyEngine().make_private(
        module=public,
        optimizer=torch.optim.SGD(public.parameters(), 0.1),
        data_loader=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
    )
    F.cross_entropy(private(x) if keep is None else private(x, Draws(keep)), y).backward()
    for name, p in private.named_parameters():
        for a, b in zip(p.grad_sample, theirs[name.removeprefix("_module.")], strict=True):
            assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6, name
    optimizer.step()
    assert all(p.isfinite().all() for p in public.parameters())


_OPACUS = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]


def test_opacus_finds_no_fault() -> None:
    """Its validator has no errors for a norm-free network, and has for batch norm."""
    validators = pytest.importorskip("opacus.validators")
    for case in FAMILIES:
        errors = validators.ModuleValidator.validate(_new(case).train(), strict=False)
        assert bool(errors) == (case not in NORM_FREE), case


def _with_marks(test: Callable[..., None]) -> Callable[..., None]:
    for mark in _OPACUS:
        test = mark(test)
    return test


@_with_marks
@pytest.mark.parametrize("mode", ["hooks", "functorch"])
@pytest.mark.parametrize("case", NORM_FREE)
def test_opacus_takes_a_private_step(case: str, mode: str) -> None:
    """Without stochastic depth."""
    _opacus_step(_make(CASES[case], stochastic_depth=0.0), mode)


@_with_marks
def test_opacus_takes_a_private_step_with_stochastic_depth() -> None:
    """With the mask of each example."""
    model = _make(_NFNET, stochastic_depth=0.5)
    keep = (torch.rand(4, len(model.blocks)) < 0.6).float()
    keep[:, 0] = 1
    _opacus_step(model, "hooks", keep)


# Types, sizes, copies


@pytest.mark.parametrize("pattern", ["nfnet_[fts]*", "nf_resnet*", "nf_regnet*", "bn_*", "timm_*"])
def test_the_meta_device_gives_the_sizes_of_maps_without_memory(pattern: str) -> None:
    """Of the first and the last of each family."""
    names = normfree.list_models(pattern)
    for name in (names[0], names[-1]):
        with torch.device("meta"):
            model = normfree.create_model(name, num_classes=3).eval()
            maps = model.forward_intermediates(torch.empty(1, 3, 64, 64))
        assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
        assert [x.shape[1] for x in maps] == list(model.config.widths)


@pytest.mark.parametrize("case", [*FAMILIES, "dct", "many"])
def test_a_network_made_on_the_meta_device_comes_alive(case: str) -> None:
    """to_empty and load_state_dict give the logits of the one that was saved; so does assigning the tensors."""
    model = _new(case)
    for assign in (False, True):
        with torch.device("meta"):
            other = Network(model.config).eval()
        if not assign:
            other = other.to_empty(device="cpu")
        other.load_state_dict(model.state_dict(), assign=assign)
        x = torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("maps", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [*NORM_FREE, "dct", "fc", "many", "inner"])
def test_the_type_of_the_input_decides_the_type_of_the_maps(case: str, weights: torch.dtype, maps: torch.dtype) -> None:
    """Whatever the type of the weights; logits are float32, or float64 if the weights are, and near."""
    model = _new(case)
    x = torch.randn(2, 3, 9, 12)
    with torch.no_grad():
        expected = model(x)
        model.to(weights)
        found = model.forward_intermediates(x.to(maps))
        assert {f.dtype for f in found} == {maps}
        assert model.forward_features(x.to(maps)).dtype == maps
        logits = model(x.to(maps))
    assert logits.dtype == (torch.float64 if weights == torch.float64 else torch.float32)
    low = min(torch.finfo(weights).bits, torch.finfo(maps).bits)
    assert _error(logits, expected) < (0.1 if low == 16 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", FAMILIES)
def test_a_cast_network_trains_a_step(case: str, dtype: torch.dtype) -> None:
    """Weights and maps of one low precision, masks from torch's generator, finite gradients of that type."""
    model = _make(CASES[case], stochastic_depth=0.5, drop_rate=0.2).to(dtype).train()
    model(torch.randn(4, 3, 32, 32).to(dtype)).sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {dtype}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("maps", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["bn_resnet", "bn_nfnet"])
def test_batch_norm_twins_take_maps_of_another_type(case: str, maps: torch.dtype, training: bool) -> None:
    """As the norm-free families do, with float32 weights."""
    model = _new(case).train(training)
    x = torch.randn(4, 3, 32, 32)
    draws = Draws(torch.ones(4, len(model.blocks)))
    with torch.no_grad():
        expected = model(x, draws)
        assert _error(model(x.to(maps), draws), expected) < 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", FAMILIES)
def test_autocast(case: str, dtype: torch.dtype) -> None:
    """float32 logits near those without, and gradients of the type of the weights."""
    model = _new(case)
    x = torch.randn(2, 3, 33, 32)
    with torch.autocast("cpu", dtype):
        logits = model(x)
    assert logits.dtype == torch.float32
    assert _error(logits, model(x)) < 0.05
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("case", FAMILIES)
def test_evaluation_ignores_draws_and_takes_an_empty_batch(case: str) -> None:
    """To the bit; no images give no logits."""
    model = _new(case)
    x = torch.randn(2, 3, 32, 32)
    nothing = Draws(torch.zeros(2, len(model.blocks)), torch.zeros(2, model.num_features))
    with torch.no_grad():
        assert torch.equal(model(x, nothing), model(x))
        assert model(x[:0]).shape == (0, 7)


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("case", [*FAMILIES, "dct", "many"])
def test_any_number_of_input_channels(case: str, channels: int) -> None:
    """And sizes down to one pixel, not square, odd; every parameter but the twins' at one pixel has a gradient."""
    model = _make(CASES[case], in_chans=channels)
    for size in ((1, 1), (7, 50), (33, 65)):
        model.zero_grad()
        logits = model.eval()(torch.randn(2, channels, *size))
        assert logits.shape == (2, 7)
        assert logits.isfinite().all()
        logits.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("case", [*FAMILIES, "dct", "fc", "many"])
def test_channels_last_changes_nothing_but_rounding(case: str) -> None:
    """Of the input and of the weights; the maps keep it."""
    model = _new(case)
    x = torch.randn(2, 3, 33, 50)
    with torch.no_grad():
        expected = model(x)
        x = x.contiguous(memory_format=torch.channels_last)
        assert _error(model(x), expected) < 1e-5
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        assert _error(model(x), expected) < 1e-5
        for features in model.forward_intermediates(x, activated=False):
            assert features.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("case", [*FAMILIES, "dct", "fc", "straddle", "many"])
def test_copies_pickles_and_states_compute_the_same(case: str) -> None:
    """To the bit; evaluation is deterministic, and the norm-free families have no buffers."""
    model = _new(case)
    other = Network(model.config).eval()
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 33, 32)
    with torch.no_grad():
        expected = model(x)
        for again in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
            assert torch.equal(again(x), expected)
    if model.config.norm == "none":
        assert not list(model.buffers())


def test_the_names_of_parameters_are_promised() -> None:
    """Of nfnet_tiny: files of weights have these names."""
    model = normfree.create_model("nfnet_tiny")
    conv = ("weight", "bias", "gain")
    fc = ("weight", "bias")
    block = ["skip.skip_gain", *(f"{c}.{p}" for c in ("conv0", "conv1", "conv1b", "conv2") for p in conv)]
    squeeze = [f"squeeze_excite.{f}.{p}" for f in ("fc0", "fc1") for p in fc]
    shortcut = [f"conv_shortcut.{p}" for p in conv]
    names = [f"stem.{i}.{p}" for i in range(3) for p in conv]
    for i in range(5):
        transition = i != 3  # 16 -> 32 | 32 -> 64 | 64 -> 128, 128 -> 128 | strides
        names += [f"blocks.{i}.{n}" for n in (*block, *(shortcut if transition else []), *squeeze)]
    names += [f"final_conv.{p}" for p in conv] + [f"fc.{p}" for p in fc]
    assert sorted(model.state_dict()) == sorted(names)
    assert [n for n, _ in model.named_parameters()] == list(model.state_dict())


@pytest.mark.parametrize("case", [*FAMILIES, "fc"])
def test_resetting_the_classifier_keeps_the_body(case: str) -> None:
    """Its maps to the bit, the type of the weights, and the rule of the new layer's initial weights."""
    model = _new(case).double()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        maps = model.forward_features(x)
        model.reset_classifier(11)
        assert torch.equal(model.forward_features(x), maps)
        assert model(x).shape == (1, 11)
    assert model.fc.weight.dtype == torch.float64
    assert model.config.num_classes == 11
    assert not model.fc.bias.any()
    std = model.config.classifier_std
    assert model.fc.weight.std().item() == pytest.approx(std, rel=0.2)
    with torch.device("meta"):
        other = Network(model.config)
    other.reset_classifier(4)
    assert other.fc.weight.device.type == "meta"


@pytest.mark.parametrize("case", FAMILIES)
def test_weights_start_as_lecun_has_them(case: str) -> None:
    """Normal with variance 1 / fan-in: those of convolutions and of the layers of squeeze-excite; gains 1, biases 0.

    Over all weights of a network: mean, variance and the shares within one and two standard deviations; and the
    variance of each larger tensor.
    """
    torch.manual_seed(6)
    model = normfree.create_model(**{**CASES[case], "widths": (32, 48, 64, 64)})
    scaled = []
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif name.endswith("gain") and not name.endswith("skip_gain"):
            assert (p == 1).all(), name
        elif name.endswith("weight") and p.ndim > 1 and name != "fc.weight":
            z = (p.detach() * math.prod(p.shape[1:]) ** 0.5).flatten()
            if len(z) > 500:
                assert z.var().item() == pytest.approx(1.0, abs=5 * (2 / len(z)) ** 0.5), name
            scaled.append(z)
    z = torch.cat(scaled)
    n = len(z)
    assert n > 20_000
    assert abs(z.mean().item()) < 4 / n**0.5
    assert z.var().item() == pytest.approx(1.0, abs=4 * (2 / n) ** 0.5)
    for reach, expected in ((1.0, 0.682689), (2.0, 0.954500), (3.0, 0.997300)):
        spread = (expected * (1 - expected) / n) ** 0.5
        assert (z.abs() < reach).double().mean().item() == pytest.approx(expected, abs=4 * spread)


@pytest.mark.parametrize("case", [*FAMILIES, *OPTIONS])
def test_a_new_network_is_alive_in_training(case: str) -> None:
    """As initialised (SkipInit at 1, since at 0 branches sleep): small steps of descent lower the loss."""
    torch.manual_seed(0)
    model = normfree.create_model(**{"num_classes": 3, "skip_init": 1.0, **CASES[case], "drop_rate": 0.0})
    x, y = torch.randn(6, 3, 32, 32), torch.arange(6) % 3
    ones = Draws(torch.ones(6, len(model.blocks)))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x, ones), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"squeze": "none"}, "did you mean 'squeeze'"),
        ({"group_widths": 8}, "did you mean 'group_width'"),
        ({"squeeze": "outer"}, "squeeze must be one of out, inner, straddle, none"),
        ({"stem": "patch"}, "stem must be one of"),
        ({"shortcut": "max"}, "shortcut must be one of"),
        ({"final": "linear"}, "final must be one of"),
        ({"norm": "layer"}, "norm must be one of"),
        ({"activation": "swish"}, "activation must be one of.*silu"),
        ({"padding": "valid"}, "padding must be one of"),
        ({"output_stride": 4}, "output_stride must be one of 8, 16, 32"),
        ({"expand_from": "both"}, "expand_from must be in or out"),
        ({"group_width": (8, 8)}, "group_width needs one value, or one for each of 4 stages"),
        ({"depths": (1, 2, 3)}, "depths needs one value"),
        ({"group_width": "8"}, "group_width must be int"),
        ({"group_width": (8, 8.5, 8, 8)}, "group_width must be int"),
        ({"expansion": "half"}, "expansion must be float"),
        ({"second_conv": 1}, "second_conv must be bool"),
        ({"final_width": 2.0}, "final_width must be int"),
        ({"pointwise_groups": True}, "pointwise_groups must be int"),
        ({"stem_widths": (8, 8)}, "widths and .* strides of the stem"),
        ({"widths": (16, 0, 16, 16)}, "must be positive"),
        ({"pointwise_groups": 0}, "must be positive"),
        ({"stem_kernel": 0}, "must be positive"),
        ({"expansion": -0.5}, "must be positive"),
        ({"group_width": -8}, "must not be negative"),
        ({"widths": (1 << 17,) * 4}, "more than 65,536 channels"),
        ({"depths": (3000, 1, 1, 1)}, "2,000 blocks"),
    ],
)
def test_a_wrong_option_is_refused_with_a_hint(options: dict[str, Any], message: str) -> None:
    """The message is one line, with the choices or the nearest name."""
    with torch.device("meta"), pytest.raises(ValueError, match=message) as caught:
        normfree.create_model("nfnet_tiny", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"widths": ()},
        {"strides": 1.0},
        {"pointwise_groups": 3},
        {"activation": "glu"},
        {"skip_init": math.nan},
        {"alpha": math.inf},
        {"classifier_std": -1.0},
        {"expansion": 0.0, "group_width": 0},
    ],
    ids=str,
)
def test_what_no_network_can_have_is_a_users_error(options: dict[str, Any]) -> None:
    """When it is made, and not when it first runs."""
    with pytest.raises(UserError):
        normfree.create_model("nfnet_tiny", 3, **options)


@pytest.mark.parametrize("rates", [{"drop_rate": 1.5}, {"drop_rate": math.nan}, {"stochastic_depth": 2.0}], ids=str)
def test_rates_out_of_range_are_refused_by_the_configuration(rates: dict[str, float]) -> None:
    """A configuration read from a file is held to what create_model asks."""
    with pytest.raises(UserError):
        from_dict(NetworkConfig, {**asdict(model_config("nfnet_tiny")), **rates})


def test_one_value_serves_for_all_stages() -> None:
    """A number, a string, a tuple of one and the whole tuple are the same; a list is a tuple."""
    for name, value in (("group_width", 8), ("expansion", 0.25), ("expand_from", "in"), ("strides", 2), ("depths", 1)):
        with torch.device("meta"):
            forms: tuple[Any, ...] = (value, (value,), [value], (value,) * 4)
            configs = [normfree.create_model("nfnet_tiny", **{name: form}).config for form in forms]
        assert len(set(configs)) == 1
        assert getattr(configs[0], name) == (value,) * 4
    with torch.device("meta"):
        assert normfree.create_model("nfnet_tiny", expansion=1).config.expansion == (1.0,) * 4


# Properties


@given(
    widths=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    group_width=st.integers(0, 40),
    expansion=st.sampled_from([0.1, 0.25, 0.5, 1.0, 2.25, 4.0]),
    first=st.sampled_from([None, 0.5, 1.0]),
    expand_from=st.sampled_from(["in", "out"]),
)
def test_groups_divide_the_bottleneck(
    widths: list[int], group_width: int, expansion: float, first: float | None, expand_from: str
) -> None:
    """Any width is made of whole groups of the width asked for, at least one, and by less than a group from wanted."""
    config = NetworkConfig(
        tuple(widths),
        (2,),
        32,
        32,
        0.0,
        strides=(1,),
        group_width=(group_width,),
        expansion=(expansion,),
        expand_from=(expand_from,),
        first_expansion=first,
    )
    for place in places(config):
        width, groups = bottleneck_width(config, place)
        factor = first if place.first and first is not None else expansion
        wanted = int(factor * (place.in_chans if expand_from == "in" else place.out_chans))
        assert width % groups == 0
        if group_width == 0:
            assert (width, groups) == (max(1, wanted), 1)
        else:
            assert width == groups * group_width
            assert 0 <= wanted - width < group_width or (width == group_width and wanted < group_width)


@given(
    depths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    stride=st.integers(1, 2),
    output_stride=st.sampled_from([8, 16, 32]),
    padding=st.sampled_from(["same", "symmetric"]),
)
def test_blocks_stand_where_the_depths_say(depths: list[int], stride: int, output_stride: int, padding: str) -> None:
    """Their number, their stages, beta^2 = 1 + k alpha^2, and dense blocks only where the output stride forces them."""
    n = len(depths)
    config = NetworkConfig(
        (8,) * n, tuple(depths), 32, 32, 0.0, strides=(stride,), output_stride=output_stride, padding=padding
    )
    found: list[Place] = list(places(config))
    assert len(found) == sum(depths)
    assert [p.stage for p in found] == [stage for stage, depth in enumerate(depths) for _ in range(depth)]
    assert [p.first for p in found] == [True] + [False] * (len(found) - 1)
    before = [0, *(k + 1 for depth in depths for k in range(depth))]
    assert [p.beta for p in found] == pytest.approx([math.sqrt(1 + k * 0.04) for k in before[:-1]])
    reached = 4  # the stride of the map in front of the block if nothing were dense
    for p in found:
        assert p.dense == (p.stride > 1 and reached * p.stride > output_stride)
        assert p.dilation == reached // min(reached, output_stride)
        reached *= p.stride


@given(rate=st.floats(0, 0.99), depths=st.lists(st.integers(1, 5), min_size=1, max_size=3))
@settings(max_examples=20, deadline=None)
def test_the_rates_of_stochastic_depth_grow_linearly(rate: float, depths: list[int]) -> None:
    """Block i of n is dropped with probability rate * i / n: never the first, and never more than the rate."""
    n = len(depths)
    config = NetworkConfig((8,) * n, tuple(depths), 32, 32, 0.0, stochastic_depth=rate, strides=(1,), group_width=(4,))
    with torch.device("meta"):
        rates = Network(config).depth_rates
    assert rates == pytest.approx([rate * i / sum(depths) for i in range(sum(depths))])


@pytest.mark.parametrize("rate", [0.3, 0.9])
@pytest.mark.parametrize("case", FAMILIES)
def test_the_mean_over_many_draws_is_linear_in_the_kept_share(case: str, rate: float) -> None:
    """Of the last block's output: shortcut + (1 - its rate) * branch, within 5 standard errors; nothing is rescaled."""
    model = _make(CASES[case], stochastic_depth=rate)
    n, draws = len(model.blocks), 4000
    last = _blocks(model)[-1].eval()
    x = torch.randn(1, last.place.in_chans, 4, 4)
    keep = model.draws(draws).keep
    assert keep is not None
    with torch.no_grad():
        whole, without = (last(x, torch.full((1,), k)) for k in (1.0, 0.0))
        mean = last(x.expand(draws, -1, -1, -1), keep[:, -1]).mean(0, keepdim=True)
        assert _error(last(x), whole) < 1e-6
    kept = 1 - rate * (n - 1) / n
    error = math.sqrt(kept * (1 - kept) / draws)
    torch.testing.assert_close(
        mean, without + kept * (whole - without), rtol=0, atol=1e-5 + 5 * error * _most(whole - without)
    )


def _most(x: Tensor) -> float:
    return x.abs().max().item()


def _ratios(name: str, size: int, images: int, **options: Any) -> list[float]:
    """Measured over expected variance, behind the stem and each block, with SkipInit 1, on noise."""
    torch.manual_seed(0)
    model = normfree.create_model(name, 2, skip_init=1.0, **options)
    found = measure(model, torch.randn(images, 3, size, size))
    return [s.variance / e for s, e in zip(found, expected_variance(model.config), strict=True)]


def test_nf_resnet_follows_the_analytic_variance() -> None:
    """With SkipInit 1, at the depth of NF-ResNet-50: within 8 % behind every block.

    Not behind the stem, whose max pool leaves 0.36 of the variance: the first transition starts again from 1. Smaller
    images fall short in the last stage (0.84 at 64 pixels), where most of a 3x3 window is padding.
    """
    stem, *blocks = _ratios("nf_resnet50", 128, 16, widths=(96, 192, 384, 768))
    assert stem == pytest.approx(0.36, abs=0.03)
    assert blocks == pytest.approx([1.0] * 16, rel=0.08)


def test_nfnet_does_not_follow_the_analytic_variance() -> None:
    """Average pooling of the shortcut and squeeze-excite take variance away, more behind every stage."""
    ratios = _ratios("nfnet_f0", 64, 4, widths=(64, 128, 192, 192), stem_widths=(16, 16, 32, 32), group_width=32)
    ends = [ratios[1], ratios[3], ratios[9], ratios[12]]
    assert all(b < 0.6 * a for a, b in pairwise(ends))

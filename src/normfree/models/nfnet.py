"""NFNet (Section 5 and Appendix C of the paper): the variants, the block, the network.

Shapes: N images, C channels, H x W pixels. Where the paper and the authors' code differ the code is followed, since
the published weights come from it; docs/design.md lists the differences.

Scalars live in weights. The paper's block is  h + alpha * skip_gain * 2 * gate * f(gamma * act(h) / beta).  Here gamma
and 1/beta are factors of the standardised weights of the next convolutions, and alpha, SkipInit, the 2 and the
stochastic depth mask are factors of the squeeze-excite gate, which is (N, C): no constant multiplies a full-size map.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from normfree.nn.conv import WSConv2d
from normfree.nn.layers import (
    Draws,
    SqueezeExcite,
    at_least_float32,
    avg_pool_same,
    depth_mask,
    dropout_mask,
    linear,
)
from normfree.nn.signal import Activation, activation, block_input_std


@dataclass(frozen=True)
class NFNetConfig:
    """One variant. Sizes are pixels of a square side; rates are probabilities."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    train_size: int
    test_size: int
    drop_rate: float
    magnitude: int  # of RandAugment
    stochastic_depth: float = 0.25
    stem_widths: tuple[int, ...] = (16, 32, 64)  # and then half of the first stage's width
    stem_strides: tuple[int, ...] = (2, 1, 1, 2)
    group_width: int = 128
    expansion: float = 0.5  # width of the bottleneck against the block's output
    se_ratio: float = 0.5
    alpha: float = 0.2
    skip_init: float = 0.0  # where SkipInit starts; at 1 the signal is as the bookkeeping of beta predicts it
    activation: str = "gelu"
    num_classes: int = 1000
    in_chans: int = 3


def _family() -> dict[str, NFNetConfig]:
    # Table 1 and A.3; F7 is in the authors' code only
    rows = [  # train, test, dropout, magnitude
        (192, 256, 0.2, 5),
        (224, 320, 0.3, 10),
        (256, 352, 0.4, 10),
        (320, 416, 0.4, 15),
        (384, 512, 0.5, 15),
        (416, 544, 0.5, 15),
        (448, 576, 0.5, 15),
        (480, 608, 0.5, 15),
    ]
    table = {}
    for n, row in enumerate(rows):
        depths = tuple((n + 1) * d for d in (1, 2, 6, 3))
        plain = NFNetConfig((256, 512, 1536, 1536), depths, *row)
        table[f"nfnet_f{n}"] = plain
        table[f"nfnet_f{n}_plus"] = replace(plain, widths=(384, 768, 2048, 2048))
    return table


# For images of 28 to 64 px: the same block with groups of 16, and a stem that halves once. Not in the paper.
_SMALL = {
    "nfnet_tiny": NFNetConfig(
        widths=(32, 64, 128, 128),
        depths=(1, 1, 2, 1),
        train_size=32,
        test_size=32,
        drop_rate=0.0,
        magnitude=0,
        stochastic_depth=0.0,
        stem_widths=(16, 32),
        stem_strides=(2, 1, 1),
        group_width=16,
    ),
    "nfnet_small": NFNetConfig(
        widths=(64, 128, 256, 256),
        depths=(1, 2, 4, 2),
        train_size=64,
        test_size=64,
        drop_rate=0.1,
        magnitude=0,
        stochastic_depth=0.1,
        stem_widths=(16, 32),
        stem_strides=(2, 1, 1),
        group_width=32,
    ),
}

VARIANTS: dict[str, NFNetConfig] = {**_family(), **_SMALL}


class NFBlock(nn.Module):
    """Pre-activation bottleneck with two grouped 3x3 convolutions (Figures 5 and 6).

    A block that strides or changes the width is a transition: its shortcut is pooled and projected from the activated,
    beta-scaled signal, which resets the variance to 1. Otherwise the shortcut is the input itself.
    """

    def __init__(self, in_chans: int, out_chans: int, stride: int, beta: float, config: NFNetConfig) -> None:
        super().__init__()
        act, gamma = activation(config.activation)
        groups = max(1, int(out_chans * config.expansion) // config.group_width)
        width = groups * config.group_width
        self.act: Activation = act
        self.stride, self.alpha = stride, config.alpha
        self.conv0 = WSConv2d(in_chans, width, 1, scale=gamma / beta)
        self.conv1 = WSConv2d(width, width, 3, stride=stride, groups=groups, scale=gamma)
        self.conv1b = WSConv2d(width, width, 3, groups=groups, scale=gamma)
        self.conv2 = WSConv2d(width, out_chans, 1, scale=gamma)
        transition = stride > 1 or in_chans != out_chans
        self.conv_shortcut = WSConv2d(in_chans, out_chans, 1, scale=gamma / beta) if transition else None
        self.squeeze_excite = SqueezeExcite(out_chans, max(1, int(out_chans * config.se_ratio)))
        self.skip_gain = nn.Parameter(torch.full((1,), config.skip_init))  # one element: sharding refuses scalars

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """(N, C, H, W) -> (N, C', ceil(H / stride), ceil(W / stride)); keep (N,) is 0 for samples that skip it."""
        out = self.act(x)
        shortcut = x
        if self.conv_shortcut is not None:
            shortcut = self.conv_shortcut(avg_pool_same(out, self.stride) if self.stride > 1 else out)
        out = self.conv0(out)
        out = self.conv1(self.act(out))
        out = self.conv1b(self.act(out))
        out = self.conv2(self.act(out))
        gate = self.squeeze_excite(out) * (2.0 * self.alpha * at_least_float32(self.skip_gain))  # (N, C)
        if keep is not None:
            gate = gate * keep[:, None]
        return torch.addcmul(shortcut, out, gate.to(out.dtype)[:, :, None, None])


class NFNet(nn.Module):
    """(N, in_chans, H, W) -> (N, num_classes) logits, float32.

    The weights stay in float32; the type of the input decides the type of the maps, so that `model(x.bfloat16())`
    trains as the paper did. In training, masks of dropout and stochastic depth come from `draws`, or from torch's
    generator if none are given.
    """

    def __init__(self, config: NFNetConfig) -> None:
        super().__init__()
        self.config = config
        self.act, self.gamma = activation(config.activation)
        self.stem = nn.ModuleList(self._stem())
        self.blocks = nn.ModuleList(self._blocks())
        features = 2 * config.widths[-1]
        self.final_conv = WSConv2d(config.widths[-1], features, 1)
        self.num_features = features
        self.fc = linear(features, config.num_classes, std=0.01)
        n = len(self.blocks)
        self.depth_rates = tuple(config.stochastic_depth * i / n for i in range(n))

    def _stem(self) -> list[WSConv2d]:
        widths = [self.config.in_chans, *self.config.stem_widths, self.config.widths[0] // 2]
        layers = []
        for i, stride in enumerate(self.config.stem_strides):
            gamma = self.gamma if i else 1.0  # no activation before the first, nor after the last
            layers.append(WSConv2d(widths[i], widths[i + 1], 3, stride=stride, scale=gamma))
        return layers

    def _blocks(self) -> list[NFBlock]:
        betas = iter(block_input_std(self.config.depths, self.config.alpha))
        chans, blocks = self.config.widths[0] // 2, []
        for stage, (width, depth) in enumerate(zip(self.config.widths, self.config.depths, strict=True)):
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(NFBlock(chans, width, stride, next(betas), self.config))
                chans = width
        return blocks

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last layer by a new one, initialised as at first."""
        self.fc = linear(self.num_features, num_classes, std=0.01).to(self.fc.weight)
        self.config = replace(self.config, num_classes=num_classes)

    def draws(self, n: int, uniform_keep: Tensor | None = None, uniform_dropout: Tensor | None = None) -> Draws:
        """The masks of a training step for n images, from uniform numbers in [0, 1) or, without, torch's generator.

        uniform_keep is (n, blocks), uniform_dropout (n, features); a rate of 0 needs no numbers.
        """
        device, keep, dropout = self.fc.weight.device, None, None
        if self.config.stochastic_depth > 0:
            uniform = torch.rand(n, len(self.blocks), device=device) if uniform_keep is None else uniform_keep
            keep = depth_mask(uniform, torch.tensor(self.depth_rates, device=device))
        if self.config.drop_rate > 0:
            uniform = torch.rand(n, self.num_features, device=device) if uniform_dropout is None else uniform_dropout
            dropout = dropout_mask(uniform, self.config.drop_rate)
        return Draws(keep, dropout)

    def _features(self, x: Tensor, keep: Tensor | None) -> Tensor:
        for i, conv in enumerate(self.stem):
            x = conv(self.act(x) if i else x)
        for i, block in enumerate(self.blocks):
            x = block(x, None if keep is None or self.depth_rates[i] == 0.0 else keep[:, i])
        return self.act(self.final_conv(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, activated and with its gain gamma: (N, num_features, H / stride, W / stride)."""
        keep = self.draws(len(x)).keep if self.training else None
        return self._features(x, keep) * self.gamma

    def forward(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        """Logits; `draws` fixes the random masks in training and is ignored in evaluation."""
        if not self.training:
            draws = Draws()
        elif draws is None:
            draws = self.draws(len(x))
        maps = self._features(x, draws.keep)
        # gamma multiplies the pooled vector, not the map: (N, C, H, W) -> (N, C)
        pooled = maps.mean((2, 3), dtype=maps.dtype if maps.dtype == torch.float64 else torch.float32) * self.gamma
        if draws.dropout is not None:
            pooled = pooled * draws.dropout
        return at_least_float32(self.fc(pooled.to(self.fc.weight.dtype)))

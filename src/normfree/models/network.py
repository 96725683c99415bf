"""The network of every family: a stem, stages of residual blocks, a head (Section 5 and Appendix C of the paper).

Shapes: N images, C channels, H x W pixels. `normfree.models.families` has the variants, `block` the residual block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from operator import index
from typing import NamedTuple, SupportsIndex, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normfree.config import UserError
from normfree.models.block import Block, Place, batch_norm, convolution
from normfree.models.families import NetworkConfig
from normfree.nn.layers import (
    Draws,
    at_least_float32,
    block_dct,
    depth_mask,
    dropout_mask,
    linear,
    max_pool_same,
    mean_pixels,
)
from normfree.nn.signal import activation, block_input_std

_DCT = 8  # side of the blocks of the DCT stem, in pixels


class FeatureInfo(NamedTuple):
    """A map of `forward_intermediates`: its name, its channels, and how many pixels of the image one pixel is."""

    name: str
    channels: int
    stride: int


class Network(nn.Module):
    """(N, in_chans, H, W) -> (N, num_classes) logits, float32.

    The weights stay in float32; the type of the input decides the type of the maps, so that `model(x.bfloat16())`
    trains as the paper did. In training, masks of dropout and stochastic depth come from `draws`, or from torch's
    generator if none are given.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.name = ""  # in the table of models, where it is known
        self.folded = False  # by `fold`
        self.remat = "none"  # in training, maps inside of each "block" or "stage" are computed again in backward
        free = config.norm == "none"
        self.act, gamma = activation(config.activation)
        self.gamma = gamma if free else 1.0
        self.stem, self.stem_norms = self._stem()
        self.blocks = nn.ModuleList(Block(config, place) for place in places(config))
        chans = config.widths[-1]
        width = config.final_width if config.final != "none" else chans
        self.final_conv = convolution(config, 1.0)(chans, width, 1) if config.final == "conv" else None
        self.final_fc = linear(chans, width) if config.final == "fc" else None
        self.final_norm = batch_norm(config, width) if config.final != "fc" else None
        self.num_features = width
        self.fc = linear(width, config.num_classes, config.classifier_std)
        n = len(self.blocks)
        self.depth_rates = tuple(config.stochastic_depth * i / n for i in range(n))

    def _stem(self) -> tuple[nn.ModuleList, nn.ModuleList]:
        """The convolutions, and the norms before each but the first, where the family has norms."""
        c = self.config
        chans, widths, strides, kernel = c.in_chans, c.stem_widths, c.stem_strides, c.stem_kernel
        if c.stem == "dct":
            chans, widths, strides, kernel = c.in_chans * _DCT**2, widths[-1:], (1,), 1
        layers, norms = nn.ModuleList(), nn.ModuleList()
        for i, (width, stride) in enumerate(zip(widths, strides, strict=True)):
            scale = self.gamma if i else 1.0  # no activation before the first, nor after the last
            layers.append(convolution(c, scale)(chans, width, kernel, stride=stride))
            norm = batch_norm(c, chans) if i else None
            if norm is not None:
                norms.append(norm)
            chans = width
        return layers, norms

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last layer by a new one, initialised as at first."""
        self.config = replace(self.config, num_classes=num_classes)
        self.fc = linear(self.num_features, num_classes, self.config.classifier_std).to(self.fc.weight)

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

    def forward(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        """Logits; `draws` fixes the random masks in training and is ignored in evaluation."""
        if not self.training:
            draws = Draws()
        elif draws is None:
            draws = self.draws(len(x))
        # gamma multiplies the pooled vector, not the map: (N, C, H, W) -> (N, C)
        pooled = mean_pixels(self._features(x, draws.keep))
        if self.final_fc is not None:
            pooled = self.act(self.final_fc(pooled.to(self.final_fc.weight.dtype)))
        pooled = pooled * self.gamma
        if draws.dropout is not None:
            pooled = pooled * draws.dropout
        return at_least_float32(self.fc(pooled.to(self.fc.weight.dtype)))

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, whose mean over pixels goes to the classifier: (N, num_features, H / 32, W / 32).

        It is activated and has its gain gamma. With `final="fc"` it is the plain map behind the last block.
        """
        keep = self.draws(len(x)).keep if self.training else None
        maps = self._features(x, keep)
        return maps if self.final_fc is not None else maps * self.gamma

    def _features(self, x: Tensor, keep: Tensor | None) -> Tensor:
        x = self._run_stem(x)
        for span in self._spans():
            if self.remat != "none" and self.training and torch.is_grad_enabled():
                x = checkpoint(self._run_blocks, x, keep, span, use_reentrant=False, preserve_rng_state=False)
            else:
                x = self._run_blocks(x, keep, span)
        if self.final_fc is not None:
            return x
        if self.final_conv is not None:
            x = self.final_conv(x)
        return self._activate(self.final_norm, x)

    def _run_stem(self, x: Tensor) -> Tensor:
        if self.config.stem == "dct":
            x = block_dct(x, _DCT)
        for i, conv in enumerate(self.stem):
            x = conv(self._activate(self.stem_norms[i - 1] if self.stem_norms else None, x) if i else x)
        if not self.config.stem_pool or self.config.stem == "dct":
            return x
        return max_pool_same(x) if self.config.padding == "same" else F.max_pool2d(x, 3, 2, 1)

    def _spans(self) -> list[range]:
        """The blocks that are computed again together."""
        if self.remat == "block":
            return [range(i, i + 1) for i in range(len(self.blocks))]
        ends = list(accumulate(self.config.depths))
        return [range(a, b) for a, b in pairwise([0, *ends])]

    def _run_blocks(self, x: Tensor, keep: Tensor | None, span: range) -> Tensor:
        for i in span:
            x = self._run_block(i, x, keep)
        return x

    def part_of(self, parameter: str) -> str:
        """Where a parameter belongs, by its name: "stem", "stage0" and so on, "head"."""
        kind, _, rest = parameter.partition(".")
        if kind == "blocks":
            return f"stage{cast(Block, self.blocks[int(rest.partition('.')[0])]).place.stage}"
        return "stem" if kind.startswith("stem") else "head"

    def _run_block(self, i: int, x: Tensor, keep: Tensor | None) -> Tensor:
        if keep is None or self.depth_rates[i] == 0.0:
            return self.blocks[i](x)  # type: ignore[no-any-return]
        return self.blocks[i](x, keep[:, i])  # type: ignore[no-any-return]

    def _activate(self, norm: nn.Module | None, x: Tensor) -> Tensor:
        return self.act(x if norm is None else norm(x))

    @property
    def feature_info(self) -> tuple[FeatureInfo, ...]:
        """Of each stage: what `forward_intermediates` returns."""
        return tuple(
            FeatureInfo(f"stage{stage}", width, stride)
            for stage, (width, stride) in enumerate(zip(self.config.widths, _reached(self.config), strict=True))
        )

    def forward_intermediates(
        self, x: Tensor, indices: SupportsIndex | Sequence[int] | None = None, activated: bool = True
    ) -> list[Tensor]:
        """Maps behind the stages, for detection and segmentation; `feature_info` says their channels and strides.

        Args:
            x: (N, in_chans, H, W).
            indices: stages, from 0, or from -1 at the end; a number n means the last n; None means all.
            activated: with the activation, gamma and 1/beta, as the convolutions of the next stage see them;
                otherwise the residual stream itself. A last stage with batch norm and a final convolution behind it has
                the activation alone.

        Returns:
            [(N, C, ceil(H / stride), ceil(W / stride)), ...] in the order of the indices.

        Raises:
            UserError: there is no such stage.
        """
        wanted = self._stage_indices(indices)
        keep = self.draws(len(x)).keep if self.training else None
        x = self._run_stem(x)
        maps: dict[int, Tensor] = {}
        ends = list(accumulate(self.config.depths))
        for i in range(ends[max(wanted)] if wanted else 0):
            x = self._run_block(i, x, keep)
            stage = ends.index(i + 1) if i + 1 in ends else None
            if stage in wanted:
                maps[stage] = self._seen_behind(i + 1, x) if activated else x
        return [maps[stage] for stage in wanted]

    def _stage_indices(self, indices: SupportsIndex | Sequence[int] | None) -> list[int]:
        n = len(self.config.widths)
        if isinstance(indices, SupportsIndex):
            indices = index(indices)
            wanted = list(range(n - indices, n)) if 0 < indices <= n else [n]
        else:
            wanted = list(range(n)) if indices is None else list(indices)
        if any(not -n <= i < n for i in wanted):
            raise UserError(f"the network has the stages 0 to {n - 1}, not {indices}")
        return [i % n for i in wanted]

    def _seen_behind(self, blocks: int, x: Tensor) -> Tensor:
        """The map behind so many blocks, activated and brought to the variance that the next convolutions expect."""
        if self.config.norm == "batch":
            behind = cast(Block, self.blocks[blocks]).norm0 if blocks < len(self.blocks) else None
            if blocks == len(self.blocks) and self.final_conv is None:
                behind = self.final_norm
            return self._activate(behind, x)
        beta = block_input_std((*self.config.depths, 1), self.config.alpha)[blocks]
        if self.config.beta_first:
            return self.act(x / beta) * self.gamma
        return self.act(x) * (self.gamma / beta)


def _stem_stride(config: NetworkConfig) -> int:
    return _DCT if config.stem == "dct" else _ordinary_stem_stride(config)


def _ordinary_stem_stride(config: NetworkConfig) -> int:
    return math.prod(config.stem_strides) * (2 if config.stem_pool else 1)


def _strides(config: NetworkConfig) -> tuple[int, ...]:
    """Of each stage. Where the DCT stem is coarser than the ordinary one, the first stages do not stride."""
    strides, ahead = list(config.strides), 1
    if config.stem == "dct":
        ahead = _DCT // _ordinary_stem_stride(config)
    for stage, stride in enumerate(strides):
        if ahead > 1 and stride > 1:
            strides[stage], ahead = 1, ahead // stride
    return tuple(strides)


def _reached(config: NetworkConfig) -> list[int]:
    """The stride against the image behind each stage; one that would exceed the output stride is not taken."""
    reached = [_stem_stride(config)]
    for step in _strides(config):
        reached.append(reached[-1] * step if reached[-1] * step <= config.output_stride else reached[-1])
    return reached[1:]


def places(config: NetworkConfig) -> Iterator[Place]:
    """Where each block stands."""
    betas = iter(block_input_std(config.depths, config.alpha))
    chans, before, dilation = config.stem_widths[-1], _stem_stride(config), 1
    stages = zip(config.widths, config.depths, _strides(config), _reached(config), strict=True)
    for stage, (width, depth, stride, reached) in enumerate(stages):
        dense = stride > 1 and reached == before
        for number in range(depth):
            step = stride if number == 0 else 1
            yield Place(chans, width, stage, stage == number == 0, next(betas), step, dilation, dense and number == 0)
            dilation *= step if dense else 1
            chans = width
        before = reached

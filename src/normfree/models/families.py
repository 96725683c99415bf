"""The networks as data: what a configuration says, and the variants of every family."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from normfree.config import UserError
from normfree.nn.signal import ACTIVATIONS

_CHOICES = {
    "stem": ("convs", "dct"),
    "shortcut": ("pool", "stride"),
    "squeeze": ("out", "inner", "straddle", "none"),
    "final": ("conv", "fc", "none"),
    "norm": ("none", "batch"),
    "activation": tuple(a for a in ACTIVATIONS if a != "glu"),  # which halves the channels
    "output_stride": (8, 16, 32),
    "padding": ("same", "symmetric"),
}
PER_STAGE = ("depths", "strides", "group_width", "expansion", "expand_from")


@dataclass(frozen=True)
class NetworkConfig:
    """One network. Sizes are pixels of a square side, rates are probabilities, widths are channels.

    Values a stage are one for each stage, or a single one for all. The defaults are NFNet's. "E" marks what Appendix E
    of the paper tried and did not keep.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]  # blocks of each stage
    train_size: int
    test_size: int
    drop_rate: float  # of dropout before the classifier
    magnitude: int = 0  # of RandAugment; 0 where no source gives one
    stochastic_depth: float = 0.25  # of the last block, growing linearly from 0
    strides: tuple[int, ...] = (1, 2, 2, 2)  # of the first block of each stage
    stem: str = "convs"  # or "dct": the cosine transform of 8x8 blocks, then a 1x1 convolution (E)
    stem_widths: tuple[int, ...] = (16, 32, 64, 128)
    stem_strides: tuple[int, ...] = (2, 1, 1, 2)
    stem_kernel: int = 3
    stem_pool: bool = False  # a 3x3 max pool of stride 2 behind the convolutions
    # block
    group_width: tuple[int, ...] = (128,)  # channels a group of the 3x3 convolutions; 0: one group. Differing: E
    expansion: tuple[float, ...] = (0.5,)  # of the bottleneck against the block's output. Differing: E
    expand_from: tuple[str, ...] = ("out",)  # "in": the bottleneck's width follows the block's input (E)
    first_expansion: float | None = None  # of the network's first block, if it differs
    second_conv: bool = True  # two 3x3 convolutions in the bottleneck
    pointwise_groups: int = 1  # of the two 1x1 convolutions of the main path (E)
    shortcut: str = "pool"  # of a block that strides: 2x2 average pool and 1x1, or "stride": a strided 1x1
    # squeeze-excite: on the block's output; "inner": behind the 3x3; "straddle": from the input of the last 1x1 to
    # its output (E); "none"
    squeeze: str = "out"
    se_ratio: float = 0.5  # hidden width against the width that is gated
    se_gelu: bool = False  # GELU inside of it, as Appendix C writes, instead of ReLU, as the code has
    alpha: float = 0.2
    skip_init: float = 0.0  # where SkipInit starts; at 1 the signal is as the bookkeeping of beta predicts it
    beta_first: bool = False  # act(h / beta), as the paper writes, instead of act(h) / beta, as its code does
    activation: str = "gelu"
    norm: str = "none"  # "batch": batch norm before each activation, in place of the whole normalizer-free strategy
    # head: "conv": 1x1, activation, pool; "fc": pool, linear, activation (tried in C); "none": activation, pool
    final: str = "conv"
    final_width: int = 3072
    classifier_std: float = 0.01  # of its initial weights; 0 as in NF-RegNet
    ws_eps: float = 1e-4  # floor of variance times fan-in in weight standardization
    padding: str = "same"  # TensorFlow's, as in the authors' code, or "symmetric"
    output_stride: int = 32  # at 8 or 16 the last stages dilate instead of striding
    num_classes: int = 1000
    in_chans: int = 3

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} must be one of {', '.join(map(str, allowed))}, not {getattr(self, name)!r}")
        if not (self.widths and self.stem_widths):
            raise UserError("a network needs at least one stage and one convolution in its stem")
        for name in PER_STAGE:
            values = getattr(self, name)
            if len(values) == 1:
                object.__setattr__(self, name, values * len(self.widths))
            elif len(values) != len(self.widths):
                raise UserError(f"{name} needs one value, or one for each of {len(self.widths)} stages, not {values}")
        if not set(self.expand_from) <= {"in", "out"}:
            raise UserError(f"expand_from must be in or out, not {self.expand_from}")
        if len(self.stem_widths) != len(self.stem_strides):
            raise UserError(f"{len(self.stem_widths)} widths and {len(self.stem_strides)} strides of the stem")
        whole = (*self.widths, *self.depths, *self.strides, *self.stem_widths, *self.stem_strides, self.in_chans)
        if min(*whole, self.stem_kernel, self.num_classes, self.pointwise_groups, self.final_width) < 1:
            raise UserError("widths, depths, strides, groups, classes and channels must be positive")
        # a file must not ask for all the memory there is
        if max(*self.widths, *self.stem_widths, *self.group_width) > 1 << 16 or sum(self.depths) > 2000:
            raise UserError("more than 65,536 channels or 2,000 blocks")
        if max(self.num_classes, self.in_chans, self.final_width) > 1 << 24:
            raise UserError("more than 16 million classes, input channels or features")
        if max(*self.strides, *self.stem_strides, self.stem_kernel, self.alpha, abs(self.skip_init)) > 64:
            raise UserError("strides, stem_kernel, alpha and skip_init must not be more than 64")
        numbers = (self.se_ratio, *self.expansion, self.classifier_std, self.ws_eps, self.alpha, self.skip_init)
        if not all(math.isfinite(v) for v in numbers):
            raise UserError("se_ratio, expansion, classifier_std, ws_eps, alpha and skip_init must be finite")
        if min(*self.group_width, self.se_ratio, self.classifier_std, self.ws_eps, self.magnitude) < 0:
            raise UserError("group_width, se_ratio, classifier_std, ws_eps and magnitude must not be negative")
        first = 1.0 if self.first_expansion is None else self.first_expansion
        if not min(*self.expansion, first, self.alpha, self.train_size, self.test_size) > 0 or not first < math.inf:
            raise UserError("expansion, alpha, train_size and test_size must be positive")
        if max(*self.expansion, first) > 64 or self.se_ratio > 64:
            raise UserError("expansion and se_ratio must not be more than 64")
        for rate in (self.drop_rate, self.stochastic_depth):
            if not 0.0 <= rate < 1.0:
                raise UserError(f"drop_rate and stochastic_depth must be in [0, 1), not {rate}")


# F0 to F7 and the wider + variants (Table 1, A.3; F7 is in the authors' code only)
_F_ROWS = (  # train, test, dropout, RandAugment magnitude
    (192, 256, 0.2, 5),
    (224, 320, 0.3, 10),
    (256, 352, 0.4, 10),
    (320, 416, 0.4, 15),
    (384, 512, 0.5, 15),
    (416, 544, 0.5, 15),
    (448, 576, 0.5, 15),
    (480, 608, 0.5, 15),
)
_DEFAULT_WIDTHS = (256, 512, 1024, 2048)  # of ResNets


def _nfnets() -> dict[str, NetworkConfig]:
    table = {}
    for n, row in enumerate(_F_ROWS):
        depths = tuple((n + 1) * d for d in (1, 2, 6, 3))
        plain = NetworkConfig((256, 512, 1536, 1536), depths, *row)
        table[f"nfnet_f{n}"] = plain
        table[f"nfnet_f{n}_plus"] = replace(
            plain, widths=(384, 768, 2048, 2048), stem_widths=(16, 32, 64, 192), final_width=4096
        )
    # 384 * 0.5 = 192 channels are one group of 128 in the authors' code; Table 5 counts one group of 192
    table["nfnet_f4_plus_192"] = replace(table["nfnet_f4_plus"], group_width=(192, 128, 128, 128))
    return table


def _ladder() -> dict[str, NetworkConfig]:
    """Table 2: from the SE-ResNeXt-D baseline to NFNet; depths, stem and image sizes are the variant's throughout."""
    table = {}
    for n in range(4):
        full = NFNETS[f"nfnet_f{n}"]
        default_width = replace(full, widths=_DEFAULT_WIDTHS, final_width=4096)
        table[f"nfnet_f{n}_baseline"] = replace(default_width, second_conv=False)
        table[f"nfnet_f{n}_modified_width"] = replace(full, second_conv=False)
        table[f"nfnet_f{n}_default_width"] = default_width
    return table


_RESNET_DEPTHS = {
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
    288: (24, 24, 24, 24),  # this and the next are in the authors' code only
    600: (50, 50, 50, 50),
}


def _resnets() -> dict[str, NetworkConfig]:
    """NF-ResNet as in Section 4.1: the paper gives no dropout rate for it, so here it is 0."""
    return {
        f"nf_resnet{n}": NetworkConfig(
            _DEFAULT_WIDTHS,
            depths,
            train_size=224,
            test_size=224,
            drop_rate=0.0,
            stochastic_depth=0.1,
            stem_pool=True,
            stem_widths=(64,),
            stem_strides=(2,),
            stem_kernel=7,
            group_width=(0,),
            expansion=(0.25,),
            second_conv=False,
            shortcut="stride",
            squeeze="none",
            activation="relu",
            final="none",
        )
        for n, depths in _RESNET_DEPTHS.items()
    }


# Sizes of the authors' NF-RegNets: widths before the factor 0.75, depths, train, test, dropout. Not in the paper.
_REGNET_ROWS = (
    ((48, 104, 208, 440), (1, 3, 6, 6), 192, 224, 0.2),
    ((48, 104, 208, 440), (2, 4, 7, 7), 224, 256, 0.2),
    ((56, 112, 232, 488), (2, 4, 8, 8), 240, 272, 0.3),
    ((56, 128, 248, 528), (2, 5, 9, 9), 288, 320, 0.3),
    ((64, 144, 288, 616), (2, 6, 11, 11), 320, 384, 0.4),
    ((80, 168, 336, 704), (3, 7, 14, 14), 384, 456, 0.4),
    ((88, 184, 376, 792), (3, 8, 16, 16), 448, 528, 0.5),
    ((96, 208, 416, 880), (4, 10, 19, 19), 512, 600, 0.5),
    ((104, 232, 456, 968), (4, 11, 22, 22), 600, 672, 0.5),
)


def regnet_config(
    widths: tuple[int, ...], depths: tuple[int, ...], train_size: int, test_size: int, drop_rate: float
) -> NetworkConfig:
    """An NF-RegNet with the authors' rules; widths before the factor 0.75."""
    widths = tuple(int(0.75 * w) for w in widths)
    return NetworkConfig(
        widths,
        depths,
        train_size,
        test_size,
        drop_rate,
        stochastic_depth=0.1,
        strides=(2,),
        stem_widths=widths[:1],
        stem_strides=(2,),
        group_width=(8,),
        expansion=(2.25,),
        expand_from=("in",),
        first_expansion=1.0,
        second_conv=False,
        squeeze="inner",
        activation="silu",
        final_width=1280 * widths[-1] // 440,
        classifier_std=0.0,
    )


def _bn_twins() -> dict[str, NetworkConfig]:
    """Batch norm in place of the NF strategy: the ResNets of Figure 2 and Table 4, and "-NF, + BN" of Table 6."""
    table = {}
    for n in _RESNET_DEPTHS:
        table[f"bn_resnet{n}"] = replace(
            RESNETS[f"nf_resnet{n}"], norm="batch", stochastic_depth=0.0, classifier_std=0.0
        )
    for n in range(len(_F_ROWS)):
        table[f"bn_nfnet_f{n}"] = replace(NFNETS[f"nfnet_f{n}"], norm="batch")
    return table


def _small() -> dict[str, NetworkConfig]:
    """For images of 28 to 64 px: the same block in narrow groups, and a stem that halves once. Not in the paper."""
    tiny = NetworkConfig(
        widths=(32, 64, 128, 128),
        depths=(1, 1, 2, 1),
        train_size=32,
        test_size=32,
        drop_rate=0.0,
        stochastic_depth=0.0,
        stem_widths=(16, 32, 16),
        stem_strides=(2, 1, 1),
        group_width=(16,),
        final_width=256,
    )
    small = replace(
        tiny,
        widths=(64, 128, 256, 256),
        depths=(1, 2, 4, 2),
        train_size=64,
        test_size=64,
        drop_rate=0.1,
        stochastic_depth=0.1,
        stem_widths=(16, 32, 32),
        group_width=(32,),
        final_width=512,
    )
    return {"nfnet_tiny": tiny, "nfnet_small": small}


def _timm() -> dict[str, NetworkConfig]:
    """Two networks of timm's own for which it has weights; they differ from the authors' of that name."""
    f0 = NFNETS["nfnet_f0"]
    return {
        "timm_nfnet_l0": replace(
            f0,
            train_size=224,
            test_size=288,
            magnitude=0,
            group_width=(64,),
            expansion=(0.25,),
            se_ratio=0.25,
            activation="silu",
            final_width=2304,
            skip_init=1.0,
            padding="symmetric",
        ),
        "timm_nf_resnet50": replace(
            RESNETS["nf_resnet50"],
            train_size=256,
            test_size=288,
            shortcut="pool",
            skip_init=1.0,
            padding="symmetric",
        ),
    }


NFNETS = _nfnets()
RESNETS = _resnets()
REGNETS = {f"nf_regnet_b{n}": regnet_config(*row) for n, row in enumerate(_REGNET_ROWS)}

# Every name that `create_model` knows. A plain table, walked by one test.
MODELS: dict[str, NetworkConfig] = {**NFNETS, **RESNETS, **REGNETS, **_bn_twins(), **_ladder(), **_timm(), **_small()}

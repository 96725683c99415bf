"""Table 3 of the paper as data, and which networks of ours and of timm are those of its rows."""

from __future__ import annotations

from dataclasses import dataclass

# A.2: what the paper's latencies are of
CONDITIONS = "a whole training step at 32 images per device: 32 TPUv3 cores in bfloat16, or one V100 in float16"


@dataclass(frozen=True)
class Row:
    """A row of Table 3, as printed; None where the table has a dash.

    Only the same network stands in a row: others of the same family are not comparable with its numbers.
    """

    name: str
    multiply_adds: float | None  # billions, one image of the test size
    parameters: float  # millions
    top1: float  # per cent
    top5: float | None
    tpu_ms: float | None
    gpu_ms: float | None
    model: str | None = None  # ours, or "timm:NAME"; None where no package has the network
    size: int = 0  # side of its training images in pixels; 0 where there is no network
    also: str | None = None  # another implementation of it
    borrowed: bool = False  # accuracies are from Srinivas et al. 2021, not the authors' own measurement (A.2)

    @property
    def is_ours(self) -> bool:
        """Whether it is a network of the paper."""
        return self.name.startswith("NFNet")


# SENet-152: its 19.04 billion are those of 288 px; at 224 px it has 11.5. DeiT is the distilled one, tuned at 384 px.
# MaxUp takes several forward passes a step, so a plain step of EffNet-B8 would not be that of its row.
TABLE_3: tuple[Row, ...] = (
    Row("ResNet-50", 4.10, 26.0, 78.6, 94.3, 41.6, 35.3, "timm:resnet50", 224),
    Row("EffNet-B0", 0.39, 5.3, 77.1, 93.3, 51.1, 44.8, "timm:efficientnet_b0", 224),
    Row("SENet-50", 4.09, 28.0, 79.4, 94.6, 64.3, 59.4, "timm:seresnet50", 224, borrowed=True),
    Row("NFNet-F0", 12.38, 71.5, 83.6, 96.8, 73.3, 56.7, "nfnet_f0", 192, "timm:dm_nfnet_f0"),
    Row("EffNet-B3", 1.80, 12.0, 81.6, 95.7, 129.5, 116.6, "timm:efficientnet_b3", 300),
    Row("LambdaNet-152", None, 51.5, 83.0, 96.3, 138.3, 135.2),
    Row("SENet-152", 19.04, 66.6, 83.1, 96.4, 149.9, 151.2, "timm:seresnet152", 288, borrowed=True),
    Row("BoTNet-110", 10.90, 54.7, 82.8, 96.3, 181.3, None, borrowed=True),
    Row("NFNet-F1", 35.54, 132.6, 84.7, 97.1, 158.5, 133.9, "nfnet_f1", 224, "timm:dm_nfnet_f1"),
    Row("EffNet-B4", 4.20, 19.0, 82.9, 96.4, 245.9, 221.6, "timm:efficientnet_b4", 380),
    Row("BoTNet-128-T5", 19.30, 75.1, 83.5, 96.5, 355.2, None, borrowed=True),
    Row("NFNet-F2", 62.59, 193.8, 85.1, 97.3, 295.8, 226.3, "nfnet_f2", 256, "timm:dm_nfnet_f2"),
    Row("SENet-350", 52.90, 115.2, 83.8, 96.6, 593.6, None, borrowed=True),
    Row("EffNet-B5", 9.90, 30.0, 83.7, 96.7, 450.5, 458.9, "timm:efficientnet_b5", 456),
    Row("LambdaNet-350", None, 105.8, 84.5, 97.0, 471.4, None),
    Row("BoTNet-77-T6", 23.30, 53.9, 84.0, 96.7, 578.1, None, borrowed=True),
    Row("NFNet-F3", 114.76, 254.9, 85.7, 97.5, 532.2, 524.5, "nfnet_f3", 320, "timm:dm_nfnet_f3"),
    Row("LambdaNet-420", None, 124.8, 84.8, 97.0, 593.9, None),
    Row("EffNet-B6", 19.00, 43.0, 84.0, 96.8, 775.7, 868.2, "timm:efficientnet_b6", 528),
    Row("BoTNet-128-T7", 45.80, 75.1, 84.7, 97.0, 804.5, None, borrowed=True),
    Row("NFNet-F4", 215.24, 316.1, 85.9, 97.6, 1033.3, 1190.6, "nfnet_f4", 384, "timm:dm_nfnet_f4"),
    Row("EffNet-B7", 37.00, 66.0, 84.7, 97.0, 1397.0, 1753.3, "timm:efficientnet_b7", 600),
    Row(
        "DeIT 1000 epochs",
        None,
        87.0,
        85.2,
        None,
        None,
        None,
        "timm:deit_base_distilled_patch16_384",
        384,
        borrowed=True,
    ),
    Row("EffNet-B8+MaxUp", 62.50, 87.4, 85.8, None, None, None),
    Row("NFNet-F5", 289.76, 377.2, 86.0, 97.6, 1398.5, 2177.1, "nfnet_f5", 416, "timm:dm_nfnet_f5"),
    Row("NFNet-F5+SAM", 289.76, 377.2, 86.3, 97.9, 1958.0, None, "nfnet_f5+sam", 416),
    Row("NFNet-F6+SAM", 377.28, 438.4, 86.5, 97.9, 2774.1, None, "nfnet_f6+sam", 448),
)


def row_of(model: str) -> Row | None:
    """The row in which a network stands, if one does."""
    return next((row for row in TABLE_3 if model in (row.model, row.also)), None)


def measurable(others: bool = True) -> list[str]:
    """Networks of the table in its order, ours and timm's; with others also timm's NFNets, each behind ours."""
    found = []
    for row in TABLE_3:
        found += [row.model] if row.model is not None else []
        found += [row.also] if row.also is not None and others else []
    return found

"""Signal propagation plots (Brock et al. 2021a): mean and variance from block to block, beside what is expected."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normfree.models.network import Network
from normfree.models.propagation import Signal, expected_variance, measure

_PANELS = (
    ("squared channel means", "mean_square"),
    ("channel variance", "variance"),
    ("variance of the residual branch", "residual"),
)


@dataclass(frozen=True)
class Propagation:
    """The signal of one network on one kind of input, and the variances that the bookkeeping predicts for it."""

    name: str  # of the network
    images: str  # what it was measured on
    signals: list[Signal]  # behind the stem and each block
    expected: list[float] | None  # None where nothing is predicted: with batch norm

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "model": self.name,
            "images": self.images,
            "expected_variance": self.expected,
            "blocks": [s._asdict() for s in self.signals],
        }


def propagation(name: str, model: Network, images: Tensor, label: str, skip_gain: float | None = 1.0) -> Propagation:
    """Measure a network on images (N, C, H, W), after setting every SkipInit gain to `skip_gain`; None leaves them.

    At initialisation the gains are 0, and nothing but the transition blocks would be seen. A prediction is given only
    for gains that are set.
    """
    if skip_gain is not None:
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("skip_gain"):
                    parameter.fill_(skip_gain)
    predicted = model.config.norm == "none" and skip_gain is not None
    expected = expected_variance(model.config, skip_gain) if predicted and skip_gain is not None else None
    return Propagation(name, label, measure(model, images), expected)


def noise(channels: int, size: int, n: int, seed: int = 0) -> Tensor:
    """Images of independent N(0, 1) pixels, n of them: (n, channels, size, size)."""
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def draw(found: list[Propagation], path: Path) -> None:
    """A picture with a row for each network and the three numbers as columns; the expectation is dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 (drawing is rare, its import slow)
    from matplotlib.figure import Figure  # noqa: PLC0415

    names = list(dict.fromkeys(p.name for p in found))
    figure = Figure(figsize=(13, 0.9 + 3.1 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(names), len(_PANELS), squeeze=False)
    for row, name in enumerate(names):
        curves = [p for p in found if p.name == name]
        for column, (title, field) in enumerate(_PANELS):
            ax = axes[row][column]
            for curve in curves:
                values = [getattr(s, field) for s in curve.signals]
                blocks = [i for i, v in enumerate(values) if v is not None]
                ax.plot(blocks, [values[i] for i in blocks], marker="o", markersize=3, label=curve.images)
            expected = _expected(field, curves[0])
            if expected:
                ax.plot(*zip(*expected, strict=True), "k--", linewidth=1, label="expected")
            ax.set_title(f"{name}: {title}" if column == 0 else title, fontsize=10)
            ax.set_xlabel("residual blocks behind")
            ax.set_ylim(bottom=0)
            ax.grid(alpha=0.3)
            if column == 1 or (column == 0 and len(curves) > 1):
                ax.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _expected(field: str, curve: Propagation) -> list[tuple[int, float]]:
    if curve.expected is None or field == "mean_square":
        return []
    if field == "variance":
        return list(enumerate(curve.expected))
    return [(i, 1.0) for i in range(1, len(curve.expected))]


def largest_deviation(curve: Propagation) -> float:
    """Greatest relative difference of the variance behind a block from its expectation; NaN where there is none."""
    if curve.expected is None:
        return math.nan
    return max(abs(s.variance / e - 1) for s, e in zip(curve.signals[1:], curve.expected[1:], strict=True))

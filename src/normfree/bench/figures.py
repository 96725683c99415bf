"""Accuracy against latency and against multiply-adds, as in Figures 1 and 4. The accuracies are the paper's."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from normfree.bench.labels import Label, place_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# by the beginning of a network's name: what the legend calls it, its colour, its marker
_FAMILIES = {
    "NFNet": ("NFNet (ours)", "#1f5fbf", "o"),
    "EffNet": ("EfficientNet", "#d1682b", "s"),
    "SENet": ("SENet", "#2e8b57", "^"),
    "ResNet": ("ResNet", "#666666", "D"),
    "LambdaNet": ("LambdaNet", "#a0762a", "v"),
    "BoTNet": ("BoTNet", "#8e4bb0", "P"),
    "DeIT": ("DeiT", "#c2407c", "X"),
}
_ACCURACY = "top-1 on ImageNet, % (the paper's)"
_DPI = 150


class Point(NamedTuple):
    """Where a network is drawn. timms: not our implementation of it, but timm's."""

    network: str
    x: float
    top1: float
    timms: bool = False

    @property
    def family(self) -> str:
        """The beginning of its name that says which kind of network it is."""
        return next(f for f in _FAMILIES if self.network.startswith(f))

    @property
    def label(self) -> str:
        """F0 of NFNet-F0, B7 of EffNet-B7; others in full."""
        return self.network.removeprefix("NFNet-").removeprefix("EffNet-")


def latency_figure(rows: Sequence[dict[str, Any]], measured: str) -> Figure:
    """Accuracy against the milliseconds of a step: as measured, and beside it the paper's on TPUv3.

    Args:
        rows: as `table3.beside_the_paper` returns them.
        measured: under which conditions, for the title.
    """
    figure, (here, there) = _figure(13, 6, 2)
    found = [r for r in rows if "paper" in r and "seconds" in r.get("here", {})]
    points = [
        Point(r["network"], 1000 * r["here"]["seconds"]["median"], r["paper"]["top1"], _is_timms(r)) for r in found
    ]
    printed = {r["network"]: r["paper"] for r in rows if "paper" in r}
    old = [Point(name, p["tpu_ms"], p["top1"]) for name, p in printed.items() if p["tpu_ms"] is not None]
    for axis, drawn, title in (
        (here, points, measured),
        (there, old, "the paper: 32 images on each of 32 TPUv3 cores, bf16"),
    ):
        axis.set_title(title, fontsize=10)
        _draw(axis, drawn, "training step, ms (log scale)")
    there.set_ylabel("")
    _legend(figure, [*points, *old])
    for axis, drawn in ((here, points), (there, old)):
        _write(axis, drawn)
    return figure


def flops_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Accuracy against billions of multiply-adds of one image at the test size; both are the paper's."""
    figure, (axis,) = _figure(9, 6, 1)
    printed = {r["network"]: r["paper"] for r in rows if "paper" in r}
    points = [Point(n, p["multiply_adds"], p["top1"]) for n, p in printed.items() if p["multiply_adds"] is not None]
    axis.set_title("Accuracy and multiply-adds, as the paper has them", fontsize=10)
    _draw(axis, points, "multiply-adds of an image at the test size, billions (log scale)")
    _legend(figure, points)
    _write(axis, points)
    return figure


def as_png(figure: Figure) -> bytes:
    """The picture as a file's content."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def _is_timms(row: dict[str, Any]) -> bool:
    return row["network"].startswith("NFNet") and str(row["here"]["name"]).startswith("timm:")


def _figure(width: float, height: float, columns: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 (drawing is rare, its import slow)
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(width, height), layout="constrained", dpi=_DPI)
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns, sharey=True, squeeze=False)[0])


def _draw(axis: Axes, points: Sequence[Point], title: str) -> None:
    """The points, and a thin line through those of a family."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: PLC0415

    axis.set_xscale("log")
    for family, (_, colour, marker) in _FAMILIES.items():
        kin = sorted((p for p in points if p.family == family and not p.timms), key=lambda p: p.x)
        others = [p for p in points if p.family == family and p.timms]
        ours, size = family == "NFNet", 7 if family == "NFNet" else 5.5
        plain = [p for p in kin if "+" not in p.network]  # SAM and MaxUp are something else than a larger network
        axis.plot([p.x for p in plain], [p.top1 for p in plain], "-", color=colour, lw=1.8 if ours else 1, alpha=0.45)
        for chosen, face in ((kin, colour), (others, "white")):
            x, y = [p.x for p in chosen], [p.top1 for p in chosen]
            axis.plot(x, y, marker, color=colour, ms=size, markerfacecolor=face, zorder=4 if ours else 3)
    low, high = min((p.x for p in points), default=1.0), max((p.x for p in points), default=1.0)
    axis.set_xlim(low / 1.6, high * 1.6)
    axis.xaxis.set_major_locator(LogLocator(10, (1, 2, 5) if high > 8 * low else (1, 1.5, 2, 3, 4, 5, 7)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel(title)
    axis.set_ylabel(_ACCURACY)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, points: Sequence[Point]) -> None:
    from matplotlib.lines import Line2D  # noqa: PLC0415

    there = {p.family for p in points}
    marks = [
        Line2D([], [], color=colour, marker=marker, lw=1, label=name)
        for family, (name, colour, marker) in _FAMILIES.items()
        if family in there
    ]
    if any(p.timms for p in points):
        colour = _FAMILIES["NFNet"][1]
        marks.append(Line2D([], [], color=colour, marker="o", markerfacecolor="white", lw=0, label="NFNet (timm's)"))
    if marks:
        figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False, fontsize=9)


def _write(axis: Axes, points: Sequence[Point]) -> None:
    """The names beside the points; timm's network is named only where ours is not."""
    ours = {p.network for p in points if not p.timms}
    named = [p for p in points if not (p.timms and p.network in ours)]
    labels = [Label(p.x, p.top1, p.label, _FAMILIES[p.family][1]) for p in named]
    place_labels(axis, labels, [(p.x, p.top1) for p in points])

"""Texts beside the points of a plot, where they cover the least: other texts, points, lines, the frame."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[np.float64]

_ANGLES, _DISTANCES = 24, (5.0, 8.0, 12.0, 17.0, 23.0, 30.0)  # of the text's edge from its point, in points
_FAR = 10.0  # points from which on a thin line leads from the text to its point
_MARKER = 4.0  # half the side of what a marker covers, in points
_OVER_ANOTHER, _OVER_A_LINE, _LED_OVER_ANOTHER = 1000.0, 6.0, 40.0  # what covering costs, against points of distance
_LED = 5  # spots of the thin line that are looked at
_SWEEPS = 3  # each text is placed anew, with the others where they are now


class Label(NamedTuple):
    """A text for the point (x, y)."""

    x: float
    y: float
    text: str
    colour: str


class _Places(NamedTuple):
    """Where a text may stand, in pixels. Boxes are left, bottom, right, top."""

    boxes: Array  # (P, 4)
    distances: Array  # (P,) of its edge from its point, in points
    edges: Array  # (P, 2) the spot of each box that is nearest to the point
    point: Array  # (2,)

    def leaders(self) -> Array:
        """(P, _LED, 2) spots of the lines to the point; where none is drawn, all of them at the text's edge."""
        parts = np.linspace(0.0, 1.0, _LED, endpoint=False)[None, :, None] * (self.distances > _FAR)[:, None, None]
        found: Array = self.edges[:, None] + parts * (self.point - self.edges)[:, None]
        return found


class _Page(NamedTuple):
    """What is on an axis already, in pixels."""

    markers: Array  # (M, 4)
    lines: Array  # (L, 2) spots along lines
    frame: Array  # (4,)
    scale: float  # pixels to a point

    def cost(self, places: _Places) -> Array:
        """(P,) for each place, the other texts left aside."""
        b, f = places.boxes, self.frame
        outside = (b[:, 0] < f[0]) | (b[:, 1] < f[1]) | (b[:, 2] > f[2]) | (b[:, 3] > f[3])
        crossed = _inside(self.lines, b).sum(0)
        found: Array = _OVER_ANOTHER * outside + _OVER_A_LINE * crossed + places.distances
        return found + self.covering(places, self.markers)

    def covering(self, places: _Places, others: Array) -> Array:
        """(P,) for texts, and the lines to them, over other boxes (K, 4)."""
        margin = np.array([-1.0, -1.0, 1.0, 1.0]) * self.scale
        b, o = (places.boxes + margin)[:, None], others[None]
        over = (b[..., 0] < o[..., 2]) & (o[..., 0] < b[..., 2]) & (b[..., 1] < o[..., 3]) & (o[..., 1] < b[..., 3])
        foreign = others[~_inside(places.point[None], others)[0]]
        led = _inside(places.leaders().reshape(-1, 2), foreign).reshape(len(places.boxes), -1).sum(1)
        found: Array = _OVER_ANOTHER * over.sum(1) + _LED_OVER_ANOTHER * led
        return found


def place_labels(axis: Axes, labels: Sequence[Label], points: Sequence[tuple[float, float]], size: float = 8.5) -> None:
    """Write the labels, each at the best of many places around its point.

    Args:
        axis: with its lines, limits and scales as they will be; the figure is laid out first.
        labels: in data coordinates.
        points: all markers, also those without a label, in data coordinates.
        size: of the letters, in points.
    """
    from matplotlib.patheffects import withStroke  # noqa: PLC0415 (drawing is rare, its import slow)

    page = _page(axis, points)
    texts, places = [], []
    for label in labels:
        text = axis.text(label.x, label.y, label.text, fontsize=size, color=label.colour, in_layout=False, zorder=6)
        text.set(horizontalalignment="center", verticalalignment="center")
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        box = text.get_window_extent()
        places.append(_around(axis.transData.transform((label.x, label.y)), (box.width, box.height), page.scale))
        texts.append(text)
    to_data = axis.transData.inverted().transform
    for label, text, place, chosen in zip(labels, texts, places, _choose(places, page), strict=True):
        x, y = to_data((place.boxes[chosen, :2] + place.boxes[chosen, 2:]) / 2)
        text.set_position((float(x), float(y)))
        if place.distances[chosen] > _FAR:
            ends = to_data([place.point, place.edges[chosen]])
            axis.plot(ends[:, 0], ends[:, 1], color=label.colour, lw=0.5, alpha=0.7, zorder=2)


def _page(axis: Axes, points: Sequence[tuple[float, float]]) -> _Page:
    figure = axis.get_figure(root=True)
    assert figure is not None
    figure.canvas.draw()
    axis.set_autoscale_on(False)  # what is drawn from now on moves nothing
    scale = figure.dpi / 72
    spots = axis.transData.transform(np.reshape(points, (-1, 2)))
    markers = np.concatenate([spots - _MARKER * scale, spots + _MARKER * scale], axis=1)
    drawn = [line for line in axis.get_lines() if line.get_linestyle() != "None"]
    along = [spot for line in drawn for spot in _along(line, axis)]
    return _Page(markers, np.reshape(along, (-1, 2)), np.array(axis.get_window_extent().extents), scale)


def _along(line: Any, axis: Axes) -> Iterator[tuple[float, float]]:
    """Spots along a line, in pixels."""
    for (x0, y0), (x1, y1) in pairwise(axis.transData.transform(line.get_xydata())):
        n = max(1, int(math.hypot(x1 - x0, y1 - y0) / 6))
        yield from ((x0 + (x1 - x0) * i / n, y0 + (y1 - y0) * i / n) for i in range(n))


def _around(point: Array, size: tuple[float, float], scale: float) -> _Places:
    """Where a text of this size may stand."""
    distances = np.repeat(_DISTANCES, _ANGLES)
    angles = np.tile(2 * np.pi * np.arange(_ANGLES) / _ANGLES, len(_DISTANCES))
    half = np.array(size) / 2
    middles = point + np.stack([np.cos(angles), np.sin(angles)], 1) * (distances[:, None] * scale + half)
    edges = np.clip(point, middles - half, middles + half)
    return _Places(np.concatenate([middles - half, middles + half], 1), distances, edges, point)


def _inside(spots: Array, boxes: Array) -> NDArray[np.bool_]:
    """(S, B) whether spots (S, 2) are in boxes (B, 4)."""
    s, b = spots[:, None], boxes[None]
    return (b[..., 0] <= s[..., 0]) & (s[..., 0] <= b[..., 2]) & (b[..., 1] <= s[..., 1]) & (s[..., 1] <= b[..., 3])


def _choose(places: Sequence[_Places], page: _Page) -> list[int]:
    """Which place of each text, by going over them several times."""
    alone = [page.cost(p) for p in places]
    chosen: list[int] = []
    for sweep in range(_SWEEPS):
        for i, p in enumerate(places):
            others = [places[j].boxes[c] for j, c in enumerate(chosen) if j != i]
            best = int(np.argmin(alone[i] + page.covering(p, np.reshape(others, (-1, 4)))))
            if sweep == 0:
                chosen.append(best)
            else:
                chosen[i] = best
    return chosen

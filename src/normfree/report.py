"""The pictures of a run, and one HTML page that holds them all."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normfree.config import printable
from normfree.data.crop import Preprocessing
from normfree.data.sources import Source
from normfree.evaluate import Outputs
from normfree.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MATRIX = 1000  # classes of a confusion matrix, at most
RAW, AVERAGED, THIRD = "#888888", "#1f5fbf", "#d1682b"


@dataclass(frozen=True)
class Findings:
    """What a report is drawn from. `facts` are rows of the table at its head; `bad` is reason by file."""

    title: str
    facts: list[tuple[str, str]]
    settings: list[tuple[str, str, str]]  # name, value, reason
    metrics: list[dict[str, Any]]
    outputs: Outputs
    val: Source
    training: tuple[Tensor, Tensor]  # images (N, 3, S, S) uint8 or floating-point, and targets, as in a step
    preprocessing: Preprocessing
    bad: dict[str, str]


def write_report(folder: Path, page: Path, findings: Findings) -> None:
    """Draw every picture into the folder as PNG, and the page with all of them inside."""
    pictures: dict[str, tuple[Figure, str]] = {
        "curves": (curves(findings.metrics), "Loss, accuracy, learning rate and the share of clipped units."),
        "batch": (
            image_grid(*findings.training, findings.val.classes),
            "The first training images, as the network saw them.",
        ),
        "mistakes": (
            mistakes(findings.outputs, findings.val, findings.preprocessing),
            "The validation images that were most surely mistaken: true class, predicted class and its probability.",
        ),
    }
    if findings.outputs.labels.ndim == 1 and len(findings.val.classes) <= _MATRIX:
        matrix = confusion(findings.outputs, findings.val.classes)
        pictures["confusion"] = (matrix, "Validation images by true and predicted class.")
    by_layer = clipping([m for m in findings.metrics if m["kind"] == "eval"])
    if by_layer is not None:
        pictures["clipping"] = (by_layer, "The share of units that AGC clipped, by tensor, from stem to head.")
    shown = []
    for name, (figure, caption) in pictures.items():
        png = _png(figure)
        write_atomic(folder / f"{name}.png", png)
        shown.append((name, caption, png))
    write_atomic(page, _page(findings, shown).encode(errors="backslashreplace"))


def curves(metrics: Sequence[dict[str, Any]]) -> Figure:
    """Four small plots over epochs."""
    figure, axes = _figure(11, 6.2, 2, 2)
    train = [m for m in metrics if m["kind"] == "train"]
    evals = [m for m in metrics if m["kind"] == "eval"]
    for axis, key, title in ((axes[0], "loss", "loss (cross-entropy, nats)"), (axes[1], "top1", "top-1 accuracy, %")):
        factor = 100 if key == "top1" else 1
        epochs, values = _smooth([m["epoch"] for m in train], [factor * m[key] for m in train])
        axis.plot(
            epochs, values, _mark(epochs), color=THIRD, lw=1, alpha=0.7, label="training (augmented, smoothed labels)"
        )
        for kind, colour, label in (("raw", RAW, "validation, raw weights"), ("ema", AVERAGED, "validation, averaged")):
            axis.plot(
                [m["epoch"] for m in evals], [factor * m[kind][key] for m in evals], ".-", color=colour, label=label
            )
        axis.set_title(title)
    if evals:  # the interesting part of an accuracy curve is its end
        low = min(m[k]["top1"] for m in evals[len(evals) // 4 :] for k in ("raw", "ema"))
        axes[1].set_ylim(max(0.0, 100 * low - 5), 100.5)
    axes[0].legend(frameon=False)
    epochs = [m["epoch"] for m in train]
    axes[2].plot(epochs, [m["lr"] for m in train], _mark(epochs), color=AVERAGED, lw=1.2)
    axes[2].set_title("learning rate")
    axes[3].plot(epochs, [100 * m["clip_share"] for m in train], _mark(epochs), color=AVERAGED, lw=1)
    axes[3].set_title("units clipped by AGC, %")
    axes[3].set_ylim(bottom=0)
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.25)
    return figure


def clipping(evals: Sequence[dict[str, Any]]) -> Figure | None:
    """The share of clipped units of every tensor, down the network, between evaluations; None without AGC."""
    names = list(dict.fromkeys(name for m in evals for name in m.get("clipped", {})))
    if not names:
        return None
    shares = np.array([[100 * m.get("clipped", {}).get(name, 0.0) for m in evals] for name in names])
    side = min(16.0, 1.5 + 0.16 * len(names))  # inches
    figure, (axis,) = _figure(9, side, 1, 1)
    edges = [0.0, *(m["epoch"] for m in evals)]
    mesh = axis.pcolormesh(edges, np.arange(len(names) + 1), shares, cmap="viridis", vmin=0, vmax=100)
    figure.colorbar(mesh, label="units clipped, %")
    every = max(1, round(len(names) / 80))
    axis.set_yticks(np.arange(0, len(names), every) + 0.5, [short_name(n, 36) for n in names[::every]], fontsize=6)
    axis.invert_yaxis()
    axis.set_xlabel("epoch")
    return figure


def confusion(outputs: Outputs, classes: Sequence[str]) -> Figure:
    """Counts, true class down and predicted class across; shares of the true class as colour."""
    counts, k = _counts(outputs, len(classes)), len(classes)
    names = [short_name(name, 18) for name in classes]
    side, room = min(12.0, 3.0 + 0.35 * k), 0.07 * max(map(len, names))  # inches, of the matrix and of its labels
    figure, (axis,) = _figure(side + room + 0.5, side + room, 1, 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if k <= 100:
        points = 9 if k <= 40 else 5
        axis.set_xticks(range(k), names, rotation=90 if max(map(len, names)) > 3 else 0, fontsize=points)
        axis.set_yticks(range(k), names, fontsize=points)
    if k <= 25:
        for i, j in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[i, j] > 0.5 else "#333333"
            axis.text(j, i, str(counts[i, j]), ha="center", va="center", fontsize=8, color=colour)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    return figure


def most_confused(outputs: Outputs, classes: Sequence[str], most: int = 10) -> list[tuple[str, str, str]]:
    """(true class, predicted class, "n of m") of the pairs that were mistaken most often; none of several labels."""
    if outputs.labels.ndim == 2:
        return []
    true, predicted = outputs.labels.numpy(), outputs.logits.argmax(1).numpy()
    totals, wrong = np.bincount(true, minlength=len(classes)), true != predicted
    pairs, counts = np.unique(np.stack([true[wrong], predicted[wrong]], 1), axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    return [
        (classes[i], classes[j], f"{n} of {totals[i]}") for (i, j), n in zip(pairs[order], counts[order], strict=True)
    ]


def _counts(outputs: Outputs, classes: int) -> NDArray[np.int64]:
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (outputs.labels.numpy(), outputs.logits.argmax(1).numpy()), 1)
    return counts


def short_name(name: str, most: int) -> str:
    """A long name without its middle, since names often differ at their ends; what is no text is escaped."""
    name = printable(name)
    return name if len(name) <= most else f"{name[: most // 2]}…{name[len(name) + 1 + most // 2 - most :]}"


def image_grid(images: Tensor, targets: Tensor, classes: Sequence[str]) -> Figure:
    """Training images after augmentation, 8 in a row, with their classes or the shares of them."""
    pixels = images.float().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return _grid(pixels, [_target(t, classes) for t in targets.cpu()], columns=8)


def _target(target: Tensor, classes: Sequence[str]) -> str:
    """The class of a label, or the two greatest shares of a mixed one."""
    if target.ndim == 0:
        return short_name(classes[int(target)], 16)
    share, place = target.sort(descending=True, stable=True)
    parts = [(s, classes[i]) for s, i in zip(share.tolist()[:2], place.tolist()[:2], strict=True) if s >= 0.005]
    return "\n".join(short_name(name, 16) + (f" {100 * s:.0f} %" if s < 0.995 else "") for s, name in parts)


def mistakes(outputs: Outputs, val: Source, preprocessing: Preprocessing) -> Figure:
    """Up to 24 wrong predictions with the highest probability."""
    probability, predicted = outputs.logits.double().softmax(1).max(1)
    labels = outputs.labels
    right = labels == predicted if labels.ndim == 1 else labels.gather(1, predicted[:, None])[:, 0] > 0
    wrong = torch.nonzero(~right).flatten()
    worst = wrong[probability[wrong].argsort(descending=True, stable=True)][:24]
    if len(worst) == 0:
        figure, (axis,) = _figure(6, 1.2, 1, 1)
        axis.text(0.5, 0.5, "no mistakes on the validation images", ha="center", va="center", fontsize=12)
        axis.axis("off")
        return figure
    images = [preprocessing.pixels(val.read(i)) for i in outputs.indices[worst].tolist()]
    names = [short_name(name, 14) for name in val.classes]
    several = [[int(t)] if t.ndim == 0 else torch.nonzero(t).flatten().tolist()[:2] for t in labels[worst]]
    true = [", ".join(names[c] for c in classes) for classes in several]
    titles = [f"{t}\n→ {names[predicted[i]]} {100 * probability[i]:.0f} %" for t, i in zip(true, worst, strict=True)]
    return _grid(np.stack(images), titles, columns=6)


def _grid(images: NDArray[np.uint8], titles: Sequence[str], columns: int) -> Figure:
    rows = -(-len(images) // columns)
    figure, axes = _figure(1.5 * columns, 1.9 * rows, rows, columns)
    for axis in axes:
        axis.axis("off")
    for axis, image, title in zip(axes, images, titles, strict=False):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(title, fontsize=8, pad=3)
    return figure


def _figure(width: float, height: float, rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure  # noqa: PLC0415 (imported where something is drawn)

    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    return figure, list(np.atleast_1d(figure.subplots(rows, columns)).flat)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _mark(points: Sequence[float]) -> str:
    return ".-" if len(points) < 5 else "-"  # a line of one point is invisible


def _smooth(x: Sequence[float], y: Sequence[float], points: int = 150) -> tuple[list[float], list[float]]:
    """Means of neighbours, so that a long curve has about as many points as pixels."""
    width = max(1, len(x) // points)
    parts = range(0, len(x), width)
    return [float(np.mean(x[i : i + width])) for i in parts], [float(np.mean(y[i : i + width])) for i in parts]


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1000px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.1em; margin-top: 2em } img { max-width: 100%; height: auto }
table { border-collapse: collapse } td { padding: .15em 1.2em .15em 0; vertical-align: top }
td:first-child, figcaption, .why { color: #666 } figure { margin: 2em 0 } code { font-size: 13px }
"""


def _page(findings: Findings, pictures: list[tuple[str, str, bytes]]) -> str:
    e = html.escape
    facts = "".join(f"<tr><td>{e(k)}</td><td>{e(v)}</td></tr>" for k, v in findings.facts)
    settings = "".join(
        f"<tr><td><code>{e(n)}</code></td><td><code>{e(v)}</code></td><td class=why>{e(why)}</td></tr>"
        for n, v, why in findings.settings
    )
    figures = "".join(
        f'<figure><img alt="{e(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f"<figcaption>{e(caption)}</figcaption></figure>"
        for name, caption, png in pictures
    )
    pairs = "".join(
        f"<tr><td>{e(a)}</td><td>{e(b)}</td><td>{e(n)}</td></tr>"
        for a, b, n in most_confused(findings.outputs, findings.val.classes)
    )
    confused = f"<h2>Most often mistaken</h2><table>{pairs}</table>" if pairs else ""
    bad = "".join(f"<tr><td>{e(name)}</td><td>{e(reason)}</td></tr>" for name, reason in findings.bad.items())
    skipped = f"<h2>{len(findings.bad)} files that were skipped</h2><table>{bad}</table>" if findings.bad else ""
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{e(findings.title)}</title><style>{_STYLE}</style>"
        f"<h1>{e(findings.title)}</h1><table>{facts}</table>{figures}{confused}{skipped}"
        f"<h2>Settings</h2><table>{settings}</table></html>\n"
    )

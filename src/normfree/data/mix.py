"""MixUp (Zhang et al. 2017) and CutMix (Yun et al. 2019) of a batch on its device, half of the outputs each (A.1).

N outputs from M images. Draws are made on the host, from (seed, attempt, step, slot) alone: a batch may be cut into
micro-batches, or spread over ranks, and every output stays the same to the last bit, on every device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from normfree.random import BETA_WORDS, Purpose, beta, bits

_WORDS = max(BETA_WORDS, 3)  # a slot is MixUp (ratio) or CutMix (area, x, y): the two share their words


class Plan(NamedTuple):
    """What is drawn for N outputs.

    cut (N,) bool: CutMix, else MixUp; ratio (N,) float32: the share of the first image of the pair, and 1 - ratio that
    of the second; box (N, 4) int64: left, top, right, bottom of the pixels of the first image where `cut`, else zeros.
    """

    cut: NDArray[np.bool_]
    ratio: NDArray[np.float32]
    box: NDArray[np.int64]


@dataclass(frozen=True)
class MixUpCutMix:
    """Mixes pairs of images and their labels; MixUp on the even slots and CutMix on the odd ones.

    alpha: MixUp's ratio is of Beta(alpha, alpha), one for each output.
    mixup, cutmix: with one of them only, it has all slots.
    pairs: "disjoint", as the authors do: N outputs from 2N images, output j from images 2j and 2j + 1;
        "batch": N from N, at half the reading: output j from image j and its neighbour, where 2k and 2k + 1 are
        neighbours. A last one without a neighbour has its predecessor, and a batch of 1 itself. Only the last
        micro-batch of a step may be odd, since the two of a pair must be in one.

    Raises:
        ValueError: alpha is not positive, pairs is unknown, or neither method is on.
    """

    alpha: float = 0.2
    mixup: bool = True
    cutmix: bool = True
    pairs: Literal["disjoint", "batch"] = "disjoint"

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha < float("inf"):
            raise ValueError(f"alpha of MixUp must be positive and finite, not {self.alpha}")
        if self.pairs not in ("disjoint", "batch"):
            raise ValueError(f'pairs must be "disjoint" or "batch", not {self.pairs!r}')
        if not (self.mixup or self.cutmix):
            raise ValueError("neither MixUp nor CutMix is on; leave the mixing out instead")

    def plan(self, seed: int, step: int, slots: ArrayLike, size: int | tuple[int, int], attempt: int = 0) -> Plan:
        """The draws for some slots of a step's batch, each a function of its own number only.

        Args:
            seed, step, attempt: as in `normfree.random`.
            slots: numbers of the outputs in the whole batch of the step: range(N), or those of a rank or micro-batch.
            size: of the images in pixels, (height, width) or the side of squares.

        Raises:
            ValueError: pairs is "batch" and the slots would part two neighbours.
        """
        slots = np.asarray(slots, np.int64)
        if self.pairs == "batch" and ((slots[:1] % 2).any() or (np.diff(slots) != 1).any()):
            raise ValueError(
                'with pairs="batch" a part of the batch must be slots in a row that begin with an even one'
            )
        height, width = (size, size) if isinstance(size, int) else size
        words = bits(seed, Purpose.MIX, step, slots, n=_WORDS, attempt=attempt)
        cut = slots % 2 == 1 if self.mixup and self.cutmix else np.full(len(slots), self.cutmix)
        box = np.where(cut[:, None], cut_box(*_cut_draws(words, height, width), height, width), 0)
        area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) / (height * width)
        ratio = np.where(cut, area, beta(words[:, :BETA_WORDS], self.alpha)[:, 0])
        return Plan(cut, ratio.astype(np.float32), box)

    def __call__(
        self, images: Tensor, labels: Tensor, classes: int, plan: Plan | None = None, *, seed: int = 0, step: int = 0
    ) -> tuple[Tensor, Tensor]:
        """(mixed images (N, C, H, W), targets (N, classes) float32) of M images and labels, M = 2N or N.

        MixUp is ratio first + (1 - ratio) second in float32, each operation rounded by itself, and for uint8 images the
        sum rounded to the nearest level, ties to the even one. Floating-point images stay so (float64 is computed as
        such) and are not clipped. Channels stay last in memory if they were. Nothing waits for the device.

        Args:
            images: (M, C, H, W), uint8 or floating-point.
            labels: (M,) int64, or (M, classes) floating-point, whose rows are mixed.
            classes: columns of the targets.
            plan: for these N outputs; None stands for a whole batch, drawn by seed and step.

        Raises:
            ValueError: shapes or types do not fit one another.
        """
        _check(images, labels, classes)
        n = self._outputs(len(images))
        if plan is None:
            plan = self.plan(seed, step, range(n), (images.shape[-2], images.shape[-1]))
        if len(plan.ratio) != n:
            raise ValueError(f"{len(images)} images make {n} outputs, and the plan is for {len(plan.ratio)}")
        pairs = self._pairs(n)
        mix = _mix_each if images.device.type == "cpu" else _mix_together
        return mix(images, pairs, plan), _targets(labels, classes, pairs, plan.ratio)

    def _outputs(self, images: int) -> int:
        if self.pairs == "batch":
            return images
        if images % 2:
            raise ValueError(f"{images} images cannot be mixed two by two; give an even number")
        return images // 2

    def _pairs(self, n: int) -> NDArray[np.int64]:
        """(2, N): the first and the second image of each output."""
        slots = np.arange(n)
        if self.pairs == "disjoint":
            return np.stack([2 * slots, 2 * slots + 1])
        neighbours = slots ^ 1
        return np.stack([slots, np.where(neighbours < n, neighbours, np.maximum(slots - 1, 0))])


def cut_box(
    share: NDArray[np.float32], x: NDArray[np.int64], y: NDArray[np.int64], height: int, width: int
) -> NDArray[np.int64]:
    """CutMix's boxes, left, top, right and bottom (N, 4), in pixels, rounded and clipped as the authors' code does.

    Each covers 1 - share of the image, before half its sides are rounded down and it is clipped at the border.

    Args:
        share: (N,), uniform in [0, 1).
        x, y: (N,), the centres, uniform in 0 .. width - 1 and 0 .. height - 1.
        height, width: of the image, in pixels.
    """
    side = np.sqrt(np.float32(1) - share)
    half_width = (side * np.float32(width)).astype(np.int64) // 2
    half_height = (side * np.float32(height)).astype(np.int64) // 2
    left, right = ((x + d).clip(0, width) for d in (-half_width, half_width))
    top, bottom = ((y + d).clip(0, height) for d in (-half_height, half_height))
    return np.stack([left, top, right, bottom], -1)


def _cut_draws(
    words: NDArray[np.uint64], height: int, width: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """The arguments of `cut_box`, from three words each."""
    share = (words[:, 0] >> np.uint64(8)).astype(np.float32) * np.float32(2**-24)
    x, y = ((words[:, i] * np.uint64(side) >> np.uint64(32)).astype(np.int64) for i, side in ((1, width), (2, height)))
    return share, x, y


def _check(images: Tensor, labels: Tensor, classes: int) -> None:
    if images.ndim != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise ValueError(f"images must be (M, C, H, W), uint8 or floating-point, not {_described(images)}")
    if len(labels) != len(images):
        raise ValueError(f"{len(images)} images have {len(labels)} labels")
    numbers = labels.ndim == 1 and labels.dtype == torch.int64
    rows = labels.ndim == 2 and labels.shape[1] == classes and labels.is_floating_point()
    if not (numbers or rows):
        raise ValueError(f"labels must be (M,) int64 or (M, {classes}) floating-point, not {_described(labels)}")


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _mix_each(images: Tensor, pairs: NDArray[np.int64], plan: Plan) -> Tensor:
    """One output after the other, each within the processor's cache; a box is copied as a slice."""
    out = torch.empty_like(images[: len(plan.ratio)])
    rest = np.float32(1) - plan.ratio
    draws = zip(plan.cut.tolist(), plan.ratio.tolist(), rest.tolist(), plan.box.tolist(), strict=True)
    for mixed, (i, j), (cut, ratio, other, box) in zip(out, pairs.T.tolist(), draws, strict=True):
        if cut:
            left, top, right, bottom = box
            mixed.copy_(images[j])
            mixed[:, top:bottom, left:right] = images[i, :, top:bottom, left:right]
        else:
            mixed.copy_(_blend(images[i], images[j], ratio, other))
    return out


def _mix_together(images: Tensor, pairs: NDArray[np.int64], plan: Plan) -> Tensor:
    """All MixUp outputs at once, and all of CutMix, for devices that are slow to start and then quick."""
    out = torch.empty_like(images[: len(plan.ratio)])
    for cut in (False, True):
        slots = np.flatnonzero(plan.cut == cut)
        if not len(slots):
            continue
        where, i, j = _send(np.stack([slots, *pairs[:, slots]]), images.device)
        first, second = images[i], images[j]
        if cut:
            inside = _inside(_send(plan.box[slots], images.device), images.shape[-2], images.shape[-1])
            mixed = torch.where(inside, first, second)
        else:
            ratio = _send(plan.ratio[slots], images.device)[:, None, None, None]
            mixed = _blend(first, second, ratio, 1 - ratio).to(images.dtype)
        out.index_copy_(0, where, mixed)
    return out


def _blend(first: Tensor, second: Tensor, ratio: Tensor | float, rest: Tensor | float) -> Tensor:
    """The mean with these weights, rounded for uint8 but still a float. No fused operations: all devices agree."""
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    mixed = first.to(wide, copy=True).mul_(ratio).add_(second.to(wide, copy=True).mul_(rest))
    return mixed if first.is_floating_point() else mixed.round_()


def _inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """(N, 4) -> (N, 1, H, W) bool."""
    left, top, right, bottom = boxes[:, :, None].unbind(1)  # (N, 1) each
    x, y = torch.arange(width, device=boxes.device), torch.arange(height, device=boxes.device)
    columns, rows = (left <= x) & (x < right), (top <= y) & (y < bottom)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _targets(labels: Tensor, classes: int, pairs: NDArray[np.int64], ratio: NDArray[np.float32]) -> Tensor:
    """The labels' shares, (N, classes) float32; the two of an image with itself or of its class add up to 1."""
    i, j = _send(pairs, labels.device)
    first, second, share = labels[i], labels[j], _send(ratio, labels.device)[:, None]
    if labels.ndim == 2:
        return first.float() * share + second.float() * (1 - share)
    first, second = first[:, None], second[:, None]
    targets = torch.zeros(len(ratio), classes, device=labels.device)
    targets.scatter_(1, second, 1 - share)
    return targets.scatter_(1, first, torch.where(first == second, 1.0, share))


def _send(array: NDArray[Any], device: torch.device) -> Tensor:
    """To the device without waiting for it, which takes pinned memory."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

"""RandAugment (Cubuk et al. 2020) of a batch on its device, with the operations of the NFNet authors' code (A.1).

Every layer changes every image by one of 16 operations. The draws are made on the host, from (seed, attempt, step,
slot, layer) alone: a batch may be cut into micro-batches, or spread over ranks, and every image stays the same to the
last bit, on every device. Images are uint8 (N, 3, H, W); channels last in memory are quickest, and stay so.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from normfree.data import image_ops
from normfree.random import Purpose, uniform

_CACHED = 2**17  # bytes of images that are worked on together on a CPU: they stay in its cache through all layers


class Reach(NamedTuple):
    """What level 10 is where AutoAugment and RandAugment differ: pixels of translation, half the side of Cutout."""

    translate: float = 100.0
    cutout: float = 40.0


_REACH = Reach()


class Plan(NamedTuple):
    """What is drawn: for each layer and image, (layers, N) each.

    op, an index of OPERATIONS, or -1 for none; level; sign, of the geometric operations; center (layers, N, 2), of
    Cutout, y and x in pixels.
    """

    op: NDArray[np.int64]
    level: NDArray[np.float64]
    sign: NDArray[np.int64]
    center: NDArray[np.int64]


def _factor(level: float) -> float:
    """Of the four operations that blend: 1 at level 5, where nothing changes."""
    return (level / 10) * 1.8 + 0.1


# How each operation follows from its level; the level of the geometric ones carries the sign. Cutout: see _operate.
_APPLY: dict[str, Callable[[Tensor, float, Reach], Tensor]] = {
    "AutoContrast": lambda x, _level, _reach: image_ops.autocontrast(x),
    "Equalize": lambda x, _level, _reach: image_ops.equalize(x),
    "Invert": lambda x, _level, _reach: image_ops.invert(x),
    "Rotate": lambda x, level, _: image_ops.rotate(x, (level / 10) * 30.0),
    "Posterize": lambda x, level, _: image_ops.posterize(x, int((level / 10) * 4)),
    "Solarize": lambda x, level, _: image_ops.solarize(x, int((level / 10) * 256)),
    "Color": lambda x, level, _: image_ops.color(x, _factor(level)),
    "Contrast": lambda x, level, _: image_ops.contrast(x, _factor(level)),
    "Brightness": lambda x, level, _: image_ops.brightness(x, _factor(level)),
    "Sharpness": lambda x, level, _: image_ops.sharpness(x, _factor(level)),
    "ShearX": lambda x, level, _: image_ops.shear_x(x, (level / 10) * 0.3),
    "ShearY": lambda x, level, _: image_ops.shear_y(x, (level / 10) * 0.3),
    "TranslateX": lambda x, level, reach: image_ops.translate_x(x, (level / 10) * reach.translate),
    "TranslateY": lambda x, level, reach: image_ops.translate_y(x, (level / 10) * reach.translate),
    "Cutout": lambda x, _level, _reach: x,
    "SolarizeAdd": lambda x, level, _: image_ops.solarize_add(x, int((level / 10) * 110)),
}
OPERATIONS = tuple(_APPLY)
_SIGNED = frozenset({"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"})
_NO_LEVEL = frozenset({"AutoContrast", "Equalize", "Invert"})


def apply_op(
    name: str,
    images: Tensor,
    level: float | Sequence[float] | Tensor,
    sign: int | Sequence[int] | Tensor = 1,
    center: ArrayLike | None = None,
) -> Tensor:
    """One operation on every image: uint8 (N, 3, H, W) -> the same, equal to the authors' code on every pixel.

    Args:
        name: one of OPERATIONS.
        images: channels last or first in memory; the result likewise. They are not changed.
        level: as in the authors' code, where 10 is strong and not the end; a number, or one for each image.
        sign: +1 or -1, of rotations, shears and translations; a number, or one for each image.
        center: of Cutout: y and x in pixels, one pair or (N, 2); None is the middle.

    Raises:
        ValueError: the name is unknown, a level is negative or not finite, a sign is not 1 or -1, or the images are not
            uint8 (N, 3, H, W).
    """
    if name not in _APPLY:
        near = difflib.get_close_matches(name.lower(), [n.lower() for n in OPERATIONS], n=1, cutoff=0.4)
        hint = "".join(f"did you mean {n!r}? " for n in OPERATIONS if n.lower() in near)
        raise ValueError(f"unknown operation {name!r}; {hint}there are {', '.join(OPERATIONS)}")
    _check(images)
    n, _, height, width = images.shape
    levels = np.broadcast_to(np.asarray(_numbers(level), np.float64), (1, n))
    signs = np.broadcast_to(np.asarray(_numbers(sign), np.int64), (1, n))
    if not (np.isfinite(levels).all() and (levels >= 0).all()):
        raise ValueError(f"a level must be finite and at least 0, not {level}")
    if not (np.abs(signs) == 1).all():
        raise ValueError(f"a sign must be 1 or -1, not {sign}")
    middle = (height // 2, width // 2) if center is None else center
    centers = np.broadcast_to(np.asarray(middle, np.int64), (1, n, 2))
    return apply_plan(images, Plan(np.full((1, n), OPERATIONS.index(name)), levels, signs, centers))


@dataclass(frozen=True)
class RandAugment:
    """Layers of one operation each, drawn evenly from OPERATIONS; the one that is drawn is always carried out.

    layers: how many; the paper has 4.
    magnitude: the level of all; the paper has 5 for F0, 10 for F1 and F2, 15 beyond. It is not cut off at 10.

    Raises:
        ValueError: layers is negative, or magnitude negative or not finite.
    """

    layers: int = 4
    magnitude: float = 10

    def __post_init__(self) -> None:
        if self.layers < 0:
            raise ValueError(f"layers must be at least 0, not {self.layers}")
        if not 0.0 <= self.magnitude < math.inf:
            raise ValueError(f"magnitude must be finite and at least 0, not {self.magnitude}")

    def plan(self, seed: int, step: int, slots: ArrayLike, size: int | tuple[int, int], attempt: int = 0) -> Plan:
        """The draws for some slots of a step's batch, each a function of its own number only.

        Args:
            seed, step, attempt: as in `normfree.random`.
            slots: numbers of the images in the whole batch of the step: range(N), or those of a rank or micro-batch.
            size: of the images in pixels, (height, width) or the side of squares.
        """
        slots = np.asarray(slots, np.int64)
        layers = np.arange(self.layers)[:, None]
        draws = uniform(seed, Purpose.AUGMENT, step, slots, layers, n=4, attempt=attempt).astype(np.float64)
        op = (draws[..., 0] * len(OPERATIONS)).astype(np.int64)
        level = np.full(op.shape, float(self.magnitude))
        return Plan(op, level, sign_of(draws[..., 1]), center_of(draws[..., 2:], size))

    def __call__(self, images: Tensor, plan: Plan | None = None, *, seed: int = 0, step: int = 0) -> Tensor:
        """uint8 (N, 3, H, W) -> the same; without a plan the images are the whole batch of the step.

        Raises:
            ValueError: the images are not uint8 (N, 3, H, W), or the plan is for another number of them.
        """
        _check(images)
        if plan is None:
            plan = self.plan(seed, step, range(len(images)), (images.shape[2], images.shape[3]))
        return apply_plan(images, plan)


def sign_of(draws: NDArray[np.float64]) -> NDArray[np.int64]:
    """+1 or -1, for uniform draws."""
    return np.where(draws < 0.5, 1, -1)


def center_of(draws: NDArray[np.float64], size: int | tuple[int, int]) -> NDArray[np.int64]:
    """Pixels y and x, every one equally likely, for uniform draws (.., 2)."""
    return (draws * ((size, size) if isinstance(size, int) else size)).astype(np.int64)


def apply_plan(images: Tensor, plan: Plan, reach: Reach = _REACH) -> Tensor:
    """Carry out a plan; the images are not changed. Nothing waits for the device."""
    _check(images)
    if plan.op.shape[1] != len(images):
        raise ValueError(f"the plan is for {plan.op.shape[1]} images, not {len(images)}")
    x = images.permute(0, 2, 3, 1).contiguous()  # a view, where channels are last
    out = torch.empty_like(x)
    size = max(1, _CACHED // max(1, x[:1].numel())) if x.device.type == "cpu" else max(1, len(x))
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        own = Plan(plan.op[:, part], plan.level[:, part], plan.sign[:, part], plan.center[:, part])
        out[part] = _apply_layers(x[part], own, reach)
    result = out.permute(0, 3, 1, 2)
    return result.contiguous() if images.is_contiguous() else result


def _apply_layers(x: Tensor, plan: Plan, reach: Reach) -> Tensor:
    """(N, H, W, 3) -> the same; in each layer the images with the same operation go together."""
    layers = [_groups(*layer) for layer in zip(plan.op.tolist(), plan.level.tolist(), plan.sign.tolist(), strict=True)]
    members = [i for groups in layers for group in groups.values() for i in group]
    order, at = torch.tensor(members, dtype=torch.int64).to(x.device, non_blocking=True), 0
    x = x.clone() if len(x) > 1 else x  # parts of it are written to; one image is always replaced
    for groups, center in zip(layers, plan.center, strict=True):
        for (op, level), group in groups.items():
            if len(group) == len(x):
                x = _operate(x, OPERATIONS[op], level, center, reach)
            else:
                index = order[at : at + len(group)]
                some = _operate(x.index_select(0, index), OPERATIONS[op], level, center[group], reach)
                x.index_copy_(0, index, some)
            at += len(group)
    return x


def _groups(ops: list[int], levels: list[float], signs: list[int]) -> dict[tuple[int, float], list[int]]:
    """The images of each operation and signed level."""
    groups: dict[tuple[int, float], list[int]] = {}
    for i, (op, level, sign) in enumerate(zip(ops, levels, signs, strict=True)):
        if op >= 0:
            name = OPERATIONS[op]
            strength = 0.0 if name in _NO_LEVEL else level * sign if name in _SIGNED else level
            groups.setdefault((op, strength), []).append(i)
    return groups


def _operate(x: Tensor, name: str, level: float, center: NDArray[np.int64], reach: Reach) -> Tensor:
    if name == "Cutout":
        return image_ops.cutout(x, int((level / 10) * reach.cutout), center)
    return _APPLY[name](x, level, reach)


def _check(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be uint8 (N, 3, H, W), not {images.dtype} {tuple(images.shape)}")


def _numbers(value: float | Sequence[float] | Tensor) -> ArrayLike:
    return value.tolist() if isinstance(value, Tensor) else value

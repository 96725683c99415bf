"""AutoAugment (Cubuk et al. 2019) with the policy found for ImageNet, v0, as the NFNet authors' code has it.

One of 25 sub-policies is drawn for each image: two operations, each carried out with its own probability. The
operations are those of `normfree.data.randaugment`, save that level 10 translates by 250 pixels instead of 100.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from normfree.data.randaugment import OPERATIONS, Plan, Reach, apply_plan, center_of, sign_of
from normfree.random import Purpose, uniform

Choice = tuple[str, float, float]  # operation, probability, level

POLICY_V0: tuple[tuple[Choice, Choice], ...] = (
    (("Equalize", 0.8, 1), ("ShearY", 0.8, 4)),
    (("Color", 0.4, 9), ("Equalize", 0.6, 3)),
    (("Color", 0.4, 1), ("Rotate", 0.6, 8)),
    (("Solarize", 0.8, 3), ("Equalize", 0.4, 7)),
    (("Solarize", 0.4, 2), ("Solarize", 0.6, 2)),
    (("Color", 0.2, 0), ("Equalize", 0.8, 8)),
    (("Equalize", 0.4, 8), ("SolarizeAdd", 0.8, 3)),
    (("ShearX", 0.2, 9), ("Rotate", 0.6, 8)),
    (("Color", 0.6, 1), ("Equalize", 1.0, 2)),
    (("Invert", 0.4, 9), ("Rotate", 0.6, 0)),
    (("Equalize", 1.0, 9), ("ShearY", 0.6, 3)),
    (("Color", 0.4, 7), ("Equalize", 0.6, 0)),
    (("Posterize", 0.4, 6), ("AutoContrast", 0.4, 7)),
    (("Solarize", 0.6, 8), ("Color", 0.6, 9)),
    (("Solarize", 0.2, 4), ("Rotate", 0.8, 9)),
    (("Rotate", 1.0, 7), ("TranslateY", 0.8, 9)),
    (("ShearX", 0.0, 0), ("Solarize", 0.8, 4)),
    (("ShearY", 0.8, 0), ("Color", 0.6, 4)),
    (("Color", 1.0, 0), ("Rotate", 0.6, 2)),
    (("Equalize", 0.8, 4), ("Equalize", 0.0, 8)),
    (("Equalize", 1.0, 4), ("AutoContrast", 0.6, 2)),
    (("ShearY", 0.4, 7), ("SolarizeAdd", 0.6, 7)),
    (("Posterize", 0.8, 2), ("Solarize", 0.6, 10)),
    (("Solarize", 0.6, 8), ("Equalize", 0.6, 1)),
    (("Color", 0.8, 6), ("Rotate", 0.4, 5)),
)
REACH = Reach(translate=250.0, cutout=100.0)
_LAYER = 1 << 16  # first coordinate of the draws: far from RandAugment's layers, so that both can be used at once


@dataclass(frozen=True)
class AutoAugment:
    """The policy v0; called as `RandAugment` is."""

    def plan(self, seed: int, step: int, slots: ArrayLike, size: int | tuple[int, int], attempt: int = 0) -> Plan:
        """The draws for some slots of a step's batch; arguments as of `RandAugment.plan`."""
        slots = np.asarray(slots, np.int64)
        layers = _LAYER + np.arange(3)[:, None]
        draws = uniform(seed, Purpose.AUGMENT, step, slots, layers, n=4, attempt=attempt).astype(np.float64)
        which = (draws[0, :, 0] * len(POLICY_V0)).astype(np.int64)
        op, probability, level = (_column(i)[:, which] for i in range(3))
        fires = draws[1:, :, 0] < probability
        chosen = np.where(fires, op, -1).astype(np.int64)
        return Plan(chosen, level, sign_of(draws[1:, :, 1]), center_of(draws[1:, :, 2:], size))

    def __call__(self, images: Tensor, plan: Plan | None = None, *, seed: int = 0, step: int = 0) -> Tensor:
        """uint8 (N, 3, H, W) -> the same; without a plan the images are the whole batch of the step."""
        if plan is None:
            plan = self.plan(seed, step, range(len(images)), (images.shape[-2], images.shape[-1]))
        return apply_plan(images, plan, REACH)


def _column(i: int) -> NDArray[np.float64]:
    """Operations, probabilities or levels of the policy: (2, sub-policies)."""
    table = [[(OPERATIONS.index(name), probability, level) for name, probability, level in pair] for pair in POLICY_V0]
    return np.array(table, np.float64)[:, :, i].T

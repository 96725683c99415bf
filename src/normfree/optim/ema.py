"""Exponential moving average of the weights, with the warm-up of its decay (A.1)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from normfree.optim.shards import is_sharded, local_parts


class EMA:
    """A second copy of the model whose weights follow the first: e += (1 - d) (w - e), d = min(decay, (1+t)/(10+t)).

    It starts from the initial weights and t counts updates from 0, so the first decay is 0.1. The warm-up binds until
    t is about 9 / (1 - decay): with the paper's 0.99999 throughout its 112,602 steps. The copy is a module of its own,
    `ema.module`, in evaluation mode: weights are never swapped. Buffers of floats, such as the running statistics of
    batch norm, are averaged too, as in the authors' code; others are copied.

    Before a model is sharded, make the average; then shard `ema.module` in the same way. Each rank averages its rows.

    Raises:
        ValueError: decay is not in [0, 1], or the model is sharded already.
    """

    def __init__(self, model: nn.Module, decay: float = 0.99999) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must be in [0, 1], not {decay}")
        if any(is_sharded(p) for p in model.parameters()):
            raise ValueError("make the average of the whole model, then shard the model and ema.module in the same way")
        self.decay, self.updates = decay, 0
        self.module = copy.deepcopy(model).eval().requires_grad_(False)

    def decay_at(self, update: int) -> float:
        """The decay of an update, counted from 0."""
        return min(self.decay, (1 + update) / (10 + update))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the weights of the model, once a step, after the optimizer."""
        averages = local_parts(list(self.module.parameters()))
        weights = local_parts(list(model.parameters()))
        torch._foreach_lerp_(averages, weights, 1.0 - self.decay_at(self.updates))
        for average, value in zip(self.module.buffers(), model.buffers(), strict=True):
            if average.is_floating_point():
                average.lerp_(value, 1.0 - self.decay_at(self.updates))
            else:
                average.copy_(value)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights and the count of updates."""
        return {"updates": self.updates, "module": self.module.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.module.load_state_dict(state["module"])
        self.updates = int(state["updates"])

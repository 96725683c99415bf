"""Adaptive gradient clipping and its optimizer, parameter groups, averaging and the schedule: usable in any loop."""

from normfree.optim.agc import clip_grad_agc_
from normfree.optim.ema import EMA
from normfree.optim.groups import param_groups
from normfree.optim.lars import LARS
from normfree.optim.sam import SAM
from normfree.optim.schedule import WarmupCosine
from normfree.optim.sgd import AGCSGD

__all__ = ["AGCSGD", "EMA", "LARS", "SAM", "WarmupCosine", "clip_grad_agc_", "param_groups"]

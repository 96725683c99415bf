"""What the parts share: where they run and how large, and checks with a limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from normfree.bench.timing import conditions

T = TypeVar("T")


@dataclass(frozen=True)
class Setup:
    """Where the parts run: the device, and whether it is a trial of the script with tiny networks."""

    device: str
    dry: bool

    def pick(self, real: T, dry: T) -> T:
        """One of the two."""
        return dry if self.dry else real

    @property
    def where(self) -> torch.device:
        return torch.device(self.device)

    @property
    def on_cuda(self) -> bool:
        return self.where.type == "cuda"

    def device_name(self) -> str:
        return torch.cuda.get_device_name() if self.on_cuda else "dry, on a CPU"

    def conditions(self) -> dict[str, Any]:
        """As every result of ours has them; a device that has failed is not asked again."""
        try:
            return conditions(self.where)
        except (RuntimeError, OSError) as e:
            return {"failure": str(e).splitlines()[0]}


class Part(NamedTuple):
    """A part: what runs it, about how many seconds it takes on a fast device, and what it is, in words."""

    run: Callable[[Setup], dict[str, Any]]
    seconds: int
    what: str


@dataclass
class Checks:
    """Values beside their limits."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def at_most(self, name: str, value: float, limit: float) -> None:
        """A number that is not a number does not hold."""
        shown = value if math.isfinite(value) else str(value)
        self.rows.append({"check": name, "value": shown, "limit": limit, "holds": value <= limit})

    def holds(self, name: str, found: bool, note: Any = None) -> None:
        self.rows.append({"check": name, "holds": bool(found)} | ({"note": note} if note else {}))

    def result(self, **more: Any) -> dict[str, Any]:
        return {"checks": self.rows, **more}


def distance(found: Tensor, expected: Tensor) -> float:
    """Of two tensors, relative to the norm of the second; 0 if both are zeros."""
    a, b = found.detach().double().cpu(), expected.detach().double().cpu()
    off, size = float((a - b).norm()), float(b.norm())
    return off / size if size > 0 else (0.0 if off == 0 else math.inf)


@torch.no_grad()
def farthest(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], floor: float = 0.0) -> tuple[float, str]:
    """The largest distance between tensors of the same name, and the name.

    floor: norms below that share of the largest of all count as that share: they are sums of what cancels out.
    """
    if found.keys() != expected.keys():
        return math.inf, f"names differ: {sorted(found.keys() ^ expected.keys())[:3]}"
    least = floor * max((float(t.double().norm()) for t in expected.values()), default=0.0)
    worst = (0.0, "")
    for name, tensor in expected.items():
        off = distance(found[name], tensor)
        size = float(tensor.double().norm())
        if size < least:
            off = off * size / least if size > 0 else float(found[name].double().norm()) / least
        worst = max(worst, (math.inf if math.isnan(off) else off, name))
    return worst


def without_tf32() -> None:
    """float32 is float32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def timm_or_none() -> Any:
    """The package, where it imports."""
    from normfree.bench.steps import library
    from normfree.config import UserError

    try:
        return library()
    except UserError:
        return None

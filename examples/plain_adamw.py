"""AGC, the average of the weights and the schedule around another optimizer, in a loop and with a network of one's own.

Nothing here is a network of normfree's: `Small` stands for any module. Its classifier is found by the name "head" (or
fc, or classifier) and its weight is not clipped. Adam's step hardly depends on the scale of the gradients, so AGC does
less beside it than beside SGD: it keeps a few large gradients from entering the moments.

Needs normfree alone: python examples/plain_adamw.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfree

STEPS, BATCH, CLASSES = 60, 32, 10


class Small(nn.Module):
    """A plain network: (N, 3, H, W) -> (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.body = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.head = nn.Linear(32 * 16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        maps = F.gelu(self.body(F.gelu(self.stem(x))))
        logits: Tensor = self.head(F.adaptive_avg_pool2d(maps, 4).flatten(1))
        return logits


def main() -> None:
    """Sixty steps on noisy copies of ten patterns."""
    torch.manual_seed(0)
    patterns = torch.randn(CLASSES, 3, 32, 32)
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    ema = normfree.EMA(model)
    schedule = normfree.WarmupCosine(peak=3e-3, total_steps=STEPS, warmup_steps=6)
    losses, shares = [], []
    for step in range(STEPS):
        labels = torch.randint(CLASSES, (BATCH,))
        images = patterns[labels] + torch.randn(BATCH, 3, 32, 32)
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        shares.append(normfree.clip_grad_agc_(model, clipping=0.1))  # between backward and step
        optimizer.step()
        ema.update(model)
        losses.append(loss.detach())
    right = ema.module(patterns).argmax(1).eq(torch.arange(CLASSES)).float().mean()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {torch.stack(shares).mean():.0%} of the units clipped")
    print(f"the averaged network names {right:.0%} of the patterns")


if __name__ == "__main__":
    main()

"""A network and the optimizer of normfree with timm's loss, schedule and average; and the optimizer in timm's train.py.

For the latter, a file beside train.py puts `create_optimizer` in the place of timm's function:

    import timm_training
    import train

    if __name__ == "__main__":
        train.create_optimizer_v2 = timm_training.create_optimizer
        train.main()

It takes the flags of train.py, --opt agcsgd --opt-kwargs clipping=0.1 among them. The optimizer clips: no --clip-grad.

Needs timm: pip install timm; python examples/timm_training.py
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import OptimInfo, OptimizerRegistry
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn

import normfree

EPOCHS, UPDATES, BATCH, CLASSES = 2, 20, 32, 10
REGISTRY = OptimizerRegistry()
REGISTRY.register(OptimInfo("agcsgd", normfree.optim.AGCSGD, has_momentum=True))


def create_optimizer(
    model: nn.Module, opt: str = "agcsgd", weight_decay: float = 2e-5, clipping: float = 0.01, **options: Any
) -> torch.optim.Optimizer:
    """AGCSGD over the paper's groups, of any network: of timm's too, whose classifier is found by its name."""
    groups = partial(normfree.param_groups, weight_decay=weight_decay, clipping=clipping)
    return REGISTRY.create_optimizer(model, opt, param_group_fn=groups, clipping=clipping, **options)


def main() -> None:
    """Forty updates of a small NFNet on noisy copies of ten patterns."""
    torch.manual_seed(0)
    patterns = torch.randn(CLASSES, 3, 32, 32)
    model = normfree.create_model("nfnet_tiny", num_classes=CLASSES, skip_init=1.0)
    optimizer = create_optimizer(model, lr=0.1, clipping=0.1)
    scheduler, epochs = create_scheduler_v2(
        optimizer, num_epochs=EPOCHS, warmup_epochs=0.2, warmup_lr=0.0, step_on_epochs=False, updates_per_epoch=UPDATES
    )
    average = ModelEmaV3(model, decay=0.9999, use_warmup=True)
    criterion = LabelSmoothingCrossEntropy(smoothing=0.1)
    losses = []
    for update in range(1, epochs * UPDATES + 1):
        labels = torch.randint(CLASSES, (BATCH,))
        images = patterns[labels] + 0.5 * torch.randn(BATCH, 3, 32, 32)
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        average.update(model, step=update)
        scheduler.step_update(update)
        losses.append(loss.detach())
    with torch.no_grad():
        right = average.module(patterns).argmax(1).eq(torch.arange(CLASSES)).float().mean()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, timm's average names {right:.0%} of the patterns")


if __name__ == "__main__":
    main()

"""The paper's optimizer, or AGC before another one, in a LightningModule.

`Classifier` returns AGCSGD, which clips inside its step: leave the Trainer's gradient_clip_val alone. `WithAdamW` keeps
another optimizer and clips in Lightning's hook for that, which runs between backward and step, after the gradients of
float16 are unscaled.

Needs Lightning: pip install lightning; python examples/lightning_module.py
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import normfree

CLASSES = 10


class Classifier(lightning.LightningModule):
    """A small NFNet with the paper's groups, optimizer and schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.model = normfree.create_model("nfnet_tiny", num_classes=CLASSES, skip_init=1.0)
        self.losses: list[Tensor] = []

    def training_step(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        groups = normfree.param_groups(self.model, weight_decay=2e-5, clipping=0.1)
        return self.scheduled(normfree.optim.AGCSGD(groups, lr=0.1, momentum=0.9))

    def scheduled(self, optimizer: torch.optim.Optimizer) -> Any:
        """With a warm-up over a tenth of the run. The schedule multiplies the optimizer's own rate: it peaks at 1."""
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = normfree.WarmupCosine(peak=1.0, total_steps=steps, warmup_steps=0.1 * steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}  # not by epoch


class WithAdamW(Classifier):
    """The same network and schedule with AdamW, and AGC before its step."""

    def configure_optimizers(self) -> Any:
        groups = normfree.param_groups(self.model, weight_decay=0.05)  # gains and biases are not decayed
        return self.scheduled(torch.optim.AdamW(groups, lr=3e-3))

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        normfree.clip_grad_agc_(self.model, clipping=0.1)


def main() -> None:
    """Thirty steps of each on noisy copies of ten patterns."""
    torch.manual_seed(0)
    labels = torch.randint(CLASSES, (480,))
    images = torch.randn(CLASSES, 3, 32, 32)[labels] + 0.5 * torch.randn(480, 3, 32, 32)
    for module in (Classifier(), WithAdamW()):
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", logger=False, **quiet)
        trainer.fit(module, DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True))
        print(f"{type(module).__name__}: loss {module.losses[0]:.3f} -> {module.losses[-1]:.3f}")


if __name__ == "__main__":
    main()

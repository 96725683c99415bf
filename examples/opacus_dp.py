"""Differentially private training with Opacus, whose rule that no example may see another forbids batch norm.

Networks without normalization need no layer replaced. Opacus clips the gradient of each example and adds noise; AGC has
no part in that. Of its ways to the gradients of examples "hooks", its default, and "functorch" serve; "ew" does not.

Needs Opacus: pip install opacus; python examples/opacus_dp.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from opacus.validators import ModuleValidator
from torch.utils.data import DataLoader, TensorDataset

import normfree

CLASSES, EXAMPLES = 10, 512


def main() -> None:
    """Twenty-four private steps of a small NFNet on noisy copies of ten patterns."""
    torch.manual_seed(0)
    labels = torch.randint(CLASSES, (EXAMPLES,))
    images = torch.randn(CLASSES, 3, 32, 32)[labels] + 0.5 * torch.randn(EXAMPLES, 3, 32, 32)
    model = normfree.create_model("nfnet_tiny", num_classes=CLASSES, skip_init=1.0)
    assert not ModuleValidator.validate(model, strict=False)
    engine = PrivacyEngine()
    private, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.2),
        data_loader=DataLoader(TensorDataset(images, labels), batch_size=64),
        noise_multiplier=0.6,
        max_grad_norm=1.0,
        grad_sample_mode="hooks",
    )
    losses = []
    for _ in range(3):
        for x, y in loader:  # of random size: each example is drawn for itself
            optimizer.zero_grad()
            loss = F.cross_entropy(private(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, private to epsilon {engine.get_epsilon(1e-3):.1f} at delta 0.001")


if __name__ == "__main__":
    main()

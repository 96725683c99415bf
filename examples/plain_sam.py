"""The paper's optimizer and sharpness-aware minimisation in a loop of one's own, with gradient accumulation.

The ascent looks at every fifth image only, so that a step costs 1.2 of a plain one. The batch goes through in two
parts, each of which ascends along its own gradient, as each device did in the paper; their gradients at those points
add up to the one that the optimizer clips and steps along.

Needs normfree alone: python examples/plain_sam.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

import normfree

STEPS, BATCH, PARTS, CLASSES = 30, 40, 2, 10


def main() -> None:
    """Thirty steps of a small NFNet on noisy copies of ten patterns."""
    torch.manual_seed(0)
    patterns = torch.randn(CLASSES, 3, 32, 32)
    # from the paper's skip_init of 0 the residual branches need hundreds of steps to wake
    model = normfree.create_model("nfnet_tiny", num_classes=CLASSES, skip_init=1.0)
    groups = normfree.param_groups(model, weight_decay=2e-5, clipping=0.1)
    optimizer = normfree.optim.AGCSGD(groups, lr=0.0, momentum=0.9)
    sam = normfree.SAM(model.parameters(), rho=0.05)
    schedule = normfree.WarmupCosine(peak=0.1, total_steps=STEPS, warmup_steps=3)
    losses = []
    for step in range(STEPS):
        labels = torch.randint(CLASSES, (BATCH,))
        images = patterns[labels] + 0.5 * torch.randn(BATCH, 3, 32, 32)
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        optimizer.zero_grad()
        total = torch.zeros(())
        for x, y in zip(images.chunk(PARTS), labels.chunk(PARTS), strict=True):
            with sam.ascent():  # these gradients only move the weights, and are gone behind the block
                F.cross_entropy(model(x[::5]), y[::5]).backward()
            with sam.descent():  # these add up over the parts; the weights are back behind the block
                loss = F.cross_entropy(model(x), y) / PARTS
                loss.backward()
            total += loss.detach()
        optimizer.step()
        losses.append(total)
    clipped, units = optimizer.clipped_units()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} at the ascent points")
    print(f"the last step clipped {int(clipped)} of {units} units")


if __name__ == "__main__":
    main()

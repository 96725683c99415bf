"""Networks made ready for inference: folded, with channels last, in few bits, compiled."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from normfree.config import UserError
from normfree.models.block import Block
from normfree.models.fold import fold
from normfree.nn import int8
from normfree.nn.fused import replace_gelu, sigmoid_gelu
from normfree.nn.signal import gelu

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.bfloat16}  # of the maps


def for_inference(
    model: nn.Module, precision: str = "fp32", compiled: bool = False, images: Tensor | None = None
) -> nn.Module:
    """A copy of a network that only predicts, and does so as quickly as this machine can.

    Args:
        model: on its device; it is left as it is.
        precision: of weights and maps: "fp32", "bf16", "fp16"; or "int8", on CPUs: convolutions of 8-bit integers with
            maps in bfloat16 between them, which pays only if compiled.
        compiled: by torch.compile with frozen weights, at the first call with each shape, which takes up to a minute or
            two. (`TORCHINDUCTOR_CACHE_DIR` says where the kernels are kept.)
        images: (N, C, H, W), normalised, whose ranges the integers of "int8" cover; some dozens suffice.

    Returns:
        a module (N, C, H, W) -> (N, classes) from and to float32, in evaluation mode, to be called without gradients.

    Raises:
        UserError: an unknown precision; int8 without images, or where torch or the processor does not have it.
    """
    if precision not in TYPES:
        raise UserError(f"unknown precision {precision!r}; choose from {', '.join(TYPES)}")
    plain = fold(model).eval().requires_grad_(False)
    rounded = _rounded(plain, images) if precision == "int8" else {}
    plain = plain.to(TYPES[precision]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for name, conv in rounded.items():
        plain.set_submodule(name, conv)
    if compiled and next(plain.parameters()).device.type == "cpu":
        if rounded:
            int8.allow_integers(plain)
            replace_gelu(plain, sigmoid_gelu)
        else:  # behind a convolution oneDNN has the tanh form
            _quicken_sums(plain)
    return _Ready(plain, TYPES[precision], compiled).eval()


def _quicken_sums(plain: nn.Module) -> None:
    for block in plain.modules():
        if isinstance(block, Block) and block.act is gelu:
            block.act_of_sum = sigmoid_gelu


def _rounded(plain: nn.Module, images: Tensor | None) -> dict[str, int8.Int8Conv2d]:
    if images is None or len(images) == 0:
        raise UserError("int8 needs images to measure the ranges of the maps")
    device = next(plain.parameters()).device
    if device.type != "cpu" or not int8.is_available():
        raise UserError("int8 is for CPUs with AVX-VNNI or AVX512-VNNI; bf16 is quickest elsewhere")
    return int8.round_convolutions(plain.float(), images.float())


def freeze(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A network compiled with its weights frozen, at the first call with each shape; to be called without gradients."""
    compiled: list[Callable[[Tensor], Tensor]] = []

    def run(x: Tensor) -> Tensor:
        import torch._inductor.config as inductor  # noqa: PLC0415 (the compiler takes seconds)

        if not compiled:
            compiled.append(torch.compile(model, dynamic=False))
        with inductor.patch(freezing=True):
            return compiled[0](x)

    return run


class _Ready(nn.Module):
    """Images to the type and layout of a network, logits back to float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, compiled: bool) -> None:
        super().__init__()
        self.model, self._dtype = model, dtype
        self._run: Callable[[Tensor], Tensor] = freeze(model) if compiled else model

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self._run(images.to(self._dtype, memory_format=torch.channels_last)).float()

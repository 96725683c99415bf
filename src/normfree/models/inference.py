"""Networks made ready for inference: folded, with channels last, in few bits, compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normfree.config import UserError
from normfree.models.block import Block
from normfree.models.fold import fold
from normfree.nn import int8
from normfree.nn.fused import replace_gelu, sigmoid_gelu
from normfree.nn.signal import gelu

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.bfloat16}  # of the maps


_PROGRAMS = 256  # of networks and shapes, in a process


def for_inference(
    model: nn.Module, precision: str = "fp32", compiled: bool = False, images: Tensor | None = None
) -> nn.Module:
    """A copy of a network that only predicts, and does so as quickly as this machine can.

    Args:
        model: on its device; it is left as it is.
        precision: of weights and maps: "fp32", "bf16", "fp16"; or "int8", on CPUs: convolutions of 8-bit integers with
            maps in bfloat16 between them, which pays only if compiled.
        compiled: by torch.compile with frozen weights, at the first call with each shape, which takes 10 to 60
            seconds. (`TORCHINDUCTOR_CACHE_DIR` says where the kernels are kept.)
        images: (N, C, H, W), normalised, whose ranges the integers of "int8" cover; some dozens suffice.

    Returns:
        a module (N, C, H, W) -> (N, classes) from and to float32, in evaluation mode, to be called without gradients.

    Raises:
        UserError: an unknown precision; a network that is ready already; int8 without images, without convolutions of
            ours, or where torch or the processor does not have it.
    """
    if isinstance(model, _Ready):
        raise UserError("the network is ready for inference already: give the one that it was made of")
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
    rounded = int8.round_convolutions(plain.float(), images.float())
    if not rounded:
        raise UserError("int8 is for this package's convolutions, and the network has none but that of the image")
    return rounded


def freeze(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A network compiled with its weights frozen, at the first call with each shape; to be called without gradients."""
    compiled: list[Callable[[Tensor], Tensor]] = []

    def run(x: Tensor) -> Tensor:
        import torch._dynamo.config as dynamo  # noqa: PLC0415 (the compiler takes seconds)
        import torch._inductor.config as inductor  # noqa: PLC0415

        if not compiled:
            compiled.append(torch.compile(model, dynamic=False))
        # all networks are of one class, and so share one count of programs, which ends at 8
        with inductor.patch(freezing=True), dynamo.patch(recompile_limit=_PROGRAMS):
            return compiled[0](x)

    return run


class _Ready(nn.Module):
    """Images to the type and layout of a network, logits back to float32; always in evaluation mode."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, compiled: bool) -> None:
        super().__init__()
        self.model, self._dtype, self._compiled = model, dtype, compiled
        self._frozen: Callable[[Tensor], Tensor] | None = None

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if self._compiled and self._frozen is None:
            self._frozen = freeze(self.model)
        x = images.to(self._dtype, memory_format=torch.channels_last)
        return (self.model(x) if self._frozen is None else self._frozen(x)).float()

    def train(self, mode: bool = True) -> _Ready:  # noqa: ARG002 (it has one mode)
        return super().train(False)

    def __getstate__(self) -> dict[str, Any]:
        """Without the program, which a copy compiles anew."""
        return {**self.__dict__, "_frozen": None}

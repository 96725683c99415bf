"""What is quicker where operations run one by one and the values of tensors can be read: on a CPU, uncompiled."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_eager_on_cpu(x: Tensor) -> bool:
    """Whether a plain tensor is at hand, of which a number may be read: nothing is compiled, traced or vectorised."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() == 0
    )


def take(x: Tensor, places: Tensor) -> Tensor:
    """The samples at some places, (N, C, H, W), (n,) -> (n, C, H, W), with channels last in memory if they were."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).index_select(0, places).permute(0, 3, 1, 2)
    return x.index_select(0, places)

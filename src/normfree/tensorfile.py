"""Tensors as a safetensors file that is written from where they lie, without a copy of all of them in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def file_parts(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> list[bytes | memoryview]:
    """The parts of a safetensors file in their order, for `normfree.files.write_atomic`: the header, then each tensor.

    `safetensors.torch.save` makes two copies of the file in memory, and lets no other thread run meanwhile. Parts of
    contiguous tensors on the CPU are their own memory, which must not change until it is written.

    Raises:
        ValueError: a tensor of a type that the format does not have.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    parts, end = list[bytes | memoryview](), 0
    for name, x in sorted(tensors.items(), key=lambda item: -item[1].element_size()):  # so that each is aligned
        if x.dtype not in _NAMES:
            raise ValueError(f"{name}: safetensors has no {x.dtype}")
        start, end = end, end + x.numel() * x.element_size()
        header[name] = {"dtype": _NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [start, end]}
        parts.append(_memory(x))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *parts]


def _memory(x: Tensor) -> memoryview:
    flat: Any = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)

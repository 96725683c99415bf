"""Safetensors files that are written from where the tensors lie."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save

from normfree.files import write_atomic
from normfree.tensorfile import _NAMES, file_parts


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    """Every type, scalars, empty tensors, any layout and name; and the metadata."""
    noise = torch.randint(256, (3, 16), dtype=torch.uint8)
    tensors = {str(dtype): (noise > 99 if dtype == torch.bool else noise.view(dtype)) for dtype in _NAMES}
    tensors |= {"scalar": torch.tensor(7), "empty": torch.zeros(0, 3), "é\n猫": torch.randn(4, 5).t()}
    tensors["last"] = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    write_atomic(tmp_path / "x.safetensors", *file_parts(tensors, {"about": '{"a": 1}'}))
    with safe_open(tmp_path / "x.safetensors", "pt") as f:
        assert f.metadata() == {"about": '{"a": 1}'}
    found = load((tmp_path / "x.safetensors").read_bytes())
    assert found.keys() == tensors.keys()
    for name, x in tensors.items():
        assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape)
        ours, theirs = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (x, found[name]))
        assert torch.equal(ours, theirs)


def test_simple_files_are_those_of_the_library() -> None:
    """Byte for byte, an empty one too."""
    for tensors in ({}, {"a": torch.randn(3), "b": torch.arange(5.0)}):
        assert b"".join(file_parts(tensors, {"k": "v"})) == save(tensors, {"k": "v"})


def test_tensors_on_the_cpu_are_not_copied() -> None:
    """What is written is their memory."""
    x = torch.zeros(3)
    parts = file_parts({"x": x})
    x[1] = 1.0
    assert torch.equal(load(b"".join(parts))["x"], x)


def test_a_type_that_the_format_does_not_have_is_refused() -> None:
    """With the name of the tensor."""
    with pytest.raises(ValueError, match=r"x: safetensors has no torch\.complex128"):
        file_parts({"x": torch.zeros(2, dtype=torch.complex128)})

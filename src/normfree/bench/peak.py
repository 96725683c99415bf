"""What a device can do at most, measured: multiply-adds a second of its best matrix product or convolution."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from normfree.bench.timing import Work, wait
from normfree.train.step import PRECISIONS

_SIDES = (256, 512, 1024, 2048, 4096, 8192)  # of square matrices
_BATCHES = (1, 8, 32, 128)  # of 256 channels and 28 x 28 pixels
_LONGEST = 0.15  # seconds of one product beyond which no larger one is tried
_Product = tuple[int, Callable[[], Work]]  # its multiply-adds, and what allocates it


def measure_peak(device: torch.device, precision: str, seconds: float = 0.1) -> float:
    """Multiply-adds a second: the best of products of growing size, each repeated for so many seconds, at least thrice.

    With "fp32" it is what torch does with float32 as it is set up here, so on CUDA its convolutions may use TF32: that
    is what a training step gets too.
    """
    best = 0.0
    for products in (_matrices, _convolutions):
        for work, prepare in products(device, PRECISIONS[precision]):
            took = _quickest(prepare(), device, seconds)
            best = max(best, work / took)
            if took > _LONGEST:
                break
    return best


def _quickest(run: Work, device: torch.device, seconds: float) -> float:
    run()  # chooses kernels, allocates
    quickest, spent, times = float("inf"), 0.0, 0
    while times < 3 or spent < seconds:
        wait(device)
        began = time.perf_counter()
        run()
        wait(device)
        took = time.perf_counter() - began
        quickest, spent, times = min(quickest, took), spent + took, times + 1
    return quickest


def _matrices(device: torch.device, dtype: torch.dtype) -> Iterator[_Product]:
    for side in _SIDES:

        def prepare(n: int = side) -> Work:
            a, b = (torch.full((n, n), 0.5, device=device, dtype=dtype) for _ in range(2))
            return lambda: a @ b

        yield side**3, prepare


def _convolutions(device: torch.device, dtype: torch.dtype) -> Iterator[_Product]:
    for batch in _BATCHES:

        def prepare(n: int = batch) -> Work:
            x = torch.full((n, 256, 28, 28), 0.5, device=device, dtype=dtype).to(memory_format=torch.channels_last)
            w = torch.full((256, 256, 3, 3), 0.5, device=device, dtype=dtype).to(memory_format=torch.channels_last)
            return lambda: F.conv2d(x, w, padding=1)

        yield batch * 28 * 28 * 256 * 256 * 9, prepare

"""Scaled weight standardisation and SAME padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from authors import load, our_layout
from normfree.nn.conv import WSConv2d, same_padding, standardize
from normfree.nn.layers import avg_pool_same

_CASES = ["normal", "tiny", "mixed", "pointwise", "fan_in_1"]


def test_equation_1_in_float64() -> None:
    """W_hat = (W - mu) / (sqrt(N) sigma), written plainly, to 1e-12."""
    torch.manual_seed(0)
    w, gain = torch.randn(5, 3, 3, 2, dtype=torch.float64) + 1, torch.rand(5, dtype=torch.float64)
    plain = torch.empty_like(w)
    for i in range(5):
        n = w[i].numel()
        sigma = ((w[i] - w[i].mean()) ** 2).mean().sqrt()
        plain[i] = gain[i] * (w[i] - w[i].mean()) / (n**0.5 * sigma)
    torch.testing.assert_close(standardize(w, gain), plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", _CASES)
def test_standardised_weights_and_their_gradients_equal_the_authors(case: str) -> None:
    """Also where the eps binds, on every unit or on some, and at fan-in 1."""
    tensors, _ = load("authors_layers")
    get = {k: our_layout(tensors[f"ws/{case}/{k}"]) for k in ("weight", "gain", "out", "cotangent")}
    w, gain = get["weight"].requires_grad_(), get["gain"].requires_grad_()
    out = standardize(w, gain)
    torch.testing.assert_close(out, get["out"], rtol=1e-5, atol=1e-6)
    (out * get["cotangent"]).sum().backward()
    for ours, theirs in ((w.grad, "grad_weight"), (gain.grad, "grad_gain")):
        expected = our_layout(tensors[f"ws/{case}/{theirs}"])
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-6 * max(1.0, expected.abs().max().item()))


@given(size=st.integers(1, 70), kernel=st.integers(1, 7), stride=st.integers(1, 4), dilation=st.integers(1, 3))
def test_same_padding_gives_ceil_outputs_and_no_more_than_needed(
    size: int, kernel: int, stride: int, dilation: int
) -> None:
    """ceil(size / stride) outputs; an odd pixel goes after; one pixel less would lose an output."""
    before, after = same_padding(size, kernel, stride, dilation)
    reach = (kernel - 1) * dilation + 1
    assert (size + before + after - reach) // stride + 1 == -(-size // stride)
    assert after - before in (0, 1)
    if before + after > 0:
        assert (size + before + after - 1 - reach) // stride + 1 < -(-size // stride)


@pytest.mark.parametrize("size", [(8, 8), (7, 8), (5, 9), (1, 2)])
@pytest.mark.parametrize("kernel", [3, (1, 5), (7, 2), 1])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_convolution_equals_explicit_padding(
    size: tuple[int, int], kernel: int | tuple[int, int], stride: int
) -> None:
    """Any size, odd and not square, and any kernel."""
    torch.manual_seed(0)
    conv = WSConv2d(4, 6, kernel, stride=stride, groups=2, scale=1.7).double()
    with torch.no_grad():
        conv.bias.normal_()  # type: ignore[union-attr]
        conv.gain.uniform_(0.5, 2)
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    kh, kw = conv.kernel_size
    top, bottom = same_padding(size[0], kh, stride)
    left, right = same_padding(size[1], kw, stride)
    padded = torch.nn.functional.pad(x, (left, right, top, bottom))
    weight = 1.7 * standardize(conv.weight, conv.gain)
    plain = torch.nn.functional.conv2d(padded, weight, conv.bias, stride, groups=2)
    torch.testing.assert_close(conv(x), plain)
    assert conv(x).shape[2:] == (-(-size[0] // stride), -(-size[1] // stride))


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (1, 3)])
def test_average_pooling_divides_by_the_valid_pixels(size: tuple[int, int]) -> None:
    """A window over the edge is the mean of what is inside."""
    x = torch.randn(1, 2, *size, dtype=torch.float64)
    out = avg_pool_same(x)
    for i in range(out.shape[2]):
        for j in range(out.shape[3]):
            window = x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            torch.testing.assert_close(out[:, :, i, j], window.mean((2, 3)))


def test_standardisation_is_from_float32_weights_whatever_the_type_of_the_maps() -> None:
    """A bfloat16 input meets the float32 result, rounded once; rounding the weight first would differ."""
    torch.manual_seed(0)
    conv = WSConv2d(64, 32, 3)
    exact = conv.filters()
    assert exact.dtype == torch.float32
    early = standardize(conv.weight.bfloat16(), conv.gain)
    assert (early.bfloat16() != exact.bfloat16()).float().mean() > 0.1
    assert conv(torch.randn(1, 64, 4, 4).bfloat16()).dtype == torch.bfloat16
    half = WSConv2d(64, 32, 3).half()
    assert half.filters().dtype == torch.float32


def test_units_have_mean_zero_and_fan_in_variance() -> None:
    """So a layer keeps unit variance: mean 0, sum of squares 1."""
    w = standardize(torch.randn(9, 5, 3, 3) * 7 + 3, torch.ones(9))
    torch.testing.assert_close(w.mean((1, 2, 3)), torch.zeros(9), atol=1e-6, rtol=0)
    torch.testing.assert_close(w.square().sum((1, 2, 3)), torch.ones(9))

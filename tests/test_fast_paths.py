"""What runs quicker where operations run one by one on a CPU is the same as what runs elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from normfree.config import DataConfig, ModelConfig, OptimConfig, Run, TrainConfig
from normfree.data.loader import Batch
from normfree.models import create_model
from normfree.nn import conv as conv_module
from normfree.nn import fused
from normfree.nn.conv import WSConv2d, standardize
from normfree.train.build import build_learner, eval_preprocessing
from normfree.train.length import Length

_FLOATS = [torch.float32, torch.float64, torch.bfloat16]
_ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-7}


@contextmanager
def _plain() -> Iterator[None]:
    """Without the quick paths."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv_module, "is_eager_on_cpu", lambda _x: False)
        yield


def _with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Output and gradients, of fresh copies; the memory that is handed out was used, and is full of NaN."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    poison = [torch.full_like(x, torch.nan) for x in inputs for _ in range(3)]
    del poison
    out = function(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).to(out.dtype).view(out.shape)
    grads = torch.autograd.grad((out * weights).sum(), leaves)
    return [out.detach(), *grads]


def _close(found: list[Tensor], expected: list[Tensor], rounding: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        size = b.abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=0, atol=rounding * max(size, 1e-6))


@settings(deadline=None)
@given(
    out=st.integers(1, 9),
    fan_in=st.integers(1, 7),
    kernel=st.sampled_from([(1, 1), (3, 3), (2, 5)]),
    dtype=st.sampled_from(_FLOATS),
)
def test_standardised_weights(out: int, fan_in: int, kernel: tuple[int, int], dtype: torch.dtype) -> None:
    """And their gradients, of any shape and type."""
    if fan_in * kernel[0] * kernel[1] < 3:
        return  # of two weights the variance is nearly all there is, and its gradient is rounding
    torch.manual_seed(out)
    w, gain = (torch.randn(out, fan_in, *kernel) + 0.3).to(dtype), torch.rand(out) + 0.5
    gain = gain.double() if dtype == torch.float64 else gain
    found = _with_gradients(standardize, w, gain)
    with _plain():
        expected = _with_gradients(standardize, w, gain)
    _close(found, expected, {torch.float64: 1e-10, torch.float32: 2e-5}.get(dtype, 2**-7))


@pytest.mark.filterwarnings("ignore")  # the tracer's own
def test_networks_can_be_traced_whole() -> None:
    """By tools that look at each operation, for which no number may be read; and Eq. 1 without its floor."""
    from torch.fx.experimental.proxy_tensor import make_fx

    model, x = create_model("nfnet_tiny", 10, ws_eps=0.0, skip_init=1.0).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        traced, expected = make_fx(model)(x)(x), model(x)
    assert (traced - expected).norm() <= 1e-5 * expected.norm()


def test_standardised_weights_have_second_derivatives() -> None:
    """For penalties on gradients."""
    w, gain = torch.randn(3, 2, 2, 2, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    inputs = (w.requires_grad_(), gain.requires_grad_())
    assert torch.autograd.gradcheck(standardize, inputs)
    assert torch.autograd.gradgradcheck(standardize, inputs)


_POINTS = torch.cat([torch.linspace(-12, 12, 4801), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 80.0, -80.0, 3e4, -3e4])])


@pytest.mark.parametrize("dtype", _FLOATS)
def test_the_formulas_of_the_fused_gelu(dtype: torch.dtype) -> None:
    """x sigmoid(2 u) and its derivative are the tanh form's, in float64 to rounding, at extremes too."""
    x, grad = _POINTS.to(dtype), torch.linspace(-2, 2, len(_POINTS)).to(dtype)
    exact = x.double().requires_grad_()
    y = F.gelu(exact, approximate="tanh")
    (of_x,) = torch.autograd.grad(y, exact, grad.double())
    rounding = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2**-8}[dtype]
    for ours, theirs in ((fused.sigmoid_gelu(x), y), (fused._backward(grad, x), of_x)):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs.detach(), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (7, 40, 1, 1), (1, 2, 1, 2), (64, 16, 3, 3)])
def test_the_formulas_of_the_fused_standardisation(shape: tuple[int, ...]) -> None:
    """And of its gradients, beside Eq. 1 in float64; of units at the floor of their variance too."""
    torch.manual_seed(0)
    weight, gain, grad = torch.randn(shape) + 0.3, torch.rand(shape[0]) + 0.5, torch.randn(shape)
    weight[0] *= 1e-4  # at the floor
    w, g = weight.double().requires_grad_(), gain.double().requires_grad_()
    with _plain():
        exact = standardize(w, g)
    of_weight, of_gain = torch.autograd.grad(exact, (w, g), grad.double())
    rows = weight.view(len(weight), -1)
    found, mean, rstd = fused._standardized(rows, gain, 1e-4, torch.float32)
    torch.testing.assert_close(found.view(shape).double(), exact.detach(), rtol=1e-5, atol=1e-5)
    ours = fused._of_standardized(grad.view(rows.shape), rows, gain, mean, rstd, 1e-4)
    for a, b in ((ours[0].view(shape), of_weight), (ours[1], of_gain)):
        assert (a - b).norm() < 1e-5 * b.norm()


def test_what_is_fused() -> None:
    """GELU and the standardisation for 16 bits; in others, and in shared passes, all is as before."""
    model = create_model("nfnet_tiny", 10, skip_init=1.0)  # from 0 no branch would be seen
    plain = copy.deepcopy(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_compiled", lambda function: function)
        fused.fuse(model)
        x = torch.randn(2, 3, 32, 32)
        for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
            ours, theirs = (m.eval()(x.to(dtype)) for m in (model, plain))
            assert (ours - theirs).norm() <= bound * theirs.norm()
    convolutions = [m for m in model.modules() if isinstance(m, WSConv2d)]
    assert all(m.standardizer is fused.fused_standardize for m in convolutions)
    assert all(m.filters().dtype == torch.float32 for m in convolutions)


_torchs_own = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's, about itself


@pytest.mark.slow
@_torchs_own
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (7, 40, 1, 1), (96, 128, 3, 3), (1, 1, 1, 3), (33, 17, 3, 3)])
def test_the_compiled_standardisation_equals_the_plain_one(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The outcome to the rounding of its type, gradients of a rounded gradient to that of float32; and second ones."""
    torch.manual_seed(1)
    weight, gain = (torch.randn(shape) * 2 + 0.3).requires_grad_(), (torch.rand(shape[0]) + 0.5).requires_grad_()
    grad = torch.randn(shape).to(dtype)
    ours = fused.fused_standardize(weight, gain, 1e-4, dtype)
    theirs = standardize(weight, gain)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=2**-8, atol=2**-8)
    expected = torch.autograd.grad(theirs, (weight, gain), grad.float(), create_graph=True)
    for a, b in zip(torch.autograd.grad(ours, (weight, gain), grad, retain_graph=True), expected, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=1e-4 * float(b.detach().abs().max()))
    again = torch.autograd.grad(ours, weight, grad, create_graph=True)[0]
    second = [torch.autograd.grad(g.square().sum(), weight)[0] for g in (again, expected[0])]
    torch.testing.assert_close(*second, rtol=1e-4, atol=1e-4 * float(second[1].detach().abs().max()))


@pytest.mark.slow
@_torchs_own
@pytest.mark.parametrize("dtype", _FLOATS)
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 5, 7, 3), (1, 1, 1, 1), (4, 16, 9, 9), (33,)])
def test_the_compiled_gelu_equals_torchs(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Output and gradient, contiguous and with channels last, whatever shapes came before; and a second derivative."""
    layouts = [torch.contiguous_format, *([torch.channels_last] if len(shape) == 4 else [])]
    for layout in layouts:
        x = (torch.randn(shape) * 3).to(dtype).to(memory_format=layout)
        found = _with_gradients(fused.fused_gelu, x)
        expected = _with_gradients(lambda x: F.gelu(x, approximate="tanh"), x)
        assert found[0].stride() == expected[0].stride()
        _close(found, expected, 2 * _ROUNDING[dtype])
    if dtype == torch.float64 and shape != (0, 4, 3, 3):
        assert torch.autograd.gradgradcheck(fused.fused_gelu, (x.requires_grad_(),))


@pytest.mark.slow
@_torchs_own
@pytest.mark.parametrize(("precision", "rounding"), [("fp32", 1e-5), ("bf16", 0.01)])
def test_a_compiled_run_trains_as_an_eager_one(precision: str, rounding: float) -> None:
    """--train.compile: the same losses over five steps, to rounding, with other functions in the blocks."""
    losses = []
    for compiled in (False, True):
        run = steps_run(compile=compiled, precision=precision)
        learner = build_learner(run, 10, Length(1.0, 5.0), eval_preprocessing(run))
        acts = {block.act for block in learner.model.blocks}
        assert (fused.fused_gelu in acts) == compiled
        images = torch.randint(256, (8, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        batch = Batch(images.permute(0, 3, 1, 2), torch.arange(8) % 10, torch.ones(8, dtype=torch.bool), [])
        losses.append([learner.step(batch, i, i).sums[0].item() for i in range(5)])
    torch.testing.assert_close(losses[0], losses[1], rtol=rounding, atol=0)


def steps_run(**train: Any) -> Run:
    """A few steps of a small network."""
    data = DataConfig("nowhere", 32, 32, "box", 0.08, 0, 0.0, 0.0, True, "squash", 0)
    optim = OptimConfig(lr=0.1, clipping=0.1, warmup=0.0)
    return Run(
        "test", ModelConfig("nfnet_tiny", skip_init=1.0), data, optim, TrainConfig(epochs=1.0, batch_size=8, **train)
    )

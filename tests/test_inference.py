"""Networks made ready for inference: the same function, in as many bits as asked."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.profiler import profile

from normfree import create_model, for_inference, save_weights
from normfree.cli import main
from normfree.config import IMAGENET_MEAN, IMAGENET_STD, UserError
from normfree.data.crop import Preprocessing
from normfree.models import Network
from normfree.nn import int8
from normfree.nn.conv import SameConv2d
from normfree.nn.int8 import Int8Conv2d

_has_int8 = pytest.mark.skipif(not int8.is_available(), reason="the processor has no VNNI")
_torchs_own = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's, about itself


def _network(name: str = "nfnet_tiny") -> Network:
    torch.manual_seed(0)
    model = create_model(name, 10, skip_init=1.0).eval()
    nn.init.normal_(model.fc.weight, std=0.1)
    return model


def _images(n: int = 6, size: int = 32) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def _off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def _logits(model: nn.Module, images: Tensor) -> Tensor:
    found: Tensor = model(images)
    return found


@pytest.mark.parametrize("name", ["nfnet_tiny", "nf_regnet_b0", "bn_resnet50"])
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("bf16", 0.06), ("fp16", 0.006), ("int8", 0.25)])
def test_the_logits_stay(name: str, precision: str, bound: float) -> None:
    """To the rounding of the type, in float32 whatever the type, whatever the layout of the images."""
    if precision == "int8" and not int8.is_available():
        pytest.skip("the processor has no VNNI")
    model, images = _network(name), _images()
    ready, expected = for_inference(model, precision, images=images), _logits(model, images)
    found = _logits(ready, images)
    assert found.dtype == torch.float32
    assert 0 < _off(found, expected) < bound
    assert torch.equal(found, _logits(ready, images.to(memory_format=torch.channels_last)))


def test_the_original_is_left_as_it_is() -> None:
    """Its mode, types and weights; and the copy needs no gradients."""
    model = _network().train()
    before = copy.deepcopy(model.state_dict())
    ready = for_inference(model, "bf16")
    assert model.training
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert not ready.training
    assert not ready(_images().requires_grad_()).requires_grad


def test_what_is_ready_stays_so() -> None:
    """It has one mode, one of each tensor, and copies that are its like; it is not made ready again."""
    ready, images = for_inference(_network(), "bf16"), _images()
    expected = _logits(ready, images)
    assert torch.equal(_logits(ready.train(), images), expected)
    assert torch.equal(_logits(copy.deepcopy(ready), images), expected)
    assert torch.equal(_logits(pickle.loads(pickle.dumps(ready)), images), expected)
    assert pickle.loads(pickle.dumps(for_inference(_network(), compiled=True))) is not None
    assert len(ready.state_dict()) == len(for_inference(_network()).model.state_dict())  # type: ignore[union-attr]
    with pytest.raises(UserError, match="ready for inference already"):
        for_inference(ready, "fp32")


@_has_int8
def test_int8_needs_something_to_round() -> None:
    """A network of other convolutions would silently be one in bfloat16."""
    with pytest.raises(UserError, match="has none but that of the image"):
        for_inference(nn.Sequential(nn.Conv2d(3, 4, 1)), "int8", images=_images())


@settings(max_examples=40, deadline=None)
@given(
    groups=st.sampled_from([1, 2]),
    width=st.sampled_from([1, 3, 8]),
    out=st.sampled_from([1, 2, 5]),
    kernel=st.sampled_from([1, 3]),
    stride=st.sampled_from([1, 2]),
    size=st.integers(3, 9),
    low=st.floats(-3, 1),
    span=st.floats(0, 4),
    seed=st.integers(0, 2**31),
)
def test_an_integer_convolution(
    groups: int, width: int, out: int, kernel: int, stride: int, size: int, low: float, span: float, seed: int
) -> None:
    """It is the one of the rounded map and weight, rounded here plainly, in float64; beyond its range a map is cut."""
    torch.manual_seed(seed)
    conv = SameConv2d(width * groups, out * groups, kernel, stride=stride, groups=groups)
    x = torch.rand(2, width * groups, size, size) * 5 - 2
    found = Int8Conv2d(conv, low, low + span)(x)
    bottom, top = min(low, 0.0), max(low + span, 0.0)
    step = max((top - bottom) / 255, 1e-12)
    zero = round(-bottom / step)
    levels = np.clip(np.rint(x.numpy() * np.float32(1 / step)) + zero, 0, 255)
    weight = conv.weight.detach()
    unit = weight.abs().amax((1, 2, 3), keepdim=True) / 127
    rounded = SameConv2d(width * groups, out * groups, kernel, stride=stride, groups=groups).double()
    rounded.load_state_dict({"weight": (weight / unit).round() * unit, "bias": conv.bias})
    expected = rounded(torch.from_numpy((levels - zero) * step))
    assert (found - expected).abs().max() <= 1e-4 * (1 + expected.abs().max())


def test_rounding_keeps_zero_and_takes_whatever_weight() -> None:
    """Zeros of the padding are zeros; a unit without weights, and a map of zeros alone, give the bias."""
    conv = SameConv2d(2, 3, 3)
    assert conv.bias is not None
    bias = conv.bias.detach()
    nn.init.zeros_(conv.weight[1:2].detach())
    rounded = Int8Conv2d(conv, 0.7, 0.9)
    assert torch.equal(rounded(torch.zeros(1, 2, 4, 4)), torch.zeros(1, 3, 4, 4) + bias.view(1, -1, 1, 1))
    assert torch.equal(rounded(torch.rand(1, 2, 4, 4))[:, 1], bias[1].expand(1, 4, 4))
    still = Int8Conv2d(conv, 0.0, 0.0)(torch.zeros(1, 2, 4, 4))
    assert still.isfinite().all()


@_has_int8
def test_the_convolution_of_the_image_stays_a_float() -> None:
    """And all others are of integers."""
    ready = for_inference(_network(), "int8", images=_images())
    kinds = [type(m) for m in ready.modules() if isinstance(m, SameConv2d)]
    assert kinds[0] is SameConv2d
    assert set(kinds[1:]) == {Int8Conv2d}


@pytest.mark.parametrize(
    ("precision", "images", "available", "message"),
    [
        ("int4", None, True, "unknown precision 'int4'; choose from fp32, bf16, fp16, int8"),
        ("int8", None, True, "int8 needs images to measure the ranges of the maps"),
        ("int8", torch.zeros(0, 3, 32, 32), True, "int8 needs images"),
        ("int8", _images(), False, "int8 is for CPUs with AVX-VNNI or AVX512-VNNI"),
    ],
)
def test_what_cannot_be_is_said(
    precision: str, images: Tensor | None, available: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a sentence."""
    monkeypatch.setattr(int8, "is_available", lambda: available)
    with pytest.raises(UserError, match=message):
        for_inference(_network(), precision, images=images)


@pytest.mark.slow
@_torchs_own
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("bf16", 0.03), ("int8", 0.06)])
def test_the_compiled_network_is_the_same(precision: str, bound: float) -> None:
    """To rounding, for two shapes, with convolutions of integers in place; other networks are compiled as before."""
    if precision == "int8" and not int8.is_available():
        pytest.skip("the processor has no VNNI")
    model, images = _network(), _images()
    ready = for_inference(model, precision, compiled=True, images=images)
    plain = for_inference(model, precision, images=images)
    for n in (6, 1):
        with torch.inference_mode():
            assert _off(ready(images[:n]), plain(images[:n])) < bound
    with profile() as found, torch.inference_mode():
        ready(images)
    done = {event.key: event.count for event in found.key_averages()}
    convolutions = sum(isinstance(m, Int8Conv2d) for m in plain.modules())
    assert done.get("onednn::qconv_pointwise", 0) == convolutions
    assert "onednn::qconv_prepack" not in done  # they are frozen
    import torch._inductor.config as inductor

    assert not inductor.freezing


@_torchs_own
def test_many_shapes_and_networks_are_all_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's limit of 8 programs for a function is that of all networks together."""
    compiled: list[int] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    own = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: own(model, backend=backend, **options))
    ready = for_inference(_network(), compiled=True)
    for n in range(1, 11):
        with torch.inference_mode():
            ready(torch.zeros(n, 3, 16, 16))
    assert len(compiled) == 10


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A file of weights, and a folder of labelled images."""
    home = tmp_path_factory.mktemp("inference")
    about = {
        "classes": ["a", "b"],
        "preprocessing": asdict(Preprocessing(32, "squash", 0, IMAGENET_MEAN, IMAGENET_STD)),
        "eval_batch_size": 4,
    }
    save_weights(create_model("nfnet_tiny", 2, skip_init=1.0), home / "weights.safetensors", about)
    pixels = np.random.default_rng(0)
    for name in "ab":
        (home / "images" / name).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(pixels.integers(256, size=(40, 40, 3), dtype=np.uint8)).save(
                home / "images" / name / f"{i}.png"
            )
    return home / "weights.safetensors", home / "images"


def _main(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    return int(left.value.code or 0)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("int8", marks=_has_int8)])
def test_evaluation_and_prediction_take_a_precision(
    precision: str, weights: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The scores move by rounding, and prediction repeats them from the same images."""
    file, images = map(str, weights)
    found = []
    for options in ([], ["--precision", precision]):
        assert _main(["evaluate", file, "--data.root", images, "--device", "cpu", "--json", *options]) == 0
        found.append(json.loads(capsys.readouterr().out)["loss"])
    assert 0 < abs(found[1] - found[0]) < 0.1 * found[0]
    assert _main(["predict", file, images, "--device", "cpu", "--json", "--precision", precision]) == 0
    rows = json.loads(capsys.readouterr().out)
    own = [next(t["probability"] for t in row["top5"] if t["label"] == Path(row["path"]).parent.name) for row in rows]
    assert -sum(map(math.log, own)) / len(own) == pytest.approx(found[1], rel=1e-4)


def test_an_unknown_precision_is_refused(weights: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """With those that there are."""
    assert _main(["predict", *map(str, weights), "--precision", "int4"]) == 2
    assert "int8" in capsys.readouterr().err

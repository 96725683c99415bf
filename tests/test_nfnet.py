"""The network against the authors' code, against the plain formula of the paper, and its manners."""

from __future__ import annotations

import copy
import pickle
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfree
from authors import images, load, tree
from normfree.models import Network, NetworkConfig
from normfree.models.block import Block
from normfree.nn.conv import WSConv2d
from normfree.nn.layers import Draws
from normfree.nn.signal import GAMMA, block_input_std


def authors_net(fixture: str) -> tuple[Network, dict[str, Tensor]]:
    tensors, about = load(fixture)
    v = about["config"]["variant"]
    config = NetworkConfig(
        tuple(v["width"]),
        tuple(v["depth"]),
        v["train_imsize"],
        v["test_imsize"],
        v["drop_rate"],
        stem_widths=(16, 32, 64, v["width"][0] // 2),
        group_width=tuple(v["group_width"]),
        final_width=2 * v["width"][-1],
        num_classes=10,
    )
    model = Network(config).eval()
    model.load_state_dict(tree(tensors, "params/"))
    return model, tensors


@pytest.mark.parametrize("size", ["even", "odd"])
def test_logits_equal_the_authors(size: str) -> None:
    """All parameters random and non-zero; 40 x 40, and 37 x 45 where every padding is uneven; to 1e-5."""
    model, tensors = authors_net("authors_nfnet")
    x = images(tensors[f"input/{size}"])
    torch.testing.assert_close(model(x), tensors[f"logits/{size}"], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(model.forward_features(x).mean((2, 3)), tensors[f"pool/{size}"], rtol=1e-5, atol=1e-5)


def test_gradients_equal_the_authors() -> None:
    """Of the input and of every parameter."""
    model, tensors = authors_net("authors_nfnet")
    x = images(tensors["input/even"]).requires_grad_()
    (model(x) * tensors["cotangent/even"]).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, images(tensors["grad/input/even"]), rtol=1e-4, atol=1e-6)
    theirs = tree(tensors, "grad/params/")
    ours = {n: p.grad for n, p in model.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=2e-4, atol=5e-6, msg=name)


def test_the_signal_of_every_block_equals_the_authors() -> None:
    """Mean square mean and variance behind the stem and each block, with skip_gain 1 on noise."""
    model, tensors = authors_net("authors_signal")
    maps: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, out: Tensor) -> None:
        maps.append(out)

    for module in (model.stem[-1], *model.blocks):
        module.register_forward_hook(keep)
    model(images(tensors["input"]))
    for i, x in enumerate(maps):
        mean_square = x.mean((0, 2, 3)).square().mean()
        variance = x.var((0, 2, 3), correction=0).mean()
        torch.testing.assert_close(mean_square, tensors[f"avg_sq_mean_{i}"], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(variance, tensors[f"avg_var_{i}"], rtol=1e-4, atol=1e-7)


def blocks_of(model: Network) -> list[Block]:
    return cast("list[Block]", list(model.blocks))


def _plain(model: Network, x: Tensor, keep: Tensor) -> Tensor:
    """The paper's formulas with every scalar multiplied where the paper has it, none folded."""
    c = model.config

    def act(z: Tensor) -> Tensor:
        return GAMMA["gelu"] * F.gelu(z, approximate="tanh")

    def conv(layer: torch.nn.Module | None, z: Tensor) -> Tensor:
        assert isinstance(layer, WSConv2d)
        w = layer.weight
        n = w[0].numel()
        mean = w.mean((1, 2, 3), keepdim=True)
        var = ((w - mean) ** 2).mean((1, 2, 3), keepdim=True)
        w = (w - mean) / (var * n).clamp_min(1e-4).sqrt() * layer.gain[:, None, None, None]
        k, s = layer.kernel_size[0], layer.stride[0]
        pad = [max((-(-size // s) - 1) * s + k - size, 0) for size in z.shape[2:]]
        z = F.pad(z, (pad[1] // 2, pad[1] - pad[1] // 2, pad[0] // 2, pad[0] - pad[0] // 2))
        return F.conv2d(z, w, layer.bias, s, groups=layer.groups)

    for i, layer in enumerate(model.stem):
        x = conv(layer, act(x) if i else x)
    betas = block_input_std(c.depths, c.alpha)
    for i, (block, beta) in enumerate(zip(blocks_of(model), betas, strict=True)):
        out = act(x) / beta
        shortcut = x
        if block.conv_shortcut is not None:
            pooled = F.avg_pool2d(out, 2, ceil_mode=True, count_include_pad=False) if block.place.stride == 2 else out
            shortcut = conv(block.conv_shortcut, pooled)
        out = conv(block.conv0, out)
        out = conv(block.conv1, act(out))
        out = conv(block.conv1b, act(out))
        out = conv(block.conv2, act(out))
        se = block.squeeze_excite
        assert se is not None
        assert block.skip_gain is not None
        out = 2 * torch.sigmoid(se.fc1(F.relu(se.fc0(out.mean((2, 3))))))[:, :, None, None] * out
        x = shortcut + out * keep[:, i, None, None, None] * block.skip_gain * c.alpha
    logits: Tensor = model.fc(act(conv(model.final_conv, x)).mean((2, 3)))
    return logits


def _random(model: Network) -> Network:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "bias" in name or "gain" in name:
                p.normal_(0, 0.3)
    return model


def test_scalars_in_weights_and_gates_change_nothing() -> None:
    """The network equals the formulas of the paper with each scalar in its own place, in float64, masks included."""
    torch.manual_seed(1)
    config = NetworkConfig(
        (16, 24, 48), (1, 3, 2), 32, 32, 0.0, strides=(1, 2, 2), group_width=(8,), final_width=96, num_classes=7
    )
    model = _random(Network(config)).double()
    x = torch.randn(4, 3, 41, 50, dtype=torch.float64)
    keep = (torch.rand(4, 6) < 0.5).double()
    keep[:, 0] = 1  # the first block has rate 0
    torch.testing.assert_close(model(x, Draws(keep)), _plain(model, x, keep), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("nfnet_f0", 71_489_284),
        ("nfnet_f1", 132_634_256),
        ("nfnet_f7", 499_504_088),
        ("nfnet_f0_plus", 118_824_516),
        ("nfnet_f4_plus", 524_954_484),
    ],
)
def test_parameter_counts(name: str, parameters: int) -> None:
    """To the last one, as the authors' code has them."""
    with torch.device("meta"):
        model = normfree.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_every_listed_name_can_be_made() -> None:
    """And has the sizes, depths and rates of its row; F3 as an example against Table 1."""
    for name in normfree.list_models():
        with torch.device("meta"):
            model = normfree.create_model(name, num_classes=3)
        assert len(model.blocks) == sum(model.config.depths)
    f3 = normfree.models.model_config("nfnet_f3")
    assert (f3.depths, f3.drop_rate, f3.train_size, f3.test_size) == ((4, 8, 24, 12), 0.4, 320, 416)
    assert f3.stochastic_depth == 0.25
    assert normfree.list_models("nfnet_f?_plus") == [f"nfnet_f{i}_plus" for i in range(8)]


def test_unknown_names_and_rates_out_of_range_are_refused() -> None:
    """With the nearest name."""
    with pytest.raises(ValueError, match="did you mean nfnet_tiny"):
        normfree.create_model("nfnet_tny")
    with pytest.raises(ValueError, match="drop_rate"):
        normfree.create_model("nfnet_tiny", drop_rate=1.0)


def test_stochastic_depth_drops_whole_branches_and_does_not_rescale() -> None:
    """A dropped sample of the last block leaves as if its skip_gain were 0; a kept one is as in evaluation."""
    torch.manual_seed(2)
    model = _random(normfree.create_model("nfnet_tiny", 5, drop_rate=0.0, stochastic_depth=0.5)).train()
    x = torch.randn(2, 3, 32, 32)
    n = len(model.blocks)
    keep = torch.ones(2, n)
    keep[1, n - 1] = 0
    mixed = model(x, Draws(keep))
    whole = copy.deepcopy(model).eval()(x)
    without = copy.deepcopy(model).eval()
    with torch.no_grad():
        gain = blocks_of(without)[n - 1].skip_gain
        assert gain is not None
        gain.zero_()
    torch.testing.assert_close(mixed[0], whole[0])
    torch.testing.assert_close(mixed[1], without(x)[1])
    assert not torch.allclose(mixed[1], whole[1])


def test_the_rates_of_the_draws() -> None:
    """Block i of n drops with rate * i / n; dropout keeps the mean."""
    torch.manual_seed(3)
    model = normfree.create_model("nfnet_tiny", 5, drop_rate=0.4, stochastic_depth=0.5)
    draws = model.draws(20_000)
    assert draws.keep is not None
    assert draws.dropout is not None
    n = len(model.blocks)
    expected = torch.tensor([1 - 0.5 * i / n for i in range(n)])
    torch.testing.assert_close(draws.keep.mean(0), expected, atol=0.015, rtol=0)
    assert draws.dropout.unique().tolist() == [0.0, pytest.approx(1 / 0.6)]
    assert draws.dropout.mean().item() == pytest.approx(1, abs=0.01)


def test_given_draws_fix_the_step_and_torchs_generator_serves_without() -> None:
    """Two passes with the same draws agree to the last bit; without, they differ."""
    model = _random(normfree.create_model("nfnet_tiny", 5, drop_rate=0.3, stochastic_depth=0.5)).train()
    x = torch.randn(4, 3, 32, 32)
    draws = model.draws(4)
    assert torch.equal(model(x, draws), model(x, draws))
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_maps_with_float32_weights(dtype: torch.dtype) -> None:
    """The type of the input decides; logits are float32 and close; gradients reach the float32 weights."""
    torch.manual_seed(4)
    model = _random(normfree.create_model("nfnet_tiny", 5)).eval()
    x = torch.randn(2, 3, 32, 32)
    low = model(x.to(dtype))
    assert low.dtype == torch.float32
    assert (low - model(x)).norm() / model(x).norm() < 0.05
    low.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("size", [(32, 32), (31, 45), (64, 17), (8, 8), (1, 1)])
@pytest.mark.parametrize("channels", [1, 4])
def test_any_input_size_and_channel_count(size: tuple[int, int], channels: int) -> None:
    """Odd, not square, smaller than the stride."""
    model = normfree.create_model("nfnet_tiny", 5, in_chans=channels).eval()
    assert model(torch.randn(2, channels, *size)).shape == (2, 5)
    assert model.forward_features(torch.randn(1, channels, 32, 48)).shape == (1, 256, 2, 3)


def test_channels_last_and_batches_do_not_change_the_logits() -> None:
    """To rounding; a sample does not depend on its neighbours."""
    torch.manual_seed(5)
    model = _random(normfree.create_model("nfnet_tiny", 5)).eval()
    x = torch.randn(6, 3, 32, 32)
    whole = model(x)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([model(x[:1]), model(x[1:])]), whole, rtol=1e-4, atol=1e-5)


def test_copies_pickles_and_state_dicts_are_stable() -> None:
    """deepcopy, pickle and a state_dict give the same logits; the classifier can be replaced."""
    model = _random(normfree.create_model("nfnet_tiny", 5)).eval()
    x = torch.randn(1, 3, 32, 32)
    again = normfree.create_model("nfnet_tiny", 5).eval()
    again.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), again):
        assert torch.equal(other(x), model(x))
    assert not list(model.buffers())
    model.reset_classifier(9)
    assert model(x).shape == (1, 9)
    assert model.config.num_classes == 9


def test_at_initialisation_the_blocks_do_nothing_but_transitions() -> None:
    """SkipInit is 0: an identity block returns its input to the last bit."""
    model = normfree.create_model("nfnet_f0")
    block = blocks_of(model)[2]
    assert block.conv_shortcut is None
    x = torch.randn(1, 512, 4, 4)
    assert torch.equal(block(x), x)

"""`convert` on small networks of the usual shapes: the signal is as predicted, the rest is refused with its reason."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from normfree.config import UserError
from normfree.models.convert import Residual, convert
from normfree.nn.conv import WSConv2d
from normfree.nn.signal import GAMMA, block_input_std
from normfree.optim import AGCSGD, param_groups


def conv3(cin: int, cout: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, 3, stride, 1, groups=groups, bias=False)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, cin: int, width: int, stride: int, act: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(cin, width, stride), nn.BatchNorm2d(width)
        self.relu = act()
        self.conv2, self.bn2 = conv3(width, width), nn.BatchNorm2d(width)
        nn.init.zeros_(self.bn2.weight)
        self.downsample = shortcut(cin, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return cast(Tensor, self.relu(out))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, cin: int, width: int, stride: int, act: Callable[[], nn.Module]) -> None:
        super().__init__()
        cout = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(cin, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3(width, width, stride, groups=2), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, cout, 1, bias=False), nn.BatchNorm2d(cout)
        self.relu = act()
        self.downsample = shortcut(cin, cout, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.attend(self.bn3(self.conv3(out)))
        return cast(Tensor, self.relu(out + identity))

    def attend(self, x: Tensor) -> Tensor:
        return x


class SEBottleneck(Bottleneck):
    def __init__(self, cin: int, width: int, stride: int, act: Callable[[], nn.Module]) -> None:
        super().__init__(cin, width, stride, act)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(4 * width, width, 1), nn.Conv2d(width, 4 * width, 1)

    def attend(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(self.avgpool(x)))))


class PreBlock(nn.Module):
    """Of a pre-activation network: the projection takes the normalised, activated signal."""

    expansion = 1

    def __init__(self, cin: int, width: int, stride: int, act: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(cin), conv3(cin, width, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv3(width, width)
        self.act = act()
        self.project = nn.Conv2d(cin, width, 1, stride, bias=False) if stride > 1 or cin != width else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(x))
        identity = x if self.project is None else self.project(out)
        out = self.conv2(self.act(self.bn2(self.conv1(out))))
        return torch.add(identity, out)


def shortcut(cin: int, cout: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and cin == cout:
        return None
    return nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))


class ResNet(nn.Module):
    def __init__(
        self,
        block: Any = BasicBlock,
        depths: tuple[int, ...] = (2, 2, 2, 2),
        width: int = 32,
        act: Callable[[], nn.Module] = nn.ReLU,
        pool: bool = False,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.conv1 = conv3(3, width)
        post = block is not PreBlock
        self.bn1 = nn.BatchNorm2d(width) if post else nn.Identity()
        self.relu = act() if post else nn.Identity()
        self.maxpool = nn.MaxPool2d(3, 2, 1) if pool else nn.Identity()
        cin = width
        for stage, depth in enumerate(depths):
            blocks = []
            for index in range(depth):
                blocks.append(block(cin, width << stage, 2 if stage and index == 0 else 1, act))
                cin = (width << stage) * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.stages = len(depths)
        self.last = nn.Identity() if post else nn.Sequential(nn.BatchNorm2d(cin), act())
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(0.0)
        self.fc = nn.Linear(cin, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        x = self.avgpool(self.last(x))
        return cast(Tensor, self.fc(self.dropout(torch.flatten(x, 1))))


def branches(net: fx.GraphModule, n: int = 8, size: int = 32) -> list[tuple[float, float]]:
    """Per-channel variance, averaged over channels, of the shortcut and the branch of each block, on noise."""
    found = []

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(tuple(x.transpose(0, 1).flatten(1).var(1).mean().item() for x in args))

    handles = [m.register_forward_pre_hook(hook) for m in net.modules() if isinstance(m, Residual)]
    with torch.no_grad():
        net(torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1)))
    for handle in handles:
        handle.remove()
    return cast(list[tuple[float, float]], found)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: ResNet(depths=(2, 2), width=16),
    "bottleneck": lambda: ResNet(Bottleneck, (1, 2), width=8, pool=True),
    "pre-activation": lambda: ResNet(PreBlock, (2, 2), width=16, act=nn.SiLU),
    "squeeze-excite": lambda: ResNet(SEBottleneck, (1, 2), width=8),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[request.param]()


def noise(n: int = 4, size: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


# Images are large, since zero padding lowers the variance of small maps: with 3x3 filters on 16 x 16 pixels by 8 %.
@pytest.mark.parametrize(
    ("options", "within"),
    [
        ({"depths": (2, 2, 2, 2)}, 0.10),
        ({"block": Bottleneck, "depths": (3, 4, 6, 3), "width": 16}, 0.15),
        ({"block": PreBlock, "depths": (8, 8, 8), "width": 16}, 0.15),
        ({"block": SEBottleneck, "depths": (2, 2, 2), "width": 16}, 0.15),
        ({"block": PreBlock, "depths": (2, 2, 2), "act": nn.SiLU}, 0.10),
        ({"depths": (4, 4), "act": nn.GELU}, 0.10),
        ({"depths": (2, 2), "act": nn.ELU}, 0.10),
    ],
    ids=["resnet18", "resnet50", "pre-activation50", "squeeze-excite", "pre-activation-silu", "gelu", "elu"],
)
def test_branches_have_unit_variance_at_initialisation(options: dict[str, Any], within: float) -> None:
    torch.manual_seed(0)
    measured = torch.tensor([branch for _, branch in branches(convert(ResNet(**options), skip_init=1.0), 2, 96)])
    assert (measured - 1).abs().mean() < within
    assert (measured - 1).abs().max() < 0.25


def test_pre_activation_stream_follows_the_analytic_bookkeeping() -> None:
    """1/beta in the graph is that of Section 3: the variance grows by alpha^2 a block and restarts at transitions."""
    depths = (3, 4, 3)
    net = convert(ResNet(PreBlock, depths, width=8), skip_init=1.0)
    scales = [n.args[1] for n in net.graph.nodes if n.op == "call_function" and "bn1" in n.name]
    torch.testing.assert_close(torch.tensor(scales), 1 / torch.tensor(block_input_std(depths, 0.2)), rtol=0.005, atol=0)


def test_the_gain_of_the_activation_is_in_the_weights() -> None:
    net = convert(ResNet(depths=(1,), width=8))
    assert cast(WSConv2d, net.get_submodule("conv1")).scale == pytest.approx(1.0)
    assert cast(WSConv2d, net.get_submodule("layer1.0.conv2")).scale == pytest.approx(GAMMA["relu"], rel=2e-3)


def test_norms_are_gone_and_convolutions_keep_their_weights(model: nn.Module) -> None:
    before = copy.deepcopy(model.state_dict())
    net = convert(model)
    assert not [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for name, module in net.named_modules():
        if isinstance(module, WSConv2d):
            assert torch.equal(module.weight, before[f"{name}.weight"])
            assert (module.gain == 1).all()
            assert module.bias is not None
            assert not module.bias.any()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_shape_and_independence_of_the_batch(model: nn.Module) -> None:
    net = convert(model, skip_init=1.0).train()
    x = noise(4)
    alone, together = net(x[:1]), net(torch.cat([x[:1], 10 * noise(3, seed=1)]))
    assert together.shape == (4, 10)
    torch.testing.assert_close(alone, together[:1], rtol=1e-4, atol=1e-5)


def test_training_and_evaluation_agree_and_dropout_still_switches(model: nn.Module) -> None:
    net = convert(model, skip_init=1.0)
    x = noise()
    assert torch.equal(net.train()(x), net.eval()(x))
    cast(nn.Dropout, net.get_submodule("dropout")).p = 0.5
    assert torch.equal(net(x), net(x))
    net.train()
    assert not torch.equal(net(x), net(x))


def test_gradients_reach_every_parameter(model: nn.Module) -> None:
    net = convert(model, skip_init=1.0)
    F.cross_entropy(net(noise()), torch.arange(4)).backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck, SEBottleneck, PreBlock])
def test_activations_in_place_change_nothing(block: Any) -> None:
    def result(in_place: bool) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        net = convert(ResNet(block, (2, 2), width=8, act=lambda: nn.ReLU(inplace=in_place)), skip_init=1.0)
        out = net(noise())
        out.square().sum().backward()
        return out, cast(Tensor, cast(nn.Conv2d, net.get_submodule("conv1")).weight.grad)

    for plain, in_place in zip(result(False), result(True), strict=True):
        assert torch.equal(plain, in_place)


def test_at_skip_init_0_only_branches_are_silent(model: nn.Module) -> None:
    net = convert(model)
    F.cross_entropy(net(noise()), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.any() for n, p in net.named_parameters() if n.endswith("skip_gain"))


def test_copies_and_files(model: nn.Module) -> None:
    net = convert(model, skip_init=0.5)
    x, expected = noise(), net(noise())
    assert torch.equal(copy.deepcopy(net)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), expected)
    other = convert(model)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), expected)


def test_parameter_groups_see_gains_as_gains(model: nn.Module) -> None:
    net = convert(model)
    groups = {name: group for group in param_groups(net) for name in group["names"]}
    assert len(groups) == len(list(net.parameters()))
    for name, group in groups.items():
        assert (group["weight_decay"] == 0) == name.endswith(("gain", "bias")), name
        assert (group["clipping"] is None) == (name == "fc.weight")


def test_it_learns(model: nn.Module) -> None:
    """Eight noisy pictures a class, four classes told apart by their pattern."""
    net = convert(model, skip_init=0.5)
    y = torch.arange(32) % 4
    x = 0.5 * noise(32, 12) + noise(4, 12, seed=1)[y]
    optimizer = AGCSGD(param_groups(net, clipping=0.1), lr=0.05)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.0
    assert losses[-1] < 0.1


def test_conversion_draws_no_random_numbers_and_is_repeatable(model: nn.Module) -> None:
    state = torch.get_rng_state()
    first, second = convert(model, skip_init=1.0), convert(model, skip_init=1.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first(noise()), second(noise()))


class Net(nn.Module):
    """A stem, then whatever the function makes of the map and the layers."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.stem, self.stem_bn = conv3(3, 8), nn.BatchNorm2d(8)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.rest = forward

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.rest(self, F.relu(self.stem_bn(self.stem(x)))))


def conv_norm(n: int = 1) -> nn.Sequential:
    return nn.Sequential(*[layer for _ in range(n) for layer in (conv3(8, 8), nn.BatchNorm2d(8))])


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    return layer


class OddNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


def gated(net: Any, x: Tensor) -> Tensor:
    return x * torch.sigmoid(net.a(x))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "product": (lambda: Net(lambda m, x: x * m.a(x), a=conv_norm()), "mul in the model: it is known only in squeeze"),
    "nothing": (lambda: nn.Sequential(conv3(3, 8), nn.ReLU()), "nothing to convert"),
    "converted": (lambda: convert(ResNet(depths=(1,), width=8)), "already has weight-standardised"),
    "group norm": (lambda: Net(lambda m, x: m.a(x), a=nn.GroupNorm(2, 8)), r"a \(GroupNorm\): of the norms only"),
    "layer norm": (lambda: Net(lambda m, x: m.a(x), a=nn.LayerNorm(4)), r"a \(LayerNorm\): of the norms only"),
    "1-d norm": (
        lambda: Net(lambda m, x: m.b(m.a(x.mean((2, 3)))), a=nn.Linear(8, 8), b=nn.BatchNorm1d(8)),
        r"b \(BatchNorm1d\): of the norms only",
    ),
    "norm of another class": (lambda: Net(lambda m, x: m.a(x), a=OddNorm(8)), r"a \(OddNorm\): of the norms only"),
    "norm of the input": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), conv3(3, 8)),
        r"0 \(BatchNorm2d\): it normalises the input",
    ),
    "shared norm": (
        lambda: Net(lambda m, x: m.n(m.b(m.n(m.a(x)))), a=conv3(8, 8), b=conv3(8, 8), n=nn.BatchNorm2d(8)),
        r"n \(BatchNorm2d\): it is used in more than one place",
    ),
    "shared convolution": (lambda: Net(lambda m, x: m.a(m.a(x)), a=conv3(8, 8)), r"a \(Conv2d\): it is used in more"),
    "concatenation": (
        lambda: Net(lambda m, x: m.b(torch.cat([x, m.a(x)], 1)), a=conv3(8, 8), b=nn.BatchNorm2d(16)),
        "cat in the model: it joins channels",
    ),
    "fan-in 1": (lambda: Net(lambda m, x: m.a(x), a=nn.Conv2d(8, 8, 1, groups=8)), r"a \(Conv2d\): a fan-in of 1"),
    "transposed": (lambda: Net(lambda m, x: m.a(x), a=nn.ConvTranspose2d(8, 8, 2)), "depends on the position"),
    "padding": (lambda: Net(lambda m, x: m.a(x), a=nn.Conv2d(8, 8, 3, padding_mode="reflect")), "'reflect'"),
    "zero weights": (lambda: Net(lambda m, x: m.a(x), a=zeroed(conv3(8, 8))), "nearly the same: initialise"),
    "after linear": (
        lambda: Net(lambda m, x: m.b(m.a(x.mean((2, 3)))[:, :, None, None]), a=nn.Linear(8, 8), b=conv3(8, 8)),
        r"b \(Conv2d\): the variance of its input is not known",
    ),
    "unknown function": (lambda: Net(lambda m, x: torch.sin(x)), "sin in the model: no rule"),
    "unknown layer": (lambda: Net(lambda m, x: m.a(x), a=nn.PReLU()), r"a \(PReLU\): no rule"),
    "mean of channels": (lambda: Net(lambda m, x: x.mean(1)), "mean in the model: a mean over more than height"),
    "branch on data": (lambda: Net(lambda m, x: x if x.sum() > 0 else -x), "cannot be traced"),
    "branch on training": (lambda: Net(lambda m, x: F.dropout(x, training=m.training)), "training and evaluation"),
    "constant": (lambda: Net(lambda m, x: x + 1), "add in the model: it adds something other"),
    "scaled addition": (lambda: Net(lambda m, x: torch.add(x, m.a(x), alpha=2), a=conv_norm()), "something other"),
    "three-way addition": (
        lambda: Net(lambda m, x: m.a(x) + x + m.b(x), a=conv_norm(2), b=conv_norm(2)),
        "add in the model: it is not clear which operand is the shortcut",
    ),
    "two long branches": (lambda: Net(lambda m, x: m.a(x) + m.b(x), a=conv_norm(2), b=conv_norm(2)), "not clear"),
    "two projections": (lambda: Net(lambda m, x: m.a(x) + m.b(x), a=conv_norm(), b=conv_norm()), "not clear"),
    "no branch": (lambda: Net(lambda m, x: x + x), "not clear"),
    "gate without pooling": (
        lambda: Net(gated, a=conv3(8, 8)),
        "sigmoid in the model: it is known only in squeeze-excite",
    ),
    "shrinking stream": (
        lambda: ResNet(depths=(2,), width=8, act=nn.SiLU),
        r"layer1.0.relu \(SiLU\): .* multiply the stream by 0.\d\d",
    ),
    "name taken": (lambda: Net(lambda m, x: m.residuals(x), residuals=nn.ReLU()), "an attribute named residuals"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_place_and_the_reason(name: str) -> None:
    build, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        convert(build())


@pytest.mark.parametrize("setting", [{"alpha": 0.0}, {"alpha": float("nan")}, {"skip_init": float("inf")}])
def test_settings_out_of_range(setting: dict[str, float]) -> None:
    with pytest.raises(UserError, match="alpha must be positive and skip_init finite"):
        convert(ResNet(depths=(1,), width=8), **setting)


def linear_gate(net: Any, x: Tensor) -> Tensor:
    out = net.a(x)
    n, c = x.size(0), x.size(1)
    pooled = F.adaptive_avg_pool2d(out, 1).view(n, c)
    return cast(Tensor, x + out * net.gate(pooled).view(n, c, 1, 1).expand_as(x))


ACCEPTED: dict[str, Callable[[], nn.Module]] = {
    "gate of linear layers": lambda: Net(
        linear_gate, a=conv_norm(), gate=nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8), nn.Sigmoid())
    ),
    "plain": lambda: Net(lambda m, x: m.b(F.max_pool2d(F.gelu(m.a(x)), 2)), a=conv_norm(), b=conv_norm()),
    "no shortcut norm": lambda: Net(lambda m, x: F.relu(m.a(x) + m.b(x)), a=conv3(8, 8), b=conv_norm(2)),
    "nested residual": lambda: Net(lambda m, x: m.c(x + m.a(x)) + x, a=conv_norm(2), c=conv_norm()),
    "depthwise": lambda: Net(
        lambda m, x: x + m.a(x), a=nn.Sequential(nn.Conv2d(8, 8, 3, padding="same", groups=8), nn.BatchNorm2d(8))
    ),
    "norm behind the activation": lambda: Net(lambda m, x: m.b(m.a(x).relu_()), a=conv3(8, 8), b=nn.BatchNorm2d(8)),
    "synchronised": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(ResNet(depths=(1, 1), width=8)),
    "pooled shortcut": lambda: Net(
        lambda m, x: F.avg_pool2d(x, 2).add(m.a(x)),
        a=nn.Sequential(conv3(8, 8), nn.BatchNorm2d(8), nn.ReLU(), conv3(8, 8, 2), nn.BatchNorm2d(8)),
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_other_shapes_of_network(name: str) -> None:
    torch.manual_seed(0)
    model = ACCEPTED[name]()
    net = convert(model, skip_init=1.0)
    x = noise()
    assert net(x).isfinite().all()
    assert "bn" not in "".join(dict(net.named_modules()))
    assert not [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def test_bfloat16_under_autocast() -> None:
    net = convert(ResNet(depths=(1, 1), width=8), skip_init=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(noise())
    torch.testing.assert_close(out.float(), net(noise()), rtol=0.05, atol=0.05)

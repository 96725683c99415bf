"""AGC, the groups, the optimizer, the average and the schedule, against the authors' runs and plain formulas."""

from __future__ import annotations

import copy
import math
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfree
from authors import load, our_layout, our_name
from normfree.optim import AGCSGD, EMA, SAM, WarmupCosine, clip_grad_agc_, param_groups
from normfree.optim.agc import unit_norms


def _theirs(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): our_layout(t) for k, t in tensors.items() if k.startswith(prefix)}


class _Toy(nn.Module):
    """The authors' toy tree under names by which `param_groups` knows its parts."""

    def __init__(self, initial: dict[str, Tensor]) -> None:
        super().__init__()
        self.names: dict[str, str] = {}
        self.conv1 = nn.Conv2d(4, 6, 3)
        self.fc0, self.fc = nn.Linear(6, 3), nn.Linear(6, 5)
        self.gain, self.skip_gain = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.zeros(1))
        ours = {"conv1.gain": "gain"}
        for theirs, value in initial.items():
            name = our_name(theirs).removeprefix("blocks.0.").replace("squeeze_excite.", "").replace("skip.", "")
            name = ours.get(name, name)
            self.names[theirs] = name
            with torch.no_grad():
                self.get_parameter(name).copy_(value)


def test_six_steps_equal_the_authors_optimizer_and_average() -> None:
    """Parameters, momentum and EMA after every step, with clipping, decay and warm-up binding; to 2e-6."""
    tensors, about = load("authors_optim")
    settings = about["config"]["schedule"]
    toy = _Toy(_theirs(tensors, "initial/"))
    decay, clipping = (about["config"]["optimizer"][k] for k in ("weight_decay", "clipping"))
    optimizer = AGCSGD(param_groups(toy, weight_decay=decay, clipping=clipping), lr=0.0)
    ema = EMA(toy)
    schedule = WarmupCosine(settings["max_val"], settings["num_steps"], settings["warmup_steps"])
    for step in range(6):
        for theirs, gradient in _theirs(tensors, f"grads/{step}/").items():
            toy.get_parameter(toy.names[theirs]).grad = gradient.clone()
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        optimizer.step()
        ema.update(toy)
        for prefix, module in ((f"params/{step}/", toy), (f"ema/{step}/", ema.module)):
            for theirs, expected in _theirs(tensors, prefix).items():
                value = module.get_parameter(toy.names[theirs]).detach()
                torch.testing.assert_close(value, expected, rtol=2e-6, atol=2e-7)
    for theirs, expected in _theirs(tensors, "momentum/").items():
        value = optimizer.momentum(toy.get_parameter(toy.names[theirs]))
        torch.testing.assert_close(value, expected, rtol=2e-6, atol=2e-7)
    clipped, units = optimizer.clipped_units()
    assert 0 < clipped < units


def test_the_schedule_equals_the_authors() -> None:
    """At every step, with a fractional warm-up."""
    tensors, about = load("authors_optim")
    settings = about["config"]["schedule"]
    schedule = WarmupCosine(settings["max_val"], settings["num_steps"], settings["warmup_steps"])
    ours = torch.tensor([schedule(t) for t in range(21)])
    torch.testing.assert_close(ours, tensors["schedule/lr"], rtol=1e-5, atol=1e-7)


def test_the_papers_schedule() -> None:
    """112,602 steps: the first has rate 0, the peak is 1.6, the end is 0, and beyond stays there."""
    schedule = WarmupCosine(1.6, 112_602, 5 * 1_281_167 / 4096)
    assert schedule(0) == 0
    assert max(schedule(t) for t in range(1500, 1700)) == pytest.approx(1.6, rel=1e-5)
    assert schedule(112_602) == pytest.approx(0, abs=1e-12)
    assert schedule(200_000) == schedule(112_602)
    with pytest.raises(ValueError, match="warmup"):
        WarmupCosine(1.0, 10, 10)


@pytest.mark.parametrize("case", ["scalar", "6", "6x5", "1x5", "5x1", "3x3x4x6", "1x1x4x6", "1x1x1x6", "1x1x4x1"])
def test_units_equal_the_authors(case: str) -> None:
    """Rows of weights; one norm for whatever squeezes to a vector."""
    tensors, _ = load("authors_layers")
    x, expected = (our_layout(tensors[f"unitwise/{case}/{k}"]) for k in ("x", "norm"))
    torch.testing.assert_close(unit_norms(x).flatten(), expected.flatten())


def test_equation_3_in_float64() -> None:
    """Each row by hand, on both sides of the threshold; a unit exactly at it is left alone."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(40, 3, 3, 3, dtype=torch.float64))
    with torch.no_grad():
        w[3] = 0  # the floor eps takes over
        w[5] *= 1e-5
    g = torch.randn_like(w) * torch.logspace(-4, 1, 40, dtype=torch.float64)[:, None, None, None]
    g[7] = 0
    expected = g.clone()
    clipped = 0
    for i in range(40):
        size, limit = g[i].norm().item(), 0.1 * max(w[i].norm().item(), 1e-3)
        if size > limit:
            expected[i] *= limit / size
            clipped += 1
    w.grad = g.clone()
    share = clip_grad_agc_(w, clipping=0.1)
    torch.testing.assert_close(w.grad, expected, rtol=1e-12, atol=0)
    assert share == pytest.approx(clipped / 40)
    assert 5 < clipped < 35
    again = w.grad.clone()
    assert clip_grad_agc_(w, clipping=0.1 * (1 + 1e-12)) == 0
    assert torch.equal(w.grad, again)


def test_a_module_or_groups_exempt_the_classifier() -> None:
    """A module finds its classifier by name; groups say it with None."""
    model = normfree.create_model("nfnet_tiny", 5)
    for p in model.parameters():
        p.grad = torch.full_like(p, 100.0)
    clip_grad_agc_(model, clipping=0.01)
    assert model.fc.weight.grad is not None
    assert torch.equal(model.fc.weight.grad, torch.full_like(model.fc.weight, 100.0))
    for name, p in model.named_parameters():
        if name != "fc.weight":
            assert p.grad is not None
            assert (unit_norms(p.grad) <= 0.01 * unit_norms(p).clamp_min(1e-3) * 1.00001).all(), name
    a, b = (nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    a.grad, b.grad = torch.ones(3, 2), torch.ones(3, 2)
    groups: list[dict[str, Any]] = [{"params": a, "clipping": None}, {"params": [b]}]
    clip_grad_agc_(groups, clipping=0.5)
    assert torch.equal(a.grad, torch.ones(3, 2))
    torch.testing.assert_close(b.grad, torch.full((3, 2), 0.5))


def test_clipping_manners() -> None:
    """Missing gradients are passed over; sparse ones and nonsense are refused."""
    assert clip_grad_agc_([nn.Parameter(torch.ones(2))]) == 0
    table = nn.Embedding(4, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        clip_grad_agc_(table.parameters())
    with pytest.raises(ValueError, match="positive"):
        clip_grad_agc_([], clipping=0)


def test_low_precision_gradients_are_clipped_in_float32() -> None:
    """A float16 gradient whose square overflows is still clipped to the right length."""
    w = nn.Parameter(torch.ones(2, 64, dtype=torch.float16))
    w.grad = torch.full((2, 64), 1000.0, dtype=torch.float16)
    clip_grad_agc_(w, clipping=0.5)
    torch.testing.assert_close(unit_norms(w.grad), torch.full((2, 1), 4.0), rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", ["nfnet_f0", "nfnet_tiny"])
def test_every_parameter_is_in_exactly_one_group(name: str) -> None:
    """Gains and biases undecayed, the classifier's weight unclipped, all of the rest both."""
    with torch.device("meta"):
        model = normfree.create_model(name)
    groups = param_groups(model, weight_decay=0.5, clipping=0.25)
    names = [n for g in groups for n in g["names"]]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    gains, classifier, weights = groups
    assert (gains["weight_decay"], gains["clipping"]) == (0.0, 0.25)
    assert all("gain" in n or "bias" in n for n in gains["names"])
    assert (classifier["names"], classifier["weight_decay"], classifier["clipping"]) == (["fc.weight"], 0.5, None)
    assert (weights["weight_decay"], weights["clipping"]) == (0.5, 0.25)
    assert all(n.endswith("weight") for n in weights["names"])
    assert any("squeeze_excite.fc0.weight" in n for n in weights["names"])


def test_groups_of_a_foreign_network() -> None:
    """Norm layers are gains, (C, 1, 1, 1) gains too, a one-output linear weight is a weight; names can be given."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.scale = nn.Parameter(torch.ones(4, 1, 1, 1))
            self.one, self.out = nn.Linear(4, 1), nn.Linear(4, 7)

    net = Net()
    found = {n: g for g in param_groups(net, classifier="out") for n in g["names"]}
    assert found["norm.weight"]["weight_decay"] == 0
    assert found["scale"]["weight_decay"] == 0
    assert found["one.weight"]["weight_decay"] > 0
    assert found["out.weight"]["clipping"] is None
    assert all(g["clipping"] is not None for g in param_groups(net))  # no name that we know: nothing is exempt
    with pytest.raises(ValueError, match="head"):
        param_groups(net, classifier="head")


def test_plain_sgd_is_torchs() -> None:
    """Without clipping the optimizer is torch.optim.SGD, with and without Nesterov."""
    for nesterov in (True, False):
        torch.manual_seed(0)
        a = nn.Linear(5, 4)
        b = copy.deepcopy(a)
        settings = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01, "nesterov": nesterov}
        ours = AGCSGD(a.parameters(), clipping=None, **settings)  # type: ignore[arg-type]
        theirs = torch.optim.SGD(b.parameters(), **settings)  # type: ignore[arg-type]
        for _ in range(5):
            x = torch.randn(8, 5)
            for model, optimizer in ((a, ours), (b, theirs)):
                optimizer.zero_grad()
                model(x).square().sum().backward()
                optimizer.step()
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_the_optimizer_is_a_torch_optimizer() -> None:
    """Schedulers drive it, its state round-trips, groups can be added, a closure is called, gradients are kept."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = AGCSGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, WarmupCosine(1.0, 10, 2))
    assert optimizer.param_groups[0]["lr"] == 0

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 3)).square().sum()
        loss.backward()
        return float(loss.detach())

    first = optimizer.step(closure)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    gradient = model.weight.grad
    assert gradient is not None
    kept = gradient.clone()
    optimizer.step()
    assert torch.equal(gradient, kept)
    assert optimizer.step(closure) < first

    other = copy.deepcopy(model)
    again = AGCSGD(other.parameters(), lr=0.1)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.weight.grad, other.bias.grad = kept.clone(), torch.ones(2)
    model.weight.grad, model.bias.grad = kept.clone(), torch.ones(2)
    again.step()
    optimizer.step()
    assert torch.equal(other.weight, model.weight)
    extra = nn.Parameter(torch.ones(2, 2))
    optimizer.add_param_group({"params": [extra], "clipping": None})
    extra.grad = torch.ones(2, 2)
    optimizer.step()
    assert not torch.equal(extra, torch.ones(2, 2))
    with pytest.raises(ValueError, match="lr=-1"):
        AGCSGD(model.parameters(), lr=-1)


def test_a_zero_initialised_parameter_moves_by_eps() -> None:
    """A clipped step moves SkipInit by lr lambda eps, plus momentum: facts that short runs hang on."""
    p = nn.Parameter(torch.zeros(1))
    optimizer = AGCSGD([p], lr=1.0, momentum=0.0, nesterov=False, clipping=0.1)
    p.grad = torch.tensor([-5.0])
    optimizer.step()
    assert p.item() == pytest.approx(0.1 * 1e-3)


def test_the_average_starts_at_the_weights_and_warms_up() -> None:
    """Decays 1/10, 2/11, ..; then the cap; integer buffers are copied; the module never trains."""
    linear, norm = nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1)
    model = nn.Sequential(linear, norm)
    nn.init.ones_(linear.weight)
    ema = EMA(model, decay=0.15)
    assert [ema.decay_at(t) for t in (0, 1)] == [0.1, 0.15]
    assert EMA(model).decay_at(10**7) == 0.99999
    nn.init.constant_(linear.weight, 2.0)
    model(torch.ones(4, 1))
    ema.update(model)
    averages = ema.module.state_dict()
    assert averages["0.weight"].item() == pytest.approx(0.1 * 1 + 0.9 * 2)
    assert averages["1.num_batches_tracked"] == 1
    assert not ema.module.training
    assert not any(p.requires_grad for p in ema.module.parameters())


@pytest.mark.parametrize("decay", [0.99999, 0.2])
def test_batch_norms_averages_are_averaged_as_the_weights(decay: float) -> None:
    """A moving average of the moving averages, as EfficientNet has it: e += (1 - d) (b - e), d = (1 + t) / (10 + t)."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)).double()
    ema = EMA(model, decay)
    expected = {n: t.clone() for n, t in model.state_dict().items()}
    for t in range(4):
        model(2 + 3 * torch.randn(5, 3, 6, 6, dtype=torch.float64))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        ema.update(model)
        d = min(decay, (1 + t) / (10 + t))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] = expected[name] + (1 - d) * (value - expected[name])
            torch.testing.assert_close(
                ema.module.state_dict()[name],
                expected[name] if value.is_floating_point() else value,
                rtol=1e-12,
                atol=0,
            )
    averages = dict(ema.module.named_buffers())
    assert averages["1.num_batches_tracked"] == 4
    assert not torch.allclose(averages["1.running_mean"], dict(model.named_buffers())["1.running_mean"], rtol=1e-3)


# Units of other layers, overrides, SAM


def _unit_norms_by_hand(layer: nn.Module, x: Tensor) -> Tensor:
    """The norm over the fan-in of each output, spread over the shape of x; by loops."""
    out = torch.empty_like(x)
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        rows = x.shape[0] // layer.groups
        for g in range(layer.groups):
            for o in range(x.shape[1]):
                out[g * rows : (g + 1) * rows, o] = x[g * rows : (g + 1) * rows, o].norm()
        return out
    for i in range(len(x)):
        out[i] = x[i].norm()
    return out


LAYERS: list[tuple[nn.Module, str]] = [
    (nn.Linear(5, 7), "weight"),
    (nn.Bilinear(3, 4, 5), "weight"),
    (nn.Conv1d(4, 6, 3, groups=2), "weight"),
    (nn.Conv3d(2, 3, 2), "weight"),
    (nn.ConvTranspose1d(4, 6, 3), "weight"),
    (nn.ConvTranspose2d(6, 8, 3, groups=2), "weight"),
    (nn.ConvTranspose3d(4, 4, 2, groups=4), "weight"),
    (nn.MultiheadAttention(8, 2), "in_proj_weight"),
    (nn.LSTM(3, 4), "weight_hh_l0"),
    (nn.Embedding(9, 4), "weight"),
]


@pytest.mark.parametrize(("layer", "name"), LAYERS, ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else v)
def test_the_units_of_every_layer(layer: nn.Module, name: str) -> None:
    """An output and its fan-in, for each kind of layer; other parameters of it as a whole or by rows."""
    torch.manual_seed(0)
    p = layer.get_parameter(name)
    gradients = {n: torch.randn_like(q) * torch.rand_like(q) for n, q in layer.named_parameters()}
    for n, q in layer.named_parameters():
        q.grad = gradients[n].clone()
    share = clip_grad_agc_(layer, clipping=0.9)
    size, limit = _unit_norms_by_hand(layer, gradients[name]), 0.9 * _unit_norms_by_hand(layer, p.detach())
    expected = torch.where(size > limit, gradients[name] * limit / size, gradients[name])
    assert p.grad is not None
    torch.testing.assert_close(p.grad, expected)
    assert 0 <= share <= 1


def test_parameters_without_gradient_are_passed_over_and_sparse_ones_refused() -> None:
    """None is no error; a sparse gradient is one, and says what to do."""
    layer = nn.Linear(2, 2)
    assert clip_grad_agc_(layer) == 0
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse=False"):
        clip_grad_agc_(embedding)
    with pytest.raises(ValueError, match="sparse=False"):
        AGCSGD(embedding.parameters(), lr=0.1).step()


def test_lambda_by_pattern() -> None:
    """Later patterns win, over the classifier's exemption too; one that matches nothing is an error."""
    model = normfree.create_model("nfnet_tiny", 5)
    overrides = {"stem.*": None, "stem.0.*": 0.5, "fc.weight": 0.25}
    groups = param_groups(model, weight_decay=1e-4, clipping=0.1, overrides=overrides)
    found = {n: g["clipping"] for g in groups for n in g["names"]}
    assert found["stem.1.weight"] is None
    assert found["stem.1.gain"] is None
    assert found["stem.0.gain"] == 0.5
    assert found["fc.weight"] == 0.25
    assert found["blocks.0.conv0.weight"] == 0.1
    assert len(found) == len(list(model.parameters()))
    with pytest.raises(ValueError, match="no parameter matches 'sten"):
        param_groups(model, overrides={"sten.*": None})


def test_the_optimizer_says_what_it_clipped_by_name() -> None:
    """Each tensor's count; their sum is the total; the classifier's weight is not among them."""
    torch.manual_seed(1)
    model = normfree.create_model("nfnet_tiny", 5)
    optimizer = AGCSGD(param_groups(model, clipping=0.01), lr=0.1)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    by_hand = {}
    for name, p in model.named_parameters():
        assert p.grad is not None
        by_hand[name] = int((unit_norms(p.grad) > 0.01 * unit_norms(p).clamp_min(1e-3)).sum())
    optimizer.step()
    names, clipped, units = optimizer.clipped_by_name()
    assert set(names) == set(by_hand) - {"fc.weight"}
    assert clipped.tolist() == [by_hand[n] for n in names]
    total, all_units = optimizer.clipped_units()
    assert (int(total), all_units) == (sum(clipped.tolist()), sum(units))
    assert 0 < int(total) < all_units


def _quadratic(p: Tensor) -> Tensor:
    return (p**4).sum() + (p[0] * p[1]).sum()


def test_sam_takes_the_gradient_at_the_ascent_point() -> None:
    """w + rho g / |g| over all weights, in float64; the weights come back to the bit, gradients are the descent's."""
    torch.manual_seed(2)
    ps = [nn.Parameter(torch.randn(3, 4, dtype=torch.float64)) for _ in range(2)]
    before = [p.detach().clone() for p in ps]
    gradients = torch.autograd.grad(sum(_quadratic(p) for p in ps), ps)  # type: ignore[arg-type]
    norm = sum(g.square().sum() for g in gradients) ** 0.5
    there = [(w + 0.3 * g / norm).requires_grad_() for w, g in zip(before, gradients, strict=True)]
    expected = torch.autograd.grad(sum(_quadratic(p) for p in there), there)  # type: ignore[arg-type]
    for p in ps:
        p.grad = torch.ones_like(p)  # of an earlier part of the batch
    sam = normfree.SAM(ps, rho=0.3)
    with sam.ascent():
        assert all(p.grad is None for p in ps)
        sum(_quadratic(p) for p in ps).backward()  # type: ignore[union-attr]
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in ps if p.grad is not None)
    for p, w in zip(ps, there, strict=True):
        torch.testing.assert_close(p.detach(), w.detach(), rtol=1e-12, atol=0)
    with sam.descent():
        sum(_quadratic(p) for p in ps).backward()  # type: ignore[union-attr]
    for p, w, g in zip(ps, before, expected, strict=True):
        assert torch.equal(p.detach(), w)
        assert p.grad is not None
        torch.testing.assert_close(p.grad, 1 + g, rtol=1e-10, atol=1e-12)


def test_sam_restores_after_an_error_and_refuses_the_wrong_order() -> None:
    """An exception in the descent leaves the weights as they were, also where they had become NaN."""
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    sam = normfree.SAM([p])
    with pytest.raises(RuntimeError, match="follows an ascent"), sam.descent():
        pass
    with pytest.raises(RuntimeError, match="no gradient"), sam.ascent():
        pass
    with sam.ascent():
        (p * float("nan")).sum().backward()
    assert p.isnan().all()
    with pytest.raises(RuntimeError, match="already"), sam.ascent():
        pass
    with pytest.raises(KeyError), sam.descent():
        raise KeyError
    assert p.tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="rho"):
        normfree.SAM([p], rho=0.0)


def test_sams_ascent_never_reaches_the_momentum() -> None:
    """One step with a linear loss, whose gradient is the same everywhere, equals the step without SAM."""
    w = torch.randn(4, generator=torch.Generator().manual_seed(3))
    a, b = nn.Parameter(w.clone()), nn.Parameter(w.clone())
    plain, sharp = (AGCSGD([p], lr=0.1, clipping=None, weight_decay=0.01) for p in (a, b))
    sam = normfree.SAM([b])
    for _ in range(3):
        a.grad = b.grad = None
        a.sum().backward()
        plain.step()
        with sam.ascent():
            (100 * b).sum().backward()
        with sam.descent():
            b.sum().backward()
        sharp.step()
        assert torch.equal(a, b)
        assert torch.equal(plain.momentum(a), sharp.momentum(b))


@pytest.mark.parametrize("name", ["fc", "classifier.1", "head.fc", "heads.head"])
def test_the_classifier_is_found_where_others_put_it(name: str) -> None:
    """The last linear layer that is called, or is inside of what is called, fc, head or classifier."""
    model = nn.Sequential()
    model.add_module("features", nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    parent: nn.Module = model
    for part in name.split(".")[:-1]:
        parent.add_module(part, nn.Sequential(nn.ReLU()))
        parent = parent.get_submodule(part)
    parent.add_module(name.rpartition(".")[2], nn.Linear(4, 3))
    exempt = [n for g in param_groups(model) if g["clipping"] is None for n in g["names"]]
    assert exempt == [f"{name}.weight"]


def test_the_average_goes_on_from_its_state() -> None:
    """Weights and the count of updates, which the decay depends on."""
    torch.manual_seed(4)
    model = nn.Linear(3, 2)
    ema = EMA(model)
    for _ in range(3):
        nn.init.normal_(model.weight)
        ema.update(model)
    other = EMA(nn.Linear(3, 2))
    other.load_state_dict(ema.state_dict())
    for average in (ema, other):
        average.update(model)
    assert other.updates == 4
    assert torch.equal(other.module.weight, ema.module.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("clipping", [0.0, -0.01, math.nan])
def test_a_lambda_must_be_positive_wherever_it_stands(clipping: float) -> None:
    """0 does not exempt, None does: as an argument, by pattern, in a group, and in one that is added."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    for make in (
        lambda: param_groups(model, clipping=clipping),
        lambda: param_groups(model, overrides={"0.*": clipping}),
        lambda: AGCSGD([{"params": list(model.parameters()), "clipping": clipping}], lr=0.1),
        lambda: AGCSGD(model[0].parameters(), lr=0.1).add_param_group(
            {"params": [model[1].weight], "clipping": clipping}
        ),
    ):
        with pytest.raises(ValueError, match="positive"):
            make()


def test_the_classifier_is_exempt_whatever_parametrizes_it() -> None:
    """Under weight or spectral norm, or as a convolution of single pixels."""
    normed = nn.ModuleDict(
        {"body": nn.Linear(3, 4), "fc": torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))}
    )
    pixels = nn.ModuleDict({"body": nn.Conv2d(3, 4, 3), "classifier": nn.Conv2d(4, 2, 1)})
    for model, head in ((normed, "fc."), (pixels, "classifier.")):
        for group in param_groups(model):
            for name in group["names"]:
                exempt = name.startswith(head) and "bias" not in name and "original0" not in name
                assert (group["clipping"] is None) == exempt, name


def test_an_optimizer_can_be_copied_and_pickled() -> None:
    """With its momentum; what the last step clipped stays behind."""
    model = nn.Linear(3, 2)
    optimizer = AGCSGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.clipped_units()[1] == 0
        for p, q in zip(optimizer.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
            assert torch.equal(optimizer.momentum(p), other.momentum(q))


def test_sam_under_one_autocast() -> None:
    """Autocast keeps copies of weights in low precision; they are forgotten when the weights move."""
    gradients = []
    for nested in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        x = torch.randn(4, 8)
        sam = SAM(model.parameters(), rho=2.0)
        with torch.autocast("cpu", torch.bfloat16) if nested else nullcontext():
            with sam.ascent(), nullcontext() if nested else torch.autocast("cpu", torch.bfloat16):
                model(x).square().mean().backward()
            with sam.descent(), nullcontext() if nested else torch.autocast("cpu", torch.bfloat16):
                model(x).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))

"""Every family against the authors' code and timm, on fixtures that those made; weights go through our converters."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from authors import images, load
from normfree.models import Network, NetworkConfig, create_model
from normfree.models import block as block_module
from normfree.models.block import Block
from normfree.models.exchange import from_haiku, from_timm, haiku_name, take_constants, timm_name, to_haiku, to_timm
from normfree.models.families import MODELS, regnet_config
from normfree.models.fold import fold
from normfree.models.propagation import measure
from normfree.nn.conv import WSConv2d


def _narrow(name: str, variant: dict[str, Any], channels: tuple[int, ...], **changes: Any) -> NetworkConfig:
    return replace(MODELS[name], widths=channels, depths=tuple(variant["depth"]), num_classes=10, **changes)


def _nfnet(variant: dict[str, Any], **changes: Any) -> NetworkConfig:
    widths = tuple(variant["width"])
    return _narrow(
        "nfnet_f0",
        variant,
        widths,
        stem_widths=(16, 32, 64, widths[0] // 2),
        group_width=tuple(variant["group_width"]),
        final_width=2 * widths[-1],
        **changes,
    )


def _cases() -> dict[str, tuple[str, str, NetworkConfig]]:
    """Name -> (file, prefix of its keys, our configuration)."""
    about = {f: load(f)[1]["config"] for f in ("authors_nf_resnet", "authors_nf_regnet", "authors_nfnet_options")}
    resnet = about["authors_nf_resnet"]["variant"]
    narrow = (16, 32, 64, 128)
    regnet = about["authors_nf_regnet"]["variant"]
    options = about["authors_nfnet_options"]["variants"]
    stages = options["stages"]
    return {
        "nf_resnet": ("authors_nf_resnet", "", _narrow("nf_resnet50", resnet, narrow, stem_widths=(4,))),
        "bn_resnet": ("authors_bn_resnet", "", _narrow("bn_resnet50", resnet, narrow, stem_widths=(4,))),
        "nf_regnet": (
            "authors_nf_regnet",
            "",
            replace(regnet_config(tuple(regnet["width"]), tuple(regnet["depth"]), 32, 40, 0.2), num_classes=10),
        ),
        "one_conv": ("authors_nfnet_options", "one_conv/", _nfnet(options["one_conv"], second_conv=False)),
        "stages": (
            "authors_nfnet_options",
            "stages/",
            _nfnet(
                stages,
                expansion=tuple(stages["expansion"]),
                expand_from=tuple("out" if big else "in" for big in stages["big_width"]),
            ),
        ),
    }


CASES = _cases()


def _tree(tensors: dict[str, Tensor], *prefixes: str) -> dict[str, dict[str, Any]]:
    tree: dict[str, dict[str, Any]] = {}
    for prefix in prefixes:
        for key, tensor in tensors.items():
            if key.startswith(prefix):
                module, _, name = key.removeprefix(prefix).rpartition("/")
                tree.setdefault(module, {})[name] = tensor.numpy()
    return tree


def authors(case: str) -> tuple[Network, dict[str, Tensor]]:
    """Our network with the authors' weights, in evaluation mode, and the fixture without its prefix."""
    file, prefix, config = CASES[case]
    tensors = {k.removeprefix(prefix): t for k, t in load(file)[0].items() if k.startswith(prefix)}
    model = Network(config)
    theirs = from_haiku(_tree(tensors, "params/", "state/"))
    wanted = [n for n in model.state_dict() if not n.endswith("num_batches_tracked")]
    model.load_state_dict({n: theirs[haiku_name(n, config)] for n in wanted}, strict=False)
    used = {haiku_name(n, config) for n in wanted}
    assert {n for n in theirs if n not in used} == {n for n in theirs if n.endswith(("/counter", "/hidden"))}
    return model.eval(), tensors


def _close(ours: Tensor, theirs: Tensor, rtol: float) -> None:
    """Relative to the size of the whole tensor: what a sum of many terms can promise."""
    assert ours.shape == theirs.shape
    assert (ours.double() - theirs.double()).norm() <= rtol * theirs.double().norm()


@pytest.mark.parametrize("size", ["even", "odd"])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_features_equal_the_authors(case: str, size: str) -> None:
    """At an even and an odd size that is not square; every gain, bias and SkipInit random."""
    model, tensors = authors(case)
    x = images(tensors[f"input/{size}"])
    _close(model(x), tensors[f"logits/{size}"], 1e-5)
    _close(model.forward_features(x).mean((2, 3)), tensors[f"pool/{size}"], 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_input_gradients_equal_the_authors(case: str) -> None:
    """Of a random combination of the logits."""
    model, tensors = authors(case)
    x = images(tensors["input/even"]).requires_grad_()
    (model(x) * tensors["cotangent/even"]).sum().backward()
    assert x.grad is not None
    _close(x.grad, images(tensors["grad/input/even"]), 1e-4)


@pytest.mark.parametrize("case", CASES)
def test_the_signal_of_every_block_equals_the_authors(case: str) -> None:
    """The three numbers of signal propagation, at the odd size."""
    model, tensors = authors(case)
    for i, signal in enumerate(measure(model, images(tensors["input/odd"]))):
        assert signal.mean_square == pytest.approx(tensors[f"metrics/avg_sq_mean_{i}"].item(), rel=1e-4)
        assert signal.variance == pytest.approx(tensors[f"metrics/avg_var_{i}"].item(), rel=1e-4)
        if i:
            assert signal.residual == pytest.approx(tensors[f"metrics/res_avg_var_{i - 1}"].item(), rel=1e-4)
        else:
            assert signal.residual is None


def test_batch_norm_in_training_equals_the_authors() -> None:
    """Logits from the statistics of the batch. (The running statistics are torch's: the variance unbiased.)"""
    model, tensors = authors("bn_resnet")
    _close(model.train()(images(tensors["input/even"])), tensors["logits/train"], 1e-4)


@pytest.mark.parametrize("case", CASES)
def test_weights_go_to_the_authors_and_back(case: str) -> None:
    """The tree that we write is the fixture's, to the bit, in its names, shapes and layouts; averages of norms too."""
    model, tensors = authors(case)
    averages = {k: t for k, t in tensors.items() if not k.endswith(("/counter", "/hidden"))}
    ours, theirs = to_haiku(model), _tree(averages, "params/", "state/")
    assert {(m, n) for m in ours for n in ours[m]} == {(m, n) for m in theirs for n in theirs[m]}
    for module, parameters in theirs.items():
        for name, array in parameters.items():
            assert ours[module][name].shape == array.shape
            assert (ours[module][name] == array).all()


def _timm_config(fixture: str, name: str) -> NetworkConfig:
    v = load(fixture)[1]["config"]
    config = replace(
        MODELS[name],
        widths=tuple(v["channels"]),
        depths=tuple(v["depths"]),
        group_width=(v["group_size"] or 0,),
        num_classes=10,
    )
    stem = v["stem_chs"]
    if v["stem_type"] == "7x7_pool":
        return replace(config, stem_widths=(stem,))
    return replace(config, stem_widths=(stem // 8, stem // 4, stem // 2, stem), final_width=v["num_features"])


TIMM = {
    "timm_dm_nfnet": "nfnet_f0",
    "timm_nf_resnet": "timm_nf_resnet50",
    "timm_nfnet_l0": "timm_nfnet_l0",
}


def timm(fixture: str) -> tuple[Network, dict[str, Tensor], dict[str, Tensor]]:
    """Our network with timm's weights, timm's state dict, the fixture."""
    tensors = load(fixture)[0]
    model = Network(_timm_config(fixture, TIMM[fixture])).eval()
    state = {k.removeprefix("state/"): t for k, t in tensors.items() if k.startswith("state/")}
    ours = from_timm(state, model)
    take_constants(ours, model)
    names = {n: timm_name(n, model.config) for n in model.state_dict()}
    assert set(names.values()) == ours.keys()
    model.load_state_dict({n: ours[t] for n, t in names.items()})
    return model, state, tensors


@pytest.mark.parametrize("size", ["even", "odd"])
@pytest.mark.parametrize("fixture", ["timm_nf_resnet", "timm_nfnet_l0"])
def test_timms_own_networks_compute_the_same(fixture: str, size: str) -> None:
    """gamma, eps and the missing SkipInit moved into the weights."""
    model, _, tensors = timm(fixture)
    x = tensors[f"input/{size}"]
    _close(model(x), tensors[f"logits/{size}"], 1e-5)
    _close(model.forward_features(x) / model.gamma, tensors[f"features/{size}"], 1e-5)


@pytest.mark.parametrize("size", ["even", "odd"])
def test_what_timm_changes_in_the_authors_networks(size: str) -> None:
    """dm_nfnet: the added eps and the exact GELU, and nothing else. With both put in, the logits agree."""
    model, _, tensors = timm("timm_dm_nfnet")
    x, theirs = tensors[f"input/{size}"], tensors[f"logits/{size}"]
    plain = model(x)
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, WSConv2d):
            w = module.weight.detach().flatten(1)
            variance, n = w.var(1, correction=0), w.shape[1]
            with torch.no_grad():
                module.gain.mul_(((variance * n).clamp_min(1e-4) / (variance * n + n * 1e-5)).sqrt())
    eps = other(x)
    for module in other.modules():
        if isinstance(module, (Network, Block)):
            module.act = torch.nn.functional.gelu
    both = other(x)
    _close(both, theirs, 1e-5)
    assert (plain - theirs).norm() > 10 * (eps - theirs).norm() > 100 * (both - theirs).norm()


@pytest.mark.parametrize("fixture", TIMM)
def test_weights_go_to_timm_and_back(fixture: str) -> None:
    """The state dict that we write is timm's, in its names and shapes; exact where no constant moves."""
    model, state, _ = timm(fixture)
    ours = to_timm(model)
    assert ours.keys() == state.keys()
    for name, tensor in state.items():
        assert ours[name].shape == tensor.shape
        torch.testing.assert_close(ours[name], tensor, rtol=0 if fixture == "timm_dm_nfnet" else 1e-6, atol=0)


@pytest.mark.parametrize("size", ["even", "odd"])
def test_a_folded_twin_has_the_logits_of_the_authors(size: str) -> None:
    """Norms behind convolutions are merged into them; those on the stream stay; twice is as once."""
    model, tensors = authors("bn_resnet")
    folded = fold(model)
    x = images(tensors[f"input/{size}"])
    _close(folded(x), tensors[f"logits/{size}"], 1e-5)
    left = [n for n, m in folded.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert left == [f"blocks.{i}.norm0" for i in range(6)] + ["final_norm"]
    assert torch.equal(fold(folded)(x), folded(x))


def test_samples_that_skip_a_block_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, one by one: the survivors alone go through, outputs and gradients are those of the mask in the gate."""
    model = create_model("nfnet_tiny", 3, skip_init=0.7, stochastic_depth=0.5).train()
    block: Any = model.blocks[1]
    x = torch.randn(5, block.conv0.in_channels, 6, 6)
    seen: list[int] = []
    block.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    for keep in (torch.tensor([1.0, 0, 0, 1, 0]), torch.zeros(5), torch.ones(5)):
        results = []
        for whole in (False, True):
            monkeypatch.setattr(block_module, "is_eager_on_cpu", lambda _, whole=whole: not whole)
            block.zero_grad()
            out = block(x, keep)
            out.square().sum().backward()
            results.append((out, [p.grad.clone() for p in block.parameters() if p.grad is not None]))
        assert seen[-2:] == [int(keep.sum()), 5]
        (skipped, some), (masked, all_of) = results
        assert len(some) == len(all_of) == len(list(block.parameters()))
        torch.testing.assert_close(skipped, masked)
        torch.testing.assert_close(some, all_of, rtol=1e-4, atol=1e-5)

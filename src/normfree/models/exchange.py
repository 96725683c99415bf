"""Names and layouts of other people's weights: the authors' Haiku trees, and timm's state dicts.

One function a format says what each of our tensors is called there; reading and writing both follow from it.

timm's own networks (`timm_nf_resnet50`, `timm_nfnet_l0`) are the same functions with constants in other places, which
can be moved exactly: every one of its convolutions is multiplied by gamma, the first and the final one included, and
the activation before the classifier is not; eps is added to the variance of the weights instead of being its floor; the
SkipInit gain is absent. Its `dm_nfnet_*` are the authors' weights, and are read as such.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from normfree.config import UserError
from normfree.models.families import MODELS, NetworkConfig
from normfree.models.network import Network
from normfree.models.unpickle import Tree
from normfree.nn.conv import WSConv2d

State = dict[str, Tensor]

_HAIKU_LEAVES = {"weight": "w", "bias": "b", "gain": "gain", "skip_gain": "skip_gain"}
_HAIKU_BLOCKS = {"ResNet": "res_block_v2", "NF_ResNet": "nf_res_block", "NF_RegNet": "nf_block", "NFNet": "nf_block"}
_HAIKU_NORM = {
    "weight": "scale",
    "bias": "offset",
    "running_mean": "~/mean_ema/average",
    "running_var": "~/var_ema/average",
}
_HAIKU_MODULES = {
    "fc": "linear",
    "squeeze_excite.fc0": "squeeze_excite/~/linear",
    "squeeze_excite.fc1": "squeeze_excite/~/linear_1",
    "norm0": "bn0",
    "norm1": "bn1",
    "norm2": "bn2",
    "final_norm": "final_bn",
}


# What the authors' classes leave no choice in, and timm's networks beside that.
_FIXED: tuple[str, ...] = (
    *("strides", "stem", "stem_pool", "stem_kernel", "stem_strides", "pointwise_groups", "shortcut", "squeeze"),
    *("beta_first", "norm", "final", "padding", "ws_eps", "first_expansion"),
)
_FIXED_BY_TIMM = (*_FIXED, "second_conv", "expand_from", "alpha", "activation")


def authors_build(config: NetworkConfig) -> bool:
    """Whether the authors' code has the network."""
    family = {"ResNet": "bn_resnet50", "NF_ResNet": "nf_resnet50", "NF_RegNet": "nf_regnet_b0", "NFNet": "nfnet_f0"}
    return _agree(config, MODELS[family[haiku_root(config)]], _FIXED)


def timm_builds(config: NetworkConfig) -> bool:
    """Whether timm's code has the network: as dm_nfnet_*, or as what is called timm_* here."""
    return any(_agree(config, MODELS[n], _FIXED_BY_TIMM) for n in ("nfnet_f0", "timm_nfnet_l0", "timm_nf_resnet50"))


def _agree(a: NetworkConfig, b: NetworkConfig, fields: tuple[str, ...]) -> bool:
    return all(getattr(a, f) == getattr(b, f) for f in fields)


def haiku_root(config: NetworkConfig) -> str:
    """The class of the authors' code that builds the network."""
    if config.stem_pool:
        return "ResNet" if config.norm == "batch" else "NF_ResNet"
    return "NF_RegNet" if config.squeeze == "inner" else "NFNet"


def haiku_name(ours: str, config: NetworkConfig) -> str:
    """'blocks.3.squeeze_excite.fc1.weight' -> 'NFNet/~/nf_block_3/~/squeeze_excite/~/linear_1/w'."""
    root = haiku_root(config)
    parts, (rest, _, leaf) = [root], ours.replace(".skip.", ".").rpartition(".")
    block = re.fullmatch(r"blocks\.(\d+)(?:\.(.+))?", rest)
    if block:
        index, rest = int(block[1]), block[2] or ""
        parts.append(_HAIKU_BLOCKS[root] + (f"_{index}" if index else ""))
    if rest.startswith("stem."):
        rest = f"stem_conv{rest[5:]}" if len(config.stem_widths) > 1 else "initial_conv"
    if rest:
        parts.append(_HAIKU_MODULES.get(rest, rest))
    if "norm" in rest:
        leaf = _HAIKU_NORM[leaf]
    elif not ("conv" in rest and leaf == "bias"):  # a convolution's is "bias", a linear layer's "b"
        leaf = _HAIKU_LEAVES[leaf]
    return "/~/".join(parts) + "/" + leaf


def timm_name(ours: str, config: NetworkConfig) -> str:
    """'blocks.3.squeeze_excite.fc1.weight' -> 'stages.2.0.attn_last.fc2.weight'."""
    name = ours
    block = re.match(r"blocks\.(\d+)\.", ours)
    if block:
        stage, index = 0, int(block[1])
        while index >= config.depths[stage]:
            index -= config.depths[stage]
            stage += 1
        name = f"stages.{stage}.{index}.{ours[block.end() :]}"
        for old, new in (
            ("conv2.", "conv3."),
            ("conv1.", "conv2."),
            ("conv1b.", "conv2b."),
            ("conv0.", "conv1."),
            ("conv_shortcut.", "downsample.conv."),
            ("squeeze_excite.fc1.", "attn_last.fc2."),
            ("squeeze_excite.fc0.", "attn_last.fc1."),
            ("skip.skip_gain", "skipinit_gain"),
        ):
            if f".{old}" in name:
                return name.replace(f".{old}", f".{new}")
    if name.startswith("stem."):
        _, number, leaf = name.split(".")
        return f"stem.conv{int(number) + 1 if len(config.stem_widths) > 1 else ''}.{leaf}"
    return f"head.{name}" if name.startswith("fc.") else name


def from_haiku(tree: Tree) -> State:
    """The tensors of a tree by 'module/parameter', in our layouts: HWIO -> OIHW, IO -> OI, a scalar -> one element."""
    found = {}
    for module, parameters in tree.items():
        for name, array in parameters.items():
            # a copy, in this machine's byte order: the file's bytes are read-only
            tensor = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
            if tensor.ndim == 4 and tensor.shape[:3] == (1, 1, 1):  # batch norm's statistics, (1, 1, 1, C)
                tensor = tensor.flatten()
            elif tensor.ndim == 4:
                tensor = tensor.permute(3, 2, 0, 1)
            elif tensor.ndim == 2:
                tensor = tensor.T
            if f"{module}/{name}" in found:
                raise UserError(f"two arrays are called {module}/{name}")
            found[f"{module}/{name}"] = tensor.reshape(1) if tensor.ndim == 0 else tensor.contiguous()
    return found


def to_haiku(model: Network) -> Tree:
    """The tree of parameters, as the authors' code takes it; averages of batch norm too, which are its `state` there.

    Raises:
        UserError: their code has no such network.
    """
    if model.folded or not authors_build(model.config):
        raise UserError("the authors' code has no such network, so it could not take these weights")
    tree: Tree = {}
    for ours, tensor in model.state_dict().items():
        if ours.endswith("num_batches_tracked"):
            continue
        module, _, name = haiku_name(ours, model.config).rpartition("/")
        tensor = tensor.detach().float().cpu()
        if tensor.ndim == 4:
            tensor = tensor.permute(2, 3, 1, 0)
        elif tensor.ndim == 2:
            tensor = tensor.T
        elif name == "skip_gain":
            tensor = tensor.reshape(())
        elif name in ("scale", "offset", "average"):
            tensor = tensor.view(1, 1, 1, -1)
        tree.setdefault(module, {})[name] = np.array(tensor.numpy(), order="C")
    return tree


def from_timm(state: Mapping[str, Tensor], model: Network) -> State:
    """Timm's tensors by their names, in our layouts; with its constants moved, for the networks that are its own."""
    found = {}
    for name, tensor in state.items():
        if name.endswith(".gain"):
            tensor = tensor.flatten()
        elif ".attn_last." in name and name.endswith(".weight"):
            tensor = tensor.flatten(1)
        found[name] = tensor.reshape(1) if tensor.ndim == 0 else tensor
    if model.config.padding == "symmetric":
        for name in model.state_dict():
            if name.endswith(".skip_gain"):
                found[timm_name(name, model.config)] = torch.ones(1)
    return found


def take_constants(state: State, model: Network) -> None:
    """Move timm's constants to where ours are, in tensors by timm's names that fit the model; in place."""
    if model.config.padding == "symmetric":
        _move_constants(state, model, towards_ours=True)


def to_timm(model: Network) -> State:
    """The state dict as timm's network of that name takes it: dm_nfnet_* for NFNets.

    Raises:
        UserError: timm's code has no such network, or no place for a SkipInit gain that is not 1.
    """
    config = model.config
    if model.folded or not timm_builds(config):
        raise UserError("timm's code has no such network; it has the NFNets and what is called timm_* here")
    state = {timm_name(n, config): t.detach().clone() for n, t in model.state_dict().items()}
    if config.padding == "symmetric":
        _move_constants(state, model, towards_ours=False)
        for name in [n for n in state if n.endswith("skipinit_gain")]:
            if state.pop(name).item() != 1.0:
                raise UserError("timm's network has no SkipInit: it can take these weights only where each gain is 1")
    for name, tensor in state.items():
        if name.endswith(".gain"):
            state[name] = tensor.view(-1, 1, 1, 1)
        elif ".attn_last." in name and name.endswith(".weight"):
            state[name] = tensor[:, :, None, None]
        elif name.endswith("skipinit_gain"):
            state[name] = tensor.reshape(())
    return state


_TIMM_EPS = 1e-5


def _move_constants(state: State, model: Network, towards_ours: bool) -> None:
    """Between gains in timm's sense and in ours; see above. Changes the state in place."""
    gamma = model.gamma

    def exchange(name: str, ours_per_theirs: Tensor | float) -> None:
        if name in state:
            factor = ours_per_theirs if towards_ours else 1.0 / ours_per_theirs
            state[name] = (state[name].double() * factor).to(state[name].dtype)

    for name, conv in model.named_modules():
        if not isinstance(conv, WSConv2d):
            continue
        weight = state.get(timm_name(f"{name}.weight", model.config))
        if weight is not None:
            w = weight.double().flatten(1)
            variance, fan_in = w.var(1, correction=0), w.shape[1]
            ours = torch.clamp_min(variance * fan_in, conv.eps)
            exchange(timm_name(f"{name}.gain", model.config), (ours / (variance * fan_in + fan_in * _TIMM_EPS)).sqrt())
    for name in ("stem.0.gain", "final_conv.gain"):
        exchange(timm_name(name, model.config), gamma)
    exchange("head.fc.weight", 1.0 / gamma)


def written_by_haiku(names: Mapping[str, object]) -> bool:
    """Whether names are those of a Haiku tree."""
    return any("/~/" in n for n in names)


def written_by_timm(names: Mapping[str, object]) -> bool:
    """Whether names are those of a timm network of these families."""
    return any(n.startswith("stages.") for n in names)

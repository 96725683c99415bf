"""`convert`: the normalizer-free form of a user's network with batch normalisation, where that is sound.

The forward pass is traced (torch.fx) and walked from input to output. Beside each map goes a prediction of what one of
its entries is at initialisation: a sample of numbers, on which the activations and additions of the network itself act
as they do on the map. Three rules then hold for every network that is accepted.

1. A convolution becomes a `WSConv2d` (Eq. 1) that divides by the predicted standard deviation of its input. Its output
   is N(0, 1) again, whatever came before. Behind an activation of N(0, 1) this factor is the gain gamma, behind the
   residual stream it is 1/beta.
2. A batch norm becomes a division by the predicted standard deviation. Behind a convolution that is 1 and the norm
   disappears; on the stream of a pre-activation network it is 1/beta, in the paper's order act(h / beta).
3. An addition becomes h + alpha * skip_gain * f(h / beta) (Section 3), with one learnable skip_gain (SkipInit) each.

An activation also gets its gamma where its output goes on to more than convolutions, so that each stage starts with a
stream of variance 1, except on a stream that came through an identity shortcut: in x' = relu(x + alpha f) the ReLU
hardly changes a positive x, and a factor gamma a block would let the stream explode. Activations that shrink such an x
(SiLU, tanh) have no sound factor there and are refused; inside of branches all are welcome.

What the sample does not know: pooling, which shrinks the variance of noise and hardly that of images, dropout, zero
padding, means that differ between channels. Rule 1 limits each of these errors to the next convolution.

Gains start at 1 and biases at 0; those of the norms are not kept. Many networks start the last norm of a branch at 0,
a second zero factor beside SkipInit, with which neither would ever get a gradient.
"""

from __future__ import annotations

import copy
import math
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from normfree.config import UserError
from normfree.models.network import Network
from normfree.nn.conv import WSConv2d

# What a node of the graph does: the class of its module, its function, or the name of its method.
Kind = Any

_NORMS: set[Kind] = {nn.BatchNorm2d, nn.SyncBatchNorm}
_ANY_NORM = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)
_JUDGED = (nn.modules.conv._ConvNd, *_ANY_NORM)  # never passed over, wherever they stand
_ACTIVATIONS: set[Kind] = {
    *(nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_", nn.ReLU6, F.relu6),
    *(nn.SiLU, F.silu, nn.GELU, F.gelu, nn.Mish, F.mish, nn.Hardswish, F.hardswish, nn.LeakyReLU, F.leaky_relu),
    *(nn.ELU, F.elu, nn.CELU, F.celu, nn.SELU, F.selu, nn.Softplus, F.softplus, nn.Softsign, F.softsign),
    *(nn.Tanh, F.tanh, torch.tanh, "tanh"),
}
_SIGMOIDS: set[Kind] = {nn.Sigmoid, F.sigmoid, torch.sigmoid, "sigmoid", nn.Hardsigmoid, F.hardsigmoid}
_MEANS: set[Kind] = {nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d, torch.mean, "mean"}
_RESHAPES: set[Kind] = {nn.Flatten, torch.flatten, "flatten", "view", "reshape", "squeeze", "unsqueeze", "contiguous"}
_GATE_PARTS = _ACTIVATIONS | _SIGMOIDS | _MEANS | _RESHAPES | {nn.Linear, nn.Conv2d, "expand_as", operator.getitem}
_UNCHANGED: set[Kind] = {  # an entry behind these is taken to be distributed as one before
    *(nn.MaxPool2d, F.max_pool2d, nn.AvgPool2d, F.avg_pool2d, nn.AdaptiveMaxPool2d, F.adaptive_max_pool2d),
    *(nn.Identity, nn.Dropout, nn.Dropout2d),
    *(_MEANS | _RESHAPES),
}
_ADDITIONS: set[Kind] = {operator.add, operator.iadd, torch.add, "add", "add_"}
_PRODUCTS: set[Kind] = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_UNFOLLOWED: set[Kind] = {nn.Linear, "size", "dim", getattr}  # nothing is predicted for what they return
_REASONS: dict[Kind, str] = {
    torch.cat: "it joins channels of different variance, which no single factor makes 1",
    **dict.fromkeys(_SIGMOIDS, "it is known only in squeeze-excite: global pooling, layers, sigmoid, product"),
    nn.ConvTranspose2d: "how many inputs it sums depends on the position, and so would its variance",
}
_PIXELS = {2, 3, -1, -2}  # dimensions of a map that are no images or channels
_SAMPLES = 2**15


class Residual(nn.Module):
    """shortcut + alpha * skip_gain * branch, for two maps of one shape; skip_gain is SkipInit, of shape (1,)."""

    def __init__(self, alpha: float, skip_init: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.skip_gain = nn.Parameter(torch.full((1,), skip_init))

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        """(N, C, H, W) twice -> (N, C, H, W)."""
        return torch.addcmul(shortcut, branch, (self.alpha * self.skip_gain).to(branch.dtype))


def convert(model: nn.Module, *, alpha: float = 0.2, skip_init: float = 0.0) -> fx.GraphModule:
    """A normalizer-free network from one with batch normalisation; the rules are those of this module's docstring.

    Converted are networks of convolutions, BatchNorm2d or SyncBatchNorm, elementwise activations, residual additions
    with an identity or one-convolution shortcut, squeeze-excite, pooling, dropout and linear layers. The result starts
    afresh: it has the weights of the model's convolutions and linear layers but not its outputs, and is to be trained.

    Args:
        model: any module that torch.fx can trace; it is not changed. Its input is taken to have mean 0 and variance 1.
        alpha: the share of each branch in its sum.
        skip_init: where SkipInit starts; 0 as in the paper, with which each block starts as its shortcut. At 1 the
            signal is as predicted, which suits short runs.

    Returns:
        a new module of the same call, with parameters of its own. Convolutions keep their names and weights and gain
        `.gain` and `.bias`; SkipInit is `residuals.<k>.skip_gain`. Other attributes and methods of the model are lost.

    Raises:
        UserError: names the layer that has no sound normalizer-free form, and the reason.
    """
    if not (math.isfinite(alpha) and alpha > 0 and math.isfinite(skip_init)):
        raise UserError(f"alpha must be positive and skip_init finite, not {alpha} and {skip_init}")
    if isinstance(model, Network):
        raise UserError("this is a network of ours: create the normalizer-free one of its family, such as nf_resnet50")
    if any(isinstance(m, WSConv2d) for m in model.modules()):
        raise UserError("the model already has weight-standardised convolutions")
    if not any(isinstance(m, _ANY_NORM) for m in model.modules()):
        raise UserError("the model has no normalisation layer: there is nothing to convert")
    if hasattr(model, "residuals"):
        raise UserError("the model has an attribute named residuals, which the converted one needs for its own")
    root = copy.deepcopy(model)
    return _Conversion(fx.GraphModule(root, _trace(root)), alpha, skip_init).run()


class _Tracer(fx.Tracer):
    """Also keeps subclasses of norms and convolutions whole, to be judged by their class."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or isinstance(m, (*_ANY_NORM, nn.Conv2d))


def _trace(root: nn.Module) -> fx.Graph:
    """The graph of the forward pass, if it is the same in training and evaluation: a trace holds one of the two."""
    other = copy.deepcopy(root).train(not root.training)
    try:
        graph, twin = _Tracer().trace(root), _Tracer().trace(other)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise UserError(f"the forward pass cannot be traced, as when it branches on data ({reason})") from error
    if graph.python_code("self").src != twin.python_code("self").src:
        raise UserError(
            "the forward pass differs between training and evaluation outside of its layers (F.dropout, or a branch "
            "on self.training), which a trace cannot keep: use layers such as nn.Dropout"
        )
    for node in graph.nodes:
        node.type = None  # annotations that are text, as behind `from __future__ import annotations`, break pickling
    return graph


@dataclass(frozen=True)
class _Signal:
    """The prediction for one map."""

    sample: Tensor  # (_SAMPLES,), float64
    carried: Tensor | None = None  # a sample of the part that came through an identity shortcut, if one is in it

    @property
    def std(self) -> float:
        return self.sample.std(correction=0).item()


class _Conversion:
    """One walk over the graph; `signals` holds the predictions so far."""

    def __init__(self, net: fx.GraphModule, alpha: float, skip_init: float) -> None:
        self.net, self.alpha, self.skip_init = net, alpha, skip_init
        self.residuals = net.residuals = nn.ModuleList()
        self.uses = Counter(node.target for node in net.graph.nodes if node.op == "call_module")
        self.signals: dict[fx.Node, _Signal] = {}
        self.gates: dict[fx.Node, list[fx.Node]] = {}  # of a product: what computes its squeeze-excite gate, last first
        self.generator = torch.Generator().manual_seed(0)
        grid = torch.special.ndtri((torch.arange(_SAMPLES, dtype=torch.float64, device="cpu") + 0.5) / _SAMPLES)
        self.normal = grid / grid.std(correction=0)
        self.rules: list[tuple[set[Kind], Callable[[fx.Node, _Signal], None]]] = [
            (_UNCHANGED, self._unchanged),
            (_ACTIVATIONS, self._activation),
            (_NORMS, self._norm),
            ({nn.Conv2d}, self._conv),
            (_ADDITIONS, self._addition),
            (_PRODUCTS, self._product),
            (_UNFOLLOWED, lambda *_: None),
        ]

    def run(self) -> fx.GraphModule:
        nodes = list(self.net.graph.nodes)
        self.gates = {node: gate for node in nodes if (gate := self._gate(node))}
        self.gating = {node for gate in self.gates.values() for node in gate}  # stays as it is
        for node in nodes:
            if node.op == "placeholder":
                self.signals[node] = self._fresh()
            elif node.op.startswith("call") and node not in self.gating:
                self._visit(node)
        self.net.delete_all_unused_submodules()
        self.net.graph.lint()
        self.net.recompile()
        return self.net

    def _visit(self, node: fx.Node) -> None:
        module, kind = self._module(node), self._kind(node)
        signal = next((self.signals[n] for n in node.all_input_nodes if n in self.signals), None)
        if signal is None and not isinstance(module, _JUDGED):
            return  # sizes, constants, and whatever comes after a linear layer stay as they are
        rule = next((rule for kinds, rule in self.rules if kind in kinds), None)
        if rule is None and isinstance(module, _ANY_NORM):
            raise self._refusal(node, "of the norms only BatchNorm2d and SyncBatchNorm are replaced")
        if rule is None:
            raise self._refusal(node, _REASONS.get(kind, "no rule is known for it"))
        if signal is None:
            raise self._refusal(node, "the variance of its input is not known")
        if isinstance(module, _JUDGED) and self.uses[node.target] > 1:
            raise self._refusal(node, "it is used in more than one place, where its inputs may differ in variance")
        rule(node, signal)

    def _unchanged(self, node: fx.Node, signal: _Signal) -> None:
        if self._kind(node) in (torch.mean, "mean"):
            dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
            if not {*dims} <= _PIXELS if isinstance(dims, (tuple, list)) else dims not in _PIXELS:
                raise self._refusal(node, "a mean over more than height and width is not followed")
        self.signals[node] = signal

    def _activation(self, node: fx.Node, signal: _Signal) -> None:
        out = self.signals[node] = replace(signal, sample=self._apply(node, signal.sample))
        if all(type(self._module(user)) is nn.Conv2d and user not in self.gating for user in node.users):
            return  # their weights take the gain
        if signal.carried is None:
            with self.net.graph.inserting_after(node):
                scaled = self.net.graph.call_function(operator.mul, (node, 1.0 / out.std))
            node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
            self.signals[scaled] = _Signal(out.sample / out.std)
            return
        factor = _Signal(self._apply(node, signal.carried)).std / _Signal(signal.carried).std
        if not 0.9 < factor < 1.1:
            reason = f"it follows an identity shortcut, and would multiply the stream by {factor:.2f} in each block"
            raise self._refusal(node, f"{reason}; only activations like ReLU, which keep their own output, can do so")

    def _norm(self, node: fx.Node, signal: _Signal) -> None:
        source = node.all_input_nodes[0]
        if not any(isinstance(self._module(n), WSConv2d) for n in _ancestors(node)):
            raise self._refusal(node, "it normalises the input: standardise that outside of the model")
        if math.isclose(signal.std, 1.0, rel_tol=1e-6) and len(source.users) == 1:
            node.replace_all_uses_with(source)
            self.net.graph.erase_node(node)
            return
        # a new map even where the factor is 1: an activation in place may come next
        self._become(node, "call_function", operator.mul, (source, 1.0 / signal.std))
        self.signals[node] = _Signal(signal.sample / signal.std)

    def _conv(self, node: fx.Node, signal: _Signal) -> None:
        path = str(node.target)
        try:
            conv = _standardised(self.net.get_submodule(path), 1.0 / signal.std)
        except ValueError as error:
            raise self._refusal(node, str(error)) from error
        self.net.set_submodule(path, conv)
        self.signals[node] = self._fresh()

    def _addition(self, node: fx.Node, _: _Signal) -> None:
        operands = [n for n in node.args if isinstance(n, fx.Node) and n in self.signals]
        if len(operands) != 2 or len(node.args) != 2 or node.kwargs:
            raise self._refusal(node, "it adds something other than two maps")
        found = [pair for pair in permutations(operands) if self._is_residual(*pair)]
        if len(found) != 1:
            reason = "which operand is the shortcut (identity, pooling, one convolution) and which the branch"
            raise self._refusal(node, f"it is not clear {reason} (more convolutions)")
        shortcut, branch = found[0]
        kept, added = self.signals[shortcut].sample, self.signals[branch].sample
        identity = self._convolutions(branch, shortcut) == (0, 0)
        self.signals[node] = _Signal(kept + self.alpha * added, kept if identity else None)
        self.residuals.append(Residual(self.alpha, self.skip_init).to(next(self.net.parameters())))
        self._become(node, "call_module", f"residuals.{len(self.residuals) - 1}", (shortcut, branch))

    def _is_residual(self, shortcut: fx.Node, branch: fx.Node) -> bool:
        short, long = self._convolutions(branch, shortcut), self._convolutions(shortcut, branch)
        if short is None or long is None or long[0] == 0:
            return False
        return short == (0, 0) or (short == (1, 1) and long[1] > 1)

    def _convolutions(self, other: fx.Node, end: fx.Node) -> tuple[int, int] | None:
        """The fewest and the most on a path to `end` from where it parts from what leads to `other`."""
        start, inside = _ancestors(other), _ancestors(end)
        counts: dict[fx.Node, tuple[int, int]] = {}
        for node in filter(self.signals.__contains__, self.net.graph.nodes):  # maps, and not their sizes
            before = [counts[n] for n in node.all_input_nodes if n in counts]
            if node in start:
                counts[node] = (0, 0)
            elif node in inside and before:
                own = isinstance(self._module(node), WSConv2d)
                counts[node] = (min(few for few, _ in before) + own, max(many for _, many in before) + own)
        return counts.get(end)

    def _gate(self, product: fx.Node) -> list[fx.Node]:
        """Pooling, layers and a sigmoid, one after the other, on the map that they scale; else nothing."""
        if self._kind(product) not in _PRODUCTS:
            return []
        for gate, source in permutations(product.all_input_nodes, 2):
            chain = []
            while gate is not source and self._kind(gate) in _GATE_PARTS:
                chain.append(gate)
                gate = gate.all_input_nodes[0]
            kinds = {self._kind(n) for n in chain}
            if gate is source and kinds & _SIGMOIDS and kinds & _MEANS:
                return chain
        return []

    def _product(self, node: fx.Node, signal: _Signal) -> None:
        if node not in self.gates:
            raise self._refusal(node, "it is known only in squeeze-excite: global pooling, layers, sigmoid, product")
        gate = self.gates[node][0]
        with self.net.graph.inserting_before(node):
            doubled = self.net.graph.call_function(operator.mul, (gate, 2.0))  # a gate starts near 1/2; Appendix C
        node.replace_input_with(gate, doubled)
        self.signals[node] = signal

    def _fresh(self) -> _Signal:
        """N(0, 1), independent of all signals so far."""
        return _Signal(self.normal[torch.randperm(_SAMPLES, generator=self.generator)])

    def _apply(self, node: fx.Node, sample: Tensor) -> Tensor:
        """What the activation at this node makes of a sample."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda _: sample.clone())
        target = getattr(Tensor, str(node.target)) if node.op == "call_method" else self._module(node) or node.target
        return cast(Tensor, target(*args, **kwargs))  # type: ignore[operator]

    def _become(self, node: fx.Node, op: str, target: Any, args: tuple[Any, ...]) -> None:
        node.op, node.target, node.args, node.kwargs = op, target, args, {}

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.net.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _kind(self, node: fx.Node) -> Kind | None:
        if node.op == "call_module":
            return type(self._module(node))
        return node.target if node.op in ("call_function", "call_method") else None

    def _refusal(self, node: fx.Node, reason: str) -> UserError:
        if node.op == "call_module":
            return UserError(f"cannot convert {node.target} ({type(self._module(node)).__name__}): {reason}")
        name = getattr(node.target, "__name__", node.target)
        where = next(reversed(node.meta.get("nn_module_stack", {})), "the model")
        return UserError(f"cannot convert {name} in {where}: {reason}")


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """The node and all that it is computed from."""
    found, ends = {node}, [node]
    while ends:
        new = set(ends.pop().all_input_nodes) - found
        found |= new
        ends.extend(new)
    return found


def _standardised(conv: nn.Module, scale: float) -> WSConv2d:
    """The same convolution with its weight standardised, gain 1 and bias 0; ValueError where that cannot be."""
    assert isinstance(conv, nn.Conv2d)
    if conv.padding_mode != "zeros":
        raise ValueError(f"padding with {conv.padding_mode!r} is not known to WSConv2d")
    if conv._forward_hooks or conv._forward_pre_hooks:
        raise ValueError("it has hooks, which the new layer would lose (weight_norm and spectral_norm are such)")
    with torch.device("meta"):  # no random numbers are drawn for weights that are not kept
        new = WSConv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            stride=conv.stride,  # type: ignore[arg-type]
            padding=0 if conv.padding == "valid" else conv.padding,  # type: ignore[arg-type]
            dilation=conv.dilation,  # type: ignore[arg-type]
            groups=conv.groups,
            scale=scale,
        )
    weight = conv.weight.detach()
    if (weight.flatten(1).var(1, correction=0) * weight[0].numel()).max() < new.eps:
        raise ValueError("its weights are all nearly the same: initialise them first")
    new.weight = conv.weight
    new.gain = nn.Parameter(weight.new_ones(conv.out_channels), conv.weight.requires_grad)
    new.bias = nn.Parameter(weight.new_zeros(conv.out_channels), conv.weight.requires_grad)
    return new.train(conv.training)

"""A graph whose 2-d convolutions are ``FrozenConv``s: what follows them is computed while it is in the CPU's caches.

oneDNN makes 0 of NaN in an activation. So activations are joined only where there can be none: behind operations that
make none of finite numbers (``_finite``), and for inputs that are finite and not large (``harmless``).
"""

from __future__ import annotations

import copy
import operator
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from attrib.models.folding import has_hooks, of_a_library, with_modules
from attrib.models.frozen_conv import EXACT, FrozenConv

LARGE = 1e6  # inputs of a net are smaller: none that is normalised leads up to where float32 ends

_NAMES: dict[Any, str] = {
    nn.ReLU: "relu", nn.ReLU6: "hardtanh", nn.SiLU: "swish", nn.Hardswish: "hardswish",
    F.relu: "relu", torch.relu: "relu", F.relu6: "hardtanh", F.silu: "swish", F.hardswish: "hardswish",
}  # fmt: skip

# What makes no NaN of finite numbers, as a division (0 / 0) or a root does.
_FINITE_MODULES = (
    _ConvNd, nn.Linear, _BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout2d,
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.ELU,
    nn.LeakyReLU, nn.PReLU, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softmax, nn.Upsample,
    nn.ZeroPad2d, nn.ChannelShuffle, nn.PixelShuffle,
)  # fmt: skip
_FINITE_FUNCTIONS = {
    operator.add, operator.iadd, operator.sub, operator.mul, operator.imul, operator.neg, operator.getitem,
    operator.floordiv, torch.add, torch.sub, torch.mul, torch.cat, torch.flatten, torch.permute, torch.transpose,
    torch.mean, torch.sum, torch.sigmoid, torch.tanh, F.sigmoid, F.tanh, F.gelu, F.leaky_relu, F.elu, F.hardsigmoid,
    F.softmax, torch.softmax, F.dropout, F.pad, F.interpolate, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d,
    F.adaptive_max_pool2d, F.layer_norm, F.group_norm, F.linear,
}  # fmt: skip
_STOCHASTIC_DEPTH = "torchvision.ops.stochastic_depth.stochastic_depth"  # torchvision need not be imported for it
_FINITE_METHODS = {
    "add", "add_", "sub", "mul", "mul_", "mean", "sum", "amax", "relu", "relu_", "sigmoid", "tanh", "softmax", "clamp",
    "view", "reshape", "flatten", "permute", "transpose", "contiguous", "expand", "squeeze", "unsqueeze", "chunk",
    "split", "size", "dim", "type_as", "clone",
}  # fmt: skip


def harmless(*inputs: Tensor) -> bool:
    """Whether all numbers are finite, and not large, and none has a derivative of its own (torch's forward mode)."""
    if any(forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        return False
    numbers = (x for x in inputs if x.is_floating_point() and x.numel())
    return all(bool(torch.stack(x.aminmax()).abs().max() < LARGE) for x in numbers)


def fused(graph: fx.GraphModule) -> fx.GraphModule | None:
    """The same function with its 2-d convolutions, and the activations behind them, as these; None without any.

    Weights are shared with the given graph, which is left alone.
    """
    modules = dict(graph.named_modules())
    new = copy.deepcopy(graph.graph)
    root: dict[str, nn.Module] = {}

    def put(module: nn.Module) -> str:
        root[target := f"fused_{len(root)}"] = module
        return target

    finite = True
    for node in list(new.nodes):
        finite = finite and _finite(node, modules)  # what follows may be computed from it
        name, conv = _name(node, modules), _module(node.args[0], modules) if node.args else None
        if finite and name is not None and _suits(conv, name) and len(node.args[0].users) == 1:
            node.args[0].target = put(FrozenConv(conv, name))
            node.replace_all_uses_with(node.args[0])
            new.erase_node(node)
        elif finite and name == "relu" and (found := _summed(node, modules)) is not None:
            layer, conv, other = found
            with new.inserting_before(node):
                target = put(FrozenConv(conv, name))
                node.replace_all_uses_with(new.call_module(target, (*layer.args, other)))
            for gone in (node, node.args[0], layer):
                new.erase_node(gone)
        elif (inner := _module(node, modules)) is not None and (within := _within(inner, finite)) is not None:
            node.target = put(within)
    for node in new.nodes:
        if _suits(conv := _module(node, modules), "none"):
            node.target = put(FrozenConv(conv))
    return fx.GraphModule(with_modules(graph, new, root), new) if root else None


def _finite(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether this is known to make no NaN of finite numbers; of modules that others wrote nothing is."""
    if node.op == "call_function":
        own = f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__name__', '')}"
        return node.target in _FINITE_FUNCTIONS or node.target in _NAMES or own == _STOCHASTIC_DEPTH
    if node.op == "call_method":
        return node.target in _FINITE_METHODS
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    return module is None or _is_finite(module)


def _is_finite(module: nn.Module) -> bool:
    if isinstance(module, fx.GraphModule):
        inner = dict(module.named_modules())
        return all(_finite(node, inner) for node in module.graph.nodes)
    if type(module) is nn.Sequential:
        return not has_hooks(module) and all(map(_is_finite, module))
    divides = getattr(module, "eps", 1) == 0  # a norm of what is equal everywhere: 0 / 0
    known = isinstance(module, _FINITE_MODULES) and of_a_library(module)
    return known and not has_hooks(module) and not divides


def _within(module: nn.Module, finite: bool) -> nn.Module | None:
    """What is in the place of a module of several: a part of a net, or a layer and what was in the norm behind it."""
    if isinstance(module, fx.GraphModule):
        return fused(module) if finite else None
    if type(module) is nn.Sequential and len(module) > 1 and isinstance(module[0], nn.Conv2d) and not has_hooks(module):
        conv, *rest = (each for each in module if type(each) is not nn.Identity)
        if finite and len(rest) == 1 and (name := _NAMES.get(type(rest[0]))) is not None and _suits(conv, name):
            return FrozenConv(conv, name)
    return None


def _summed(end: fx.Node, modules: dict[str, nn.Module]) -> tuple[fx.Node, nn.Conv2d, fx.Node] | None:
    """A convolution's node, itself, and the node that is added to it; None if ``end`` is not behind such a sum."""
    node = end.args[0]
    if not isinstance(node, fx.Node) or len(node.users) != 1 or len(node.args) != 2 or node.kwargs:
        return None
    if node.target not in (operator.add, operator.iadd, torch.add, "add", "add_"):
        return None
    commutes = node.target not in (operator.iadd, "add_")  # else what changes is the first
    for layer, other in (node.args, node.args[::-1])[: 1 + commutes]:
        conv = _module(layer, modules)
        if not isinstance(layer, fx.Node) or not isinstance(other, fx.Node) or layer is other or len(layer.users) > 1:
            continue
        if _suits(conv, "sum") and not _written_to(layer, end, modules):
            return layer, conv, other
    return None


def _written_to(start: fx.Node, end: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether anything between two nodes but a sum of the first may change in place what the first has read."""
    node = start.next
    while node is not end:
        if node not in start.users and _in_place(node, modules):
            return True
        node = node.next
    return False


def _in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if node.op == "call_function":
        marked = node.kwargs.get("inplace", False) is not False or any(each is True for each in node.args)
        return marked or node.target in (operator.iadd, operator.imul)
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    return module is not None and any(
        getattr(each, "inplace", False) or isinstance(each, fx.GraphModule) for each in module.modules()
    )


def _module(node: Any, modules: dict[str, nn.Module]) -> nn.Module | None:
    """The module that a node calls with one argument alone."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    return modules.get(str(node.target))  # not one that was made here


def _name(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """What the library calls the activation that a node is."""
    module = _module(node, modules)
    if module is not None:
        return None if has_hooks(module) else _NAMES.get(type(module))
    if node.op == "call_method":
        return "relu" if node.target in ("relu", "relu_") and len(node.args) == 1 else None
    known = node.op == "call_function" and len(node.args) == 1 and not node.kwargs.keys() - {"inplace"}
    return _NAMES.get(node.target) if known else None


def _suits(conv: nn.Module | None, name: str) -> TypeGuard[nn.Conv2d]:
    """Whether oneDNN computes the same with an activation of this name, or a "sum", behind it."""
    return FrozenConv.can_be(conv) and (name in EXACT or conv.weight.dtype == torch.float32)

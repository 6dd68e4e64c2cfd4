"""A net's graph with its batch norms folded into the layers in front of them, or in another memory format.

What a norm does in eval mode is affine in each channel, as a convolution or a linear layer is: together they are one
such layer with other weights (Jacob et al., *Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference*, CVPR 2018, section 3.2). Which norms stand behind a layer, whose output nobody else
reads, is in the graph; that the one layer gives what the two did is not taken from their classes, but tried.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.nn.utils.parametrize import is_parametrized

from attrib.models.device_memory import of_the_device
from attrib.models.split import CannotSplitError, trace
from attrib.models.ways_back import gradient, near

_Convert = Callable[[Tensor], Tensor]

# Of the largest number that a norm gives: rounding, of which deep sums make some hundred times the precision.
NOISE = {torch.float32: 1e-4, torch.float64: 1e-12}

# Of the sizes of numbers on which layers of others' classes are tried: a clamp, say, is seen beyond its bounds alone.
FAR = (-1.0, 1e3, -1e3, 1e-3)


def graph_of(net: nn.Module) -> fx.GraphModule:
    """The net's calls of modules, functions and methods, sharing its modules. Raises CannotSplitError."""
    return fx.GraphModule(net, trace(net, leaves=(_BatchNorm, _ConvNd, nn.Linear)))


@torch.no_grad()
def folded(graph: fx.GraphModule, *inputs: Tensor) -> tuple[fx.GraphModule, bool]:
    """The same function without the norms that can be folded, and whether convolutions are most of its work.

    ``inputs`` are those of the graph, of a few rows, on which every folded layer is tried. The given graph and its
    modules are left alone; what is not folded is shared. The graph that was given comes back if nothing is folded.
    """
    trial = _Trial(graph)
    trial.run(*(x.clone() for x in inputs))
    mostly = trial.convolved > trial.multiplied / 4
    if not trial.replaced:
        return graph, mostly
    new, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    root: dict[str, nn.Module] = {}
    for node in graph.graph.nodes:
        if node in trial.replaced:
            name = f"folded_{len(root)}"
            root[name] = trial.replaced[node]
            copies[node] = new.call_module(name, fx.map_arg(node.args, copies.__getitem__))
        elif node in trial.gone:
            copies[node] = copies[node.args[0]]
        else:
            copies[node] = new.node_copy(node, copies.__getitem__)
    return fx.GraphModule(with_modules(graph, new, root), new), mostly


def with_modules(graph: fx.GraphModule, new: fx.Graph, more: dict[str, nn.Module]) -> dict[str, Any]:
    """What the nodes of a graph refer to."""
    found: dict[str, Any] = dict(more)
    for node in new.nodes:
        target = str(node.target)
        if node.op in ("call_module", "get_attr") and target not in found:
            parent, _, name = target.rpartition(".")
            found[target] = getattr(graph.get_submodule(parent), name)
    return found


def channels_last(graph: fx.GraphModule) -> fx.GraphModule:
    """The same function with the weights of 2-d convolutions in this memory format; all else is shared."""
    two = (nn.Conv2d, nn.ConvTranspose2d)
    return _converted(graph, two, lambda p: p.contiguous(memory_format=torch.channels_last) if p.ndim == 4 else p)


def cast(graph: fx.GraphModule, dtype: torch.dtype) -> fx.GraphModule:
    """The same function within torch.autocast to ``dtype``, which casts the weights of these layers in every pass."""
    return _converted(
        graph, (nn.modules.conv._ConvNd, nn.Linear), lambda p: p.to(dtype) if p.is_floating_point() else p
    )


def _converted(graph: fx.GraphModule, kinds: tuple[type[nn.Module], ...], to: _Convert) -> fx.GraphModule:
    """The graph with converted parameters of layers of these kinds."""
    found = with_modules(graph, graph.graph, {})
    for target, module in found.items():
        if isinstance(module, nn.Module):
            found[target] = _converted_module(module, kinds, to)
    return fx.GraphModule(found, copy.deepcopy(graph.graph))


def _converted_module(module: nn.Module, kinds: tuple[type[nn.Module], ...], to: _Convert) -> nn.Module:
    if isinstance(module, fx.GraphModule):
        return _converted(module, kinds, to)
    if isinstance(module, nn.Sequential):
        return nn.Sequential(*(_converted_module(each, kinds, to) for each in module))
    if not isinstance(module, kinds) or is_parametrized(module) or _hooks(module):
        return module
    new = copy.copy(module)
    new._parameters = {
        name: None if p is None else nn.Parameter(to(p), requires_grad=False) for name, p in module._parameters.items()
    }
    return new


_AFFINE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def is_torchs(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module computes as one of these classes does: neither its own class nor itself has another forward."""
    return "forward" not in vars(module) and any(
        isinstance(module, kind)
        and all(getattr(type(module), name, None) is getattr(kind, name, None) for name in ("forward", "_conv_forward"))
        for kind in kinds
    )


def of_a_library(module: nn.Module) -> bool:
    """Whether it and what is within it compute as their classes do, which are torch's, timm's or torchvision's."""
    return all(
        type(each).__module__.partition(".")[0] in ("torch", "timm", "torchvision") and "forward" not in vars(each)
        for each in module.modules()
    )


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _hooks(module: nn.Module) -> bool:
    return any(getattr(module, kind) for kind in _HOOKS)


def has_hooks(net: nn.Module) -> bool:
    """Whether anybody watches a module of ``net``, or changes what it gives."""
    of_all = (getattr(nn.modules.module, f"_global{kind}") for kind in _HOOKS)
    return any(of_all) or any(map(_hooks, net.modules()))


class _Trial(fx.Interpreter):
    """Runs a graph, and tries what its norms, and the layers in front of them, can be replaced by.

    replaced     layer -> the module in its place, which does what the norm behind it did as well
    gone         the norms that are needed no longer
    multiplied   products in weighted layers, of all rows; ``convolved`` are those of 2-d convolutions
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.replaced: dict[fx.Node, nn.Module] = {}
        self.gone: set[fx.Node] = set()
        self.multiplied = self.convolved = 0
        self._pairs = dict(filter(None, map(self._pair, graph.graph.nodes)))
        self._tried: dict[fx.Node, list[tuple[nn.Module, Tensor, Tensor]]] = {}

    def _called(self, node: Any) -> nn.Module | None:
        """The module that a node calls with one argument alone, if nobody has put a hook on it."""
        if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return None
        module = self.fetch_attr(str(node.target))
        return None if _hooks(module) or is_parametrized(module) else module

    def _pair(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """A layer, and a norm that alone reads what it gives."""
        if not isinstance(self._called(node), _BatchNorm):
            return None
        layer = node.args[0]
        weighted = isinstance(self._called(layer), _ConvNd | nn.Linear)
        return (layer, node) if weighted and len(layer.users) == 1 else None  # type: ignore[union-attr, return-value]

    def run_node(self, node: fx.Node) -> Any:
        module = self._called(node)
        (given,) = self.fetch_args_kwargs_from_env(node)[0] if module is not None else (None,)
        if module is not None and node in self._pairs:
            norm = self._called(self._pairs[node])
            self._tried[self._pairs[node]] = _tried(module, norm, given)  # type: ignore[arg-type]
        inside = None
        if module is not None and not isinstance(module, _BatchNorm) and any(True for _ in module.children()):
            inside = self._inside(module, given)  # a layer at which the net is cut is one node, whatever is in it
        found = super().run_node(node)
        if isinstance(module, _ConvNd | nn.Linear) and isinstance(found, Tensor):
            products = module.weight[0].numel() * found.numel()
            self.multiplied += products
            self.convolved += products if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) else 0
        for fused, x, value in self._tried.pop(node, []):
            if _near(value, found) and _same_everywhere(fused, self._called(node), self._called(node.args[0]), x):
                self.replaced[node.args[0]] = fused  # type: ignore[index]
                self.gone.add(node)
                break
        if inside is not None and _near(inside(given.clone()), found) and _near_way_back(inside, module, given):
            self.replaced[node] = inside
        return found

    def _inside(self, module: nn.Module, given: Any) -> fx.GraphModule | None:
        if not isinstance(given, Tensor):
            return None
        try:
            graph = graph_of(module)
            new, _ = folded(graph, given)
        except CannotSplitError:
            return None
        return None if new is graph else new


def _tried(layer: nn.Module, norm: _BatchNorm, x: Tensor) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Modules that may do what ``norm`` does with what ``layer`` gives for x, with x and what they give.

    A subclass of torch's norms may do more than normalise: an activation, say, is a module inside it.
    """
    try:
        if isinstance(layer, nn.Linear):
            fused: nn.Module = fuse_linear_bn_eval(layer, norm)
        else:
            fused = fuse_conv_bn_eval(layer, norm, isinstance(layer, _ConvTransposeNd))  # type: ignore[type-var]
        ways = [fused] if not any(True for _ in norm.children()) else [fused, nn.Sequential(fused, *norm.children())]
        return [(way, x, way(x.clone())) for way in ways]
    except Exception as error:  # of a subclass, or a norm that is not made for this layer
        if of_the_device(error):
            raise
        return []


def _same_everywhere(fused: nn.Module, norm: Any, layer: Any, x: Tensor) -> bool:
    """Whether ``fused`` does what layer and norm do for far larger numbers than x, too, and on the way back.

    Torch's own classes are affine. Others may bend what is large, or stop gradients; those of libraries do not bend. At
    the kink of an activation rounding decides; that is one number in a million, and the whole gradient counts.
    """
    if is_torchs(norm, _BatchNorm) and is_torchs(layer, *_AFFINE):
        return True
    one, other = (gradient(way, x.clone().requires_grad_()) for way in (fused, lambda given: norm(layer(given))))
    if (one is None) != (other is None):
        return False
    if one is not None and other is not None and not (one - other).norm() <= 1e-2 * other.norm():
        return False
    if of_a_library(norm) and of_a_library(layer):
        return True
    try:
        pairs = [(abs(size), fused(size * x), norm(layer(size * x))) for size in FAR]
    except Exception as error:  # of a class that anybody wrote
        if of_the_device(error):
            raise
        return False
    # What is clamped in the end was rounded when it was large.
    usual = float(norm(layer(x.clone())).abs().max())
    return all(_near(value, expected, size * usual) for size, value, expected in pairs)


def _near_way_back(graph: nn.Module, module: Any, x: Tensor) -> bool:
    """Whether gradients flow through a graph as through the module of which it was traced.

    torch.fx does not see where that stops them (``torch.no_grad``).
    """
    return near(*(gradient(way, x.clone().requires_grad_()) for way in (graph, module)))


def _near(one: Any, other: Any, largest: float = 0.0) -> bool:
    """Whether two tensors are equal up to rounding, also of numbers up to ``largest`` on the way to them."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.shape != other.shape:
        return False
    if not other.isfinite().all():
        return False
    return bool((one - other).abs().max() <= NOISE.get(other.dtype, 0.0) * max(float(other.abs().max()), largest))

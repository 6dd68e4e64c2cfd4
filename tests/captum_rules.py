"""DeepLIFT, guided backpropagation and deconvolution as they were up to VERSION 2: by captum, on a net rebuilt for it.

The reference for nets on which that was right: those whose activations and poolings captum's hooks can be put on.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection
from functools import partial

import torch
import torch.nn.functional as F
from captum import attr
from torch import Tensor, fx, nn

from attrib.models.split import CannotSplitError, trace
from attrib.types import UserError

_FUNCTIONS: dict[object, type[nn.Module]] = {
    F.relu: nn.ReLU, torch.relu: nn.ReLU, torch.relu_: nn.ReLU, "relu": nn.ReLU, "relu_": nn.ReLU,
    F.relu6: nn.ReLU6, F.elu: nn.ELU, F.leaky_relu: nn.LeakyReLU, F.softplus: nn.Softplus,
    torch.sigmoid: nn.Sigmoid, F.sigmoid: nn.Sigmoid, "sigmoid": nn.Sigmoid, "sigmoid_": nn.Sigmoid,
    torch.tanh: nn.Tanh, F.tanh: nn.Tanh, "tanh": nn.Tanh, "tanh_": nn.Tanh,
    F.silu: nn.SiLU, F.gelu: nn.GELU, F.mish: nn.Mish, F.hardswish: nn.Hardswish, F.hardsigmoid: nn.Hardsigmoid,
    F.hardtanh: nn.Hardtanh,
    F.max_pool1d: nn.MaxPool1d, F.max_pool2d: nn.MaxPool2d, F.max_pool3d: nn.MaxPool3d,
    torch.max_pool1d: nn.MaxPool1d, torch.max_pool2d: nn.MaxPool2d, torch.max_pool3d: nn.MaxPool3d,
}  # fmt: skip

RELU_LIKE = (nn.ReLU, nn.ReLU6)
# Elementwise, so that DeepLIFT's rescale rule is (change of output) / (change of input).
ELEMENTWISE = (
    *RELU_LIKE, nn.ELU, nn.LeakyReLU, nn.Softplus, nn.Sigmoid, nn.Tanh, nn.SiLU, nn.GELU, nn.Mish, nn.Hardswish,
    nn.Hardsigmoid, nn.Hardtanh,
)  # fmt: skip


def _run(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


def stand_in(activation: nn.Module) -> nn.ReLU:
    """An ``nn.ReLU`` by class that computes another activation.

    captum recognises activations by ``type(module)``, and its rules only use the module's inputs
    and outputs; with the class it expects, they hold for any elementwise function.
    """
    if type(activation) is nn.ReLU:
        return activation
    module = nn.ReLU()
    module.forward = partial(_run, activation.forward)  # type: ignore[method-assign]
    return module


def separated(module: nn.Module, as_relu: Collection[type[nn.Module]] = ()) -> fx.GraphModule:
    """The net with every call of a module, activation or max-pooling function as a module of its own.

    Weights are shared with ``module``, hooks are not. In-place activations compute the same, but not in place.

    Activations whose class is in ``as_relu`` are replaced by a ``stand_in``.

    Raises UserError if the net cannot be traced.
    """
    own = _shared_copy(module)  # tracing leaves constants in the module that it traces
    try:
        net = fx.GraphModule(own, trace(own))
    except CannotSplitError as reason:
        raise UserError(f"this method needs a net that torch.fx can trace: {reason}") from reason
    kinds = tuple(as_relu)
    position = {node: number for number, node in enumerate(net.graph.nodes)}
    for node, number in position.items():
        if node.op == "call_module":
            new, args, kwargs = _shared_copy(net.get_submodule(node.target)), node.args, node.kwargs
        elif node.op in ("call_function", "call_method") and node.target in _FUNCTIONS:
            options = {k: v for k, v in node.kwargs.items() if k not in ("inplace", "input", "return_indices")}
            new, kwargs = _FUNCTIONS[node.target](*node.args[1:], **options), {}
            args = (node.args or (node.kwargs["input"],))[:1]
        else:
            continue
        name = f"call_{number}"
        net.add_submodule(name, _with_stand_ins(new, kinds))
        with net.graph.inserting_before(node):
            call = net.graph.call_module(name, args, kwargs)
        if _in_place(node, new):
            new.inplace = False  # type: ignore[assignment]  # to torch every attribute is a tensor or a module
            # Whatever read the changed input afterwards reads the result now.
            (changed,) = node.all_input_nodes
            for user in list(changed.users):
                if position.get(user, -1) > number:
                    user.replace_input_with(changed, call)
        node.replace_all_uses_with(call)
        net.graph.erase_node(node)
    net.delete_all_unused_submodules()
    net.recompile()
    return net.eval()


def _in_place(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        return bool(getattr(module, "inplace", False))
    name = node.target if isinstance(node.target, str) else node.target.__name__
    return name.endswith("_") or bool(node.kwargs.get("inplace", False))


def _shared_copy(module: nn.Module) -> nn.Module:
    """A copy with hooks and submodules of its own, but the same parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(t): t for t in tensors})


def _with_stand_ins(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> nn.Module:
    """Also inside modules that tracing keeps whole (timm's fused norm and activation)."""
    if isinstance(module, kinds):
        return stand_in(module)
    for name, child in module.named_children():
        setattr(module, name, _with_stand_ins(child, kinds))
    return module


class Windows(nn.Module):
    """Lays the windows of a max-pooling side by side: (N, C, H, W) -> (N, C, h, w * places in a window)."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        sizes = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
        self.kernel, self.stride, self.padding, self.dilation = (_pair(size) for size in sizes)
        self.ceil = pool.ceil_mode

    def forward(self, x: Tensor) -> Tensor:
        options = (self.kernel, self.stride, self.padding, self.dilation, self.ceil)
        h, w = F.max_pool2d(x.detach(), *options).shape[-2:]
        # By how much the last window reaches beyond the image along each axis; with ceil_mode more than the padding.
        beyond = [
            max(0, (n - 1) * s + d * (k - 1) + 1 - size - p)
            for n, size, k, s, p, d in zip((h, w), x.shape[-2:], *options[:4], strict=True)
        ]
        edges = (self.padding[1], beyond[1], self.padding[0], beyond[0])
        padded = F.pad(x, edges, value=torch.finfo(x.dtype).min)
        places = F.unfold(padded, self.kernel, self.dilation, stride=self.stride)
        return places.reshape(len(x), x.shape[1], -1, h, w).permute(0, 1, 3, 4, 2).flatten(3)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def without_overlap(net: fx.GraphModule) -> fx.GraphModule:
    """Replace max-poolings whose windows overlap by ``Windows`` and a pooling without overlap; changes ``net``.

    Where windows overlap, captum's rule keeps one window's share of a pixel and drops those of the others.
    """
    for node in list(net.graph.nodes):
        pool = net.get_submodule(node.target) if node.op == "call_module" else None
        if type(pool) is nn.MaxPool2d:
            windows = Windows(pool)
            reach = [d * (k - 1) for d, k in zip(windows.dilation, windows.kernel, strict=True)]
            if any(r >= s for r, s in zip(reach, windows.stride, strict=True)):
                places = windows.kernel[0] * windows.kernel[1]
                net.add_submodule(node.target, nn.Sequential(windows, nn.MaxPool2d((1, places))))
    return net


def hookable(module: nn.Module, as_relu: tuple[type[nn.Module], ...]) -> fx.GraphModule:
    """The net with every activation a module of its own (``separated``), and a copied input for each module
    without parameters.

    captum's hooks rewrite the gradient of the tensor that enters a module. If that tensor is also read
    elsewhere (a residual) or is another activation's output (max-pooling after a ReLU), captum mixes up
    the gradients, and DeepLIFT is not complete.
    """
    net = separated(module, as_relu)
    for node in list(net.graph.nodes):
        if node.op == "call_module" and not any(True for _ in net.get_submodule(node.target).parameters()):
            with net.graph.inserting_before(node):
                for shared in node.all_input_nodes:
                    node.replace_input_with(shared, net.graph.call_method("clone", (shared,)))
    net.recompile()
    return net


class Logit(nn.Module):
    """(x, target) -> the target's logit; captum hooks modules."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.net(x).gather(1, target[:, None])[:, 0]


def by_captum(rule: str, module: nn.Module, x: Tensor, target: Tensor, baseline: Tensor | None = None) -> Tensor:
    """(B, C, H, W): captum's "DeepLift", "GuidedBackprop" or "Deconvolution"."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    net = hookable(module, ELEMENTWISE if rule == "DeepLift" else RELU_LIKE)
    method = getattr(attr, rule)(Logit(without_overlap(net) if rule == "DeepLift" else net))
    more = {"baselines": baseline} if rule == "DeepLift" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return method.attribute(x.clone().requires_grad_(), additional_forward_args=(target,), **more).detach()

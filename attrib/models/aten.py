"""A net as a graph of ATen calls: what it computes, however it was written.

torch's own tracing takes modules, functions and methods down to one set of operations (``F.relu``, ``nn.ReLU`` and
``x.relu_()`` are all ``relu``), and turns what is done in place, also through views, into the same without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from attrib.models.device_memory import is_out_of_memory
from attrib.models.graph import call, operation
from attrib.types import UserError


@contextmanager
def _plain() -> Iterator[None]:
    """Attention as products and a softmax, not as a fused call."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


def trace(net: nn.Module, x: Tensor) -> fx.GraphModule:
    """The graph of ``net`` for inputs of the shape, type and device of x (N, *input), whose values do not matter.

    Raises UserError for a net whose way through its code depends on the values of its input.
    """
    try:
        with _plain():
            traced = make_fx(torch.func.functionalize(net, remove="mutations"))(x.clone())
    except Exception as error:  # tracing runs arbitrary user code
        if is_out_of_memory(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"this method needs the graph of the net, and torch cannot trace {type(net).__name__}: {reason}"
        ) from error
    traced.graph.eliminate_dead_code()
    for node in list(traced.graph.nodes):
        if operation(node) == "as_strided_" and _keeps_strides(node):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
        elif operation(node) == "copy_" and isinstance(node.args[0], fx.Node) and node.args[0].op != "placeholder":
            raise UserError(
                f"this method needs the graph of the net, and {type(net).__name__} copies into parts of a tensor, "
                "which the graph does not show (circular padding does so, for example); take a method that needs the "
                "gradient alone, such as integrated_gradients"
            )
        elif operation(node) in ("copy", "copy_"):
            node.replace_all_uses_with(_copied(traced.graph, node))
            traced.graph.erase_node(node)
    depends = of_input(traced.graph)
    for node in traced.graph.nodes:
        node.meta.clear()  # it may hold tensors
        if _writes(node) and node.args[0] in depends:
            node.target = _without_writing(node)
        if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            node.target = torch.ops.aten.reshape.default  # whatever the strides of a rule's result are
    traced.recompile()
    return traced


def _keeps_strides(node: fx.Node) -> bool:
    """Whether as_strided leaves every number where it is, as before convolutions of images of one pixel."""
    given, size, stride = node.args[:3]
    assert isinstance(given, fx.Node)
    assert isinstance(size, Sequence)
    assert isinstance(stride, Sequence)
    before = given.meta["val"]
    strides = zip(size, before.stride(), stride, strict=True)
    return tuple(size) == tuple(before.shape) and all(n == 1 or a == b for n, a, b in strides)


def _copied(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """What ``aten.copy(to, value)`` gives, by calls that have a derivative: it has none."""
    to, value = node.args[:2]
    assert isinstance(to, fx.Node)
    assert isinstance(value, fx.Node)
    wanted, given = to.meta["val"], value.meta["val"]
    with graph.inserting_before(node):
        if given.shape != wanted.shape:
            value = graph.call_function(torch.ops.aten.expand.default, (value, list(wanted.shape)))
        if given.dtype != wanted.dtype:
            value = graph.call_function(torch.ops.aten._to_copy.default, (value,), {"dtype": wanted.dtype})
    return value


def _without_writing(node: fx.Node) -> Any:
    """The call that gives the same as one in place: torch leaves some of these inside what it takes apart itself."""
    packet = getattr(torch.ops.aten, operation(node).removesuffix("_"), None)
    overload = getattr(node.target, "_overloadname", "default")
    return getattr(packet, overload, node.target)


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def of_input(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose value depends on the input of the net."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def propagate(traced: fx.GraphModule, x: Any, rule: Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any]) -> Any:
    """What the net gives for x, where ``rule(node, args, kwargs)`` computes each call that depends on the input.

    x is a tensor, or anything else that ``rule`` takes and returns in the place of one.
    """
    depends = of_input(traced.graph)
    values: dict[fx.Node, Any] = {}
    last = {used: node for node in traced.graph.nodes for used in node.all_input_nodes}
    for node in traced.graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "placeholder":
            values[node] = x
        elif node.op == "get_attr":
            value = getattr(traced, str(node.target))
            # A counter in a buffer, say: the net's own is not to be changed.
            mutable = any(
                getattr(user.target, "_schema", None) and user.target._schema.is_mutable for user in node.users
            )
            values[node] = value.clone() if mutable else value
        elif node.op == "output":
            return args[0]
        elif operation(node) and node in depends:
            values[node] = rule(node, args, kwargs)
        else:
            values[node] = call(node)(*args, **kwargs)
        for used in node.all_input_nodes:
            if last[used] is node:
                del values[used]
    raise AssertionError("a graph has an output")


class _FoundError(Exception):
    """Leaves the forward pass at the call that is looked for."""


class _Seek(TorchDispatchMode):
    def __init__(self, name: str, number: int) -> None:
        super().__init__()
        self._name, self._left = name, number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.removeprefix("aten::").removesuffix("_") == self._name:
            self._left -= 1
            if self._left < 0:
                raise _FoundError
        return func(*args, **(kwargs or {}))


def place(net: nn.Module, x: Tensor, traced: fx.GraphModule, node: fx.Node) -> str:
    """Which module makes a call, as "path (class)": for messages. x is an input that the graph was traced for."""
    same = [n for n in traced.graph.nodes if operation(n) == operation(node)]
    inside: list[str] = []
    with ExitStack() as stack:
        for path, module in net.named_modules():
            stack.callback(module.register_forward_pre_hook(lambda *_, path=path: inside.append(path)).remove)
            stack.callback(module.register_forward_hook(lambda *_: inside.pop() and None).remove)
        try:
            with _plain(), _Seek(operation(node), same.index(node)):
                net(x.clone())
        except _FoundError:
            path = inside[-1]
            return f"{path or 'its forward'} ({type(net.get_submodule(path)).__name__})"
    return type(net).__name__

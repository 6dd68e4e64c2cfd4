"""What the calls in a net's graph are: names of operations, and small things that several rooms ask of them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from attrib.models.ways_back import contiguous_back

# The result depends on the shape of the input alone.
OF_SHAPE = frozenset((
    "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty", "zero",
    "arange",
))  # fmt: skip

REPLACED = {
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,  # whatever the strides of a rule's result are
    torch.ops.aten._unsafe_view.default: torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_index.Tensor: torch.ops.aten.index.Tensor,  # of bicubic interpolation
    torch.ops.aten.unsafe_split.Tensor: torch.ops.aten.split.Tensor,
    torch.ops.aten.unsafe_chunk.default: torch.ops.aten.chunk.default,
}


class EachCall(TorchDispatchMode):
    """A mode whose ``__torch_dispatch__`` every call of an operation goes through."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would import its compiler, which takes seconds, only to keep these calls out of it."""
        return False


def operation(node: fx.Node) -> str:
    """The name of the operation that a node calls, without ``aten::``; "" if it calls none."""
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else schema.name.removeprefix("aten::")


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """Those that a node gives by their places."""
    return node.args


def is_float(node: fx.Node) -> bool:
    """Whether a node's value is a tensor of real numbers that are no counts."""
    dtype = node.meta.get("dtype")
    return dtype is not None and dtype.is_floating_point


def call(node: fx.Node) -> Callable[..., Any]:
    """What a node calls."""
    assert callable(node.target)
    return partial(_norm, node.target) if "batch_norm" in operation(node) else node.target


def _norm(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A batch norm, whose way back is right for one row too."""
    found = function(*args, **kwargs)
    first = found if isinstance(found, Tensor) else found[0]
    if first.grad_fn is not None and len(first) == 1:
        contiguous_back(first.grad_fn)
    return found


def of_sizes(node: fx.Node) -> bool:
    """Whether a call reads a size, or computes with sizes."""
    return not operation(node) or operation(node) == "sym_size"


def constant(root: nn.Module, graph: fx.Graph, target: str, value: Any, of_code: bool) -> fx.Node:
    """A node that reads a value, which ``root`` keeps at the same place as the net does."""
    at, *_, last = root, *target.split(".")
    for name in target.split(".")[:-1]:
        if not hasattr(at, name):
            setattr(at, name, nn.Module())
        at = getattr(at, name)
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        at.register_buffer(last, value)
    else:
        setattr(at, last, value)
    node = graph.get_attr(target)
    node.meta = {"module": ("", ""), "size": False, "constant": of_code}
    return node


def attribute(net: nn.Module, path: str) -> Any:
    return operator.attrgetter(path)(net)

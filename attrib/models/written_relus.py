"""ReLUs that are written in several calls, such as (x + |x|) / 2, or in one that is none by name, such as min(x, 0).

They are found by what they compute: wherever a value is an element-wise function of another, the function is tried on a
few numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from attrib.models.activations import ELEMENTWISE, RELU_LIKE, is_zero
from attrib.models.calls import OF_SHAPE, attribute, call, operation
from attrib.models.graph import Graph
from attrib.types import UserError

_MOST = 12  # calls that one function is written in
_TRIED = torch.tensor([-40, -7, -2.5, -1, -0.3, -0.01, 0, 0.01, 0.3, 1, 2.5, 4, 7, 40], dtype=torch.float64)
_CONSTANT = ("expand", "reshape", "unsqueeze", "clone", "_to_copy")


@dataclass(frozen=True)
class WrittenReLU:
    """A value that is ``factor * min(max(sign * of, 0), ceiling)``, with sign 1 or -1, of another."""

    of: fx.Node
    factor: float
    sign: int
    ceiling: float

    def __call__(self, relu: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor], x: Tensor) -> Tensor:
        """By a rule for ReLUs: ``relu`` of the function, and of what it is taken of."""
        return self.factor * relu(lambda value: value.clamp(0, self.ceiling), self.sign * x)


class _NotOneNumberError(Exception):
    """A call is no function of the one number that is tried."""


_KEPT = "written ReLUs"  # of a graph's net


def written_relus(graph: Graph) -> Mapping[fx.Node, WrittenReLU]:
    """The last calls of ReLUs that are written out, looked for once per graph.

    Of x + relu(-x), say, it is the whole that counts, a ReLU of x. Raises UserError, which names the module, for a
    maximum with a zero that is stacked on the values.
    """
    found: dict[fx.Node, WrittenReLU] | None = graph.net.meta.get(_KEPT)
    if found is None:
        found = graph.net.meta[_KEPT] = _found(graph)
    return found


def _found(graph: Graph) -> dict[fx.Node, WrittenReLU]:
    found: dict[fx.Node, WrittenReLU] = {}
    for node, of, between in _functions(graph):
        if operation(of) == "abs":  # as inside F.lp_pool2d: nothing is cut off
            continue
        relu = None if node in found or _one_call(node) else _relu(node, of)
        if relu is None:
            continue
        # A multiple of a ReLU that has been found already needs no other.
        others = [_relu(inner, of) for inner in between if _one_call(inner) or inner in found]
        if not any(other and (other.sign, other.ceiling) == (relu.sign, relu.ceiling) for other in others):
            found[node] = relu
    for node in graph.nodes:
        if node in graph.fed and operation(node) in ("amax", "max") and _with_zero(node.args[0]):
            raise UserError(
                f"{graph.where(node)} takes the maximum of values and a zero that is stacked on them, which is a ReLU, "
                "but is not read as one. Write it as one ReLU, or take method=gradient"
            )
    return found


def _one_call(node: fx.Node) -> bool:
    """Whether a call is a ReLU by itself."""
    kind = RELU_LIKE.get(operation(node))
    return kind is not None and kind(node) is not None


def _with_zero(node: Any) -> bool:
    return isinstance(node, fx.Node) and operation(node) in ("stack", "cat") and any(map(is_zero, _listed(node)))


def _listed(node: fx.Node) -> Any:
    return node.args[0]


def _functions(graph: Graph) -> Iterator[tuple[fx.Node, fx.Node, set[fx.Node]]]:
    """Values that are element-wise functions of others: (value, the other, what is between), the nearest first."""
    before: dict[fx.Node, dict[fx.Node, set[fx.Node]]] = {}
    for node in graph.nodes:
        if node not in graph.fed:
            continue
        before[node] = {node: set()}
        shape = node.meta.get("shape")
        sources = [used for used in node.all_input_nodes if used in graph.fed and operation(used) not in OF_SHAPE]
        if operation(node) not in ELEMENTWISE or not sources:
            continue
        for of, between in before[sources[0]].items():
            if of.meta.get("shape") == shape and all(of in before[other] for other in sources):
                inner = between.union(*(before[other][of] for other in sources), sources) - {of}
                if len(inner) < _MOST:
                    before[node][of] = inner
                    yield node, of, inner


def _relu(node: fx.Node, of: fx.Node) -> WrittenReLU | None:
    if not of.meta["dtype"].is_floating_point or not node.meta["dtype"].is_floating_point:
        return None
    try:
        found = _value(node, of, _TRIED)
    except (_NotOneNumberError, RuntimeError, TypeError):
        return None
    if not isinstance(found, Tensor) or found.shape != _TRIED.shape or not found.isfinite().all():
        return None
    for sign in (1, -1):
        cut = (sign * _TRIED).clamp(min=0)
        factor = float(found[cut == 1] if (cut == 1).any() else 0.0)
        if factor:
            ceiling = float((found / factor).max())
            off = bool((found[cut == 0] == 0).all())  # exactly: a norm kept from zero by 1e-12 is no ReLU
            if off and torch.allclose(found, factor * cut.clamp(max=ceiling), rtol=1e-5, atol=1e-6) and ceiling > 1:
                return WrittenReLU(of, factor, sign, ceiling if ceiling < 39 else float("inf"))
    return None


def _value(node: Any, of: fx.Node, number: Tensor) -> Any:
    """What a node gives for numbers in the place of ``of``. Raises _NotOneNumberError."""
    if node is of:
        return number
    if node.op == "get_attr":
        kept = attribute(node.graph.owning_module, str(node.target))
        if not isinstance(kept, Tensor) or not kept.numel() or (kept != kept.flatten()[0]).any():
            raise _NotOneNumberError
        return (
            kept.detach().flatten()[0].cpu().to(number.dtype) if kept.is_floating_point() else kept.flatten()[0].cpu()
        )
    if is_zero(node):
        return torch.zeros((), dtype=number.dtype)
    name = operation(node)
    if name in ("full", "full_like", "new_full", "scalar_tensor"):
        return torch.tensor(node.args[{"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0}[name]])
    if name in ("ones", "ones_like", "new_ones"):
        return torch.ones((), dtype=number.dtype)
    if name == "_to_copy" and not (node.meta["dtype"].is_floating_point or node.meta["dtype"] == torch.bool):
        raise _NotOneNumberError
    if name in _CONSTANT:
        given = _value(node.args[0], of, number)
        return given.to(number.dtype) if name == "_to_copy" and node.meta["dtype"].is_floating_point else given
    if name not in ELEMENTWISE:
        raise _NotOneNumberError
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda used: _value(used, of, number))
    return call(node)(*args, **kwargs)

"""Values that are functions of one other value, number by number, in however many calls they are written.

``x * sigmoid(x)`` is one function of x, and so is ``0.5 * x * (1 + tanh(...))``, the GELU of GPT-2. Methods that give
each function a rule must see it as one, whether torch has a name for it or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from attrib.models.activations import ELEMENTWISE, is_zero
from attrib.models.calls import OF_SHAPE, attribute, call, is_float, operation
from attrib.models.graph import Graph

_MOST = 12  # calls that one function is written in
TRIED = torch.tensor([-40, -7, -2.5, -1, -0.3, -0.01, 0, 0.01, 0.3, 1, 2.5, 4, 7, 40], dtype=torch.float64)
_CONSTANT = frozenset(("expand", "reshape", "unsqueeze", "clone", "_to_copy"))
_FULL = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0}  # where what they are full of is
# Defined for positive numbers alone.
_OF_POSITIVE = frozenset(("log", "log10", "log2", "log1p", "sqrt", "rsqrt", "reciprocal", "pow"))
# They keep zero away from what divides, as of a norm: what they make positive is not so by itself.
_KEPT_POSITIVE = frozenset(("clamp", "clamp_min", "clamp_max", "maximum", "minimum", "fmax", "fmin", "relu", "where",
                            "threshold", "hardtanh"))  # fmt: skip
_STATISTICS = frozenset(("mean", "sum", "var", "std", "linalg_vector_norm", "amax", "amin", "max", "min", "prod"))


class NotOneNumberError(Exception):
    """A call is no function of the one number that is tried."""


@dataclass(frozen=True)
class Function:
    """``node`` as an element-wise function of the value ``of``."""

    node: fx.Node
    of: fx.Node

    def __call__(self, x: Tensor) -> Tensor:
        """What the node gives for the numbers x in the place of ``of``, of any shape to which constants broadcast.

        Raises NotOneNumberError where something else is needed than x and constants of the net.
        """
        found = _value(self.node, self.of, x, {})
        if not isinstance(found, Tensor):
            raise NotOneNumberError
        return found

    @property
    def zero(self) -> Tensor | None:
        """f(0), float64, of one element or of one for each channel; None if it cannot be computed."""
        tried = self.tried(TRIED.new_zeros(1))
        return None if tried is None else tried[0]

    def tried(self, numbers: Tensor) -> Tensor | None:
        """f of numbers (n,), as (n, ...) with what constants broadcast to; None if it cannot be computed."""
        places = len(self.of.meta["shape"])
        try:
            found = self(numbers.reshape(-1, *[1] * places))
        except (NotOneNumberError, RuntimeError, TypeError):
            return None
        return found if found.ndim == places + 1 and len(found) == len(numbers) else None

    @property
    def rectifies(self) -> bool:
        """Whether f is of the kind of ReLU, leaky ReLU, ELU, GELU, SiLU: zero at zero, and far away at most a line.

        Odd functions, as tanh, and even ones, as the absolute value, are of another kind.
        """
        numbers = torch.cat((TRIED, 2 * TRIED[[0, -1]]))
        one, other = self.tried(numbers), self.tried(-numbers)
        if one is None or other is None or not one.isfinite().all() or not other.isfinite().all():
            return False
        size = one.abs().amax(0)
        odd, even = ((one - sign * other).abs().amax(0) <= 1e-9 * size for sign in (-1, 1))
        line = (one[-2:].abs() <= 2.2 * one[[0, len(TRIED) - 1]].abs() + 1e-9 * size).all()
        return bool((one[numbers == 0].abs() <= 1e-9).all() and line and not (odd | even).all())


def functions(graph: Graph) -> Mapping[fx.Node, Function]:
    """The values of a graph that several calls compute of one other value, each of the nearest such value.

    That is, where two functions of a value meet, as in x * sigmoid(x); and where a call that is not defined for all
    numbers makes, with those before it, a function that is, as in 1 / (1 + exp(-x)). Looked for once per graph.
    """
    found: dict[fx.Node, Function] | None = graph.net.meta.get("functions")
    if found is None:
        found = graph.net.meta["functions"] = dict(_several(graph))
    return found


def _several(graph: Graph) -> Iterator[tuple[fx.Node, Function]]:
    done: set[fx.Node] = set()
    for node, of, between in walks(graph):
        if node in done or not is_float(node) or node.meta["dtype"] != of.meta.get("dtype"):
            continue
        function = Function(node, of)
        if len(_sources(graph, node)) > 1 or _twice(node):
            one = function.tried(TRIED) is not None
        else:
            one = operation(of) not in _STATISTICS and _made_positive(graph, node, of, between)
        if one:
            done.add(node)
            yield node, function


def _twice(node: fx.Node) -> bool:
    """Whether a call is given the same value twice, as in x * x."""
    given = [value for value in node.args if isinstance(value, fx.Node)]
    return len(given) > len(set(given))


def _made_positive(graph: Graph, node: fx.Node, of: fx.Node, between: set[fx.Node]) -> bool:
    """Whether a call is one for positive numbers, and what it is given is always positive, whatever ``of`` is."""
    name, given = operation(node), node.args[0]
    if name == "div" and len(node.args) == 2 and node.args[1] in graph.fed and node.args[0] not in graph.fed:
        given = node.args[1]
    elif name not in _OF_POSITIVE or given not in graph.fed:
        return False
    if not isinstance(given, fx.Node) or given is of or any(operation(n) in _KEPT_POSITIVE for n in between):
        return False
    argument, result = Function(given, of).tried(TRIED), Function(node, of).tried(TRIED)
    if argument is None or result is None:
        return False
    least = -1.0 if name == "log1p" else 0.0
    return bool((argument > least).all() and result.isfinite().all())


def walks(graph: Graph) -> Iterator[tuple[fx.Node, fx.Node, set[fx.Node]]]:
    """Values that are element-wise functions of others: (value, the other, what is between), the nearest first."""
    before: dict[fx.Node, dict[fx.Node, set[fx.Node]]] = {}
    twins = _twins(graph)
    for node in graph.nodes:
        if node not in graph.fed:
            continue
        if node in twins:
            before[node] = before[twins[node]]
            yield from ((node, of, inner) for of, inner in before[node].items() if of is not twins[node])
            continue
        before[node] = {node: set()}
        shape = node.meta.get("shape")
        sources = _sources(graph, node)
        if operation(node) not in ELEMENTWISE or not sources:
            continue
        for of, between in before[sources[0]].items():
            if of.meta.get("shape") == shape and all(of in before[other] for other in sources):
                inner = between.union(*(before[other][of] for other in sources), sources) - {of}
                if len(inner) < _MOST:
                    before[node][of] = inner
                    yield node, of, inner


def _twins(graph: Graph) -> dict[fx.Node, fx.Node]:
    """Nodes that make the same call as an earlier one -> that one: x[:, :8] may be written twice."""
    found: dict[fx.Node, fx.Node] | None = graph.net.meta.get("twins")
    if found is None:
        found, first = {}, dict[str, fx.Node]()
        for node in graph.nodes:
            if node.op == "call_function" and torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
                args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda used: found.get(used, used))
                twin = first.setdefault(f"{node.target} {args} {kwargs}", node)
                if twin is not node:
                    found[node] = twin
        graph.net.meta["twins"] = found
    return found


def _sources(graph: Graph, node: fx.Node) -> list[fx.Node]:
    return [used for used in node.all_input_nodes if used in graph.fed and operation(used) not in OF_SHAPE]


def _value(node: Any, of: fx.Node, number: Tensor, known: dict[fx.Node, Any]) -> Any:
    """What a node gives for numbers in the place of ``of``. Raises NotOneNumberError."""
    if node.graph.owning_module.meta.get("twins", {}).get(node, node) is of:  # ``walks`` looks for twins
        return number
    if node not in known:
        known[node] = _computed(node, of, number, known)
    return known[node]


def _computed(node: fx.Node, of: fx.Node, number: Tensor, known: dict[fx.Node, Any]) -> Any:
    name = operation(node)
    if node.op == "get_attr":
        net: Any = node.graph.owning_module
        kept = attribute(net, str(node.target))
        if not isinstance(kept, Tensor) or not kept.numel():
            raise NotOneNumberError
        kept = kept.detach().to(number.device, number.dtype if kept.is_floating_point() else kept.dtype)
        first = kept.flatten()[0]
        return first if kept.numel() == 1 or (kept == first).all() else kept  # of one number no device is waited for
    if is_zero(node):
        return number.new_zeros(())
    if name in _FULL:
        return torch.as_tensor(node.args[_FULL[name]], device=number.device)
    if name in ("ones", "ones_like", "new_ones"):
        return number.new_ones(())
    if name == "_to_copy":
        kind = node.meta["dtype"]
        if kind not in (of.meta["dtype"], torch.bool):  # a cast that rounds is no function of the number alone
            raise NotOneNumberError
        given = _value(node.args[0], of, number, known)
        return given != 0 if kind == torch.bool else given.to(number.dtype)
    if name in _CONSTANT:
        given = _value(node.args[0], of, number, known)
        if given is number or given.ndim == 0 or name == "clone":  # numbers lie where they lay, one is good everywhere
            return given
        if any(used.meta.get("size") for used in node.all_input_nodes):
            raise NotOneNumberError
    elif name not in ELEMENTWISE:
        raise NotOneNumberError
    call_with: Any = fx.map_arg((node.args, dict(node.kwargs)), lambda used: _value(used, of, number, known))
    args, kwargs = call_with
    if name == "_prelu_kernel":  # which broadcasts nothing
        return torch.where(args[0] > 0, args[0], args[1] * args[0])
    return call(node)(*args, **kwargs)

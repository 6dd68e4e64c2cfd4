"""Which values of a net are weights of attention, however the net writes them."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch import fx

from attrib.models.activations import BATCH_NORM, ELEMENTWISE, LINEAR
from attrib.models.calls import arguments, operation
from attrib.models.graph import Graph
from attrib.models.softmax import softmax_axis

# Products, and where their two factors are.
_MATRIX = {"matmul": (0, 1), "bmm": (0, 1), "mm": (0, 1), "baddbmm": (1, 2), "addmm": (1, 2)}
# Functions of weights that are weights: they may be scaled, masked, cut, sorted, divided by their sum.
_OF_WEIGHTS = ELEMENTWISE | frozenset(LINEAR) | frozenset(("softmax", "amax", "amin", "max", "min", "topk", "sort"))
# Layers that mix heads, and the axis of their input over which they sum, or along which each number has its own factor.
_MIXES = {"linear": -1, "conv1d": 1, "conv2d": 1, "convolution": 1, **dict.fromkeys(BATCH_NORM, 1), "layer_norm": -1}


class AttentionWeights:
    """Tells which nodes of a graph are weights of attention: a softmax that does nothing but multiply values.

    That is, all that is computed of it ends as a factor of a product with something else that depends on the input: of
    a matrix product, or of one whose results are summed over the axis of the softmax. On the way it may be changed by
    itself and by constants, as when it is scaled, masked, divided by its sum once more, or mixed between heads.

    graph  of the net
    plain  the nodes that are not divided into parts whatever is, as they are computed of places and counts alone
    """

    def __init__(self, graph: Graph, plain: Container[fx.Node]) -> None:
        self._graph, self._plain = graph, plain

    def __call__(self, node: fx.Node, constant: Container[fx.Node]) -> bool:
        """Of a node, where ``constant`` has those of all later nodes that count as constants."""
        axis = self._starts(node, constant)
        if axis is None:
            return False
        found: dict[fx.Node, int | None] = {node: axis - len(node.meta["shape"])}  # the axis, counted from the end
        ended = False
        for user in self._graph.nodes[self._graph.nodes.index(node) + 1 :]:
            used = [n for n in user.all_input_nodes if n in found]
            if not used or user not in self._graph.fed or user in constant:
                continue
            others = [n for n in self._sources(user, constant) if n not in found]
            if others:
                if not self._multiplies(user, used, found):
                    return False
                ended = True
            elif user is self._graph.output or not self._is_function(user, found):
                return False
            else:
                found[user] = _axis(user, used[0], found[used[0]])
        return ended

    def _starts(self, node: fx.Node, constant: Container[fx.Node]) -> int | None:
        """The axis of a softmax; also of numerators alone, if a sum of theirs divides later on."""
        axis = softmax_axis(node, lambda n: tuple(self._sources(n, ()))) if node in self._graph.fed else None
        if axis is not None or operation(node) != "exp":
            return axis
        sums = (user.args for user in node.users if operation(user) == "sum" and user in constant)
        dims: Any = next((args[1] for args in sums if len(args) > 1), ())
        return dims[0] % len(node.meta["shape"]) if len(dims) == 1 else None

    def _sources(self, node: fx.Node, constant: Container[fx.Node]) -> list[fx.Node]:
        """The arguments that are divided into parts."""
        return [
            n
            for n in node.all_input_nodes
            if n in self._graph.fed and n not in self._plain and n not in constant and not n.meta.get("size")
        ]

    def _is_function(self, node: fx.Node, found: dict[fx.Node, int | None]) -> bool:
        name = operation(node)
        if name in _MIXES:
            first = arguments(node)[0]
            axis = found.get(first)
            size = len(first.meta["shape"])
            return axis is not None and axis % size != _MIXES[name] % size
        return name in _OF_WEIGHTS or not name

    def _multiplies(self, node: fx.Node, used: list[fx.Node], found: dict[fx.Node, int | None]) -> bool:
        """Whether weights are one factor, and something else the other."""
        name = operation(node)
        if name in _MATRIX:
            return sum(node.args[at] in found for at in _MATRIX[name]) == 1 == len(used)
        return name == "mul" and len(used) == 1 and all(_sums(user, found[used[0]]) for user in node.users)


def _sums(node: fx.Node, axis: int | None) -> bool:
    """Whether a node sums over an axis, counted from the end."""
    if operation(node) not in ("sum", "mean") or axis is None or len(node.args) < 2:
        return False
    given = arguments(node)
    size = len(given[0].meta["shape"])
    dims = given[1] if isinstance(given[1], list | tuple) else [given[1]]
    return axis % size in [dim % size for dim in dims]


def _axis(node: fx.Node, before: fx.Node, axis: int | None) -> int | None:
    """Where an axis of ``before``, counted from the end, lies in what is made of it; None where that is not clear."""
    if axis is None or "shape" not in node.meta:
        return None
    given = arguments(node)
    name, old, new = operation(node), tuple(before.meta["shape"]), tuple(node.meta["shape"])
    if name == "permute":
        dims = [dim % len(old) for dim in given[1]]
        return dims.index(axis % len(old)) - len(new)
    if name == "transpose":
        a, b = (dim % len(old) - len(old) for dim in given[1:3])
        return b if axis == a else a if axis == b else axis
    if name == "unsqueeze":
        return axis - 1 if given[1] % len(new) - len(new) >= axis else axis
    if name == "reshape":
        return axis if old[axis:] == new[axis:] else None
    if name in ("expand", "slice") or name in ELEMENTWISE or name in _MIXES:
        return axis
    return None

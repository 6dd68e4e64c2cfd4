"""What the graph of a net alone says about its decomposition."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from attrib.decomposition.call import named
from attrib.decomposition.table import READ_WHOLE
from attrib.models.activations import ELEMENTWISE
from attrib.models.calls import operation
from attrib.models.graph import Graph

# Operations that may stand between attention weights and their product with the values.
_ON_THE_WAY = frozenset((
    "_to_copy", "reshape", "transpose", "permute", "expand", "unsqueeze", "squeeze", "masked_fill",
))  # fmt: skip
_PRODUCTS = frozenset(("matmul", "bmm", "mm", "baddbmm"))


@dataclass(frozen=True)
class Plan:
    """Which nodes are not divided into two parts, and which token ids are embedded.

    constant  the nodes whose value is that of the whole, under every mask; see ``_is_constant``
    ids       those that are the token ids of the input, perhaps changed one by one
    apart     whether samples and rows can be matched everywhere: rows are one axis, or the outer part of one
    """

    constant: frozenset[fx.Node]
    ids: frozenset[fx.Node]
    apart: bool

    @classmethod
    def of(cls, graph: Graph) -> Plan:
        constant: set[fx.Node] = set()
        for node in reversed(graph.nodes):
            if node in graph.fed and node is not graph.output and _is_constant(node, graph, constant):
                constant.add(node)
        return cls(frozenset(constant), frozenset(_ids(graph)), all(map(_apart, graph.fed)))


def _is_constant(node: fx.Node, graph: Graph, constant: set[fx.Node]) -> bool:
    """Whether a node's value counts as a constant, which is that of the whole.

    Comparisons, places and counts: what they choose is chosen by the whole, as the maxima of max-pooling are (Singh
    2019), and the numbers that are chosen are divided. Attention weights: then attention is linear in its values; what
    Ali et al., *XAI for Transformers: Better Explanations through Conservative Propagation*, ICML 2022, section 3.2, do
    for LRP, and Hsu et al. (see ``rules_transformer``) for CD. Numbers that divide: as the deviation in a norm (Ali et
    al., section 3.3). And all from which nothing else is computed.
    """
    dtype = node.meta.get("dtype")
    if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
        return True
    if operation(node) in ("rsqrt", "reciprocal") or (operation(node) == "pow" and _negative(node)):
        return True
    if operation(node) == "softmax" and _weighs(node, graph):
        return True
    return all(user in constant or user not in graph.fed or _reads_whole(user, node) for user in node.users)


def _negative(node: fx.Node) -> bool:
    exponent = node.args[1]
    return isinstance(exponent, int | float) and exponent < 0


def _reads_whole(user: fx.Node, node: fx.Node) -> bool:
    names = READ_WHOLE.get(operation(user), ())
    given = named(user, user.args, user.kwargs) if names else {}
    return bool(names) and all(name in names for name, value in given.items() if value is node)


def _weighs(node: fx.Node, graph: Graph) -> bool:
    """Whether a node is read by matrix products alone, with something else that depends on the input."""

    def reads(user: fx.Node) -> bool:
        if operation(user) in _PRODUCTS:
            return any(other in graph.fed for other in user.all_input_nodes if other is not node)
        return operation(user) in _ON_THE_WAY and _weighs(user, graph)

    return bool(node.users) and all(reads(user) for user in node.users)


def _ids(graph: Graph) -> Iterable[fx.Node]:
    """Positions that are counted from the padding, say, are not ids: a comparison is on the way to them."""
    found: set[fx.Node] = set()
    if graph.input.meta["dtype"].is_floating_point:
        return found
    for node in graph.nodes:
        moves = operation(node) in ELEMENTWISE or operation(node) in ("reshape", "slice", "expand", "unsqueeze")
        dtype = node.meta.get("dtype")
        whole_number = dtype is not None and not dtype.is_floating_point and str(dtype) != "torch.bool"
        if node is graph.input or (moves and whole_number and not found.isdisjoint(node.all_input_nodes)):
            found.add(node)
    return found


def _apart(node: fx.Node) -> bool:
    """Whether the rows are where they were, as far as the order of the numbers is concerned."""
    if "shape" not in node.meta:  # several results, each of which has a node
        return True
    before = [n for n in node.all_input_nodes if n.meta.get("rows")]
    if len(node.meta["rows"]) != 1:
        return False
    axis, size = _place(node)
    if not before or node.target is operator.getitem:
        return True
    places = [_place(n) for n in before if len(n.meta["rows"]) == 1]
    if operation(node) == "reshape":  # the outermost of what is merged, or of what it is divided into
        return any(math.prod(_shape(n)[:at]) == math.prod(_shape(node)[:axis]) for n, (at, _) in zip(before, places))
    return size in {own for _, own in places}


def _shape(node: fx.Node) -> tuple[int, ...]:
    shape: tuple[int, ...] = node.meta["shape"]
    return shape


def _place(node: fx.Node) -> tuple[int, int]:
    """The axis of the rows, and its size."""
    (axis,) = node.meta["rows"]
    return axis, _shape(node)[axis]

"""What the graph of a net alone says about its decomposition."""

from __future__ import annotations

import math
import operator
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from attrib.decomposition.attention import AttentionWeights
from attrib.decomposition.call import named
from attrib.decomposition.table import READ_WHOLE
from attrib.models.activations import ELEMENTWISE
from attrib.models.calls import operation
from attrib.models.functions import Function, functions
from attrib.models.graph import Graph


@dataclass(frozen=True)
class Plan:
    """Which nodes are not divided into two parts, and which token ids are embedded.

    constant   the nodes whose value is that of the whole, under every mask; see ``_is_constant``
    functions  the nodes that several calls compute of one other value, number by number
    rectifiers the nodes that are functions of the kind of ReLU, of several calls or of one
    needed     the nodes that are computed: not those within such a function alone
    ids        those that are the token ids of the input, perhaps changed one by one
    apart      whether samples and rows can be matched everywhere: rows are one axis, or the outer part of one
    """

    constant: frozenset[fx.Node]
    functions: Mapping[fx.Node, Function]
    rectifiers: frozenset[fx.Node]
    needed: frozenset[fx.Node]
    ids: frozenset[fx.Node]
    apart: bool

    @classmethod
    def of(cls, graph: Graph) -> Plan:
        ids = frozenset(_ids(graph))
        several = functions(graph)
        weighs = AttentionWeights(graph, _plain(graph, ids))
        constant: set[fx.Node] = set()
        users: dict[fx.Node, list[fx.Node]] = {graph.output: []}  # of what is needed, those that are
        for node in reversed(graph.nodes):
            if node not in users:
                continue
            divided = node in graph.fed and node is not graph.output
            if divided and _is_constant(node, [u for u in users[node] if u in graph.fed], constant, weighs, several):
                constant.add(node)
            for used in [several[node].of] if node in several else node.all_input_nodes:
                users.setdefault(used, []).append(node)
        rectifiers = frozenset(
            node for node in users if (found := several.get(node) or _one_call(graph, node)) and found.rectifies
        )
        apart = all(map(_apart, graph.fed))
        return cls(frozenset(constant), several, rectifiers, frozenset(users), ids, apart)


def _one_call(graph: Graph, node: fx.Node) -> Function | None:
    """A call that is an element-wise function of one value."""
    used = [n for n in node.all_input_nodes if n in graph.fed]
    one = operation(node) in ELEMENTWISE and len(used) == 1 and not _counts(node) and not _counts(used[0])
    return Function(node, used[0]) if one else None


def _is_constant(
    node: fx.Node,
    users: Sequence[fx.Node],
    constant: set[fx.Node],
    weighs: AttentionWeights,
    several: Container[fx.Node],
) -> bool:
    """Whether a node's value counts as a constant, which is that of the whole.

    Comparisons, places and counts: what they choose is chosen by the whole, as the maxima of max-pooling are (Singh
    2019), and the numbers that are chosen are divided. Attention weights: then attention is linear in its values; what
    Ali et al., *XAI for Transformers: Better Explanations through Conservative Propagation*, ICML 2022, section 3.2, do
    for LRP, and Hsu et al. (see ``rules_transformer``) for CD. Numbers that divide: as the deviation in a norm (Ali et
    al., section 3.3). And all from which nothing else is computed.
    """
    if _counts(node):
        return True
    if node not in several and (operation(node) in ("rsqrt", "reciprocal") or _negative(node)):
        return True
    if weighs(node, constant):
        return True
    return all(user in constant or (user not in several and _reads_whole(user, node)) for user in users)


def _negative(node: fx.Node) -> bool:
    """Whether a node is a power with a negative exponent."""
    return operation(node) == "pow" and isinstance(node.args[1], int | float) and node.args[1] < 0


def _reads_whole(user: fx.Node, node: fx.Node) -> bool:
    names = READ_WHOLE.get(operation(user), ())
    given = named(user, user.args, user.kwargs) if names else {}
    return bool(names) and all(name in names for name, value in given.items() if value is node)


def _plain(graph: Graph, ids: Container[fx.Node]) -> set[fx.Node]:
    """The nodes that no part of the input reaches but by choices, places and counts."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node in graph.fed:
            embeds = operation(node) == "embedding" and any(n in ids for n in node.all_input_nodes)
            of_plain = node is not graph.input and all(n in found for n in node.all_input_nodes if n in graph.fed)
            if _counts(node) or (of_plain and not embeds):
                found.add(node)
    return found


def _counts(node: fx.Node) -> bool:
    dtype = node.meta.get("dtype")
    return dtype is not None and not (dtype.is_floating_point or dtype.is_complex)


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

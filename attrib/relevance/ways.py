"""The ways that numbers take through a net that attends, and the tokens that they are the numbers of."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from attrib.models.calls import is_float, operation
from attrib.models.graph import Graph

REFUSED = "this method needs self-attention"
ELSE = "Take method=lrp_epsilon or method=integrated_gradients"


def tokens_of(value: Tensor, rows: int) -> Tensor:
    """What is attended to, (N, heads, T, D) or (N * heads, T, D) -> (N, T, heads * D)."""
    return value.reshape(rows, -1, *value.shape[-2:]).transpose(1, 2).flatten(2)


class Ways:
    """The ways that numbers take from the input, or from the embeddings of ids, through the net; not those of masks."""

    def __init__(self, graph: Graph) -> None:
        self._before: dict[fx.Node, fx.Node] = {}  # the last node that all ways to a node go through
        self._depth = {graph.input: 0}
        ids = not is_float(graph.input)
        for node in graph.nodes:
            used = [n for n in node.all_input_nodes if n in self._depth and (n is not graph.input or not ids)]
            if ids and operation(node) == "embedding" and node in graph.fed:
                used = [graph.input]
            if used and node.op == "call_function" and not node.meta["size"]:
                self._before[node] = self.common(used)
                self._depth[node] = self._depth[self._before[node]] + 1

    def through(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that all ways to a node go through, from the first behind the input to the node itself."""
        found = []
        while node in self._before:
            found.append(node)
            node = self._before[node]
        return found[::-1]

    def common(self, nodes: Sequence[fx.Node]) -> fx.Node:
        """The last node that all ways to all of these go through."""
        found, *others = (node for node in nodes if node in self._depth)
        for other in others:
            while found is not other:
                if self._depth[found] >= self._depth[other]:
                    found = self._before[found]
                else:
                    other = self._before[other]
        return found


def ancestors(graph: Graph, node: fx.Node) -> set[fx.Node]:
    found, open_ = set(), [node]
    while open_:
        at = open_.pop()
        if at not in found:
            found.add(at)
            open_ += at.all_input_nodes
    return found

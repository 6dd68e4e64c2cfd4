"""What stands behind a layer with weights and is computed with it: read off the graph."""

from __future__ import annotations

from torch import fx

from attrib.models.activations import BATCH_NORM
from attrib.models.calls import arguments, attribute, operation
from attrib.models.graph import Graph


def merged(graph: Graph, layer: fx.Node, axis: int) -> tuple[fx.Node, ...]:
    """What is one layer together with it: a batch norm with fixed statistics, or a sum and a product with constants.

    axis  that of the layer's channels, each of which has its own constant

    The last of them adds. What multiplies alone, as a layer's scale does in ConvNeXt, changes no share: it stays out.
    """
    found: list[fx.Node] = []
    at = layer
    while len(at.users) == 1:
        (user,) = at.users
        if operation(user) in BATCH_NORM and arguments(user)[0] is at and fixed(user):
            weights = [given for given in arguments(user)[1:5] if isinstance(given, fx.Node)]
            return (*found, user) if all(_of_net(graph, given) for given in weights) else _adding(found)
        if not _of_channels(graph, user, at, axis):
            break
        found.append(user)
        at = user
    return _adding(found)


def _adding(found: list[fx.Node]) -> tuple[fx.Node, ...]:
    last = max((i for i, node in enumerate(found) if operation(node) in ("add", "sub")), default=-1)
    return tuple(found[: last + 1])


def fixed(norm: fx.Node) -> bool:
    """Whether a batch norm uses the statistics of training."""
    training = BATCH_NORM[operation(norm)]
    return training is None or not arguments(norm)[training]


def _of_channels(graph: Graph, node: fx.Node, before: fx.Node, axis: int) -> bool:
    """Whether a call adds to, or multiplies, what was before by one constant for each channel."""
    if operation(node) not in ("add", "sub", "mul", "div") or len(arguments(node)) != 2 or node.kwargs:
        return False
    first, second = arguments(node)
    other = second if first is before else first
    if not isinstance(other, fx.Node) or other is before or not _of_net(graph, other):
        return False
    if first is not before and operation(node) in ("sub", "div"):
        return False
    kept = attribute(graph.net, str(other.target)) if other.op == "get_attr" else None
    shape, own = before.meta["shape"], other.meta["shape"] if kept is None else kept.shape
    axis %= len(shape)
    wide = (*[1] * (len(shape) - len(own)), *own)
    return len(own) <= len(shape) and all(n == (shape[i] if i == axis else 1) for i, n in enumerate(wide))


def _of_net(graph: Graph, node: fx.Node) -> bool:
    """Whether a value is made of the net's parameters and buffers alone."""
    return node.op == "get_attr" or (
        node.op == "call_function"
        and node not in graph.fed
        and not node.meta["size"]
        and all(_of_net(graph, used) for used in node.all_input_nodes)
    )

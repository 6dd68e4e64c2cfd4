"""Layers and functions that are written out in several calls: what they are is read off the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import fx

from attrib.models.activations import BATCH_NORM
from attrib.models.calls import attribute, operation
from attrib.models.graph import Graph

Sources = Callable[[fx.Node], tuple[fx.Node, ...]]
_HIDES = ("mul", "masked_fill", "where")  # may set some of the numerators of a softmax to zero
_LOG_SOFTMAX = frozenset(("log_softmax", "_log_softmax"))


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    return node.args


# ---- what stands behind a layer with weights -----------------------------------------------------------


def merged(graph: Graph, layer: fx.Node, axis: int) -> tuple[fx.Node, ...]:
    """What is one layer together with it: a batch norm with fixed statistics, or a sum and a product with constants.

    axis  that of the layer's channels, each of which has its own constant

    The last of them adds. What multiplies alone, as a layer's scale does in ConvNeXt, changes no share: it stays out.
    """
    found: list[fx.Node] = []
    at = layer
    while len(at.users) == 1:
        (user,) = at.users
        if operation(user) in BATCH_NORM and _arguments(user)[0] is at and fixed(user):
            weights = [given for given in _arguments(user)[1:5] if isinstance(given, fx.Node)]
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
    return training is None or not _arguments(norm)[training]


def _of_channels(graph: Graph, node: fx.Node, before: fx.Node, axis: int) -> bool:
    """Whether a call adds to, or multiplies, what was before by one constant for each channel."""
    if operation(node) not in ("add", "sub", "mul", "div") or len(_arguments(node)) != 2 or node.kwargs:
        return False
    first, second = _arguments(node)
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


# ---- softmax -------------------------------------------------------------------------------------------


def softmax(node: fx.Node, sources: Sources) -> tuple[fx.Node, int] | None:
    """What a softmax is taken of, and over which axis, if a call is the last of one that is written out.

    sources  the arguments of a call that the relevance may go to
    """
    if operation(node) == "exp":
        return _of_logarithm(_arguments(node)[0])
    if operation(node) not in ("div", "mul") or node.kwargs or len(sources(node)) != 2:
        return None
    numerator, under = _arguments(node)
    if operation(node) == "mul":
        if operation(numerator) == "reciprocal":
            numerator, under = under, numerator
        if operation(under) != "reciprocal":
            return None
        under = _arguments(under)[0]
    for total in _back(under, ("add", "clamp_min", "clamp", "unsqueeze"), sources):
        if (
            operation(total) == "sum"
            and _arguments(total)[0] is numerator
            and len(_arguments(total)) > 1
            and len(_arguments(total)[1]) == 1
        ):
            axis = _arguments(total)[1][0] % len(numerator.meta["shape"])
            shape = tuple(1 if i == axis else n for i, n in enumerate(numerator.meta["shape"]))
            of = next((at for at in _back(numerator, _HIDES, sources) if operation(at) == "exp"), None)
            if of is not None and tuple(under.meta["shape"]) == shape:
                return _unshifted(_arguments(of)[0], axis), axis
    return None


def _back(node: fx.Node, through: Sequence[str], sources: Sources) -> Iterator[fx.Node]:
    """A node, and what it is made of by such calls, as long as each has one source."""
    yield node
    while operation(node) in through and len(sources(node)) == 1:
        (node,) = sources(node)
        yield node


def _of_logarithm(given: Any) -> tuple[fx.Node, int] | None:
    if not isinstance(given, fx.Node):
        return None
    if operation(given) in _LOG_SOFTMAX:
        return _arguments(given)[0], _arguments(given)[1]
    if operation(given) == "sub" and isinstance(_arguments(given)[1], fx.Node) and not given.kwargs:
        of, total = _arguments(given)
        if operation(total) == "logsumexp" and _arguments(total)[0] is of and _arguments(total)[2:] == (True,):
            return (of, _arguments(total)[1][0]) if len(_arguments(total)[1]) == 1 else None
    return None


def _unshifted(node: fx.Node, axis: int) -> fx.Node:
    """What was shifted by its own maximum, which changes no softmax."""
    if operation(node) != "sub" or node.kwargs or not isinstance(_arguments(node)[1], fx.Node):
        return node
    of, most = _arguments(node)
    while operation(most) in ("detach", "alias", "clone", "") and isinstance(_arguments(most)[0], fx.Node):
        most = _arguments(most)[0]
    if operation(most) not in ("max", "amax") or _arguments(most)[0] is not of:
        return node
    dims: Any = _arguments(most)[1] if len(_arguments(most)) > 1 else []
    reduced = [dim % len(of.meta["shape"]) for dim in (dims if isinstance(dims, list | tuple) else [dims])]
    return of if not reduced or axis in reduced else node

"""The softmax, also one that is written out in several calls, such as ``e / e.sum(-1, keepdim=True)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import fx

from attrib.models.calls import arguments, operation

Sources = Callable[[fx.Node], tuple[fx.Node, ...]]
SOFTMAX = frozenset(("softmax", "_softmax", "_safe_softmax"))
LOG_SOFTMAX = frozenset(("log_softmax", "_log_softmax"))
_HIDES = ("mul", "masked_fill", "where")  # may set some of the numerators to zero


def softmax_axis(node: fx.Node, sources: Sources) -> int | None:
    """The axis of a softmax, also of the last call of one that is written out; None if a call is none."""
    if operation(node) in SOFTMAX:
        return int(arguments(node)[1]) % len(node.meta["shape"])
    written = written_softmax(node, sources)
    return None if written is None else written[1] % len(node.meta["shape"])


def written_softmax(node: fx.Node, sources: Sources) -> tuple[fx.Node, int] | None:
    """What a softmax is taken of, and over which axis, if a call is the last of one that is written out.

    sources  the arguments of a call that the relevance may go to
    """
    if operation(node) == "exp":
        return _of_logarithm(arguments(node)[0])
    if operation(node) not in ("div", "mul") or node.kwargs or len(sources(node)) != 2:
        return None
    numerator, under = arguments(node)
    if operation(node) == "mul":
        if operation(numerator) == "reciprocal":
            numerator, under = under, numerator
        if operation(under) != "reciprocal":
            return None
        under = arguments(under)[0]
    for total in _back(under, ("add", "clamp_min", "clamp", "unsqueeze"), sources):
        if (
            operation(total) == "sum"
            and arguments(total)[0] is numerator
            and len(arguments(total)) > 1
            and len(arguments(total)[1]) == 1
        ):
            axis = arguments(total)[1][0] % len(numerator.meta["shape"])
            shape = tuple(1 if i == axis else n for i, n in enumerate(numerator.meta["shape"]))
            of = next((at for at in _back(numerator, _HIDES, sources) if operation(at) == "exp"), None)
            if of is not None and tuple(under.meta["shape"]) == shape:
                return _unshifted(arguments(of)[0], axis), axis
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
    if operation(given) in LOG_SOFTMAX:
        return arguments(given)[0], arguments(given)[1]
    if operation(given) == "sub" and isinstance(arguments(given)[1], fx.Node) and not given.kwargs:
        of, total = arguments(given)
        if operation(total) == "logsumexp" and arguments(total)[0] is of and arguments(total)[2:] == (True,):
            return (of, arguments(total)[1][0]) if len(arguments(total)[1]) == 1 else None
    return None


def _unshifted(node: fx.Node, axis: int) -> fx.Node:
    """What was shifted by its own maximum, which changes no softmax."""
    if operation(node) != "sub" or node.kwargs or not isinstance(arguments(node)[1], fx.Node):
        return node
    of, most = arguments(node)
    while operation(most) in ("detach", "alias", "clone", "") and isinstance(arguments(most)[0], fx.Node):
        most = arguments(most)[0]
    if operation(most) not in ("max", "amax") or arguments(most)[0] is not of:
        return node
    dims: Any = arguments(most)[1] if len(arguments(most)) > 1 else []
    reduced = [dim % len(of.meta["shape"]) for dim in (dims if isinstance(dims, list | tuple) else [dims])]
    return of if not reduced or axis in reduced else node

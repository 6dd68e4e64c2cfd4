"""Ways back through a net other than its gradient, for guided backpropagation, deconvolution and DeepLIFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx

from attrib.models import Classifier
from attrib.models.activations import ELEMENTWISE, LINEAR, RELU_LIKE
from attrib.models.calls import call, operation
from attrib.models.graph import Graph, taken_apart
from attrib.models.written_relus import WrittenReLU, written_relus

Kinds = Mapping[str, Callable[[fx.Node], int | None]]
Rule = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
Written = Mapping[fx.Node, WrittenReLU]


def replaced(value: Tensor, way_back: Tensor) -> Tensor:
    """``value``, whose gradient goes where that of ``way_back`` goes."""
    return value.detach() + (way_back - way_back.detach())


def guided(relu: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A ReLU that lets only the positive part of its gradient through (Springenberg et al., 2015)."""
    x = x.clone()
    if x.requires_grad:
        x.register_hook(lambda grad: grad.clamp(min=0))
    return relu(x)


def deconvolution(relu: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A ReLU whose way back is a ReLU of the signal (Zeiler & Fergus, 2014, section 2.1)."""
    way_back = x.clone()
    if way_back.requires_grad:
        way_back.register_hook(lambda grad: grad.clamp(min=0))
    return replaced(relu(x), way_back)


def _as_it_is(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


class Hookable:
    """The net, with a ``rule`` for the calls that ``kinds`` recognises: (N, *input) -> (N, K) logits.

    kinds    operation -> which argument of such a node is the one that the call is about, or None if it is none of them
    written  also what is such a call, but written in several
    """

    def __init__(self, model: Classifier, kinds: Kinds, written: Callable[[Graph], Written] | None = None) -> None:
        self._model, self._kinds = model, kinds
        self._written = written or (lambda _: {})

    def found(self, x: Tensor) -> list[fx.Node]:
        """The calls that are recognised."""
        graph = self._model.graph(x)
        one_call = [
            n for n in graph.nodes if n in graph.fed and (self._at(n) is not None or operation(n) == "rnn_relu")
        ]
        return [*one_call, *self._written(graph)]

    def _at(self, node: fx.Node) -> int | None:
        """Which argument such a call is about."""
        kind = self._kinds.get(operation(node))
        return None if kind is None else kind(node)

    def __call__(self, x: Tensor, rule: Rule = _as_it_is) -> Tensor:
        graph = self._model.graph(x)
        written = self._written(graph)
        kept: dict[fx.Node, Tensor | None] = {relu.of: None for relu in written.values()}
        if graph.input in kept:
            x = kept[graph.input] = x.clone()

        def keeping(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            of = kept[written[node].of] if node in written else None
            result = compute(node, args, kwargs) if of is None else written[node](rule, of)
            if node in kept:
                kept[node] = result
            return result

        def compute(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if operation(node) == "rnn_relu":
                return taken_apart(node, args, kwargs, compute, lambda _: None)
            at = self._at(node)
            if at is None or not isinstance(args[at], Tensor) or not args[at].requires_grad:
                return call(node)(*args, **kwargs)
            return rule(lambda value: call(node)(*args[:at], value, *args[at + 1 :], **kwargs), args[at])

        return graph.propagate(x, keeping)

    def others(self, x: Tensor) -> list[str]:
        """Other element-wise operations that are no sums, products or comparisons, with the modules they are in."""
        graph = self._model.graph(x)
        bent = ELEMENTWISE - LINEAR.keys() - {"mul", "div", "eq", "ne", "lt", "le", "gt", "ge"}
        unknown = graph.fed - {*self.found(x)}
        found = {operation(n): n for n in reversed(graph.nodes) if n in unknown}
        return [f"{name} in {graph.where(n)}" for name, n in found.items() if name in bent]


def hookable(model: Classifier, kinds: Kinds) -> Hookable:
    """``model`` with a rule for the calls that ``kinds`` recognises."""
    return Hookable(model, kinds)


def relus(model: Classifier) -> Hookable:
    """``model`` with a rule for its ReLUs, however they are written. See ``written_relus`` for what is refused."""

    return Hookable(model, RELU_LIKE, written_relus)

"""Ways back through a net other than its gradient, for guided backpropagation, deconvolution and DeepLIFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx

from attrib.models import Classifier
from attrib.models.activations import ELEMENTWISE, LINEAR
from attrib.models.calls import call, operation
from attrib.models.graph import taken_apart

Kinds = Mapping[str, Callable[[fx.Node], int | None]]
Rule = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


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

    kinds   operation -> which argument of such a node is the one that the call is about, or None if it is none of them
    """

    def __init__(self, model: Classifier, kinds: Kinds) -> None:
        self._model, self._kinds = model, kinds

    def found(self, x: Tensor) -> list[fx.Node]:
        """The calls that are recognised."""
        graph = self._model.graph(x)
        return [n for n in graph.nodes if n in graph.fed and (self._at(n) is not None or operation(n) == "rnn_relu")]

    def _at(self, node: fx.Node) -> int | None:
        """Which argument such a call is about."""
        kind = self._kinds.get(operation(node))
        return None if kind is None else kind(node)

    def __call__(self, x: Tensor, rule: Rule = _as_it_is) -> Tensor:
        def compute(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if operation(node) == "rnn_relu":
                return taken_apart(node, args, kwargs, compute, lambda _: None)
            at = self._at(node)
            if at is None or not isinstance(args[at], Tensor) or not args[at].requires_grad:
                return call(node)(*args, **kwargs)
            return rule(lambda value: call(node)(*args[:at], value, *args[at + 1 :], **kwargs), args[at])

        return self._model.graph(x).propagate(x, compute)

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

"""Ways back through a net other than its gradient, for guided backpropagation, deconvolution and DeepLIFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx

from attrib.models import Classifier
from attrib.models.activations import ELEMENTWISE, LINEAR
from attrib.models.aten import of_input, place, propagate
from attrib.models.graph import call, operation

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

    def found(self, x: Tensor) -> dict[fx.Node, int]:
        """The calls that are recognised -> the argument."""
        traced = self._model.traced(x)
        depends = of_input(traced.graph)
        found = {n: self._kinds[operation(n)](n) for n in traced.graph.nodes if operation(n) in self._kinds}
        return {node: at for node, at in found.items() if at is not None and node in depends}

    def __call__(self, x: Tensor, rule: Rule = _as_it_is) -> Tensor:
        found = self.found(x)

        def compute(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if node not in found:
                return call(node)(*args, **kwargs)
            at = found[node]
            return rule(lambda value: call(node)(*args[:at], value, *args[at + 1 :], **kwargs), args[at])

        return propagate(self._model.traced(x), x, compute)

    def others(self, x: Tensor) -> list[str]:
        """Other element-wise operations that are no sums, products or comparisons, with the modules they are in."""
        traced = self._model.traced(x)
        depends, found = of_input(traced.graph), self.found(x)
        bent = ELEMENTWISE - LINEAR.keys() - {"mul", "div", "eq", "ne", "lt", "le", "gt", "ge"}
        nodes = {operation(n): n for n in reversed(traced.graph.nodes) if n in depends - found.keys()}
        return [f"{name} in {place(self._model.module, x, traced, n)}" for name, n in nodes.items() if name in bent]


def hookable(model: Classifier, kinds: Kinds) -> Hookable:
    """``model`` with a rule for the calls that ``kinds`` recognises."""
    return Hookable(model, kinds)

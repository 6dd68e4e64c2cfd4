"""ReLUs that are written in several calls, such as (x + |x|) / 2, or in one that is none by name, such as min(x, 0).

They are found by what they compute: wherever a value is an element-wise function of another, the function is tried on a
few numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from attrib.models.activations import RELU_LIKE, is_zero
from attrib.models.calls import operation
from attrib.models.functions import TRIED, Function, walks
from attrib.models.graph import Graph
from attrib.types import UserError


@dataclass(frozen=True)
class WrittenReLU:
    """A value that is ``factor * min(max(sign * of, 0), ceiling)``, with sign 1 or -1, of another."""

    of: fx.Node
    factor: float
    sign: int
    ceiling: float

    def __call__(self, relu: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor], x: Tensor) -> Tensor:
        """By a rule for ReLUs: ``relu`` of the function, and of what it is taken of."""
        return self.factor * relu(lambda value: value.clamp(0, self.ceiling), self.sign * x)


_KEPT = "written ReLUs"  # of a graph's net


def written_relus(graph: Graph) -> Mapping[fx.Node, WrittenReLU]:
    """The last calls of ReLUs that are written out, looked for once per graph.

    Of x + relu(-x), say, it is the whole that counts, a ReLU of x. Raises UserError, which names the module, for a
    maximum with a zero that is stacked on the values.
    """
    found: dict[fx.Node, WrittenReLU] | None = graph.net.meta.get(_KEPT)
    if found is None:
        found = graph.net.meta[_KEPT] = _found(graph)
    return found


def _found(graph: Graph) -> dict[fx.Node, WrittenReLU]:
    found: dict[fx.Node, WrittenReLU] = {}
    for node, of, between in walks(graph):
        if operation(of) == "abs":  # as inside F.lp_pool2d: nothing is cut off
            continue
        relu = None if node in found or _one_call(node) else _relu(node, of)
        if relu is None:
            continue
        # A multiple of a ReLU that has been found already needs no other.
        others = [_relu(inner, of) for inner in between if _one_call(inner) or inner in found]
        if not any(other and (other.sign, other.ceiling) == (relu.sign, relu.ceiling) for other in others):
            found[node] = relu
    for node in graph.nodes:
        if node in graph.fed and operation(node) in ("amax", "max") and _with_zero(node.args[0]):
            raise UserError(
                f"{graph.where(node)} takes the maximum of values and a zero that is stacked on them, which is a ReLU, "
                "but is not read as one. Write it as one ReLU, or take method=gradient"
            )
    return found


def _one_call(node: fx.Node) -> bool:
    """Whether a call is a ReLU by itself."""
    kind = RELU_LIKE.get(operation(node))
    return kind is not None and kind(node) is not None


def _with_zero(node: Any) -> bool:
    return isinstance(node, fx.Node) and operation(node) in ("stack", "cat") and any(map(is_zero, _listed(node)))


def _listed(node: fx.Node) -> Any:
    return node.args[0]


def _relu(node: fx.Node, of: fx.Node) -> WrittenReLU | None:
    if not of.meta["dtype"].is_floating_point or not node.meta["dtype"].is_floating_point:
        return None
    found = Function(node, of).tried(TRIED)
    if found is None or found.numel() != len(TRIED) or not found.isfinite().all():
        return None
    found = found.flatten()
    for sign in (1, -1):
        cut = (sign * TRIED).clamp(min=0)
        factor = float(found[cut == 1] if (cut == 1).any() else 0.0)
        if factor:
            ceiling = float((found / factor).max())
            off = bool((found[cut == 0] == 0).all())  # exactly: a norm kept from zero by 1e-12 is no ReLU
            if off and torch.allclose(found, factor * cut.clamp(max=ceiling), rtol=1e-5, atol=1e-6) and ceiling > 1:
                return WrittenReLU(of, factor, sign, ceiling if ceiling < 39 else float("inf"))
    return None

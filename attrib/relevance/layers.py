"""Layers with weights, with the batch norms and biases behind them merged in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from attrib.models.activations import BATCH_NORM
from attrib.models.calls import attribute, call, operation
from attrib.models.graph import Graph
from attrib.relevance.norms import of_statistics
from attrib.relevance.plan import CONVOLUTIONS, Step
from attrib.relevance.rules import Layer


def layer_of(graph: Graph, node: fx.Node, step: Step, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Layer:
    """The layer with weights that a call makes with these arguments."""
    assert step.at is not None
    name, function = operation(node), call(node)
    at, weight_at, bias_at = step.at
    weight, bias = args[weight_at], None if bias_at is None else args[bias_at]
    beyond: list[int] = []
    if name in CONVOLUTIONS:
        beyond = [1] * CONVOLUTIONS[name]
        bias = None if bias is None else bias.view(-1, *beyond)

        def compute(x: Tensor, weight: Tensor) -> Tensor:
            found: Tensor = function(x, weight, None, *args[3:])
            return found

    else:
        product: Any = {"addmm": torch.mm, "baddbmm": torch.bmm, "addmv": torch.mv}.get(name, function)
        weight = weight * kwargs["alpha"] if "alpha" in kwargs else weight
        bias = bias * kwargs["beta"] if "beta" in kwargs else bias

        def compute(x: Tensor, weight: Tensor) -> Tensor:
            found: Tensor = product(x, weight) if at < weight_at else product(weight, x)
            return found

    for behind in step.merged:
        scale, shift = _affine(graph, behind)
        if scale is not None:
            weight = _scaled(name, weight, scale, beyond, args[6] if len(args) > 6 else 1)
            bias = None if bias is None else bias * scale.view(-1, *beyond)
        if shift is not None:
            shift = shift.view(-1, *beyond)
            bias = shift if bias is None else bias + shift
    return Layer(compute, weight, bias)


def _scaled(name: str, weight: Tensor, scale: Tensor, beyond: Sequence[int], groups: int) -> Tensor:
    """The weight of a layer whose outputs are multiplied, each channel by its own number."""
    if name.startswith("conv_transpose"):  # (in, out / groups, ...), the groups one after the other
        grouped = weight.unflatten(0, (groups, -1))
        return (grouped * scale.view(groups, 1, -1, *beyond)).flatten(0, 1)
    if name in CONVOLUTIONS or name == "linear":
        return weight * scale.view(-1, *[1] * (weight.ndim - 1))
    return weight * scale


def _affine(graph: Graph, node: fx.Node) -> tuple[Tensor | None, Tensor | None]:
    """What a call behind a layer multiplies its channels by, and then adds; one number for each, or None."""
    values: list[Any] = [constant(graph, given) for given in node.args]
    name = operation(node)
    if name in BATCH_NORM:
        weight, bias, mean, variance = values[1:5]
        return of_statistics(weight, bias, mean, variance, values[-1])
    (other,) = (value.flatten() for given, value in zip(node.args, values, strict=True) if value is not None)
    if name in ("mul", "div"):
        return (other if name == "mul" else 1 / other), None
    return None, -other if name == "sub" else other


def constant(graph: Graph, given: Any) -> Any:
    """A parameter or buffer of the net, or what calls make of these alone; None for what is made of the input."""
    if not isinstance(given, fx.Node):
        return fx.map_arg(given, lambda node: constant(graph, node))
    if given in graph.fed:
        return None
    if given.op == "get_attr":
        return attribute(graph.net, str(given.target))
    args, kwargs = fx.map_arg((given.args, dict(given.kwargs)), lambda node: constant(graph, node))
    return call(given)(*args, **kwargs)

"""Norms as what they are to LRP: affine in their input, with a scale that counts as a constant.

The deviation that a norm divides by gets no relevance (Ali et al., *XAI for Transformers*, ICML 2022, section 3.3;
Achtibat et al., 2024, proposition 3.4). What is left is a mean that is taken off and a bias: a sum, which shares
relevance out by the epsilon rule like any other, as in the authors' code (``layer_norm`` of lxt). If the bias passed
its share on as well, relevance would not be in proportion to the norm's input, and a residual in front of the norm,
which divides by that, would let it explode where the input is near zero and the output is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from attrib.models.activations import BATCH_NORM
from attrib.models.calls import operation

Affine = Callable[[Tensor], Tensor]


def affine(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Affine:
    """A layer, group or batch norm with these arguments, as a function of its input alone, with a fixed scale."""
    given = {argument.name: argument.default_value for argument in node.target._schema.arguments}  # type: ignore[union-attr]
    given |= {**dict(zip(given, args, strict=False)), **kwargs}
    x, weight, bias = given["input"], given["weight"], given["bias"]
    if operation(node) in BATCH_NORM:
        channels = (-1, *[1] * (x.ndim - 2))
        mean, variance = given.get("running_mean"), given.get("running_var")
        if mean is None or variance is None or given.get("training"):
            return _by_own(_same, [0, *range(2, x.ndim)], given, channels)
        scale, shift = of_statistics(weight, bias, mean, variance, _epsilon(given))
        return lambda value: value * scale.view(channels) + shift.view(channels)
    if operation(node) == "group_norm":
        groups: int = given["num_groups"]
        grouped = lambda value: value.unflatten(1, (groups, -1))  # noqa: E731
        return _by_own(grouped, list(range(2, x.ndim + 1)), given, (-1, *[1] * (x.ndim - 2)))
    return _by_own(_same, list(range(-len(given["normalized_shape"]), 0)), given, tuple(given["normalized_shape"]))


def of_statistics(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """What a batch norm multiplies its channels by, and then adds."""
    scale = (variance + epsilon).rsqrt() * (1 if weight is None else weight)
    return scale, (0 if bias is None else bias) - mean * scale


def _epsilon(given: Mapping[str, Any]) -> float:
    epsilon: float = given["eps"] if "eps" in given else given["epsilon"]
    return epsilon


def _same(value: Tensor) -> Tensor:
    return value


def _by_own(regroup: Affine, axes: list[int], given: Mapping[str, Any], shape: tuple[int, ...]) -> Affine:
    """By the statistics of the input itself over the axes, after ``regroup``; ``shape`` is that of the weights."""
    weight, bias = given["weight"], given["bias"]
    scale = torch.rsqrt(regroup(given["input"]).var(axes, correction=0, keepdim=True) + _epsilon(given))

    def compute(value: Tensor) -> Tensor:
        parts = regroup(value)
        found = ((parts - parts.mean(axes, keepdim=True)) * scale).reshape(value.shape)
        found = found if weight is None else found * weight.view(shape)
        return found if bias is None else found + bias.view(shape)

    return compute

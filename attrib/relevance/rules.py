"""LRP's rules for layers with weights: how the relevance of a layer's output is shared out among its inputs.

A layer is z = f(x, w) + b, linear in x and in w. Every rule replaces x, w and b by others and shares the relevance in
proportion to what each input then contributes:

    R_in = sum over groups of  factor * sum over parts of  sign * x' * (df/dx'(x', w'))^T (R_out / denominator)

where the group's denominator is the sum of its parts' sign * (f(x', w') + b'), moved away from zero by a stabiliser.
What the bias and the stabiliser have of the denominator they keep. The numbers are those of zennit 0.5, whose rules
have the same names; the papers are named at each rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from attrib.checks import require
from attrib.types import SampleError, UserError, did_you_mean

Maybe = Tensor | None


@dataclass(frozen=True)
class Part:
    """One linear map of a rule: its input, weight and bias (None: none) in the place of the layer's."""

    x: Tensor
    weight: Tensor
    bias: Maybe
    sign: float = 1.0


@dataclass(frozen=True)
class Group:
    """Parts with one denominator. ``where`` (as the output): where it counts; None: everywhere."""

    parts: Sequence[Part]
    factor: float = 1.0
    where: Maybe = None


@dataclass(frozen=True)
class Layer:
    """A layer with weights, which gives ``call(x, weight) + bias``; bias None if it has none."""

    call: Callable[[Tensor, Tensor], Tensor]
    weight: Tensor
    bias: Maybe

    def __call__(self, x: Tensor) -> Tensor:
        z = self.call(x, self.weight)
        return z if self.bias is None else z + self.bias


class Rule(Protocol):
    """A rule with its parameters."""

    @property
    def stabilizer(self) -> float:
        """What denominators are moved away from zero by."""
        ...

    def groups(self, layer: Layer, x: Tensor) -> Sequence[Group]: ...


def stable(value: Tensor, by: float) -> Tensor:
    """The value moved away from zero; 1 where it is zero after that."""
    moved = torch.where(value < 0, value - by, value + by)
    return moved if by else torch.where(moved == 0, 1.0, moved)


def _low(value: Maybe) -> Maybe:
    return None if value is None else value.clamp(max=0)


def _high(value: Maybe) -> Maybe:
    return None if value is None else value.clamp(min=0)


@dataclass(frozen=True)
class Epsilon:
    """In proportion to the contributions x w; epsilon keeps a share where they cancel (Bach et al., 2015, eq. 58)."""

    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        require(self, "epsilon", at_least=0)

    @property
    def stabilizer(self) -> float:
        return self.epsilon

    def groups(self, layer: Layer, x: Tensor) -> Sequence[Group]:
        return (Group((Part(x, layer.weight, layer.bias),)),)


@dataclass(frozen=True)
class AlphaBeta:
    """Positive contributions get alpha times the relevance, negative ones -beta times (Bach et al., 2015, eq. 60).

    alpha - beta must be 1. A unit all of whose contributions have one sign keeps what the other sign would get.
    """

    alpha: float = 2.0
    beta: float = 1.0
    stabilizer: float = 1e-6

    def __post_init__(self) -> None:
        require(self, "alpha", "beta", "stabilizer", at_least=0)
        if self.alpha - self.beta != 1:
            raise UserError(f"AlphaBeta: alpha - beta must be 1, not {self.alpha} - {self.beta}")

    def groups(self, layer: Layer, x: Tensor) -> Sequence[Group]:
        w, b = layer.weight, layer.bias
        below, above = x.clamp(max=0), x.clamp(min=0)
        positive = (Part(above, w.clamp(min=0), _high(b)), Part(below, w.clamp(max=0), None))
        negative = (Part(above, w.clamp(max=0), _low(b)), Part(below, w.clamp(min=0), None))
        return Group(positive, self.alpha), *((Group(negative, -self.beta),) if self.beta else ())


@dataclass(frozen=True)
class ZPlus:
    """In proportion to the positive contributions (Montavon et al., 2017, eq. 11): alpha-beta with beta 0."""

    stabilizer: float = 1e-6

    def __post_init__(self) -> None:
        require(self, "stabilizer", at_least=0)

    def groups(self, layer: Layer, x: Tensor) -> Sequence[Group]:
        return AlphaBeta(1.0, 0.0, self.stabilizer).groups(layer, x)


@dataclass(frozen=True)
class Gamma:
    """Contributions with the output's sign count 1 + gamma times (Montavon et al., 2019, table 10.1).

    For inputs of either sign as Andéol et al. (2021) generalise it.
    """

    gamma: float = 0.25
    stabilizer: float = 1e-6

    def __post_init__(self) -> None:
        require(self, "gamma", "stabilizer", at_least=0)

    def groups(self, layer: Layer, x: Tensor) -> Sequence[Group]:
        w, b = layer.weight, layer.bias
        below, above = x.clamp(max=0), x.clamp(min=0)
        more, less = w + self.gamma * w.clamp(min=0), w + self.gamma * w.clamp(max=0)
        high = None if b is None else b + self.gamma * b.clamp(min=0)
        low = None if b is None else b + self.gamma * b.clamp(max=0)
        z = layer(x)
        return (
            Group((Part(above, more, high), Part(below, less, None)), where=z > 0),
            Group((Part(above, less, low), Part(below, more, None)), where=z < 0),
        )


@dataclass(frozen=True)
class Flat:
    """The same to every input that the output sees, whatever its value and weight (Lapuschkin et al., 2019)."""

    stabilizer: float = 1e-6

    def __post_init__(self) -> None:
        require(self, "stabilizer", at_least=0)

    def groups(self, layer: Layer, x: Tensor) -> Sequence[Group]:
        return (Group((Part(torch.ones_like(x), torch.ones_like(layer.weight), None),)),)


@dataclass(frozen=True)
class WSquare:
    """In proportion to the squared weights, whatever the inputs (Montavon et al., 2017, eq. 12)."""

    stabilizer: float = 1e-6

    def __post_init__(self) -> None:
        require(self, "stabilizer", at_least=0)

    def groups(self, layer: Layer, x: Tensor) -> Sequence[Group]:
        bias = None if layer.bias is None else layer.bias.square()
        return (Group((Part(torch.ones_like(x), layer.weight.square(), bias),)),)


@dataclass(frozen=True)
class ZBox:
    """For inputs that lie in a box, such as pixels: z^B of Montavon et al. (2017, eq. 13).

    low, high   the least and the largest value that an input can have, in the units that the net gets: a number, or
                one for each channel, which is the second dimension of the layer's input

    Raises SampleError for an input outside of the box, where the rule means nothing.
    """

    low: float | Sequence[float]
    high: float | Sequence[float]
    stabilizer: float = 1e-6

    def __post_init__(self) -> None:
        require(self, "stabilizer", at_least=0)

    def _like(self, x: Tensor, bound: float | Sequence[float]) -> Tensor:
        value = torch.as_tensor(bound, dtype=x.dtype, device=x.device)
        if value.ndim:
            if x.ndim < 2 or x.shape[1] != len(value):
                raise UserError(
                    f"the rule zbox has bounds for {len(value)} channels, and the layer's input is {tuple(x.shape)}; "
                    "give one for each channel, or one number"
                )
            value = value.view(1, -1, *[1] * (x.ndim - 2))
        return value.expand_as(x)

    def groups(self, layer: Layer, x: Tensor) -> Sequence[Group]:
        low, high = self._like(x, self.low), self._like(x, self.high)
        beyond = torch.maximum(low - x, x - high).amax()
        if beyond > 1e-4 * (high - low).amax():
            raise SampleError(
                f"an input lies outside of the box of the rule zbox by {beyond.item():.2g}: set low and high to the "
                "least and the largest value that a pixel can have after normalisation"
            )
        w, b = layer.weight, layer.bias
        parts = (
            Part(x, w, b),
            Part(low, w.clamp(min=0), _high(b), -1.0),
            Part(high, w.clamp(max=0), _low(b), -1.0),
        )
        return (Group(parts),)


# An input that is zero, as padding is, may get relevance too.
OF_ZEROS = (Flat, WSquare, ZBox)

RULES: Mapping[str, type] = {
    "epsilon": Epsilon,
    "gamma": Gamma,
    "zplus": ZPlus,
    "alpha_beta": AlphaBeta,
    "flat": Flat,
    "w_square": WSquare,
    "zbox": ZBox,
}


def rule_of(name: str, values: Mapping[str, Any]) -> Rule:
    """The rule of that name with these parameters. Raises UserError for one that is not known, or wrong."""
    if name not in RULES:
        raise UserError(f"no rule {name!r}{did_you_mean(name, RULES)} (rules: {', '.join(RULES)})")
    known = [f.name for f in fields(RULES[name])]
    for given in values:
        if given not in known:
            raise UserError(f"the rule {name} has no parameter {given!r}{did_you_mean(given, known)} ({known})")
    try:
        made: Rule = RULES[name](**values)
    except TypeError as error:
        raise UserError(f"the rule {name}: {error}") from error
    return made


# ---- the way back --------------------------------------------------------------------------------------


def share_out(rule: Rule, layer: Layer, x: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """The relevance of a layer's output -> that of its input, and what bias and stabiliser keep, summed.

    The second is computed from the layer's outputs alone, so that both together can be checked.
    """
    total, kept = torch.zeros_like(x), relevance
    for group in rule.groups(layer, x):
        inputs, outputs = [], []
        with torch.enable_grad():
            for part in group.parts:
                inputs.append(part.x.detach().clone().requires_grad_())
                outputs.append(layer.call(inputs[-1], part.weight))
        with torch.no_grad():
            without = sum_of(part.sign * z for part, z in zip(group.parts, outputs, strict=True))
            biases = [part.sign * part.bias for part in group.parts if part.bias is not None]
            denominator = sum_of([without, *biases])
            quotient = group.factor * relevance / stable(denominator, rule.stabilizer)
            if group.where is not None:
                quotient = quotient * group.where
            kept = kept - quotient * without
        gradients = torch.autograd.grad(outputs, inputs, [part.sign * quotient for part in group.parts])
        total = total + sum_of(value.detach() * grad for value, grad in zip(inputs, gradients, strict=True))
    return total, kept.sum(dtype=torch.float64)


def sum_of(values: Any) -> Tensor:
    """The sum of at least one tensor."""
    first, *others = values
    for other in others:
        first = first + other
    return first

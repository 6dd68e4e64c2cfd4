"""Rules for activations and other functions that are not linear. Papers: see ``rules_linear``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attrib.decomposition.call import Call
from attrib.decomposition.rules_linear import linear, times
from attrib.decomposition.values import TensorPair


def function(call: Call) -> TensorPair:
    """An element-wise function, in however many calls it is written: ``activation`` or ``shapley``."""
    return activation(call) if call.rectifies else shapley(call)


def activation(call: Call) -> TensorPair:
    """relevant -> f(relevant), irrelevant -> f(whole) - f(relevant), for f with f(0) = 0.

    ReLU: Singh 2019, section 3.1. No paper defines a rule for functions of a similar shape (leaky ReLU, ELU, GELU,
    SiLU, hardswish, mish ...; ``attrib.models.functions`` says which are); the same formula is complete for them.
    """
    return call.each()


def shapley(call: Call) -> TensorPair:
    """f(relevant + irrelevant) - f(0) by the Shapley values of the two parts; f(0) as a bias in proportion.

    relevant -> (f(relevant) - f(0) + f(whole) - f(irrelevant)) / 2. For tanh this is Murdoch 2018, section 3.2.2. No
    paper defines a rule for functions with f(0) != 0 outside an LSTM's gates (sigmoid, hardsigmoid, softplus), nor
    for softmax as a function of all its inputs, nor for the other functions that have this rule. It holds for every
    function that is defined for all numbers, also of several arguments (the larger of two), whose parts are the
    players together.
    """
    like = TensorPair(call.relevant(), call.whole(), call.rows)
    zero = call.evaluate(lambda p: torch.zeros_like(p.whole), lambda p: p.whole)
    relevant = (like.relevant - like.spread(zero) + like.spread(like.whole) - call.irrelevant()) / 2
    return call.with_bias(call.rows.pair(relevant, like.whole - zero), like.plain(zero))


def first_of_several(call: Call) -> tuple[TensorPair, None]:
    """``shapley`` of a function that also returns what it needs for its gradient."""
    return shapley(call.first()), None


def power(call: Call) -> TensorPair:
    """``function`` where every number has such a power: the parts may be negative, or zero. Else ``ratio``."""
    base, exponent = call.args["self"], call.args["exponent"]
    if not isinstance(exponent, TensorPair):
        return function(call) if is_whole(exponent) else ratio(call)
    if not isinstance(base, int | float) or base <= 0:
        raise call.refuse("with an exponent that depends on the input, of a base that is not a positive number")
    return function(call)


def is_whole(exponent: Any) -> bool:
    return isinstance(exponent, int | float) and exponent >= 0 and exponent == int(exponent)


def ratio(call: Call) -> TensorPair:
    """Each part times f(whole) / whole, which counts as a constant; f(0) as a bias in proportion.

    For functions that are not defined for all numbers (roots, logarithms), since a part may be where the whole cannot
    be. No paper on CD defines it; LRP passes relevance through elementwise functions in the same proportion.
    """
    pair, whole = call.pair, call.whole()
    zero = pair.whole == 0
    factor = torch.where(zero, 0.0, whole / torch.where(zero, 1.0, pair.whole))
    return call.with_bias(times(pair, pair.plain(factor)), pair.plain(torch.where(zero, whole, 0.0)))


def gated(call: Call) -> Any:
    """``glu``: one half times the sigmoid of the other, by the rules of these two."""
    pair, dim = call.pair, call.args["dim"]
    value = pair.linear(lambda part, _: part.chunk(2, dim)[0])
    gate = pair.linear(lambda part, _: part.chunk(2, dim)[1])

    def sigmoid(self: Tensor) -> Tensor:
        return self.sigmoid()

    opened = shapley(Call(sigmoid, {"self": gate}, call.node, call.where, call.rows))
    return call.rows.pair(value.relevant * opened.relevant, value.whole * opened.whole)


def divide(call: Call) -> Any:
    """By a constant, or by what counts as one (``plan``); a quotient that is rounded has the rule of a function."""
    return linear(call) if call.args.get("rounding_mode") is None else shapley(call)

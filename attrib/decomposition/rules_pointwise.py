"""Rules for activations and softmax. Papers: see ``rules_linear``."""

from __future__ import annotations

import torch
from torch import fx

from attrib.decomposition.call import Call
from attrib.decomposition.values import PlainValue, TensorPair

# Operations that may stand between attention weights and their product with the values.
_ON_THE_WAY = frozenset({"dropout", "contiguous", "to", "type_as", "float", "reshape", "view", "transpose", "permute"})
_PRODUCTS = frozenset({"matmul", "bmm", "einsum"})


def activation(call: Call) -> TensorPair:
    """relevant -> f(relevant), irrelevant -> f(whole) - f(relevant), for f with f(0) = 0.

    ReLU: Singh 2019, section 3.1. No paper defines a rule for functions of a similar shape (leaky ReLU, ELU, GELU,
    SiLU, hardswish, mish ...); the same formula is complete for them.
    """
    return call.each()


def shapley(call: Call) -> TensorPair:
    """f(relevant + irrelevant) - f(0) by the Shapley values of the two parts; f(0) as a bias in proportion.

    relevant -> (f(relevant) - f(0) + f(whole) - f(irrelevant)) / 2. For tanh this is Murdoch 2018, section 3.2.2. No
    paper defines a rule for functions with f(0) != 0 outside an LSTM's gates (sigmoid, hardsigmoid, softplus), nor
    for softmax as a function of all its inputs, nor for the other elementwise functions that have this rule.
    """
    (pair,) = call.pairs
    zero, whole, at_relevant = call.at(torch.zeros_like(pair.whole)), call.whole(), call.relevant()
    spread = TensorPair(at_relevant, whole, call.rows).spread
    relevant = (at_relevant - spread(zero) + spread(whole) - call.at(pair.irrelevant)) / 2
    return call.with_bias(call.rows.pair(relevant, whole - zero), zero, spread=True)


def power(call: Call) -> TensorPair:
    """``shapley``, for exponents under which every number has a power: the parts may be negative, or zero."""
    exponent = call.args[1] if len(call.args) > 1 else call.kwargs.get("exponent")
    if not isinstance(exponent, (int, float)) or exponent < 0 or exponent != int(exponent):
        raise call.refuse("with an exponent that is not one of 0, 1, 2 ...")
    return shapley(call)


def softmax(call: Call) -> TensorPair | PlainValue:
    """Attention weights are those of the whole, so that attention is linear in its values; else ``shapley``.

    No paper on CD defines a rule. That attention weights count as constants is the rule of Ali et al., *XAI for
    Transformers: Better Explanations through Conservative Propagation*, ICML 2022, section 3.2.
    """
    if call.node is not None and _weighs(call.node):
        (pair,) = call.pairs
        whole = call.whole()
        return PlainValue(pair.repeated(whole), whole)
    return shapley(call)


def _weighs(node: fx.Node) -> bool:
    """Whether a node is read by matrix products alone, as their left factor."""

    def reads(user: fx.Node) -> bool:
        name = _name(user)
        if name in _PRODUCTS:
            return True
        return name in _ON_THE_WAY and _weighs(user)

    return bool(node.users) and all(reads(user) for user in node.users)


def _name(node: fx.Node) -> str:
    if node.op == "call_module":
        net = node.graph.owning_module
        assert net is not None  # the graph is that of a Decomposer's net
        return type(net.get_submodule(str(node.target))).__name__.lower()
    return node.target if isinstance(node.target, str) else node.target.__name__

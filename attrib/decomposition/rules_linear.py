"""Rules for linear operations, with and without a bias, and for products.

Contextual decomposition (CD): Murdoch, Liu & Yu, *Beyond Word Importance: Contextual Decomposition to
Extract Interactions from LSTMs*, ICLR 2018 ("Murdoch 2018" below); for convolutional nets Singh, Murdoch
& Yu, *Hierarchical interpretations for neural network predictions*, ICLR 2019 ("Singh 2019").
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from attrib.decomposition.call import Call
from attrib.decomposition.values import Pair, Plain, leaves


def linear(call: Call) -> Any:
    """Each part goes through on its own (Singh 2019, eq. 1 without bias): sums, means, shapes, average pooling."""
    return call.linear()


def facts(call: Call) -> Any:
    """What does not depend on the values: sizes, types, tensors of zeros like another."""
    part, whole = call.relevant(), call.whole()
    return Plain(part, whole)


TURNED = frozenset({"T", "mT", "H", "mH"})
_FACTS = frozenset({"shape", "ndim", "dtype", "device", "is_cuda"})


def attribute(call: Call) -> Any:
    """``x.shape`` and other facts; ``x.mT``; the maxima of ``x.max(1).values``."""
    container, name = call.args[:2]
    if isinstance(container, tuple) and name == "values":
        return container[0]
    if name in TURNED:
        return call.linear()
    if name not in _FACTS:
        raise call.refuse(f"of {name!r}")
    return facts(call)


def item(call: Call) -> Any:
    """An element of a tuple, or linear indexing of a tensor."""
    container, key = call.args
    if isinstance(container, (tuple, list, dict)):
        return container[key]
    return call.linear()


def affine_module(call: Call) -> Pair:
    """Convolution and linear layers: weights on each part, the bias in proportion (Singh 2019, eq. 1-2).

    Where both parts are zero each gets half of the bias, as in the authors' code. Also for transposed
    convolution, which the paper does not name: it is affine in the same way.
    """
    module = call.module
    bias = module.bias
    if bias is None:
        return call.linear()
    shift = bias if isinstance(module, nn.Linear) else channels(bias, call.pairs[0].whole)
    if call.rows.both:  # as the authors' code does it, whose rounding decides which of equal maxima is the first
        pair = replace(call, run=lambda *args, **kwargs: module(*args, **kwargs) - shift).linear()
    else:
        without = {"bias": torch.zeros_like(bias)}
        pair = replace(call, run=lambda *args, **kwargs: functional_call(module, without, args, kwargs)).linear()
    return call.with_bias(pair, shift)


def affine_function(call: Call) -> Pair:
    """The same for ``F.conv2d(x, weight, bias, ...)`` and its kin."""
    names = ("input", "weight", "bias")
    given = dict(zip(names, call.args)) | {k: v for k, v in call.kwargs.items() if k in names}
    if leaves(given.get("weight"), Pair) or leaves(given.get("bias"), Pair):
        raise call.refuse("with weights that depend on the input")
    bias = given.get("bias")
    if bias is None:
        return call.linear()
    args = tuple(None if i == 2 else value for i, value in enumerate(call.args))
    kwargs = {k: v for k, v in call.kwargs.items() if k != "bias"}
    pair = replace(call, args=args, kwargs=kwargs).linear()
    return call.with_bias(pair, bias if call.name == "linear" else channels(bias, pair.whole))


def channels(bias: Tensor, like: Tensor) -> Tensor:
    """One number per channel (C,), in the form in which it broadcasts to ``like`` (N, C, ...)."""
    return bias.reshape(-1, *(1,) * (like.ndim - 2))


def add(call: Call) -> Pair:
    """Sum or difference: of two pairs part by part (residuals; the code of Singh 2019 adds them so).

    A constant beside a pair is a bias (position embeddings; no paper defines it): it is shared out
    in proportion, and where both parts are zero each gets half.
    """
    names = dict(zip(("input", "other"), call.args)) | call.kwargs
    first, second = names["input"], names["other"]
    constant = second if isinstance(first, Pair) else first
    if isinstance(constant, Pair) or (isinstance(constant, (int, float)) and constant == 0):
        return call.linear()
    (pair,) = call.pairs
    zero = torch.zeros((), dtype=pair.whole.dtype, device=pair.whole.device)
    alone = tuple(zero if value is constant else value for value in call.args)
    named = {name: zero if value is constant else value for name, value in call.kwargs.items()}
    moved = replace(call, args=alone, kwargs=named).linear()
    bias = call.evaluate(lambda _: zero, lambda p: p.whole)
    if not isinstance(constant, Plain):
        return call.with_bias(moved, bias)
    own = call.with_bias(moved, call.evaluate(lambda _: zero, lambda p: p.part))  # a bias for every row
    return own if call.rows.both else call.rows.pair(own.relevant, moved.whole + bias)


def multiply(call: Call) -> Any:
    """Product, matrix product, einsum: with a constant linear; of two pairs, relevant is relevant times relevant.

    Whatever has an irrelevant factor is irrelevant, as for gates times cells in Murdoch 2018, section
    3.2.2. Squeeze-and-excitation is such a product; no paper on CD covers it.
    """
    return call.linear() if len(call.pairs) == 1 else call.each()


def divide(call: Call) -> Any:
    """Division by a constant, or by what is computed from sizes."""
    if leaves(call.args[1:], Pair) or leaves(call.kwargs, Pair):
        raise call.refuse("by something that depends on the input's values")
    return call.linear()


def concatenate(call: Call) -> Pair:
    """Part by part. A constant among the tensors (a class token; no paper defines it) is irrelevant."""
    return call.joined()


def fill(call: Call) -> Pair:
    """``masked_fill``: part by part; the constant that is filled in is irrelevant (no paper defines it)."""
    if leaves((call.args[1:], call.kwargs), Pair):
        raise call.refuse("with a mask or value that depends on the input's values")
    (pair,) = call.pairs
    named = dict(zip(("mask", "value"), call.args[1:])) | call.kwargs
    mask = named["mask"]
    part = mask.part if isinstance(mask, Plain) else mask
    return call.rows.pair(pair.relevant.masked_fill(part, 0.0), call.whole())


def pad(call: Call) -> Pair:
    """``F.pad``, padding modules: part by part; a border that is not zero is irrelevant (no paper defines it)."""
    (pair,) = call.pairs
    border = call.at(torch.zeros_like(pair.whole))
    relevant = call.relevant() - pair.spread(border)
    if call.rows.both:
        return call.rows.sum(relevant, call.at(pair.irrelevant))
    return call.rows.pair(relevant, call.whole())


def embedding(call: Call) -> Any:
    """A token's vector is relevant as far as the mask says so (Murdoch 2018, section 3.2.1).

    An embedding of what does not come from the token ids (positions) stays a constant.
    """
    part, whole = call.relevant(), call.whole()
    mask = call.rows.mask
    if mask is None or not call.content:
        return Plain(part, whole)
    if part.shape[:-1] != mask.shape:
        raise call.refuse(f"of ids {tuple(part.shape[:-1])} with masks {tuple(mask.shape)}")
    relevant = part * mask[..., None].to(part.dtype)
    return call.rows.sum(relevant, part - relevant) if call.rows.both else call.rows.pair(relevant, whole)

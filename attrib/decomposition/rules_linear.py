"""Rules for linear operations with and without a bias, and for products.

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
from torch.nn.modules import conv

from attrib.decomposition.call import Call
from attrib.decomposition.values import PlainValue, TensorPair, leaves


def linear(call: Call) -> Any:
    """Each part on its own (Singh 2019, eq. 1 without bias): sums, means, reshaping, average pooling."""
    return call.linear()


def facts(call: Call) -> Any:
    """What does not depend on a tensor's values: its size and type, and tensors of zeros like it."""
    part, whole = call.relevant(), call.whole()
    return PlainValue(part, whole)


TURNED = frozenset({"T", "mT", "H", "mH"})
_FACTS = frozenset({"shape", "ndim", "dtype", "device", "is_cuda"})


def attribute(call: Call) -> Any:
    """``x.shape`` and other facts of a tensor; ``x.mT``; the maxima of ``x.max(1).values``."""
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


def affine_module(call: Call) -> TensorPair:
    """Convolution and linear layers: weights on each part, the bias in proportion (Singh 2019, eq. 1-2).

    Where both parts are zero, each gets half of the bias, as in the authors' code. Also for transposed
    convolution, which the paper does not name: it is affine in the same way.
    """
    module = call.module
    assert isinstance(module, (nn.Linear, conv._ConvNd))
    bias = module.bias
    if bias is None:
        return call.linear()
    shift = bias if isinstance(module, nn.Linear) else channels(bias, call.pairs[0].whole)
    if call.rows.both:  # with the rounding of the authors' code, which decides between equal maxima later on
        pair = replace(call, run=lambda *args, **kwargs: module(*args, **kwargs) - shift).linear()
    else:
        without = {"bias": torch.zeros_like(bias)}
        pair = replace(call, run=lambda *args, **kwargs: functional_call(module, without, args, kwargs)).linear()
    return call.with_bias(pair, shift)


def affine_function(call: Call) -> TensorPair:
    """``F.conv2d(x, weight, bias, ...)`` and the like, as ``affine_module``."""
    names = ("input", "weight", "bias")
    given = dict(zip(names, call.args)) | {k: v for k, v in call.kwargs.items() if k in names}
    if leaves(given.get("weight"), TensorPair) or leaves(given.get("bias"), TensorPair):
        raise call.refuse("with weights that depend on the input")
    bias = given.get("bias")
    if bias is None:
        return call.linear()
    args = tuple(None if i == 2 else value for i, value in enumerate(call.args))
    kwargs = {k: v for k, v in call.kwargs.items() if k != "bias"}
    pair = replace(call, args=args, kwargs=kwargs).linear()
    return call.with_bias(pair, bias if call.name == "linear" else channels(bias, pair.whole))


def channels(bias: Tensor, like: Tensor) -> Tensor:
    """One number per channel (C,), in a shape that broadcasts to ``like`` (N, C, ...)."""
    return bias.reshape(-1, *(1,) * (like.ndim - 2))


def add(call: Call) -> TensorPair:
    """Sum or difference. Two pairs are added part by part (residuals; so does the code of Singh 2019).

    A constant that is added to a pair is a bias (position embeddings; no paper defines it): it is shared out in
    proportion, and where both parts are zero, each gets half.
    """
    names = dict(zip(("input", "other"), call.args)) | call.kwargs
    first, second = names["input"], names["other"]
    constant = second if isinstance(first, TensorPair) else first
    if isinstance(constant, TensorPair) or (isinstance(constant, (int, float)) and constant == 0):
        return call.linear()
    (pair,) = call.pairs
    zero = torch.zeros((), dtype=pair.whole.dtype, device=pair.whole.device)
    alone = tuple(zero if value is constant else value for value in call.args)
    named = {name: zero if value is constant else value for name, value in call.kwargs.items()}
    moved = replace(call, args=alone, kwargs=named).linear()
    bias = call.evaluate(lambda _: zero, lambda p: p.whole)
    if not isinstance(constant, PlainValue):
        return call.with_bias(moved, bias)
    own = call.with_bias(moved, call.evaluate(lambda _: zero, lambda p: p.part))  # a bias for every row
    return own if call.rows.both else call.rows.pair(own.relevant, moved.whole + bias)


def multiply(call: Call) -> Any:
    """Product, matrix product, einsum: linear with a constant; of two pairs, relevant times relevant is relevant.

    A product with an irrelevant factor is irrelevant, as that of gates and cells in Murdoch 2018, section 3.2.2.
    Squeeze-and-excitation is such a product; no paper on CD covers it.
    """
    return call.linear() if len(call.pairs) == 1 else call.each()


def divide(call: Call) -> Any:
    """Division by a constant, or by a number that is computed from sizes."""
    if leaves(call.args[1:], TensorPair) or leaves(call.kwargs, TensorPair):
        raise call.refuse("by a number that depends on the input's values")
    return call.linear()


def concatenate(call: Call) -> TensorPair:
    """Part by part. A constant among the tensors (a class token; no paper defines it) is irrelevant."""
    return call.joined()


def fill(call: Call) -> TensorPair:
    """``masked_fill``: part by part; the constant that is filled in is irrelevant (no paper defines it)."""
    if leaves((call.args[1:], call.kwargs), TensorPair):
        raise call.refuse("with a mask or value that depends on the input's values")
    (pair,) = call.pairs
    named = dict(zip(("mask", "value"), call.args[1:])) | call.kwargs
    mask = named["mask"]
    part = mask.part if isinstance(mask, PlainValue) else mask
    return call.rows.pair(pair.relevant.masked_fill(part, 0.0), call.whole())


def pad(call: Call) -> TensorPair:
    """``F.pad``, padding modules: part by part; a border that is not zero is irrelevant (no paper defines it)."""
    (pair,) = call.pairs
    border = call.at(torch.zeros_like(pair.whole))
    relevant = call.relevant() - pair.spread(border)
    if call.rows.both:
        return call.rows.sum(relevant, call.at(pair.irrelevant))
    return call.rows.pair(relevant, call.whole())


def embedding(call: Call) -> Any:
    """A token's vector is relevant as far as the mask says (Murdoch 2018, section 3.2.1).

    An embedding of anything but the token ids (positions) stays a constant.
    """
    part, whole = call.relevant(), call.whole()
    mask = call.rows.mask
    if mask is None or not call.content:
        return PlainValue(part, whole)
    if part.shape[:-1] != mask.shape:
        raise call.refuse(f"of ids {tuple(part.shape[:-1])} with masks {tuple(mask.shape)}")
    relevant = part * mask[..., None].to(part.dtype)
    return call.rows.sum(relevant, part - relevant) if call.rows.both else call.rows.pair(relevant, whole)

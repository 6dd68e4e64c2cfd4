"""Rules for linear operations with and without a bias, and for products.

Contextual decomposition (CD): Murdoch, Liu & Yu, *Beyond Word Importance: Contextual Decomposition to
Extract Interactions from LSTMs*, ICLR 2018 ("Murdoch 2018" below); for convolutional nets Singh, Murdoch
& Yu, *Hierarchical interpretations for neural network predictions*, ICLR 2019 ("Singh 2019").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attrib.decomposition.call import Call, lifted
from attrib.decomposition.values import PlainValue, TensorPair, leaves
from attrib.models.activations import LINEAR

# The arguments, by position, in which an operation is linear; fillings of borders count as arguments. Those that look
# at the memory behind a tensor are left out: a part need not lie in memory as the whole does.
LINEAR_IN: Mapping[str, tuple[int, ...]] = {
    **{name: positions for name, positions in LINEAR.items() if not name.startswith("as_strided")},
    "adaptive_avg_pool3d": (0,), "copy": (0, 1), "fill": (0, 1), "pad": (0, 3), "constant_pad_nd": (0, 2),
    "index_fill": (0, 3), "div": (0,),
}  # fmt: skip


def linear(call: Call) -> Any:
    """Each part on its own (Singh 2019, eq. 1 without bias): sums, means, reshaping, average pooling.

    Where several arguments are joined or written into one another, constants among them are irrelevant: class tokens,
    borders that are not zero, values that are filled in (no paper defines it).
    """
    schema = call.node.target._schema.arguments  # type: ignore[union-attr]
    names = [schema[at].name for at in LINEAR_IN[call.name]]
    if len(leaves([call.args[name] for name in names], TensorPair)) < len(call.pairs):
        raise call.refuse("of which more than the input depends on the input's values")
    return call.joined(*names)


def affine(call: Call) -> TensorPair:
    """Convolution and linear layers: weights on each part, the bias in proportion (Singh 2019, eq. 1-2).

    Where both parts are zero, each gets half of the bias, as in the authors' code. Also for transposed
    convolution, which the paper does not name: it is affine in the same way.
    """
    bias = call.args["bias"]
    if bias is None or isinstance(bias, TensorPair):
        product = multiply(call.given(bias=None))
        return product if bias is None else plus(call, product, bias)
    shift = bias if call.name == "linear" else lifted(lambda b: channels(b, call.pairs[0].whole), bias)
    if call.rows.both and not isinstance(bias, PlainValue):
        # With the rounding of the authors' code, which decides between equal maxima later on.
        product = multiply(replace(call, run=lambda **args: call.run(**args) - shift))
    else:
        product = multiply(call.given(bias=None))
    return call.with_bias(product, shift)


def add_product(call: Call) -> TensorPair:
    """``addmm`` and the like: beta self + alpha (product of the two others), as ``affine``."""
    first, beta = call.args["self"], call.args.get("beta", 1)
    like = call.pairs[0].whole
    product = multiply(call.given(self=torch.zeros((), dtype=like.dtype, device=like.device)))
    if isinstance(first, TensorPair):
        return plus(call, product, times(first, beta))
    return plus(call, product, lifted(lambda value: value * beta, first))


def channels(bias: Tensor, like: Tensor) -> Tensor:
    """One number per channel (C,), in a shape that broadcasts to ``like`` (N, C, ...)."""
    return bias.reshape(-1, *(1,) * (like.ndim - 2))


def add(call: Call) -> TensorPair:
    """Sum or difference. Two pairs are added part by part (residuals; so does the code of Singh 2019).

    A constant that is added to a pair is a bias (position embeddings; no paper defines it): it is shared out in
    proportion, and where both parts are zero, each gets half.
    """
    if len(call.pairs) == 2:
        return call.linear()
    like = call.pairs[0].whole
    zero = torch.zeros((), dtype=like.dtype, device=like.device)
    (name,) = (n for n in ("self", "other") if not isinstance(call.args[n], TensorPair))
    constant = call.args[name]
    moved = call.given(**{name: 0 if isinstance(constant, float | int) else zero}).linear()
    if isinstance(constant, float | int) and constant == 0:
        return moved
    alone = call.given(**{n: zero for n in ("self", "other") if n != name})
    return call.with_bias(moved, lifted(lambda value: alone.given(**{name: value}).whole(), constant))


def plus(call: Call, pair: TensorPair, other: Any) -> TensorPair:
    """The sum of a pair and another, or of a pair and a constant, which is a bias."""
    if not isinstance(other, TensorPair):
        return call.with_bias(pair, other)
    return summed(pair, other)


def summed(a: TensorPair, b: TensorPair) -> TensorPair:
    """The sum of two pairs, part by part."""
    if a.other is not None and b.other is not None:
        return a.rows.sum(a.relevant + b.relevant, a.other + b.other)
    return a.rows.pair(a.relevant + b.relevant, a.whole + b.whole)


def times(pair: TensorPair, factor: Any) -> TensorPair:
    """The product of a pair and a constant: a number, a tensor or a plain value."""
    own, whole = (factor.part, factor.whole) if isinstance(factor, PlainValue) else (factor, factor)
    if pair.other is not None:
        return pair.rows.sum(pair.relevant * own, pair.other * own)
    return pair.rows.pair(pair.relevant * own, pair.whole * whole)


def multiply(call: Call) -> Any:
    """Product, matrix product: linear with a constant; of two pairs, relevant times relevant is relevant.

    A product with an irrelevant factor is irrelevant, as that of gates and cells in Murdoch 2018, section 3.2.2.
    Squeeze-and-excitation is such a product; no paper on CD covers it.
    """
    return call.linear() if len(call.pairs) == 1 else call.each()


def embedding(call: Call) -> TensorPair:
    """A token's vector is relevant as far as the mask says (Murdoch 2018, section 3.2.1)."""
    mask, ids = call.rows.mask, call.args["indices"]
    if mask is None or ids.part.shape != mask.shape:
        shape = None if mask is None else tuple(mask.shape)
        raise call.refuse(f"of ids {tuple(ids.part.shape)} with masks {shape}")
    part, whole = call.relevant(), call.whole()
    relevant = part * mask[..., None].to(part.dtype)
    return call.rows.sum(relevant, part - relevant) if call.rows.both else call.rows.pair(relevant, whole)

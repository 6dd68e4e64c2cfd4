"""DeepLIFT's rules, for any call of a net on an input and its baseline at once.

What is linear passes the gradient. Beside that there are three rules, each of which is complete: what it gives to its
inputs is the change of its output.

* An element-wise function of one input, of whatever name: the rescale rule, (change of output) / (change of input),
  the derivative where the two inputs meet (Shrikumar et al., 2017, section 3.5.2). Also one that is written with
  several calls, such as x * sigmoid(x).
* A maximum: what it rises goes to the place where the input has its maximum, what it falls to the place where the
  baseline has its own, as in the authors' code, captum's and shap's.
* A product of two values that both depend on the input, including matrix products: the Shapley values of its two
  factors, which is each factor's change times the mean of the other (Lundberg & Lee, 2017, section 4.2; shap's
  DeepExplainer does the same). Softmax, gates and normalisation by the sample's own statistics are taken apart into
  these, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from attrib.methods.parts.propagation import replaced
from attrib.models.activations import BILINEAR, ELEMENTWISE

EPS = 1e-10  # inputs that differ by less have met; captum's number


class NoRuleError(Exception):
    """There is no rule for a call."""


class Pair:
    """A value of the net for the input and for the baseline.

    x     gradients flow, and are the multipliers
    x0    the same shape, without a graph
    root  the value, of the same shape, that this one is an element-wise function of; itself if there is none before it
    """

    def __init__(self, x: Tensor, x0: Tensor, root: Pair | None = None) -> None:
        self.x, self.x0 = x, x0.detach()
        self.root = root if root is not None and root.x.shape == x.shape else self

    @property
    def differentiable(self) -> bool:
        return self.x.is_floating_point() or self.x.is_complex()


def settled(pair: Pair) -> Pair | Tensor:
    """Places, such as those of maxima, are no pair if they are the same for the input and for the baseline."""
    return pair if pair.differentiable or not torch.equal(pair.x, pair.x0) else pair.x


def pairs_in(*values: Any) -> list[Pair]:
    """All the pairs in nested arguments, in order."""
    return [value for value in tree_flatten(values)[0] if isinstance(value, Pair)]


def _both(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """A function's value for the input, and for the baseline."""
    y = function(*tree_map_only(Pair, lambda p: p.x, args), **tree_map_only(Pair, lambda p: p.x, kwargs))
    with torch.no_grad():
        y0 = function(*tree_map_only(Pair, lambda p: p.x0, args), **tree_map_only(Pair, lambda p: p.x0, kwargs))
    return y, y0


def common_root(pairs: Sequence[Pair]) -> Pair | None:
    roots = {id(pair.root): pair.root for pair in pairs}
    return next(iter(roots.values())) if len(roots) == 1 else None


def _ratio(dy: Tensor, dx: Tensor, at_zero: Tensor) -> Tensor:
    """dy / dx, or ``at_zero`` where dx is zero."""
    return _quotient(dy, dx, dx.abs() < EPS, at_zero)


def _quotient(dy: Tensor, dx: Tensor, met: Tensor, at_zero: Tensor) -> Tensor:
    return torch.where(met, at_zero, dy / torch.where(met, torch.ones_like(dx), dx))


# ---- the rules -------------------------------------------------------------------------------------


def linear(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The gradient passes; a tuple of pairs if the function returns several tensors."""
    y, y0 = _both(function, *args, **kwargs)
    if isinstance(y, Tensor):
        return Pair(y, y0)
    return tuple(Pair(a, b) if isinstance(a, Tensor) else a for a, b in zip(y, y0, strict=True))


def rescale(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Pair:
    """An element-wise function of one pair, or of several that are element-wise functions of the same one.

    A function of complex numbers is one of two values each.
    """
    pairs = pairs_in(args, kwargs)
    y, y0 = _both(function, *args, **kwargs)
    if y.is_complex() or any(pair.x.is_complex() or pair.root.x.is_complex() for pair in pairs):
        raise NoRuleError
    if not y.is_floating_point():  # a switch: what reads it has to know what it is a function of
        return Pair(y, y0, common_root(pairs))
    if len({id(pair) for pair in pairs}) == 1 and pairs[0].differentiable:
        source = pairs[0]
        if source.x.shape != y.shape:
            wide = linear(lambda t: t.expand(y.shape), source)
            return rescale(function, *tree_map_only(Pair, lambda _: wide, args), **kwargs)
        leaf = source.x.detach().requires_grad_()
        with torch.enable_grad():
            again = function(*tree_map_only(Pair, lambda _: leaf, args), **tree_map_only(Pair, lambda _: leaf, kwargs))
        slope = _slope(again, leaf)
    else:
        root = common_root(pairs)
        if root is None or root.x.shape != y.shape or not root.differentiable:
            raise NoRuleError
        source = root
        # Where the sources meet, so does all that is between: there the gradient so far is the derivative.
        slope = _slope(y, source.x)
    x, x0 = source.x.detach(), source.x0
    # A change that is small beside the numbers themselves is mostly rounding, and so is the quotient; the derivative
    # is as near then as the numbers allow.
    near = x.abs().maximum(x0.abs()) * (torch.finfo(x.dtype).eps ** 0.5 / 4)
    multiplier = _quotient(y.detach() - y0, x - x0, (x - x0).abs() < near.clamp(min=EPS), slope)
    return Pair(replaced(y, multiplier * source.x), y0, source.root)


def _slope(y: Tensor, x: Tensor) -> Tensor:
    if not (y.requires_grad and x.requires_grad):
        return torch.zeros_like(x)
    (slope,) = torch.autograd.grad(y.sum(), x, retain_graph=True, allow_unused=True)
    # A slope that is infinite, as that of a square root at zero, would make NaN of the change that is not there.
    return torch.zeros_like(x) if slope is None else slope.nan_to_num(0.0, 0.0, 0.0)


def product(function: Callable[..., Tensor], factors: tuple[int, int], beside: int | None, *args: Any) -> Pair:
    """A function that is linear in each of two arguments, both of them pairs."""
    y, y0 = _both(function, *args)
    mean = tree_map_only(Pair, lambda p: (p.x.detach() + p.x0) / 2, args)
    way_back = torch.zeros_like(y)
    for at in (*factors, *(() if beside is None else (beside,))):
        if isinstance(args[at], Pair):
            term = function(*mean[:at], args[at].x, *mean[at + 1 :])
            way_back = way_back + (term - term.detach())
    return Pair(replaced(y, way_back), y0)


def largest(pair: Pair, at: Tensor, at0: Tensor) -> Pair:
    """The maxima of the last dimension, (..., P) -> (..., Q); at, at0 (..., Q): where they are."""
    x, x0 = pair.x.gather(-1, at), pair.x.gather(-1, at0)
    base, base0 = pair.x0.gather(-1, at), pair.x0.gather(-1, at0)
    with torch.no_grad():
        change = x - base0
        rise = _ratio(change.clamp(min=0), x - base, torch.ones_like(x))
        fall = _ratio(change.clamp(max=0), x0 - base0, torch.zeros_like(x))
    return Pair(replaced(x, rise * x + fall * x0), base0)


def with_root(found: Any, name: str, pairs: Sequence[Pair]) -> Any:
    """What a linear rule found, which is still a function of its pairs' root if the operation is element-wise."""
    return Pair(found.x, found.x0, common_root(pairs)) if name in ELEMENTWISE else found


def bilinear(name: str, function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A product of any kind: linear if only one factor is a pair, element-wise if both have one root."""
    (first, second), beside = BILINEAR[name]
    a, b = args[first], args[second]
    if not (isinstance(a, Pair) and isinstance(b, Pair)):
        pairs = pairs_in(args)
        if all(pair.differentiable for pair in pairs):
            return with_root(linear(function, *args, **kwargs), name, pairs)
        return rescale(function, *args, **kwargs)
    alike = common_root([a, b]) is not None and not (a.x.is_complex() or b.x.is_complex())
    if name == "mul" and (alike or not (a.differentiable and b.differentiable)):
        return rescale(function, *args, **kwargs)
    return product(lambda *values: function(*values, **kwargs), (first, second), beside, *args)


# ---- maxima, however they are written --------------------------------------------------------------


def pooled(
    function: Callable[..., tuple[Tensor, Tensor]], places: int, pair: Pair, *args: Any, **kwargs: Any
) -> tuple[Pair, Pair]:
    """A max-pooling over the last dimensions, ``places`` of them, that says where its maxima were."""
    with torch.no_grad():
        (y, at), (_, at0) = _both(function, pair, *args, **kwargs)
    flat = linear(lambda t: t.flatten(-places), pair)
    found = largest(flat, at.flatten(-places), at0.flatten(-places))
    return linear(lambda t: t.reshape(y.shape), found), Pair(at, at0)


def _over(pair: Pair, dims: Sequence[int] | int = (), keepdim: bool = False) -> Pair:
    """The maximum over dimensions; over all of them if none is named."""
    n = pair.x.ndim
    dims = sorted({d % n for d in ([dims] if isinstance(dims, int) else dims)}) or list(range(n))
    kept = [d for d in range(n) if d not in dims]
    flat = linear(lambda t: t.permute(*kept, *dims).flatten(len(kept)), pair)
    found = largest(flat, flat.x.argmax(-1, keepdim=True), flat.x0.argmax(-1, keepdim=True))
    shape = [1 if d in dims else size for d, size in enumerate(pair.x.shape) if d not in dims or keepdim]
    return linear(lambda t: t.reshape(shape), found)


def _negative(pair: Pair) -> Pair:
    return linear(torch.neg, pair)


def _least(pair: Pair, *args: Any) -> Pair:
    return _negative(_over(_negative(pair), *args))


def extreme(name: str, *args: Any) -> Pair:
    """The larger, or the smaller, of two values."""
    shape = torch.broadcast_shapes(*(p.x.shape for p in args))
    stacked = linear(lambda *values: torch.stack([v.expand(shape) for v in values]), *args)
    return _over(stacked, 0) if name == "maximum" else _negative(_over(_negative(stacked), 0))


# ---- what is made of these -------------------------------------------------------------------------


def step(*args: Any) -> Pair:
    """Which torch has no derivative of, not even zero."""
    return rescale(torch.no_grad()(torch.heaviside), *args)


def magnitude(pair: Pair) -> Pair:
    """Of complex numbers."""
    return _norm(linear(torch.view_as_real, pair), 2, [-1])


def between(start: Any, end: Any, weight: Any) -> Pair:
    """start + weight * (end - start)"""
    change = linear(torch.sub, end, start)
    return linear(torch.add, start, bilinear("mul", torch.mul, (change, weight), {}))


def _times(a: Pair, b: Pair) -> Pair:
    return product(torch.mul, (0, 1), None, a, b)


def _exponentials(pair: Pair, dim: int | list[int]) -> tuple[Pair, Pair, Tensor]:
    """exp(x - c), its sum and c, which is the same for input and baseline: a shift must not be explained."""
    shift = torch.maximum(pair.x.detach(), pair.x0).amax(dim, keepdim=True)
    powers = rescale(torch.exp, linear(lambda t: t - shift, pair))
    return powers, linear(lambda t: t.sum(dim, keepdim=True), powers), shift


def _softmax(pair: Pair, dim: int, *_: Any) -> Pair:
    powers, total, _shift = _exponentials(pair, dim)
    return _times(powers, rescale(torch.reciprocal, total))


def _log_softmax(pair: Pair, dim: int, *_: Any) -> Pair:
    _powers, total, shift = _exponentials(pair, dim)
    return linear(lambda x, s: x - shift - s, pair, rescale(torch.log, total))


def _logsumexp(pair: Pair, dim: list[int], keepdim: bool = False) -> Pair:
    _powers, total, shift = _exponentials(pair, dim)
    return linear(lambda s: (s + shift) if keepdim else (s + shift).sum(dim), rescale(torch.log, total))


def _glu(pair: Pair, dim: int = -1) -> Pair:
    value, gate = linear(lambda t: t.chunk(2, dim), pair)
    return _times(value, rescale(torch.sigmoid, gate))


def _centred(pair: Pair, dims: Sequence[int] | None, correction: float = 0) -> tuple[Pair, Pair]:
    """x minus its mean, and its variance."""
    dims = list(range(pair.x.ndim)) if dims is None else list(dims)
    centred = linear(lambda t: t - t.mean(dims, keepdim=True), pair)
    n = pair.x.numel() / max(1, centred.x.sum(dims).numel())
    squares = rescale(torch.square, centred)
    return centred, linear(lambda t: t.sum(dims, keepdim=True) / (n - correction), squares)


def _variance(
    pair: Pair, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> Pair:
    _, found = _centred(pair, dim, 1 if correction is None else correction)
    dims = tuple(range(pair.x.ndim)) if dim is None else tuple(dim)
    return found if keepdim else linear(lambda t: t.squeeze(dims), found)


def _deviation(pair: Pair, dim: Sequence[int] | None = None, **options: Any) -> Pair:
    return rescale(torch.sqrt, _variance(pair, dim, **options))


def _standardised(pair: Pair, dims: Sequence[int], eps: float) -> Pair:
    centred, variance = _centred(pair, dims)
    return _times(centred, rescale(lambda t: (t + eps).rsqrt(), variance))


def _affine(pair: Pair, weight: Tensor | None, bias: Tensor | None) -> Pair:
    if weight is not None:
        pair = linear(torch.mul, pair, weight)
    return pair if bias is None else linear(torch.add, pair, bias)


def _layer_norm(
    pair: Pair,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Pair:
    return _affine(_standardised(pair, range(-len(shape), 0), eps), weight, bias)


def _group_norm(
    pair: Pair, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_: Any
) -> Pair:
    shape = (1, -1, *[1] * (pair.x.ndim - 2))
    grouped = _standardised(linear(lambda t: t.reshape(len(t), groups, -1), pair), [-1], eps)
    weight, bias = (None if t is None else t.view(shape) for t in (weight, bias))
    return _affine(linear(lambda t: t.reshape(pair.x.shape), grouped), weight, bias)


def instance_norm(pair: Pair, weight: Tensor | None, bias: Tensor | None, *_: Any, eps: float) -> Pair:
    shape = (1, -1, *[1] * (pair.x.ndim - 2))
    weight, bias = (None if t is None else t.view(shape) for t in (weight, bias))
    found = _standardised(pair, [d for d in range(pair.x.ndim) if d != 1], eps)
    return _affine(found, weight, bias)


def _norm(pair: Pair, order: float = 2, dim: Sequence[int] | None = None, keepdim: bool = False, **_: Any) -> Pair:
    dims = list(range(pair.x.ndim)) if dim is None else list(dim)
    if order in (0, float("inf"), float("-inf")):
        raise NoRuleError
    total = linear(lambda t: t.sum(dims, keepdim=keepdim), rescale(lambda t: t.abs() ** order, pair))
    return rescale(lambda t: t ** (1 / order), total)


def _root_mean_square_norm(
    pair: Pair, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Pair:
    small = torch.finfo(pair.x.dtype).eps if eps is None else eps
    mean = linear(lambda t: t.mean(list(range(-len(shape), 0)), keepdim=True), rescale(torch.square, pair))
    return _affine(_times(pair, rescale(lambda t: (t + small).rsqrt(), mean)), weight, None)


MADE_OF_RULES: dict[str, Callable[..., Any]] = {
    "amax": _over,
    "amin": _least,
    "max": lambda pair, *dim: (_over(pair, *dim), linear(lambda t: t.max(*dim).indices, pair)) if dim else _over(pair),
    "min": lambda pair, *dim: (
        (_negative(_over(_negative(pair), *dim)), linear(lambda t: t.min(*dim).indices, pair))
        if dim
        else _negative(_over(_negative(pair)))
    ),
    "_softmax": _softmax,
    "_safe_softmax": _softmax,
    "_log_softmax": _log_softmax,
    "logsumexp": _logsumexp,
    "glu": _glu,
    "var": _variance,
    "std": _deviation,
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "rms_norm": _root_mean_square_norm,
    "linalg_vector_norm": _norm,
}
# Over how many dimensions.
POOLINGS: dict[str, tuple[int, Callable[..., Any]]] = {
    "max_pool1d": (1, F.max_pool1d), "max_pool2d": (2, F.max_pool2d), "max_pool3d": (3, F.max_pool3d),
}  # fmt: skip
# The same, by operations that also say where the maxima are.
POOLINGS_WITH_PLACES = {
    "max_pool2d_with_indices": 2, "max_pool3d_with_indices": 3, "adaptive_max_pool2d": 2, "adaptive_max_pool3d": 3,
}  # fmt: skip

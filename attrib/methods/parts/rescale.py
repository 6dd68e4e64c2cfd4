"""DeepLIFT through a net: which rule (``rescale_rules``) a call has, and the attributions that they give."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from attrib.methods.parts.losses import target_score
from attrib.methods.parts.rescale_rules import (
    MADE_OF_RULES,
    POOLINGS,
    POOLINGS_WITH_PLACES,
    NoRuleError,
    Pair,
    between,
    bilinear,
    common_root,
    extreme,
    instance_norm,
    linear,
    magnitude,
    pairs_in,
    pooled,
    rescale,
    settled,
    step,
    with_root,
)
from attrib.models import Classifier
from attrib.models.activations import BATCH_NORM, BILINEAR, ELEMENTWISE, LINEAR, RECURRENT
from attrib.models.calls import OF_SHAPE, call, of_sizes, operation
from attrib.models.graph import taken_apart
from attrib.types import SampleError, UserError


def apply(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call gives for pairs, with the rule that fits. Raises NoRuleError if none does."""
    name, function = operation(node), call(node)
    args = tree_map_only(Pair, settled, args)
    if name in OF_SHAPE or of_sizes(node) or not pairs_in(args, kwargs):
        return function(*tree_map_only(Pair, lambda p: p.x.detach(), args), **kwargs)
    if name in RECURRENT:
        return taken_apart(node, args, kwargs, apply, lambda value: value.x if isinstance(value, Pair) else None)
    if name in POOLINGS:
        places, function = POOLINGS[name]
        return pooled(partial(function, return_indices=True), places, *args, **kwargs)[0]
    if name in POOLINGS_WITH_PLACES:
        return pooled(function, POOLINGS_WITH_PLACES[name], *args, **kwargs)
    if name in MADE_OF_RULES and not pairs_in(args[1:], kwargs):
        return MADE_OF_RULES[name](*args, **kwargs)
    if name in BATCH_NORM and not pairs_in(args[1:], kwargs):
        if getattr(node.target, "_overloadname", "") == "no_stats":
            pair, weight, bias, *_, eps = args
            return instance_norm(pair, weight, bias, eps=eps), None, None
        training = BATCH_NORM[name]
        if training is not None and args[training]:
            return instance_norm(*args[:3], eps=args[-1]), None, None
        return linear(function, *args, **kwargs)
    if name in BILINEAR:
        return bilinear(name, function, args, kwargs)
    if name == "div" and not kwargs and len(pairs_in(args)) == 2 and common_root(pairs_in(args)) is None:
        return bilinear("mul", torch.mul, (args[0], rescale(torch.reciprocal, args[1])), {})
    if name == "div" and not kwargs and not pairs_in(args[1]):
        return with_root(linear(function, *args), name, pairs_in(args))
    pairs = pairs_in(args, kwargs)
    linear_in = [args[i] for i in LINEAR.get(name, ()) if i < len(args)]  # the arguments in which it is linear
    if len(pairs_in(linear_in)) == len(pairs) and all(pair.differentiable for pair in pairs):
        return with_root(linear(function, *args, **kwargs), name, pairs)
    if name not in ELEMENTWISE:
        raise NoRuleError
    if name == "heaviside":
        return step(*args)
    if name == "abs" and pairs[0].x.is_complex():
        return magnitude(pairs[0])
    if name == "lerp" and common_root(pairs) is None:
        return between(*args)
    if name in ("maximum", "minimum") and len(pairs) == 2 and common_root(pairs) is None:
        return extreme(name, *pairs)
    if name in ("log_sigmoid_forward", "rrelu_with_noise_functional"):  # the second result is for torch's way back
        return rescale(lambda *values: function(*values)[0], *args, **kwargs), None
    return rescale(function, *args, **kwargs)


def deep_lift(model: Classifier, x: Tensor, baseline: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, *input) the attributions to x, and the logits (N, K) of x and of its baseline.

    Raises UserError, which names the module, for a call without a rule.
    """
    graph = model.graph(x)

    def rule(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return apply(node, args, kwargs)
        except NoRuleError:
            raise UserError(
                f"DeepLIFT has no rule for {operation(node)} in {graph.where(node)}: what it gives "
                "there is neither linear, nor a function of one value, nor a maximum, nor a product. Take "
                "method=integrated_gradients or method=gradient_shap, which need the gradient alone"
            ) from None

    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        logits = graph.propagate(Pair(leaf.clone(), baseline.clone()), rule)
        (multipliers,) = torch.autograd.grad(target_score(logits.x, target).sum(), leaf)
    return multipliers * (x - baseline), logits.x.detach(), logits.x0


def check_complete(uids: Sequence[str], delta: Tensor, size: Tensor, what: str) -> None:
    """Raises SampleError, which gives the number, for a sample whose map does not sum to the change of its score.

    delta  (B,) by how much it does not
    size   (B,) the sum of the attributions' sizes
    """
    # Rounding grows with what is added up, and with how coarse the numbers are: 1e-3 of it in float32.
    share = 1e-3 if torch.finfo(delta.dtype).bits >= 32 else 0.1
    limit = share * size
    for uid, found, most in zip(uids, delta.tolist(), limit.tolist(), strict=True):
        if not found <= most:
            raise SampleError(
                f"{uid}: {what} is not complete: its map misses the change of the score by {found:.2g}, more than "
                f"rounding explains ({most:.2g}). The numbers in the net may be too large or too close for "
                f"{str(delta.dtype).removeprefix('torch.')}; try run.dtype=float64"
            )

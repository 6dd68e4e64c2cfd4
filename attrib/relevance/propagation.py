"""Relevance from the logits of a net back to its input."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from attrib.models.activations import BATCH_NORM, BILINEAR
from attrib.models.calls import call, of_sizes, operation
from attrib.relevance.composites import Composite
from attrib.relevance.layers import layer_of
from attrib.relevance.norms import affine
from attrib.relevance.operations import (
    Back,
    by_rule,
    gated,
    moved,
    multiplied,
    of_function,
    of_log_softmax,
    of_softmax,
    passed,
    scaled,
    shared,
)
from attrib.relevance.plan import Plan
from attrib.relevance.recurrent import recurrent


class Ledger:
    """What calls keep of the relevance (``kept``), and the most that flowed through one call (``size``)."""

    def __init__(self) -> None:
        self.kept: Tensor | float = 0.0
        self.size: Tensor | float = 0.0

    def enter(self, relevance: Tensor, kept: Tensor) -> None:
        self.kept = self.kept + kept
        self.size = torch.maximum(torch.as_tensor(self.size), relevance.abs().sum(dtype=torch.float64))


@dataclass(frozen=True)
class Relevance:
    """What propagation found, of N rows.

    relevance  of the plan's start, (N, *start)
    value      of the start itself
    logits     (N, K)
    ledger     what was kept on the way, of all rows together
    """

    relevance: Tensor
    value: Tensor
    logits: Tensor
    ledger: Ledger


class _Stepped(torch.autograd.Function):
    """A call whose gradient is relevance, and goes back by a rule."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[..., Tensor], back: Back, ledger: Ledger, *sources: Tensor) -> Tensor:
        ctx.save_for_backward(*sources)
        ctx.back, ctx.ledger = back, ledger
        # Autograd keeps no book of a result that is an input.
        result = compute(*sources)
        return result.clone() if any(result is source for source in sources) else result

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor | None, ...]:
        found, kept = ctx.back(ctx.saved_tensors, relevance[0])
        ctx.ledger.enter(relevance[0], kept)
        return None, None, None, *found


def _tell(ledger: Ledger, compute: Callable[..., Tensor], back: Back, *sources: Tensor) -> Tensor:
    found: Tensor = _Stepped.apply(compute, back, ledger, *sources)
    return found


def _given(result: Tensor, *_: Tensor) -> Tensor:
    return result


@dataclass(frozen=True)
class _Normalised:
    """Log-probabilities as the logits before log_softmax, and what it takes off them."""

    logits: Tensor
    off: Tensor


# ---- the net -------------------------------------------------------------------------------------------


def _values(given: Any, value: Any) -> Iterator[tuple[fx.Node, Any]]:
    """The nodes among a call's arguments, with their values."""
    if isinstance(given, fx.Node):
        yield given, value
    elif isinstance(given, list | tuple):
        for one, other in zip(given, value, strict=True):
            yield from _values(one, other)
    elif isinstance(given, dict):
        for key, one in given.items():
            yield from _values(one, value[key])


class Propagation:
    """Relevance by a plan and a composite.

    epsilon  the stabiliser of all that is no layer: sums, averages, products of matrices
    """

    def __init__(self, plan: Plan, composite: Composite, epsilon: float) -> None:
        self._plan, self._composite, self._epsilon = plan, composite, epsilon
        far = [
            source for node, step in plan.steps.items() for source in step.sources if source not in node.all_input_nodes
        ]
        self._far = frozenset(far)  # get relevance of calls that they are no arguments of

    def relevance(self, x: Tensor, start: Callable[[Tensor], Tensor]) -> Relevance:
        """Of inputs (N, *input); ``start`` chooses the relevance of the logits (N, K) among them: others are 0.

        Where a log_softmax makes the logits, relevance is that of the logits in front of it, and the logarithm of the
        sum, which is the same for all classes, keeps the rest.
        """
        plan, ledger = self._plan, Ledger()
        far: dict[fx.Node, Tensor] = {}
        leaves: list[Tensor] = []

        def begin(value: Tensor) -> Tensor:
            leaves.append(value.detach().requires_grad_())
            if plan.start in self._far:
                far[plan.start] = leaves[0]
            return leaves[0]

        def rule(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            result: Any
            if node is plan.normaliser:
                off = args[0].detach().logsumexp(args[1], keepdim=True)
                result = _Normalised(args[0], off.expand_as(args[0]))
            elif (both := next((arg for arg in args if isinstance(arg, _Normalised)), None)) is not None:
                parts = (
                    call(node)(*(part if arg is both else arg for arg in args), **kwargs)
                    for part in (both.logits, both.off)
                )
                return next(parts) if of_sizes(node) else _Normalised(*parts)
            elif node in plan.steps:
                result = self._stepped(node, args, kwargs, far, ledger)
            else:
                with torch.no_grad():
                    result = call(node)(*args, **kwargs)
                result = begin(result) if node is plan.start else result
            for user in (node, *node.users):
                if user in self._far and (user is node or user.target is operator.getitem):
                    far[user] = result if user is node else result[user.args[1]]
            return result

        with torch.enable_grad():
            logits = plan.graph.propagate(begin(x.clone()) if plan.start is plan.graph.input else x, rule)
            before, off = (logits.logits, logits.off) if isinstance(logits, _Normalised) else (logits, None)
            (found,) = torch.autograd.grad(before, leaves, start(before.detach()))
        logits = before
        if off is not None:
            logits = before - off
            ledger.enter(start(logits.detach()), -start(off).sum(dtype=torch.float64))
        return Relevance(found, leaves[0].detach(), logits.detach(), ledger)

    def _stepped(
        self,
        node: fx.Node,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        far: dict[fx.Node, Tensor],
        ledger: Ledger,
    ) -> Any:
        step, function = self._plan.steps[node], call(node)
        if step.kind == "move":
            return function(*args, **kwargs)
        values = dict(_values((node.args, node.kwargs), (args, kwargs)))

        def compute(*sources: Tensor) -> Tensor:
            new = values | dict(zip(step.sources, sources, strict=True))
            new_args, new_kwargs = fx.map_arg((node.args, node.kwargs), new.__getitem__)
            return function(*new_args, **new_kwargs)

        if step.kind == "layer":
            layer = layer_of(self._plan.graph, node, step, args, kwargs)
            rule = self._composite.rule(node, step.first)
            return _Stepped.apply(layer, by_rule(rule, layer), ledger, values[step.sources[0]])
        back: Back
        if step.kind == "merged":
            x = values[step.sources[0]]
            return (x, None, None) if operation(node) in BATCH_NORM else x
        if step.kind == "norm" and operation(node) in BATCH_NORM:  # of several results the first counts
            back = shared(affine(node, args, kwargs), self._epsilon)
            x = _Stepped.apply(lambda *x: compute(*x)[0], back, ledger, values[step.sources[0]])
            return x, None, None
        if step.kind == "recurrent":
            rule = self._composite.rule(node, first=False)  # it also reads its own states
            return recurrent(node, args, step.sources, rule, self._epsilon, partial(_tell, ledger))
        sources = [values[source] if source in values else far[source] for source in step.sources]
        match step.kind:
            case "norm":
                back = shared(affine(node, args, kwargs), self._epsilon)
            case "pass":
                one_call = not step.function and step.sources[0] in values
                # What cannot be computed of the source alone has constants that differ from place to place.
                known = compute if one_call else step.function
                back = of_function(known, self._epsilon) if known else passed
                if not one_call:
                    compute = partial(_given, function(*args, **kwargs).detach())
            case "scale":
                (factor,) = (
                    value for given, value in zip(node.args[:2], args[:2], strict=True) if given is not step.sources[0]
                )
                back = scaled(factor)
            case "fill":
                back = moved(compute)
            case "share":
                back = shared(compute, self._epsilon)
            case "softmax":
                assert step.dim is not None
                if step.sources[0] not in values:  # written out, in several calls
                    compute = partial(_given, function(*args, **kwargs).detach())
                back = of_softmax(compute, step.dim)
            case "log_softmax":
                back = of_log_softmax(compute, args[1], self._epsilon)
            case "glu":
                back = gated(args[1] if len(args) > 1 else -1, self._epsilon)
            case "factors":
                constants = self._plan.constants if operation(node) == "mul" else {}
                back = multiplied([constants.get(source, 0.0) for source in step.sources], self._epsilon)
            case "product":
                pair, _ = BILINEAR[operation(node)]
                of_pair = {node.args[at] for at in pair}
                back = shared(compute, self._epsilon, [0.5 if source in of_pair else 1.0 for source in step.sources])
        return _Stepped.apply(compute, back, ledger, *sources)

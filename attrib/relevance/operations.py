"""LRP's rules for calls that are no layers with weights.

Each takes the call's sources and the relevance of its result, and gives that of the sources, and what the call keeps,
as a number in float64: the share of constants and stabilisers, computed from the formula of the rule and not as what is
missing, so that both together can be checked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attrib.relevance.rules import Layer, Rule, share_out, stable, sum_of

Sources = tuple[Tensor, ...]
Back = Callable[[Sources, Tensor], tuple[Sequence[Tensor], Tensor]]


def by_rule(rule: Rule, layer: Layer) -> Back:
    """A layer with weights."""

    def back(sources: Sources, relevance: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        found, kept = share_out(rule, layer, sources[0], relevance)
        return [found], kept

    return back


def _vjp(compute: Callable[..., Tensor], sources: tuple[Tensor, ...], grad: Callable[[Tensor], Tensor]) -> Any:
    with torch.enable_grad():
        leaves = [source.detach().requires_grad_() for source in sources]
        result = compute(*leaves)
    return torch.autograd.grad(result, leaves, grad(result.detach()))


def shared(compute: Callable[..., Tensor], epsilon: float, factors: Sequence[float] = ()) -> Back:
    """In proportion to what each source contributes to a result that is linear in it.

    factors  what a source's contribution counts: 1/2 for each of two that are multiplied; 1 by default
    """

    def back(sources: Sources, relevance: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        kept: list[Tensor] = []

        def quotient(result: Tensor) -> Tensor:
            # What no source contributes to keeps its share.
            constant = compute(*map(torch.zeros_like, sources))
            finite = result.isfinite()  # what a mask hides by minus infinity has no relevance to share
            found = torch.where(finite, relevance / stable(result, epsilon), 0.0)
            passed_on = torch.where(finite, found * (result - constant), 0.0)
            kept.append((relevance - passed_on).sum(dtype=torch.float64))
            return found

        grads = _vjp(compute, sources, quotient)
        shares = [source * grad for source, grad in zip(sources, grads, strict=True)]
        return [f * share for f, share in zip(factors or [1.0] * len(shares), shares, strict=True)], kept[0]

    return back


def moved(compute: Callable[..., Tensor]) -> Back:
    """Numbers move, and their relevance with them. What is not of the sources keeps its own."""

    def back(sources: Sources, relevance: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        found = _vjp(compute, sources, lambda result: relevance)
        return found, relevance.sum(dtype=torch.float64) - sum_of(r.sum(dtype=torch.float64) for r in found)

    return back


def _summed_to(relevance: Tensor, source: Tensor) -> Tensor:
    return relevance if relevance.shape == source.shape else relevance.sum_to_size(source.shape)


def _nothing(relevance: Tensor) -> Tensor:
    return relevance.new_zeros((), dtype=torch.float64)


def passed(sources: Sources, relevance: Tensor) -> tuple[Sequence[Tensor], Tensor]:
    """All of it to the one source: the identity rule."""
    return [_summed_to(relevance, sources[0])], _nothing(relevance)


def of_function(compute: Callable[..., Tensor], epsilon: float) -> Back:
    """A function of one value: the identity rule, but for f(0), a constant, which keeps its share f(0) / f(x).

    Else the sigmoid of a gate would pass on relevance that is not in proportion to its input, and the layer in front
    of it, which divides by that, would let it explode. Where f(0) is infinite, all of it is passed on.
    """

    def back(sources: Sources, relevance: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        (x,) = sources
        constant = _first(compute(torch.zeros_like(x)))
        constant = torch.where(constant.isfinite(), constant, 0.0)
        kept = torch.where(constant == 0, 0.0, relevance * constant / stable(_first(compute(x)), epsilon))
        return [_summed_to(relevance - kept, x)], kept.sum(dtype=torch.float64)

    return back


def _first(result: Any) -> Tensor:
    """Some functions have a second result for torch's own way back."""
    found: Tensor = result[0] if isinstance(result, tuple) else result
    return found


def held(sources: Sources, relevance: Tensor) -> tuple[Sequence[Tensor], Tensor]:
    """A constant in the place of a source keeps all of it."""
    return [torch.zeros_like(source) for source in sources], relevance.sum(dtype=torch.float64)


def scaled(by: Tensor | float) -> Back:
    """All of it to the source of a product with a constant, which keeps it where it is zero."""

    def back(sources: Sources, relevance: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        through = torch.where(torch.as_tensor(by, device=relevance.device) == 0, 0.0, relevance)
        return [_summed_to(through, sources[0])], (relevance - through).sum(dtype=torch.float64)

    return back


def multiplied(constants: Sequence[float], epsilon: float) -> Back:
    """An element-wise product: half of it to each factor (the uniform rule), if neither has a constant.

    A factor a may be c + v, as a gate is with the sigmoid's c = 1/2. The product of c and the other factor is linear in
    the other one alone, which gets all of it: (a + c) / 2a of the relevance. The share of c in a's own half is booked
    where c is added (``of_function``, ``shared``), and taken back here.
    """

    def back(sources: Sources, relevance: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        half = relevance / 2
        more = [
            half * constant / stable(value, epsilon) if constant else torch.zeros_like(half)
            for value, constant in zip(sources, constants, strict=True)
        ]
        found = [_summed_to(half + extra, source) for extra, source in zip(reversed(more), sources, strict=True)]
        return found, -sum_of(more).sum(dtype=torch.float64)

    return back


def gated(dim: int, epsilon: float) -> Back:
    """What is gated times the sigmoid of the gate, as ``multiplied`` has it."""

    def back(sources: Sources, relevance: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        gate = sources[0].chunk(2, dim)[1].sigmoid()
        open_ = relevance / 4 / stable(gate, epsilon)  # the share of the sigmoid's 1/2 in the gate's half
        return [torch.cat((relevance / 2 + open_, relevance / 2 - open_), dim)], _nothing(relevance)

    return back


def of_softmax(compute: Callable[..., Tensor], dim: int) -> Back:
    """x_i (R_i - s_i sum_j R_j), the Taylor expansion at x; its bias keeps the rest (Achtibat et al., 2024, eq. 13)."""

    def back(sources: Sources, relevance: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        (x,) = sources
        s = compute(x)
        x = torch.where(s == 0, 0.0, x)  # what is hidden, perhaps by minus infinity, has no weight and gets nothing
        found = x * (relevance - s * relevance.sum(dim, keepdim=True))
        kept = relevance * (1 - x + (x * s).sum(dim, keepdim=True))
        return [found], kept.sum(dtype=torch.float64)

    return back


def of_log_softmax(compute: Callable[..., Tensor], dim: int, epsilon: float) -> Back:
    """x_i (q_i - s_i sum_j q_j) with q = R / log s, the Taylor expansion at x, as of the softmax."""

    def back(sources: Sources, relevance: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        (x,) = sources
        result = compute(x)
        s, finite = result.exp(), result.isfinite()
        x = torch.where(finite, x, 0.0)  # what is hidden by minus infinity gets nothing
        quotient = torch.where(finite, relevance / stable(result, epsilon), 0.0)
        found = x * (quotient - s * quotient.sum(dim, keepdim=True))
        kept = relevance - quotient * (x - (x * s).sum(dim, keepdim=True))
        return [found], kept.sum(dtype=torch.float64)

    return back

"""One operation of a net, as its rule sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from attrib.decomposition.values import Pair, Plain, Rows, leaves, proportion
from attrib.types import UserError


@dataclass(frozen=True)
class Call:
    """An operation and its arguments, which are constants, ``Plain`` or ``Pair``, also inside lists.

    run     the operation on ordinary arguments; never in place
    name    of the operation, for messages
    path    of the module that it belongs to
    rule_of finds the rule of a call that a rule makes
    module  if the operation is one
    biased  False for the layer whose bias is in neither part (``Decomposer.output_bias``)
    content whether a plain argument depends on the numbers of the input, not on its size alone
    """

    run: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str
    path: str
    rows: Rows
    rule_of: Callable[[Call], Callable[[Call], Any]]
    module: nn.Module | None = None
    node: fx.Node | None = None
    biased: bool = True
    content: bool = True

    def evaluate(
        self,
        pair: Callable[[Pair], Any],
        plain: Callable[[Plain], Any],
        constant: Callable[[Tensor], Any] = lambda value: value,
    ) -> Any:
        """The operation, with what ``pair``, ``plain`` and ``constant`` (for tensors) give as its arguments."""

        def ordinary(value: Any) -> Any:
            if isinstance(value, Pair):
                return pair(value)
            if isinstance(value, Plain):
                return plain(value)
            return constant(value) if isinstance(value, Tensor) else value

        return self.run(*map_aggregate(self.args, ordinary), **map_aggregate(self.kwargs, ordinary))

    def relevant(self) -> Any:
        return self.evaluate(lambda p: p.relevant, lambda p: p.part)

    def whole(self) -> Any:
        return self.evaluate(lambda p: p.whole, lambda p: p.whole)

    def each(self) -> Any:
        """The operation on the relevant part, and on the whole."""
        return self.rows.paired(self.rows.pair, self.relevant(), self.whole())

    def linear(self) -> Any:
        """The operation on the relevant part and on the irrelevant part.

        The whole is their sum, which for a linear operation is the operation on the whole. That is
        shared by all rows of a sample; with ``rows.both`` it is not used, so that an operation
        which is not linear shows as a sum that differs from the net's own logits.
        """
        if not self.rows.both:
            return self.each()
        irrelevant = self.evaluate(lambda p: p.irrelevant, lambda p: p.part)
        return self.rows.paired(self.rows.sum, self.relevant(), irrelevant)

    def joined(self) -> Any:
        """An operation that puts constants beside what it moves; the constants are irrelevant."""
        relevant = self.evaluate(lambda p: p.relevant, lambda p: _zero(p.part), _zero)
        if not self.rows.both:
            return self.rows.paired(self.rows.pair, relevant, self.whole())
        irrelevant = self.evaluate(lambda p: p.irrelevant, lambda p: p.part)
        return self.rows.paired(self.rows.sum, relevant, irrelevant)

    def at(self, value: Tensor) -> Any:
        """The operation on a tensor in the place of its only pair."""
        return self.evaluate(lambda _: value, lambda p: p.part)

    def value(self) -> Any:
        """What the operation gives: by its rule if there are parts in its arguments, or made by it; else plainly."""
        if self.pairs or (self.rows.mask is not None and self.content and self.name in ("Embedding", "embedding")):
            return self.rule()(self)
        if not leaves((self.args, self.kwargs), Plain):
            return self.run(*self.args, **self.kwargs)
        whole = self.whole()
        # With a row for every sample they are the same numbers.
        return Plain(whole if self.rows.index is None else self.relevant(), whole)

    def rule(self) -> Callable[[Call], Any]:
        return self.rule_of(self)

    @property
    def pairs(self) -> list[Pair]:
        return leaves((self.args, self.kwargs), Pair)

    def with_bias(self, pair: Pair, bias: Tensor, spread: bool = False, tie: float = 0.5) -> Pair:
        """A bias, shared out in proportion to the parts' sizes; ``tie`` is the relevant share where both are zero.

        ``spread``: the bias has samples where the pair's whole has them.
        """
        if not self.biased:
            return pair
        own = pair.spread(bias) if spread else bias
        share = proportion(pair.relevant, pair.irrelevant, tie)
        if pair.other is None:
            return self.rows.pair(torch.addcmul(pair.relevant, share, own), pair.whole + bias)
        # Each product and sum rounded as in the original.
        irrelevant = pair.other + proportion(pair.other, pair.relevant, 1 - tie) * own
        return self.rows.sum(pair.relevant + share * own, irrelevant)

    def apply(self, module: nn.Module, pair: Pair, name: str) -> Any:
        """The rule of a module inside of this one, on a pair."""
        path, kind = f"{self.path}.{name}", type(module).__name__
        call = replace(self, run=module, args=(pair,), kwargs={}, name=kind, path=path, module=module, node=None)
        return call.rule()(call)

    def refuse(self, why: str) -> UserError:
        """The error for a form of an operation that has no rule."""
        return UserError(f"contextual decomposition has no rule for {self.name} {why} (at {self.path or 'the top'})")


def _zero(value: Any) -> Any:
    return torch.zeros_like(value) if isinstance(value, Tensor) else value

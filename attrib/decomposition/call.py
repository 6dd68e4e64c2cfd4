"""One operation of a net, as its rule sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from attrib.decomposition.values import MaskedRows, PlainValue, TensorPair, leaves, proportion
from attrib.types import UserError

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Call:
    """An operation and its arguments: constants, ``PlainValue`` and ``TensorPair``, also inside lists.

    run      the operation on ordinary arguments; never in place
    name     the operation's name, by which functions find their rule
    path     of the module that the operation is in, for messages
    rule_of  finds the rule of a call: this one, or one that a rule makes of it
    module   the module, if the operation is one
    biased   False for the layer whose bias belongs to neither part (``Decomposer``, output_bias)
    content  whether an argument depends on the values of the input, and not on its shape alone
    """

    run: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str
    path: str
    rows: MaskedRows
    rule_of: Callable[[Call], Callable[[Call], Any]]
    module: nn.Module | None = None
    node: fx.Node | None = None
    biased: bool = True
    content: bool = True

    def evaluate(
        self,
        pair: Callable[[TensorPair], Any],
        plain: Callable[[PlainValue], Any],
        constant: Callable[[Tensor], Any] = lambda value: value,
    ) -> Any:
        """Run the operation on what ``pair``, ``plain`` and ``constant`` (for tensors) make of its arguments."""

        def ordinary(value: Any) -> Any:
            if isinstance(value, TensorPair):
                return pair(value)
            if isinstance(value, PlainValue):
                return plain(value)
            return constant(value) if isinstance(value, Tensor) else value

        return self.run(*map_aggregate(self.args, ordinary), **map_aggregate(self.kwargs, ordinary))

    def relevant(self) -> Any:
        """The operation on the relevant parts, which have R rows."""
        return self.evaluate(lambda p: p.relevant, lambda p: p.part)

    def whole(self) -> Any:
        """The operation as the net itself computes it, for the S samples."""
        return self.evaluate(lambda p: p.whole, lambda p: p.whole)

    def each(self) -> Any:
        """Relevant is what the operation gives for the relevant parts; all the rest of the whole is irrelevant."""
        return self.rows.paired(self.rows.pair, self.relevant(), self.whole())

    def linear(self) -> Any:
        """The operation on each of the two parts.

        For a linear operation the two results add up to the operation on the whole, which is computed once for all
        rows of a sample. With ``rows.both`` the two parts are computed instead and added, so that an operation that
        is not linear shows: the sum at the end differs from the net's logits.
        """
        if not self.rows.both:
            return self.each()
        irrelevant = self.evaluate(lambda p: p.irrelevant, lambda p: p.part)
        return self.rows.paired(self.rows.sum, self.relevant(), irrelevant)

    def joined(self) -> Any:
        """An operation that joins its arguments unchanged (``cat``); constants among them are irrelevant."""
        relevant = self.evaluate(lambda p: p.relevant, lambda p: _zero(p.part), _zero)
        if not self.rows.both:
            return self.rows.paired(self.rows.pair, relevant, self.whole())
        irrelevant = self.evaluate(lambda p: p.irrelevant, lambda p: p.part)
        return self.rows.paired(self.rows.sum, relevant, irrelevant)

    def at(self, value: Tensor) -> Any:
        """The operation with a tensor in the place of its only pair."""
        return self.evaluate(lambda _: value, lambda p: p.part)

    def value(self) -> Any:
        """The result, by the operation's rule if a pair is among its arguments or if it embeds masked tokens.

        Otherwise the operation is simply run.
        """
        if self.pairs or (self.rows.mask is not None and self.content and self.name in ("Embedding", "embedding")):
            return self.rule()(self)
        if not leaves((self.args, self.kwargs), PlainValue):
            return self.run(*self.args, **self.kwargs)
        whole = self.whole()
        # If every row is a sample of its own, both have the same values.
        return PlainValue(whole if self.rows.index is None else self.relevant(), whole)

    def rule(self) -> Callable[[Call], Any]:
        return self.rule_of(self)

    def module_as(self, kind: type[M]) -> M:
        """The module, for a rule that the table gives to modules of this class and its subclasses only."""
        assert isinstance(self.module, kind), f"{self.name} at {self.path} is not a {kind.__name__}"
        return self.module

    @property
    def pairs(self) -> list[TensorPair]:
        """All pairs among the arguments."""
        return leaves((self.args, self.kwargs), TensorPair)

    def with_bias(self, pair: TensorPair, bias: Tensor, spread: bool = False, tie: float = 0.5) -> TensorPair:
        """The pair plus a bias that is shared out by the parts' magnitudes (``proportion``).

        tie     the relevant part's share where both parts are zero
        spread  whether the bias has a row per sample, as the pair's whole has
        """
        if not self.biased:
            return pair
        own = pair.spread(bias) if spread else bias
        share = proportion(pair.relevant, pair.irrelevant, tie)
        if pair.other is None:
            return self.rows.pair(torch.addcmul(pair.relevant, share, own), pair.whole + bias)
        # Every product and sum is rounded as in the authors' code.
        irrelevant = pair.other + proportion(pair.other, pair.relevant, 1 - tie) * own
        return self.rows.sum(pair.relevant + share * own, irrelevant)

    def apply(self, module: nn.Module, pair: TensorPair, name: str) -> Any:
        """The rule of a module inside this one, applied to a pair."""
        path, kind = f"{self.path}.{name}", type(module).__name__
        call = replace(self, run=module, args=(pair,), kwargs={}, name=kind, path=path, module=module, node=None)
        return call.rule()(call)

    def refuse(self, why: str) -> UserError:
        """The error for an operation, or a form of it, that has no rule; ``why`` follows its name."""
        return UserError(f"contextual decomposition has no rule for {self.name} {why} (at {self.path or 'the top'})")


def _zero(value: Any) -> Any:
    return torch.zeros_like(value) if isinstance(value, Tensor) else value

"""One operation of a net, as its rule sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from attrib.decomposition.values import MaskedRows, PlainValue, TensorPair, leaves, proportion
from attrib.models.calls import operation
from attrib.types import UserError


def named(node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of an ATen operation by name; those that are not given have their default."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    defaults = {a.name: a.default_value for a in node.target._schema.arguments if a.has_default_value()}  # type: ignore[union-attr]
    return defaults | dict(zip(names, args, strict=False)) | dict(kwargs)


@dataclass(frozen=True)
class Call:
    """An operation and its arguments: constants, ``PlainValue`` and ``TensorPair``, also inside lists.

    run        the operation on ordinary arguments
    args       the arguments by name
    where      the module that makes the call, for messages
    biased     False for the layer whose bias belongs to neither part (``Decomposer``, output_bias)
    rectifies  whether it is a function of the kind of ReLU
    """

    run: Callable[..., Any]
    args: Mapping[str, Any]
    node: fx.Node
    where: str
    rows: MaskedRows
    biased: bool = True
    rectifies: bool = False

    @property
    def name(self) -> str:
        return operation(self.node)

    @cached_property
    def pairs(self) -> list[TensorPair]:
        """All pairs among the arguments."""
        return leaves(self.args, TensorPair)

    @property
    def pair(self) -> TensorPair:
        """The only pair among the arguments. Raises UserError if there are several."""
        if len(self.pairs) > 1:
            raise self.refuse("of several arguments that depend on the input")
        return self.pairs[0]

    def given(self, /, **changes: Any) -> Call:
        """The same call with other arguments."""
        return replace(self, args={**self.args, **changes})

    def first(self) -> Call:
        """The call of an operation with several results, of which only the first is wanted."""
        return replace(self, run=lambda **args: self.run(**args)[0])

    def evaluate(
        self, pair: Callable[[TensorPair], Any], plain: Callable[[PlainValue], Any], zero: Iterable[str] = ()
    ) -> Any:
        """Run the operation on what ``pair`` and ``plain`` make of its arguments.

        zero  the arguments in which constants, too, are replaced: by zeros
        """
        run = {
            name: evaluated(value if name not in zero else map_aggregate(value, _zero), pair, plain)
            for name, value in self.args.items()
        }
        return self.run(**run)

    def relevant(self) -> Any:
        """The operation on the relevant parts, which have R rows."""
        return self.evaluate(lambda p: p.relevant, lambda p: p.part)

    def irrelevant(self) -> Any:
        """The operation on the irrelevant parts, which have R rows."""
        return self.evaluate(lambda p: p.irrelevant, lambda p: p.part)

    def whole(self) -> Any:
        """The operation as the net itself computes it, for the S samples."""
        return self.evaluate(lambda p: p.whole, lambda p: p.whole)

    def each(self) -> Any:
        """Relevant is what the operation gives for the relevant parts; all the rest of the whole is irrelevant."""
        return self.rows.paired(self.rows.pair, self.relevant(), self.whole())

    def linear(self, relevant: Any = None) -> Any:
        """The operation on each of the two parts.

        For a linear operation the two results add up to the operation on the whole, which is computed once for all
        rows of a sample. With ``rows.both`` the two parts are computed instead and added, so that an operation that
        is not linear shows: the sum at the end differs from the net's logits.

        relevant  the operation on the relevant part, if that is not ``self.relevant()``
        """
        relevant = self.relevant() if relevant is None else relevant
        if self.rows.both:
            return self.rows.paired(self.rows.sum, relevant, self.irrelevant())
        return self.rows.paired(self.rows.pair, relevant, self.whole())

    def joined(self, *names: str) -> Any:
        """As ``linear``; of the arguments with these names, those that are constants are irrelevant."""
        return self.linear(self.evaluate(lambda p: p.relevant, lambda p: p.part, zero=names))

    def with_bias(self, pair: TensorPair, bias: Any, tie: float = 0.5) -> TensorPair:
        """The pair plus a bias that is shared out by the parts' magnitudes (``proportion``).

        bias  a tensor, or a plain value with the rows in the axis where the pair has them
        tie   the relevant part's share where both parts are zero
        """
        if not self.biased:
            return pair
        own, whole = (bias.part, bias.whole) if isinstance(bias, PlainValue) else (bias, bias)
        share = proportion(pair.relevant, pair.irrelevant, tie)
        if pair.other is None:
            return self.rows.pair(torch.addcmul(pair.relevant, share, own), pair.whole + whole)
        # Every product and sum is rounded as in the authors' code.
        irrelevant = pair.other + proportion(pair.other, pair.relevant, 1 - tie) * own
        return self.rows.sum(pair.relevant + share * own, irrelevant)

    def refuse(self, why: str) -> UserError:
        """The error for an operation, or a form of it, that has no rule; ``why`` follows its name."""
        return UserError(f"contextual decomposition has no rule for {self.name} {why} (at {self.where})")


def evaluated(value: Any, pair: Callable[[TensorPair], Any], plain: Callable[[PlainValue], Any]) -> Any:
    """An argument, or nested arguments, with ordinary values in the place of pairs and plain values."""

    def ordinary(leaf: Any) -> Any:
        if isinstance(leaf, TensorPair):
            return pair(leaf)
        return plain(leaf) if isinstance(leaf, PlainValue) else leaf

    return map_aggregate(value, ordinary)


def lifted(function: Callable[..., Tensor], *values: Any) -> Any:
    """``function`` of constants and plain values: a constant, or a plain value if one is among them."""
    if not leaves(values, PlainValue):
        return function(*values)
    of_whole = function(*(evaluated(v, _never, lambda p: p.whole) for v in values))
    return PlainValue(of_whole, lambda: function(*(evaluated(v, _never, lambda p: p.part) for v in values)))


def _never(pair: TensorPair) -> Any:
    raise AssertionError("a pair among plain values")


def _zero(value: Any) -> Any:
    if isinstance(value, PlainValue):
        return lifted(torch.zeros_like, value)
    if isinstance(value, Tensor):
        return torch.zeros_like(value)
    return 0.0 if isinstance(value, float | int) else value

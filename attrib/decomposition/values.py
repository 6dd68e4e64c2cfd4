"""What flows through a net that is being decomposed: pairs, plain values, and which row belongs to which sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.node import map_aggregate


class RowsMergedError(Exception):
    """The net has put rows and something else into one dimension, so that samples and rows cannot be matched."""


class Parts(NamedTuple):
    """How the logits of N samples come about under M masks each; both parts add up to the logits."""

    relevant: Tensor  # (N, M, K)
    irrelevant: Tensor  # (N, M, K)


@dataclass(frozen=True)
class Rows:
    """R rows (a sample under a mask each) of S samples.

    index  (R,) int64, the sample of each row; None if row i is sample i, and so S = R
    both   whether the irrelevant part is propagated on its own (see ``Call.linear``)
    mask   (R, T) for token ids: how much of each token's embedding is relevant; else None
    """

    samples: int
    index: Tensor | None
    both: bool = False
    mask: Tensor | None = None

    def pair(self, relevant: Tensor, whole: Tensor) -> Pair:
        """What a rule gives that knows the relevant part and the whole; the rest of it is irrelevant."""
        return self.sum(relevant, whole - relevant) if self.both else Pair(relevant, whole, self)

    def sum(self, relevant: Tensor, irrelevant: Tensor) -> Pair:
        """What a rule gives that has propagated both parts."""
        return Pair(relevant, relevant + irrelevant, self, irrelevant)

    def paired(self, function: Callable[[Tensor, Tensor], Pair], a: Any, b: Any) -> Any:
        """``self.pair`` or ``self.sum`` of two tensors, or of the tensors of two tuples (``chunk``)."""
        if isinstance(a, Tensor):
            return function(a, b)
        if isinstance(a, (tuple, list)):
            return tuple(self.paired(function, x, y) for x, y in zip(a, b, strict=True))
        return a

    def dim(self, whole: Tensor, part: Tensor) -> int | None:
        """The dimension along which ``whole`` has samples and ``part`` has rows; None if they are the same."""
        if self.index is None or whole.shape == part.shape:
            return None
        different = [d for d, (a, b) in enumerate(zip(whole.shape, part.shape)) if a != b]
        if whole.ndim != part.ndim or len(different) != 1:
            raise RowsMergedError
        (d,) = different
        # With another size (windows of an image as rows, say) nobody knows which of them belongs to whom.
        if whole.shape[d] != self.samples or part.shape[d] != len(self.index):
            raise RowsMergedError
        return d


@dataclass(frozen=True)
class Plain:
    """A value that is no sum of two parts: token ids, sizes, what is computed from them.

    The same for the R rows and for the S samples, which may have other sizes.
    """

    part: Any
    whole: Any


@dataclass(frozen=True)
class Pair:
    """A tensor as relevant + irrelevant. Made by ``Rows.pair`` and ``Rows.sum``.

    relevant  (R, ...), or with the rows in another dimension
    whole     (S, ...), relevant + irrelevant of each sample: what the net itself computes, and no mask changes
    other     (R, ...), the irrelevant part, where it is propagated on its own (``Rows.both``; then S = R)
    """

    relevant: Tensor
    whole: Tensor
    rows: Rows
    other: Tensor | None = None

    @property
    def irrelevant(self) -> Tensor:
        return self.spread(self.whole) - self.relevant if self.other is None else self.other

    def spread(self, value: Tensor) -> Tensor:
        """A tensor with samples where ``whole`` has them, in the form in which it broadcasts to the rows."""
        d = self.rows.dim(self.whole, self.relevant)
        if d is None or self.rows.samples == 1:
            return value
        return value.index_select(d, self.rows.index)

    def repeated(self, value: Tensor) -> Tensor:
        """As ``spread``, but with all R rows, for operations that do not broadcast."""
        d = self.rows.dim(self.whole, self.relevant)
        return value if d is None else value.index_select(d, self.rows.index)

    def linear(self, function: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]) -> Pair:
        """Both parts through ``function(part, spread)``, linear in ``part``.

        What else it depends on has samples, and goes through ``spread`` to match ``part``.
        """
        relevant = function(self.relevant, self.spread)
        if self.other is not None:
            return self.rows.sum(relevant, function(self.other, self.spread))
        return self.rows.pair(relevant, function(self.whole, lambda value: value))

    def picked(self, places: Tensor, dim: int = -1) -> Pair:
        """``gather`` of both parts at places that the whole determines."""
        own = self.repeated(places)
        relevant = self.relevant.gather(dim, own)
        if self.other is not None:
            return self.rows.sum(relevant, self.other.gather(dim, own))
        return self.rows.pair(relevant, self.whole.gather(dim, places))


def leaves(value: Any, kind: type) -> list[Any]:
    """All instances of a class in nested arguments."""
    found: list[Any] = []
    map_aggregate(value, lambda leaf: found.append(leaf) if isinstance(leaf, kind) else None)
    return found


def proportion(part: Tensor, other: Tensor, tie: float = 0.5) -> Tensor:
    """The first part's share of a bias, |part| / (|part| + |other|), elementwise.

    Singh, Murdoch & Yu, *Hierarchical interpretations for neural network predictions*, ICLR 2019, eq. 2 ff.
    ``tie`` is the share where both parts are zero.
    """
    small = max(2e-20, 2 * torch.finfo(part.dtype).tiny)
    # Into fresh tensors only, which autograd does not need as they were.
    a = part.abs().add_(tie * small)
    return a / other.abs().add_((1 - tie) * small).add_(a)

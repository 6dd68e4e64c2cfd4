"""What flows through a net while it is decomposed: pairs, plain values, and which row belongs to which sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.node import map_aggregate


class LogitParts(NamedTuple):
    """The two parts of the logits of N samples under M masks each; they add up to the logits."""

    relevant: Tensor  # (N, M, K)
    irrelevant: Tensor  # (N, M, K)


@dataclass(frozen=True)
class MaskedRows:
    """R rows of S samples; a row is a sample under one mask.

    index  (R,) int64, the sample of each row; None if row i is sample i, so that S = R
    both   whether the irrelevant part is propagated on its own (see ``Call.linear``)
    mask   (R, T) for token ids: how much of each token's embedding is relevant; None for other inputs
    """

    samples: int
    index: Tensor | None
    both: bool = False
    mask: Tensor | None = None

    def pair(self, relevant: Tensor, whole: Tensor) -> TensorPair:
        """The result of a rule that computes the relevant part and the whole; what remains is irrelevant."""
        return self.sum(relevant, whole - relevant) if self.both else TensorPair(relevant, whole, self)

    def sum(self, relevant: Tensor, irrelevant: Tensor) -> TensorPair:
        """The result of a rule that computes both parts."""
        return TensorPair(relevant, relevant + irrelevant, self, irrelevant)

    def paired(self, function: Callable[[Tensor, Tensor], TensorPair], a: Any, b: Any) -> Any:
        """``self.pair`` or ``self.sum`` of two tensors, or of the tensors of two tuples one by one (``chunk``)."""
        if isinstance(a, Tensor):
            return function(a, b)
        if isinstance(a, (tuple, list)):
            return tuple(self.paired(function, x, y) for x, y in zip(a, b, strict=True))
        return a

    def axis(self, whole: Tensor, part: Tensor) -> int | None:
        """The axis along which ``whole`` has samples and ``part`` has rows; None if both have the same shape."""
        if self.index is None or whole.shape == part.shape:
            return None
        (found,) = (at for at, (a, b) in enumerate(zip(whole.shape, part.shape, strict=True)) if a != b)
        return found

    def repeat(self, value: Tensor, axis: int | None) -> Tensor:
        """A tensor with samples along an axis, as one with rows there.

        Of each sample there may be several places in a row (the windows of an image, say).
        """
        if self.index is None or axis is None:
            return value
        if self.samples == 1 and value.shape[axis] == 1:
            return value.expand(*value.shape[:axis], len(self.index), *value.shape[axis + 1 :])
        apart = value.unflatten(axis, (self.samples, -1))
        return apart.index_select(axis, self.index).flatten(axis, axis + 1)


class PlainValue:
    """A value that is not divided into two parts: token ids, sizes, masks, and what is computed from them.

    whole  for the S samples
    part   for the R rows: the same values, but tensors may have another size. Computed when it is asked for
    """

    def __init__(self, whole: Any, part: Callable[[], Any]) -> None:
        self.whole, self._part = whole, part

    @cached_property
    def part(self) -> Any:
        return self._part()


@dataclass(frozen=True)
class TensorPair:
    """A tensor as relevant + irrelevant. Made by ``MaskedRows.pair`` and ``MaskedRows.sum``.

    relevant  (R, ...), or with the rows in another dimension
    whole     (S, ...), relevant + irrelevant of each sample: what the net itself computes, the same under every mask
    other     (R, ...), the irrelevant part where it is propagated on its own (``MaskedRows.both``; then S = R)
    """

    relevant: Tensor
    whole: Tensor
    rows: MaskedRows
    other: Tensor | None = None

    @property
    def irrelevant(self) -> Tensor:
        return self.spread(self.whole) - self.relevant if self.other is None else self.other

    def spread(self, value: Tensor) -> Tensor:
        """A tensor with samples where ``whole`` has them, as one with rows there."""
        return self.rows.repeat(value, self.rows.axis(self.whole, self.relevant))

    def plain(self, value: Tensor) -> PlainValue:
        """As a plain value: a tensor with samples where ``whole`` has them."""
        return PlainValue(value, lambda: self.spread(value))

    def linear(self, function: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]) -> TensorPair:
        """Both parts through ``function(part, spread)``, which must be linear in ``part``.

        Other tensors that the function uses have a row per sample; ``spread`` makes them match ``part``.
        """
        relevant = function(self.relevant, self.spread)
        if self.other is not None:
            return self.rows.sum(relevant, function(self.other, self.spread))
        return self.rows.pair(relevant, function(self.whole, lambda value: value))

    def picked(self, places: Tensor, dim: int = -1) -> TensorPair:
        """``gather`` of both parts at places (of the samples) that are chosen by the whole."""
        return self.linear(lambda part, spread: part.gather(dim, spread(places)))


def leaves(value: Any, kind: type) -> list[Any]:
    """All instances of a class in nested lists, tuples and dictionaries."""
    found: list[Any] = []
    map_aggregate(value, lambda leaf: found.append(leaf) if isinstance(leaf, kind) else None)
    return found


def proportion(part: Tensor, other: Tensor, tie: float = 0.5) -> Tensor:
    """The first part's share of a bias, |part| / (|part| + |other|), elementwise; ``tie`` where both are zero.

    Singh, Murdoch & Yu, *Hierarchical interpretations for neural network predictions*, ICLR 2019, eq. 2 ff.
    """
    small = max(2e-20, 2 * torch.finfo(part.dtype).tiny)
    # In place, but only in new tensors whose values autograd does not need for the backward pass.
    a = part.abs().add_(tie * small)
    return a / other.abs().add_((1 - tie) * small).add_(a)

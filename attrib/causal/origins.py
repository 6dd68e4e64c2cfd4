"""Origins: which channels the numbers of a tensor come from (see ``structure``), and how they join.

An origin is a set of channels, or the reason why there is none. Origins are numbered, so that those of a tensor are a
tensor of the same shape. Most are the same along most axes: these are expanded, and cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Channel = tuple[str, int]  # the layer that gives it, and its number there

NOTHING = 0  # the origin of what comes from no channel
_SPAN = 2**26  # more than there are origins


@dataclass(frozen=True)
class Origin:
    """The origin of each number of a tensor, in the tensor's shape: of a set; below zero, of a reason."""

    ids: Tensor  # float64, which all calls that move numbers take


class Origins:
    """The numbers of origins: sets of channels, or the reason why there is none.

    A reason is *shared* if it vanishes where it meets a set.
    """

    def __init__(self) -> None:
        self._sets: list[frozenset[Channel]] = [frozenset()]
        self._reasons: list[tuple[str, bool]] = []
        self._numbers: dict[Any, int] = {frozenset(): NOTHING}
        self._joined: dict[frozenset[int], int] = {}

    def of(self, channels: Iterable[Channel]) -> int:
        return self._number(frozenset(channels))

    def reason(self, text: str, shared: bool = False) -> int:
        return self._number((text, shared))

    def _number(self, key: Any) -> int:
        if key not in self._numbers:
            if isinstance(key, frozenset):
                self._sets.append(key)
                self._numbers[key] = len(self._sets) - 1
            else:
                self._reasons.append(key)
                self._numbers[key] = -len(self._reasons)
        return self._numbers[key]

    def channels(self, number: int) -> frozenset[Channel] | str:
        """The channels, or the reason why they are not known."""
        return self._sets[number] if number >= 0 else self._reasons[-number - 1][0]

    def join(self, numbers: Iterable[int]) -> int:
        """The origin of what is computed from all of these."""
        key = frozenset(numbers)
        if key not in self._joined:
            self._joined[key] = self._join(key)
        return self._joined[key]

    def _join(self, numbers: frozenset[int]) -> int:
        reasons = sorted((n for n in numbers if n < 0), key=lambda n: (self._reasons[-n - 1][1], -n))
        found: frozenset[Channel] = frozenset().union(*(self._sets[n] for n in numbers if n >= 0))
        if reasons and not (found and self._reasons[-reasons[0] - 1][1]):
            return reasons[0]
        return self.of(found)

    # ---- tensors of them ------------------------------------------------------------------------

    def each(self, *given: Tensor) -> Tensor:
        """Element-wise, with broadcasting."""
        found = given[0]
        for other in given[1:]:
            shape = torch.broadcast_shapes(found.shape, other.shape)
            a, b = torch.broadcast_tensors(small(found), small(other))
            if not torch.equal(a, b):
                keys, back = ((a + _SPAN // 2) * _SPAN + b + _SPAN // 2).long().unique(return_inverse=True)
                pairs = [(key // _SPAN - _SPAN // 2, key % _SPAN - _SPAN // 2) for key in keys.tolist()]
                a = found.new_tensor([self.join(pair) for pair in pairs])[back]
            found = a.expand(shape)
        return found

    def over(self, ids: Tensor, axes: Sequence[int], mixed: int | None = None) -> Tensor:
        """What is computed from all numbers along some axes, which keep the length 1.

        ``mixed`` is the origin where theirs differ; None joins them.
        """
        axes = sorted(axis % max(1, ids.ndim) for axis in axes) if ids.ndim else []
        once = small(ids)
        rest = [axis for axis in range(ids.ndim) if axis not in axes]
        rows = once.permute(*rest, *axes).reshape([once.shape[axis] for axis in rest] + [-1])
        first = rows[..., :1]
        if not torch.equal(rows, first.expand_as(rows)):
            kinds, back = rows.flatten(0, -2).unique(dim=0, return_inverse=True)
            values = [self._one(set(map(int, row)), mixed) for row in kinds.tolist()]
            first = ids.new_tensor(values)[back].reshape(first.shape)
        found = first.reshape([1 if axis in axes else once.shape[axis] for axis in range(ids.ndim)])
        return found.expand([1 if axis in axes else size for axis, size in enumerate(ids.shape)])

    def _one(self, numbers: set[int], mixed: int | None) -> int:
        if mixed is None or len(numbers - {NOTHING}) < 2:
            return self.join(numbers)
        return self.join({n for n in numbers if n < 0} | {mixed})


def small(ids: Tensor) -> Tensor:
    """The same with length 1 along the axes that are only expanded."""
    for axis in range(ids.ndim):
        if ids.stride(axis) == 0:
            ids = ids.narrow(axis, 0, min(1, ids.shape[axis]))
    return ids


def expanded(ids: Tensor) -> Tensor:
    """The same, expanded along each axis along which nothing changes."""
    for axis in range(ids.ndim):
        first = ids.narrow(axis, 0, min(1, ids.shape[axis]))
        if ids.shape[axis] > 1 and ids.stride(axis) and torch.equal(ids, first.expand_as(ids)):
            ids = first.expand_as(ids)
    return ids

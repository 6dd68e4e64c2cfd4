"""The rules by which units are chosen, as in the authors' code: for a line of units, and for a grid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.stats import rankdata

# Numbers that differ by less than this fraction of the largest count as equal; otherwise rounding would choose.
_NEAR = 1e-6
# The percentile for the last units of a line, by how many are left; it chooses about two of them.
_LAST = {5: 59.0, 4: 49.0, 3: 59.0, 2: 49.0, 1: 0.0}
_CROSS = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])


@dataclass(frozen=True)
class Rules:
    """How units are chosen.

    percentile  a step chooses the units whose score is at or above this percentile; in a grid it is lowered by 15 once
                a third of the units is chosen
    steps       after so many steps no more units are chosen, and components are merged; None: once all are chosen
    absolute    choose by the score's magnitude, whatever its sign
    smooth      in a grid, also choose a unit if three of its four neighbours are chosen
    """

    percentile: float = 95.0
    steps: int | None = None
    absolute: bool = False
    smooth: bool = True


def near(scores: np.ndarray, scale: float = 0.0) -> float:
    """The difference below which two scores count as equal.

    scale   the size of the numbers that the scores are differences of, and whose rounding they have: those of units may
            be small beside the logits
    """
    finite = np.abs(scores[np.isfinite(scores)])
    return _NEAR * max(scale, float(finite.max(initial=0.0)))


def ranks(scores: np.ndarray, equal: float) -> np.ndarray:
    """(n,) -> (n,) ranks from 1 on; scores that differ by no more than ``equal`` from the next share their mean."""
    order = np.argsort(scores, kind="stable")
    found = np.empty(len(scores))
    found[order] = rankdata(np.cumsum(np.diff(scores[order], prepend=scores[order[:1]]) > equal))
    return found


def threshold(scores: np.ndarray, rules: Rules, scale: float = 0.0) -> np.ndarray:
    """(*shape) scores, NaN where a unit is chosen already -> (*shape) bool: the units that are chosen now.

    At least one, if any is left. ``scale``: see ``near``.
    """
    if rules.absolute:
        scores = np.abs(scores)
    left, percentile = int((~np.isnan(scores)).sum()), rules.percentile
    if left == 0:
        return np.zeros(scores.shape, dtype=bool)
    if scores.ndim == 1:
        percentile = _LAST.get(left, percentile)
    elif scores.size - left > scores.size / 3:
        percentile = max(0.0, percentile - 15)
    return scores >= np.nanpercentile(scores, percentile) - near(scores, scale)


def smoothed(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """(R, C) bool, chosen before and now -> all chosen, and the units of whose four neighbours at least three are."""
    chosen = old | new
    return chosen | (ndimage.convolve(chosen.astype(int), _CROSS, mode="constant") >= 3)


def components(chosen: np.ndarray) -> np.ndarray:
    """(*shape) bool -> (*shape) int: the number of each unit's connected component, 0 for none; corners connect."""
    return ndimage.label(chosen, np.ones((3,) * chosen.ndim))[0]


def follow(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """The components ``new``, numbered as those in ``old`` that they grew from.

    One that grew from several has the smallest of their numbers; one that grew from none has a free number.
    """
    found = np.zeros_like(new)
    fresh, taken = [], set()
    for number in range(1, int(new.max(initial=0)) + 1):
        inside = new == number
        before = old[inside]
        if before.any():
            found[inside] = before[before > 0].min()
            taken.add(int(found[inside][0]))
        else:
            fresh.append(inside)
    free = (i for i in range(1, len(taken) + len(fresh) + 1) if i not in taken)
    # The authors' code gives the smallest free number to the component that was found last.
    for inside, number in zip(reversed(fresh), free):
        found[inside] = number
    return found

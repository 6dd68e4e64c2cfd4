"""The agglomeration itself, as a generator that asks for scores, and a driver that answers many of them at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from attrib.agglomeration.rules import Rules, components, follow, near, ranks, smoothed, threshold

Ask = Generator[np.ndarray, np.ndarray, np.ndarray]
Walk = Generator[np.ndarray, np.ndarray, "Agglomeration"]  # yields (m, n) bool sets of units, is sent scores (m, K)
Answer = Callable[[np.ndarray, np.ndarray], np.ndarray]  # each set's walk (R,), (R, n) bool sets -> scores (R, K)


@dataclass
class Agglomeration:
    """The course of an agglomeration of n units, with scores of K classes.

    units, whole   (n, K) scores of the units alone, and (K,) of all units together
    scores         at the start and after each step, (*shape): at first a unit's own score, then what it would add to
                   the component beside it; NaN where a unit is chosen
    chosen         at the start and after each step, (*shape) bool: the units that are chosen
    levels         for each step, then for each final merger: (*shape) the number of a unit's component, 0 for none,
                   and the (K,) scores of each component by its number
    combined       for each step, (K,) scores of all chosen units together
    scale          see ``near``
    """

    units: np.ndarray
    whole: np.ndarray
    scale: float = 0.0
    scores: list[np.ndarray] = field(default_factory=list)
    chosen: list[np.ndarray] = field(default_factory=list)
    levels: list[tuple[np.ndarray, dict[int, np.ndarray]]] = field(default_factory=list)
    combined: list[np.ndarray] = field(default_factory=list)

    def order(self, absolute: bool = False) -> np.ndarray:
        """(*shape) when each unit joined, the first ones highest: whole numbers are steps, 0 for those that never did.

        The fraction is the rank of the unit's score, or with ``absolute`` of its magnitude, among those of its step:
        above 0 for the smallest, below 1 for the largest; scores that count as equal share it.
        """
        steps = len(self.combined)
        found = np.zeros(self.scores[0].shape)
        for step, (labels, _) in enumerate(self.levels[:steps]):
            found[(labels > 0) & (found == 0)] = steps - step
        for number in np.unique(found):
            at = found == number
            scores = self.scores[int(steps - number)][at]
            place = ranks(np.abs(scores) if absolute else scores, near(scores, self.scale))
            found[at] += (place - 0.5) / at.sum()
        return found


class _Known:
    """Asks for the scores of sets of units, for each set only once."""

    def __init__(self) -> None:
        self._found: dict[bytes, np.ndarray] = {}

    def __call__(self, sets: np.ndarray) -> Ask:
        """(m, *shape) bool -> (m, K)."""
        sets = sets.reshape(len(sets), -1)
        names = [s.tobytes() for s in sets]
        new = {name: s for name, s in zip(names, sets) if name not in self._found}
        if new:
            self._found.update(zip(new, (yield np.stack(list(new.values()))), strict=True))
        return np.stack([self._found[name] for name in names])


def agglomerate(shape: tuple[int, ...], weights: np.ndarray, rules: Rules, scale: float = 0.0) -> Walk:
    """Agglomerate units in a line, shape (n,), or in a grid, (rows, columns).

    weights  (K,) the agglomeration goes by scores @ weights, for example one class less another
    scale    see ``near``

    Each step finds the connected components of the chosen units, scores every unit beside a component by what it would
    add to it (of several components, to the one with the largest number), and chooses the units above the percentile.
    In a grid, the components that are left at the end are merged in pairs, beginning with the pair that gains most over
    the better of the two.
    """
    n, grid, known = int(np.prod(shape)), len(shape) == 2, _Known()
    beside = ndimage.generate_binary_structure(len(shape), 1)
    alone = yield from known(np.concatenate((np.eye(n, dtype=bool), np.ones((1, n), dtype=bool))))
    found = Agglomeration(alone[:-1], alone[-1], scale)
    scores = (found.units @ weights).reshape(shape)
    chosen = threshold(scores, rules, scale)
    found.scores.append(scores.copy())
    found.chosen.append(chosen)
    for step in itertools.count():
        labels = components(chosen)
        if grid and step > 0:
            labels = follow(found.levels[-1][0], labels)
        numbers = np.unique(labels[labels > 0])
        inside = labels == numbers.reshape(-1, *[1] * len(shape))
        border = np.stack([ndimage.binary_dilation(part, beside) for part in inside]) & ~chosen
        which, *place = np.nonzero(border)
        grown = inside[which]
        grown[(np.arange(len(which)), *place)] = True
        answers = yield from known(np.concatenate((inside, chosen[None], grown)))
        parts = answers[: len(numbers)]
        found.levels.append((labels, dict(zip(numbers.tolist(), parts))))
        found.combined.append(answers[len(numbers)])
        gains = (answers[len(numbers) + 1 :] - parts[which]) @ weights
        scores[tuple(place)] = gains  # numpy keeps the last of several: that of the component with the largest number
        scores[chosen] = np.nan
        new = threshold(scores, rules, scale)
        done = bool(chosen.all()) or step + 1 == rules.steps
        chosen = smoothed(chosen, new) if grid and rules.smooth else chosen | new
        found.scores.append(scores.copy())
        found.chosen.append(chosen)
        if done:
            break
    if grid:
        yield from _merge(found, known, weights)
    return found


def _merge(found: Agglomeration, known: _Known, weights: np.ndarray) -> Generator[np.ndarray, np.ndarray, None]:
    """Merge the components in pairs until one is left."""
    labels, parts = found.levels[-1]
    while len(parts) > 1:
        pairs = list(itertools.combinations(sorted(parts), 2))
        unions = np.stack([(labels == a) | (labels == b) for a, b in pairs])
        answers = yield from known(unions)
        better = np.array([max(parts[a] @ weights, parts[b] @ weights) for a, b in pairs])
        gains = answers @ weights - better
        best = int(np.argmax(gains >= gains.max() - near(answers @ weights, found.scale)))
        a, b = pairs[best]
        labels = np.where(labels == b, a, labels)
        parts = {number: part for number, part in parts.items() if number != b} | {a: answers[best]}
        found.levels.append((labels, parts))


def drive(walks: Sequence[Walk], answer: Answer) -> list[Agglomeration]:
    """Run the walks side by side to their end; each call of ``answer`` scores the sets that all of them ask about.

    The sets are padded with False to the largest number of units among the walks.
    """
    done: dict[int, Agglomeration] = {}
    waiting: dict[int, np.ndarray] = {}

    def go_on(i: int, scores: np.ndarray | None) -> None:
        try:
            waiting[i] = next(walks[i]) if scores is None else walks[i].send(scores)
        except StopIteration as end:
            done[i] = end.value

    for i in range(len(walks)):
        go_on(i, None)
    while waiting:
        asked, waiting = waiting, {}
        most = max(sets.shape[1] for sets in asked.values())
        owner = np.concatenate([np.full(len(sets), i) for i, sets in asked.items()])
        sets = np.concatenate([np.pad(s, ((0, 0), (0, most - s.shape[1]))) for s in asked.values()])
        scores = np.split(answer(owner, sets), np.cumsum([len(s) for s in asked.values()])[:-1])
        for i, own in zip(asked, scores):
            go_on(i, own)
    return [done[i] for i in range(len(walks))]

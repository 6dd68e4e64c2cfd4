"""Agglomeration once more, slow and obvious: one set of units at a time, one unit after another.

From the authors' description (algorithm 1 and the rules of their code), with plain loops, for the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

Unit = tuple[int, ...]  # (place,) in a line, (row, column) in a grid
Score = Callable[[frozenset[Unit]], float]
NAN = float("nan")


def percentile(values: list[float], q: float) -> float:
    values = sorted(values)
    place = (len(values) - 1) * q / 100
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)


def beside(unit: Unit, corners: bool) -> list[Unit]:
    if len(unit) == 1:
        return [(unit[0] - 1,), (unit[0] + 1,)]
    r, c = unit
    around = [(r + i, c + j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
    return [u for u in around if corners or u[0] == r or u[1] == c]


def components(chosen: set[Unit]) -> list[frozenset[Unit]]:
    left, found = set(chosen), []
    for unit in sorted(chosen):  # row by row
        if unit not in left:
            continue
        part, todo = set(), [unit]
        while todo:
            one = todo.pop()
            if one in left:
                left.remove(one)
                part.add(one)
                todo += beside(one, corners=True)
        found.append(frozenset(part))
    return found


def picked(scores: dict[Unit, float], q: float, grid: bool, absolute: bool) -> set[Unit]:
    left = {u: abs(s) if absolute else s for u, s in scores.items() if not math.isnan(s)}
    if not left:
        return set()
    if not grid and len(left) <= 5:
        q = {5: 59, 4: 49, 3: 59, 2: 49, 1: 0}[len(left)]
    if grid and len(scores) - len(left) > len(scores) / 3:
        q = max(0, q - 15)
    bound = percentile(list(left.values()), q)
    return {u for u, s in left.items() if s >= bound - 1e-9}


def numbered(parts: list[frozenset[Unit]], before: dict[int, frozenset[Unit]]) -> dict[int, frozenset[Unit]]:
    found, fresh = {}, []
    for part in parts:
        old = [n for n, p in before.items() if p & part]
        if old:
            found[min(old)] = part
        else:
            fresh.append(part)
    for part in reversed(fresh):
        found[min(set(range(1, 1000)) - set(found))] = part
    return found


def slowly(
    shape: tuple[int, ...], score: Score, q: float, steps: int | None = None, absolute: bool = False
) -> tuple[list[dict[int, frozenset[Unit]]], list[set[Unit]]]:
    """(components by number after every step and merging, what was chosen at the start and after every step)"""
    grid = len(shape) == 2
    every = [tuple(int(i) for i in unit) for unit in np.ndindex(shape)]
    scores = {u: score(frozenset([u])) for u in every}
    chosen = picked(scores, q, grid, absolute)
    history, levels = [set(chosen)], []
    while True:
        parts = components(chosen)
        parts = numbered(parts, levels[-1] if levels and grid else {}) if grid and levels else dict(enumerate(parts, 1))
        levels.append(parts)
        for number in sorted(parts):
            for unit in every:
                if unit not in chosen and any(b in parts[number] for b in beside(unit, corners=False)):
                    scores[unit] = score(parts[number] | {unit}) - score(parts[number])
        for unit in chosen:
            scores[unit] = NAN
        done = len(chosen) == len(every) or len(levels) == steps
        chosen = chosen | picked(scores, q, grid, absolute)
        if grid:
            enclosed = {u for u in every if u not in chosen and sum(b in chosen for b in beside(u, False)) >= 3}
            chosen = chosen | enclosed
        history.append(set(chosen))
        if done:
            break
    while grid and len(levels[-1]) > 1:
        parts = levels[-1]
        gains = {
            (a, b): score(parts[a] | parts[b]) - max(score(parts[a]), score(parts[b]))
            for a in sorted(parts)
            for b in sorted(parts)
            if a < b
        }
        a, b = max(gains, key=gains.get)
        levels.append({n: p for n, p in parts.items() if n != b} | {a: parts[a] | parts[b]})
    return levels, history


def tangled(shape: tuple[int, ...], seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """(m, n) bool -> (m, 3) scores of sets: sums, with random interactions between units."""
    n = int(np.prod(shape))
    r = np.random.RandomState(seed)
    own, hidden = r.randn(n, 6), r.randn(6, 3)
    return lambda sets: np.tanh(sets @ own) @ hidden


def of_units(scorer: Callable[[np.ndarray], np.ndarray], weights: np.ndarray, shape: tuple[int, ...]) -> Score:
    """The scorer for one set of places."""

    def score(units: frozenset[Unit]) -> float:
        members = np.zeros(shape, dtype=bool)
        for unit in units:
            members[unit] = True
        return float((scorer(members.reshape(1, -1)) @ weights)[0])

    return score


def sets_of(labels: np.ndarray) -> dict[int, frozenset[Unit]]:
    numbers = np.unique(labels[labels > 0]).tolist()
    return {n: frozenset(tuple(int(i) for i in place) for place in np.argwhere(labels == n)) for n in numbers}

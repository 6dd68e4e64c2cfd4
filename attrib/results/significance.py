"""Whether a test could become significant at all: a matter of the numbers of samples and of pairs alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from attrib.results import stats


@dataclass(frozen=True)
class Hopeless:
    """Paired tests that are corrected together, of which none could become significant.

    n, pairs  common samples of the pair that has most of them; how many pairs there are
    p         the smallest that one test can have; times ``pairs`` it is above 1 - confidence
    needed    common samples from which on a test can be significant
    """

    dataset: str
    model: str
    metric: str
    column: str
    n: int
    pairs: int
    p: float
    needed: int


def hopeless(tests: pd.DataFrame, confidence: float = 0.95) -> list[Hopeless]:
    """Where ``tests``, rows of :func:`attrib.results.tables.paired`, have too few samples for any difference."""
    found = []
    for names, group in tests.groupby(["dataset", "model", "metric", "column"], sort=False):
        n, pairs = int(group["n"].max()), int((group["n"] > 0).sum())
        p = stats.smallest_p(n)
        if pairs and p * pairs > 1 - confidence:
            sizes = range(n, stats.LARGE_PERMUTATION + 2)
            needed = next(k for k in sizes if stats.smallest_p(k) * pairs <= 1 - confidence)
            dataset, model, metric, column = map(str, names)
            found.append(Hopeless(dataset, model, metric, column, n, pairs, p, needed))
    return found


def sentence(found: Sequence[Hopeless], confidence: float = 0.95) -> str:
    """A sentence for each number of samples and pairs; "" if there are none."""
    kinds: dict[tuple[int, int], list[Hopeless]] = {}
    for one in found:
        kinds.setdefault((one.n, one.pairs), []).append(one)
    return " ".join(_sentence(ones, len(kinds) > 1, confidence) for ones in kinds.values())


def _sentence(ones: Sequence[Hopeless], several: bool, confidence: float) -> str:
    one = ones[0]
    samples = "1 common sample" if one.n == 1 else f"{one.n} common samples"
    where = f" in {', '.join(dict.fromkeys(each.column for each in ones))}" if several else ""
    times = f", times {one.pairs} pairs (Holm) {_p(min(1.0, one.p * one.pairs))}" if one.pairs > 1 else ""
    return (
        f"With {samples} no difference{where} can be significant at {100 * confidence:.4g} %: "
        f"the smallest possible p is {_p(one.p)}{times}; it takes {one.needed} samples at least."
    )


def _p(p: float) -> str:
    return f"{p:.2g}".removeprefix("0") if p < 1 else "1"

"""How many samples a comparison needs: the size of a study, from the spread of one that is there."""

from __future__ import annotations

import itertools
import math

import pandas as pd
from scipy.stats import norm

from attrib.results import formats, significance, stats
from attrib.results.written import TextTable

NONE = 1e-4  # an effect that nobody can find: it takes hundreds of millions of samples, and may be rounding
PLACE = ["dataset", "model", "metric", "column"]


def needed(effect: float, power: float = 0.8, alpha: float = 0.05) -> float:
    """Samples from which on a two-sided paired test finds a difference with this probability; inf for no difference.

    The size for a paired t-test (Guenther, The American Statistician 35(4), 1981): the sum of the quantiles over the
    effect, squared, and half the square of the first because the deviation is estimated. The permutation test of
    :func:`attrib.results.stats.paired_test` has the same power (tests/test_power.py). Of few samples it has few
    possible p, so it needs one sample more below twenty, and enough of them for any p to be small enough.

    effect  Cohen's d_z: mean difference over the standard deviation of the differences
    power   the probability to find it
    alpha   level of the test; over the number of pairs where several are corrected

    >>> needed(0.5)
    34
    >>> needed(0.0)
    inf
    """
    if not (0 < power < 1 and 0 < alpha < 1):
        raise ValueError(f"power and alpha lie between 0 and 1, got {power} and {alpha}")
    if math.isnan(effect):
        return math.nan
    if abs(effect) < NONE:
        return math.inf
    least = next(n for n in itertools.count(2) if stats.smallest_p(n) <= alpha)
    if math.isinf(effect):
        return least
    z = float(norm.ppf(1 - alpha / 2))
    n = max(least, math.ceil(((z + float(norm.ppf(power))) / effect) ** 2 + z**2 / 2))
    return n + (n < 20)


def sizes(tests: pd.DataFrame, power: float = 0.8, confidence: float = 0.95) -> pd.DataFrame:
    """One row per dataset, model and column, from the pairs of :func:`attrib.results.tables.paired`.

    pairs, apart     how many pairs of methods there are, and how many the tests tell apart (Holm)
    n                common samples of the pair that has most of them
    half             half the width of the interval of a difference, median over the pairs
    effect           size of a difference over its standard deviation, |d_z|, median over the pairs
    needed           samples to tell the median pair apart with this power, by one test
    needed_holm      the same if all pairs are tested and corrected (at the strictest step of Holm's procedure)
    easy             samples for the quarter of the pairs that differ most
    """
    found = []
    for place, group in tests[tests["n"] > 1].groupby(PLACE, sort=False):
        effects = group["effect"].abs().dropna()
        alpha = 1 - confidence
        median, large = (float(effects.quantile(q, interpolation="lower")) for q in (0.5, 0.75))  # none between inf
        found.append(
            {
                **dict(zip(PLACE, map(str, place), strict=True)),
                "pairs": len(group),
                "apart": int((group["p_holm"] <= alpha).sum()),
                "n": int(group["n"].max()),
                "half": float(((group["hi"] - group["lo"]) / 2).median()),
                "effect": median,
                "needed": needed(median, power, alpha),
                "needed_holm": needed(median, power, alpha / len(group)),
                "easy": needed(large, power, alpha),
            }
        )
    columns = [*PLACE, "pairs", "apart", "n", "half", "effect", "needed", "needed_holm", "easy"]
    return pd.DataFrame(found, columns=columns)


def of_pair(tests: pd.DataFrame, one: str, other: str, power: float = 0.8, confidence: float = 0.95) -> pd.DataFrame:
    """What each column needs to tell one pair of contenders apart: ``tests``' rows of the pair, and ``needed``.

    The difference is ``one`` - ``other``, whichever of them the tests named first.
    """
    asked = [{a, b} == {one, other} for a, b in zip(tests["a"], tests["b"])]
    mine = tests[pd.Series(asked, index=tests.index, dtype=bool)].copy()
    turned = mine["a"] == other
    for name in ("difference", "effect", "rank_biserial"):
        mine.loc[turned, name] = -mine.loc[turned, name]
    mine.loc[turned, ["lo", "hi"]] = -mine.loc[turned, ["hi", "lo"]].to_numpy()
    mine["a"], mine["b"] = one, other
    return mine.assign(needed=[needed(effect, power, 1 - confidence) for effect in mine["effect"]])


def table(tests: pd.DataFrame, power: float = 0.8, confidence: float = 0.95) -> TextTable:
    """``sizes`` for people, a line per column of scores; and whether any test could have been significant."""
    found = sizes(tests, power, confidence)
    places = _places(found)
    header = [*places, "column", "pairs", "told apart", "n", "± of a difference", "|d_z|"]
    header += ["n for the median pair", "… corrected", "n for the easy quarter"]
    body = [
        [
            *(row[name] for name in places),
            row["column"],
            str(row["pairs"]),
            str(row["apart"]),
            str(row["n"]),
            formats.rounded(row["half"]),
            f"{row['effect']:.2f}",
            *map(_count, (row["needed"], row["needed_holm"], row["easy"])),
        ]
        for row in found.to_dict("records")
    ]
    share, level = formats.percent(power), formats.percent(1 - confidence)
    note = (
        f"How many samples tell a pair of methods apart with a probability of {share} (paired test, two-sided, at "
        f"{level}): the pair whose effect is the median of all pairs; the same if every pair is tested and corrected; "
        "the pair at the upper quarter. Told apart: by the tests on the n samples that are there (Holm). |d_z|: "
        "difference over the standard deviation of the differences, median of the pairs, estimated on these samples: "
        "of few it is too large."
    )
    never = significance.sentence(significance.hopeless(tests, confidence), confidence)
    notes = (note, never) if never else (note,)
    return TextTable("How many samples", header, body, frozenset(), len(places) + 1, notes)


def pair_table(found: pd.DataFrame, power: float = 0.8, confidence: float = 0.95) -> TextTable:
    """Rows of ``of_pair`` for people."""
    places = _places(found)
    body = [
        [
            *(row[name] for name in places),
            row["column"],
            f"{row['a']} − {row['b']}",
            str(row["n"]),
            formats.with_half(row["difference"], row["lo"], row["hi"]),
            f"{row['effect']:+.2f}",
            _count(row["needed"]),
        ]
        for row in found.to_dict("records")
    ]
    header = [*places, "column", "pair", "n", "difference", "d_z", f"n for {formats.percent(power)}"]
    share, level = formats.percent(power), formats.percent(1 - confidence)
    note = f"n for {share}: samples from which on a test at {level} finds the difference with that probability."
    return TextTable("Pairs that were asked for", header, body, frozenset(), len(places) + 2, (note,))


def _places(found: pd.DataFrame) -> list[str]:
    """What tells rows of the same column apart."""
    homes = found.groupby("column")["metric"].nunique()
    names = [name for name in ("dataset", "model") if found[name].nunique() > 1]
    return [*names, *(["metric"] if (homes > 1).any() else [])]


def _count(value: float) -> str:
    if math.isnan(value):
        return "–"
    return "never" if math.isinf(value) else f"{value:,.0f}"

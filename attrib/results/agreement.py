"""Do metrics agree? Rank correlation of what two of them say of the same methods, with intervals."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from attrib.results import formats, stats
from attrib.results.written import TextTable

RESAMPLES = 2_000
COLUMNS = ["dataset", "model", "a", "b", "methods", "n", "rho", "lo", "hi"]
_BLOCK = 4_000_000  # numbers drawn at a time


def agreement(frame: pd.DataFrame, confidence: float = 0.95, *, seed: int = 0) -> pd.DataFrame:
    """One row per pair of columns that have a direction; ``frame`` is that of :func:`attrib.results.tables.rows`.

    rho      Spearman's correlation between the means that the methods (``methods`` of them, at least three) have by
             column a and by column b, turned so that higher is better in both. A method takes part that has a score of
             both; the means are over the ``n`` samples of which every one of these methods has both, because a method
             that was tried on easy samples only would look better by both columns
    lo, hi   percentile interval over 2,000 resamples of these samples, which leaves the methods as they are: how much
             rho depends on which samples were looked at. NaN for fewer than two samples
    a = b    of a column with itself: what one half of the samples says against what the other does, mean over random
             halves, without an interval. With half of the samples, so that all of them would agree better

    Samples are matched by uid and fingerprint. Means that differ by rounding alone (:mod:`attrib.results.stats`) share
    their rank. NaN where all methods have the same mean.
    """
    found = []
    use = frame[(frame["state"] == "ok") & (frame["direction"] != "none")]
    use = use.astype(dict.fromkeys(("dataset", "model", "metric", "column", "contender", "direction"), str))
    for (dataset, model), block in use.groupby(["dataset", "model"], sort=False):
        signed = block["value"].where(block["direction"] == "higher", -block["value"])
        block = block.assign(value=signed, sample=block["uid"].astype(str) + "\0" + block["fingerprint"].astype(str))
        several = block.groupby("column")["metric"].transform("nunique") > 1
        block["title"] = block["column"].where(~several, block["column"] + formats.BETWEEN + block["metric"])
        names = [list(dict.fromkeys(block[name])) for name in ("title", "contender", "sample")]
        places = [pd.Categorical(block[n], v).codes for n, v in zip(("title", "contender", "sample"), names)]
        values = np.full([len(some) for some in names], np.nan)
        values[tuple(places)] = block["value"]
        for i, j in itertools.combinations_with_replacement(range(len(values)), 2):
            if pair := _pair(values[i], values[j], confidence, seed, halves=i == j):
                found.append({"dataset": dataset, "model": model, "a": names[0][i], "b": names[0][j], **pair})
    return pd.DataFrame(found, columns=COLUMNS)


def _pair(a: np.ndarray, b: np.ndarray, confidence: float, seed: int, halves: bool) -> dict[str, float]:
    """Two columns, each (methods, samples) with NaN where there is no score; {} for fewer than three methods."""
    both = np.isfinite(a) & np.isfinite(b)
    methods = both.any(1)
    samples = both[methods].all(0)
    n = int(samples.sum())
    if methods.sum() < 3 or not n:
        return {}
    a, b = a[methods][:, samples], b[methods][:, samples]
    a_error, b_error = stats.rounding_error(a), stats.rounding_error(b)

    def sums(weight: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of ``a`` and of ``b`` over the samples, each as often as its weight (n, draws) says."""
        return stats.equalised(a @ weight, a_error @ weight), stats.equalised(b @ other, b_error @ other)

    rng = np.random.default_rng(seed)
    spread = []
    step = max(1, _BLOCK // n)
    for start in range(0, RESAMPLES, step):
        count = min(step, RESAMPLES - start)
        if halves:
            one = np.argsort(rng.random((n, count)), axis=0) % 2 == 0
            spread.append(spearman(*sums(one, ~one)))
        else:
            drawn = rng.multinomial(n, np.full(n, 1 / n), size=count).T.astype(float)
            spread.append(spearman(*sums(drawn, drawn)))
    drawn_rho = np.concatenate(spread)
    known = drawn_rho[np.isfinite(drawn_rho)]
    lo = hi = np.nan
    if halves:
        rho = float(known.mean()) if n > 1 and len(known) else np.nan
    else:
        rho = float(spearman(*sums(np.ones((n, 1)), np.ones((n, 1))))[0])
        if n > 1 and len(known):
            lo, hi = np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2])
    return {"methods": int(methods.sum()), "n": n, "rho": rho, "lo": float(lo), "hi": float(hi)}


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(draws,): rank correlations of two (methods, draws); equal values share their rank, NaN where one is constant."""
    first, second = (rankdata(x, axis=0) for x in (a, b))
    first, second = (ranks - ranks.mean(0) for ranks in (first, second))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (first * second).sum(0) / np.sqrt((first**2).sum(0) * (second**2).sum(0))


def tables(found: pd.DataFrame, confidence: float = 0.95) -> list[TextTable]:
    """``agreement`` as one square per dataset and model: columns against columns."""
    drawn = []
    note = (
        "Spearman's correlation of the methods' means on their common samples, each column turned so that higher is "
        f"better, with its {formats.percent(confidence)} interval over resampled samples. Diagonal: how stable a "
        "column is, one half of the samples against the other (with all of them it would be more stable)."
    )
    for (dataset, model), block in found.groupby(["dataset", "model"], sort=False):
        names = list(dict.fromkeys([*block["a"], *block["b"]]))
        cell = {(row["a"], row["b"]): row for row in block.to_dict("records")}
        body = []
        for i, one in enumerate(names):
            entries = [cell.get((other, one)) for other in names[: i + 1]]
            body.append([one, *map(_entry, entries), *[""] * (len(names) - i - 1)])
        counts = [formats.span(block[name]) for name in ("methods", "n")]
        title = formats.title(f"{dataset}, {model}: do metrics agree?", f"{counts[0]} methods", f"n={counts[1]}")
        drawn.append(TextTable(title, ["", *names], body, frozenset(), 1, (note,)))
    return drawn


def _entry(row: Mapping[str, float] | None) -> str:
    if row is None or np.isnan(row["rho"]):
        return "–"
    return f"{row['rho']:+.2f}" + ("" if np.isnan(row["lo"]) else f" [{row['lo']:+.2f}, {row['hi']:+.2f}]")

"""Do metrics agree? Rank correlation of what two of them say of the same methods, with intervals."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from attrib.results import formats
from attrib.results.written import TextTable

RESAMPLES = 2_000
COLUMNS = ["dataset", "model", "a", "b", "methods", "n", "rho", "lo", "hi"]


def agreement(frame: pd.DataFrame, confidence: float = 0.95, *, seed: int = 0) -> pd.DataFrame:
    """One row per pair of columns that have a direction; ``frame`` is that of :func:`attrib.results.tables.rows`.

    rho      Spearman's correlation between the means that the methods (``methods`` of them, at least three) have by
             column a and by column b, turned so that higher is better in both
    lo, hi   percentile interval over 2,000 resamples of the samples (``n``), the same draw for all columns and methods,
             which leaves the methods as they are: how much rho depends on which samples were looked at
    a = b    of a column with itself: rho is the mean over random halves of the samples, what one half says against
             what the other does. Two columns cannot be expected to agree better than each does with itself.

    Samples are matched by uid and fingerprint. NaN where all methods have the same mean.
    """
    found = []
    use = frame[(frame["state"] == "ok") & (frame["direction"] != "none")]
    use = use.astype(dict.fromkeys(("dataset", "model", "metric", "column", "contender", "direction"), str))
    for (dataset, model), block in use.groupby(["dataset", "model"], sort=False):
        signed = block["value"].where(block["direction"] == "higher", -block["value"])
        block = block.assign(value=signed, sample=block["uid"].astype(str) + "\0" + block["fingerprint"].astype(str))
        several = block.groupby("column")["metric"].transform("nunique") > 1
        block["title"] = block["column"].where(~several, block["column"] + " · " + block["metric"])
        titles, methods, samples = (list(dict.fromkeys(block[name])) for name in ("title", "contender", "sample"))
        values = np.full((len(titles), len(methods), len(samples)), np.nan)
        places = [
            pd.Categorical(block[n], v).codes
            for n, v in zip(("title", "contender", "sample"), (titles, methods, samples))
        ]
        values[tuple(places)] = block["value"]
        found += _of(values, titles, {"dataset": dataset, "model": model}, confidence, seed)
    return pd.DataFrame(found, columns=COLUMNS)


def _of(
    values: np.ndarray, titles: Sequence[str], place: dict[str, str], confidence: float, seed: int
) -> list[dict[str, object]]:
    """``values``: (columns, methods, samples)."""
    rng, n = np.random.default_rng(seed), values.shape[2]
    draws = rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES).T.astype(float)
    halves = np.argsort(rng.random((n, RESAMPLES // 4)), axis=0) % 2 == 0
    once, drawn = _means(values, np.ones((n, 1))), _means(values, draws)
    first, second = _means(values, halves), _means(values, ~halves)
    tail = (1 - confidence) / 2
    lines: list[dict[str, object]] = []
    for i, j in itertools.combinations_with_replacement(range(len(titles)), 2):
        there = np.isfinite(values[[i, j]]).any(2).all(0)
        if there.sum() < 3:
            continue
        common = np.isfinite(values[[i, j]][:, there]).any((0, 1))
        if i == j:
            halved = spearman(first[i][there], second[i][there])
            rho = float(np.nanmean(halved)) if np.isfinite(halved).any() else np.nan
            spread = halved
        else:
            rho = float(spearman(once[i][there], once[j][there])[0])
            spread = spearman(drawn[i][there], drawn[j][there])
        known = spread[np.isfinite(spread)]
        lo, hi = np.quantile(known, [tail, 1 - tail]) if len(known) else (np.nan, np.nan)
        counts = {"methods": int(there.sum()), "n": int(common.sum())}
        lines.append({**place, "a": titles[i], "b": titles[j], **counts, "rho": rho, "lo": float(lo), "hi": float(hi)})
    return lines


def _means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(columns, methods, draws): weighted means over the samples that are there; NaN where a draw has none of them."""
    there = np.isfinite(values)
    counts = there.astype(float) @ weights
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(counts > 0, np.where(there, values, 0.0) @ weights / counts, np.nan)


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(draws,): rank correlations of two (methods, draws); equal values share their rank, NaN where one is constant."""
    ranks = [rankdata(x, axis=0) for x in (a, b)]
    first, second = (r - r.mean(0) for r in ranks)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (first * second).sum(0) / np.sqrt((first**2).sum(0) * (second**2).sum(0))


def tables(found: pd.DataFrame, confidence: float = 0.95) -> list[TextTable]:
    """``agreement`` as one square per dataset and model: columns against columns."""
    drawn = []
    note = (
        "Spearman's correlation of the methods' means, each column turned so that higher is better, ± half the width "
        f"of the {formats.percent(confidence)} interval over resampled samples. Diagonal: one half of the samples "
        "against the other, the most that two columns can be expected to agree."
    )
    for (dataset, model), block in found.groupby(["dataset", "model"], sort=False):
        names = list(dict.fromkeys([*block["a"], *block["b"]]))
        cell = {(row["a"], row["b"]): row for row in block.to_dict("records")}
        body = []
        for i, one in enumerate(names):
            entries = [cell.get((other, one)) for other in names[: i + 1]]
            body.append([one, *map(_entry, entries), *[""] * (len(names) - i - 1)])
        counts = formats.title(f"{block['methods'].max()} methods", f"n={block['n'].max()}")
        title = formats.title(f"{dataset}, {model}: do metrics agree?", counts)
        drawn.append(TextTable(title, ["", *names], body, frozenset(), 1, (note,)))
    return drawn


def _entry(row: Mapping[str, float] | None) -> str:
    if row is None or np.isnan(row["rho"]):
        return "–"
    return f"{row['rho']:+.2f} ± {(row['hi'] - row['lo']) / 2:.2f}"

"""The top of each section: mean scores as methods × columns, and which methods are clearly better than which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from attrib.report.curves import Style
from attrib.results import formats


@dataclass(frozen=True)
class HeadlineScore:
    """One number of the headline table, with its interval as places (0 to 100) on its column's axis.

    ``value`` is what the table is sorted by.
    """

    value: float | None
    mean: str
    half: str
    exact: str
    count: str
    best: bool
    tie: bool
    dot: float | None
    left: float
    width: float


@dataclass(frozen=True)
class Leader:
    """The best mean of a column.

    best    the methods that have it
    ahead   those it is clearly better than
    level   those from which it is not distinguishable
    apart   those with which it has no common samples
    """

    column: str
    best: Sequence[str]
    value: str
    ahead: Sequence[tuple[str, str]]  # contender, p after Holm's correction
    level: Sequence[tuple[str, str]]
    apart: Sequence[str]


def lines(
    wide: formats.Wide, styles: Mapping[str, Style]
) -> list[tuple[str, Style, Sequence[str], list[HeadlineScore | None]]]:
    axes = []
    for i in range(len(wide.columns)):
        scored = [row for _, _, entries in wide.lines if (row := entries[i])]
        ends = [row[k] for row in scored for k in ("mean", "lo", "hi") if np.isfinite(row[k])]
        axes.append((min(ends), max(ends)) if ends else (0.0, 0.0))
    return [
        (
            contender,
            styles[contender],
            costs,
            [_entry(e, shared, axis) for e, shared, axis in zip(entries, wide.counts, axes, strict=True)],
        )
        for contender, costs, entries in wide.lines
    ]


def _entry(row: Mapping[str, Any] | None, shared: str, axis: tuple[float, float]) -> HeadlineScore | None:
    if row is None:
        return None
    mean, lo, hi = row["mean"], row["lo"], row["hi"]
    low, span = axis[0], axis[1] - axis[0]
    dot, left, width = None, 0.0, 0.0
    if np.isfinite(mean) and span > 0:
        dot = round(100 * (mean - low) / span, 2)
        if np.isfinite(lo):
            left, width = round(100 * (lo - low) / span, 2), round(100 * (hi - lo) / span, 2)
    return HeadlineScore(
        value=float(mean) if np.isfinite(mean) else None,
        mean=formats.rounded(mean, lo, hi),
        half=formats.rounded((hi - lo) / 2, lo, hi) if hi > lo else "",
        exact=f"{mean!r} [{lo!r}, {hi!r}]",
        count="" if shared else formats.count_text(row["n"], row["failed"], row["pending"]),
        best=bool(row["best"]),
        tie=bool(row["tie"]),
        dot=dot,
        left=left,
        width=width,
    )


def verdicts(summary: pd.DataFrame, wide: formats.Wide, tests: pd.DataFrame, confidence: float) -> list[Leader]:
    block = summary[(summary["dataset"] == wide.dataset) & (summary["model"] == wide.model) & summary["best"]]
    found = []
    for (metric, column), best in block.groupby(["metric", "column"], sort=False):
        row = best.iloc[0]
        places = tests[(tests["metric"] == metric) & (tests["column"] == column)]
        ahead: list[tuple[str, str]] = []
        level: list[tuple[str, str]] = []
        apart: list[str] = []
        for test in places.to_dict("records"):
            if row["contender"] not in (test["a"], test["b"]):
                continue
            other = test["b"] if row["contender"] == test["a"] else test["a"]
            if test["n"] == 0:
                apart.append(other)
            else:
                kind = ahead if test["better"] == row["contender"] else level
                kind.append((other, _p_is(test["p_holm"])))
        title = formats.column_title(f"{column} {row['direction']}", metric, metric == column)
        value = formats.with_half(row["mean"], row["lo"], row["hi"])
        found.append(Leader(title, list(best["contender"]), value, ahead, level, apart))
    return found


def _p_is(p: float) -> str:
    text = formats.p_text(p)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def facts(frame: pd.DataFrame) -> list[tuple[int, str]]:
    """The line below the page's title: how many methods, datasets, samples, scores and failures there are."""
    failed = frame.loc[frame["state"] == "failed", ["cell", "uid"]].drop_duplicates()
    pending = frame.loc[frame["state"] == "pending", ["cell", "uid"]].drop_duplicates()
    counts = [
        (frame["method"].nunique(), "method"),
        (frame["dataset"].nunique(), "dataset"),
        (frame["model"].nunique(), "model"),
        (len(frame.loc[frame["state"] != "unasked", ["dataset", "uid"]].drop_duplicates()), "sample"),
        (int((frame["state"] == "ok").sum()), "score"),
        (len(failed), "failure"),
    ]
    facts = [(n, name if n == 1 else f"{name}s") for n, name in counts]
    return facts + ([(len(pending), "pending")] if len(pending) else [])

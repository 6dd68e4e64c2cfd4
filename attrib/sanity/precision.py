"""What another arithmetic of the net changes: two cells that differ in nothing but ``precision``, side by side."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from attrib.results import stats
from attrib.results.formats import TextTable, rounded, title
from attrib.sanity.measures import spearman
from attrib.store.cell import Cell
from attrib.store.files import Key

CORRELATION, LARGEST, SECONDS = "rank correlation", "largest difference / largest number", "seconds per sample"


@dataclass(frozen=True)
class Change:
    """One number of both cells, on the samples that they share.

    map, what    the map's name, and what the number is: a column of a metric, or one of the above
    fine, coarse its means in float32 and in the other arithmetic; NaN for what compares two maps
    difference   coarse - fine per sample, or what compares the two maps, with its interval; of seconds without one
    """

    map: str
    what: str
    fine: float
    coarse: float
    difference: stats.MeanInterval


def changes(
    fine: Cell,
    coarse: Cell,
    keys: Sequence[Key],
    maps: Sequence[str],
    metrics: Mapping[str, tuple[str, str]],
    confidence: float = 0.95,
) -> list[Change]:
    """Of the samples ``keys`` that both cells have; ``metrics``: name -> the folder of its scores in each cell.

    What one of the cells does not have is left out, and so is a sample whose map is constant from the correlation.
    """
    stored = [cell.maps.index() for cell in (fine, coarse)]
    both = [key for key in keys if key in stored[0] and key in stored[1]]
    agreement: dict[tuple[str, str], list[float]] = {(m, what): [] for m in maps for what in (CORRELATION, LARGEST)}
    for key in both:
        read = [cell.maps.read(key, maps) for cell in (fine, coarse)]
        for name in maps:
            a, b = (each[name].astype(np.float64) for each in read)
            agreement[name, CORRELATION].append(spearman(a, b))
            agreement[name, LARGEST].append(float(np.abs(a - b).max() / (np.abs(a).max() or math.nan)))
    found = [
        Change(name, what, math.nan, math.nan, stats.interval(values, confidence))
        for (name, what), values in agreement.items()
    ]
    for metric, folders in metrics.items():
        scores = [_scores(cell, folder) for cell, folder in zip((fine, coarse), folders)]
        for name, column in scores[0]:
            ours, theirs = (of.get((name, column), {}) for of in scores)
            shared = [key for key in keys if key in ours and key in theirs]
            what = metric if column == metric else f"{metric}: {column}"
            found.append(_change(name, what, [ours[k] for k in shared], [theirs[k] for k in shared], confidence))
    seconds = [[float(index[key].info.get("seconds", math.nan)) for key in both] for index in stored]
    taken = _change("", SECONDS, seconds[0], seconds[1], confidence)
    # The time of a batch is divided evenly over its samples, which are no independent measurements of it then.
    several = stats.MeanInterval(taken.difference.n, taken.difference.mean, math.nan, math.nan)
    return [*found, dataclasses.replace(taken, difference=several)]


def _change(map: str, what: str, a: list[float], b: list[float], confidence: float) -> Change:
    fine, coarse = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    means = [float(each.mean()) if each.size else math.nan for each in (fine, coarse)]
    return Change(map, what, means[0], means[1], stats.interval(coarse - fine, confidence))


def _scores(cell: Cell, folder: str) -> dict[tuple[str, str], dict[Key, float]]:
    """(map, column) -> the scores of the samples, the latest of each."""
    found: dict[tuple[str, str], dict[Key, float]] = {}
    table = cell.scores(folder).table().to_pandas().sort_values("time", kind="stable")
    for row in table.itertuples():
        found.setdefault((row.map, row.column), {})[row.uid, row.fingerprint] = row.value
    return found


def table(names: Sequence[str], precision: Mapping[str, str], found: Sequence[Change]) -> TextTable:
    """For people. ``names``: of dataset, model and method; ``precision``: what was not float32."""
    several = len({change.map for change in found if change.map}) > 1
    said = ", ".join(f"{what} in {how}" for what, how in precision.items())
    body = []
    for change in found:
        mean, lo, hi, n = change.difference.mean, change.difference.lo, change.difference.hi, change.difference.n
        what = title(change.map if several else "", change.what)
        means = ["" if math.isnan(value) else f"{value:.4g}" for value in (change.fine, change.coarse)]
        interval = "" if math.isnan(lo) else f"[{rounded(lo, lo, hi)}, {rounded(hi, lo, hi)}]"
        body.append([what, str(n), *means, "" if math.isnan(mean) else rounded(mean, lo, hi), interval])
    notes = (
        "difference: mean over the samples of the coarse number less float32's; of maps, what compares the two.",
        "seconds are those of this machine; the first sample of each run also pays for getting started. They have no "
        "interval, as samples of one batch share its time.",
    )
    return TextTable(title(*names, said), ["", "n", "float32", "coarse", "difference", "95 % CI"], body, notes=notes)

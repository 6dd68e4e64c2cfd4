"""Plots of the page: mean curves of the metrics, losses of the methods that optimise."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import safe_open

from attrib.drawing import pictures
from attrib.results import formats
from attrib.results.labels import Labelled, ScoreFolder
from attrib.store.cell import READING, Arrays
from attrib.store.files import Key
from attrib.store.reading import regular

MOST_CURVES = 2_000  # samples whose curves are read, per method: more would not change the band visibly
MOST_LOSSES = 24


@dataclass(frozen=True)
class Style:
    """How a method is drawn in every plot of the page."""

    colour: str
    dashed: bool


def style(i: int) -> Style:
    return Style(pictures.COLOURS[i % len(pictures.COLOURS)], i // len(pictures.COLOURS) % 2 == 1)


@dataclass(frozen=True)
class Curve:
    title: str
    about: str
    image: str
    lines: Sequence[tuple[str, Style, int]]  # contender, style, samples
    notes: Sequence[str] = ()


def _read(arrays: Arrays, wanted: Iterable[Key], name: str) -> tuple[list[np.ndarray], int]:
    """(the array ``name`` of every wanted sample that has it, how many are damaged). Each chunk is opened once."""
    index = arrays.index()
    by_file: dict[Path, list[Any]] = {}
    for key in wanted:
        if (record := index.get(key)) is not None and name in record.names:
            by_file.setdefault(record.path, []).append(record)
    found, damaged = [], 0
    for path, records in by_file.items():
        try:
            regular(path)
            with safe_open(path, framework="numpy") as file:
                for record in records:
                    value = file.get_tensor(f"{record.position}/{name}")
                    if zlib.crc32(np.ascontiguousarray(value).data) == record.crc[name]:
                        found.append(value)
                    else:
                        damaged += 1
        except READING:
            damaged += len(records)
    return found, damaged


def _aligned(values: Sequence[np.ndarray]) -> np.ndarray:
    """(N, S); curves of different lengths are interpolated on the equal steps of the longest."""
    longest = max(len(v) for v in values)
    grid = np.linspace(0, 1, longest)
    same = (v if len(v) == longest else np.interp(grid, np.linspace(0, 1, len(v)), v) for v in values)
    return np.stack([np.asarray(v, dtype=np.float64) for v in same])


def means(
    cells: Sequence[Labelled],
    frame: pd.DataFrame,
    scores: Mapping[str, Sequence[ScoreFolder]],
    styles: Mapping[str, Style],
) -> list[Curve]:
    """Mean curve of every method with a band of 1.96 standard errors, one plot per metric and curve."""
    plots: dict[tuple[str, str], dict[str, Any]] = {}
    for item in cells:
        mine = frame[(frame["cell"] == item.cell.folder.name) & (frame["state"] == "ok")]
        for folder in scores.get(item.cell.folder.name, []):
            if not folder.curves:
                continue
            arrays = item.cell.curves(folder.folder)
            arrays.index()
            item.broken.extend(arrays.broken)
            own = mine[mine["metric"] == folder.label]
            for (map_name, contender), group in own.groupby(["map", "contender"], observed=True, sort=False):
                wanted = list(dict.fromkeys(zip(group["uid"], group["fingerprint"])))
                for curve, about in folder.curves.items():
                    values, damaged = _read(arrays, wanted[:MOST_CURVES], f"{map_name}/{curve}")
                    entry = plots.setdefault(
                        (folder.label, curve),
                        {"about": about, "bounds": folder.bounds.get(curve), "lines": [], "notes": []},
                    )
                    if len(wanted) > MOST_CURVES:
                        entry["notes"].append(f"{contender}: the first {MOST_CURVES} of {len(wanted)} samples.")
                    if damaged:
                        entry["notes"].append(f"{contender}: {damaged} curves are damaged on disk and left out.")
                    values = [v for v in values if v.ndim == 1 and len(v) > 1 and np.isfinite(v).all()]
                    if values:
                        entry["lines"].append((contender, _aligned(values)))
    return [
        Curve(
            title=formats.title(curve.removesuffix("_curve"), "" if label in curve else label),
            about=f"Mean curves of {', '.join(contender for contender, _ in entry['lines'])}. {entry['about']}",
            image=_mean_plot(entry["lines"], entry["about"], styles, entry["bounds"]),
            lines=[(contender, styles[contender], len(values)) for contender, values in entry["lines"]],
            notes=entry["notes"],
        )
        for (label, curve), entry in plots.items()
        if entry["lines"]
    ]


def _mean_plot(
    lines: Sequence[tuple[str, np.ndarray]],
    about: str,
    styles: Mapping[str, Style],
    bounds: tuple[float, float] | None = None,
) -> str:
    drawn = []
    for contender, values in lines:
        mean, style, band = values.mean(0), styles[contender], None
        if len(values) > 1:
            band = 1.96 * values.std(0, ddof=1) / np.sqrt(len(values))
        lo, hi = (None, None) if band is None else (mean - band, mean + band)
        if bounds is not None and lo is not None and hi is not None:
            lo, hi = np.maximum(lo, bounds[0]), np.minimum(hi, bounds[1])
        drawn.append(pictures.PlotLine(mean, style.colour, lo, hi, dashed=style.dashed))
    x, y = _axes(about)
    return pictures.plot(drawn, x=x, y=y)


def _axes(about: str) -> tuple[str, str]:
    """``x: threshold; y: ratio`` -> ("threshold", "ratio")."""
    before, _, y = about.partition("y:")
    return before.strip().removeprefix("x:").strip(" ,;"), y.strip()


def losses(cells: Sequence[Labelled], frame: pd.DataFrame, styles: Mapping[str, Style]) -> list[Curve]:
    """The extras ``loss*`` and ``error_*`` (S,) of some samples: a thin line per sample, a thick one for the mean."""
    found = []
    for item in cells:
        index = item.maps()
        names = dict.fromkeys(n for record in index.values() for n in record.names if n.startswith(("loss", "error_")))
        method = frame.loc[frame["cell"] == item.cell.folder.name, "contender"]
        style = styles[method.iloc[0]] if len(method) else Style(pictures.COLOURS[0], False)
        for name in names:
            values, _ = _read(item.cell.maps, list(index)[:MOST_LOSSES], name)
            values = [v for v in values if v.ndim == 1 and len(v) > 1]
            if not values:
                continue
            lines = [pictures.PlotLine(v, style.colour, width=0.5) for v in values]
            if len({len(v) for v in values}) == 1:
                lines.append(pictures.PlotLine(np.mean(values, axis=0), style.colour, width=2.2))
            x, y = (
                ("equal steps, from 10 draws to all", "relative standard error")
                if name.startswith("error_")
                else ("step", name)
            )
            image = pictures.plot(lines, size=(3.4, 2.2), x=x, y=y, unit_x=False)
            found.append(Curve(formats.title(item.method, name), "", image, [(item.method, style, len(values))]))
    return found

"""A paper's table as one figure: our means with their intervals, and the published values beside them."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from attrib.drawing import pictures
from attrib.papers.presets import Preset
from attrib.store.files import write_atomic


def draw(preset: Preset, found: pd.DataFrame, path: Path) -> bool:
    """Write a PNG of ``comparison.table``: a panel per column, a line per row. False if there is nothing to draw."""
    known = found[found["mean"].notna()]
    if known.empty:
        return False
    rows, columns = list(dict.fromkeys(known["row"])), list(dict.fromkeys(known["column"]))
    across = min(len(columns), 5)
    down = math.ceil(len(columns) / across)
    size = (2.2 + 2.2 * across, (0.9 + 0.28 * len(rows)) * down + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharey=True).ravel()
    for axes, column in zip(panels, columns):
        for line in known[known["column"] == column].to_dict("records"):
            y = rows.index(line["row"])
            ends = [[line["mean"] - line["lo"]], [line["hi"] - line["mean"]]]
            axes.errorbar(line["mean"], y, xerr=ends, fmt="o", color="#1f5fa8", markersize=4, capsize=2)
            for name, mark in (("published", "D"), ("comparison", "s")):
                if not math.isnan(line[name]):
                    axes.plot(line[name], y, mark, color=pictures.GREY, markerfacecolor="none", markersize=5)
        axes.set_title(pictures.plain(column), fontsize=8, parse_math=False)
        axes.tick_params(labelsize=7)
        axes.grid(axis="x", linewidth=0.4)
    for axes in panels[len(columns) :]:
        axes.set_visible(False)
    panels[0].set(ylim=(len(rows) - 0.5, -0.5))
    panels[0].set_yticks(range(len(rows)), [pictures.plain(row) for row in rows], fontsize=7, parse_math=False)
    marks = (("published", "◇"), ("comparison", "□"))
    beside = "".join(f"   {mark} {name}" for name, mark in marks if found[name].notna().any())
    figure.suptitle(pictures.plain(f"{preset.title}   ● ours, with intervals{beside}"), fontsize=9, parse_math=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())
    return True

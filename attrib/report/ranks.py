"""Critical difference diagrams (Demšar, JMLR 2006, figure 1): mean ranks, and bars over those too close to tell."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from attrib.drawing import pictures
from attrib.report.curves import Style
from attrib.results import formats

ROW = 0.22  # inches for each name


@dataclass(frozen=True)
class Diagram:
    """The ranks under one column of a metric."""

    title: str
    image: str
    about: str


def diagrams(table: pd.DataFrame, styles: Mapping[str, Style]) -> list[Diagram]:
    """One per column, of what ``tables.ranks`` found for one dataset and model; only of three methods or more."""
    found = []
    for (metric, column), rows in table.groupby(["metric", "column"], sort=False, observed=True):
        rows = rows[rows["rank"].notna()]
        if len(rows) < 3:
            continue
        first = rows.iloc[0]
        about = (
            f"n = {first['n']}, Friedman's p {formats.p_text(first['p'])}, "
            f"critical difference {first['critical_difference']:.2f}"
        )
        title = column if column == metric else f"{column} · {metric}"
        found.append(Diagram(title, _drawn(rows, styles), about))
    return found


def groups(letters: Sequence[str]) -> list[list[int]]:
    """The positions that share a letter, of each letter that two or more have."""
    each = [re.findall(r"\(\d+\)|.", text) for text in letters]
    names = dict.fromkeys(name for own in each for name in own)
    sharing = [[i for i, own in enumerate(each) if name in own] for name in names]
    return [positions for positions in sharing if len(positions) > 1]


def _drawn(rows: pd.DataFrame, styles: Mapping[str, Style]) -> str:
    """Names of the better half on the left, of the others on the right, as in the paper. Rank 1 is on the left."""
    names, ranks = list(rows["contender"]), rows["rank"].to_numpy()
    bars = groups(list(rows["group"]))
    k, half = len(names), (len(names) + 1) // 2
    top, step = 0.3 * len(bars) + 0.6, 1.0
    figure = Figure(figsize=(7.6, 0.5 + ROW * (half + top)), layout="constrained")
    axes = figure.add_subplot()
    span = k - 1
    axes.set(xlim=(1 - 0.62 * span, k + 0.62 * span), ylim=(-(top + half * step), 1.4))
    axes.axis("off")
    axes.plot([1, k], [0, 0], color=pictures.GREY, linewidth=1.2)
    for tick in range(1, k + 1, max(1, round(span / 10))):
        axes.plot([tick, tick], [0, 0.25], color=pictures.GREY, linewidth=1)
        axes.text(tick, 0.4, str(tick), ha="center", color=pictures.GREY, fontsize=8)
    for i, (name, rank) in enumerate(zip(names, ranks)):
        left, style = i < half, styles[name]
        y = -(top + (i if left else k - 1 - i) * step)
        x = 1 - 0.06 * span if left else k + 0.06 * span
        dashes = "--" if style.dashed else "-"
        axes.plot([rank, rank, x], [0, y, y], color=style.colour, linewidth=1.2, linestyle=dashes)
        text = f"{pictures.plain(name)}  {rank:.2f}" if left else f"{rank:.2f}  {pictures.plain(name)}"
        at, side = x + (-0.01 if left else 0.01) * span, "right" if left else "left"
        axes.text(at, y, text, color=pictures.GREY, fontsize=8.5, ha=side, va="center", parse_math=False)
    for depth, positions in enumerate(bars):
        y = -0.35 - 0.3 * depth
        ends = ranks[positions].min() - 0.01 * span, ranks[positions].max() + 0.01 * span
        axes.plot(ends, [y, y], color=pictures.GREY, linewidth=3.2, solid_capstyle="butt")
    return pictures.svg_uri(figure)

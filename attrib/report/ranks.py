"""Critical difference diagrams (Demšar, JMLR 2006, figure 1): mean ranks, and bars over those too close to tell."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from attrib.drawing import pictures
from attrib.report.curves import Style
from attrib.results import formats

# Inches: of the axis, of what is above it, between names and axis; of a line of a name, and between two names.
AXIS, ABOVE, BESIDE, LINE, GAP = 3.6, 0.27, 0.62, 0.15, 0.07
SIZE = 8.5  # of letters
LONGEST = 42  # letters of a name in a line


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
        title = formats.column_title(column, metric)
        found.append(Diagram(title, pictures.svg_uri(figure(rows, styles)), about))
    return found


def groups(letters: Sequence[str]) -> list[list[int]]:
    """The positions that share a letter, of each letter that two or more have."""
    each = [re.findall(r"\(\d+\)|.", text) for text in letters]
    names = dict.fromkeys(name for own in each for name in own)
    sharing = [[i for i, own in enumerate(each) if name in own] for name in names]
    return [positions for positions in sharing if len(positions) > 1]


def figure(rows: pd.DataFrame, styles: Mapping[str, Style]) -> Figure:
    """Names of the better half on the left, of the others on the right, as in the paper. Rank 1 is on the left.

    All is placed in inches: the picture is as wide as its names, which a layout that fits them into a given width would
    let push the axis away.
    """
    names, ranks = [_wrapped(pictures.plain(name)) for name in rows["contender"]], rows["rank"].to_numpy()
    bars, k = groups(list(rows["group"])), len(rows)
    better, worse = range((k + 1) // 2), range(k - 1, (k + 1) // 2 - 1, -1)  # from the top down
    wide = [max(map(_width, (line for i in side for line in names[i])), default=0.0) for side in (better, worse)]
    under = 0.15 + 0.066 * len(bars)  # the axis
    tall = max(sum(len(names[i]) * LINE + GAP for i in side) for side in (better, worse))
    width, height = wide[0] + AXIS + wide[1] + 2 * BESIDE, ABOVE + under + tall + 0.05
    drawn = Figure(figsize=(width, height))
    axes = drawn.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(ABOVE - height, ABOVE))
    axes.axis("off")
    start = wide[0] + BESIDE

    def at(rank: float) -> float:
        return start + AXIS * (rank - 1) / max(k - 1, 1)

    axes.plot([at(1), at(k)], [0, 0], color=pictures.GREY, linewidth=1.2)
    for tick in range(1, k + 1, max(1, round((k - 1) / 10))):
        axes.plot([at(tick), at(tick)], [0, 0.05], color=pictures.GREY, linewidth=1)
        axes.text(at(tick), 0.09, str(tick), ha="center", color=pictures.GREY, fontsize=8)
    for side, sign, end in ((better, -1, at(1) - 0.12), (worse, 1, at(k) + 0.12)):
        y = -under
        for i in side:
            y -= (len(names[i]) * LINE + GAP) / 2
            style = styles[rows["contender"].iloc[i]]
            how: dict[str, Any] = {"color": style.colour, "linewidth": 1.2, "linestyle": "--" if style.dashed else "-"}
            axes.plot([at(ranks[i]), at(ranks[i]), end], [0, y, y], **how)
            words: dict[str, Any] = {"color": pictures.GREY, "ha": "right" if sign < 0 else "left", "va": "center"}
            axes.text(end + sign * 0.04, y, f"{ranks[i]:.2f}", fontsize=SIZE, **words)
            for place, line in enumerate(names[i]):
                above = ((len(names[i]) - 1) / 2 - place) * LINE
                axes.text(end + sign * 0.45, y + above, line, fontsize=SIZE, parse_math=False, **words)
            y -= (len(names[i]) * LINE + GAP) / 2
    for depth, positions in enumerate(bars):
        y = -0.077 - 0.066 * depth
        ends = at(ranks[positions].min()) - 0.03, at(ranks[positions].max()) + 0.03
        axes.plot(ends, [y, y], color=pictures.GREY, linewidth=3.2, solid_capstyle="butt")
    return drawn


def _wrapped(name: str) -> list[str]:
    """A name in lines of much the same length, broken behind what separates its parts where that can be."""
    count = -(-len(name) // LONGEST)
    for most in range(-(-len(name) // max(count, 1)), LONGEST + 1):
        lines = [""]
        for part in re.findall(r"[^ ,=_./+-]*[ ,=_./+-]+|[^ ,=_./+-]+", name):
            for piece in [part[i : i + most] for i in range(0, len(part), most)]:
                if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > most:
                    lines.append("")
                lines[-1] += piece
        if len(lines) <= count:
            break
    return [line.strip() for line in lines]


def _width(text: str) -> float:
    """In inches; a little more, as whoever draws may round each letter to pixels."""
    from matplotlib.textpath import TextPath

    return 1.03 * float(TextPath((0, 0), text, size=SIZE).get_extents().width) / 72 if text else 0.0

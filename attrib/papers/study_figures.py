"""The pictures of a study: agreement of metrics, price against quality, dependence on the weights. PNG as bytes."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from attrib.drawing import pictures

BLUE, RED = "#1f5fa8", "#c0392b"
RANKS = ("spearman", "spearman_abs")


def squares(block: pd.DataFrame) -> bytes:
    """Columns against columns from ``results.agreement``: colour and number are the rank correlation."""
    names = list(dict.fromkeys([*block["a"], *block["b"]]))
    rho = np.full((len(names), len(names)), np.nan)
    for row in block.to_dict("records"):
        i, j = names.index(row["b"]), names.index(row["a"])
        rho[max(i, j), min(i, j)] = row["rho"]
    side = 1.6 + 0.42 * len(names)
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(rho, cmap="RdBu", vmin=-1, vmax=1)
    for i, j in zip(*np.nonzero(np.isfinite(rho))):
        axes.text(
            j,
            i,
            f"{rho[i, j]:.2f}",
            ha="center",
            va="center",
            fontsize=6,
            color="white" if abs(rho[i, j]) > 0.6 else "black",
        )
    ticks = [pictures.plain(name) for name in names]
    axes.set_xticks(range(len(names)), ticks, rotation=60, ha="right", fontsize=7, parse_math=False)
    axes.set_yticks(range(len(names)), ticks, fontsize=7, parse_math=False)
    axes.spines[:].set_visible(False)
    return _png(figure)


def front(summary: pd.DataFrame) -> pd.DataFrame:
    """Rows of one column of ``tables.summary`` with ``front``: no method that is at least as good takes less time."""
    sign = np.where(summary["direction"] == "↓", -1.0, 1.0)
    good, seconds = summary["mean"].to_numpy() * sign, summary["seconds"].to_numpy()
    known = np.isfinite(good) & np.isfinite(seconds)
    beaten = [
        bool((known & (seconds <= s) & (good >= g) & ((seconds < s) | (good > g))).any()) for g, s in zip(good, seconds)
    ]
    return summary.assign(front=known & ~np.array(beaten, dtype=bool))


def costs(found: pd.DataFrame, column: str) -> bytes:
    """Seconds of a map against what a column says of it; the methods of the front are named in bold and joined."""
    known = found[found["mean"].notna() & found["seconds"].notna()]
    figure = Figure(figsize=(7.2, max(4.6, 0.17 * len(known))), layout="constrained")
    axes = figure.subplots()
    named: list[tuple[str, float, float, str]] = []
    for row in known.to_dict("records"):
        colour = RED if row["front"] else BLUE
        ends = [[max(0.0, row["mean"] - row["lo"])], [max(0.0, row["hi"] - row["mean"])]]
        x = max(row["seconds"], 1e-5)
        axes.errorbar(
            x,
            row["mean"],
            yerr=np.nan_to_num(ends),
            fmt="o",
            color=colour,
            ecolor=(*to_rgb(colour), 0.4),
            markersize=4,
            capsize=1.5,
            linewidth=0.7,
        )
        named.append((pictures.plain(row["contender"]), x, row["mean"], colour))
    best = known[known["front"]].sort_values("seconds")
    axes.step(best["seconds"].clip(lower=1e-5), best["mean"], where="post", color=RED, linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("seconds per map", fontsize=8)
    axes.set_ylabel(pictures.plain(column), fontsize=8, parse_math=False)
    axes.tick_params(labelsize=7)
    axes.grid(linewidth=0.3)
    figure.draw_without_rendering()  # else places are not known yet
    _label(axes, named)
    return _png(figure)


def _label(axes: Axes, points: list[tuple[str, float, float, str]]) -> None:
    """Names beside points (name, x, y, colour), where there is still room: of places near by the first that is free."""
    inside = axes.get_window_extent()
    taken = [
        Bbox.from_bounds(u - 4, v - 4, 8, 8) for _, x, y, _ in points for u, v in axes.transData.transform([(x, y)])
    ]
    places = [(side, above) for above in (3, -9, 11, -17, 19, -25) for side in ("left", "right")]
    for name, x, y, colour in points:
        text = axes.annotate(
            name,
            (x, y),
            textcoords="offset points",
            fontsize=6,
            color=colour,
            parse_math=False,
            xytext=(4, 3),
            path_effects=[withStroke(linewidth=1.5, foreground="white")],
        )
        text.set_in_layout(False)
        for side, above in places:
            text.set(horizontalalignment=side, position=(4 if side == "left" else -4, above))
            box = text.get_window_extent()
            if inside.x0 <= box.x0 and box.x1 <= inside.x1 and not any(map(box.overlaps, taken)):
                break
        else:  # as crowded as this it cannot be read anyway
            text.set(horizontalalignment="left", position=(4, 3))
        taken.append(text.get_window_extent())


def reach(part: pd.DataFrame) -> str:
    """What the layer of a row says: how far the new weights reach, or which layer alone has them."""
    return "down to" if part["mode"].iloc[0] == "cascade" else "only"


def weights(part: pd.DataFrame) -> bytes:
    """Rank correlation with the trained net's maps, a line per method, a panel per number of random layers."""
    known = part[part["column"].isin(RANKS) & part["mean"].notna()]
    places = list(dict.fromkeys(known[["place", "layer"]].sort_values("place").itertuples(index=False, name=None)))
    contenders = list(dict.fromkeys(known["contender"]))
    figure = Figure(figsize=(2.4 + 1.9 * max(1, len(places)), 1.0 + 0.2 * len(contenders)), layout="constrained")
    panels = figure.subplots(1, max(1, len(places)), squeeze=False, sharey=True)[0]
    for axes, (place, layer) in zip(panels, places):
        for column, colour, shift in (("spearman", BLUE, -0.12), ("spearman_abs", RED, 0.12)):
            rows = known[(known["place"] == place) & (known["layer"] == layer) & (known["column"] == column)]
            y = [contenders.index(name) + shift for name in rows["contender"]]
            ends = np.nan_to_num(np.stack((rows["mean"] - rows["lo"], rows["hi"] - rows["mean"]))).clip(min=0)
            axes.errorbar(rows["mean"], y, xerr=ends, fmt="o", color=colour, markersize=3, linewidth=0.8)
        axes.axvline(0, color=pictures.GREY, linewidth=0.6)
        axes.set_xlim(-1.05, 1.05)
        axes.set_title(pictures.plain(f"{reach(part)} {layer}"), fontsize=7, parse_math=False)
        axes.tick_params(labelsize=6)
        axes.grid(axis="x", linewidth=0.3)
    panels[0].set(ylim=(len(contenders) - 0.5, -0.5))
    panels[0].set_yticks(range(len(contenders)), [pictures.plain(n) for n in contenders], fontsize=6, parse_math=False)
    figure.suptitle("rank correlation with the trained net's map: values (blue), magnitudes (red)", fontsize=7)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()

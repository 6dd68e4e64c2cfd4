"""Pictures of causal graphs and of their stability, as matplotlib figures (no pyplot, no process-wide settings)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from attrib.causal.exchange import HOW, connections
from attrib.causal.graph import ClassGraph
from attrib.causal.structure import INPUT, OUTPUT, Structure
from attrib.drawing.pictures import COLOURS

MOST_EDGES = 3000  # drawn, the strongest first
MOST_DOTS = 256  # channels of a layer that are drawn beside its nodes


def draw(structure: Structure, graph: ClassGraph, name: str = "") -> Figure:
    """The layers from the input (left) to the logit (right); a node's height is the number of its channel.

    Grey dots are channels that are not nodes. The more the logit falls when a cause is cut off, the darker its edges.
    """
    edges = list(connections(structure, graph))
    used = {edge.source for edge in edges} | {edge.layer for edge in edges}
    inner = [path for path in structure.paths if path in used]
    others = sorted(path for path in used if path not in inner and path not in (INPUT, OUTPUT))
    columns = [*others, *([INPUT] if INPUT in used else []), *inner, OUTPUT]
    sizes = {path: structure.outputs(path) for path in inner}
    for path, channel in (origin for layer in inner for unit in structure.layer(layer).units for origin in unit.origin):
        if path not in inner:
            sizes[path] = max(sizes.get(path, 0), channel + 1)
    sizes[OUTPUT] = len(structure.layer(OUTPUT).units)
    place = {path: x for x, path in enumerate(columns)}

    def at(path: str, index: int) -> tuple[float, float]:
        return place[path], -(index + 0.5) / sizes[path]

    def dots(path: str, indices: Iterable[int], size: int, colour: str, layer: int) -> None:
        x, y = np.array([at(path, i) for i in indices]).reshape(-1, 2).T
        axes.scatter(x, y, s=size, color=colour, zorder=layer)

    figure = Figure(figsize=(max(5.0, 1.1 * len(columns) + 1), 6.0), layout="constrained")
    axes = figure.add_subplot()
    shown = sorted(edges, key=lambda e: e.effect if np.isfinite(e.effect) else -np.inf)[:MOST_EDGES]
    effects = np.array([e.effect for e in shown])
    finite = effects[np.isfinite(effects)]
    lowest = -finite.min() if finite.size and finite.min() < 0 else 1.0
    strength = np.clip(np.where(np.isfinite(effects), -effects / lowest, 1.0), 0.0, 1.0)
    crowd = np.clip(200 / max(len(shown), 1), 0.05, 1.0)
    lines = [(at(e.source, e.start), at(e.layer, e.end)) for e in shown]
    colours = [(0.27, 0.47, 0.67, float(crowd * (0.15 + 0.85 * s))) for s in strength]
    axes.add_collection(LineCollection(lines, colors=colours, linewidths=0.6 + 1.2 * strength))
    nodes = {(e.source, e.start) for e in edges} | {(e.layer, e.end) for e in edges}
    for path in columns:
        if sizes[path] <= MOST_DOTS:
            dots(path, range(sizes[path]), 4, "#c8c8c8", 2)
        mine = sorted(i for layer, i in nodes if layer == path)
        dots(path, mine, 16, COLOURS[1], 3)
        how = HOW[graph.layers[path].how] if path in graph.layers else ""
        axes.text(place[path], 0.03, f"{path}\n{len(mine)} / {sizes[path]}", ha="center", va="bottom", fontsize=8,
                  rotation=60 if len(columns) > 8 else 0)  # fmt: skip
        axes.text(place[path], -1.03, how, ha="center", va="top", fontsize=7, color="#808790",
                  rotation=60 if len(columns) > 8 else 0)  # fmt: skip
    title = f"class {graph.target}" + (f" ({name})" if name else "")
    left = f"; {len(shown)} of {len(edges)} edges" if len(shown) < len(edges) else ""
    axes.set_title(f"{title}: {graph.samples} samples, logit {graph.reference[0]:.3g}{left}", fontsize=10, pad=34)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(-1.1, 0.1)
    axes.set_axis_off()
    return figure


def draw_stability(frame: pd.DataFrame) -> Figure:
    """Jaccard index of nodes and of edges over beta, one line per layer, mean over the classes.

    ``frame`` is that of ``stability.soft``. Solid: between the draws at one beta. Dashed: with the graph of hard
    interventions.
    """
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2, sharey=True), ("nodes", "edges"), strict=True):
        for i, (layer, rows) in enumerate(frame.groupby("layer", sort=False)):
            mean = rows.groupby("beta")[[name, f"{name}_reference"]].mean()
            colour = COLOURS[i % len(COLOURS)]
            axes.plot(mean.index, mean[name], color=colour, marker="o", markersize=3, label=str(layer))
            axes.plot(mean.index, mean[f"{name}_reference"], color=colour, linestyle="--", linewidth=1)
        axes.set(xlabel="beta, u ~ U(beta, beta + 0.01)", title=name, ylim=(-0.03, 1.03))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("Jaccard index")
    if frame["layer"].nunique() <= 12:
        figure.axes[1].legend(fontsize=7)
    return figure

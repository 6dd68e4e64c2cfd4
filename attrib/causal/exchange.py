"""Causal graphs as JSON that networkx reads: ``networkx.node_link_graph(json.load(file), edges="edges")``.

A node is an output channel of a weighted layer, ``conv2/12``, a channel of the net's input, ``input/0``, or the logit,
``output/3``. An edge is a weight, or a kernel, of the layer that it leads to. The edges from one cause into one layer
were intervened on together, so they have the same effect. Their ``key`` is the number of that cause among the layer's
candidates: a channel that is one cause by itself and another one together with others, as behind a residual sum, has
an edge for each, so it is a MultiDiGraph.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from attrib.causal.graph import FALLEN_BACK, FIRST, NONE_FOUND, NOT_REACHED, TESTED, ClassGraph
from attrib.causal.structure import OUTPUT, Structure

HOW = {
    NOT_REACHED: "not reached", TESTED: "z test", FALLEN_BACK: "fallback", NONE_FOUND: "none found",
    FIRST: "reads the input",
}  # fmt: skip


class Edge(NamedTuple):
    """From channel ``start`` of the layer ``source`` to channel ``end`` of ``layer``."""

    source: str
    start: int
    layer: str
    end: int
    unit: int  # the candidate of ``layer`` that channel ``start`` is
    effect: float  # mean change of the logit when the candidate's edges are cut; NaN if not tested
    p: float  # of the one-sided test; NaN if not tested


def connections(structure: Structure, graph: ClassGraph) -> Iterator[Edge]:
    """All edges, from the logit down. A candidate that several layers produce together has edges from each of them."""
    for source, start in structure.layer(OUTPUT).units[graph.target].origin:
        yield Edge(source, start, OUTPUT, graph.target, graph.target, math.nan, math.nan)
    for path, found in graph.reached.items():
        call, units = structure.call(path), structure.layer(path).units
        effects = found.effects.nonzero()[:, 0]
        for unit in found.causes.nonzero()[:, 0].tolist():
            ends = call.edges(units[unit].features, effects).effects.tolist()
            for source, start in units[unit].origin:
                for end in ends:
                    yield Edge(source, start, path, end, unit, float(found.effect[unit]), float(found.p[unit]))


def to_json(structure: Structure, graph: ClassGraph, names: dict[int, str] | None = None) -> dict[str, Any]:
    """The graph in networkx's node-link format, for ``json.dumps``; undefined numbers are None.

    names  of the classes, by number
    """
    nodes: dict[str, dict[str, Any]] = {}

    def node(layer: str, index: int) -> str:
        key = f"{layer}/{index}"
        nodes.setdefault(key, {"id": key, "layer": layer, "index": index})
        return key

    links = []
    for edge in connections(structure, graph):
        start, end = node(edge.source, edge.start), node(edge.layer, edge.end)
        about_it = {"effect": _plain(edge.effect), "p": _plain(edge.p)}
        links.append({"source": start, "target": end, "key": edge.unit, **about_it})
    about = {
        "class": graph.target,
        "name": (names or {}).get(graph.target, ""),
        "samples": graph.samples,
        "reference": {"mean": graph.reference[0], "std": graph.reference[1]},
        "layers": [
            {
                "path": path,
                "how": HOW[found.how],
                "u": found.u,
                "nodes": int(found.effects.sum()),
                "causes": int(found.causes.sum()),
                "candidates": len(found.causes),
                "tested": int(torch.isfinite(found.p).sum()),
            }
            for path, found in graph.layers.items()
        ],
    }
    return {"directed": True, "multigraph": True, "graph": about, "nodes": list(nodes.values()), "edges": links}


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None

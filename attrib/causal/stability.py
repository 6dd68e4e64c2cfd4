"""How much a graph depends on the draw of its soft weights, and on its samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import pandas as pd
import torch
from torch import Tensor

from attrib.causal.exchange import connections
from attrib.causal.graph import ClassGraph, Search, find
from attrib.causal.interventions import Sites
from attrib.causal.structure import OUTPUT, Structure
from attrib.noise import Noise


def jaccard(a: frozenset, b: frozenset) -> float:
    """The Jaccard index |a and b| / |a or b|; NaN for two empty sets, whose agreement would mean nothing."""
    return len(a & b) / len(a | b) if a | b else math.nan


def _mean(values: Sequence[float]) -> float:
    """The mean of the values that are not NaN; NaN if there are none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def parts(structure: Structure, graph: ClassGraph) -> dict[str, tuple[frozenset, frozenset]]:
    """Its causes and its edges, for each layer that was searched: sets of candidates and of (candidate, channel)."""
    found: dict[str, set] = {path: set() for path in graph.layers}
    for edge in connections(structure, graph):
        if edge.layer != OUTPUT:
            found[edge.layer].add((edge.unit, edge.end))
    return {
        path: (frozenset(layer.causes.nonzero()[:, 0].tolist()), frozenset(found[path]))
        for path, layer in graph.layers.items()
    }


def compare(structure: Structure, graphs: Sequence[ClassGraph], reference: ClassGraph) -> list[dict[str, object]]:
    """One row per layer: mean Jaccard index of nodes and edges between all pairs of graphs, and with the reference.

    Pairs of empty sets do not count. ``nodes_count`` and ``edges_count`` are the mean numbers of nodes and edges.
    """
    sets, base = [parts(structure, g) for g in graphs], parts(structure, reference)
    rows = []
    for path in base:
        row: dict[str, object] = {"layer": path}
        for k, name in enumerate(("nodes", "edges")):
            pairs = [jaccard(a[path][k], b[path][k]) for a, b in combinations(sets, 2)]
            row[name] = _mean(pairs)
            row[f"{name}_reference"] = _mean([jaccard(s[path][k], base[path][k]) for s in sets])
            row[f"{name}_count"] = sum(len(s[path][k]) for s in sets) / len(sets)
        rows.append(row)
    return rows


def soft(
    sites: Sites, x: Tensor, target: int, search: Search, betas: Sequence[float], repeats: int = 5
) -> pd.DataFrame:
    """Compare graphs by soft interventions, u ~ U(beta, beta + 0.01), with ``repeats`` draws at each beta.

    Columns: class, beta, layer; the Jaccard indices nodes and edges (between the draws), nodes_reference and
    edges_reference (with the graph of hard interventions, u = 0); nodes_count and edges_count.
    """
    hard = find(sites, x, target, replace(search, soft=False))
    rows = []
    for beta in betas:
        drawn = [
            find(sites, x, target, replace(search, soft=True, beta=float(beta), seed=1000 * search.seed + repeat))
            for repeat in range(repeats)
        ]
        rows += [{"class": target, "beta": beta, **row} for row in compare(sites.structure, drawn, hard)]
    return pd.DataFrame(rows)


def bootstrap(sites: Sites, x: Tensor, target: int, search: Search, repeats: int = 10, seed: int = 0) -> pd.DataFrame:
    """Compare graphs over n samples that are drawn from x (n, *input) with replacement; columns as for ``soft``.

    The reference is the graph over all of x.
    """
    whole = find(sites, x, target, search)
    noise = Noise([f"class {target}/bootstrap"], seed)
    drawn = []
    for _ in range(repeats):
        index = noise.integers(len(x), len(x))[0].to(x.device)
        drawn.append(find(sites, torch.index_select(x, 0, index), target, search))
    return pd.DataFrame([{"class": target, **row} for row in compare(sites.structure, drawn, whole)])

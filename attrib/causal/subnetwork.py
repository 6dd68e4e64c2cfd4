"""Does a graph carry its class? The net with the causal paths alone, and without them.

The net itself is not changed: masked copies of its weights are used for one call.

    keep edges     each layer of the graph keeps its edges from causes to effects and its biases, and nothing else
    keep nodes     each layer of the graph reads its causes only, but keeps all its outputs: the logits of the other
                   classes see the same neurons and may win
    remove edges   the edges from causes to effects are removed in all layers of the graph
    remove nodes   no layer of the graph reads its causes

"Keep edges" is what the authors' code does. It leaves the other classes nothing but their biases, so that any path with
a positive sum wins. Therefore compare its accuracy with that of random sub-networks, and look at how many samples of
*other* classes are assigned to this class.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

import pandas as pd
import torch
from torch import Tensor
from torch.func import functional_call

from attrib.causal.graph import FIRST, ClassGraph, GraphLayer, Nodes
from attrib.causal.structure import Structure
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch

Change = Literal["keep edges", "keep nodes", "remove edges", "remove nodes"]
CHANGES: tuple[Change, ...] = get_args(Change)
_Network = tuple[int | str, str, str, int]  # class or "union", change or "none", whole, causal or random, draw
HELD_BYTES = 2**30  # of masked weights that ``effect`` keeps between batches


def masks(structure: Structure, graph: ClassGraph, edges_only: bool) -> dict[str, Tensor]:
    """Which weights of each layer are causal, by path: from causes to effects, or without ``edges_only`` to any output.

    Without the layers that the search did not reach, and without ``edges_only`` without those that read the image.
    """
    found = {}
    for path, part in graph.reached.items():
        if part.how == FIRST and not edges_only:
            continue  # its candidates are the channels of the image
        call, units = structure.call(path), structure.layer(path).units
        chosen = torch.zeros(call.weight.shape, dtype=torch.bool)
        effects = (part.effects if edges_only else torch.ones_like(part.effects)).nonzero()[:, 0]
        for unit in part.causes.nonzero()[:, 0].tolist():
            mine = call.edges(units[unit].features, effects)
            rows, columns = mine.linked.nonzero().T
            chosen[mine.effects[rows], mine.columns[columns]] = True
        found[path] = chosen.to(call.weight.device)
    return found


def weights(structure: Structure, graphs: Sequence[ClassGraph], change: Change) -> dict[str, Tensor]:
    """The masked weights by parameter name; the union of the graphs is kept or removed."""
    union: dict[str, Tensor] = {}
    for graph in graphs:
        for path, mask in masks(structure, graph, change.endswith("edges")).items():
            union[path] = union[path] | mask if path in union else mask
    keep = change.startswith("keep")
    return {
        structure.call(path).parameter: structure.call(path).masked(mask if keep else ~mask)
        for path, mask in union.items()
    }


@torch.no_grad()
def logits(model: Classifier, changed: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """(N, *input) -> (N, K), the logits of the net with these weights instead of its own, for this call only."""
    net = model.graph(x).net
    return model.chunked(lambda rows: functional_call(net, dict(changed), (x[rows],)), len(x))


def random_graph(structure: Structure, graph: ClassGraph, noise: Noise) -> ClassGraph:
    """A graph with as many causes in every layer, drawn at random; the effects follow from them.

    They are drawn from the logit down, among the candidates that have an edge to an effect. ``noise`` is one stream.
    """
    nodes = Nodes(structure, graph.target)
    layers = {}
    for path, found in graph.layers.items():
        effects, causes = nodes.of(path).clone(), found.causes
        if found.how != FIRST and found.causes.any() and effects.any():
            call, units, outputs = structure.call(path), structure.layer(path).units, effects.nonzero()[:, 0]
            able = [i for i, unit in enumerate(units) if len(call.edges(unit.features, outputs).effects)]
            order = noise.permutation(len(able))[0][: int(found.causes.sum())]
            causes = torch.zeros_like(causes)
            causes[torch.tensor(able)[order]] = True
        if effects.any():
            nodes.reach(path, causes)
        layers[path] = GraphLayer(effects, causes & effects.any(), found.effect, found.p, found.how, found.u)
    return graph._replace(layers=layers)


def effect(
    model: Classifier,
    structure: Structure,
    graphs: Mapping[int, ClassGraph],
    data: Iterable[Batch],
    draws: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """How each class's causal sub-network, and ``draws`` random ones of its size, classify test samples.

    One row per class, change and network: causal, random (with its draw), or whole, which is the net itself. The rows
    of class "union" are about the sub-networks of all classes together.

    samples     how many samples the class has; for the union, all classes of ``graphs``
    logit       mean logit of their class
    accuracy    share of them that are assigned to their class
    others      share of the other classes' samples that are assigned to the class; NaN if there are none
    """
    networks: dict[_Network, tuple[list[ClassGraph], Change | None]] = {}
    drawn = {
        target: [random_graph(structure, graph, Noise([f"class {target}/draw {i}"], seed)) for i in range(draws)]
        for target, graph in graphs.items()
    }
    classes_of: dict[int | str, list[int]] = {target: [target] for target in graphs}
    classes_of["union"] = list(graphs)
    for name, classes in classes_of.items():
        networks[name, "none", "whole", 0] = [], None
        for change in CHANGES:
            networks[name, change, "causal", 0] = [graphs[k] for k in classes], change
            for i in range(draws):
                networks[name, change, "random", i] = [drawn[k][i] for k in classes], change
    held: dict[_Network, dict[str, Tensor]] = {}  # as many as fit; the others are made again for every batch
    room = HELD_BYTES
    sums = {key: torch.zeros(4, dtype=torch.float64) for key in networks}  # samples, logit, right, others
    total = 0
    for batch in data:
        total += len(batch)
        whole = model.logits(batch.x)
        known = torch.isin(batch.target, torch.tensor(list(graphs), device=batch.target.device))
        for key, (members, how) in networks.items():
            changed = held.get(key)
            if changed is None:
                changed = weights(structure, members, how) if how else {}
                size = sum(weight.nbytes for weight in changed.values())
                if size <= room:
                    held[key], room = changed, room - size
            found = logits(model, changed, batch.x) if changed else whole
            target = key[0]
            mine = known if isinstance(target, str) else batch.target.eq(target)
            own = found.gather(1, batch.target[:, None])[:, 0].double()
            right = mine & (found.argmax(1) == batch.target)
            wrong = torch.zeros_like(mine) if isinstance(target, str) else ~mine & found.argmax(1).eq(target)
            sums[key] += torch.stack([mine.sum(), own[mine].sum(), right.sum(), wrong.sum()]).double().cpu()
    rows = []
    for (name, change_name, network, draw), counts in sums.items():
        n, logit, correct, given = counts.tolist()
        others = total - n if name != "union" else 0
        row: dict[str, object] = {"class": name, "change": change_name, "network": network, "draw": draw}
        row |= {"samples": int(n), "logit": logit / n if n else math.nan, "accuracy": correct / n if n else math.nan}
        rows.append(row | {"others": given / others if others else math.nan})
    return pd.DataFrame(rows)


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per class, change and network, averaged over draws; "mean" is over the classes with samples."""
    values = ["logit", "accuracy", "others"]
    over = frame.groupby(["class", "change", "network"], sort=False)[values].mean().reset_index()
    classes = over[(over["class"] != "union") & over["accuracy"].notna()]
    mean = classes.groupby(["change", "network"], sort=False)[values].mean().reset_index().assign(**{"class": "mean"})
    return pd.concat([over, mean], ignore_index=True).astype({"class": str})

"""Does a graph carry its class? The net with nothing but the causal paths, and without them.

Nothing is written into the net: the layers' weights are masked copies, handed over for one call.

    keep edges     every layer of the graph has its edges from causes to effects, and its biases, and nothing else
    keep nodes     every layer of the graph reads its causes only, but all its outputs live: the other classes'
                   logits see the same neurons and may win
    remove edges   the edges from causes to effects are gone, in all layers
    remove nodes   no layer of the graph reads its causes

"Keep edges" is how the paper's code does it. It leaves the other classes nothing but their biases, so that any path
with a positive sum wins: compare its accuracy with that of random sub-networks, and look at how often *other*
classes' samples are given this class.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

import pandas as pd
import torch
from torch import Tensor
from torch.func import functional_call

from attrib.causal.graph import FIRST, ClassGraph, Found
from attrib.causal.interventions import edges
from attrib.causal.structure import Nodes, Structure
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch

Change = Literal["keep edges", "keep nodes", "remove edges", "remove nodes"]
CHANGES: tuple[Change, ...] = get_args(Change)
HELD_BYTES = 2**30  # of masked weights that ``effect`` keeps from batch to batch


def masks(structure: Structure, graph: ClassGraph, edges_only: bool) -> dict[str, Tensor]:
    """By path, which weights of each layer in the graph are causal: from causes to effects, or to any output.

    Layers that the search did not reach are left out, and without ``edges_only`` those that read the image.
    """
    found = {}
    for path, part in graph.reached.items():
        if part.how == FIRST and not edges_only:
            continue  # its candidates are the image's channels
        module, layer = structure.module.get_submodule(path), structure.layer(path)
        weight, groups = module.weight, getattr(module, "groups", 1)
        chosen = torch.zeros_like(weight, dtype=torch.bool)
        outputs = part.effects if edges_only else torch.ones_like(part.effects)
        effects = outputs.nonzero()[:, 0].to(weight.device)
        for unit in part.causes.nonzero()[:, 0].tolist():
            start, stop = layer.units[unit]
            mine = edges(module, (start, stop), effects).effects
            if groups > 1:
                start, stop = start % weight.shape[1], (stop - 1) % weight.shape[1] + 1
            chosen[mine, start:stop] = True
        found[path] = chosen
    return found


def weights(structure: Structure, graphs: Sequence[ClassGraph], change: Change) -> dict[str, Tensor]:
    """The masked weights by parameter name; of several graphs their union is kept or removed."""
    union: dict[str, Tensor] = {}
    for graph in graphs:
        for path, mask in masks(structure, graph, change.endswith("edges")).items():
            union[path] = union[path] | mask if path in union else mask
    keep = change.startswith("keep")
    return {
        f"{path}.weight": structure.module.get_submodule(path).weight.detach() * (mask if keep else ~mask)
        for path, mask in union.items()
    }


@torch.no_grad()
def logits(model: Classifier, changed: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """(N, *input) -> (N, K) of the net with these weights in the place of its own, for this call."""
    return model.chunked(lambda rows: functional_call(model.module, dict(changed), (x[rows].clone(),)), len(x))


def random_graph(structure: Structure, graph: ClassGraph, noise: Noise) -> ClassGraph:
    """Random candidates in the place of the causes, as many in every layer; the effects follow from them.

    Drawn among the candidates that have an edge to an effect, from the logit down. ``noise`` is one stream.
    """
    nodes = Nodes(structure, graph.target)
    layers = {}
    for path, found in graph.layers.items():
        effects, causes = nodes.of(path), found.causes
        if found.how != FIRST and found.causes.any() and effects.any():
            layer, module = structure.layer(path), structure.module.get_submodule(path)
            outputs = effects.nonzero()[:, 0].to(module.weight.device)
            able = [i for i, unit in enumerate(layer.units) if len(edges(module, unit, outputs).effects)]
            order = noise.permutation(len(able))[0][: int(found.causes.sum())]
            causes = torch.zeros_like(causes)
            causes[torch.tensor(able)[order.cpu()]] = True
        if effects.any():
            nodes.reach(path, causes)
        layers[path] = Found(effects, causes & effects.any(), found.effect, found.p, found.how, found.u)
    return graph._replace(layers=layers)


def effect(
    model: Classifier,
    structure: Structure,
    graphs: Mapping[int, ClassGraph],
    data: Iterable[Batch],
    draws: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """What each class's causal sub-network, and ``draws`` random ones of its size, make of test samples.

    One row per class, change and network (causal, or random with its draw; "whole" is the net itself), and with
    class "union" for the sub-networks of all classes together:

    samples     of the class; all for the union
    logit       of their class, mean over them
    accuracy    share of them that get their class
    others      share of the other classes' samples that get the class; NaN without any
    """
    networks: dict[tuple[int | str, str, str, int], tuple[list[ClassGraph], Change | None]] = {}
    drawn = {
        target: [random_graph(structure, graph, Noise([f"class {target}/draw {i}"], seed)) for i in range(draws)]
        for target, graph in graphs.items()
    }
    for target in [*graphs, "union"]:
        members = list(graphs) if target == "union" else [target]
        networks[target, "none", "whole", 0] = [], None
        for change in CHANGES:
            networks[target, change, "causal", 0] = [graphs[k] for k in members], change
            for i in range(draws):
                networks[target, change, "random", i] = [drawn[k][i] for k in members], change
    held: dict[tuple[int | str, str, str, int], dict[str, Tensor]] = {}  # as many as fit, the others are made again
    room = HELD_BYTES
    sums = {key: torch.zeros(4, dtype=torch.float64) for key in networks}  # samples, logit, right, wrongly given
    total = 0
    for batch in data:
        total += len(batch)
        whole = model.logits(batch.x)
        known = torch.isin(batch.target, torch.tensor(list(graphs), device=batch.target.device))
        for key, (members, change) in networks.items():
            changed = held.get(key)
            if changed is None:
                changed = weights(structure, members, change) if change else {}
                size = sum(weight.nbytes for weight in changed.values())
                if size <= room:
                    held[key], room = changed, room - size
            found = logits(model, changed, batch.x) if changed else whole
            mine = known if key[0] == "union" else batch.target == key[0]
            own = found.gather(1, batch.target[:, None])[:, 0].double()
            right = mine & (found.argmax(1) == batch.target)
            wrong = ~mine & (found.argmax(1) == key[0]) if key[0] != "union" else torch.zeros_like(mine)
            sums[key] += torch.stack([mine.sum(), own[mine].sum(), right.sum(), wrong.sum()]).double().cpu()
    rows = []
    for (target, change, network, draw), (n, logit, right, wrong) in sums.items():
        n, others = int(n), total - int(n)
        row = {"class": target, "change": change, "network": network, "draw": draw, "samples": n}
        row |= {"logit": float(logit) / n if n else math.nan, "accuracy": float(right) / n if n else math.nan}
        rows.append(row | {"others": float(wrong) / others if others and target != "union" else math.nan})
    return pd.DataFrame(rows)


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """A row per class, change and network, the random ones averaged; "mean" is over the classes with samples."""
    values = ["logit", "accuracy", "others"]
    over = frame.groupby(["class", "change", "network"], sort=False)[values].mean().reset_index()
    classes = over[(over["class"] != "union") & over["accuracy"].notna()]
    mean = classes.groupby(["change", "network"], sort=False)[values].mean().reset_index().assign(**{"class": "mean"})
    return pd.concat([over, mean], ignore_index=True).astype({"class": str})

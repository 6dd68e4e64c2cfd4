"""Maps along a class's causal paths: what the neurons of its causal graph respond to in an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from attrib.causal.graph import CausalGraphs, ClassGraph, GraphLayer, from_state
from attrib.causal.interventions import Sites
from attrib.causal.layers import Weighted, WeightedLayer, on_device
from attrib.causal.rules import bound
from attrib.causal.structure import OUTPUT, Structure
from attrib.causal.subnetwork import Change, logits, masks, random_graph, weights
from attrib.checks import require
from attrib.fit import State
from attrib.methods import Method
from attrib.models import Classifier
from attrib.models.calls import call as called
from attrib.noise import Noise
from attrib.types import Batch, SampleError, UserError


def graphs_of(batch: Batch, structure: Structure, state: State) -> list[ClassGraph]:
    """The graph of each sample's class. Raises SampleError for a class that has none."""
    if batch.target.ndim != 1:
        raise SampleError("causal paths need samples with one class each")
    known, found = from_state(structure, state), []
    classes = len(structure.layer(OUTPUT).units)
    for uid, target in zip(batch.uids, batch.target.tolist(), strict=True):
        if target >= classes:
            raise UserError(f"{uid}: class {target} does not exist, the net has {classes} classes")
        if target not in known:
            raise SampleError(
                f"{uid}: no causal graph of class {target}, only of {', '.join(map(str, known))}; the estimation "
                "set needs two samples of it that the net classifies correctly"
            )
        found.append(known[target])
    return found


class _Node(NamedTuple):
    """A node of a layer, and the features that its causes are; their numbers are on the model's device."""

    number: int
    features: Tensor  # (F,) int64
    weight: Tensor  # (F, *kernel)
    causes: int
    cause: Tensor  # (F,) int64: the cause that each feature belongs to, 0 .. causes - 1


@dataclass(frozen=True)
class _Reading:
    """A layer, the features of an image that it reads, and how it weighs them."""

    call: Weighted
    layer: WeightedLayer
    as_released: bool

    def _without_places(self) -> UserError:
        return UserError(
            f"layer {self.layer.path} reads no image features: a map needs a convolution, a linear layer that sees "
            "places or tokens, or the one behind them"
        )

    def features(self, x: Tensor) -> Tensor:
        """What the layer reads of B samples as (B, channels, h, w); (B, features) where it is flattened.

        Raises UserError if it has no places in an image.
        """
        if self.call.weight.ndim == 4:
            return x
        if self.call.weight.ndim == 2 and x.ndim == 4:
            return x.movedim(-1, 1)
        if self.call.weight.ndim == 2 and x.ndim == 2 and len(self.layer.places) == 2:
            return x
        raise self._without_places()

    def nodes(self, found: GraphLayer) -> list[_Node]:
        """The nodes of the layer, by number."""
        causes = [self.layer.units[c].features for c in found.causes.nonzero()[:, 0].tolist()]
        if not causes:
            return []
        owner = torch.cat([torch.full_like(mine, i) for i, mine in enumerate(causes)])
        edges = self.call.edges(torch.cat(causes), found.effects.nonzero()[:, 0])
        kinds = [owner[linked].unique(return_inverse=True) for linked in edges.linked]
        inverse = [which for _, which in kinds]
        moved = torch.cat(inverse).to(self.call.weight.device).split([len(which) for which in inverse])
        zeroed = self.layer.units[0].features.to(self.call.weight.device)

        def weight(features: Tensor, weight: Tensor) -> Tensor:
            if not self.as_released:
                return weight
            return weight.masked_fill(torch.isin(features, zeroed).view(-1, *[1] * (weight.ndim - 1)), 0)

        return [
            _Node(number, one.features, weight(one.features, one.weight[0]), len(of), cause)
            for number, one, (of, _), cause in zip(
                edges.effects.tolist(), on_device([*edges.each()]), kinds, moved, strict=True
            )
        ]

    def response(self, features: Tensor, node: _Node) -> Tensor:
        """The map of a node, (h', w'), which is >= 0 and sums to 1.

        features   (channels, h, w) of one sample, or (features,)

        The channels of each cause are cross-correlated with their kernels, at all places that the kernels touch, or
        multiplied place by place with the weights of a linear layer, and added up. Then softmax over the places, and
        the mean over the causes.
        """
        x, w = features[node.features], node.weight
        if features.ndim == 1:
            v = (x * w).reshape(-1, *self.layer.places)
        else:
            slid = x * w[:, None, None] if w.ndim == 1 else self._slid(x, w)
            v = slid.new_zeros(node.causes, *slid.shape[1:]).index_add_(0, node.cause, slid)
        return v.flatten(1).softmax(1).mean(0).reshape(v.shape[1:])

    def _slid(self, x: Tensor, w: Tensor) -> Tensor:
        """Channels (C, h, w) and a kernel for each (C, kh, kw) -> (C, h', w'), all places that the kernels touch."""
        if self.as_released:
            w = w.flip(1, 2)
        dilation = bound(self.call.node)["dilation"]
        reach = [d * (k - 1) for d, k in zip(dilation, w.shape[1:], strict=True)]
        return F.conv2d(x[None], w[:, None], padding=reach, dilation=dilation, groups=len(w))[0]


@dataclass(frozen=True)
class CausalPaths(Method):
    """What the nodes of a class's causal graph respond to at one layer (Interventional-Explanations).

    layer         role of the layer: a convolution, the first linear layer, or a module that contains such layers,
                  of which the last is taken
    nodes         how many maps of single nodes to give beside the mean of all, beginning with the node whose
                  removal lowers the logit most
    as_released   as in the authors' code: takes the raw output of the convolution before instead of what the layer
                  reads, flips the kernels, and lets cause 0 count as a uniform map. (Their search intervenes on cause
                  0 first, in place, and so has zeroed its weights when the maps read them.)
    draws         if not 0, also reports how the class's sub-network classifies each sample, compared with the mean
                  of so many random sub-networks of its size (``attrib.causal.subnetwork``), as numbers for tables
    graph         the causal graphs, which are fitted first

    Raises SampleError for a sample whose class has no graph, or a graph that does not reach down to the layer.
    """

    NAME: ClassVar[str] = "attrib.methods.causal.CausalPaths"
    VERSION: ClassVar[int] = 2
    NEEDS_PROBABILITIES: ClassVar[bool] = True
    layer: str = "bottleneck"
    nodes: int = 0
    as_released: bool = False
    draws: int = 0
    graph: CausalGraphs = field(default_factory=CausalGraphs)

    def __post_init__(self) -> None:
        require(self, "nodes", "draws", at_least=0)

    @property
    def MAPS(self) -> Mapping[str, str]:  # noqa: N802
        maps = {"map": "mean response of the layer's causal nodes, each of sum 1 over the layer's places; >= 0"}
        for i in range(1, self.nodes + 1):
            maps[f"node_{i}"] = (
                f"response of node {i} by its effect, or of the last one of a class that has fewer; >= 0"
            )
        return maps

    @property
    def EXTRAS(self) -> Mapping[str, str]:  # noqa: N802
        about = {"logit": "the class's logit", "right": "1 if the class has the largest logit, else 0"}
        nets = {"kept": "with the causal nodes only", "removed": "without the causal nodes"}
        nets |= {f"random_{name}": f"{text}, of random graphs" for name, text in nets.items()}
        effects = {f"{net}_{k}": f"{what}, {text}" for net, text in nets.items() for k, what in about.items()}
        return {"places": "the map at the layer's resolution, (h', w')", **(effects if self.draws else {})}

    @property
    def COLUMNS(self) -> Mapping[str, str]:  # noqa: N802
        better = {"kept": "higher", "removed": "lower"}
        return {name: better.get(name.partition("_")[0], "none") for name in self.EXTRAS if name != "places"}

    @property
    def roles(self) -> tuple[str, ...]:
        return (self.layer,)

    @property
    def fit(self) -> CausalGraphs:
        return self.graph

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        structure = Structure.of(model, batch.x)
        graphs = graphs_of(batch, structure, state)
        path = structure.at(model.path(self.layer))
        call, layer = structure.call(path), structure.layer(path)
        reading = _Reading(call, layer, self.as_released)
        sites = Sites(model, structure)
        if self.as_released:
            features = sites.at(self._before(structure, layer), batch.x).output
        else:
            features = reading.features(sites.at(path, batch.x).features)
        rows, each = [], {graph.target: graph for graph in graphs}
        nodes = {target: self._nodes(reading, structure, graph) for target, graph in each.items()}
        for uid, graph, mine in zip(batch.uids, graphs, features, strict=True):
            if not nodes[graph.target]:
                raise SampleError(f"{uid}: the causal graph of class {graph.target} has no paths at layer {path}")
            ordered = torch.stack([reading.response(mine, node) for node in nodes[graph.target]])
            single = [ordered[min(i, len(ordered) - 1)] for i in range(self.nodes)]
            rows.append(torch.stack([ordered.mean(0), *single]))
        small = torch.stack(rows)
        large = F.interpolate(small, batch.x.shape[-2:], mode="bilinear", align_corners=False)
        named = {name: large[:, i] for i, name in enumerate(self.MAPS)}
        return {"places": small[:, 0], **named, **self._effects(model, structure, graphs, batch)}

    @staticmethod
    def _nodes(reading: _Reading, structure: Structure, graph: ClassGraph) -> list[_Node]:
        """The nodes of a class at the layer, beginning with the one whose removal lowers the logit most."""
        path = reading.layer.path
        nodes = reading.nodes(graph.layers[path]) if path in graph.layers else []
        order = _strength(structure, graph, path)[[node.number for node in nodes]].argsort(stable=True)
        return [nodes[i] for i in order.tolist()]

    @staticmethod
    def _before(structure: Structure, layer: WeightedLayer) -> str:
        """The convolution whose channels, one by one, are all that the layer reads."""
        if len(layer.sources) == 1 and layer.sources[0] in structure.paths:
            before = structure.call(layer.sources[0])
            channels = tuple(((before.path, j),) for j in range(len(before.weight)))
            single = all(len(unit.features) == 1 for unit in layer.units)
            if single and before.weight.ndim == 4 and channels == tuple(unit.origin for unit in layer.units):
                return before.path
        raise UserError(f"as_released: {layer.path} does not read just one convolution; take another layer")

    def _effects(
        self, model: Classifier, structure: Structure, graphs: Sequence[ClassGraph], batch: Batch
    ) -> dict[str, Tensor]:
        """Every name in COLUMNS -> (B,)."""
        found = {name: torch.zeros_like(batch.x[:, 0, 0, 0]) for name in self.COLUMNS}
        changes: tuple[tuple[str, Change], ...] = (("kept", "keep nodes"), ("removed", "remove nodes"))
        for graph in {graph.target: graph for graph in graphs}.values() if self.draws else ():
            mine = (batch.target == graph.target).nonzero()[:, 0]
            streams = (Noise([f"class {graph.target}/draw {i}"]) for i in range(self.draws))
            drawn = [random_graph(structure, graph, stream) for stream in streams]
            for name, change in changes:
                for net, each in ((name, [graph]), (f"random_{name}", drawn)):
                    for one in each:
                        y = logits(model, weights(structure, [one], change), batch.x[mine])
                        found[f"{net}_logit"][mine] += y[:, graph.target] / len(each)
                        found[f"{net}_right"][mine] += (y.argmax(1) == graph.target).to(y) / len(each)
        return found


def _strength(structure: Structure, graph: ClassGraph, path: str) -> Tensor:
    """(out,) for each node of the layer its largest effect: the lowest mean change of the logit when a layer above
    loses the node; NaN for the logits themselves, which have no layer above."""
    lowest = torch.full((structure.outputs(path),), torch.nan, dtype=torch.float64)
    for above, found in graph.reached.items():
        for unit, effect in zip(structure.layer(above).units, found.effect, strict=True):
            mine = [channel for source, channel in unit.origin if source == path]
            lowest[mine] = torch.fmin(lowest[mine], effect)
    return lowest


@dataclass(frozen=True)
class CausalGradient(Method):
    """The part of the gradient of the class's logit that flows along its causal paths, times the input.

    The forward pass is unchanged; in the backward pass each layer of the graph passes gradients on along the graph's
    edges only. Layers that the search did not reach, or that were excluded from it, pass on everything. With a graph
    that has all edges this is the gradient.

    multiply   whether to multiply by the input; otherwise the gradient alone
    graph      the causal graphs, which are fitted first
    """

    NAME: ClassVar[str] = "attrib.methods.causal.CausalGradient"
    VERSION: ClassVar[int] = 1
    NEEDS_PROBABILITIES: ClassVar[bool] = True
    MAPS: ClassVar[Mapping[str, str]] = {
        "map": "change of the logit per unit of input along causal paths, times the input; signed, summed over channels"
    }

    multiply: bool = True
    graph: CausalGraphs = field(default_factory=CausalGraphs)

    @property
    def fit(self) -> CausalGraphs:
        return self.graph

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        structure = Structure.of(model, batch.x)
        maps = torch.zeros_like(batch.x)
        for target, graph in {graph.target: graph for graph in graphs_of(batch, structure, state)}.items():
            mine = (batch.target == target).nonzero()[:, 0]
            maps[mine] = _gradient(model, structure, graph, batch.x[mine])
        return {"map": (maps * batch.x if self.multiply else maps).sum(1)}


def _gradient(model: Classifier, structure: Structure, graph: ClassGraph, x: Tensor) -> Tensor:
    """(N, *input) the gradient of the logit of the graph's class along the graph's edges."""

    kept = {}
    for path, mask in masks(structure, graph, edges_only=True).items():
        call = structure.call(path)
        kept[call.node] = call, call.weight * mask

    def rule(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        y = called(node)(*args, **kwargs)
        if node not in kept:
            return y
        call, weight = kept[node]
        along = call(call.read(args, kwargs), weight, call.groups)
        return along + (y - along).detach()

    def piece(rows: slice) -> Tensor:
        with torch.enable_grad():
            leaf = x[rows].detach().requires_grad_()
            logit = structure.graph.propagate(leaf, rule)[:, graph.target]
            return torch.autograd.grad(logit.sum(), leaf)[0]

    return model.chunked(piece, len(x))

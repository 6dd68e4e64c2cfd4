"""Maps along a class's causal paths: what the neurons of its causal graph respond to in an image or a text."""

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
from attrib.methods.parts.inputs import EMBEDDING, Inputs, check_per_token
from attrib.models import Classifier
from attrib.models.calls import call as called
from attrib.models.calls import operation
from attrib.models.reading import Name
from attrib.noise import Noise
from attrib.relevance.plan import output_of
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
    """A layer, the features of an image or a text that it reads, and how it weighs them."""

    call: Weighted
    layer: WeightedLayer
    as_released: bool

    def features(self, model: Classifier, batch: Batch) -> list[Tensor]:
        """What the layer reads of each sample: (channels, h, w), (features,) where that is flattened, (channels, T).

        A text has its own T. The class token of an image has no place and is left out. Raises UserError if the layer
        sees neither an image's places nor a text's tokens.
        """
        path, flat = self.layer.path, self.call.weight.ndim == 2
        x = _read(model, path, batch.x)
        if batch.mask is not None:
            if not flat or x.shape[:-1] != batch.mask.shape:
                raise UserError(
                    f"layer {path} does not read a vector of each token: a map of a text needs a linear layer that "
                    "does, such as those of attention and MLP in a transformer; or take method=causal_gradient"
                )
            lengths = batch.mask.sum(1).tolist()  # padding stands on the right
            return [one[:length].T for one, length in zip(x, lengths, strict=True)]
        if self.call.weight.ndim == 4 or (flat and x.ndim == 2 and len(self.layer.places) == 2):
            return list(x)
        if flat and x.ndim in (3, 4):
            # Found out, as a layer over the columns of a map, (N, C, H, W), reads neither channels nor tokens.
            among: tuple[Name, ...] = ("tokens",) if x.ndim == 3 else ("channels_last",)
            original, shape = model.original, tuple(batch.x.shape[1:])
            reading = model.roles.read(f"input of {path}", lambda rows: _read(original, path, rows), shape, among)
            if x.ndim == 4:
                return list(x.movedim(-1, 1))
            return list(x[:, reading.prefix :].mT.unflatten(2, reading.grid))
        raise UserError(
            f"layer {path} reads no image features: a map needs a convolution, a linear layer that sees places or "
            "tokens, or the one behind them"
        )

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
        """The map of a node, (h', w') or (T,), which is >= 0 and sums to 1.

        features   of one sample, see ``features``

        The channels of each cause are cross-correlated with their kernels, at all places that the kernels touch, or
        multiplied place by place with the weights of a linear layer, and added up. Then softmax over the places, and
        the mean over the causes.
        """
        x, w = features[node.features], node.weight
        if features.ndim == 1:
            v = (x * w).reshape(-1, *self.layer.places)
        else:
            slid = x * w.view(-1, *[1] * (x.ndim - 1)) if w.ndim == 1 else self._slid(x, w)
            v = slid.new_zeros(node.causes, *slid.shape[1:]).index_add_(0, node.cause, slid)
        return v.flatten(1).softmax(1).mean(0).reshape(v.shape[1:])

    def _slid(self, x: Tensor, w: Tensor) -> Tensor:
        """Channels (C, h, w) and a kernel for each (C, kh, kw) -> (C, h', w'), all places that the kernels touch.

        Of a transposed convolution, what it gives with these weights.
        """
        if self.as_released:
            w = w.flip(1, 2)
        given = bound(self.call.node)
        dilation = given["dilation"]
        if operation(self.call.node).startswith("conv_transpose"):
            return F.conv_transpose2d(x[None], w[:, None], stride=given["stride"], dilation=dilation, groups=len(w))[0]
        reach = [d * (k - 1) for d, k in zip(dilation, w.shape[1:], strict=True)]
        return F.conv2d(x[None], w[:, None], padding=reach, dilation=dilation, groups=len(w))[0]


def _read(model: Classifier, path: str, x: Tensor) -> Tensor:
    """(N, ...) what a weighted layer reads."""
    return Sites(model, Structure.of(model, x)).at(path, x).features


@dataclass(frozen=True)
class CausalPaths(Method):
    """What the nodes of a class's causal graph respond to at one layer (Interventional-Explanations).

    layer         role of the layer: a convolution, the first linear layer, one that reads an image's or a text's
                  tokens, or a module that contains such layers, of which the last is taken
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
    VERSION: ClassVar[int] = 3  # 2 turned the kernels of transposed convolutions
    NEEDS_PROBABILITIES: ClassVar[bool] = True
    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "text")
    TOKENS: ClassVar[tuple[str, ...]] = ("places",)
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
        places = "the map at the layer's resolution, (h', w'); of a text the map, (T,)"
        return {"places": places, **(effects if self.draws else {})}

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
        path = structure.at(model.roles.path(self.layer))
        graphs = graphs_of(batch, structure, state)
        call, layer = structure.call(path), structure.layer(path)
        reading = _Reading(call, layer, self.as_released)
        if self.as_released:
            before = self._before(structure, layer)
            features = list(Sites(model, structure).at(before, batch.x).output)
        else:
            features = reading.features(model, batch)
        rows, each = [], {graph.target: graph for graph in graphs}
        nodes = {target: self._nodes(reading, structure, graph) for target, graph in each.items()}
        for uid, graph, mine in zip(batch.uids, graphs, features, strict=True):
            if not nodes[graph.target]:
                raise SampleError(f"{uid}: the causal graph of class {graph.target} has no paths at layer {path}")
            ordered = torch.stack([reading.response(mine, node) for node in nodes[graph.target]])
            single = [ordered[min(i, len(ordered) - 1)] for i in range(self.nodes)]
            rows.append(torch.stack([ordered.mean(0), *single]))
        if batch.mask is None:
            small = torch.stack(rows)
            large = F.interpolate(small, batch.x.shape[-2:], mode="bilinear", align_corners=False)
        else:
            small = large = torch.stack([F.pad(row, (0, batch.x.shape[1] - row.shape[1])) for row in rows])
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
        found = {name: torch.zeros(len(batch), dtype=model.dtype, device=batch.x.device) for name in self.COLUMNS}
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
    that has all edges this is the gradient. The input of a text is what the layer with the role "embedding" gives.

    multiply   whether to multiply by the input; otherwise the gradient alone
    graph      the causal graphs, which are fitted first
    """

    NAME: ClassVar[str] = "attrib.methods.causal.CausalGradient"
    VERSION: ClassVar[int] = 1
    NEEDS_PROBABILITIES: ClassVar[bool] = True
    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "text")
    TEXT_ROLES: ClassVar[tuple[str, ...]] = (EMBEDDING,)
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
        net, text = structure.graph, batch.mask is not None
        start = output_of(net, model.roles.path(EMBEDDING)) if text else net.input
        maps = torch.zeros(len(batch), *batch.x.shape[1 if text else 2 :], dtype=model.dtype, device=batch.x.device)
        for target, graph in {graph.target: graph for graph in graphs_of(batch, structure, state)}.items():
            mine = (batch.target == target).nonzero()[:, 0]
            value, gradient = _gradient(model, structure, graph, batch.x[mine], start)
            if text:
                check_per_token(model, value, batch.x[mine])
            inputs = Inputs(value, batch.target[mine], model, mask=None if batch.mask is None else batch.mask[mine])
            found = gradient * value if self.multiply else gradient
            maps[mine] = inputs.reduce(found, "sum", "Set method.multiply=true")
        return {"map": maps}


def _gradient(
    model: Classifier, structure: Structure, graph: ClassGraph, x: Tensor, start: fx.Node
) -> tuple[Tensor, Tensor]:
    """(N, *start) what a node gives, and the gradient there of the logit of the graph's class along its edges."""
    kept = {}
    for path, mask in masks(structure, graph, edges_only=True).items():
        call = structure.call(path)
        kept[call.node] = call, call.weight * mask

    def piece(rows: slice) -> tuple[Tensor, Tensor]:
        leaves: list[Tensor] = []

        def at_start(value: Tensor) -> Tensor:
            leaves.append(value.detach().requires_grad_())
            return leaves[0]

        def rule(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            y = called(node)(*args, **kwargs)
            if node in kept:
                call, weight = kept[node]
                along = call(call.read(args, kwargs), weight, call.groups)
                y = along + (y - along).detach()
            return at_start(y) if node is start else y

        with torch.enable_grad():
            given = at_start(x[rows]) if start is structure.graph.input else x[rows]
            logit = structure.graph.propagate(given, rule)[:, graph.target]
            return leaves[0].detach(), torch.autograd.grad(logit.sum(), leaves[0])[0]

    return model.chunked(piece, len(x))

"""Maps of a class's causal paths: what the neurons of its graph respond to in an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrib.causal.graph import CausalGraphs, ClassGraph, GraphLayer, from_state
from attrib.causal.interventions import edges, reweighted
from attrib.causal.structure import INPUT, OUTPUT, Structure
from attrib.causal.subnetwork import logits, random_graph, weights
from attrib.fit import State
from attrib.methods import Method
from attrib.models import Classifier
from attrib.models.split import hooked
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


@torch.no_grad()
def _recorded(model: Classifier, paths: tuple[str, ...], x: Tensor) -> tuple[Tensor, ...]:
    """(N, *input) -> what the first of these layers reads, and what the others give."""

    def piece(rows: slice) -> tuple[Tensor, ...]:
        found: dict[str, Tensor] = {}

        def read(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            found[paths[0]] = inputs[0].clone()

        def gives(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found[paths[1]] = output.clone()

        with ExitStack() as stack:
            for path, hook in zip(paths, (read, gives), strict=False):
                stack.enter_context(hooked(model.module.get_submodule(path), hook))
            model.module(x[rows].clone())
        return tuple(found[path] for path in paths)

    return model.chunked(piece, len(x))


@dataclass(frozen=True)
class _Reading:
    """A weighted layer, the image features that it reads, and how it weighs them."""

    structure: Structure
    path: str
    as_released: bool

    def features(self, x: Tensor) -> Tensor:
        """What it reads (B, *in) as (B, units, h, w). Raises UserError for a layer without places."""
        module, layer = self.structure.module_of(self.path), self.structure.layer(self.path)
        if isinstance(module, nn.Conv2d):
            return x
        if isinstance(module, nn.Linear) and x.ndim == 4:
            return x.movedim(-1, 1)
        places = {source.places for source in layer.sources}
        if isinstance(module, nn.Linear) and x.ndim == 2 and len(places) == 1 and len(*places) == 2:
            return x.unflatten(1, (len(layer.units), *next(iter(places))))
        raise UserError(
            f"layer {self.path} reads no image features: a map needs a convolution, or the first linear layer"
        )

    def responses(self, features: Tensor, found: GraphLayer) -> list[tuple[int, Tensor]]:
        """Each node of the layer with its map (h', w') >= 0 of sum 1, for one sample's features (units, h, w).

        Every cause's kernel is slid over its channel (a full cross-correlation, as the layer itself weighs them);
        softmax over the places, then the mean over the causes. A linear layer weighs each place by its weight.
        """
        module, layer = self.structure.module_of(self.path), self.structure.layer(self.path)
        nodes, causes = (part.nonzero()[:, 0].to(features.device) for part in (found.effects, found.causes))
        reached = [edges(module, layer.units[c], nodes) for c in causes.tolist()]
        if not reached:
            return []
        weight = module.weight.new_zeros(len(causes), len(nodes), *reached[0].weight.shape[1:])
        linked = torch.zeros(weight.shape[:2], dtype=torch.bool, device=features.device)
        for row, edge in enumerate(reached):
            at = torch.searchsorted(nodes, edge.effects)
            weight[row, at], linked[row, at] = edge.weight, True
        maps = []
        for j, node in enumerate(nodes.tolist()):
            of = linked[:, j]
            if not of.any():
                continue  # of a grouped convolution: no cause in its group
            x, w = features[causes[of]], weight[of, j]
            if isinstance(module, nn.Linear):
                v = x * w.reshape(len(w), *(x.shape[1:] if w.shape[1] > 1 else (1, 1)))
            else:
                v = self._slid(x, w.squeeze(1), module)
            maps.append((node, v.flatten(1).softmax(1).mean(0).reshape(v.shape[1:])))
        return maps

    def _slid(self, x: Tensor, w: Tensor, module: nn.Module) -> Tensor:
        """(C, h, w) and a kernel for each -> (C, h', w'), wherever a kernel touches the channel."""
        if self.as_released:
            w = w.flip(1, 2)
        reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return F.conv2d(x[None], w[:, None], padding=reach, dilation=module.dilation, groups=len(w))[0]


@dataclass(frozen=True)
class CausalPaths(Method):
    """What the nodes of a class's causal graph see at one layer, over its causes (Interventional-Explanations).

    layer         role of the layer: a convolution, the first linear layer, or a module whose output the last
                  weighted layer in it makes
    nodes         so many maps of single nodes beside their mean, the one whose loss lowers the logit most first
    as_released   as in the authors' code, which takes the raw output of the convolution before instead of what the
                  layer reads, and turns the kernels over. (In tests/golden it counts but one of two causes; which
                  ones it leaves out is not known, and all count here.)
    draws         if not 0, what the class's sub-network does to each sample, beside the mean of so many random ones
                  of its size (``attrib.causal.subnetwork``, "nodes"): numbers in the tables
    graph         the graphs that are fitted first

    A sample whose class has no graph, or one that ends above the layer, is a failure of that sample.
    """

    NAME: ClassVar[str] = "attrib.methods.causal.CausalPaths"
    VERSION: ClassVar[int] = 1
    layer: str = "bottleneck"
    nodes: int = 0
    as_released: bool = False
    draws: int = 0
    graph: CausalGraphs = field(default_factory=CausalGraphs)

    def __post_init__(self) -> None:
        for name in ("nodes", "draws"):
            if getattr(self, name) < 0:
                raise UserError(f"CausalPaths.{name} is {getattr(self, name)}, must be at least 0")

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
        about = {"logit": "the class's logit", "right": "1 if the class wins, else 0"}
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
        structure = Structure(model.module, batch.x)
        graphs = graphs_of(batch, structure, state)
        path = structure.at(model.path(self.layer))
        reading, paths = _Reading(structure, path, self.as_released), (path,)
        if self.as_released:
            before = [source.path for source in structure.layer(path).sources]
            if len(before) != 1 or before[0] == INPUT or structure.layer(path).sources[0].span > 1:
                raise UserError(f"as_released: {path} does not read just one convolution; take another layer")
            paths = (path, *before)
        recorded = _recorded(model, paths, batch.x)
        features = recorded[-1] if self.as_released else reading.features(recorded[0])
        rows = []
        for uid, graph, mine in zip(batch.uids, graphs, features, strict=True):
            found = graph.layers.get(path)
            maps = reading.responses(mine, found) if found is not None else []
            if not maps:
                raise SampleError(f"{uid}: the causal graph of class {graph.target} has no paths at layer {path}")
            order = _strength(structure, graph, path)[[node for node, _ in maps]].argsort(stable=True)
            ordered = torch.stack([maps[i][1] for i in order.tolist()])
            single = [ordered[min(i, len(ordered) - 1)] for i in range(self.nodes)]
            rows.append(torch.stack([ordered.mean(0), *single]))
        small = torch.stack(rows)
        large = F.interpolate(small, batch.x.shape[-2:], mode="bilinear", align_corners=False)
        maps = {name: large[:, i] for i, name in enumerate(self.MAPS)}
        return {"places": small[:, 0], **maps, **self._effects(model, structure, graphs, batch)}

    def _effects(
        self, model: Classifier, structure: Structure, graphs: Sequence[ClassGraph], batch: Batch
    ) -> dict[str, Tensor]:
        found = {name: torch.zeros_like(batch.x[:, 0, 0, 0]) for name in self.COLUMNS}
        for graph in {graph.target: graph for graph in graphs}.values() if self.draws else ():
            mine = (batch.target == graph.target).nonzero()[:, 0]
            streams = (Noise([f"class {graph.target}/draw {i}"]) for i in range(self.draws))
            drawn = [random_graph(structure, graph, stream) for stream in streams]
            for name, change in (("kept", "keep nodes"), ("removed", "remove nodes")):
                for net, each in ((name, [graph]), (f"random_{name}", drawn)):
                    for one in each:
                        y = logits(model, weights(structure, [one], change), batch.x[mine])
                        found[f"{net}_logit"][mine] += y[:, graph.target] / len(each)
                        found[f"{net}_right"][mine] += (y.argmax(1) == graph.target).to(y) / len(each)
        return found


def _strength(structure: Structure, graph: ClassGraph, path: str) -> Tensor:
    """(out,) the lowest mean change of the logit when a layer above loses this node; NaN for the logit itself."""
    lowest = torch.full((len(structure.module_of(path).weight),), torch.nan, dtype=torch.float64)
    for above, found in graph.reached.items():
        layer = structure.layer(above)
        numbers = {unit: i for i, unit in enumerate(layer.units)}
        for source in layer.sources:
            if source.path == path:
                effect = found.effect[[numbers[unit] for unit in source.units()]]
                lowest = torch.fmin(lowest, effect)
    return lowest


@dataclass(frozen=True)
class CausalGradient(Method):
    """The part of the gradient of the class's logit that flows along its causal paths, times the input.

    The net computes what it always does; on the way back each layer of the graph lets gradients pass along the
    graph's edges only. With a graph of all edges this is the gradient. Layers that the search did not reach, or
    was not to search, let everything pass.

    multiply   times the input; otherwise the gradient alone
    """

    NAME: ClassVar[str] = "attrib.methods.causal.CausalGradient"
    VERSION: ClassVar[int] = 1
    MAPS: ClassVar[Mapping[str, str]] = {
        "map": "change of the logit per unit of input along causal paths, times the input; signed, summed over channels"
    }

    multiply: bool = True
    graph: CausalGraphs = field(default_factory=CausalGraphs)

    @property
    def fit(self) -> CausalGraphs:
        return self.graph

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        structure = Structure(model.module, batch.x)
        maps = torch.zeros_like(batch.x)
        for target, graph in {graph.target: graph for graph in graphs_of(batch, structure, state)}.items():
            mine = (batch.target == target).nonzero()[:, 0]
            maps[mine] = _gradient(model, structure, graph, batch.x[mine])
        return {"map": (maps * batch.x if self.multiply else maps).sum(1)}


def _gradient(model: Classifier, structure: Structure, graph: ClassGraph, x: Tensor) -> Tensor:
    """(N, *input) of the graph's logit along its edges."""

    def along(weight: Tensor) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            kept = reweighted(module, weight, None, getattr(module, "groups", 1))(inputs[0])
            return kept + (output - kept).detach()

        return hook

    masked = weights(structure, [graph], "keep edges")

    def piece(rows: slice) -> Tensor:
        with torch.enable_grad(), ExitStack() as stack:
            for name, weight in masked.items():
                layer = model.module.get_submodule(name.removesuffix(".weight"))
                stack.enter_context(hooked(layer, along(weight)))
            leaf = x[rows].detach().requires_grad_()
            logit = model.module(leaf.clone())[:, graph.target]
            return torch.autograd.grad(logit.sum(), leaf)[0]

    return model.chunked(piece, len(x))

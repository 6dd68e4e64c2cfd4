"""Maps along a class's causal paths: what the neurons of its causal graph respond to in an image."""

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
from attrib.causal.subnetwork import Change, logits, random_graph, weights
from attrib.checks import require
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
    """(N, *input) -> the input of the first of these layers, and the output of the second if there is one."""

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
    """A convolution or linear layer, the image features that it reads, and how it weighs them."""

    structure: Structure
    path: str
    as_released: bool

    @property
    def module(self) -> nn.Conv2d | nn.Linear:
        """Raises UserError for any other layer."""
        module = self.structure.module_of(self.path)
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            raise self._without_places()
        return module

    def _without_places(self) -> UserError:
        return UserError(
            f"layer {self.path} reads no image features: a map needs a convolution, or the first linear layer"
        )

    def features(self, x: Tensor) -> Tensor:
        """The layer's input (B, *in) as (B, units, h, w). Raises UserError if it has no places in an image."""
        layer = self.structure.layer(self.path)
        if isinstance(self.module, nn.Conv2d):
            return x
        if x.ndim == 4:
            return x.movedim(-1, 1)
        places = {source.places for source in layer.sources}
        if x.ndim == 2 and len(places) == 1 and len(*places) == 2:
            return x.unflatten(1, (len(layer.units), *next(iter(places))))
        raise self._without_places()

    def responses(self, features: Tensor, found: GraphLayer) -> list[tuple[int, Tensor]]:
        """Each node of the layer with its map (h', w'), which is >= 0 and sums to 1.

        features   (units, h, w) of one sample

        The channel of each cause is cross-correlated with its kernel, at all places that the kernel touches, or
        multiplied place by place with the weights of a linear layer. Then softmax over the places, and the mean
        over the causes.
        """
        module, layer = self.module, self.structure.layer(self.path)
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
                continue  # in a grouped convolution: its group has no cause
            x, w = features[causes[of]], weight[of, j]
            if isinstance(module, nn.Linear):
                v = x * w.reshape(len(w), *(x.shape[1:] if w.shape[1] > 1 else (1, 1)))
            else:
                v = self._slid(x, w.squeeze(1), module)
            maps.append((node, v.flatten(1).softmax(1).mean(0).reshape(v.shape[1:])))
        return maps

    def _slid(self, x: Tensor, w: Tensor, module: nn.Conv2d) -> Tensor:
        """Channels (C, h, w) and a kernel for each (C, kh, kw) -> (C, h', w'), all places that the kernels touch."""
        if self.as_released:
            w = w.flip(1, 2)
        reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return F.conv2d(x[None], w[:, None], padding=reach, dilation=module.dilation, groups=len(w))[0]


@dataclass(frozen=True)
class CausalPaths(Method):
    """What the nodes of a class's causal graph respond to at one layer (Interventional-Explanations).

    layer         role of the layer: a convolution, the first linear layer, or a module that contains such layers,
                  of which the last is taken
    nodes         how many maps of single nodes to give beside the mean of all, beginning with the node whose
                  removal lowers the logit most
    as_released   as in the authors' code: takes the raw output of the convolution before instead of what the layer
                  reads, and flips the kernels. (The authors' results in tests/golden count only one of two causes;
                  it is not known which ones they leave out, so all count here.)
    draws         if not 0, also reports how the class's sub-network classifies each sample, compared with the mean
                  of so many random sub-networks of its size (``attrib.causal.subnetwork``), as numbers for tables
    graph         the causal graphs, which are fitted first

    Raises SampleError for a sample whose class has no graph, or a graph that does not reach down to the layer.
    """

    NAME: ClassVar[str] = "attrib.methods.causal.CausalPaths"
    VERSION: ClassVar[int] = 1
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
        structure = Structure(model.module, batch.x)
        graphs = graphs_of(batch, structure, state)
        path = structure.at(model.path(self.layer))
        reading = _Reading(structure, path, self.as_released)
        paths: tuple[str, ...] = (path,)
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
        named = {name: large[:, i] for i, name in enumerate(self.MAPS)}
        return {"places": small[:, 0], **named, **self._effects(model, structure, graphs, batch)}

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
        structure = Structure(model.module, batch.x)
        maps = torch.zeros_like(batch.x)
        for target, graph in {graph.target: graph for graph in graphs_of(batch, structure, state)}.items():
            mine = (batch.target == target).nonzero()[:, 0]
            maps[mine] = _gradient(model, structure, graph, batch.x[mine])
        return {"map": (maps * batch.x if self.multiply else maps).sum(1)}


def _gradient(model: Classifier, structure: Structure, graph: ClassGraph, x: Tensor) -> Tensor:
    """(N, *input) the gradient of the logit of the graph's class along the graph's edges."""

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

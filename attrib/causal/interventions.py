"""Interventions on edges that leave the net's weights alone: its logits if the weights w of one cause were u.

A weighted layer is linear in its weight, so setting the edges from candidate c to the effects E to u changes its
output by (u - w)[E, c] applied to c alone. The net runs once up to the layer; from there all candidates of all samples
go through the rest of its graph together, ``Classifier.rows`` at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx

from attrib.causal.layers import Edges, Weighted, WeightedLayer
from attrib.causal.structure import Structure
from attrib.models import Classifier
from attrib.models.graph import Graph, check_same


class Cut:
    """A net's graph in two, at a weighted layer: up to it, and what reads its result."""

    def __init__(self, graph: Graph, at: Weighted) -> None:
        behind = {at.node}
        for node in graph.nodes:
            if not behind.isdisjoint(node.all_input_nodes):
                behind.add(node)
        # What does not depend on the values of the input is not handed over but computed again.
        before = graph.fed - behind
        rear = _needed(graph, [graph.nodes[-1]], before | {at.node})
        used = {n for node in rear for n in node.all_input_nodes}
        rest = [n for n in graph.nodes if n in used and n in before]
        self._rear = _part(graph, [at.node, *rest], rear, None)
        self._front = until(graph, (at.reads, at.node, *rest))

    def front(self, x: Tensor) -> tuple[Tensor, ...]:
        """(N, *input) -> what the layer reads, what it gives, and what else ``rear`` needs."""
        return tuple(self._front(x))

    def rear(self, z: Tensor, rest: Sequence[Tensor]) -> Tensor:
        """Logits (N, K) with the layer's output replaced by z."""
        return self._rear(z, *rest)


def until(graph: Graph, nodes: Sequence[fx.Node]) -> fx.GraphModule:
    """A net that gives what these nodes do, and computes nothing else."""
    return _part(graph, [graph.input], _needed(graph, nodes, {graph.input}), nodes)


def _needed(graph: Graph, ends: Sequence[fx.Node], given: frozenset[fx.Node] | set[fx.Node]) -> list[fx.Node]:
    """The nodes that ``ends`` are computed by from those that are given, themselves among them, in order."""
    found: set[fx.Node] = set()
    waiting = [node for node in ends if node not in given]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [n for n in node.all_input_nodes if n not in given]
    return [node for node in graph.nodes if node in found]


def _part(
    graph: Graph, inputs: Sequence[fx.Node], nodes: Sequence[fx.Node], outputs: Sequence[fx.Node] | None
) -> fx.GraphModule:
    """A net of copies of the nodes; with ``outputs`` None, the graph's own output is among them."""
    new = fx.Graph()
    copies = {node: new.placeholder(f"input_{i}") for i, node in enumerate(inputs)}
    for node in nodes:
        copies[node] = new.node_copy(node, copies.__getitem__)
    if outputs is not None:
        new.output(tuple(copies[node] for node in outputs))
    return fx.GraphModule(graph.net, new)


class Site(NamedTuple):
    """A weighted layer with its input and output for n samples, each of which has as many rows there."""

    layer: WeightedLayer
    call: Weighted
    n: int
    x: Tensor  # (n * rows, *in), what the layer reads
    z: Tensor  # (n * rows, *out), what it gives
    rest: tuple[Tensor, ...]  # what else the net behind it needs
    cut: Cut

    def logits(self, samples: Tensor, z: Tensor) -> Tensor:
        """(m, K) behind z (m * rows, *out), for samples (m,) int64."""
        return self.cut.rear(z, [self.of(t, samples) for t in self.rest])

    def of(self, t: Tensor, samples: Tensor | slice) -> Tensor:
        """The rows of samples, of all rows."""
        return t.unflatten(0, (self.n, -1))[samples].flatten(0, 1)


class Sites:
    """A net cut at its weighted layers; each cut is made once."""

    def __init__(self, model: Classifier, structure: Structure) -> None:
        self.model, self.structure = model, structure
        self._cuts: dict[str, Cut] = {}

    @torch.no_grad()
    def at(self, path: str, x: Tensor) -> Site:
        """The layer for inputs x (N, *input); computes nothing behind it.

        Raises UserError where the rows of a sample do not lie next to each other.
        """
        layer, call, graph = self.structure.layer(path), self.structure.call(path), self.structure.graph
        if path not in self._cuts:
            cut = Cut(graph, call)
            two = torch.cat((x[:1], x[-1:]))
            read, z, *rest = cut.front(two)
            tried, samples = Site(layer, call, 2, read, z, tuple(rest), cut), torch.tensor([1, 0, 1], device=x.device)
            check_same(self.model.module, tried.logits(samples, tried.of(z, samples)), graph(two)[samples])
            self._cuts[path] = cut
        cut = self._cuts[path]
        read, z, *rest = self.model.chunked(lambda rows: cut.front(x[rows]), len(x))
        return Site(layer, call, len(x), read, z, tuple(rest), cut)


def edges(site: Site, unit: int, effects: Tensor) -> Edges:
    """The edges from a candidate, by its number, to the output channels ``effects`` (E,) int64."""
    return site.call.edges(site.layer.units[unit].features, effects)


@torch.no_grad()
def intervene(
    model: Classifier, site: Site, units: Sequence[int], effects: Tensor, target: int, u: float = 0.0
) -> Tensor:
    """The target's logit (len(units), n) for every sample under an intervention on each of these candidates.

    units     candidates, by their number in the layer
    effects   (E,) int64, output channels of the layer; the edges from a candidate to all of them become u
    """
    n, axis, each = site.n, site.call.axis, len(site.z) // site.n

    def piece(rows: slice) -> Tensor:
        samples = torch.arange(rows.start, rows.stop, device=site.z.device) % n
        z = site.of(site.z, samples)
        for number in range(rows.start // n, (rows.stop - 1) // n + 1):
            start, stop = max(rows.start, number * n), min(rows.stop, (number + 1) * n)
            mine = edges(site, units[number], effects)
            if not len(mine.effects):
                continue
            x = site.of(site.x, slice(start - number * n, stop - number * n)).index_select(axis, mine.features)
            part = z[(start - rows.start) * each : (stop - rows.start) * each]
            part.index_add_(axis, mine.effects, site.call(x, mine.change(u)))
        return site.logits(samples, z)[:, target].clone()

    return model.chunked(piece, len(units) * n).reshape(len(units), n)


def estimate(model: Classifier, site: Site, effects: Tensor, target: int, u: float = 0.0) -> Tensor:
    """(U,) mean change of the target's logit under an intervention on each of U candidates, to first order.

    The gradient of the logit with respect to the layer's weights, times (u - w): one forward and backward pass for
    all candidates. ``Search.candidates`` are chosen by it.
    """

    def piece(rows: slice) -> Tensor:
        samples = torch.arange(rows.start, rows.stop, device=site.z.device)
        with torch.enable_grad():
            leaf = site.of(site.z, samples).detach().requires_grad_()
            logits = site.logits(samples, leaf)
            (at_z,) = torch.autograd.grad(logits[:, target].sum(), leaf)
            free = site.call.weight.clone().requires_grad_()
            y = site.call(site.of(site.x, samples), free, site.call.groups)
            (grad,) = torch.autograd.grad((y * at_z).sum(), free)
        return grad[None]

    gradient = model.chunked(piece, site.n).sum(0) / site.n
    found = []
    for unit in range(len(site.layer.units)):
        mine = edges(site, unit, effects)
        found.append((gradient[mine.effects[:, None], mine.columns] * mine.change(u)).sum())
    return torch.stack(found)

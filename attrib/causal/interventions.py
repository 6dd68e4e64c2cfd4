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

from attrib.causal.layers import Edges, Weighted, WeightedLayer, on_device
from attrib.causal.structure import ADVICE, Structure
from attrib.models import Classifier
from attrib.models.admission import other_than
from attrib.models.graph import Graph, check_same
from attrib.noise import Noise
from attrib.types import UserError

_KEPT = "attrib.causal.cuts"  # where a graph's notes hold its cuts


class Rows(NamedTuple):
    """Where the rows of a batch are in a tensor: in the middle of an axis that is ``outer`` * N * inner long."""

    axis: int
    outer: int

    def first(self, t: Tensor, n: int) -> Tensor:
        """(..., outer * n * inner, ...) -> (n, ..., outer, inner, ...)."""
        return t.unflatten(self.axis, (self.outer, n, -1)).movedim(self.axis + 1, 0)

    def back(self, t: Tensor) -> Tensor:
        """The inverse of ``first``."""
        return t.movedim(0, self.axis + 1).flatten(self.axis, self.axis + 2)

    @classmethod
    def of(cls, node: fx.Node, both: Tensor, one: Tensor, other: Tensor) -> Rows | None:
        """Found out from what the node gives for two samples, for the one twice, and for the other twice."""
        largest = both.abs().max().item() if both.numel() else 0.0
        for axis in sorted(node.meta["free"]):
            each, odd = divmod(both.shape[axis], 2)
            for outer in range(1, each + 1):
                if odd or each % outer:
                    continue
                rows = cls(axis, outer)
                made = torch.stack((rows.first(one, 2)[0], rows.first(other, 2)[1]))
                if torch.allclose(made, rows.first(both, 2), rtol=0, atol=1e-4 * largest, equal_nan=True):
                    return rows
        return None


class Cut:
    """A net's graph in two, at a weighted layer: up to it, and what reads its result.

    What is handed over has its rows first, whatever the net does with them. ``x`` (N, *input) are samples to try.
    Raises UserError where the rows cannot be found.
    """

    def __init__(self, graph: Graph, at: Weighted, x: Tensor) -> None:
        behind = {at.node}
        for node in graph.nodes:
            if not behind.isdisjoint(node.all_input_nodes):
                behind.add(node)
        # What does not depend on the values of the input is not handed over but computed again.
        before = graph.fed - behind
        rear = _needed(graph, [graph.nodes[-1]], before | {at.node})
        used = {n for node in rear for n in node.all_input_nodes}
        rest = [n for n in graph.nodes if n in used and n in before]
        handed = (at.reads, at.node, *rest)
        self._rear = _part(graph, [at.node, *rest], rear, None)
        self._front = until(graph, handed)
        self.rows = [self._found(graph, node, *values) for node, *values in zip(handed, *self._tried(x), strict=True)]

    def _tried(self, x: Tensor) -> list[tuple[Tensor, ...]]:
        unlike = (row[None] for row in x if not torch.equal(row, x[0]))
        one, other = x[:1], next(unlike, other_than(x[:1]))
        if x.is_floating_point():
            one, other = (Noise([uid], device=x.device, dtype=x.dtype).normal(*x.shape[1:]) for uid in ("one", "other"))
        return [self._front(torch.cat(pair)) for pair in ((one, other), (one, one), (other, other))]

    @staticmethod
    def _found(graph: Graph, node: fx.Node, *values: Tensor) -> Rows:
        found = Rows.of(node, *(value.double() for value in values))
        if found is None:
            raise UserError(
                f"a causal graph needs to know which numbers of {graph.where(node)} belong to which sample, and what "
                f"it gives for two samples does not tell; {ADVICE}"
            )
        return found

    def front(self, x: Tensor) -> tuple[Tensor, ...]:
        """(N, *input) -> what the layer reads, what it gives, and what else ``rear`` needs, N rows each."""
        return tuple(rows.first(t, len(x)) for rows, t in zip(self.rows, self._front(x), strict=True))

    def rear(self, z: Tensor, rest: Sequence[Tensor]) -> Tensor:
        """Logits (N, K) with the layer's output replaced by z."""
        return self._rear(*(rows.back(t) for rows, t in zip(self.rows[1:], (z, *rest), strict=True)))


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
    """A weighted layer with its input and output for n samples."""

    layer: WeightedLayer
    call: Weighted
    x: Tensor  # (n, ...), what the layer reads
    z: Tensor  # (n, ...), what it gives
    rest: tuple[Tensor, ...]  # (n, ...) each, what else the net behind it needs
    cut: Cut

    @property
    def features(self) -> Tensor:
        """(n, ...) what the layer reads, without the axes that only keep rows and places apart."""
        axis = self.cut.rows[0].axis
        return self.x.squeeze((axis + 1, axis + 2))

    @property
    def output(self) -> Tensor:
        """(n, ...) what it gives, likewise."""
        axis = self.cut.rows[1].axis
        return self.z.squeeze((axis + 1, axis + 2))

    def logits(self, samples: Tensor, z: Tensor) -> Tensor:
        """(m, K) behind z (m, ...), for samples (m,) int64."""
        return self.cut.rear(z, [t[samples] for t in self.rest])

    def given(self, x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
        """What the layer would give for some rows of its input with this weight, without its bias."""
        reads, gives, *_ = self.cut.rows
        return gives.first(self.call(reads.back(x), weight, groups), len(x))


class Sites:
    """A net cut at its weighted layers; each cut is made once per graph.

    ``structure`` is the one that graphs are searched in. The net may have others, for texts of other lengths.
    """

    def __init__(self, model: Classifier, structure: Structure) -> None:
        self.model, self.structure = model, structure

    @torch.no_grad()
    def at(self, path: str, x: Tensor) -> Site:
        """The layer for inputs x (N, *input); computes nothing behind it.

        Raises UserError where the rows of samples cannot be told apart.
        """
        structure = Structure.of(self.model, x)
        layer, call, graph = structure.layer(path), structure.call(path), structure.graph
        cuts: dict[str, Cut] = graph.net.meta.setdefault(_KEPT, {})
        if path not in cuts:
            cut = Cut(graph, call, x)
            two = torch.cat((x[:1], x[-1:]))
            _, z, *rest = cut.front(two)
            check_same(self.model.module, cut.rear(z[[1, 0, 1]], [t[[1, 0, 1]] for t in rest]), graph(two)[[1, 0, 1]])
            cuts[path] = cut
        cut = cuts[path]
        read, z, *rest = self.model.chunked(lambda rows: cut.front(x[rows]), len(x))
        return Site(layer, call, read, z, tuple(rest), cut)


def edges(site: Site, unit: int, effects: Tensor) -> Edges:
    """The edges from a candidate, by its number, to the output channels ``effects`` (E,) int64, on the CPU."""
    return site.call.edges(site.layer.units[unit].features, effects)


@torch.no_grad()
def intervene(
    model: Classifier, site: Site, units: Sequence[int], effects: Tensor, target: int, u: float = 0.0
) -> Tensor:
    """The target's logit (len(units), n) for every sample under an intervention on each of these candidates.

    units     candidates, by their number in the layer
    effects   (E,) int64 on the CPU, output channels of the layer; the edges from a candidate to all of them become u
    """
    n, axis = len(site.z), site.call.axis
    of_units = on_device([edges(site, unit, effects) for unit in units])

    def piece(rows: slice) -> Tensor:
        samples = torch.arange(rows.start, rows.stop, device=site.z.device) % n
        z = site.z[samples]
        for number in range(rows.start // n, (rows.stop - 1) // n + 1):
            start, stop = max(rows.start, number * n), min(rows.stop, (number + 1) * n)
            mine = of_units[number]
            if not len(mine.effects):
                continue
            x = site.x[start - number * n : stop - number * n].index_select(axis, mine.features)
            part = z[start - rows.start : stop - rows.start]
            part.index_add_(axis, mine.effects, site.given(x, mine.change(u)))
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
            leaf = site.z[samples].detach().requires_grad_()
            logits = site.logits(samples, leaf)
            (at_z,) = torch.autograd.grad(logits[:, target].sum(), leaf)
            free = site.call.weight.clone().requires_grad_()
            y = site.given(site.x[samples], free, site.call.groups)
            (grad,) = torch.autograd.grad((y * at_z).sum(), free)
        return grad[None]

    gradient = model.chunked(piece, len(site.z)).sum(0) / len(site.z)
    found = []
    for mine in on_device([edges(site, unit, effects) for unit in range(len(site.layer.units))]):
        found.append((gradient[mine.effects[:, None], mine.columns] * mine.change(u)).sum())
    return torch.stack(found)

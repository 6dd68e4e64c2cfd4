"""Which channels of which layers feed each weighted layer of a net, read from the net's graph.

The *weighted layers* are the calls that are linear in a parameter (convolutions, transposed ones too, linear layers and
products with a matrix), in the order in which they run, each named by the module that owns its weight. Every number
that a layer reads has an *origin*: the channels of weighted layers, or of the net's input, that it is computed from
without another weighted layer between. Origins are sent through the graph (``rules``):

* what only moves numbers (flattening, slicing, joining, padding, shuffling channels) moves their origins: the call
  itself does it;
* element-wise operations join the origins of all operands: those of a residual block and of what is in front of it,
  those of the channels that a gate scales and of the gate;
* what goes over places (pooling, resizing, means and maxima) keeps the origin that the places share;
* normalisations keep it too: they share a mean and a deviation among channels, but channel c still comes from channel
  c. So does a mean or maximum over channels that is computed by hand: it vanishes where it meets the channels;
* of a product of two matrices that both depend on the input, each matrix is one thing, with the origins of all its
  numbers. So an attention head is one, and comes from its queries, keys and values.

The inputs of a layer that have the same origin are one candidate together: a flattened channel's places, a head's slice
of the input of the output projection. A neuron of an MLP, and a channel of the residual stream, is one by itself; the
latter comes from that channel of every block that wrote to it.

Anything else, such as a softmax over channels or an LSTM, mixes channels. A layer that reads a mixture cannot be
searched, unless it is the earliest one that is.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor, fx

from attrib.causal.layers import Unit, Weighted, WeightedLayer, weighted
from attrib.causal.origins import Channel, Origin, Origins, small
from attrib.causal.rules import INPUT, Through
from attrib.models import Classifier
from attrib.models.activations import ELEMENTWISE
from attrib.models.calls import operation
from attrib.models.graph import Graph
from attrib.types import UserError

OUTPUT = "output"
_KEPT = "attrib.causal.structure"  # where a graph's notes hold its structure


class Structure:
    """The weighted layers of a net and what each reads."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._calls = weighted(graph)
        self._origins = Origins()
        self._read: dict[fx.Node, Tensor] = {}
        self._layers: dict[str, WeightedLayer] = {}

    @classmethod
    def of(cls, model: Classifier, x: Tensor) -> Structure:
        """That of a net for inputs like x (N, *input), found once per graph.

        Of texts of several lengths, with a net that sees padding, for those of the least.

        Raises UserError for a net without a graph, or with one for a single number of rows.
        """
        graph = model.graph(model.of_one_length(x)[0])
        graph.check_any_rows("the search for causal paths")
        found: Structure | None = graph.net.meta.get(_KEPT)
        if found is None:
            found = graph.net.meta[_KEPT] = cls(graph)
        return found

    @cached_property
    def paths(self) -> tuple[str, ...]:
        """The weighted layers in the order in which they run. Raises UserError if there are none."""
        if not self._calls:
            raise UserError(
                f"{self.graph.name} has no convolution or linear layer whose weight is a parameter of its own"
            )
        return tuple(dict.fromkeys(each.path for each in self._calls))

    def call(self, path: str) -> Weighted:
        """The call of a weighted layer. Raises UserError for one that runs several times."""
        found = [each for each in self._calls if each.path == path]
        if len(found) != 1:
            raise UserError(
                f"layer {path} runs {len(found)} times in a forward pass; a causal graph needs layers that run once"
            )
        return found[0]

    def outputs(self, path: str) -> int:
        """How many channels a weighted layer gives."""
        return len(self.call(path).weight)

    def scope(self, layers: int | tuple[str, ...] | None) -> tuple[str, ...]:
        """The layers to be searched, in the order in which they run: the last so many, those with these paths, or all.

        Raises UserError for a path that is no weighted layer, or that no path from the logits leads to.
        """
        if layers is None:
            return self.paths
        if isinstance(layers, int):
            if layers < 1:
                raise UserError(f"layers is {layers}: it must be at least 1, or null for all {len(self.paths)}")
            return self.paths[-layers:]
        for path in layers:
            if path not in self.paths:
                raise UserError(
                    f"layers: {path!r} is no convolution or linear layer of {self.graph.name}; "
                    f"these are: {', '.join(self.paths)}"
                )
        chosen = tuple(path for path in self.paths if path in layers)
        read = {source for path in (*chosen, OUTPUT) for source in self.layer(path).sources}
        if cut_off := [path for path in chosen if path not in read]:
            raise UserError(
                f"layers: none of the others, nor the logits, read {cut_off[0]}, so that no path leads to it; "
                "name the layers between them as well"
            )
        return chosen

    def at(self, path: str) -> str:
        """The weighted layer that produces the output of the module at ``path``: itself, or the last one that ran.

        Raises UserError if there is none.
        """
        layers = {each.node: each.path for each in self._calls}
        last, found = None, None
        for node in self.graph.nodes:
            last = layers.get(node, last)
            if node in self.graph.fed and f"{node.meta['module'][0]}.".startswith(f"{path}."):
                found = last
        if found is None:
            raise UserError(
                f"no convolution or linear layer produces the output of {path}; take one of {', '.join(self.paths)}"
            )
        return found

    def layer(self, path: str) -> WeightedLayer:
        """What a layer reads; ``OUTPUT`` stands for the logits, each of which is a unit.

        Raises UserError for logits that do not come from a weighted layer channel by channel.
        """
        if path not in self._layers:
            self._layers[path] = self._logits() if path == OUTPUT else self._layer(self.call(path))
        return self._layers[path]

    # ---- origins -------------------------------------------------------------------------------

    @cached_property
    def _output(self) -> Tensor:
        """The origins of the logits; also finds those of what every layer reads."""
        axes = {each.node: (each.path, each.axis) for each in self._calls}
        through = Through(self.graph, self._origins, axes, self._read.__setitem__)
        with torch.no_grad():
            found = self.graph.propagate(through.input, through)
        assert isinstance(found, Origin)
        return found.ids

    def _logits(self) -> WeightedLayer:
        features = self._features(self._output, 1)
        units = []
        for j, numbers in enumerate(features):
            origin = self._origins.channels(self._origins.join(numbers))
            if isinstance(origin, str):
                raise UserError(self._refusal(origin, "the logits"))
            units.append(Unit(torch.tensor([j]), tuple(sorted(origin))))
        return WeightedLayer(OUTPUT, tuple(units))

    def _layer(self, of: Weighted) -> WeightedLayer:
        _ = self._output
        features = self._features(self._read[of.node], of.axis)
        alone = tuple(Unit(torch.tensor([j]), ((f"{of.path} (input)", j),)) for j in range(len(features)))
        groups: dict[frozenset[Channel], list[int]] = {}
        for j, numbers in enumerate(features):
            origin = self._origins.channels(self._origins.join(numbers))
            if isinstance(origin, str):
                return WeightedLayer(of.path, alone, refused=self._refusal(origin, of.path))
            groups.setdefault(origin, []).append(j)
        if len(groups) == 1 < len(features) and any(len(numbers - {0}) > 1 for numbers in features):
            (origin,) = groups
            paths = sorted({path for path, _ in origin})
            if paths != [INPUT]:
                along = f"{of.path} reads {', '.join(paths)} along another axis than that of its channels"
                return WeightedLayer(of.path, alone, refused=f"{along}; {ADVICE}")
            return WeightedLayer(of.path, tuple(Unit(u.features, ((INPUT, j),)) for j, u in enumerate(alone)))
        found = [Unit(torch.tensor(mine), tuple(sorted(origin))) for origin, mine in groups.items()]
        return WeightedLayer(of.path, tuple(found), self._places(of, [unit.features for unit in found]))

    def _places(self, of: Weighted, units: list[Tensor]) -> tuple[int, ...]:
        """The places (h, w) of each unit's features, if an image's were flattened; else ()."""
        node = of.reads
        while operation(node) in ELEMENTWISE | _FLATTENING and "shape" in node.meta:
            (node,) = [n for n in node.all_input_nodes if n in self.graph.fed][:1]
            shape = node.meta["shape"]
            if len(shape) == 4:
                break
        else:
            return ()
        order = torch.arange(math.prod(shape[1:])).reshape(shape[1:])
        for axis in range(3):
            rows = order.movedim(axis, 0).flatten(1)
            if len(rows) == len(units) and all(map(torch.equal, rows, units)):
                return tuple(size for at, size in enumerate(shape[1:]) if at != axis)
        return ()

    def _features(self, ids: Tensor, axis: int) -> list[frozenset[int]]:
        """The origins that are there, over all places, for each channel along the axis."""
        rows = small(ids).movedim(axis, 0).flatten(1)
        return [frozenset(map(int, set(row))) for row in rows.expand(ids.shape[axis], -1).tolist()]

    def _refusal(self, mixing: str, reader: str) -> str:
        return (
            f"{mixing}, on the way to {reader}: which of its input channels make each output channel is not known, so "
            f"no causal graph goes through it; {ADVICE}"
        )


_FLATTENING = frozenset(("reshape", "_reshape_alias", "squeeze", "unsqueeze"))
ADVICE = "search only the layers behind it (layers: the last so many)"

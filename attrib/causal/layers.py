"""A weighted layer: a call of a net's graph that is linear in one of the net's parameters, and its edges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from attrib.causal.origins import Channel
from attrib.causal.rules import INPUT, bound, schema
from attrib.models.calls import call, operation
from attrib.models.graph import Graph

# The operation -> its arguments that are what the layer reads, its weight and its bias.
_WEIGHTED = {
    "linear": ("input", "weight", "bias"), "conv1d": ("input", "weight", "bias"), "conv2d": ("input", "weight", "bias"),
    "conv3d": ("input", "weight", "bias"), "conv_transpose1d": ("input", "weight", "bias"),
    "conv_transpose2d": ("input", "weight", "bias"), "conv_transpose3d": ("input", "weight", "bias"),
    "addmm": ("mat1", "mat2", "self"), "mm": ("self", "mat2", ""), "matmul": ("self", "other", ""),
}  # fmt: skip


class Weighted(NamedTuple):
    """A weighted layer's call. ``weight`` (out, in / groups, *kernel) is always laid out as a convolution's."""

    path: str
    node: fx.Node
    parameter: str  # name of its weight
    weight: Tensor
    groups: int

    @property
    def axis(self) -> int:
        """The dimension of the channels in what it reads and gives, counted from the end."""
        return 1 - self.weight.ndim

    @property
    def inputs(self) -> int:
        """How many channels it reads."""
        return self.weight.shape[1] * self.groups

    @property
    def reads(self) -> fx.Node:
        found = self.read(self.node.args, self.node.kwargs)
        assert isinstance(found, fx.Node)
        return found

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What it reads, of the arguments of its call."""
        name = _WEIGHTED[operation(self.node)][0]
        names = [argument.name for argument in schema(self.node).arguments]
        return {**dict(zip(names, args, strict=False)), **kwargs}[name]

    def stored(self, weight: Tensor, groups: int | None = None) -> Tensor:
        """The weight as the net stores it, or back."""
        return _turned(operation(self.node), weight, self.groups if groups is None else groups)

    def __call__(self, x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
        """The layer with another weight (out, in / groups, *kernel), without its bias."""
        if weight.ndim == 2:
            return F.linear(x, weight)
        _, name, bias = _WEIGHTED[operation(self.node)]
        given = bound(self.node) | {name: self.stored(weight, groups), bias: None, "groups": groups}
        return call(self.node)(x, **{k: v for k, v in given.items() if k != "input"})

    def masked(self, mask: Tensor) -> Tensor:
        """Its weight as the net stores it, zero outside of a mask (out, in / groups, *kernel)."""
        return self.stored(self.weight * mask)

    def edges(self, features: Tensor, effects: Tensor) -> Edges:
        """Those from some of the channels that it reads (F,) to some of those that it gives (E,), both int64."""
        inputs, outputs = self.weight.shape[1], len(self.weight) // self.groups
        linked = (features // inputs)[None] == (effects // outputs)[:, None]
        some = linked.any(1)
        return Edges(self, effects[some], features, features % inputs, linked[some])


class Edges(NamedTuple):
    """In a grouped convolution a channel reaches its own group only.

    The numbers of channels lie on the CPU, so that no device is waited for to learn which edges there are;
    ``on_device`` takes them to the weights.
    """

    call: Weighted
    effects: Tensor  # (E,) int64: the outputs that any of the features reaches
    features: Tensor  # (F,) int64
    columns: Tensor  # (F,) int64: where the features are in the weight
    linked: Tensor  # (E, F) bool

    @property
    def weight(self) -> Tensor:
        """(E, F, *kernel)"""
        return self.call.weight[self.effects[:, None], self.columns]

    def each(self) -> Iterator[Edges]:
        """Those to each of the effects, from the features that reach it."""
        for row, linked in enumerate(self.linked):
            mine = slice(row, row + 1)
            yield Edges(
                self.call, self.effects[mine], self.features[linked], self.columns[linked], self.linked[mine][:, linked]
            )

    def change(self, u: float) -> Tensor:
        """(E, F, *kernel) what is added to the weights that become u."""
        linked = self.linked.reshape(*self.linked.shape, *[1] * (self.weight.ndim - 2))
        return torch.where(linked, u - self.weight, 0.0)


def on_device(found: Sequence[Edges]) -> list[Edges]:
    """The edges of several candidates, with all numbers where the weights are, by one copy for all."""
    if not found:
        return []
    parts = [part for one in found for part in one[1:]]
    flat = torch.cat([part.flatten() for part in parts]).to(found[0].call.weight.device)
    moved = iter(zip(parts, flat.split([part.numel() for part in parts]), strict=True))
    return [Edges(one.call, *(new.view(old.shape).to(old.dtype) for old, new in islice(moved, 4))) for one in found]


def _turned(name: str, weight: Tensor, groups: int) -> Tensor:
    if name in ("addmm", "mm", "matmul"):
        return weight.mT
    if name.startswith("conv_transpose"):
        return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight


def weighted(graph: Graph) -> list[Weighted]:
    """The weighted layers of a net, in the order in which they run; one that runs twice is there twice."""
    found: list[tuple[str, fx.Node, nn.Parameter, int]] = []
    for node in graph.nodes:
        name = operation(node)
        if name not in _WEIGHTED or node not in graph.fed:
            continue
        given = bound(node)
        reads, weight, bias = (given.get(argument) for argument in _WEIGHTED[name])
        if reads not in graph.fed or bias in graph.fed or not isinstance(weight, fx.Node) or weight.op != "get_attr":
            continue
        parameter = _of(graph, weight)
        if not isinstance(parameter, nn.Parameter) or given.get("alpha", 1) != 1 or given.get("beta", 1) != 1:
            continue
        if name in ("addmm", "mm", "matmul") and parameter.ndim != 2:
            continue
        found.append((str(weight.target), node, parameter, int(given.get("groups", 1))))
    owners = {target: target.rpartition(".")[0] for target, *_ in found}
    alone = [owner for owner in owners.values() if list(owners.values()).count(owner) == 1 and owner]
    return [
        Weighted(
            owners[target] if owners[target] in alone else target, node, target,
            _turned(operation(node), parameter, groups).detach(), groups,
        )
        for target, node, parameter, groups in found
    ]  # fmt: skip


def _of(graph: Graph, node: fx.Node) -> Any:
    value: Any = graph.net
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value


class Unit(NamedTuple):
    """A candidate: what a layer reads of some channels, taken together."""

    features: Tensor  # (F,) int64: the channels of what it reads
    origin: tuple[Channel, ...]  # where they come from


@dataclass(frozen=True, eq=False)
class WeightedLayer:
    """A weighted layer and what it reads.

    units    the candidates, by their first feature
    places   of an image, in the order of the features of each unit; () unless they were flattened
    refused  why the inputs could not be followed to other layers, else empty; then every input is a unit of a source
             that is no layer, and nothing in front of this layer can be searched
    """

    path: str
    units: tuple[Unit, ...]
    places: tuple[int, ...] = ()
    refused: str = ""

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """The layers that the units come from."""
        return tuple(dict.fromkeys(path for unit in self.units for path, _ in sorted(unit.origin)))

    @property
    def first(self) -> bool:
        """Whether it reads the net's input alone, so that there are no neurons to intervene on."""
        return set(self.sources) <= {INPUT}

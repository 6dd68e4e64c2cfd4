"""Which channels of which layers feed each weighted layer of a net, read from its traced graph.

The *weighted layers* are the convolutions and linear layers, in the order in which they run. What a layer reads is
found by walking back from its input, along operations that keep channels apart, to the weighted layers that the
channels come from, or to the net's input:

* activations, dropout, pooling, padding and normalisation keep a channel's number (layer and group normalisation
  share a mean and a standard deviation among channels, but channel c still comes from channel c);
* all operands of sums and products are followed: through a residual block's identity shortcut to what is in front of
  the block, and in a squeeze-and-excitation block both to the channels that are scaled and to those of the gate;
* flattening turns a channel into the features of its places, which are one candidate together;
* permuting, averaging over places and concatenating move channels.

Any other operation, such as attention, ends the search with a UserError that names it, unless the layer behind it is
the earliest one that is to be searched.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import activation, batchnorm, conv, dropout, padding, pooling

from attrib.causal.operations import ALIGNED, JOINED, PERMUTED, PLACES, REDUCED, RESHAPED
from attrib.models.split import CannotSplitError, trace
from attrib.types import UserError

INPUT, OUTPUT = "input", "output"
WeightedModule = nn.Linear | conv._ConvNd

_MIXING = {"MultiheadAttention", "Softmax", "Softmin", "LogSoftmax", "Softmax2d", "GLU"}
_KEPT = (
    *(getattr(activation, name) for name in activation.__all__ if name not in _MIXING),
    batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, dropout._DropoutNd, nn.Identity,
)  # fmt: skip
_PLACES = (
    pooling._MaxPoolNd, pooling._AvgPoolNd, pooling._AdaptiveAvgPoolNd, pooling._AdaptiveMaxPoolNd, nn.Upsample,
    padding._ConstantPadNd, padding._ReflectionPadNd, padding._ReplicationPadNd,
)  # fmt: skip


@dataclass(frozen=True)
class ChannelSource:
    """A layer (or ``INPUT``) whose channel j is read at ``offset + j * span`` up to ``offset + (j + 1) * span``.

    places   the shape of a flattened channel's ``span`` features before flattening
    """

    path: str
    channels: int
    offset: int
    span: int
    places: tuple[int, ...] = ()

    def units(self) -> list[tuple[int, int]]:
        """The range of inputs of each channel."""
        return [(self.offset + j * self.span, self.offset + (j + 1) * self.span) for j in range(self.channels)]


@dataclass(frozen=True)
class WeightedLayer:
    """A weighted layer and what it reads.

    units     the candidates: each is a range of input channels or features, usually of one
    sources   where they come from; several where paths meet
    refused   why the inputs could not be followed to other layers, else empty; then every input is a unit of a source
              that is no layer, and nothing in front of this layer can be searched
    """

    path: str
    units: tuple[tuple[int, int], ...]
    sources: tuple[ChannelSource, ...]
    refused: str = ""

    @property
    def first(self) -> bool:
        """Whether it reads the net's input alone, so that there are no neurons to intervene on."""
        return all(source.path == INPUT for source in self.sources)

    def channels(self, source: ChannelSource, units: Tensor) -> Tensor:
        """(channels of the source,) bool: the channels that are among the chosen units (U,) bool."""
        chosen = {unit for unit, on in zip(self.units, units.tolist(), strict=True) if on}
        return torch.tensor([unit in chosen for unit in source.units()], dtype=torch.bool)


@dataclass(frozen=True)
class _Place:
    """A node of the graph whose channel j along ``axis`` is read at offset + j * span."""

    node: fx.Node
    axis: int
    offset: int = 0
    span: int = 1
    places: tuple[int, ...] = ()

    def back(self, node: fx.Node, axis: int, offset: int | None = None) -> _Place:
        return replace(self, node=node, axis=axis, offset=self.offset if offset is None else offset)


class Structure:
    """The weighted layers of a net and what each reads; ``x`` (N, *input) gives the shapes.

    Raises UserError for a net that cannot be traced.
    """

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        self.module = module
        try:
            # Subclasses too, such as those of timm, which torch.fx would otherwise trace into.
            self.graph = trace(module, leaves=(nn.Linear, conv._ConvNd))
        except CannotSplitError as error:
            raise UserError(f"a causal graph needs a net that torch.fx can trace: {error}") from error
        shapes = _Shapes(fx.GraphModule(module, self.graph))
        with torch.no_grad():
            shapes.run(x[:1].clone())
        self._shapes = shapes.found
        self._layers: dict[str, WeightedLayer] = {}
        self._fed: set[fx.Node] = set()  # nodes that depend on the input
        for node in self.graph.nodes:
            if node.op == "placeholder" or any(i in self._fed for i in node.all_input_nodes):
                self._fed.add(node)

    def _weighted(self, node: fx.Node) -> bool:
        if node.op != "call_module" or node not in self._fed:
            return False
        found = self.module.get_submodule(str(node.target))
        return isinstance(found, nn.Linear) or (isinstance(found, conv._ConvNd) and not found.transposed)

    def module_of(self, path: str) -> WeightedModule:
        """The module of a weighted layer."""
        return weighted_module(self.module, path)

    @cached_property
    def paths(self) -> tuple[str, ...]:
        """The weighted layers in the order in which they run. Raises UserError if there are none."""
        found = [str(node.target) for node in self.graph.nodes if self._weighted(node)]
        if not found:
            raise UserError(f"{type(self.module).__name__} has no convolution or linear layer that is a module")
        return tuple(dict.fromkeys(found))

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
                    f"layers: {path!r} is no convolution or linear layer of {type(self.module).__name__}; "
                    f"these are: {', '.join(self.paths)}"
                )
        chosen = tuple(path for path in self.paths if path in layers)
        read = {source.path for path in (*chosen, OUTPUT) for source in self.layer(path).sources}
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
        last, inside = None, False
        for node in self.graph.nodes:
            mine = node.op == "call_module" and (node.target == path or str(node.target).startswith(f"{path}."))
            mine = mine or any(name == path for name, _ in (node.meta.get("nn_module_stack") or {}).values())
            if inside and not mine:
                break
            inside = inside or mine
            last = str(node.target) if self._weighted(node) else last
        if not inside or last is None:
            raise UserError(
                f"no convolution or linear layer produces the output of {path}; take one of {', '.join(self.paths)}"
            )
        return last

    def layer(self, path: str) -> WeightedLayer:
        """What a layer reads; ``OUTPUT`` stands for the logits, each of which is a unit.

        Raises UserError for logits that do not come from a weighted layer channel by channel.
        """
        if path not in self._layers:
            self._layers[path] = self._read(path)
        return self._layers[path]

    def _read(self, path: str) -> WeightedLayer:
        if path == OUTPUT:
            (node,) = (n for n in self.graph.nodes if n.op == "output")
            given = node.args[0]
            if not isinstance(given, fx.Node):
                raise UserError(
                    f"{type(self.module).__name__} does not return one tensor; a causal graph needs its logits alone"
                )
            axis = 1
        else:
            nodes = [n for n in self.graph.nodes if n.op == "call_module" and n.target == path]
            if len(nodes) != 1:
                raise UserError(
                    f"layer {path} runs {len(nodes)} times in a forward pass; a causal graph needs layers that run once"
                )
            if not nodes[0].args:
                raise UserError(f"layer {path} is given its input by name; call it as layer(x), not layer(input=x)")
            given = nodes[0].args[0]
            linear = isinstance(self.module.get_submodule(path), nn.Linear)
            axis = len(self._shapes[given]) - 1 if linear else 1
        size = self._shapes[given][axis]
        try:
            sources = self._sources(_Place(given, axis), path)
        except UserError as error:
            if path == OUTPUT:
                raise
            alone = ChannelSource(f"{path} (input)", size, 0, 1)
            return WeightedLayer(path, tuple(alone.units()), (alone,), str(error))
        units = sorted({unit for source in sources for unit in source.units()})
        ends = [0, *(stop for _, stop in units)]
        if [start for start, _ in units] != ends[:-1] or ends[-1] != size:
            raise UserError(f"layer {path}: the channels that reach its {size} inputs overlap, or leave some out")
        return WeightedLayer(path, tuple(units), sources)

    def _sources(self, start: _Place, reader: str) -> tuple[ChannelSource, ...]:
        """The sources at the end of all ways back. Each place is visited once, however many shortcuts lead to it."""
        found: dict[ChannelSource, None] = {}
        waiting, seen = [start], {start}
        while waiting:
            place = waiting.pop()
            node, channels = place.node, self._shapes[place.node][place.axis]
            if node.op == "placeholder":
                found[ChannelSource(INPUT, channels, place.offset, place.span, place.places)] = None
                continue
            if self._weighted(node):
                path = str(node.target)
                linear = isinstance(self.module_of(path), nn.Linear)
                if place.axis != (len(self._shapes[node]) - 1 if linear else 1):
                    raise UserError(f"{reader} reads {path} along another axis than that of its channels")
                found[ChannelSource(path, channels, place.offset, place.span, place.places)] = None
                continue
            for before in self._before(place, reader):
                if before not in seen:
                    seen.add(before)
                    waiting.append(before)
        return tuple(sorted(found, key=lambda s: (s.offset, s.path)))

    # ---- one operation back -------------------------------------------------------------------

    def _before(self, place: _Place, reader: str) -> list[_Place]:
        """The places that this one comes from. Raises UserError for an operation that is not known."""
        node = place.node
        step: Callable[[_Place], list[_Place] | None] | None = None
        if node.op == "call_module":
            module = self.module.get_submodule(str(node.target))
            if isinstance(module, _PLACES):
                step = self._places
            elif isinstance(module, nn.Flatten):
                step = self._reshaped
            elif isinstance(module, _KEPT):
                step = self._aligned
            name = f"{node.target} ({type(module).__name__})"
        else:
            called = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            kinds = (
                (ALIGNED, self._aligned), (PLACES, self._places), (RESHAPED, self._reshaped),
                (PERMUTED, self._permuted), (REDUCED, self._reduced), (JOINED, self._joined),
            )  # fmt: skip
            if node.op in ("call_function", "call_method"):
                step = next((s for names, s in kinds if called in names), None)
            name = f"the function {called} ({node.name})"
        found = step(place) if step is not None else None
        if found is None:
            raise UserError(
                f"{name}, on the way to {reader}: which of its input channels make each output channel is not known, "
                "so no causal graph goes through it; search only the layers behind it (layers: the last so many)"
            )
        return found

    def _tensors(self, node: fx.Node) -> list[fx.Node]:
        """The tensors that it reads and that depend on the net's input."""
        return [n for n in node.all_input_nodes if n in self._fed and n in self._shapes]

    def _aligned(self, place: _Place) -> list[_Place] | None:
        """Channel c comes from channel c of every operand; None if an operand has one channel for all."""
        shape, found = self._shapes[place.node], []
        for operand in self._tensors(place.node):
            size = self._shapes[operand]
            axis = place.axis - (len(shape) - len(size))
            if axis < 0 or size[axis] != shape[place.axis]:
                return None
            found.append(place.back(operand, axis))
        return found

    def _places(self, place: _Place) -> list[_Place] | None:
        """Pooling and padding over the places of (N, C, *places)."""
        return self._aligned(place) if place.axis == 1 else None

    def _reshaped(self, place: _Place) -> list[_Place] | None:
        """The axis comes from the old one that begins at the same stride; old axes merged into it become its places."""
        (operand,) = self._tensors(place.node)
        old, new = self._shapes[operand], self._shapes[place.node]
        before, size = math.prod(new[: place.axis]), new[place.axis]
        found = []
        for axis in range(min(place.axis, 1), len(old)):  # samples are never channels
            inner = [math.prod(old[axis : stop + 1]) for stop in range(axis, len(old))]
            if math.prod(old[:axis]) == before and size in inner:
                inside = old[axis + 1 : axis + 1 + inner.index(size)]
                found.append(
                    replace(
                        place.back(operand, axis), span=place.span * math.prod(inside), places=inside + place.places
                    )
                )
        for choice in found[:-1]:  # axes of length 1 leave a choice: take the first that holds channels
            with suppress(UserError):
                self._sources(choice, "")
                return [choice]
        return found[-1:] or None

    def _permuted(self, place: _Place) -> list[_Place] | None:
        """The axis is another one of the only operand."""
        (operand,) = self._tensors(place.node)
        rank, rest = len(self._shapes[operand]), _arguments(place.node)
        called = str(getattr(place.node.target, "__name__", place.node.target))
        order = list(range(rank))
        if called in ("transpose", "swapaxes"):
            a, b = rest
            order[a], order[b] = order[b], order[a]
        elif called == "permute":
            dims = rest[0] if isinstance(rest[0], (tuple, list)) else rest
            order = [d % rank for d in dims]
        return [place.back(operand, order[place.axis])]

    def _reduced(self, place: _Place) -> list[_Place] | None:
        """A mean, sum or maximum over places; None if it is over the channels."""
        (operand,) = self._tensors(place.node)
        old, new, rest = self._shapes[operand], self._shapes[place.node], _arguments(place.node)
        if not rest or not isinstance(rest[0], (int, tuple, list)):
            return None
        gone = {d % len(old) for d in ([rest[0]] if isinstance(rest[0], int) else rest[0])}
        left = list(range(len(old))) if len(new) == len(old) else [d for d in range(len(old)) if d not in gone]
        axis = left[place.axis]
        return None if axis in gone else [place.back(operand, axis)]

    def _joined(self, place: _Place) -> list[_Place] | None:
        """Channels one after the other, or the same channels of every operand; None with a constant operand."""
        rest, operands = _arguments(place.node), place.node.args[0] if place.node.args else None
        if not isinstance(operands, (tuple, list)):
            return None
        axis = (rest[0] if rest else 0) % len(self._shapes[place.node])
        found, offset = [], place.offset
        for operand in operands:
            if not isinstance(operand, fx.Node) or operand not in self._fed:
                return None
            found.append(place.back(operand, place.axis, offset))
            if axis == place.axis:
                offset += self._shapes[operand][axis] * place.span
        return found


def _arguments(node: fx.Node) -> list[Any]:
    """The arguments after the first one, whether by position or by name (dim, dims, dim0, dim1)."""
    return [*node.args[1:], *(node.kwargs[k] for k in ("dim", "dims", "dim0", "dim1") if k in node.kwargs)]


def weighted_module(net: nn.Module, path: str) -> WeightedModule:
    """The module of a weighted layer of the net."""
    found = net.get_submodule(path)
    assert isinstance(found, (nn.Linear, conv._ConvNd)), f"{path} is no weighted layer"
    return found


def groups(module: WeightedModule) -> int:
    return 1 if isinstance(module, nn.Linear) else module.groups


class _Shapes(fx.Interpreter):
    """Runs a graph and records the shape of every tensor."""

    def __init__(self, net: fx.GraphModule) -> None:
        super().__init__(net)
        self.found: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.found[n] = tuple(value.shape)
        return value

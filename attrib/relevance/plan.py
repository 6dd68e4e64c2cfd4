"""What becomes of relevance at each call of a net: read off its graph once, before any number is computed.

From the logits back to the input, every call that gets relevance is given a *step*: the kind of rule, and the nodes
to which the rule passes relevance on. Calls that get none, such as the statistics of a norm, are computed and no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any, Literal

import torch
from torch import fx

from attrib.models.activations import BATCH_NORM, BILINEAR, ELEMENTWISE, LINEAR
from attrib.models.calls import OF_SHAPE, call, operation
from attrib.models.functions import Function, functions
from attrib.models.graph import Graph
from attrib.models.softmax import LOG_SOFTMAX, SOFTMAX, written_softmax
from attrib.relevance.merged import merged
from attrib.relevance.recurrent import RECURRENT, given
from attrib.types import UserError

Kind = Literal["move", "fill", "share", "layer", "merged", "product", "factors", "pass", "scale", "softmax",
               "log_softmax", "norm", "glu", "recurrent"]  # fmt: skip

# Layers: which arguments are the input, the weight and the bias, and how many dimensions behind the bias'.
CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3, "conv_transpose1d": 1, "conv_transpose2d": 2,
                 "conv_transpose3d": 3}  # fmt: skip
# Choices between a value and a constant: a function of the value.
_EXTREMES = frozenset(("maximum", "minimum", "fmax", "fmin"))
# What is largest takes all, and what is selected: numbers move, and none is computed.
_WINNERS = frozenset((
    "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "amax", "amin", "max", "min", "maximum",
    "minimum", "fmax", "fmin", "topk", "sort", "median", "kthvalue", "cummax", "cummin",
))  # fmt: skip
# Sums of several numbers, or a change of sign: not only moves. In ``LINEAR``.
_MIXED = frozenset((
    "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d", "mean", "sum", "cumsum", "grid_sampler_2d", "grid_sampler_3d", "col2im", "add", "sub",
    "rsub", "index_add", "scatter_add", "index_put",
))  # fmt: skip
_COMPLEX = frozenset(("real", "imag", "view_as_real", "view_as_complex", "_conj", "_fft_r2c", "_fft_c2c", "_fft_c2r"))
_MOVES = frozenset(LINEAR) - _MIXED - _COMPLEX - {"neg"} | {"pad"}
# Moves that may put other numbers beside or in the place of those that they move.
_FILLS = frozenset((
    "cat", "stack", "where", "masked_fill", "pad", "constant_pad_nd", "slice_scatter", "select_scatter",
    "diagonal_scatter", "as_strided_scatter", "scatter", "tril", "triu", "copy", "fill",
))  # fmt: skip
_NORMS = frozenset(("layer_norm", "group_norm"))
# What statistics are made of, and what brings them to the shape of what they were taken of.
_REDUCTIONS = frozenset(("mean", "sum", "var", "std", "linalg_vector_norm", "norm", "amax", "amin", "var_mean"))
_OF_STATISTICS = _REDUCTIONS | frozenset((
    "pow", "square", "abs", "sqrt", "rsqrt", "reciprocal", "add", "sub", "mul", "div", "clamp", "clamp_min",
    "maximum", "_to_copy", "expand", "reshape", "unsqueeze", "squeeze", "permute", "transpose", "detach",
))  # fmt: skip
_NOT_ONE_VALUE = frozenset(("add", "sub", "rsub", "mul", "div", "where", "masked_fill", "addcmul", "addcdiv", "lerp",
                            "fill", "copy", "maximum", "minimum", "_to_copy", "clone"))  # fmt: skip


@dataclass(frozen=True)
class Step:
    """What becomes of the relevance of a call: the rule, and the nodes that get it.

    at     of a layer: which arguments are its input, its weight and its bias (None: it has none)
    first  of a layer: whether there is none with weights between it and the input
    merged of a layer: the calls behind it that are computed with it
    dim    of a softmax: its axis
    function  what several calls compute of the one source
    """

    kind: Kind
    sources: tuple[fx.Node, ...]
    at: tuple[int, int, int | None] | None = None
    first: bool = False
    merged: tuple[fx.Node, ...] = ()
    dim: int | None = None
    function: Function | None = None


class Plan:
    """The steps of a graph, from ``start``, the node whose relevance is wanted, to its logits.

    constants   of a node whose value is v + c, with relevance for v alone, as a sigmoid's is: its c
    merged      the calls that are computed with the layer before them
    normaliser  a log_softmax that makes the net's logits, with only moves behind it; relevance begins in front of it

    Raises UserError, which names the module, for a call that gets relevance and has no rule.
    """

    def __init__(self, graph: Graph, start: fx.Node) -> None:
        self.graph, self.start = graph, start
        self._carries = self._carriers()
        if graph.output not in self._carries:
            raise UserError(f"LRP: no relevance flows from the logits of {graph.name} to {graph.where(start)}")
        self.constants = dict(self._constants())
        self.steps: dict[fx.Node, Step] = {}
        self._merged = dict(self._mergers())
        self.merged = {node for nodes in self._merged.values() for node in nodes}
        self.normaliser = self._normaliser()
        needed = {graph.output}
        for node in reversed(graph.nodes):
            if node in needed and node is not start:
                self.steps[node] = self._step(node)
                needed.update(self.steps[node].sources)

    def _normaliser(self) -> fx.Node | None:
        at = self.graph.output
        while at is not self.start and sum(not user.meta.get("size") for user in at.users) == 1:
            if operation(at) in LOG_SOFTMAX:
                return at
            sources = self._sources(at)
            if operation(at) not in _MOVES - _FILLS or len(sources) != 1:
                break
            (at,) = sources
        return None

    # ---- what depends on the start ----------------------------------------------------------------

    def _carriers(self) -> set[fx.Node]:
        """The nodes through which the input's numbers reach others: not those of its shape, no choices, no places."""
        found = {self.start}
        for node in self.graph.nodes:
            if node.op != "call_function" or node.meta["size"] or operation(node) in OF_SHAPE:
                continue
            dtype = node.meta.get("dtype")
            if not found.isdisjoint(_read(node)) and (dtype is None or dtype.is_floating_point or dtype.is_complex):
                found.add(node)
        return found

    def _sources(self, node: fx.Node) -> tuple[fx.Node, ...]:
        return tuple(used for used in _read(node) if used in self._carries)

    @cached_property
    def _weighted(self) -> set[fx.Node]:
        """The nodes behind a layer with weights."""
        found: set[fx.Node] = set()
        for node in self.graph.nodes:
            layer = operation(node) in RECURRENT or self._layer(node)
            if node in self._carries and (layer or not found.isdisjoint(self._sources(node))):
                found.add(node)
        return found

    def _layer(self, node: fx.Node) -> tuple[int, int, int | None] | None:
        """Where a layer with weights has its input, weight and bias; None if the node is none."""
        name, sources = operation(node), self._sources(node)
        if len(sources) != 1 or set(node.kwargs) - {"alpha", "beta"}:
            return None
        places: tuple[tuple[int, int, int | None], ...] = ()
        if name in CONVOLUTIONS or name == "linear":
            places = ((0, 1, 2),)
        elif name in ("addmm", "baddbmm", "addmv"):
            places = ((1, 2, 0), (2, 1, 0))
        elif name in ("matmul", "mm", "bmm", "mv"):
            places = ((0, 1, None), (1, 0, None))
        for x, weight, bias in places:
            if node.args[x] is sources[0] and node.args[weight] is not sources[0]:
                given = bias is not None and bias < len(node.args) and node.args[bias] is not None
                return x, weight, bias if given else None
        return None

    def _mergers(self) -> Iterator[tuple[fx.Node, tuple[fx.Node, ...]]]:
        """The layers behind which something is computed with them, and that."""
        for node in self.graph.nodes:
            if node in self._carries and node is not self.start and (at := self._layer(node)):
                convolution = operation(node) in CONVOLUTIONS
                if convolution or at[0] < at[1]:
                    found = merged(self.graph, node, 1 if convolution else -1)
                    norm = any(operation(behind) in BATCH_NORM for behind in found)
                    plain = convolution or len(node.meta["shape"]) == 2  # the channels of a batch norm are dimension 1
                    if found and self.start not in found and (plain or not norm):
                        yield node, found

    # ---- the steps ----------------------------------------------------------------------------------

    def _step(self, node: fx.Node) -> Step:
        name, sources = operation(node), self._sources(node)
        if getattr(node.meta.get("dtype"), "is_complex", False):
            raise UserError(
                f"LRP has no rule for {name} in {self.graph.where(node)}: it gives complex numbers, without sign. "
                "Take method=integrated_gradients or method=gradient_shap, which need the gradient alone"
            )
        if at := self._layer(node):
            first = sources[0] not in self._weighted
            return Step("layer", sources, at, first, self._merged.get(node, ()))
        if node in self.merged:
            return Step("merged", sources)
        if written := written_softmax(node, self._sources):
            of, dim = written
            return Step("softmax", (of,), dim=dim)
        if function := self._function(node):
            return Step("pass", (function.of,), function=function)
        if not name:  # getitem
            return Step("move", sources)
        if name in BATCH_NORM or name in _NORMS:
            first_argument = node.args[0]
            if sources == (first_argument,):
                return Step("norm", sources)
        elif name == "rms_norm":
            if sources == (node.args[0],):
                return Step("pass", sources)
        elif name in SOFTMAX:
            axis: Any = node.args[1]
            return Step("softmax", sources, dim=axis)
        elif name in LOG_SOFTMAX:
            return Step("log_softmax", sources)
        elif name in RECURRENT:
            if set(sources) <= set(given(node)):
                return Step("recurrent", sources)
        elif name == "glu":
            return Step("glu", sources)
        elif name in ("mul", "div"):
            return self._factors(node, name, sources)
        elif name in BILINEAR:
            if self._multiplies(node, name, sources):
                return Step("product", sources)
        elif len(sources) == 1 and name in _EXTREMES:
            return Step("pass", sources)
        elif name in _WINNERS or name in _MOVES:
            if name not in LINEAR or set(sources) <= set(self._linear_arguments(node, name)):
                return Step("fill" if name in _FILLS else "move", sources)
        elif name in _MIXED:
            if set(sources) <= set(self._linear_arguments(node, name)):
                return Step("share", sources)
        elif name in ("addcmul", "addcdiv", "lerp"):
            if not set(node.args[2 if name != "addcmul" or node.args[1] in sources else 1 :]) & set(sources):
                return Step("share", sources)
        elif len(sources) == 1 and (name == "neg" or name in ELEMENTWISE - _NOT_ONE_VALUE):
            return Step("pass", sources)
        raise UserError(
            f"LRP has no rule for {name} in {self.graph.where(node)}: it is neither a layer with weights, nor a sum, a "
            "choice, a product, a norm, a softmax, a recurrent layer or a function of one value. Take "
            "method=integrated_gradients or method=gradient_shap, which need the gradient alone"
        )

    def _function(self, node: fx.Node) -> Function | None:
        """What several calls compute of one value that depends on the start, number by number."""
        found = functions(self.graph).get(node)
        return found if found and found.of in self._carries else None

    @staticmethod
    def _linear_arguments(node: fx.Node, name: str) -> Iterator[fx.Node]:
        for at in LINEAR.get(name, (0,)):
            if at < len(node.args):
                value = node.args[at]
                yield from (
                    v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, fx.Node)
                )

    @staticmethod
    def _multiplies(node: fx.Node, name: str, sources: tuple[fx.Node, ...]) -> bool:
        """Whether two values are multiplied that depend on the input, perhaps beside a third that is added."""
        pair, added = BILINEAR[name]
        ends = [node.args[at] for at in pair]
        summand = node.args[added] if added is not None and added < len(node.args) else None
        return all(end in sources for end in ends) and set(sources) <= {*ends, summand} and summand not in ends

    def _factors(self, node: fx.Node, name: str, sources: tuple[fx.Node, ...]) -> Step:
        if len(sources) == 1:
            return Step("scale" if name == "mul" and node.args[0] is not node.args[1] else "pass", sources)
        a, b = sources
        common = next((n for n in self._dominators[a] if n in self._dominators[b]), None)
        if common is not None and common.meta["shape"] == node.meta["shape"]:
            return Step("pass", (common,))
        if self._statistic(b, a):
            return Step("pass", (a,))
        if name == "mul" and self._statistic(a, b):
            return Step("pass", (b,))
        return Step("factors", sources)

    def _constants(self) -> Iterator[tuple[fx.Node, float]]:
        found: dict[fx.Node, float] = {}
        for node in self.graph.nodes:
            sources, name = self._sources(node), operation(node)
            if node in self._carries and node is not self.start and (function := self._function(node)):
                zero = function.zero
                if zero is not None and zero.numel() == 1 and zero and zero.isfinite():
                    found[node] = float(zero)
                continue
            given = [n for n in node.all_input_nodes if not n.meta.get("size")]  # a view may name sizes of the input
            if len(sources) != 1 or node is self.start or any(n is not sources[0] for n in given):
                continue
            before = found.get(sources[0], 0.0)
            if name in _MOVES - _FILLS:
                value = before
            elif name in ("add", "sub", "rsub", "mul") or (name == "div" and node.args[0] is sources[0]):
                value = _of_numbers(node, sources[0], before)
            elif name in ELEMENTWISE - _NOT_ONE_VALUE:
                value = _of_numbers(node, sources[0], 0.0)
            else:
                continue
            if value and isfinite(value):
                found[node] = value
        return iter(found.items())

    @cached_property
    def _dominators(self) -> dict[fx.Node, list[fx.Node]]:
        """Each node -> itself, and the nodes, nearest first, of which it is an element-wise function."""
        found: dict[fx.Node, list[fx.Node]] = {}
        for node in self.graph.nodes:
            if node not in self._carries:
                continue
            sources = self._sources(node)
            found[node] = [node]
            if node is not self.start and operation(node) in ELEMENTWISE and sources:
                first, *others = (found[used] for used in sources)
                shape = node.meta.get("shape")
                found[node] += [n for n in first if n.meta.get("shape") == shape and all(n in o for o in others)]
        return found

    def _statistic(self, node: fx.Node, of: fx.Node) -> bool:
        """Whether a node is computed of statistics of another alone, as the deviation that a norm divides by is."""
        ends = {of}
        if operation(of) == "sub":  # centred: the statistics may be of what it was before
            ends.update(used for used in of.all_input_nodes[:1] if used in self._carries)
        reduced, open_, seen = False, [node], set()
        while open_:
            at = open_.pop()
            if at in ends or at in seen:
                continue
            seen.add(at)
            if at is self.start or (operation(at) or "getitem") not in _OF_STATISTICS | {"getitem"}:
                return False
            reduced = reduced or operation(at) in _REDUCTIONS
            open_ += self._sources(at)
        return reduced


def _read(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values a call reads, not those that it overwrites."""
    if operation(node) in ("fill", "copy"):
        return [given for given in node.args[1:] if isinstance(given, fx.Node)]
    return node.all_input_nodes


def _of_numbers(node: fx.Node, source: fx.Node, value: float) -> float:
    """What a call gives for a number in the place of its one source."""
    number = torch.tensor(value, dtype=torch.float64)
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), {source: number}.__getitem__)
    result = call(node)(*args, **kwargs)
    return float(result[0] if isinstance(result, tuple) else result)


def output_of(graph: Graph, path: str) -> fx.Node:
    """The node of what the module at ``path`` gives. Raises UserError unless it is one that the net reads once."""
    inside = [n for n in graph.nodes if n in graph.fed and f"{n.meta['module'][0]}.".startswith(f"{path}.")]
    read = [node for node in inside if any(user not in inside for user in node.users)]
    if len(read) != 1 or not operation(read[0]) or not getattr(read[0].meta.get("dtype"), "is_floating_point", False):
        raise UserError(
            f"{path} of {graph.name} does not give one tensor that the rest of the net reads; take another layer"
        )
    return read[0]

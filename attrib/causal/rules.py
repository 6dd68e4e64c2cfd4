"""What each operation of a net's graph does to origins: one rule per kind of operation (see ``structure``)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map_only

from attrib.causal.origins import Origin, Origins, expanded
from attrib.models.activations import BATCH_NORM, ELEMENTWISE
from attrib.models.calls import call, operation
from attrib.models.graph import Graph

INPUT = "input"

_MOVED = frozenset((
    "reshape", "_reshape_alias", "t", "transpose", "permute", "expand", "squeeze", "unsqueeze", "slice", "select",
    "narrow", "unbind", "split", "split_with_sizes", "chunk", "diagonal", "as_strided", "unfold", "flip", "roll",
    "repeat", "tril", "triu", "rot90", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "im2col", "pad",
    "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
    "replication_pad2d", "replication_pad3d", "cat", "stack", "slice_scatter", "select_scatter", "diagonal_scatter",
    "as_strided_scatter", "copy", "index_put", "index", "index_select", "gather",
))  # fmt: skip


class Through:
    """The rule of ``Graph.propagate`` that sends origins through a graph.

    weighted  the calls whose results are channels of their own: the layer, and their axis
    read      gets the origins of what each of these calls reads
    """

    def __init__(
        self,
        graph: Graph,
        origins: Origins,
        weighted: Mapping[fx.Node, tuple[str, int]],
        read: Callable[[fx.Node, Tensor], None],
    ) -> None:
        self._graph, self._origins, self._weighted, self._read = graph, origins, weighted, read

    @property
    def input(self) -> Origin:
        """The origins of the net's input: its channels. Token ids have none, as the embeddings are the channels."""
        node = self._graph.input
        if not node.meta["dtype"].is_floating_point:
            return Origin(torch.zeros((), dtype=torch.float64).expand(node.meta["shape"]))
        return self._own(node, INPUT, min(1, len(node.meta["shape"]) - 1))

    def __call__(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = operation(node)
        if node not in self._graph.fed:  # it asks for shapes
            args, kwargs = tree_map_only(Origin, lambda t: torch.zeros(t.ids.shape), (args, kwargs))
            return call(node)(*args, **kwargs)
        if not name:
            return call(node)(*args, **kwargs)  # one of several results
        given = [value.ids for value in tree_leaves((args, kwargs)) if isinstance(value, Origin)]
        if node in self._weighted:
            self._read(node, given[0])
            return self._own(node, *self._weighted[node])
        if name in _MOVED and not _chosen(node, args):
            return _moved(node, args, kwargs)
        rule = next((rule for names, rule in _RULES.items() if name in names), None)
        found = rule(self, node, args, given) if rule is not None else None
        if found is None:
            earlier = {int(n) for ids in given for n in ids.unique() if n < 0}
            found = given[0].new_tensor(self._origins.join(earlier | {self._mixing(node)}))
        return _results(node, found)

    def _own(self, node: fx.Node, path: str, axis: int) -> Origin:
        shape = node.meta["shape"]
        each = torch.tensor([self._origins.of([(path, j)]) for j in range(shape[axis])], dtype=torch.float64)
        return Origin(each.reshape([-1] + [1] * (len(shape) - 1 - axis % len(shape))).expand(shape))

    def _mixing(self, node: fx.Node, shared: bool = False) -> int:
        what = f"{operation(node)} of {self._graph.where(node)}"
        return self._origins.reason(what, shared)

    # ---- the rules: the origins of the result, or None where they are not known -------------------

    def _each(self, node: fx.Node, args: Any, given: list[Tensor]) -> Tensor:
        return self._origins.each(*given)

    def _same(self, node: fx.Node, args: Any, given: list[Tensor]) -> Tensor:
        return given[0]

    def _halves(self, node: fx.Node, args: Any, given: list[Tensor]) -> Tensor:
        return self._origins.each(*given[0].chunk(2, _axes(node, given[0])[0]))

    def _along(self, node: fx.Node, args: Any, given: list[Tensor]) -> Tensor:
        found = self._origins.over(given[0], _axes(node, given[0]), self._mixing(node))
        return found.expand(given[0].shape)

    def _reduced(self, node: fx.Node, args: Any, given: list[Tensor]) -> Tensor:
        axes = _axes(node, given[0])
        found = self._origins.over(given[0], axes, self._mixing(node, shared=True))
        if bound(node).get("keepdim"):
            return found
        return found.reshape([size for axis, size in enumerate(found.shape) if axis not in axes])

    def _pooled(self, node: fx.Node, args: Any, given: list[Tensor]) -> Tensor:
        places = int(re.findall(r"(\d)d", operation(node))[0])
        return self._origins.over(given[0], range(-places, 0), self._mixing(node, shared=True))

    def _filtered(self, node: fx.Node, args: Any, given: list[Tensor]) -> Tensor | None:
        """A constant filter over each channel."""
        groups, weight = bound(node)["groups"], args[1]
        if isinstance(weight, Origin) or not groups == len(weight) == given[0].shape[1]:
            return None
        return self._pooled(node, args, given)

    def _product(self, node: fx.Node, args: Any, given: list[Tensor]) -> Tensor | None:
        a, b = args[:2]
        if min((t.ids if isinstance(t, Origin) else t).ndim for t in (a, b)) < 2:
            return None
        if len(given) == 2:
            return self._origins.each(*(self._origins.over(ids, (-2, -1)) for ids in given))
        return self._origins.over(given[0], (-1 if isinstance(a, Origin) else -2,), self._mixing(node))

    def _indexed(self, node: fx.Node, args: Any, given: list[Tensor]) -> Tensor | None:
        """Of the numbers among which an index that depends on the input chooses; see ``_moved`` for other indices."""
        if not isinstance(args[0], Origin) or any(ids.any() for ids in given[1:]):
            return None
        ids, by_axis = given[0], "dim" in bound(node)
        axes = _axes(node, ids) if by_axis else [i for i, index in enumerate(args[1]) if index is not None]
        ids = self._origins.over(ids, axes, self._mixing(node)).expand(ids.shape)
        rest = tree_map_only(Origin, lambda t: torch.zeros(t.ids.shape, dtype=torch.long), args[1:])
        return call(node)(ids, *rest)

    def _embedded(self, node: fx.Node, args: Any, given: list[Tensor]) -> Tensor | None:
        return None if given[0].any() or isinstance(args[0], Origin) else self._own(node, INPUT, -1).ids


# The operations -> what becomes of the origins. Where they only move, the call itself says it.
_RULES: dict[frozenset[str], Callable[[Through, fx.Node, Any, list[Tensor]], Tensor | None]] = {
    ELEMENTWISE | {"rrelu_with_noise_functional"}: Through._each,
    frozenset((
        "layer_norm", "native_layer_norm", "group_norm", "native_group_norm", "rms_norm", "_fused_rms_norm",
        "log_softmax", *BATCH_NORM,
    )): Through._same,
    frozenset((
        "mean", "sum", "nansum", "amax", "amin", "max", "min", "median", "nanmedian", "var", "std", "var_mean",
        "std_mean", "norm", "linalg_vector_norm", "logsumexp", "prod", "any", "all", "argmax", "argmin",
        "count_nonzero",
    )): Through._reduced,
    frozenset(
        [f"{name}{d}d" for d in (1, 2, 3) for name in ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool",
         "_adaptive_avg_pool", "upsample_nearest", "_upsample_nearest_exact")]
        + ["max_pool2d_with_indices", "max_pool3d_with_indices", "upsample_linear1d", "upsample_bilinear2d",
           "upsample_bicubic2d", "upsample_trilinear3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"]
    ): Through._pooled,
    frozenset(("conv1d", "conv2d", "conv3d")): Through._filtered,
    frozenset(("softmax", "cumsum", "cumprod", "logcumsumexp")): Through._along,
    frozenset(("matmul", "bmm", "mm")): Through._product,
    frozenset(("index", "index_select", "gather")): Through._indexed,
    frozenset(("embedding",)): Through._embedded,
    frozenset(("glu",)): Through._halves,
}  # fmt: skip


def _chosen(node: fx.Node, args: Any) -> bool:
    """Whether an index depends on the input."""
    indexed = operation(node) in ("index", "index_select", "gather", "index_put")
    return indexed and any(isinstance(t, Origin) for t in tree_leaves(args[1:3] if "dim" in bound(node) else args[1]))


def _moved(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """The call itself moves the origins; where there is a constant, it puts none."""

    def ids(value: Any) -> Any:
        if isinstance(value, Origin):
            return value.ids
        return torch.zeros_like(value, dtype=torch.float64) if value.is_floating_point() else value

    args, kwargs = tree_map_only((Origin, Tensor), ids, (args, kwargs))
    if operation(node) in ("pad", "constant_pad_nd"):
        args, kwargs = args[: 3 if operation(node) == "pad" else 2], {}  # zeros, whatever it pads with
    return tree_map_only(Tensor, lambda t: Origin(expanded(t)), call(node)(*args, **kwargs))


def _results(node: fx.Node, ids: Tensor) -> Any:
    if "shape" in node.meta:
        return Origin(ids.expand(node.meta["shape"]))
    shapes: dict[Any, Any] = {user.args[1]: user.meta["shape"] for user in node.users if "shape" in user.meta}
    return [Origin(ids.expand(shapes[i])) if i in shapes else None for i in range(max(shapes) + 1)]


def bound(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by their names, defaults among them."""
    arguments = schema(node).arguments
    given = {argument.name: value for argument, value in zip(arguments, node.args, strict=False)}
    defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    return defaults | given | dict(node.kwargs)


def schema(node: fx.Node) -> torch.FunctionSchema:
    return node.target._schema  # type: ignore[union-attr]


def _axes(node: fx.Node, ids: Tensor) -> list[int]:
    """Those of the argument ``dim``; all without one."""
    given = bound(node).get("dim")
    axes = range(ids.ndim) if given is None or given == [] else [given] if isinstance(given, int) else given
    return [axis % ids.ndim for axis in axes]

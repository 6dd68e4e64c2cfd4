"""Where a net attends: the matrices of its attention, found in its graph, and the tokens that its logits read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from attrib.models.calls import call, is_float, operation
from attrib.models.graph import Graph
from attrib.models.softmax import softmax_axis
from attrib.relevance.tokens import check_followed
from attrib.relevance.ways import ELSE, REFUSED, Ways, ancestors, tokens_of
from attrib.types import UserError

# What may stand between a softmax and the product with the values: numbers are hidden, scaled, or lie otherwise.
_BETWEEN = ("masked_fill", "reshape", "expand", "_to_copy", "clone", "contiguous", "where", "unsqueeze", "squeeze",
            "permute", "transpose")  # fmt: skip


@dataclass(frozen=True)
class Passed:
    """A pass of N rows through the net.

    weights  of every layer, from the first to the last: (N, heads, T, T), rows attend to columns
    values   of the first layer, what it attends to, as tokens (N, T, C)
    mixed    what the last layer gives, as tokens (N, T, C)
    logits   (N, K)

    Gradients flow from the logits to the weights and to ``mixed``.
    """

    weights: Sequence[Tensor]
    values: Tensor
    mixed: Tensor
    logits: Tensor


class Attentions:
    """The layers of self-attention of a graph, in order.

    It does not matter by which kernel the net attends: in the graph each is a product whose left factor is a softmax.
    Raises UserError for a net without any, or whose attention is of another kind: in windows, between other tokens
    than the layer before, or with something else between the softmax and the product.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        found = {of: node for node in graph.nodes if (of := _attends(graph, node)) is not None}
        for node in graph.nodes:
            if node in graph.fed and _softmax_axis(graph, node) is not None and node not in found:
                if _ends(graph, node):
                    continue
                raise UserError(
                    f"{REFUSED}: the softmax in {graph.where(node)} is not the left factor of a product alone. {ELSE}"
                )
        self._products = list(found.values())
        self._softmax = {product: of for of, product in found.items()}
        if not self._products:
            raise UserError(f"{REFUSED}: {graph.name} has none (a product whose left factor is a softmax). {ELSE}")
        self._ways = Ways(graph)
        self._check_line(list(found))

    def _check_line(self, softmaxes: Sequence[fx.Node]) -> None:
        """Every layer must attend to what the one before gives, and to nothing else."""
        graph, ways = self._graph, self._ways
        before: fx.Node | None = None
        for weights, product in zip(softmaxes, self._products, strict=True):
            stream = ways.common([n for n in (weights, product.args[1]) if isinstance(n, fx.Node)])
            if before is not None and before not in ancestors(graph, stream):
                raise UserError(
                    f"{REFUSED}: what {graph.where(product)} attends to is not what the attention before it gives "
                    f"alone, as in a decoder that also reads an encoder. {ELSE}"
                )
            before = product

    def __call__(self, x: Tensor, grad: bool = True) -> Passed:
        """Of inputs (N, *input)."""
        weights: list[Tensor] = []
        ends: list[Tensor] = []
        kept: dict[fx.Node, Tensor] = {}  # what a softmax gave

        def watched(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            result = rule(node, args, kwargs)
            if node in softmaxes:
                kept[node] = result
            return result

        softmaxes = set(self._softmax.values())

        def rule(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if node not in self._softmax:
                return call(node)(*args, **kwargs)
            weight, value = args[:2]
            self._check_order(node, kept.pop(self._softmax[node]), weight)
            heads = self._of_heads(node, weight, len(x))
            if grad and not weight.requires_grad:
                heads = heads.detach().requires_grad_()
            if weights and heads.shape[-1] != weights[0].shape[-1]:
                raise UserError(
                    f"{REFUSED}: {self._graph.where(node)} attends to {heads.shape[-1]} tokens, and the attention "
                    f"before it to {weights[0].shape[-1]}. {ELSE}"
                )
            weights.append(heads)
            mixed = call(node)(heads.reshape(weight.shape), value, *args[2:], **kwargs)
            if not ends:
                ends.append(tokens_of(value, len(x)))
            if node is self._products[-1]:  # the way to the logits goes through the tokens
                ends.append(tokens_of(mixed, len(x)))
                mixed = ends[1].unflatten(2, (-1, mixed.shape[-1])).transpose(1, 2).reshape(mixed.shape)
            return mixed

        with torch.set_grad_enabled(grad):
            logits = self._graph.propagate(x, watched)
        return Passed(weights, ends[0], ends[1], logits)

    def check_tokens(self, x: Tensor) -> None:
        """Raises UserError unless tokens keep to themselves but for attention, for inputs of x's shape (N, *input).

        See ``attrib.relevance.tokens``. Once for each shape of inputs: it takes some passes of a single row.
        """
        known = self._graph.input.meta.setdefault("followed", set())
        if x.shape[1:] not in known:
            check_followed(self._graph, self._products, self._ways, x[:1] if self._graph.any_rows else x)
            known.add(x.shape[1:])

    def _check_order(self, node: fx.Node, given: Tensor, weight: Tensor) -> None:
        """That rows, heads and tokens lie in the product's factor as in the softmax, as after an einsum."""
        if not self._moved(node) or torch.equal(given.reshape(-1), weight.reshape(-1)):
            return
        raise UserError(
            f"{REFUSED}: {self._graph.where(node)} moves the axes of the softmax before it multiplies. {ELSE}"
        )

    def _moved(self, node: fx.Node) -> bool:
        at: Any = node.args[0]
        while isinstance(at, fx.Node) and at is not self._softmax[node]:
            if operation(at) in ("permute", "transpose"):
                return True
            at = _source(self._graph, at)
        return False

    def _of_heads(self, node: fx.Node, weight: Tensor, rows: int) -> Tensor:
        """(N, heads, T, T). Raises UserError for what is no matrix for each row and head."""
        *leading, queries, keys = weight.shape
        where = self._graph.where(node)
        if queries != keys:
            raise UserError(f"{REFUSED}: in {where} {queries} tokens attend to {keys}, not to one another. {ELSE}")
        if len(leading) == 2 and leading[0] == rows:
            return weight
        if len(leading) == 1 and leading[0] % rows == 0:
            return weight.reshape(rows, -1, queries, keys)
        raise UserError(
            f"{REFUSED} over the whole input: {where} attends with matrices of {tuple(weight.shape)} for {rows} "
            f"input(s), in windows for example, so what one token has of another cannot be followed. {ELSE}"
        )


def read_tokens(passed: Passed) -> Tensor:
    """(N, T) the tokens that the logits read of the last layer, as shares that sum to 1; zeros if they read none.

    Behind the last attention tokens meet no more until the net reads some of them (``Attentions.check_tokens``): those
    from which a gradient comes. Each has the same share: of a class token all, of a mean over T tokens 1 / T.
    """
    logits = passed.logits
    # No sum of logits is the same for all inputs with these weights, as that of log-probabilities may be.
    weight = torch.cos(torch.arange(1, logits.shape[1] + 1, device=logits.device, dtype=logits.dtype))
    (gradient,) = torch.autograd.grad((logits * weight).sum(), passed.mixed, retain_graph=True)
    size = gradient.abs().amax(2)
    read = (size > torch.finfo(size.dtype).eps * size.amax(1, keepdim=True)).to(logits.dtype)
    return read / read.sum(1, keepdim=True).clamp(min=1)


def rollout(weights: Sequence[Tensor]) -> Tensor:
    """(N, heads, T, T) each -> (N, T, T): attention through all layers, half of each going past it as a residual does.

    Abnar & Zuidema, *Quantifying Attention Flow in Transformers*, ACL 2020, section 3.
    """
    found = torch.eye(weights[0].shape[-1], dtype=weights[0].dtype, device=weights[0].device)
    identity = found
    for weight in weights:
        found = (0.5 * weight.mean(1) + 0.5 * identity) @ found
    return found


def gradient_relevance(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """(N, heads, T, T) each -> (N, T, T): R + mean over heads of the positive part of gradient * weight, times R.

    Chefer, Gur & Wolf, *Generic Attention-model Explainability*, ICCV 2021, eq. 5 and 6. Less the identity that R
    begins with: what attention adds.
    """
    identity = torch.eye(weights[0].shape[-1], dtype=weights[0].dtype, device=weights[0].device)
    found = identity
    for weight, gradient in zip(weights, gradients, strict=True):
        found = found + (gradient * weight).clamp(min=0).mean(1) @ found
    return found - identity


# ---- reading the graph ---------------------------------------------------------------------------------


def _attends(graph: Graph, node: fx.Node) -> fx.Node | None:
    """The softmax that is the left factor of a product."""
    if operation(node) not in ("matmul", "bmm") or node.args[1] not in graph.fed:
        return None
    at: Any = node.args[0]
    while isinstance(at, fx.Node) and (axis := _softmax_axis(graph, at)) is None and operation(at) in _BETWEEN:
        at = _source(graph, at)
    return at if isinstance(at, fx.Node) and axis == len(at.meta["shape"]) - 1 else None


def _source(graph: Graph, node: fx.Node) -> fx.Node | None:
    """What a call takes its numbers from, if there is one."""
    sources = _sources(graph, node)
    return sources[0] if len(sources) == 1 else None


def _sources(graph: Graph, node: fx.Node) -> tuple[fx.Node, ...]:
    return tuple(used for used in node.all_input_nodes if used in graph.fed and is_float(used))


def _softmax_axis(graph: Graph, node: fx.Node) -> int | None:
    return softmax_axis(node, partial(_sources, graph))


def _ends(graph: Graph, node: fx.Node) -> bool:
    """Whether a softmax makes the probabilities that the net returns."""
    while node is not graph.output and len(node.users) == 1:
        (node,) = node.users
        if operation(node) not in (*_BETWEEN, "log", "clamp"):
            return False
    return node is graph.output

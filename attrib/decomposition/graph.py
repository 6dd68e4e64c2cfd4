"""The decomposition of a net along its graph: a pair (relevant, irrelevant) goes through every operation."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from attrib.decomposition.call import Call, evaluated, named
from attrib.decomposition.plan import Plan
from attrib.decomposition.table import FUNCTION, RULES, Rule
from attrib.decomposition.values import LogitParts, MaskedRows, PlainValue, TensorPair, leaves
from attrib.models import Classifier
from attrib.models.calls import call, operation
from attrib.models.functions import Function
from attrib.models.graph import Graph, check_same
from attrib.types import UserError


class Decomposer:
    """Contextual decomposition of one net; its rules are in ``rules_*.py``.

    net          a Classifier, whose graph is used; or a net (N, *input) -> (N, K) in eval mode, whose graph is made for
                 the first inputs of a kind. Parameters are used, not copied
    output_bias  False leaves the bias of the last layer out of both parts, as the authors' code does for LSTMs;
                 then relevant + irrelevant = logits - bias
    rules        the rule of each operation

    Raises UserError if the net is in training mode; its methods raise UserError for a net that torch cannot export,
    and for an operation without a rule.
    """

    def __init__(
        self, net: nn.Module | Classifier, *, output_bias: bool = True, rules: Mapping[str, Rule] = RULES
    ) -> None:
        if isinstance(net, nn.Module) and net.training:
            raise UserError(f"contextual decomposition is for nets in eval mode; call {type(net).__name__}.eval()")
        self._net, self._output_bias, self._rules = net, output_bias, rules
        self._graphs: list[Graph] = []
        self._plans: dict[Graph, Plan] = {}

    # ---- what the graph alone says --------------------------------------------------------------

    def _graph(self, x: Tensor) -> tuple[Graph, Plan]:
        if isinstance(self._net, Classifier):
            found = self._net.graph(x)
        else:
            fitting = (graph for graph in self._graphs if graph.fits(x))
            found = next(fitting, None) or self._captured(self._net, x)
        found.check_any_rows("contextual decomposition")
        if found not in self._plans:
            self._plans[found] = Plan.of(found)
        return found, self._plans[found]

    @torch.no_grad()
    def _captured(self, net: nn.Module, x: Tensor) -> Graph:
        found = Graph.of(net, x)
        check_same(net, found(x.clone()), net(x.clone()))
        self._graphs.append(found)
        return found

    def constant(self, x: Tensor) -> Tensor:
        """The logits less the sum of the parts: the bias (K,) that ``output_bias=False`` leaves out, or 0."""
        if self._output_bias:
            return torch.zeros((), dtype=x.dtype if x.is_floating_point() else None, device=x.device)
        graph, _ = self._graph(x)
        last = graph.output
        given = named(last, last.args, last.kwargs) if operation(last) == "linear" else {}
        bias = given.get("bias")
        if not isinstance(bias, fx.Node) or bias.op != "get_attr":
            raise UserError(
                f"output_bias=False: the net's last operation must be an nn.Linear with a bias, not {last.name} of "
                f"{graph.where(last)}"
            )
        value: Tensor = operator.attrgetter(str(bias.target))(graph.net)
        return value

    def precision(self, x: Tensor) -> torch.dtype:
        """The coarsest floating type that the net computes in: Llama's norms round to float32 in a float64 net, too."""
        graph, _ = self._graph(x)
        types = {node.meta["dtype"] for node in graph.fed if "dtype" in node.meta}
        return max((t for t in types if t.is_floating_point), key=lambda t: torch.finfo(t).eps)

    # ---- public ----------------------------------------------------------------------------------

    def decompose(self, x: Tensor, masks: Tensor) -> LogitParts:
        """(N, *input), (N, M, *places) -> the relevant and the irrelevant part of the logits, (N, M, K) each.

        All at once, and differentiable in x and in the parameters (as Rieger et al., *Interpretations are Useful:
        Penalizing Explanations to Align Neural Networks with Prior Knowledge*, ICML 2020, need it to penalise the
        relevant part). The function ``decompose`` of this package computes in chunks and checks the sum.

        masks  1 or True for what is relevant; a number in between makes that share of the input relevant. ``places``
               are the dimensions of x with or without its channels; (T,) for token ids, whose embeddings are masked
        """
        n, m = masks.shape[:2]
        samples = torch.arange(n, device=x.device).repeat_interleave(m)
        relevant, whole = self.rows(x, masks.flatten(0, 1), samples)
        return LogitParts(relevant.unflatten(0, (n, m)), (whole - relevant).unflatten(0, (n, m)))

    def rows(self, x: Tensor, masks: Tensor, samples: Tensor, both: bool = False) -> tuple[Tensor, Tensor]:
        """(N, *input), masks (R, *places), the row of x of each mask (R,) -> relevant part and whole, (R, K) each.

        The whole is relevant + irrelevant: the net's own logits, the same under every mask and computed once per row
        of x. With ``both`` the irrelevant part is propagated on its own, as in the papers, and the whole is the sum
        of the two results; it equals the logits only if every rule is complete. Raises ValueError for masks that do
        not fit x.
        """
        if masks.ndim == x.ndim - 1:
            masks = masks.unsqueeze(1)
        if len(masks) != len(samples) or masks.ndim != x.ndim or masks.shape[2:] != x.shape[2:]:
            raise ValueError(
                f"masks {tuple(masks.shape)} do not fit {len(samples)} rows of inputs {tuple(x.shape[1:])}"
            )
        if x.is_floating_point():
            return self.split(x, x[samples] * masks.to(x.dtype), samples, both)

        def start(rows: MaskedRows) -> tuple[PlainValue, MaskedRows]:
            whole = x if rows.index is not None else x[samples]
            return PlainValue(whole, lambda: x[samples]), replace(rows, mask=masks)

        return self._rows(start, x, samples, both)

    def split(self, x: Tensor, relevant: Tensor, samples: Tensor, both: bool = False) -> tuple[Tensor, Tensor]:
        """As ``rows``, for any relevant part (R, *input) of the inputs, which need not be a masked input."""

        def start(rows: MaskedRows) -> tuple[TensorPair, MaskedRows]:
            if rows.both:
                return rows.sum(relevant, x[samples] - relevant), rows
            return rows.pair(relevant, x if rows.index is not None else x[samples]), rows

        return self._rows(start, x, samples, both)

    def _rows(
        self,
        start: Callable[[MaskedRows], tuple[TensorPair | PlainValue, MaskedRows]],
        x: Tensor,
        samples: Tensor,
        both: bool,
    ) -> tuple[Tensor, Tensor]:
        graph, plan = self._graph(x)
        if both or len(samples) == len(x) or not plan.apart:
            out = self._run(graph, plan, *start(MaskedRows(len(samples), None, both)))  # a whole for every row
            return out.relevant, out.whole
        out = self._run(graph, plan, *start(MaskedRows(len(x), samples)))
        return out.relevant, out.whole[samples]

    # ---- the interpreter ---------------------------------------------------------------------------

    def _run(self, graph: Graph, plan: Plan, start: TensorPair | PlainValue, rows: MaskedRows) -> TensorPair:
        unbiased = None if self._output_bias else graph.output
        left = Counter(function.of for node, function in plan.functions.items() if node in plan.needed)
        read = {graph.input: start} if graph.input in left else {}  # what functions in several calls still read

        def value(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if node not in plan.needed:
                return None
            if (function := plan.functions.get(node)) is None:
                found = one_call(node, args, kwargs)
            else:
                found = several_calls(node, function, read[function.of])
                left[function.of] -= 1
                if not left[function.of]:
                    del read[function.of]
            if node in left:
                read[node] = found
            for item in node.users:  # which the graph takes out of several results by itself
                if item in left and item.target is operator.getitem and isinstance(found, tuple):
                    place: Any = item.args[1]
                    read[item] = found[place]
            return found

        def several_calls(node: fx.Node, function: Function, of: TensorPair | PlainValue) -> Any:
            def run(of: Tensor) -> Tensor:
                return function(of).expand_as(of)

            if node in plan.constant or isinstance(of, PlainValue):
                return constant(node, run(of.whole))
            return self._rules[FUNCTION](
                Call(run, {"of": of}, node, graph.where(node), rows, rectifies=node in plan.rectifiers)
            )

        def one_call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if node not in graph.fed:  # sizes, and what is made of them
                return PlainValue(
                    _run(node, args, kwargs, lambda p: p.whole, _whole),
                    lambda: _run(node, args, kwargs, lambda p: p.relevant, _part),
                )
            if node.target is operator.getitem and isinstance(args[0], tuple):
                return args[0][args[1]]
            embeds = operation(node) == "embedding" and not plan.ids.isdisjoint(node.all_input_nodes)
            if node in plan.constant or not (embeds or leaves((args, kwargs), TensorPair)):
                return constant(node, _run(node, args, kwargs, lambda p: p.whole, _whole))
            rule = self._rules.get(operation(node))
            given = Call(
                call(node),
                named(node, args, kwargs),
                node,
                graph.where(node),
                rows,
                biased=node is not unbiased,
                rectifies=node in plan.rectifiers,
            )
            if rule is None:
                raise given.refuse("yet; add one to attrib/decomposition/table.py, or take another method")
            return rule(given)

        def constant(node: fx.Node, whole: Any) -> PlainValue:
            return PlainValue(whole, lambda: rows.repeat(whole, next(iter(node.meta["rows"]), None)))

        out = graph.propagate(start, value)
        if not isinstance(out, TensorPair):
            raise UserError(
                "contextual decomposition: the net's output does not depend on its input, or on token ids in another "
                "way than through an embedding"
            )
        return out


def _run(
    node: fx.Node,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    pair: Callable[[TensorPair], Any],
    plain: Callable[[PlainValue], Any],
) -> Any:
    return call(node)(*evaluated(args, pair, plain), **evaluated(kwargs, pair, plain))


def _whole(value: PlainValue) -> Any:
    return value.whole


def _part(value: PlainValue) -> Any:
    return value.part

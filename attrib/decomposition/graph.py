"""The decomposition of a net along its graph: a pair (relevant, irrelevant) goes through every operation."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg

from attrib.decomposition.call import Call
from attrib.decomposition.rules_linear import TURNED
from attrib.decomposition.table import SIZES, function_name, rule_of
from attrib.decomposition.values import LogitParts, MaskedRows, PlainValue, RowsMergedError, TensorPair
from attrib.models.split import CannotSplitError, trace
from attrib.types import UserError


class Decomposer:
    """Contextual decomposition of one net; its rules are in ``rules_*.py``.

    module       a net (N, *input) -> (N, K) in eval mode; its parameters are used, not copied
    output_bias  False leaves the bias of the last layer out of both parts, as the authors' code does for LSTMs;
                 then relevant + irrelevant = logits - bias

    Raises UserError if the net is in training mode or torch.fx cannot trace it; its methods raise UserError for an
    operation without a rule.
    """

    def __init__(self, module: nn.Module, *, output_bias: bool = True) -> None:
        if module.training:
            raise UserError(f"contextual decomposition is for nets in eval mode; call {type(module).__name__}.eval()")
        tensors = [*module.parameters(), *module.buffers()]
        own = copy.deepcopy(module, {id(t): t for t in tensors})  # tracing stores constants in the module
        try:
            self.net = fx.GraphModule(own, trace(own))
        except CannotSplitError as reason:
            raise UserError(f"contextual decomposition needs a net that torch.fx can trace: {reason}") from reason
        nodes = list(self.net.graph.nodes)
        self._nodes = nodes
        self._in_place = {node for node in nodes if self._writes(node)}
        self._content = self._reads_numbers(nodes)
        last = {source: node for node in nodes for source in node.all_input_nodes}
        self._done: dict[fx.Node, list[fx.Node]] = {}
        for source, node in last.items():
            self._done.setdefault(node, []).append(source)
        self._unbiased: fx.Node | None = None
        self.constant = torch.zeros(())  # the logits less the sum of the parts, (K,) or 0
        if not output_bias:
            self._unbiased, self.constant = self._output_layer()

    # ---- what the graph alone says --------------------------------------------------------------

    def _writes(self, node: fx.Node) -> bool:
        """Whether a node changes its first argument in place."""
        if node.op == "call_module":
            return bool(getattr(self.net.get_submodule(str(node.target)), "inplace", False))
        if node.op not in ("call_function", "call_method"):
            return False
        name = node.target if isinstance(node.target, str) else node.target.__name__
        if name.endswith("_") and not name.endswith("__"):
            return True
        try:
            names = [] if isinstance(node.target, str) else list(inspect.signature(node.target).parameters)
        except (TypeError, ValueError):  # functions that are written in C++ have no signature
            names = []
        return bool((dict(zip(names, node.args)) | node.kwargs).get("inplace", False))

    @staticmethod
    def _reads_numbers(nodes: list[fx.Node]) -> set[fx.Node]:
        """The nodes that depend on the values of the input, and not on its shape alone."""
        found: set[fx.Node] = {next(node for node in nodes if node.op == "placeholder")}
        for node in nodes:
            named = function_name(node.target) if node.op in ("call_function", "call_method") else ""
            size = named in SIZES or (named == "getattr" and node.args[1] not in TURNED)
            if not size and any(source in found for source in node.all_input_nodes):
                found.add(node)
        return found

    def _output_layer(self) -> tuple[fx.Node, Tensor]:
        (last,) = self._nodes[-1].all_input_nodes
        module = self.net.get_submodule(str(last.target)) if last.op == "call_module" else None
        if not isinstance(module, nn.Linear) or module.bias is None:
            raise UserError(f"output_bias=False: the net's last operation must be an nn.Linear with a bias, not {last}")
        return last, module.bias

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
            return PlainValue(x[samples], x if rows.index is not None else x[samples]), replace(rows, mask=masks)

        return self._rows(start, len(x), samples, both)

    def split(self, x: Tensor, relevant: Tensor, samples: Tensor, both: bool = False) -> tuple[Tensor, Tensor]:
        """As ``rows``, for any relevant part (R, *input) of the inputs, which need not be a masked input."""

        def start(rows: MaskedRows) -> tuple[TensorPair, MaskedRows]:
            if rows.both:
                return rows.sum(relevant, x[samples] - relevant), rows
            return rows.pair(relevant, x if rows.index is not None else x[samples]), rows

        return self._rows(start, len(x), samples, both)

    def _rows(
        self,
        start: Callable[[MaskedRows], tuple[TensorPair | PlainValue, MaskedRows]],
        n: int,
        samples: Tensor,
        both: bool,
    ) -> tuple[Tensor, Tensor]:
        each = MaskedRows(len(samples), None, both)  # every row has a whole of its own
        if both or len(samples) == n:
            out = self._run(*start(each))
            return out.relevant, out.whole
        try:
            out = self._run(*start(MaskedRows(n, samples)))
        except RowsMergedError:
            out = self._run(*start(each))
            return out.relevant, out.whole
        return out.relevant, out.whole[samples]

    # ---- the interpreter ---------------------------------------------------------------------------

    def _run(self, start: TensorPair | PlainValue, rows: MaskedRows) -> TensorPair:
        values: dict[fx.Node, Any] = {}
        for node in self._nodes:
            if node.op == "placeholder":
                values[node] = node.args[0] if values else start
            elif node.op == "get_attr":
                values[node] = _attribute(self.net, str(node.target))
            else:
                args, kwargs = (map_arg(given, lambda source: values[source]) for given in (node.args, node.kwargs))
                if node.op == "output":
                    break
                values[node] = value = self._call(node, args, kwargs, rows).value()
                if node in self._in_place and isinstance(value, (TensorPair, Tensor)):
                    changed = node  # nodes that read the changed tensor later, under any of its names, read this value
                    while changed in self._in_place:
                        changed = changed.all_input_nodes[0]
                        if changed in values:
                            values[changed] = value
            for source in self._done.get(node, ()):
                del values[source]
        if not isinstance(args[0], TensorPair):
            raise UserError("contextual decomposition: the net's output does not depend on its input")
        return args[0]

    def _call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], rows: MaskedRows) -> Call:
        module = self.net.get_submodule(str(node.target)) if node.op == "call_module" else None
        stack = list(node.meta.get("nn_module_stack", {}).values())
        run: Callable[..., Any]
        if module is not None:
            run, name, path = module, type(module).__name__, str(node.target)
        else:
            run = _method(node.target) if isinstance(node.target, str) else node.target
            name, path = function_name(node.target), stack[-1][0] if stack else ""
        if node in self._in_place:
            run = _on_a_copy(run)
        return Call(
            run, args, kwargs, name, path, rows, rule_of, module, node,
            biased=node is not self._unbiased, content=any(n in self._content for n in node.all_input_nodes),
        )  # fmt: skip


def _attribute(net: nn.Module, target: str) -> Any:
    for name in target.split("."):
        net = getattr(net, name)
    return net


def _method(name: str) -> Callable[..., Any]:
    return lambda value, *args, **kwargs: getattr(value, name)(*args, **kwargs)


def _on_a_copy(run: Callable[..., Any]) -> Callable[..., Any]:
    """An operation that writes into its first argument, applied to a copy of it."""

    def copied(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = map_aggregate((args, kwargs), lambda v: v.clone() if isinstance(v, Tensor) else v)
        return run(*args, **kwargs)

    return copied

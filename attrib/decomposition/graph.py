"""The decomposition of a net, by its graph: the pair (relevant, irrelevant) goes through every operation."""

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
from attrib.decomposition.values import Pair, Parts, Plain, Rows, RowsMergedError
from attrib.models.split import CannotSplitError, trace
from attrib.types import UserError


class Decomposer:
    """Contextual decomposition of one net; its rules are in ``rules_*.py``.

    module       a net (N, *input) -> (N, K) in eval mode; its parameters are used, not copied
    output_bias  False leaves the bias of the layer that gives the logits out of both parts, as the original
                 does for LSTMs: then relevant + irrelevant = logits - bias

    Raises UserError if the net cannot be traced by torch.fx or is in training mode; the methods, for an
    operation that has no rule.
    """

    def __init__(self, module: nn.Module, *, output_bias: bool = True) -> None:
        if module.training:
            raise UserError(f"contextual decomposition is for nets in eval mode; call {type(module).__name__}.eval()")
        tensors = [*module.parameters(), *module.buffers()]
        own = copy.deepcopy(module, {id(t): t for t in tensors})  # tracing leaves constants in what it traces
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
        self.constant = torch.zeros(())  # what the parts are short of the logits, (K,) or 0
        if not output_bias:
            self._unbiased, self.constant = self._output_layer()

    # ---- what is known from the graph alone ------------------------------------------------------

    def _writes(self, node: fx.Node) -> bool:
        """Whether a node changes its first argument in place."""
        if node.op == "call_module":
            return bool(getattr(self.net.get_submodule(node.target), "inplace", False))
        if node.op not in ("call_function", "call_method"):
            return False
        name = node.target if isinstance(node.target, str) else node.target.__name__
        if name.endswith("_") and not name.endswith("__"):
            return True
        try:
            names = [] if isinstance(node.target, str) else list(inspect.signature(node.target).parameters)
        except (TypeError, ValueError):  # functions written in C++ do not say
            names = []
        return bool((dict(zip(names, node.args)) | node.kwargs).get("inplace", False))

    @staticmethod
    def _reads_numbers(nodes: list[fx.Node]) -> set[fx.Node]:
        """Nodes that depend on the numbers of the input, not on its size alone."""
        found: set[fx.Node] = {next(node for node in nodes if node.op == "placeholder")}
        for node in nodes:
            named = function_name(node.target) if node.op in ("call_function", "call_method") else ""
            size = named in SIZES or (named == "getattr" and node.args[1] not in TURNED)
            if not size and any(source in found for source in node.all_input_nodes):
                found.add(node)
        return found

    def _output_layer(self) -> tuple[fx.Node, Tensor]:
        (last,) = self._nodes[-1].all_input_nodes
        module = self.net.get_submodule(last.target) if last.op == "call_module" else None
        if not isinstance(module, nn.Linear) or module.bias is None:
            raise UserError(f"output_bias=False: the net's last operation must be an nn.Linear with a bias, not {last}")
        return last, module.bias

    # ---- public ----------------------------------------------------------------------------------

    def decompose(self, x: Tensor, masks: Tensor) -> Parts:
        """(N, *input), (N, M, *places) -> the relevant and the irrelevant part of the logits, (N, M, K) each.

        In one piece, and differentiable in x and in the parameters (Rieger et al., *Interpretations are
        Useful: Penalizing Explanations to Align Neural Networks with Prior Knowledge*, ICML 2020, penalise the
        relevant part). ``decompose`` of this package cuts into chunks and checks the sum.

        masks  1 or True is relevant, numbers between share out. ``places`` are those of x without its
               channels (or with them), (T,) for token ids, which are masked at their embeddings.
        """
        n, m = masks.shape[:2]
        samples = torch.arange(n, device=x.device).repeat_interleave(m)
        relevant, whole = self.rows(x, masks.flatten(0, 1), samples)
        return Parts(relevant.unflatten(0, (n, m)), (whole - relevant).unflatten(0, (n, m)))

    def rows(self, x: Tensor, masks: Tensor, samples: Tensor, both: bool = False) -> tuple[Tensor, Tensor]:
        """(N, *input), masks (R, *places), the row of x of each mask (R,) -> relevant part and whole, (R, K) each.

        The whole is relevant + irrelevant: the net's own logits, which no mask changes, and which are computed once per
        row of x. With ``both`` the irrelevant part is propagated on its own, as in the papers, and the
        whole is the sum that comes out; it equals the logits only if every rule is complete.
        """
        if masks.ndim == x.ndim - 1:
            masks = masks.unsqueeze(1)
        if len(masks) != len(samples) or masks.ndim != x.ndim or masks.shape[2:] != x.shape[2:]:
            raise ValueError(
                f"masks {tuple(masks.shape)} do not fit {len(samples)} rows of inputs {tuple(x.shape[1:])}"
            )
        if x.is_floating_point():
            return self.split(x, x[samples] * masks.to(x.dtype), samples, both)

        def start(rows: Rows) -> tuple[Plain, Rows]:
            return Plain(x[samples], x if rows.index is not None else x[samples]), replace(rows, mask=masks)

        return self._rows(start, len(x), samples, both)

    def split(self, x: Tensor, relevant: Tensor, samples: Tensor, both: bool = False) -> tuple[Tensor, Tensor]:
        """As ``rows``, of any part of the inputs: relevant (R, *input), which need not be a masked input."""

        def start(rows: Rows) -> tuple[Pair, Rows]:
            if rows.both:
                return rows.sum(relevant, x[samples] - relevant), rows
            return rows.pair(relevant, x if rows.index is not None else x[samples]), rows

        return self._rows(start, len(x), samples, both)

    def _rows(
        self, start: Callable[[Rows], tuple[Pair | Plain, Rows]], n: int, samples: Tensor, both: bool
    ) -> tuple[Tensor, Tensor]:
        each = Rows(len(samples), None, both)  # a whole for each row
        if both or len(samples) == n:
            out = self._run(*start(each))
            return out.relevant, out.whole
        try:
            out = self._run(*start(Rows(n, samples)))
        except RowsMergedError:
            out = self._run(*start(each))
            return out.relevant, out.whole
        return out.relevant, out.whole[samples]

    # ---- the interpreter ---------------------------------------------------------------------------

    def _run(self, start: Pair | Plain, rows: Rows) -> Pair:
        values: dict[fx.Node, Any] = {}
        for node in self._nodes:
            if node.op == "placeholder":
                values[node] = node.args[0] if values else start
            elif node.op == "get_attr":
                values[node] = _attribute(self.net, node.target)
            else:
                args, kwargs = (map_arg(given, lambda source: values[source]) for given in (node.args, node.kwargs))
                if node.op == "output":
                    break
                values[node] = value = self._call(node, args, kwargs, rows).value()
                if node in self._in_place and isinstance(value, (Pair, Tensor)):
                    changed = node  # whoever reads the changed tensor later, under any of its names, reads this
                    while changed in self._in_place:
                        changed = changed.all_input_nodes[0]
                        if changed in values:
                            values[changed] = value
            for source in self._done.get(node, ()):
                del values[source]
        if not isinstance(args[0], Pair):
            raise UserError("contextual decomposition: the net's output has no parts that come from its input")
        return args[0]

    def _call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Rows) -> Call:
        module = self.net.get_submodule(node.target) if node.op == "call_module" else None
        stack = list(node.meta.get("nn_module_stack", {}).values())
        if module is not None:
            run, name, path = module, type(module).__name__, node.target
        else:
            method = isinstance(node.target, str)
            run = _method(node.target) if method else node.target
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
    """An operation that writes into its first argument, without that."""

    def copied(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = map_aggregate((args, kwargs), lambda v: v.clone() if isinstance(v, Tensor) else v)
        return run(*args, **kwargs)

    return copied

"""A net as a graph of ATen calls: what it computes, however it was written.

``torch.export`` takes modules, functions and methods down to one set of operations (``F.relu``, ``nn.ReLU`` and
``x.relu_()`` are all ``relu``), turns what is done in place, also through views, into the same without it, and keeps
the number of rows free. What has a rule of its own somewhere in this package (a convolution, a layer norm, an LSTM)
stays one call; all else that torch composes of simpler operations is taken apart, attention too.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from attrib.models.calls import OF_SHAPE, REPLACED, attribute, call, constant, operation
from attrib.models.capture import as_written, captured
from attrib.models.device_memory import is_lost, is_out_of_memory
from attrib.models.instead import GRADIENT, gradient_alone
from attrib.models.ways_back import gradient, near, with_contiguous_norms
from attrib.types import UserError

Rule = Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any]


class Graph:
    """A net's calls, from one input to its logits; good for every number of rows.

    ``Graph.of`` makes one. Its nodes are those of ``torch.fx``: one placeholder, the net's parameters and constants
    (``get_attr``), calls of ATen operations without any that write, and of ``operator`` on sizes.

    net    runs it; shares the net's parameters
    fed    the nodes whose value depends on the values of the input, not on its shape alone

    ``meta`` of a node holds ``module``, the path and class of the innermost module that makes the call; of a tensor
    also ``shape`` and ``dtype`` for the example that the net was read with, ``free``, the axes whose size may be
    another, and ``rows``, those of them whose size is a multiple of the number of rows; ``size``, whether it is a
    number that is read of a shape; and of a ``get_attr`` node ``constant``, whether it is a number of the net's code,
    not of its state. Parameters and buffers are targets by their names in the net.
    """

    def __init__(self, net: fx.GraphModule, name: str) -> None:
        self.net, self.name = net, name
        self.nodes: tuple[fx.Node, ...] = tuple(net.graph.nodes)
        self.fed = frozenset(_fed(self.nodes))
        self._last = {used: node for node in self.nodes for used in node.all_input_nodes}

    @classmethod
    def of(cls, net: nn.Module, x: Tensor) -> Graph:
        """The graph of ``net`` for inputs of the shape (but for the rows), type and device of x (N, *input).

        Raises UserError for a net that torch cannot export.
        """
        return cls(captured(net, x), type(net).__name__)

    def of_copy(self, net: nn.Module) -> Graph:
        """The graph of a net that differs from this one's in its parameters and buffers alone."""
        root, graph = nn.Module(), fx.Graph()
        copies: dict[fx.Node, Any] = {}
        for node in self.nodes:
            if node.op == "get_attr":
                target = str(node.target)
                source = self.net if node.meta["constant"] else net
                copies[node] = constant(root, graph, target, attribute(source, target), node.meta["constant"])
            else:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        return Graph(fx.GraphModule(root, graph), self.name)

    @cached_property
    def input(self) -> fx.Node:
        return next(node for node in self.nodes if node.op == "placeholder")

    @cached_property
    def output(self) -> fx.Node:
        """The node of the logits."""
        (found,) = self.nodes[-1].all_input_nodes
        return found

    def fits(self, x: Tensor) -> bool:
        """Whether it is the graph for inputs of this shape (N, *input) and type."""
        shape, dtype = self.input.meta["shape"], self.input.meta["dtype"]
        free = self.input.meta["free"]
        return (
            x.dtype == dtype
            and len(shape) == x.ndim
            and all(own == given or at in free for at, (own, given) in enumerate(zip(shape, x.shape, strict=True)))
        )

    @property
    def any_rows(self) -> bool:
        """Whether it is good for any number of rows."""
        return 0 in self.input.meta["free"]

    def check_any_rows(self, what: str) -> None:
        """Raises UserError in the name of ``what`` for a graph that is good for one number of rows alone."""
        if not self.any_rows:
            raise UserError(
                f"{what} sends any number of rows through the net at once, but {self.name} computes something that "
                "depends on how many there are. Where its code makes a plain number of that, by int(x.size(0)) or a "
                "loop over range(len(x)), x.shape[0] leaves it open"
            )

    def where(self, node: fx.Node) -> str:
        """The module that makes a call, as "path (class)": for messages."""
        path, kind = node.meta["module"]
        return f"{path or 'its forward'} ({kind})" if kind else self.name

    def __call__(self, x: Tensor) -> Tensor:
        return with_contiguous_norms(self.net.forward(x), len(x))  # which says nothing where it fails, see ``run_of``

    def propagate(self, x: Any, rule: Rule) -> Any:
        """What the net gives for x, where ``rule(node, args, kwargs)`` computes each call that depends on x.

        x is a tensor, or anything else that ``rule`` takes and returns in the place of one; of an operation with
        several results it returns several. A call may be one on sizes (``of_sizes``).
        """
        return _propagate(self.nodes, self.net, [x], rule, self._last)


def _propagate(
    nodes: Sequence[fx.Node], net: nn.Module, inputs: Sequence[Any], rule: Rule, last: Mapping[fx.Node, fx.Node]
) -> Any:
    values: dict[fx.Node, Any] = {}
    depends: set[fx.Node] = set()
    given = iter(inputs)
    for node in nodes:
        if node.op == "placeholder":
            values[node] = next(given)
            depends.add(node)
        elif node.op == "get_attr":
            values[node] = attribute(net, str(node.target))
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "output":
                return args[0]
            several = node.target is operator.getitem and isinstance(args[0], tuple | list)
            own = several or depends.isdisjoint(node.all_input_nodes)
            values[node] = call(node)(*args, **kwargs) if own else rule(node, args, kwargs)
            if not depends.isdisjoint(node.all_input_nodes):
                depends.add(node)
        for used in node.all_input_nodes:
            if last[used] is node:
                del values[used]
    raise AssertionError("a graph has an output")


def taken_apart(
    node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], rule: Rule, tensor: Callable[[Any], Tensor | None]
) -> Any:
    """What a call gives if ``rule`` computes the simpler calls that torch composes it of, such as an LSTM's steps.

    ``tensor`` gives the tensor that a value of the propagation stands for, for its shape; None for any other argument.
    The node remembers what it is composed of, for all calls with tensors of these shapes and types.
    """
    flat, spec = tree_flatten((args, kwargs))
    at = {
        i: found
        for i, value in enumerate(flat)
        if (found := value if isinstance(value, Tensor) else tensor(value)) is not None
    }
    kind = tuple((at[i].shape, at[i].dtype, at[i].device) if i in at else value for i, value in enumerate(flat))
    known: dict[Any, fx.GraphModule] = node.meta.setdefault("parts", {})
    if kind not in known:

        def function(*tensors: Tensor) -> Any:
            given = dict(zip(at, tensors, strict=True))
            args, kwargs = tree_unflatten([given.get(i, value) for i, value in enumerate(flat)], spec)
            return call(node)(*args, **kwargs)

        with as_written():
            known[kind] = net = make_fx(torch.func.functionalize(function, remove="mutations"))(*at.values())
        net.graph.eliminate_dead_code()
        for part in net.graph.nodes:
            part.target = REPLACED.get(part.target, _without_writing(part))
    nodes = list(known[kind].graph.nodes)
    last = {used: part for part in nodes for used in part.all_input_nodes}
    return _propagate(nodes, known[kind], [flat[i] for i in at], rule, last)


def _without_writing(node: fx.Node) -> Any:
    """The call that gives the same as one in place: torch leaves some of these inside what it takes apart itself."""
    if not operation(node).endswith("_"):
        return node.target
    packet = getattr(torch.ops.aten, operation(node).removesuffix("_"))
    name = getattr(node.target, "_overloadname", "default")
    return getattr(packet, name if name in packet.overloads() else packet.overloads()[0])


def _fed(nodes: tuple[fx.Node, ...]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in nodes[:-1]:
        reads = not found.isdisjoint(node.all_input_nodes)
        if node.op == "placeholder" or (reads and not node.meta["size"] and operation(node) not in OF_SHAPE):
            found.add(node)
    return found


class Graphs:
    """A net's graphs: one for all inputs that it fits, compared with the net once for every shape of inputs."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self._known: list[Graph] = []
        self._same_logits: set[torch.Size] = set()
        self._same_gradients: set[torch.Size] = set()

    def of(self, x: Tensor, of_original: Callable[[Tensor], Graph] | None = None) -> Graph:
        """For inputs of x's shape (N, *input); ``of_original`` gives the graph of the net that this one is a copy of.

        Raises UserError for a net that torch cannot export, or that computes something else than its graph.
        """
        found = next((graph for graph in self._known if graph.fits(x)), None)
        if found is None:
            found = Graph.of(self.net, x) if of_original is None else of_original(x).of_copy(self.net)
            self._known.append(found)
        if x.shape[1:] not in self._same_logits:
            self.check(found, x)
            self._same_logits.add(x.shape[1:])
        return found

    @torch.no_grad()
    def check(self, graph: Graph, x: Tensor) -> None:
        """Raises UserError unless the graph gives the net's logits for one row of x, and for several."""
        for rows in (x[:1], torch.cat((x[:1], x[-1:], x[:1]))) if graph.any_rows else (x,):
            check_same(self.net, self._tried(graph, rows.clone()), self.net(rows.clone()))

    def _tried(self, graph: Graph, rows: Tensor) -> Tensor:
        """Raises UserError for a graph that was made for other inputs, as torch's assertions in it say."""
        try:
            return graph(rows)
        except RuntimeError as error:
            if is_out_of_memory(error) or is_lost(error):
                raise
            name, why = type(self.net).__name__, (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(
                f"the graph of {name} that this method works on is not good for all inputs: {name} makes tensors whose "
                f"sizes depend on values, as where it looks for a token ({why}). {gradient_alone(self.net, rows)}"
            ) from error

    def check_gradient(self, graph: Graph, x: Tensor) -> None:
        """Raises UserError unless gradients flow through the graph as through the net.

        They do not where the net stops them (``detach``, ``torch.no_grad``) or has a way back of its own
        (``torch.autograd.Function``).
        """
        shape, rows = x.shape[1:], x[:1] if graph.any_rows else x
        if shape in self._same_gradients:
            return
        leaf = rows.detach().requires_grad_()
        if not near(gradient(graph, leaf), gradient(self.net, leaf)):
            raise UserError(
                f"{type(self.net).__name__} stops gradients (detach, torch.no_grad) or has a way back of its own "
                f"(torch.autograd.Function), which a method with rules for the way back cannot follow. {GRADIENT}"
            )
        self._same_gradients.add(shape)

    def forget(self) -> None:
        self._known.clear()
        self._same_logits.clear()


def check_same(net: nn.Module, got: Tensor, logits: Tensor) -> None:
    """Raises UserError unless ``got``, what the graph of the net gives, are its logits, both (N, K)."""
    tolerance = 1e-3 * logits.abs().nan_to_num(0.0, 0.0).max().clamp(min=1e-6).item()
    if got.shape != logits.shape or not torch.allclose(got, logits, rtol=0, atol=tolerance, equal_nan=True):
        name = type(net).__name__
        worst = f" by {(got - logits).abs().max().item():.2g}" if got.shape == logits.shape else ""
        raise UserError(
            f"the graph of {name} that this method works on gives other logits than {name} itself{worst}: what the net "
            f"computes depends on more than the values of its input. {GRADIENT}"
        )

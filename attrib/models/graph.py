"""A net as a graph of ATen calls: what it computes, however it was written.

``torch.export`` takes modules, functions and methods down to one set of operations (``F.relu``, ``nn.ReLU`` and
``x.relu_()`` are all ``relu``), turns what is done in place, also through views, into the same without it, and keeps
the number of rows free. What has a rule of its own somewhere in this package (a convolution, a layer norm, an LSTM)
stays one call; all else that torch composes of simpler operations is taken apart, attention too.
"""

from __future__ import annotations

import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, default_decompositions, export
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from attrib.models.attention import scaled_dot_product_attention
from attrib.models.device_memory import is_out_of_memory
from attrib.types import UserError

# Composite operations that stay whole, because there are rules for them.
KEPT = frozenset((
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "layer_norm",
    "group_norm", "rms_norm", "softmax", "log_softmax", "matmul", "max_pool1d", "max_pool2d", "max_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "avg_pool1d", "reshape", "pad", "lstm", "gru",
    "rnn_tanh", "rnn_relu",
))  # fmt: skip

# The result depends on the shape of the input alone.
OF_SHAPE = frozenset((
    "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty", "zero",
    "arange",
))  # fmt: skip

Rule = Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any]


def operation(node: fx.Node) -> str:
    """The name of the operation that a node calls, without ``aten::``; "" if it calls none."""
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else schema.name.removeprefix("aten::")


def call(node: fx.Node) -> Callable[..., Any]:
    """What a node calls."""
    assert callable(node.target)
    return node.target


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

        Raises UserError for a net whose way through its code depends on the values of its input.
        """
        name = type(net).__name__
        example = x[:1].expand(5 if x.shape[1:2] == (3,) else 3, *x.shape[1:]).clone()  # not another axis' size
        try:
            program = _exported(net, example)
            if not _free(program):
                program = _exported(net, x)
        except Exception as error:  # tracing runs arbitrary user code
            if is_out_of_memory(error):
                raise
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise UserError(
                f"this method needs the graph of the net, and torch cannot export {name}: {reason}. Take a method that "
                "needs the gradient alone, such as integrated_gradients"
            ) from error
        return cls(_inlined(net, program), name)

    def of_copy(self, net: nn.Module) -> Graph:
        """The graph of a net that differs from this one's in its parameters and buffers alone."""
        root, graph = nn.Module(), fx.Graph()
        copies: dict[fx.Node, Any] = {}
        for node in self.nodes:
            if node.op == "get_attr":
                target = str(node.target)
                source = self.net if node.meta["constant"] else net
                copies[node] = _constant(root, graph, target, _attribute(source, target), node.meta["constant"])
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

    def where(self, node: fx.Node) -> str:
        """The module that makes a call, as "path (class)": for messages."""
        path, kind = node.meta["module"]
        return f"{path or 'its forward'} ({kind})" if kind else self.name

    def __call__(self, x: Tensor) -> Tensor:
        return self.net(x)

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
            values[node] = _attribute(net, str(node.target))
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "output":
                return args[0]
            own = depends.isdisjoint(node.all_input_nodes) or node.target is operator.getitem
            values[node] = call(node)(*args, **kwargs) if own else rule(node, args, kwargs)
            if not depends.isdisjoint(node.all_input_nodes):
                depends.add(node)
        for used in node.all_input_nodes:
            if last[used] is node:
                del values[used]
    raise AssertionError("a graph has an output")


def of_sizes(node: fx.Node) -> bool:
    """Whether a call reads a size, or computes with sizes."""
    return not operation(node) or operation(node) == "sym_size"


def taken_apart(
    node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], rule: Rule, tensor: Callable[[Any], Tensor | None]
) -> Any:
    """What a call gives if ``rule`` computes the simpler calls that torch composes it of, such as an LSTM's steps.

    ``tensor`` gives the tensor that a value of the propagation stands for, for its shape; None for any other argument.
    """
    flat, spec = tree_flatten((args, kwargs))
    at = [i for i, value in enumerate(flat) if tensor(value) is not None]

    def function(*tensors: Tensor) -> Any:
        again = [*flat]
        for i, value in zip(at, tensors, strict=True):
            again[i] = value
        args, kwargs = tree_unflatten(again, spec)
        return call(node)(*args, **kwargs)

    with _as_written():
        net = make_fx(torch.func.functionalize(function, remove="mutations"))(*(tensor(flat[i]) for i in at))
    net.graph.eliminate_dead_code()
    for part in net.graph.nodes:
        part.target = _REPLACED.get(part.target, _without_writing(part))
    nodes = list(net.graph.nodes)
    last = {used: part for part in nodes for used in part.all_input_nodes}
    return _propagate(nodes, net, [flat[i] for i in at], rule, last)


def _without_writing(node: fx.Node) -> Any:
    """The call that gives the same as one in place: torch leaves some of these inside what it takes apart itself."""
    if not operation(node).endswith("_"):
        return node.target
    packet = getattr(torch.ops.aten, operation(node).removesuffix("_"))
    name = getattr(node.target, "_overloadname", "default")
    return getattr(packet, name if name in packet.overloads() else packet.overloads()[0])


# ---- the capture -------------------------------------------------------------------------------------


@contextmanager
def _as_written() -> Iterator[None]:
    """No fused calls for whole layers, which torch takes in eval mode, and no notes of torch's on the user's screen."""
    fast, log = torch.backends.mha.get_fastpath_enabled(), logging.getLogger("torch")
    level = log.level
    torch.backends.mha.set_fastpath_enabled(False)
    log.setLevel(logging.CRITICAL)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        log.setLevel(level)


def _exported(net: nn.Module, example: Tensor) -> ExportedProgram:
    free = {0: Dim.AUTO} if example.is_floating_point() else dict.fromkeys(range(example.ndim), Dim.AUTO)
    with _as_written():
        program = export(net, (example,), dynamic_shapes=(free,), strict=False)
        return program.run_decompositions(_taken_apart())


def _free(program: ExportedProgram) -> bool:
    """Whether the number of rows is free."""
    return _known(_given(program).meta["val"].shape[0]) is None


def _given(program: ExportedProgram) -> fx.Node:
    """The node of the net's input."""
    names = program.graph_signature.user_inputs
    return next(node for node in program.graph.nodes if node.name in names)


def _taken_apart() -> dict[Any, Callable[..., Any]]:
    """The composite operations that are not kept, and what each consists of."""
    found = {op: parts for op, parts in default_decompositions().items() if _composite(op) and _name(op) not in KEPT}
    return {**found, torch.ops.aten.scaled_dot_product_attention.default: scaled_dot_product_attention}


def _name(op: Any) -> str:
    return op._schema.name.removeprefix("aten::")


def _composite(op: Any) -> bool:
    kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return hasattr(op, "_schema") and kernel(op.name(), "CompositeImplicitAutograd")


# The same number at every place: nothing is lost if they are passed over.
_NOTHING = frozenset(("alias", "clone", "contiguous", "detach", "lift_fresh", "lift_fresh_copy"))
_REPLACED = {
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,  # whatever the strides of a rule's result are
    torch.ops.aten._unsafe_view.default: torch.ops.aten.reshape.default,
    torch.ops.aten.unsafe_split.Tensor: torch.ops.aten.split.Tensor,
    torch.ops.aten.unsafe_chunk.default: torch.ops.aten.chunk.default,
}


def _inlined(net: nn.Module, program: ExportedProgram) -> fx.GraphModule:
    """The program as a graph that reads the net's own parameters."""
    root, graph = nn.Module(), fx.Graph()
    kinds = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    copies: dict[fx.Node, Any] = {}
    rows = _given(program).meta["val"].shape[0]
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = kinds[node.name]
            if spec.kind == InputKind.USER_INPUT:
                copies[node] = graph.placeholder("x")
            else:
                target, own = str(spec.target), spec.kind in (InputKind.PARAMETER, InputKind.BUFFER)
                if not own and (name := _name_of(net, program.constants[target])):
                    target, own = name, True
                value = _attribute(net, target) if own else program.constants[target]
                copies[node] = _constant(root, graph, target if own else f"constant.{node.name}", value, not own)
        elif node.op == "get_attr":
            value = getattr(program.graph_module, str(node.target))
            copies[node] = _constant(root, graph, f"constant.{node.name}", value, True)
        elif node.op == "output":
            graph.output(copies[_logits(program, node)])
            continue
        elif operation(node) == "_assert_tensor_metadata" or (operation(node) in _NOTHING):
            copies[node] = copies.get(node.args[0])
            continue
        elif operation(node) == "copy":
            copies[node] = _copied(graph, copies, node, rows)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].target = _REPLACED.get(node.target, node.target)
        if copies[node].op != "get_attr":
            _describe(copies[node], node, rows)
    graph.eliminate_dead_code()
    return fx.GraphModule(root, graph)


def _name_of(net: nn.Module, value: Any) -> str | None:
    """The name of a weight that a layer keeps in a list, too (``nn.LSTM``), and that comes as a constant therefore."""
    found = (name for name, own in net.named_parameters() if isinstance(value, Tensor) and _same_memory(own, value))
    return next(found, None)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() != 0 and a.shape == b.shape and a.stride() == b.stride()


def _copied(graph: fx.Graph, copies: dict[fx.Node, Any], node: fx.Node, rows: Any) -> fx.Node:
    """What ``aten.copy(to, value)`` gives, by calls that have a derivative: it has none."""
    to, value = node.args[:2]
    assert isinstance(to, fx.Node)
    assert isinstance(value, fx.Node)
    wanted, given, found = to.meta["val"], value.meta["val"], copies[value]
    if len(given.shape) != len(wanted.shape) or any(map(_differ, given.shape, wanted.shape)):
        sizes = [_known(n) for n in wanted.shape]
        shape = [_size(graph, copies[to], at) if n is None else n for at, n in enumerate(sizes)]
        found = graph.call_function(torch.ops.aten.expand.default, (found, shape))
        _describe(found, node, rows)
    if given.dtype != wanted.dtype:
        found = graph.call_function(torch.ops.aten._to_copy.default, (found,), {"dtype": wanted.dtype})
    return found


def _differ(one: Any, other: Any) -> bool:
    return str(one) != str(other)


def _size(graph: fx.Graph, of: fx.Node, at: int) -> fx.Node:
    found = graph.call_function(torch.ops.aten.sym_size.int, (of, at))
    found.meta = {"module": of.meta["module"], "size": True}
    return found


def _constant(root: nn.Module, graph: fx.Graph, target: str, value: Any, constant: bool) -> fx.Node:
    """A node that reads a value, which ``root`` keeps at the same place as the net does."""
    at, *_, last = root, *target.split(".")
    for name in target.split(".")[:-1]:
        if not hasattr(at, name):
            setattr(at, name, nn.Module())
        at = getattr(at, name)
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        at.register_buffer(last, value)
    else:
        setattr(at, last, value)
    node = graph.get_attr(target)
    node.meta = {"module": ("", ""), "size": False, "constant": constant}
    return node


def _logits(program: ExportedProgram, node: fx.Node) -> fx.Node:
    specs, given = program.graph_signature.output_specs, node.args[0]
    assert isinstance(given, Sequence)
    found = [out for out, spec in zip(given, specs, strict=True) if spec.kind == OutputKind.USER_OUTPUT]
    if len(found) != 1 or not isinstance(found[0], fx.Node):
        raise UserError("this method needs the graph of a net that returns one tensor; set model.output")
    return found[0]


def _describe(copy: fx.Node, node: fx.Node, rows: Any) -> None:
    """What methods ask of a node, in place of torch's own notes, which may hold tensors and the environment."""
    value, stack = node.meta.get("val"), list((node.meta.get("nn_module_stack") or {}).values())
    copy.meta = {"module": _called(stack)}
    copy.meta["size"] = isinstance(value, int | torch.SymInt)
    if isinstance(value, Tensor):
        sizes = [n if isinstance(n, int) else n.node.hint for n in value.shape]
        copy.meta |= {"shape": tuple(sizes), "dtype": value.dtype}
        copy.meta["free"] = frozenset(at for at, n in enumerate(value.shape) if _known(n) is None)
        copy.meta["rows"] = tuple(at for at, n in enumerate(value.shape) if _counts(n, rows))


def _known(size: Any) -> int | None:
    """A size that is the same for all inputs; None if it is not."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


def _counts(size: Any, rows: Any) -> bool:
    """Whether a size depends on the number of rows."""
    return _known(size) is None and _known(rows) is None and rows.node.expr in size.node.expr.free_symbols


def _called(stack: list[Any]) -> tuple[str, str]:
    """The path and class of the innermost module that makes a call."""
    if not stack:
        return "", ""
    path, kind = stack[-1]
    kind = kind if isinstance(kind, str) else kind.__qualname__
    return path.partition("@")[0], kind.rpartition(".")[2]


def _attribute(net: nn.Module, path: str) -> Any:
    return operator.attrgetter(path)(net)


def _fed(nodes: tuple[fx.Node, ...]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in nodes[:-1]:
        reads = not found.isdisjoint(node.all_input_nodes)
        if node.op == "placeholder" or (reads and not node.meta["size"] and operation(node) not in OF_SHAPE):
            found.add(node)
    return found


def check_same(net: nn.Module, got: Tensor, logits: Tensor) -> None:
    """Raises UserError unless ``got``, what the graph of the net gives, are its logits, both (N, K)."""
    tolerance = 1e-3 * logits.abs().nan_to_num(0.0, 0.0).max().clamp(min=1e-6).item()
    if got.shape != logits.shape or not torch.allclose(got, logits, rtol=0, atol=tolerance, equal_nan=True):
        name = type(net).__name__
        worst = f" by {(got - logits).abs().max().item():.2g}" if got.shape == logits.shape else ""
        raise UserError(
            f"the graph of {name} that this method works on gives other logits than {name} itself{worst}: what the net "
            "computes depends on more than the values of its input. Take a method that needs the gradient alone, "
            "such as integrated_gradients"
        )

"""How a net is read as a graph of ATen calls, by ``torch.export``; see ``graph`` for what comes out."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind

from attrib.models import capture_older
from attrib.models.attention import scaled_dot_product_attention
from attrib.models.calls import REPLACED, attribute, constant, operation
from attrib.models.device_memory import of_the_device
from attrib.models.exporting import symbolic_len, unprinted
from attrib.models.instead import gradient_alone
from attrib.types import UserError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    Program = ExportedProgram | capture_older.OlderProgram

# Composite operations that stay whole, because there are rules for them.
KEPT = frozenset((
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "layer_norm",
    "group_norm", "rms_norm", "softmax", "log_softmax", "matmul", "max_pool1d", "max_pool2d", "max_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "avg_pool1d", "reshape", "pad", "lstm", "gru",
    "rnn_tanh", "rnn_relu",
))  # fmt: skip


def captured(net: nn.Module, x: Tensor) -> fx.GraphModule:
    """The graph of ``net`` for inputs of the shape (but for the rows), type and device of x (N, *input).

    Raises UserError for a net whose way through its code depends on the values of its input.
    """
    name = type(net).__name__
    example = x[:1].expand(5 if x.shape[1:2] == (3,) else 3, *x.shape[1:]).clone()  # not another axis' size
    try:
        program = _exported(net, example)
        if not _free(program):
            program = _of_any_length(net, example) or _exported(net, x)
    except Exception as error:  # tracing runs arbitrary user code
        if of_the_device(error):
            raise
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise UserError(
            f"this method needs the graph of the net, and torch cannot export {name}: {reason}. "
            f"{gradient_alone(net, x)}"
        ) from error
    return _inlined(net, program)


@contextmanager
def as_written() -> Iterator[None]:
    """No fused calls for whole layers, which torch takes in eval mode, and no notes of torch's on the user's screen."""
    fast, level = torch.backends.mha.get_fastpath_enabled(), logging.root.manager.disable
    torch.backends.mha.set_fastpath_enabled(False)
    logging.disable(logging.CRITICAL)  # torch's loggers have handlers and levels of their own
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        logging.disable(level)


def _exported(net: nn.Module, example: Tensor) -> Program:
    if capture_older.OLDER:
        with as_written(), unprinted():
            return capture_older.exported(net, example, _taken_apart(()))
    auto = torch.export.Dim.AUTO
    free = {0: auto} if example.is_floating_point() else dict.fromkeys(range(example.ndim), auto)
    with as_written(), unprinted():
        program = torch.export.export(net, (example,), dynamic_shapes=(free,), strict=False)
        return program.run_decompositions(dict(_taken_apart(tuple(torch.ops))))


def _of_any_length(net: nn.Module, example: Tensor) -> Program | None:
    """The program of a net that says ``len(x)`` where it means ``x.shape[0]``; None if that is not what fixes the rows.

    As every graph it is compared with the net, on other numbers of rows, before anything is made of it.
    """
    try:
        with symbolic_len():
            program = _exported(net, example)
    except Exception as error:  # tracing runs arbitrary user code, and this is a trial
        if of_the_device(error):
            raise
        return None
    return program if _free(program) else None


def _free(program: Program) -> bool:
    """Whether the number of rows is free."""
    return _known(_given(program).meta["val"].shape[0]) is None


def _given(program: Program) -> fx.Node:
    """The node of the net's input."""
    names = program.graph_signature.user_inputs
    return next(node for node in program.graph.nodes if node.name in names)


@functools.cache  # torch takes as long to list them as to export a small net
def _taken_apart(libraries: tuple[str, ...]) -> Mapping[Any, Callable[..., Any]]:
    """The composite operations of these libraries (``torch.ops``) that are not kept, and what each consists of."""
    if capture_older.OLDER:
        found = capture_older.composite(_whole)
    else:
        found = {op: parts for op, parts in torch.export.default_decompositions().items() if not _whole(op)}
    return {**found, torch.ops.aten.scaled_dot_product_attention.default: scaled_dot_product_attention}


def _whole(op: Any) -> bool:
    return not _composite(op) or _name(op) in KEPT


def _name(op: Any) -> str:
    return op._schema.name.removeprefix("aten::")


def _composite(op: Any) -> bool:
    kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return hasattr(op, "_schema") and kernel(op.name(), "CompositeImplicitAutograd")


# The same number at every place: nothing is lost if they are passed over.
_NOTHING = frozenset(("alias", "clone", "contiguous", "detach", "lift_fresh", "lift_fresh_copy"))


def _inlined(net: nn.Module, program: Program) -> fx.GraphModule:
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
                value = attribute(net, target) if own else program.constants[target]
                copies[node] = constant(root, graph, target if own else f"_constants.{node.name}", value, not own)
        elif node.op == "get_attr":
            value = getattr(program.graph_module, str(node.target))
            copies[node] = constant(root, graph, f"_constants.{node.name}", value, True)
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
            copies[node].target = REPLACED.get(node.target, node.target)
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


def _logits(program: Program, node: fx.Node) -> fx.Node:
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

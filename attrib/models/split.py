"""Cutting a net at a layer, so that the part before it runs once and the part behind it alone.

``GraphSplit`` traces the net with torch.fx and builds two nets that share its weights. What the
rear needs besides the layer's output (a residual that goes around the layer, say) is handed over
as ``rest``. ``HookSplit`` does the same job on nets that cannot be traced, by forward hooks; its
``rest`` is the input itself, and its rear runs the whole net.
"""

from __future__ import annotations

import copy
import inspect
import logging
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import CheckpointError

from attrib.models.device_memory import of_the_device
from attrib.models.exporting import TURN
from attrib.models.layers import check_layer, check_order, first_tensor, hooked, probe_of
from attrib.models.ways_back import gradient, near
from attrib.types import UserError

log = logging.getLogger(__name__)

_AUGMENTED = frozenset({"iadd", "isub", "imul", "itruediv", "ifloordiv", "imatmul", "ipow", "imod", "setitem"})


class Front(NamedTuple):
    """What the front of a net hands to its rear: B rows each."""

    z: Tensor  # (B, *layer), the layer's output
    rest: tuple[Tensor, ...]  # what else the rear needs; opaque to methods


class Split(Protocol):
    """A net that is cut at a layer; ``rear(*front(x))`` are the logits of x."""

    def front(self, x: Tensor) -> Front: ...
    def rear(self, z: Tensor, rest: tuple[Tensor, ...]) -> Tensor: ...


class CannotSplitError(Exception):
    """The traced graph cannot be cut at this layer."""


class _Tracer(fx.Tracer):
    """Traces torchvision- and timm-style nets; ``leaf`` stays one node, whatever is inside."""

    def __init__(self, leaf: nn.Module | None = None, leaves: tuple[type[nn.Module], ...] = ()) -> None:
        # timm marks what must not be traced into. Looked up only if the net can come from timm.
        layers = sys.modules.get("timm.layers")
        functions = tuple(layers.get_notrace_functions()) if layers else ()
        super().__init__(autowrap_functions=functions)
        self._thread = threading.get_ident()
        self._leaf, self._opaque = leaf, (*leaves, *(layers.get_notrace_modules() if layers else ()))

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        if module is self._leaf or isinstance(module, (nn.RNNBase, *self._opaque)):  # also subclasses
            return True
        return super().is_leaf_module(module, path)

    # While torch.fx traces, the calls and attributes of all modules of the process come here, of other threads, too.

    def call_module(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        own = threading.get_ident() == self._thread
        return super().call_module(module, forward, args, kwargs) if own else forward(*args, **kwargs)

    def getattr(self, name: str, value: Any, proxies: Any) -> Any:
        return super().getattr(name, value, proxies) if threading.get_ident() == self._thread else value


def trace(module: nn.Module, leaf: nn.Module | None = None, leaves: tuple[type[nn.Module], ...] = ()) -> fx.Graph:
    """The net's graph, of one input; optional arguments of its forward have their default values.

    ``leaf``, and modules of the classes ``leaves``, stay one node each.
    Raises CannotSplitError for a net with data-dependent Python.
    """
    try:
        _, *others = inspect.signature(module.forward).parameters.values()
        defaults = {p.name: p.default for p in others if p.default is not p.empty}
        with TURN:
            return _Tracer(leaf, leaves).trace(module, defaults or None)
    except Exception as error:  # tracing runs arbitrary user code on proxies
        if of_the_device(error):
            raise
        raise CannotSplitError(f"torch.fx cannot trace {type(module).__name__}: {error}") from error


def writes(node: fx.Node) -> bool:
    """Whether a node of a net's graph may change one of its arguments in place."""
    if node.op == "call_module":
        net = node.graph.owning_module
        return net is None or any(getattr(m, "inplace", False) for m in net.get_submodule(str(node.target)).modules())
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else node.target.__name__
    augmented = getattr(node.target, "__module__", None) == "_operator" and name in _AUGMENTED
    in_place = name.endswith("_") and not name.endswith("__")
    # ``inplace`` may be given by position: then any True among the arguments is taken for it.
    return augmented or in_place or "out" in node.kwargs or node.kwargs.get("inplace", True in node.args) is True


def run_of(net: nn.Module) -> Callable[..., Any]:
    """What to call for a net, without hooks of its own: of a graph its forward.

    A graph that is called itself prints a traceback of what fails in it, before anybody can say that it was a trial,
    or that there is an answer to it, as to a lack of memory.
    """
    return net.forward if isinstance(net, fx.GraphModule) else net


class GraphSplit:
    """The net as two graphs, cut at the output of the module at ``path``.

    front_graph   x -> (z, *rest)
    rear_graph    z, *rest -> logits
    """

    def __init__(self, module: nn.Module, path: str) -> None:
        graph = trace(module, module.get_submodule(path))
        cuts = [n for n in graph.nodes if n.op == "call_module" and n.target == path]
        if len(cuts) != 1:
            raise CannotSplitError(f"{path} appears {len(cuts)} times in the graph")
        (cut,) = cuts
        behind, needs_input = {cut}, set()
        for node in graph.nodes:
            if node.op == "placeholder" or any(i in needs_input for i in node.all_input_nodes):
                needs_input.add(node)
            if any(i in behind for i in node.all_input_nodes):
                behind.add(node)
        rear_nodes = [n for n in graph.nodes if n in behind and n is not cut]
        if not any(n.op == "output" for n in rear_nodes):
            raise UserError(f"nothing that {type(module).__name__} returns depends on {path}; take another layer")
        inputs = {i for n in rear_nodes for i in n.all_input_nodes}
        rest = [n for n in graph.nodes if n in inputs and n not in behind and n in needs_input]
        # Parameters and what is computed from them alone are not handed over but computed again.
        constants = [n for n in graph.nodes if n not in needs_input]
        self.front_graph = self._build(module, graph, [], [n for n in graph.nodes if n not in rear_nodes], (cut, *rest))
        self.rear_graph = self._build(module, graph, [cut, *rest], constants + rear_nodes, None)
        self._front: Callable[..., Any] = run_of(self.front_graph)
        self._rear: Callable[..., Any] = run_of(self.rear_graph)

    def computed_by(self, front: Callable[..., Any], rear: Callable[..., Any]) -> GraphSplit:
        """The same cut, whose graphs are computed by other functions."""
        new = copy.copy(self)
        new._front, new._rear = front, rear
        return new

    @staticmethod
    def _build(
        module: nn.Module,
        graph: fx.Graph,
        inputs: list[fx.Node],
        nodes: list[fx.Node],
        outputs: tuple[fx.Node, ...] | None,
    ) -> fx.GraphModule:
        """A net of copies of ``nodes``; with ``outputs`` None, the graph's own output node is among them."""
        new = fx.Graph()
        copies = {node: new.placeholder(f"input_{i}") for i, node in enumerate(inputs)}
        for node in nodes:
            if node.op != "output" or outputs is None:
                copies[node] = new.node_copy(node, lambda n: copies[n])
        if outputs is not None:
            new.output(tuple(copies[n] for n in outputs))
        net = fx.GraphModule(module, new)
        for node in reversed(net.graph.nodes):
            # Nobody reads what ``x[:, :2].relu_()`` gives, and yet it changes x.
            if not node.users and node.op not in ("placeholder", "output") and not writes(node):
                net.graph.erase_node(node)
        net.recompile()
        return net

    def front(self, x: Tensor) -> Front:
        z, *rest = self._front(x)
        # What is made of the shape of x alone has one row, however many x has: the places of a text's words, say.
        return Front(z, tuple(t.expand(len(x), *t.shape[1:]) if _is_of_one(t) else t for t in rest))

    def rear(self, z: Tensor, rest: tuple[Tensor, ...]) -> Tensor:
        logits: Tensor = self._rear(z, *rest)
        return logits


def _is_of_one(value: Any) -> bool:
    return isinstance(value, Tensor) and value.shape[:1] == (1,)


class _StopForwardError(Exception):
    """Leaves the forward pass once the wanted layer has run."""


def _replace(z: Tensor) -> Any:
    """A forward hook that puts z in the place of a layer's output, or of its first element."""
    return lambda _module, _inputs, output: (z, *output[1:]) if isinstance(output, (tuple, list)) else z


def _catch(found: list[Tensor], path: str) -> Any:
    """A forward hook that keeps a layer's output, or its first element, and ends the forward pass."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        found.append(first_tensor(output, path))
        raise _StopForwardError

    return hook


class HookSplit:
    """The same by forward hooks. Layers that return a tuple are cut at its first element."""

    def __init__(self, module: nn.Module, path: str) -> None:
        self._module, self._layer, self._path = module, module.get_submodule(path), path

    def front(self, x: Tensor) -> Front:
        found: list[Tensor] = []
        with hooked(self._layer, _catch(found, self._path)), suppress(_StopForwardError):
            self._module(x.clone())  # the rear needs x as it was
        if not found:
            raise UserError(f"{type(self._module).__name__} did not run the layer {self._path} for these inputs")
        return Front(found[0], (x,))

    def rear(self, z: Tensor, rest: tuple[Tensor, ...]) -> Tensor:
        with hooked(self._layer, _replace(z)):
            return self._module(rest[0].clone())


def between(module: nn.Module, start: str, end: str, x: Tensor, z: Tensor) -> Tensor:
    """The output of the layer ``end`` for inputs x (N, *input), with that of ``start`` replaced by z (N, *layer).

    Computes nothing behind ``end``; gradients flow. Both may be the same layer. Raises UserError if
    ``end`` does not run, or does not read ``start``.
    """
    found: list[Tensor] = []
    with (
        hooked(module.get_submodule(start), _replace(z)),
        hooked(module.get_submodule(end), _catch(found, end)),
        suppress(_StopForwardError),
    ):
        module(x)
    if not found or (z.requires_grad and torch.is_grad_enabled() and not found[0].requires_grad):
        raise UserError(
            f"the layer {end} of {type(module).__name__} does not read what {start} gives; "
            f"take one behind it (set model.layers.<role>)"
        )
    return found[0]


def split(module: nn.Module, path: str, x: Tensor, pairs: bool = True) -> Split:
    """The net cut at ``path``: by graph where that reproduces the logits of ``x``, else by hooks.

    ``pairs``: whether several rows will go through the net together, and two may for a trial.
    Raises UserError if the layer does not run exactly once per forward pass, or what the net reads of
    its output is not one tensor with a row per sample, in the order of the samples.
    """
    probe = probe_of(module, x)
    check_layer(module, path, probe)
    if pairs:
        check_order(module, path, probe)
    try:
        cut = _checked(GraphSplit(module, path), module, probe)
        if _same_gradients(cut, module, path, probe):
            return cut
        log.info(
            "%s stops gradients or has a way back of its own, which torch.fx does not see; using hooks at %s instead, "
            "which is slower",
            type(module).__name__,
            path,
        )
    except CannotSplitError as reason:
        log.info("%s; using hooks at %s instead, which is slower", reason, path)
    try:
        return _checked(HookSplit(module, path), module, probe)
    except CannotSplitError as reason:
        raise UserError(
            f"layer {path} of {type(module).__name__}: {reason}; take another layer (set model.layers.<role>)"
        ) from reason


def _same_gradients(cut: Split, module: nn.Module, path: str, x: Tensor) -> bool:
    """Whether gradients flow through a cut net as through the net: in its rear, and in its front if x has numbers."""
    found: list[list[Tensor | None]] = []
    leaf = x.clone().requires_grad_() if x.is_floating_point() else x.clone()
    try:
        for way in (cut, HookSplit(module, path)):
            z, rest = way.front(x.clone())
            at = z.detach().requires_grad_()
            found.append([gradient(partial(_front, way), leaf), gradient(partial(_rear, way, rest), at)])
    except CheckpointError:  # with hooks there is no way back, but there may be one through the whole
        whole = gradient(module, leaf)
        return whole is not None and near(gradient(lambda v: cut.rear(*cut.front(v)), leaf), whole)
    return all(near(one, two) for one, two in zip(*found, strict=True))


def _front(way: Split, x: Tensor) -> Tensor:
    return way.front(x).z


def _rear(way: Split, rest: tuple[Tensor, ...], z: Tensor) -> Tensor:
    return way.rear(z, rest)


@torch.no_grad()
def _checked(cut: Split, module: nn.Module, x: Tensor) -> Split:
    """Two rows through the cut net must give the logits of the whole net, else CannotSplitError.

    Two, so that a batch size that was baked into the front is noticed: two behind the front, as methods send them that
    change what one sample gives there, and two through all of it. Of a graph two different ones as well: it hands the
    numbers of rows over as they were (``z[torch.arange(len(z)), last]``), so that all rows would read the first.
    """
    expected, changed = module(x.clone()).repeat(2, 1), None
    try:
        one, two = cut.front(x.clone()), cut.front(torch.cat((x, x)))
        for rows, (z, rest) in ((1, one), (2, two)):
            if not all(isinstance(t, Tensor) and t.shape[:1] == (rows,) for t in (z, *rest)):
                raise CannotSplitError("what is handed over at the cut is not one row per sample")
        twice = tuple(torch.cat((t, t)) for t in one.rest)
        logits = [cut.rear(torch.cat((one.z, one.z)), twice), cut.rear(*two)]
        if isinstance(cut, GraphSplit):
            other = _other(one.z)
            changed = cut.rear(torch.cat((one.z, other)), twice), cut.rear(other, one.rest)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        raise CannotSplitError(f"the net does not run when cut there: {error}") from error
    if not all(_equal(got, expected) for got in logits):
        raise CannotSplitError("the cut changes the logits")
    if changed is not None and not _equal(changed[0], torch.cat((expected[:1], changed[1]))):
        raise CannotSplitError("a row behind the cut reads another row")
    return cut


def _equal(got: Tensor, expected: Tensor) -> bool:
    """Whether logits are the same but for rounding. An input may give NaN; then it must be NaN in both."""
    share = 1e-9 if expected.dtype == torch.float64 else 1e-3
    tolerance = share * expected.abs().nan_to_num(0.0, 0.0).max().clamp(min=1e-6).item()
    return got.shape == expected.shape and torch.allclose(got, expected, rtol=0, atol=tolerance, equal_nan=True)


def _other(z: Tensor) -> Tensor:
    """Other numbers, of about the same size."""
    wave = torch.arange(z.numel(), device=z.device).cos().view_as(z)
    return (z + wave * z.abs().nan_to_num(0.0, 0.0).mean().clamp(min=1e-2)).to(z.dtype)

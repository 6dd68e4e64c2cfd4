"""How torch 2.4 and 2.5 export a net: ``capture`` gets from here what later ones give it.

They cannot find out by themselves which sizes are free (``Dim.AUTO``), so that is tried. And they take apart either all
composite operations or hardly any; so hardly any at first, and then those that have no rule, by tracing the graph once
more. This relies on names of torch's that are not public, which is safe because these two versions change no more.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._decomp import get_decompositions
from torch.export.graph_signature import ExportGraphSignature

from attrib.models.calls import operation
from attrib.models.device_memory import of_the_device

OLDER = not hasattr(torch.export, "default_decompositions")  # than 2.6


@dataclasses.dataclass(frozen=True)
class OlderProgram:
    """What is read of a ``torch.export.ExportedProgram``."""

    graph_module: fx.GraphModule
    graph_signature: ExportGraphSignature
    constants: Mapping[str, Any]

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph


def exported(net: nn.Module, example: Tensor, parts: Mapping[Any, Callable[..., Any]]) -> OlderProgram:
    """``net`` for inputs like ``example``, with as many free sizes as it has; ``parts`` says what is taken apart."""
    from torch.export._trace import _export  # two seconds, for those alone who export

    lenient = {  # by whichever name this version has for it
        name: True
        for name in inspect.signature(_export).parameters
        if name.lstrip("_") in ("allow_complex_guards_as_runtime_asserts", "disable_forced_specializations")
    }

    def attempt(free: dict[int, Any]) -> OlderProgram:
        program = _export(net, (example,), dynamic_shapes=(free,), strict=False, pre_dispatch=True, **lenient)
        return _taken_apart(program, parts)

    *trials, last = _freedoms(example)
    for free in trials:
        try:
            return attempt(free)
        except Exception as error:  # tracing runs arbitrary user code, and this is a trial
            if of_the_device(error):
                raise
    return attempt(last)


def _freedoms(example: Tensor) -> Iterator[dict[int, Any]]:
    """Which axes may have any size: all of a text's, the rows alone, none."""
    rows, length = torch.export.Dim("rows", min=2), torch.export.Dim("length", min=2)
    if not example.is_floating_point() and example.ndim == 2:
        yield {0: rows, 1: length}
    yield {0: rows}
    yield {}


def composite(whole: Callable[[Any], bool]) -> dict[Any, Callable[..., Any]]:
    """Each composite ATen operation but those that stay ``whole``, and what it consists of.

    With it two that later versions of torch always take apart.
    """
    aten = torch.ops.aten
    found: dict[Any, Callable[..., Any]] = get_decompositions((aten.softshrink, aten.hardshrink))
    for name in torch._C._dispatch_get_all_op_names():
        library, _, called = name.partition("::")
        packet, _, overload = called.partition(".")
        if library == "aten":
            op = getattr(getattr(torch.ops.aten, packet), overload or "default", None)
            if op is not None and not whole(op):
                found[op] = functools.partial(_parts_of, op)
    return found


def _parts_of(op: Any, *args: Any, **kwargs: Any) -> Any:
    return op.decompose(*args, **kwargs)


def _taken_apart(program: Any, parts: Mapping[Any, Callable[..., Any]]) -> OlderProgram:
    from torch._dispatch.python import enable_python_dispatcher
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    old = [node for node in program.graph.nodes if node.op == "placeholder"]
    given = [node.meta["val"] for node in old]
    mode = next(value.fake_mode for value in given if isinstance(value, FakeTensor))
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten.view.default:  # of a reshape; what is taken apart may lie otherwise in memory
            node.target = torch.ops.aten.reshape.default
        elif operation(node) == "_assert_scalar" and not free_unbacked_symbols(node.args[0].meta["val"]):
            program.graph.erase_node(node)  # of sizes, which the graph is tried on; what asks for values stays
    run = fx.Interpreter(program.graph_module).run
    with fx.traceback.preserve_node_meta(), mode, enable_python_dispatcher():
        traced = make_fx(run, dict(parts), pre_dispatch=True, _allow_non_fake_inputs=True)(*given)
    for node, was in zip((n for n in traced.graph.nodes if n.op == "placeholder"), old, strict=True):
        node.name = was.name  # by which the signature knows it; not _rename, which adds a number where it was taken
        node.meta.setdefault("val", was.meta["val"])
    return OlderProgram(traced, program.graph_signature, program.constants)

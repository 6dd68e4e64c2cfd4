"""A graph by ``torch.compile``, as far as that works. A *how*: numbers are the same up to rounding."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from attrib.models.device_memory import is_lost, is_out_of_memory

log = logging.getLogger(__name__)


class Compiled:
    """A function of tensors, (N, ...) each, for any N.

    It is compiled when it is first called, without and with gradients, and again within ``torch.autocast``: seconds to
    two minutes each. A single row goes through the graph as it is, because torch would compile anew for it. If
    something cannot be compiled (no C++ compiler, an operation that torch's does not know), a warning says so, and from
    then on all is computed as it is. There are no second derivatives.

    >>> graph = fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()))
    >>> bool(Compiled(graph, "a net")(torch.ones(2, 3)).allclose(graph(torch.ones(2, 3))))
    True
    """

    def __init__(self, graph: fx.GraphModule, name: str) -> None:
        self._graph, self.name = graph, name
        self._compiled: Any = None  # once it was made
        self.works = True

    def __call__(self, *inputs: Tensor) -> Any:
        if not self.works or len(inputs[0]) == 1:
            return self._graph.forward(*inputs)
        try:
            with _quietly():
                if self._compiled is None:  # what was made of a module has no truth value
                    self._compiled = torch.compile(self._graph, dynamic=True)
                return self._compiled(*inputs)
        except Exception as error:  # of torch's compiler, of the one that it calls, of a file system
            if is_lost(error) or is_out_of_memory(error):
                raise
            reason = error
        found = self._graph.forward(*inputs)  # what fails here as well is no fault of the compiler
        self.give_up(reason)
        return found

    def give_up(self, reason: Exception | str) -> None:
        self.works, self._compiled = False, None
        said = str(reason)
        if isinstance(reason, Exception):
            said = f"{type(reason).__name__}: " + " ".join(line for line in said.splitlines()[:3] if line.strip())
        log.warning("run.compile: %s is not compiled, but computed as it is: %s", self.name, said)


@contextmanager
def _quietly() -> Iterator[None]:
    """While something may be compiled."""
    from torch._functorch import config  # a second, for those alone who compile

    # Whoever keeps the graph of a forward pass for several backward passes needs what else would be reused. torch asks
    # again in each backward pass, and those of a GPU run in threads of their own, which see the default alone.
    if entry := getattr(config, "_config", {}).get("donated_buffer"):
        entry.default = False
    with warnings.catch_warnings():
        # The compiler looks at the gradients of all inputs, and torch warns whoever looks.
        warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)
        yield

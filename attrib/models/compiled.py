"""A graph by ``torch.compile``, or as it is where that fails. A *how*: numbers are the same up to rounding."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from torch import Tensor, fx

from attrib.models.device_memory import is_lost, is_out_of_memory

log = logging.getLogger(__name__)


class Compiled:
    """A function of tensors, (N, ...) each, for any N.

    It is compiled when it is first called, once without and once with gradients, which takes from some seconds to two
    minutes. If that fails (no C++ compiler, an operation that torch cannot compile), a warning says so, and it is
    computed as it is from then on. Second derivatives do not exist.

    >>> graph = fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()))
    >>> bool(Compiled(graph, "a net")(torch.ones(2, 3)).allclose(graph(torch.ones(2, 3))))
    True
    """

    def __init__(self, graph: fx.GraphModule, name: str) -> None:
        self._graph, self._name = graph, name
        # The compiler looks at the gradients of all inputs, and torch warns whoever looks.
        warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)
        self._compiled: Any = torch.compile(graph, dynamic=True)

    def __call__(self, *inputs: Tensor) -> Any:
        if self._compiled is None:
            return self._graph(*inputs)
        try:
            return self._compiled(*inputs)
        except Exception as error:  # of torch's compiler, of the one that it calls, of a file system
            if is_lost(error) or is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        found = self._graph(*inputs)  # what fails here as well is no fault of the compiler
        log.warning("run.compile: %s is not compiled, but computed as it is: %s", self._name, reason)
        self._compiled = None
        return found

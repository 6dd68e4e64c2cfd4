"""``run.rows=auto``: how many rows go through a net at a time, by what its layers give for one row.

On a CPU the work costs least per row while a layer's output stays near the cores: with 64 rows of 224 pixels the same
passes took 1.5 to 1.7 times the time of 16 (docs/performance.md). So

    rows = 64 MiB / (bytes of the largest output), at least 8, at most 64

On a GPU only many rows keep it busy, and memory is the limit:

    rows = 0.25 * free / (2 * bytes of all outputs), at least 64, at most 4096

where twice is for what is kept for the way back, and a quarter leaves room for the method, its batch and others. As any
other number it is halved when memory runs out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from attrib.models.calls import EachCall
from attrib.process.free_memory import free_memory

START = 64  # where nothing is known
CACHED, FEWEST = 64 * 2**20, 8  # bytes of the largest output on a CPU, and rows whatever it is
SHARE, MOST = 0.25, 4096  # of a GPU's free memory, and rows however much that is


def fitting_rows(net: nn.Module, x: Tensor) -> int:
    """By the formula above, for inputs like x (1, *input), which goes through the net once.

    >>> fitting_rows(nn.Flatten(), torch.ones(1, 3, 8, 8))
    64
    """
    with torch.no_grad(), _Sizes(net) as sizes:
        net(x.clone())
    return cpu_rows(sizes.largest) if x.device.type == "cpu" else gpu_rows(sizes.total, free_memory(x.device))


def cpu_rows(largest: int) -> int:
    """For a largest output of so many bytes."""
    return max(FEWEST, min(START, CACHED // max(1, largest)))


def gpu_rows(total: int, free: int | None) -> int:
    """For outputs of so many bytes together; ``free`` is None where a device does not tell."""
    return START if free is None else max(START, min(MOST, int(SHARE * free / max(1, 2 * total))))


class _Sizes(EachCall):
    """Bytes of what operations give: of the largest, and of all together. What is a view of a weight does not count."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.largest = self.total = 0
        self._weights = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self._weights:
                size = tensor.numel() * tensor.element_size()
                self.largest, self.total = max(self.largest, size), self.total + size
        return found

"""What explaining a batch costs: time, rows through the net, memory, and on what."""

from __future__ import annotations

import time
from typing import Any

import torch

from attrib.budget import Peak
from attrib.models import Classifier


def device_name(device: torch.device) -> str:
    """``NVIDIA H100 80GB HBM3``, ``CPU, 2 threads``: what seconds depend on most."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


class Meter:
    """Runs from its making until :meth:`each`."""

    def __init__(self, model: Classifier) -> None:
        self._model, self._rows = model, model.passed
        self._peak = Peak(model.device)
        self._start = time.perf_counter()

    def each(self, samples: int) -> dict[str, Any]:
        """What is noted beside the map of each of ``samples`` samples, done together.

        seconds, rows   its share
        memory          bytes, of the whole batch. On a GPU the peak of torch's tensors, weights included; on a
                        CPU the peak of the whole process (resident pages: libraries, weights, what is kept for
                        the next allocation). It grows with ``run.batch`` and ``run.rows``, and two devices'
                        cannot be compared. Absent where there is no way to tell.
        device          see :func:`device_name`
        """
        seconds, more = time.perf_counter() - self._start, self._peak.bytes()
        cost = {"seconds": seconds / samples, "rows": (self._model.passed - self._rows) / samples}
        known = more is not None and self._peak.before is not None
        memory = {"memory": self._peak.before + more} if known else {}
        return {**cost, **memory, "device": device_name(self._model.device)}

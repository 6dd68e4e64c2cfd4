"""What explaining a batch costs: time, rows through the net, memory, and on what."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from attrib.models import Classifier
from attrib.process.free_memory import Peak
from attrib.process.memory import begin_small


def device_name(device: torch.device) -> str:
    """``NVIDIA H100 80GB HBM3``, ``CPU, 2 threads``: what seconds depend on most."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


EVERY = 0.25  # seconds: a kernel takes half a millisecond to say how much memory a process had


class Meter:
    """Between :meth:`begin` and :meth:`each`, for one batch after the other."""

    def __init__(self, model: Classifier) -> None:
        self._model, self._begun = model, False
        self._peak: Peak | None = None
        self._memory: dict[str, int] = {}
        self._looked = -math.inf

    def begin(self) -> None:
        if not self._begun and self._model.device.type == "cpu":
            begin_small()  # what fits, metrics and earlier cells took and freed is not this method's
        self._begun = True
        self._rows = self._model.passed
        self._peak = self._peak or Peak(self._model.device)
        self._start = time.perf_counter()

    def each(self, samples: int) -> dict[str, Any]:
        """What is noted beside the map of each of ``samples`` samples, done together.

        seconds, rows   its share
        memory          bytes, of the whole batch. On a GPU the peak of torch's tensors, weights included; on a
                        CPU the peak of the whole process (resident pages: libraries, weights, what is kept for
                        the next allocation), of batches shorter than ``EVERY`` several share one. What was freed
                        before the first batch does not count. It grows with ``run.batch`` and ``run.rows``, and two
                        devices' cannot be compared. Absent where there is no way to tell.
        device          see :func:`device_name`
        """
        now = time.perf_counter()
        cost = {"seconds": (now - self._start) / samples, "rows": (self._model.passed - self._rows) / samples}
        if self._peak is not None and (self._model.device.type != "cpu" or now - self._looked >= EVERY):
            more, before, self._looked = self._peak.bytes(), self._peak.before, now
            self._memory = {"memory": before + more} if more is not None and before is not None else {}
            self._peak = None
        return {**cost, **self._memory, "device": device_name(self._model.device)}
